"""The clustering functions against loops over points, and edge cases."""

import math

import pytest
import torch
from reference import context_cluster_set

from cluster_zoo.layers.clustering import (
    HeadWeights,
    PointSets,
    _VectorNorm,
    aggregate,
    append_offset,
    assign,
    cluster,
    cluster_features,
    dispatch,
    feature_norms,
    first_argmax,
    group_mean,
    membership,
    nearest_center,
    normalize,
    project_query,
)


def _normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


GROUPS = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10, 11]]


def _clustered(
    x, centers, f_weight, f_bias, alpha, beta, v_weight, v_bias, proj_weight, proj_bias, weighted=True, **masks
):
    """`cluster` of sets x [S, N, C] with the weights [E, D, C] of each head, as a mixer calls it."""
    f = torch.einsum('smc,edc->smed', centers, f_weight) + f_bias
    query, offset = project_query(alpha * normalize(f), f_weight, f_bias)
    norms = (x.unsqueeze(1) @ f_weight.transpose(1, 2) + f_bias.unsqueeze(1)).norm(dim=-1)
    weights = HeadWeights(beta, v_weight.transpose(1, 2), v_bias, proj_weight, proj_bias)
    return cluster(PointSets(x, centers, **masks), query, offset, norms, weights, weighted)


def _weights(E=2, D=3, C=5):
    shapes = dict(f_weight=(E, D, C), f_bias=(E, D), v_weight=(E, D, C), v_bias=(E, 1, D))
    shapes |= dict(proj_weight=(E, D, C), proj_bias=(C,))
    return {name: _normal(*shape, seed=i + 1) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize('weighted', [True, False])
@pytest.mark.parametrize('alpha, beta', [(1.0, 0.0), (3.0, -0.5), (-2.0, 0.1)])
def test_cluster_matches_loops(weighted, alpha, beta):
    x, w = _normal(2, 12, 5), _weights()
    centers = torch.stack([x[:, g].mean(1) for g in GROUPS], 1)
    out = _clustered(x, centers, alpha=alpha, beta=torch.tensor([beta], dtype=torch.float64), weighted=weighted, **w)
    for s in range(2):
        expected = w['proj_bias']
        for e in range(2):
            f = x[s] @ w['f_weight'][e].T + w['f_bias'][e]
            v = x[s] @ w['v_weight'][e].T + w['v_bias'][e]
            received = context_cluster_set(f, v, GROUPS, alpha, beta, weighted)
            expected = expected + received @ w['proj_weight'][e]
            sets = (PointSets(y[None], torch.stack([y[g].mean(0) for g in GROUPS])[None]) for y in (f, v))
            plain = cluster_features(*sets, *torch.tensor([[alpha], [beta]], dtype=torch.float64), weighted)
            torch.testing.assert_close(plain[0], received, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(out[s], expected, rtol=1e-11, atol=1e-11)


def test_masked_points_and_centers_are_ignored():
    x, centers, w = _normal(1, 6, 5), _normal(1, 3, 5, seed=9), _weights()
    expected = _clustered(x[:, :4], centers[:, 1:], alpha=1.0, beta=torch.zeros(1).double(), **w)
    x[:, 4:], centers[:, 0] = 1e6, x[:, 0]  # large padded points, and a padded center that would be the nearest
    masks = dict(point_mask=torch.tensor([[True] * 4 + [False] * 2]), center_mask=torch.tensor([[False, True, True]]))
    out = _clustered(x, centers, alpha=1.0, beta=torch.zeros(1).double(), **w, **masks)
    torch.testing.assert_close(out[:, :4], expected, rtol=1e-11, atol=1e-11)


def test_assign_returns_the_highest_score():
    points, query, offset = _normal(2, 9, 4), _normal(2, 3, 5, 4, seed=1), _normal(2, 3, 5, seed=2)
    index, value = assign(points, query, offset)
    for s in range(2):
        for e in range(3):
            for n in range(9):
                values = [(query[s, e, m] @ points[s, n] + offset[s, e, m]).item() for m in range(5)]
                assert index[s, e, n] == max(range(5), key=values.__getitem__)
                assert value[s, e, n].item() == pytest.approx(max(values), rel=1e-12)


def test_aggregate_and_dispatch_match_loops():
    points, centers, values = _normal(2, 7, 4), _normal(2, 3, 4, seed=1), _normal(2, 6, 4, seed=2)
    index, weight = torch.randint(3, (2, 2, 7)), _normal(2, 2, 7, seed=3).abs()
    members, bias = membership(index, weight, 3), _normal(4, seed=4)
    means, out = aggregate(points, members, centers), dispatch(values, members, bias)
    for s in range(2):
        for e in range(2):
            for m in range(3):
                joined = [n for n in range(7) if index[s, e, n] == m]
                total = centers[s, m] + sum(weight[s, e, n] * points[s, n] for n in joined)
                expected = total / (1 + sum(weight[s, e, n] for n in joined))
                torch.testing.assert_close(means[s, 3 * e + m], expected, rtol=1e-12, atol=1e-12)
        for n in range(7):
            expected = bias + sum(weight[s, e, n] * values[s, 3 * e + index[s, e, n]] for e in range(2))
            torch.testing.assert_close(out[s, n], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_centers_give_the_first(dtype):
    query, offset = torch.ones(1, 1, 4, 3, dtype=dtype), torch.zeros(1, 1, 4, dtype=dtype)
    assert (assign(torch.rand(1, 7, 3).to(dtype), query, offset)[0] == 0).all()
    value = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [-1.0, -3.0, -2.0, -1.0, -1.0]], dtype=dtype)
    largest, index = first_argmax(value.unsqueeze(-1))
    assert largest.tolist() == [[3], [-1]] and index.tolist() == [[1], [0]]
    _, index = first_argmax(value.unsqueeze(-1), torch.tensor([[True, False, True, True, True], [False] * 5]))
    assert index.tolist() == [[2], [0]]  # and the first if all are masked


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (16, 1), (5, 33), (100, 7)])
def test_first_argmax_is_argmax(shape):
    value = torch.randint(0, 6, (2, 3, *shape)).double()  # many equal values
    expected = (value == value.max(-2, keepdim=True)[0]).long().argmax(-2)
    assert torch.equal(first_argmax(value)[1], expected)


