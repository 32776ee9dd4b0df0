"""The Triton kernels against the plain functions in float64: on a GPU, otherwise in Triton's interpreter."""

import copy
import functools
import os
import sys

import pytest
import torch
import torch.nn.functional as F

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
if DEVICE == 'cpu' and 'triton' not in sys.modules:
    os.environ.setdefault('TRITON_INTERPRET', '1')
elif DEVICE == 'cpu' and os.environ.get('TRITON_INTERPRET') != '1':
    pytest.skip('no GPU, and Triton was imported before TRITON_INTERPRET was set', allow_module_level=True)
pytest.importorskip('triton')

import timm  # noqa: E402  it imports Triton

import cluster_zoo  # noqa: E402
from cluster_zoo.layers import clustering, kernels  # noqa: E402
from cluster_zoo.layers.cluster_mixer import ClusterMixer  # noqa: E402
from cluster_zoo.layers.grids import mean_centers, partition  # noqa: E402
from cluster_zoo.layers.kernels import gpu, self_check  # noqa: E402

# S, N, C, E, M: a full tile, a partly full tile, more heads, points, channels or centers than fit in a tile
SHAPES = [
    (2, 49, 32, 4, 4),
    (1, 33, 7, 1, 1),
    (1, 70, 36, 8, 4),
    (2, 20, 24, 4, 16),
    (1, 20, 16, 3, 49),
    (1, 40, 33, 1, 100),
]
NAMES = ['points', 'norms', 'centers', 'query', 'offset', 'beta', 'v_weight', 'v_bias', 'proj_weight', 'proj_bias']


def _random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _inputs(S, N, C, E, M, dtype=torch.float32, D=5):
    """Tensors of `cluster` in the order of NAMES, with similarities that are not all saturated."""
    shapes = ((S, N, C), (S, E, N), (S, M, C), (S, E, M, C), (S, E, M), (1,), (E, C, D), (E, 1, D), (E, D, C + 1))
    inputs = [_random(*shape, seed=seed) for seed, shape in enumerate((*shapes, (C + 1,)))]
    inputs[1] = inputs[1].abs() + C**0.5
    wide = torch.float32 if dtype != torch.float64 else dtype
    return [x.to(wide if name == 'norms' else dtype).requires_grad_() for name, x in zip(NAMES, inputs)]


def _call(function, inputs, weighted=True, point_mask=None, center_mask=None):
    """`cluster` of one of the modules."""
    points, norms, centers, query, offset, *weights = inputs
    sets = clustering.PointSets(points, centers, point_mask, center_mask)
    return function(sets, query, offset, norms, clustering.HeadWeights(*weights), weighted)


def _masks(S, N, M):
    point_mask, center_mask = torch.rand(S, N, device=DEVICE) < 0.8, torch.rand(S, M, device=DEVICE) < 0.7
    center_mask[:, -1] = True
    return point_mask, center_mask


