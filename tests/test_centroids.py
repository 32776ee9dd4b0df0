"""The nearest-centroid head: results of the authors' code, scores, losses, and PyTorch's tools."""

import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from parity_cases import recipe, reference_results, relative_error
from plain_centroids import head64, learn, random_batch, set_head, sinkhorn, unit_features, update
from timm.optim import create_optimizer_v2
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.layers.centroid_learning import CentroidLearning, balanced_assignment
from cluster_zoo.layers.nearest_centroid import NearestCentroidHead
from cluster_zoo.weights import conversion, load_checkpoint

TINY = dict(channels=(8, 16, 24, 32), num_classes=5)  # the feature width of the reference results


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- Results of the authors' code ----


def test_parity():
    expected = reference_results('dnc_head')
    features = recipe.inputs('dnc_head')[0]
    head = NearestCentroidHead(32, 5).double()
    head.load_state_dict(conversion.nearest_centroid_head(recipe.state_dict('dnc_head')), strict=False)
    labels = expected['labels']
    assert torch.equal(labels, (recipe.inputs('dnc_head')[1].abs() * 1e4).floor().long() % 5)
    assert relative_error(head(features), expected['logits']) < 1e-9
    similarity = head.similarity(features)[torch.arange(64), labels]
    assigned = balanced_assignment(similarity, labels, 5)
    assert torch.equal(4 * labels + assigned, expected['assigned_subcentroid'].long())
    head.learn(labels)
    before, after = expected['prototypes_before'], expected['prototypes_after']
    assert not torch.equal(before, after)
    assert relative_error(head.prototypes, after) < 1e-9
    assert relative_error(head.prototypes - before, after - before) < 1e-9


def test_parity_through_the_authors_checkpoint(tmp_path):
    expected = reference_results('dnc_head')
    model = timm.create_model('dnc_resnet18', **TINY).double()
    state_dict = {f'backbone.{k}': v for k, v in model.state_dict().items() if not k.startswith('fc.')}
    state_dict |= {f'head.{k}': v for k, v in recipe.state_dict('dnc_head').items()}
    torch.save({'state_dict': state_dict}, tmp_path / 'published.pth')
    load_checkpoint(model, tmp_path / 'published.pth')
    head = model.get_classifier()
    assert relative_error(head(recipe.inputs('dnc_head')[0]), expected['logits']) < 1e-9
    model.learn(expected['labels'])
    assert relative_error(head.prototypes, expected['prototypes_after']) < 1e-9


def test_plain_loop_equals_the_authors_code():
    """The tests below compare with this loop."""
    expected = reference_results('dnc_head')
    head = NearestCentroidHead(32, 5).double()
    head.load_state_dict(conversion.nearest_centroid_head(recipe.state_dict('dnc_head')), strict=False)
    z = unit_features(head, recipe.inputs('dnc_head')[0])
    with torch.no_grad():
        assert relative_error(update(head, z, expected['labels']), expected['prototypes_after']) < 1e-12


# ---- Scores ----


def test_norm_of_a_centroid_does_not_matter():
    head = head64()
    x = torch.randn(7, 12).double()
    logits = head(x)
    head.prototypes.mul_(torch.rand(5, 3, 1) + 0.1)
    torch.testing.assert_close(head(x), logits, rtol=1e-12, atol=1e-12)


def test_formula_in_plain_loops():
    B, D, K, k = 3, 5, 4, 2
    head = set_head(NearestCentroidHead(D, K, k).double())
    x = torch.randn(B, D, dtype=torch.float64)

    def layer_norm(values, norm):
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-5)
        weight, bias = norm.weight.tolist(), norm.bias.tolist()
        return [(v - mean) / deviation * w + b for v, w, b in zip(values, weight, bias)]

    def cosine(a, b):
        return sum(i * j for i, j in zip(a, b)) / math.sqrt(sum(i * i for i in a) * sum(j * j for j in b))

    for feature, logits in zip(x.tolist(), head(x).tolist()):
        z = layer_norm(feature, head.feat_norm)
        scores = [max(cosine(z, p) for p in subs) for subs in head.prototypes.tolist()]
        assert logits == pytest.approx(layer_norm(scores, head.mask_norm), rel=1e-10)