def test_zero_vectors():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert (normalize(torch.zeros(2, 3, dtype=dtype)) == 0).all()
        assert normalize(torch.ones(2, 4, dtype=dtype)).unique() == 0.5
        norms = feature_norms(torch.zeros(1, 4, 3).to(dtype), torch.ones(4, 3).to(dtype), torch.zeros(4).to(dtype), 2)
        assert norms.shape == (1, 2, 4) and (norms > 0).all() and norms.dtype.itemsize >= 4


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gradient_of_norms_on_a_gpu(dtype, tolerance):
    x = _normal(2, 5, 7).to(dtype)
    x[0, 2] = 0
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    norms, expected = _VectorNorm.apply(x), exact.norm(dim=-1).clamp_min(1e-12)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norms.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = _normal(2, 5, seed=1)
    (value,) = torch.autograd.grad(norms, x, gradient.to(norms.dtype))
    (wanted,) = torch.autograd.grad(expected, exact, gradient)
    assert value.dtype == dtype and (value[0, 2] == 0).all()
    torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        x = _normal(3, 4).requires_grad_()
        assert torch.autograd.gradgradcheck(_VectorNorm.apply, x)


def test_feature_norms_of_each_head():
    points, weight, bias = _normal(2, 4, 3), _normal(6, 3, seed=1), _normal(6, seed=2)
    norms, f = feature_norms(points, weight, bias, 2), weight @ points[1, 2] + bias
    assert norms[1, :, 2].tolist() == pytest.approx([math.hypot(*f[:3]), math.hypot(*f[3:])], rel=1e-12)