def _exact(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def _assert_close(value, expected, tolerance, name=None):
    """Tolerance relative to the largest entry, because terms of a sum may cancel."""
    assert value.shape == expected.shape, name
    error = (value.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.abs().max(), (name, error.item(), expected.abs().max().item())


def _check(inputs, *rest, tolerance):
    """Output and all gradients of `cluster`."""
    exact = _exact(inputs)
    out, expected = _call(gpu.cluster, inputs, *rest), _call(clustering.cluster, exact, *rest)
    assert out.dtype == inputs[0].dtype
    _assert_close(out, expected, tolerance, 'output')
    gradient = _random(*out.shape, seed=99).to(out.dtype)
    gradients = torch.autograd.grad(out, inputs, gradient)
    for name, x, value, wanted in zip(
        NAMES, inputs, gradients, torch.autograd.grad(expected, exact, gradient.double())
    ):
        assert value.dtype == x.dtype, name
        _assert_close(value, wanted, tolerance, name)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('weighted, masked', [(True, False), (False, True)])
def test_cluster_and_its_gradients(shape, weighted, masked):
    S, N, _, _, M = shape
    torch.manual_seed(0)
    masks = _masks(S, N, M) if masked else ()
    _check(_inputs(*shape), weighted, *masks, tolerance=2e-5)


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize('weighted', [True, False])
def test_cluster_in_half_precision(dtype, tolerance, weighted):
    _check(_inputs(2, 49, 24, 4, 4, dtype), weighted, tolerance=tolerance)


def test_the_same_input_gives_the_same_bits():
    inputs = _inputs(1, 600, 16, 4, 4)
    results = []
    for _ in range(2):
        out = _call(gpu.cluster, inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_second_derivatives():
    def penalty(function, inputs):
        gradients = torch.autograd.grad(_call(function, inputs).square().sum(), inputs[:5], create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs, allow_unused=True)

    inputs = _inputs(1, 20, 8, 2, 3)
    for name, *pair in zip(
        NAMES, penalty(gpu.cluster, inputs), penalty(clustering.cluster, _exact(inputs)), strict=True
    ):
        _assert_close(*pair, 1e-4, name)


@pytest.mark.parametrize('M', [4, 49, 100])
def test_equal_centers_give_the_first(M):
    points = torch.randint(-3, 4, (2, 33, 8), device=DEVICE).float()
    query = torch.randint(-3, 4, (2, 3, M, 8), device=DEVICE).float()
    query[:, :, M // 2 :] = query[:, :, : (M + 1) // 2]  # half of the centers are duplicates
    offset = torch.zeros(2, 3, M, device=DEVICE)
    index, score = gpu.assign(points, query, offset, None)
    expected, value = clustering.assign(points, query, offset)
    assert torch.equal(index.long(), expected) and torch.equal(score, value)
    assert index.max() < (M + 1) // 2


def test_center_masks():
    points, query, offset = _random(2, 20, 8).float(), _random(2, 2, 70, 8).float(), _random(2, 2, 70).float()
    mask = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    mask[0, 1::3] = True
    index, score = gpu.assign(points, query, offset, mask)
    expected, value = clustering.assign(points, query, offset, mask)
    assert torch.equal(index[0].long(), expected[0])
    _assert_close(score[0], value[0], 1e-6)
    assert (index[1] == 0).all() and (score[1] == 0).all()  # no center may be chosen: a finite score


@pytest.mark.parametrize('size, proposals', [((1, 9), 2), ((7, 1), 3), ((3, 2), 7)])
def test_equal_centers_of_a_mixer(size, proposals, monkeypatch):
    torch.manual_seed(0)
    mixer, x = ClusterMixer(64, 8, 24, proposals).to(DEVICE), _random(3, 64, *size)
    expected = copy.deepcopy(mixer).double()(x)
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'triton')
    for out in (mixer(x.float()), torch.cat([mixer(one) for one in x.float().split(1)])):
        _assert_close(out, expected, 1e-5)


def test_padded_sets_have_finite_gradients():
    inputs = _inputs(2, 9, 8, 2, 3)
    point_mask, center_mask = (torch.ones(2, n, dtype=torch.bool, device=DEVICE) for n in (9, 3))
    point_mask[1], center_mask[1] = False, False
    with torch.no_grad():
        inputs[1][1] = 1e-12  # the lower bound
    out = _call(gpu.cluster, inputs, True, point_mask, center_mask)
    assert torch.equal(out[1], inputs[-1].expand(9, -1))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize('M', [3, 100])
def test_nan_is_propagated(M):
    points, query, offset = _random(1, 20, 8).float(), _random(1, 2, M, 8).float(), _random(1, 2, M).float()
    points[0, 4] = float('nan')
    index, score = gpu.assign(points, query, offset, None)
    assert score[:, :, 4].isnan().all() and score.isnan().sum() == 2
    assert index.min() >= 0 and index.max() < M


def test_no_sets():
    points, query = torch.empty(0, 9, 8, device=DEVICE), torch.empty(0, 2, 3, 8, device=DEVICE)
    index, score = gpu.assign(points, query, query[..., 0], None)
    sums, totals = gpu.aggregate(points, index, score, 3)
    assert (sums.shape, totals.shape) == ((0, 2, 3, 8), (0, 2, 3))
    assert gpu.dispatch(sums, index, score, None).shape == points.shape


def test_aggregate_in_spans():
    points, weight = _random(2, 1100, 5), _random(2, 3, 1100, seed=1)
    index = torch.randint(0, 6, (2, 3, 1100), device=DEVICE)
    members = clustering.membership(index, weight, 6)
    sums, totals = gpu.aggregate(points.float(), index.int(), weight.float(), 6)
    _assert_close(sums.flatten(1, 2), members @ points, 1e-5)
    _assert_close(totals.flatten(1), members.sum(-1), 1e-5)


def test_select_and_its_gradients():
    inputs = [x.float().requires_grad_() for x in (_random(2, 40, 20), _random(2, 3, 70, 20), _random(2, 3, 70))]
    index = torch.randint(0, 70, (2, 3, 40), device=DEVICE)
    points, query, offset = exact = _exact(inputs)
    expected = torch.einsum('snc,semc->semn', points, query) + offset.unsqueeze(-1)
    expected = expected.gather(2, index.unsqueeze(2)).squeeze(2)
    out = gpu.select(inputs[0], index.int(), inputs[1], inputs[2])
    _assert_close(out, expected, 1e-6)
    gradient = _random(2, 3, 40, seed=9)
    for pair in zip(torch.autograd.grad(out, inputs, gradient.float()), torch.autograd.grad(expected, exact, gradient)):
        _assert_close(*pair, 1e-5)


@pytest.mark.parametrize('masked', [False, True])
def test_nearest_center(masked):
    points, query, offset = _random(2, 70, 9), _random(2, 150, 9), _random(2, 150, 1)
    mask = torch.rand(2, 150, device=DEVICE) < 0.5 if masked else None
    index = gpu.nearest_center(points.float().requires_grad_(), query.float(), offset.float(), mask)
    assert index.dtype == torch.int64
    assert torch.equal(index, clustering.nearest_center(points.float(), query.float(), offset.float(), mask))


def test_nearest_center_under_autocast_compares_rounded_values():
    wide = _random(1, 900, 4).float(), _random(1, 50, 4).float(), _random(1, 50, 1).float()
    narrow = wide[0].bfloat16(), wide[1].bfloat16(), wide[2]
    with torch.autocast(DEVICE, torch.bfloat16):
        index = gpu.nearest_center(*wide)
    assert torch.equal(index, gpu.nearest_center(*narrow)) and not torch.equal(index, gpu.nearest_center(*wide))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('rows', [1, 2])
def test_feature_norms_and_their_gradients(dtype, tolerance, rows):
    """For contiguous points and for every second point."""
    inputs = [x.to(dtype) for x in (_random(2, 42 * rows, 10)[:, ::rows], _random(24, 10), _random(24))]
    inputs = [x.requires_grad_() for x in inputs]
    exact = _exact(inputs)
    out, expected = gpu.feature_norms(*inputs, 2), clustering.feature_norms(*exact, 2)
    assert out.dtype == torch.float32
    _assert_close(out, expected, tolerance)
    for pair in zip(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), exact)
    ):
        _assert_close(*pair, tolerance)


def test_row_norms_of_zeros_and_their_second_derivatives():
    rows = _random(5, 7).float()
    rows[2] = 0
    rows.requires_grad_()
    out = gpu.row_norms(rows)
    assert out[2].item() == pytest.approx(1e-12)
    (gradient,) = torch.autograd.grad(out.sum(), rows)
    assert (gradient[2] == 0).all()

    def curvature(norms, rows):
        (gradient,) = torch.autograd.grad(norms(rows).pow(3).sum(), rows, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), rows)[0]

    rows = _random(5, 7).float().requires_grad_()
    (exact,) = _exact([rows])
    _assert_close(curvature(gpu.row_norms, rows), curvature(lambda x: x.norm(dim=-1), exact), 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_as_the_plain_functions(dtype):
    inputs = _inputs(2, 20, 16, 2, 4)
    with torch.autocast(DEVICE, dtype):
        out, expected = _call(gpu.cluster, inputs), _call(clustering.cluster, inputs)
        narrow = [x.to(dtype) if name in ('points', 'query') else x for name, x in zip(NAMES, inputs)]
        assert torch.equal(out, _call(gpu.cluster, narrow))
        x, weight, bias = _random(1, 16, 8).float(), _random(6, 8).float(), _random(6).float()
        norms, expected_norms = gpu.feature_norms(x, weight, bias, 2), clustering.feature_norms(x, weight, bias, 2)
    assert out.dtype == expected.dtype == dtype
    _assert_close(out, expected, 3e-2)
    assert norms.dtype == expected_norms.dtype == torch.float32
    _assert_close(norms, expected_norms, 1e-2)
    gradients = torch.autograd.grad(out.float().square().sum(), inputs)
    for name, *pair in zip(NAMES, gradients, torch.autograd.grad(expected.float().square().sum(), inputs)):
        assert pair[0].dtype == torch.float32, name
        _assert_close(*pair, 6e-2, name)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_same_decisions_as_the_plain_functions_under_autocast(dtype, monkeypatch):
    """Of the bundled model, for whole images."""
    model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).eval().to(DEVICE)
    images, found = _random(2, 3, 64, 64).float(), {}
    for choice in ('plain', 'triton'):
        monkeypatch.setenv('CLUSTER_ZOO_KERNELS', choice)
        found[choice] = []

        def record(module, inputs, choice=choice):
            x = inputs[0] if choice == 'plain' else found['plain'][len(found[choice])][1]  # the same inputs
            points = partition(clustering.autocast(x), module.regions)
            centers, *_ = mean_centers(points, x.shape[-2:], module.regions, module.proposals)
            query, offset = module.project_queries(centers, *module.f_weights())
            assign = clustering.assign if choice == 'plain' else gpu.assign
            found[choice].append((assign(points, query, offset, None)[0].long(), x))

        hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, ClusterMixer)]
        with torch.no_grad(), torch.autocast(DEVICE, dtype):
            model(images)
        for hook in hooks:
            hook.remove()
    assert len(found['plain']) == 14
    for (index, _), (other, _) in zip(found['plain'], found['triton']):
        assert (index != other).float().mean() < 1e-4  # scores that are equal up to the order of a sum


