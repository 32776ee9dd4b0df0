"""Centroid learning against plain loops over classes and lists of features."""

import copy
import io
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from plain_centroids import PlainLearner, head64, learn, random_batch, sinkhorn
from timm.data import Mixup

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.layers.centroid_learning import (
    CentroidLearning,
    balanced_assignment,
    class_of_target,
    update_centroids,
)
from cluster_zoo.layers.feature_memory import FeatureMemory
from cluster_zoo.layers.nearest_centroid import NearestCentroidHead


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- One update ----


@pytest.mark.parametrize(
    ('classes', 'sub_centroids', 'width', 'size'),
    [(1, 1, 4, 9), (2, 1, 3, 20), (5, 3, 12, 200), (7, 4, 16, 60), (20, 2, 8, 30), (3, 8, 10, 12), (4, 4, 6, 1)],
)
@pytest.mark.parametrize('momentum', [0.0, 0.9, 0.999])
def test_update_is_the_plain_loop(classes, sub_centroids, width, size, momentum):
    """Includes classes without samples or with fewer samples than sub-centroids, and a batch of one."""
    for temperature, iterations in ((0.05, 3), (0.3, 1), (0.02, 5)):
        head = head64(width, classes, sub_centroids, momentum=momentum, temperature=temperature, iterations=iterations)
        x, labels = random_batch(head, size)
        labels[torch.rand(size) < 0.1] = -1
        labels[torch.rand(size) < 0.1] = classes + 3
        expected = PlainLearner(head, [10**6]).learn([(x, labels)])
        torch.testing.assert_close(learn(head, x, labels), expected, rtol=0, atol=1e-12)


def test_only_correctly_classified_samples_move_centroids():
    head = head64(momentum=0.5)
    before = F.normalize(head.prototypes, dim=-1)
    x, _ = random_batch(head, 40)
    wrong = (head(x).argmax(-1) + 1) % head.num_classes
    torch.testing.assert_close(learn(head, x, wrong), before)
    twin = copy.deepcopy(head)
    mixed = torch.where(torch.arange(40) < 20, wrong, head(x).argmax(-1))
    assert (learn(twin, x, mixed) - before).norm() > 0.1


def test_assignment_is_even_and_per_class():
    labels = torch.tensor([0] * 40 + [1] * 10 + [-1] * 5 + [3] * 2)
    similarity = torch.rand(57, 4, dtype=torch.float64) * 0.4
    similarity[:, 0] += 0.3  # all are most similar to the first
    assigned = balanced_assignment(similarity, labels, 5, temperature=0.05, iterations=30)
    assert torch.bincount(assigned[:40], minlength=4).min() >= 6  # of ten each
    for c, iterations in ((0, 30), (1, 30), (3, 30), (0, 1), (1, 3)):
        of = labels == c
        together = balanced_assignment(similarity, labels, 5, 0.05, iterations)[of]
        assert torch.equal(together, sinkhorn(similarity[of], 0.05, iterations))
    assert torch.equal(balanced_assignment(similarity[:, :1], labels, 5), torch.zeros(57, dtype=torch.int64))


@pytest.mark.parametrize('similarity', [-1.0, 0.0, 1.0])
def test_assignment_in_float32_at_the_lowest_temperature(similarity):
    """Exponentials of up to 50 fit in float32, but their ratios must not underflow to zero."""
    of_class = similarity * (1 - 0.2 * torch.rand(6, 3))
    of_class[0, 2] = -similarity
    for iterations in (1, 3, 50):
        assigned = balanced_assignment(of_class, torch.zeros(6, dtype=torch.int64), 1, 0.02, iterations)
        assert torch.equal(assigned, sinkhorn(of_class.double(), 0.02, iterations))


def test_opposite_features_do_not_move_a_centroid():
    centroids = F.normalize(torch.randn(2, 1, 4), dim=-1)
    features = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    moved = update_centroids(centroids, features, torch.tensor([0, 0]), torch.tensor([0, 0]), 0.5)
    assert torch.equal(moved, centroids)


# ---- Schedules and the memory ----