def test_a_projected_query_gives_the_product_with_the_features():
    centers, weight, bias, x = _normal(2, 3, 4, 5), _normal(4, 5, 6, seed=1), _normal(4, 5, seed=2), _normal(6, seed=3)
    query, offset = project_query(centers, weight, bias)
    assert query.shape == (2, 4, 3, 6) and offset.shape == (2, 4, 3)
    expected = centers[1, 2, 3] @ (weight[3] @ x + bias[3])
    torch.testing.assert_close(query[1, 3, 2] @ x + offset[1, 3, 2], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('block', [(1, 1), (2, 7), (5, 40), (512, 512)])
def test_nearest_center_does_not_depend_on_its_blocks(block):
    points, query, offset = _normal(2, 33, 6), _normal(2, 5, 6, seed=1), _normal(2, 5, 1, seed=2)
    mask = torch.tensor([[True] * 5, [True, False, True, False, True]])
    expected = (query @ points.transpose(1, 2) + offset).masked_fill(~mask.unsqueeze(-1), -torch.inf).argmax(1)
    assert torch.equal(nearest_center(points, query, offset, mask, block), expected)
    same = torch.ones(1, 5, 6).double()
    whole = points[:1].round()  # whose sums are exact in any order
    assert (nearest_center(whole, same, offset[:1] * 0, None, block) == 0).all()  # the first of equals


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_appended_offset(dtype):
    """In half precision too, products of the longer rows contain the offset in float32."""
    points, query, offset = _normal(2, 9, 5).to(dtype), _normal(2, 4, 5, seed=1).to(dtype), _normal(2, 4, 1, seed=2)
    if dtype != torch.float64:
        offset = offset.float()
    longer, queries = append_offset(points, query, offset)
    assert longer.dtype == queries.dtype == dtype and longer.shape[-1] == 13
    expected = query.double() @ points.double().transpose(1, 2) + offset.double()
    error = queries.double() @ longer.double().transpose(1, 2) - expected
    assert error.abs().max() <= 2**-22 * offset.abs().max()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_decisions_in_half_precision_are_those_of_exact_products(dtype):
    """Also under autocast, which would round the scores."""
    points, query = _normal(2, 400, 8).to(dtype), _normal(2, 3, 6, 8, seed=1).to(dtype)
    offset = _normal(2, 3, 6, seed=2).float()
    expected, _ = assign(points.double(), query.double(), offset.double())
    for enabled in (False, True):
        with torch.autocast('cpu', dtype, enabled=enabled):
            index, score = assign(points, query, offset)
            nearest = nearest_center(points, query[:, 0], offset[:, 0].unsqueeze(-1))
        assert score.dtype == torch.float32 and torch.equal(index, expected) and torch.equal(nearest, expected[:, 0])
    rounded = (query.flatten(1, 2) @ points.transpose(1, 2)).unflatten(1, (3, 6)) + offset.unsqueeze(-1).to(dtype)
    assert dtype == torch.float16 or not torch.equal(rounded.max(2).indices, expected)


def test_group_mean_of_bfloat16_is_summed_in_float32():
    points = _normal(1, 1000, 3).bfloat16() + 5
    mean = group_mean(points, points[:, :1], torch.zeros(1, 1000, dtype=torch.int64))
    expected = torch.cat([points, points[:, :1]], 1).double().mean(1, keepdim=True)
    assert mean.dtype == torch.bfloat16 and torch.equal(mean, expected.bfloat16())


def test_group_mean_matches_loops():
    points, centers = _normal(2, 8, 3), _normal(2, 3, 3, seed=1)
    index = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])  # nobody joins center 2
    mask = torch.tensor([[True] * 8, [True] * 7 + [False]])
    out = group_mean(points, centers, index, mask)
    for s in range(2):
        for m in range(3):
            members = [n for n in range(8) if mask[s, n] and index[s, n] == m]
            expected = (centers[s, m] + sum(points[s, n] for n in members)) / (1 + len(members))
            torch.testing.assert_close(out[s, m], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('weighted', [True, False])
def test_gradients(weighted):
    x, w = _normal(1, 6, 5), _weights()
    names = list(w)

    def run(x, alpha, beta, *weights):
        return _clustered(x, x[:, ::3], alpha=alpha, beta=beta, weighted=weighted, **dict(zip(names, weights)))

    inputs = [x, torch.tensor(1.5).double(), torch.tensor(0.2).double(), *w.values()]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])