def test_tf32_does_not_change_assignments(monkeypatch):
    points, query, offset = _random(2, 900, 40).float(), _random(2, 3, 70, 40).float(), _random(2, 3, 70).float()
    expected, _ = clustering.assign(points.double(), query.double(), offset.double())
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = 'tf32'
        for assign in (gpu.assign, clustering.assign):
            index = assign(points, query, offset, None)[0].long()
            assert (index != expected).float().mean() < 1e-4
    finally:
        matmul.fp32_precision = before


def test_group_mean():
    points, centers, mask = (
        _random(2, 600, 9).float(),
        _random(2, 70, 9).float(),
        torch.rand(2, 600, device=DEVICE) < 0.7,
    )
    index = torch.randint(0, 70, (2, 600), device=DEVICE)
    inputs = [points.requires_grad_(), centers.requires_grad_()]
    for masks in ((), (mask,)):
        values = [gpu.group_mean(*inputs, index, *masks) for _ in range(2)]
        assert torch.equal(*values)
        exact = _exact(inputs)
        expected = clustering.group_mean(*exact, index, *masks)
        _assert_close(values[0], expected, 1e-6)
        for pair in zip(
            torch.autograd.grad(values[0].square().sum(), inputs), torch.autograd.grad(expected.square().sum(), exact)
        ):
            _assert_close(*pair, 1e-5)
        if DEVICE == 'cuda':
            plain = [clustering.group_mean(*inputs, index, *masks) for _ in range(2)]
            assert torch.equal(*plain)


