"""Cutting grids into sets and back, and mean-grid centers against torch's adaptive pooling."""

import pytest
import torch
import torch.nn.functional as F

from cluster_zoo.grids import mean_grid, merge, pad_to_multiple, partition, point_mask


@pytest.mark.parametrize('regions', [1, 2, 4])
def test_partition_keeps_regions_together_and_merge_undoes_it(regions):
    x = torch.arange(2 * 6 * 8 * 12).reshape(2, 6, 8, 12)
    sets = partition(x, heads=3, regions=regions)
    h, w = 8 // regions, 12 // regions
    assert sets.shape == (6, regions**2, 2, h * w)
    i, j = regions - 1, regions // 2
    expected = x[1, 4:6, i * h : (i + 1) * h, j * w : (j + 1) * w].flatten(1)
    assert torch.equal(sets[1 * 3 + 2, i * regions + j], expected)
    assert torch.equal(merge(sets, 3, regions, (8, 12)), x)


@pytest.mark.parametrize('size', [(7, 7), (14, 8), (3, 5), (1, 1), (2, 9)])
@pytest.mark.parametrize('bins', [1, 2, 4, 7])
def test_mean_grid_is_adaptive_average_pooling(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    centers = x.flatten(2) @ mean_grid(size, 1, bins, x)[0]
    torch.testing.assert_close(centers, F.adaptive_avg_pool2d(x, bins).flatten(2), rtol=1e-12, atol=1e-12)


def test_mean_grid_of_padded_regions_leaves_padding_out():
    weights = mean_grid((5, 4), 2, 2, torch.zeros((), dtype=torch.float64))  # regions of 3 x 2, the lower ones short
    assert weights.shape == (4, 6, 4)
    assert torch.equal(weights.sum(1)[0], torch.ones(4).double())
    assert torch.equal(weights[2].unflatten(0, (3, 2))[2], torch.zeros(2, 4).double())  # row 5 does not exist
    narrow = mean_grid((4, 9), 8, 1, torch.zeros(()))  # 8 columns of regions, 2 wide: three hold nothing
    assert int((narrow.sum((1, 2)) == 0).sum()) == 64 - 4 * 5


def test_point_mask_marks_the_real_points():
    mask = point_mask((5, 4), 2, 1, torch.zeros(()))
    assert mask.dtype == torch.bool and mask.shape == (4, 6) and int(mask.sum()) == 20
    assert torch.equal(mask[2], torch.tensor([True, True, True, True, False, False]))
    assert pad_to_multiple(torch.ones(1, 1, 5, 4), 4).shape == (1, 1, 8, 4)
