"""The clustering functions against loops over points, and at their edges."""

import pytest
import torch
from reference import context_cluster_set

from cluster_zoo.clustering import assign, cluster, cosine_similarity, group_mean, nearest_center


def _sets(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('weighted', [True, False])
@pytest.mark.parametrize('alpha, beta', [(1.0, 0.0), (3.0, -0.5), (-2.0, 0.1)])
def test_cluster_matches_loops(weighted, alpha, beta):
    f, v = _sets(2, 2, 5, 12)
    groups = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10, 11]]
    center_f, center_v = (torch.stack([x[..., g].mean(-1) for g in groups], -1) for x in (f, v))
    scale, offset = (torch.tensor([x], dtype=torch.float64) for x in (alpha, beta))
    out = cluster(f, v, center_f, center_v, scale, offset, weighted)
    for s in range(2):
        expected = context_cluster_set(f[s].T, v[s].T, groups, alpha, beta, weighted).T
        torch.testing.assert_close(out[s], expected, rtol=1e-12, atol=1e-12)


def test_masked_points_and_centers_do_not_count():
    f, v = _sets(2, 1, 4, 6)
    center_f, center_v = _sets(2, 1, 4, 3)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    expected = cluster(f[..., :4], v[..., :4], center_f[..., 1:], center_v[..., 1:], one, zero)
    f[..., 4:], center_f[..., 0] = 1e6, f[..., 0]  # a padded point that is loud, a padded center that would win
    points, centers = torch.tensor([[True] * 4 + [False] * 2]), torch.tensor([[False, True, True]])
    out = cluster(f, v, center_f, center_v, one, zero, True, points, centers)
    torch.testing.assert_close(out[..., :4], expected, rtol=1e-12, atol=1e-12)
    assert (out[..., 4:] == 0).all()


def test_equal_centers_give_the_first():
    centers = torch.ones(1, 3, 4)
    assert (nearest_center(centers, torch.rand(1, 3, 7) + 0.1) == 0).all()
    membership, _ = assign(torch.full((1, 4, 7), 0.25))
    assert (membership[:, 0] == 1).all() and (membership[:, 1:] == 0).all()


def test_cosine_of_a_zero_vector_is_zero():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        similarity = cosine_similarity(torch.ones(1, 4, 2, dtype=dtype), torch.zeros(1, 4, 3, dtype=dtype))
        assert similarity.dtype == dtype and (similarity == 0).all()


@pytest.mark.parametrize('block_elements', [1, 7, 40, 1 << 20])
def test_nearest_center_does_not_depend_on_its_blocks(block_elements):
    centers, points = _sets(2, 6, 5), _sets(2, 6, 33)
    expected = cosine_similarity(centers, points).argmax(-2)
    assert torch.equal(nearest_center(centers, points, None, block_elements), expected)


def test_group_mean_matches_loops():
    v, center_v = _sets(2, 3, 8), _sets(2, 3, 3)
    index = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])  # nobody joins center 2
    mask = torch.tensor([[True] * 8, [True] * 7 + [False]])
    out = group_mean(v, center_v, index, mask)
    for s in range(2):
        for m in range(3):
            members = [n for n in range(8) if mask[s, n] and index[s, n] == m]
            expected = (center_v[s, :, m] + sum(v[s, :, n] for n in members)) / (1 + len(members))
            torch.testing.assert_close(out[s, :, m], expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_formula():
    f, v = (x.requires_grad_() for x in _sets(2, 1, 3, 6).clone())
    alpha, beta = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.5, 0.2))

    def run(f, v, alpha, beta):
        return cluster(f, v, f[..., ::3], v[..., ::3], alpha, beta)

    assert torch.autograd.gradcheck(run, (f, v, alpha, beta))