def test_operations_are_well_registered():
    points, norms, _, query, offset = _inputs(1, 9, 8, 2, 3)[:5]
    index = torch.randint(0, 3, (1, 2, 9), dtype=torch.int32, device=DEVICE)
    weight = norms.detach().clone().requires_grad_()
    mask, bias = torch.ones(1, 3, dtype=torch.bool, device=DEVICE), torch.ones(8, device=DEVICE, requires_grad=True)
    for operation, arguments in (
        (gpu.assign, (points, query, offset, mask)),
        (gpu.select, (points, index, query, offset)),
        (gpu.aggregate, (points, index, weight, 3)),
        (gpu.dispatch, (query, index, weight, bias)),
        (gpu.row_norms, (points,)),
    ):
        # opcheck cannot differentiate an operation whose first output is an integer; compiling is tested below
        checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
        more = () if operation is gpu.assign else ('test_aot_dispatch_dynamic',)
        torch.library.opcheck(operation, arguments, test_utils=checks + more)


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_to_one_graph(dynamic):
    inputs = _inputs(2, 9, 8, 2, 3)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    compiled = torch.compile(
        functools.partial(_call, gpu.cluster), fullgraph=True, backend='aot_eager', dynamic=dynamic
    )
    results = []
    for function in (compiled, functools.partial(_call, gpu.cluster)):
        out = function(inputs, True, mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for pair in zip(*results):
        _assert_close(*pair, 1e-6)


@pytest.fixture
def small_model():
    def create(name):
        torch.manual_seed(0)
        small = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, num_classes=5)
        return timm.create_model(name, **small, regions=(4, 2, 2, 1), init_values=1.0).to(DEVICE)

    return create


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
def test_models(name, small_model, monkeypatch):
    model, images = small_model(name), _random(1, 3, 56, 64).float()  # 56 does not divide: some sets are padded
    results = []
    for choice in ('plain', 'triton'):
        monkeypatch.setenv('CLUSTER_ZOO_KERNELS', choice)
        model.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, torch.tensor([3], device=DEVICE)).backward()
        results.append({'logits': logits, **{key: p.grad.clone() for key, p in model.named_parameters()}})
    for key, expected in results[0].items():
        torch.testing.assert_close(
            results[1][key], expected, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: key + text
        )