@pytest.mark.parametrize('every', [1, 3])
@pytest.mark.parametrize('memory', [7, 25, 1000])
@pytest.mark.parametrize('sub_centroids', [1, 3])
def test_schedule(every, memory, sub_centroids):
    head = head64(10, 4, sub_centroids, every=every, memory=memory, momentum=0.8)
    plain = PlainLearner(head, [memory])
    for size in (5, 9, 1, 30, 6, 0, 8):
        x, labels = random_batch(head, size)
        with torch.no_grad():
            head.feat_norm.weight.mul_(1.05)  # as an optimizer step does; the memory is unchanged
        expected = plain.learn([(x, labels)])
        torch.testing.assert_close(learn(head, x, labels), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ('classes', 'every', 'batch', 'size'),
    [
        (3, 1, 2, 192),  # 64 for each class
        (3, 1, 200, 200),  # at least a batch
        (300, 1, 2, 16384),  # at most 16384
        (3, 5, 7, 35),  # 5 batches
        (3, 100_000, 2, 131_072),
    ],
)
def test_default_memory(classes, every, batch, size):
    head = NearestCentroidHead(2, classes, learning=CentroidLearning(every=every))
    learn(head, torch.randn(batch, 2), torch.zeros(batch, dtype=torch.int64))
    assert head.memory.features.shape == (size, 2) and head.memory.features.dtype == torch.float32
    storage = head.memory.features.data_ptr()
    learn(head, torch.randn(3 * batch, 2), torch.zeros(3 * batch, dtype=torch.int64))
    assert head.memory.features.data_ptr() == storage

    state = head.learning_state()
    other = NearestCentroidHead(2, classes, learning=head.learning)
    other.load_learning_state(state)
    assert other.memory.features.shape == (size, 2)


def test_labels_of_a_loaded_memory_are_classes():
    head = head64(memory=4)
    learn(head, *random_batch(head, 4))
    state = head.learning_state()
    state['memory']['labels'] = torch.tensor([0, 99, -7, 1])
    head.load_learning_state(state)
    assert head.memory.labels.tolist() == [0, -1, -1, 1]
    with pytest.raises(ValueError, match='int64'):
        head.memory.load_state_dict(dict(state['memory'], labels=torch.rand(4)))


def test_reset_parameters_clears_the_memory():
    head = head64(memory=4)
    learn(head, *random_batch(head, 4))
    head.reset_parameters()
    assert head.memory is None and head.batches == 0


def test_non_finite_logits_are_not_correct():
    head = head64(memory=8)
    before = head.prototypes.clone()
    with torch.no_grad():
        head.mask_norm.weight.fill_(torch.nan)
    learn(head, *random_batch(head, 8))
    torch.testing.assert_close(head.prototypes, F.normalize(before, dim=-1))


def test_half_precision_assignment():
    """The exponentials overflow float16."""
    similarity = torch.tensor([[0.9, 0.6], [0.8, 0.7], [0.7, 0.9]], dtype=torch.float64)
    labels = torch.zeros(3, dtype=torch.int64)
    expected = balanced_assignment(similarity, labels, 1)
    assert expected.unique().tolist() == [0, 1]
    assert torch.equal(balanced_assignment(similarity.half(), labels, 1), expected)


@pytest.mark.parametrize('size', [1, 6, 10])
def test_memory_is_a_ring(size):
    memory = FeatureMemory(size, 2, torch.device('cpu'), torch.float32)
    storage = memory.features.data_ptr(), memory.labels.data_ptr()
    kept, number = deque(maxlen=size), 0
    assert memory.state_dict()['features'].shape == (0, 2)
    for count in (3, 1, 0, 6, 5, 25, 2, 10, 4):
        labels = torch.arange(number, number + count)
        memory.push(torch.stack([labels.float(), -labels.float()], 1), labels)
        kept.extend(labels.tolist())
        number += count
        features, labels = (memory.state_dict()[name] for name in ('features', 'labels'))
        assert sorted(labels.tolist()) == list(kept)
        assert memory.labels.tolist().count(-1) == size - len(kept)
        assert torch.equal(features, torch.stack([labels.float(), -labels.float()], 1))
        assert (memory.features.data_ptr(), memory.labels.data_ptr()) == storage  # allocated once
        assert len(memory.features) == size


@pytest.mark.parametrize('pushed', [0, 4, 6, 15])
@pytest.mark.parametrize('size', [6, 4, 9])
def test_memory_state(pushed, size):
    memory = FeatureMemory(6, 1, torch.device('cpu'), torch.bfloat16)
    for number in range(pushed):
        memory.push(torch.full((1, 1), float(number)), torch.tensor([number]))
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = FeatureMemory(size, 1, torch.device('cpu'), torch.float32)
    other.push(torch.full((3, 1), 99.0), torch.tensor([99, 99, 99]))
    storage = other.features.data_ptr()
    other.load_state_dict(state)
    latest = list(range(pushed))[-min(size, 6) :]
    found = other.state_dict()
    assert sorted(found['labels'].tolist()) == latest
    assert torch.equal(found['features'][:, 0].long(), found['labels'])
    if size == 6:  # the same rows
        assert torch.equal(found['labels'], state['labels']) and found['next'] == state['next']
    other.push(torch.full((2, 1), 50.0), torch.tensor([50, 51]))
    assert sorted(other.state_dict()['labels'].tolist()) == [*latest, 50, 51][-size:]
    assert other.features.data_ptr() == storage
    with pytest.raises(ValueError, match=r'\[N, 3\]'):
        FeatureMemory(6, 3, torch.device('cpu'), torch.float32).load_state_dict(state)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_memory_in_half_precision(dtype):
    exact, half = head64(momentum=0.9), head64(momentum=0.9)
    half.load_state_dict(exact.state_dict())
    half.learning = CentroidLearning(momentum=0.9, dtype=dtype)
    for x, labels in [random_batch(exact, 20, noise=0.5) for _ in range(4)]:
        learn(exact, x, labels), learn(half, x, labels)
    assert half.memory.features.dtype == dtype and half.prototypes.dtype == torch.float64
    assert not torch.equal(half.prototypes, exact.prototypes)
    torch.testing.assert_close(half.prototypes, exact.prototypes, rtol=0, atol=0.02)