def test_centroids_are_a_buffer_of_unit_vectors():
    head = NearestCentroidHead(16, 6, 3)
    assert not any(value.requires_grad for value in head.buffers())
    assert {name for name, _ in head.named_parameters()} == {
        'feat_norm.weight', 'feat_norm.bias', 'mask_norm.weight', 'mask_norm.bias'
    }  # fmt: skip
    assert head.prototypes.shape == (6, 3, 16)
    torch.testing.assert_close(head.prototypes.norm(dim=-1), torch.ones(6, 3))
    head(torch.randn(4, 16)).sum().backward()
    assert not head.prototypes.requires_grad and head.prototypes.grad is None


@pytest.mark.parametrize(('common_start', 'cosine'), [(0.0, 0.0), (1.0, 0.5), (2.0, 0.8), (10.0, 100 / 101)])
def test_common_start(common_start, cosine):
    p = NearestCentroidHead(2000, 20, 4, common_start=common_start).prototypes
    within = torch.stack([(each @ each.T)[~torch.eye(4, dtype=torch.bool)].mean() for each in p]).mean()
    assert within.item() == pytest.approx(cosine, abs=0.02)
    assert (p[0] @ p[1].T).abs().max() < 0.15  # classes are always unrelated


@pytest.mark.parametrize('common_start', [-1.0, float('inf'), float('nan')])
def test_common_start_out_of_range(common_start):
    with pytest.raises(ValueError, match='common_start'):
        NearestCentroidHead(8, 3, common_start=common_start)


def test_gradients():
    head = set_head(NearestCentroidHead(6, 4, 2).double())
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*head.named_parameters())

    def forward(x, *parameters):
        return torch.func.functional_call(head, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


def test_similarity_and_further_dimensions():
    head = set_head(NearestCentroidHead(8, 5, 3))
    x = torch.randn(2, 4, 6, 8)
    similarity = head.similarity(x)
    assert similarity.shape == (2, 4, 6, 5, 3)
    assert similarity.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head(x).reshape(-1, 5), head(x.reshape(-1, 8)))
    # a feature equal to a centroid gets the class of the centroid
    plain = NearestCentroidHead(8, 5, 3)
    plain.prototypes.copy_(plain.feat_norm(plain.prototypes))
    classes = plain(plain.prototypes.flatten(0, 1)).argmax(-1)
    assert classes.tolist() == [c for c in range(5) for _ in range(3)]