def test_models_compile_export_and_script(small_model, monkeypatch):
    model, images = small_model('coc_tiny').eval(), _random(1, 3, 64, 64).float()
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'triton')
        torch._dynamo.reset()
        assert torch._dynamo.explain(model)(images).graph_break_count == 0
        for other in (
            torch.compile(model, fullgraph=True, backend='aot_eager'),
            torch.export.export(model, (images,)).module(),
            torch.jit.trace(model, images, check_trace=False),
            torch.jit.script(model),
        ):
            torch.testing.assert_close(other(images), expected, rtol=1e-3, atol=1e-4)


def test_environment_variable_selects_the_kernels(monkeypatch):
    called = []
    monkeypatch.setattr(gpu, 'nearest_center', lambda *args: called.append(args) or clustering.nearest_center(*args))
    inputs = _random(1, 9, 4), _random(1, 3, 4), _random(1, 3, 1)
    small = [x.float() for x in inputs]
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'plain')
    kernels.nearest_center(*small)
    assert not called
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'triton')
    kernels.nearest_center(*inputs)  # float64
    assert not called
    kernels.nearest_center(*small)
    assert len(called) == 1
    monkeypatch.delenv('CLUSTER_ZOO_KERNELS')
    kernels.nearest_center(*small)
    trusted = DEVICE == 'cuda' and self_check.is_trusted(inputs[0].device, torch.float32)
    assert len(called) == (2 if trusted else 1)
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'fast')
    with pytest.raises(ValueError, match="'fast'"):
        kernels.nearest_center(*small)


def test_neither_the_package_nor_its_models_need_triton(monkeypatch):
    monkeypatch.setattr(kernels, '_HAS_TRITON', False)
    monkeypatch.setitem(sys.modules, 'cluster_zoo.layers.kernels.gpu', None)  # importing it fails
    monkeypatch.delattr(cluster_zoo.layers.kernels, 'gpu')
    inputs = [x.detach() for x in _inputs(1, 9, 8, 2, 3)]
    assert torch.equal(_call(kernels.cluster, inputs), _call(clustering.cluster, inputs))