def test_learning_may_be_replaced_at_any_time():
    head = head64(memory=10)
    learn(head, *random_batch(head, 8))
    old = head.memory.labels[:8].clone()
    head.learning = CentroidLearning(memory=12, dtype=torch.float16)
    learn(head, *random_batch(head, 1))
    assert head.memory.features.shape == (12, 12) and head.memory.features.dtype == torch.float16
    assert torch.equal(head.memory.labels[:8], old)
    storage = head.memory.features.data_ptr()
    head.learning = CentroidLearning(memory=12, dtype=torch.float16, momentum=0.5)
    learn(head, *random_batch(head, 1))
    assert head.memory.features.data_ptr() == storage


def test_resume_from_the_learning_state():
    head = head64(memory=30, every=3)
    batches = [random_batch(head, 12) for _ in range(7)]
    for x, labels in batches[:4]:
        learn(head, x, labels)
    file = io.BytesIO()
    torch.save((head.state_dict(), head.learning_state()), file)
    file.seek(0)
    state_dict, state = torch.load(file, weights_only=True)
    other = head64(memory=30, every=3)
    other.load_state_dict(state_dict)
    other.load_learning_state(state)
    for x, labels in batches[4:]:
        assert torch.equal(learn(head, x, labels), learn(other, x, labels))
    other.load_learning_state(NearestCentroidHead(12, 5).learning_state())  # empty memory
    assert other.memory is None and other.batches == 0


def test_learning_states_of_several_processes_join():
    heads = [head64(memory=8) for _ in range(2)]
    for number, head in enumerate(heads):
        learn(head, torch.randn(4, 12).double(), torch.tensor([number] * 4))
    joined = head64(memory=20)
    joined.load_learning_state(*(head.learning_state() for head in heads))
    assert joined.memory.state_dict()['labels'].tolist() == [0] * 4 + [1] * 4


# ---- Invalid inputs ----


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('every', [1, 2])
def test_non_finite_features_are_ignored(bad, every):
    head = head64(momentum=0.5, every=every)
    twin = copy.deepcopy(head)
    for _ in range(4):
        x, labels = random_batch(head, 30)
        x[[3, 17], [0, 5]] = bad
        kept = [i for i in range(30) if i not in (3, 17)]
        learn(head, x, labels), learn(twin, x[kept], labels[kept])
        torch.testing.assert_close(head.prototypes, twin.prototypes, rtol=0, atol=1e-12)
        assert head.memory.features.isfinite().all()
    before = head.prototypes.clone()
    head.learning = CentroidLearning(every=100)
    torch.testing.assert_close(learn(head, torch.full((4, 12), bad).double(), torch.arange(4)), before)


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        (torch.zeros(5), r'\[6\] features .* \[6, 5\], got torch.float32 \[5\]'),
        (torch.zeros(5, dtype=torch.int64), r'got torch.int64 \[5\]'),
        (torch.zeros(6, 1, dtype=torch.int64), r'got torch.int64 \[6, 1\]'),
        (torch.zeros(7, 5), r'got torch.float32 \[7, 5\]'),
        (torch.zeros(6, 4), r'got torch.float32 \[6, 4\]'),
    ],
)
def test_targets_that_do_not_fit(target, message):
    head = head64()
    head(torch.randn(6, 12).double())
    before = head.prototypes.clone()
    with pytest.raises(ValueError, match=message):
        head.learn(target)
    assert torch.equal(head.prototypes, before) and head.memory is None
    head.learn(torch.zeros(6, dtype=torch.int64))  # the features are still stored


def test_learning_needs_a_forward_pass_in_training_mode():
    head = head64()
    with pytest.raises(RuntimeError, match='in training mode'):
        head.learn(torch.tensor([0]))
    head.eval()(torch.randn(2, 12).double())
    with pytest.raises(RuntimeError, match='in training mode'):
        head.learn(torch.tensor([0, 1]))
    learn(head.train(), *random_batch(head, 2))
    with pytest.raises(RuntimeError, match='in training mode'):
        head.learn(torch.tensor([0, 1]))