@pytest.mark.parametrize('num_classes, sub_centroids', [(1, 1), (2, 1), (1000, 4)])
def test_any_number_of_classes(num_classes, sub_centroids):
    logits = NearestCentroidHead(8, num_classes, sub_centroids)(torch.randn(1, 8))
    assert logits.shape == (1, num_classes) and logits.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    head = NearestCentroidHead(32, 10, dtype=dtype)
    assert {t.dtype for t in head.state_dict().values()} == {dtype}
    x = torch.randn(4, 32)
    logits = head(x.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), head.float()(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_constant_features(dtype):
    """The features of a blank image are zero after the norm: no division by zero, also in the backward pass."""
    head = NearestCentroidHead(32, 10, dtype=dtype)
    x = torch.ones(2, 32, dtype=dtype, requires_grad=True)
    head(x).float().square().sum().backward()
    assert head(x).isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    head = NearestCentroidHead(32, 10)
    x = torch.randn(4, 32)
    with torch.autocast('cpu', dtype):
        logits = head(x)
    torch.testing.assert_close(logits.float(), head(x), rtol=0.1, atol=0.1)
    with torch.autocast('cpu', dtype):
        assert head(torch.ones(2, 32)).isfinite().all()


def test_meta_device():
    with torch.device('meta'):
        head = NearestCentroidHead(8, 3)
    assert all(t.is_meta for t in head.state_dict().values())
    assert all(t.is_meta for t in NearestCentroidHead(8, 3, device='meta').state_dict().values())
    head = head.to_empty(device='cpu')
    head.reset_parameters()
    torch.testing.assert_close(head.prototypes.norm(dim=-1), torch.ones(3, 4))
    assert head(torch.randn(2, 8)).isfinite().all()


@pytest.mark.parametrize('sizes', [(0, 3, 4), (8, 0, 4), (8, 3, 0), (8, -1, 4)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match='of at least 1, got'):
        NearestCentroidHead(*sizes)


def test_features_of_another_width_are_refused():
    with pytest.raises(RuntimeError):
        NearestCentroidHead(8, 3)(torch.randn(2, 9))


# ---- The contrast loss ----


@pytest.mark.parametrize('sub_centroids', [1, 3])
def test_contrast_loss(sub_centroids):
    head = head64(sub_centroids=sub_centroids, contrast=1.0, contrast_temperature=0.2)
    x, labels = random_batch(head, 25)
    labels[:4] = -1
    x.requires_grad_()
    head(x)
    loss = head.contrast_loss(labels)

    z, p = unit_features(head, x), F.normalize(head.prototypes, dim=-1)
    total, count = 0, 0
    for c in range(5):
        members = z[labels == c]
        assigned = sinkhorn((members @ p[c].T).detach(), 0.05)
        for feature, j in zip(members, assigned):
            powers = [[torch.exp(feature @ p[a, b] / 0.2) for b in range(sub_centroids)] for a in range(5)]
            total = total - torch.log(powers[c][j] / sum(sum(row) for row in powers))
            count += 1
    torch.testing.assert_close(loss, total / count, rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.allclose(gradient, torch.autograd.grad(total / count, x)[0], rtol=1e-8, atol=1e-12)
    assert gradient[4:].abs().sum(-1).min() > 0 and gradient[:4].abs().max() == 0


def test_contrast_loss_without_samples():
    head = head64(contrast=1.0)
    head(torch.randn(3, 12, dtype=torch.float64, requires_grad=True))
    loss = head.contrast_loss(torch.tensor([-1, -1, -1]))
    loss.backward()
    assert loss == 0


# ---- Buffers ----


def test_memory_is_not_part_of_the_state_dict():
    head = NearestCentroidHead(8, 3)
    names = set(head.state_dict())
    learn(head, torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    assert set(head.state_dict()) == names
    assert 192 not in [len(value) for value in head.buffers()]


def test_optimizers_leave_centroids_alone():
    model = timm.create_model('dnc_resnet18', **TINY)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=0.1, weight_decay=0.5)
    owned = {id(value) for group in optimizer.param_groups for value in group['params']}
    before = model.get_classifier().prototypes.clone()
    assert id(model.get_classifier().prototypes) not in owned
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.get_classifier().prototypes, before) and model.get_classifier().prototypes.grad is None


@pytest.mark.parametrize('twice', [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies_between_forward_and_learn(twice):
    head = head64(contrast=1.0)
    learn(head, *random_batch(head, 6))
    x, labels = random_batch(head, 6)
    head(x.requires_grad_())
    twin = twice(head)
    with pytest.raises(RuntimeError, match='training mode'):
        twin.learn(labels)
    head.learn(labels)
    torch.testing.assert_close(learn(twin, x, labels), head.prototypes, rtol=0, atol=0)
    assert twin.memory is not head.memory


@pytest.mark.parametrize('every', [1, 2])
@pytest.mark.parametrize('soft', [False, True])
def test_no_synchronization_with_the_device(every, soft):
    """Reading a value of a fake tensor fails; on a GPU it would synchronize."""
    with FakeTensorMode():
        head = NearestCentroidHead(8, 3, learning=CentroidLearning(every=every, contrast=1.0))
        for size in (4, 300, 1):
            head(torch.randn(size, 8, requires_grad=True))
            target = torch.zeros(size, 3) if soft else torch.zeros(size, dtype=torch.int64)
            head.contrast_loss(target)
            head.learn(target)
        count = head.memory.count
        for reads in (count.item, count.nonzero, lambda: count[count > 0], lambda: bool(count > 0)):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                reads()


def test_memory_is_kept_when_the_module_is_moved():
    head = NearestCentroidHead(8, 3)
    learn(head, torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    head.double()
    learn(head, torch.randn(2, 8).double(), torch.tensor([1, 1]))
    assert head.memory.state_dict()['labels'].tolist() == [0, 1, 2, 0, 1, 1]
    assert head.memory.features.dtype == torch.float64


# ---- PyTorch's tools in training ----


def compiled_batches(head, sizes):
    return [tuple(part.float() if part.is_floating_point() else part for part in random_batch(head, n)) for n in sizes]


@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
@pytest.mark.parametrize('contrast', [0.0, 1.0])
def test_compiled_training(backend, contrast):
    torch.compiler.reset()
    head = head64(contrast=contrast, momentum=0.5).float()
    plain = copy.deepcopy(head)
    compiled = torch.compile(head, fullgraph=True, backend=backend)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for number, (x, labels) in enumerate(compiled_batches(head, (8, 16, 9, 24, 5))):
        for module, owner in ((compiled, head), (plain, plain)):
            loss = F.cross_entropy(module(x), labels)
            loss = loss + owner.contrast_loss(labels) if contrast else loss
            loss.backward()
            owner.learn(labels)
        torch.testing.assert_close(head.prototypes, plain.prototypes)
        torch.testing.assert_close(head.feat_norm.weight.grad, plain.feat_norm.weight.grad, rtol=1e-4, atol=1e-5)
        if number == 1:
            graphs = counter['stats']['unique_graphs']
    assert counter['stats']['unique_graphs'] == graphs <= 2  # the second has a dynamic size


def test_compiled_step_with_learning():
    """Forward pass, loss and learning are one graph, which is not compiled again for each batch."""
    torch.compiler.reset()
    head = head64(memory=40, momentum=0.5).float()
    plain = copy.deepcopy(head)

    def step(head, x, labels):
        loss = F.cross_entropy(head(x), labels)
        head.learn(labels)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend='aot_eager')
    counter = torch._dynamo.utils.counters
    counter.clear()
    for x, labels in compiled_batches(head, (8, 8, 16, 9, 24, 5, 31, 12, 8, 16)):
        torch.testing.assert_close(compiled(head, x, labels), step(plain, x, labels))
        torch.testing.assert_close(head.prototypes, plain.prototypes)
    assert counter['stats']['unique_graphs'] <= 4


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('tool', ['script', 'trace', 'fx', 'export'])
def test_tools(tool, training):
    model = timm.create_model('dnc_resnet18', **TINY).train(training)
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    # A forward pass in training mode changes the batch statistics.
    expected = copy.deepcopy(model)(x)
    made = {
        'script': lambda: torch.jit.script(model),
        'trace': lambda: torch.jit.trace(model, x, check_trace=False),
        'fx': lambda: torch.fx.symbolic_trace(model),
        'export': lambda: torch.export.export(model, (x,)).module(),
    }[tool]()
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match='training mode'):
        model.learn(labels)  # tracing is not a forward pass
    model.train()(x)
    model.learn(labels)


# ---- The benchmark ----


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_benchmark(dtype, tmp_path):
    """The benchmark fails unless the loop over classes gives the same centroids."""
    script = Path(__file__).parents[1] / 'benchmarks' / 'centroids.py'
    sizes = ['--classes', '6', '--sub-centroids', '2', '--memory', '300', '--width', '16', '--dtype', dtype]
    command = [sys.executable, script, *sizes, '--rounds', '1', '--threads', '1', '--json', tmp_path / 'a.json']
    done = subprocess.run([*command, '--markdown'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '| all classes at once |' in done.stdout and '| loop over classes |' in done.stdout
    assert f'6 classes x 2 sub-centroids x 300 features of width 16 in {dtype}' in done.stdout
    report = json.loads((tmp_path / 'a.json').read_text())
    assert report['step'] > 1e-4 and report['difference'] < 1e-3 * report['step']
    assert all(result['seconds'] > 0 for result in report['results'].values())