@pytest.mark.parametrize(
    'values',
    [
        dict(momentum=-0.1),
        dict(momentum=1.1),
        dict(momentum=float('nan')),
        dict(temperature=0.01),
        dict(temperature=float('nan')),
        dict(iterations=0),
        dict(memory=0),
        dict(every=0),
        dict(dtype=torch.int8),
        dict(contrast=-1.0),
        dict(contrast_temperature=0.0),
    ],
)
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match=f'{next(iter(values))} .*, got'):
        CentroidLearning(**values)


# ---- Soft targets ----


def test_class_of_a_target():
    assert class_of_target(torch.tensor([0, 2, 3, -100, -1]), 3).tolist() == [0, 2, -1, -1, -1]
    assert class_of_target(torch.tensor([1, 2], dtype=torch.int32), 3).dtype == torch.int64
    soft = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.51, 0.49, 0], [0, 0, 0], [1, 1, 0]])
    assert class_of_target(soft, 3).tolist() == [2, -1, -1, 0, -1, -1]
    assert class_of_target(soft.half().view(2, 3, 3), 3).tolist() == [[2, -1, -1], [0, -1, -1]]
    assert class_of_target(torch.tensor([[3.0, 1.0, 1.0]]), 3).tolist() == [0]  # weights need not sum to one


def test_class_of_mixed_and_smoothed_targets():
    labels = torch.tensor([0, 1, 2, 2])
    mixup = Mixup(mixup_alpha=1.0, mode='elem', label_smoothing=0.1, num_classes=4)
    found = set()
    for _ in range(50):
        _, target = mixup(torch.zeros(4, 3, 8, 8), labels)
        for share, first, other, of in zip(target, labels, labels.flip(0), class_of_target(target, 4)):
            weight = {int(c): float(share[c]) for c in (first, other)}
            main = max(weight, key=weight.get)
            assert int(of) == (main if weight[main] > 0.5 else -1)
            found.add(int(of))
    assert found == {-1, 0, 1, 2}
    even = Mixup(label_smoothing=0.0, num_classes=4)
    even._params_per_batch = lambda: (0.5, False)
    assert class_of_target(even(torch.zeros(4, 3, 8, 8), labels)[1], 4).tolist() == [-1] * 4


def test_soft_targets_equal_their_class():
    head = head64(momentum=0.5)
    twin = copy.deepcopy(head)
    x, labels = random_batch(head, 20)
    soft = F.one_hot(labels, 5) * 0.6 + 0.08
    torch.testing.assert_close(learn(head, x, soft), learn(twin, x, labels), rtol=0, atol=0)


# ---- Precisions ----


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_model_moves_its_centroids(dtype):
    """A single step of 0.001 is rounded to zero in these dtypes, the sum of many is not."""
    exact = head64(width=16, classes=3, sub_centroids=2, momentum=0.999)
    half = copy.deepcopy(exact).to(dtype)
    x, labels = random_batch(exact, 30, noise=0.3)
    start = F.normalize(exact.prototypes, dim=-1)
    for _ in range(200):
        learn(exact, x, labels), learn(half, x.to(dtype), labels)
    moved = (exact.prototypes - start).norm(dim=-1)
    assert moved.max() > 0.02
    assert half.prototypes.dtype == dtype
    assert (half.prototypes.double() - exact.prototypes).norm(dim=-1).max() < 0.3 * moved.max()
    half.load_state_dict({**half.state_dict(), 'prototypes': start.to(dtype)})  # the float32 copy is outdated now
    learn(half, x.to(dtype), torch.full_like(labels, -1))
    torch.testing.assert_close(half.prototypes.double(), start, rtol=0, atol=0.01)


def test_resume_in_half_precision_is_exact():
    head = head64().bfloat16()
    batches = [(x.bfloat16(), labels) for x, labels in (random_batch(head, 20) for _ in range(40))]
    for x, labels in batches[:20]:
        learn(head, x, labels)
    other = head64().bfloat16()
    other.load_state_dict(head.state_dict())
    other.load_learning_state(head.learning_state())
    for x, labels in batches[20:]:
        learn(head, x, labels), learn(other, x, labels)
    assert torch.equal(head.prototypes, other.prototypes)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_learning(dtype):
    exact = head64(momentum=0.5).float()
    mixed = copy.deepcopy(exact)
    x, labels = random_batch(exact, 60, noise=0.3)
    learn(exact, x, labels)
    with torch.autocast('cpu', dtype):
        mixed(x)
        mixed.learn(labels)  # also inside the context
    assert mixed.prototypes.dtype == mixed.memory.features.dtype == torch.float32
    torch.testing.assert_close(mixed.prototypes, exact.prototypes, rtol=0, atol=0.02)
