"""Partition and merge, and mean-grid centers against adaptive average pooling."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from cluster_zoo.layers.grids import (
    distinct_bins,
    equal_bins,
    mean_centers,
    mean_grid,
    merge,
    pad_to_multiple,
    partition,
    point_mask,
)


@pytest.mark.parametrize('regions', [1, 2, 4])
def test_partition_and_merge(regions):
    x = torch.arange(2 * 6 * 8 * 12).reshape(2, 6, 8, 12)
    sets = partition(x, regions)
    h, w = 8 // regions, 12 // regions
    assert sets.shape == (2 * regions**2, h * w, 6)
    i, j = regions - 1, regions // 2
    expected = x[1, :, i * h : (i + 1) * h, j * w : (j + 1) * w].flatten(1).T
    assert torch.equal(sets[regions**2 + i * regions + j], expected)
    assert torch.equal(merge(sets, regions, (8, 12)), x)


def test_one_region_of_channels_last_is_not_copied():
    x = torch.randn(2, 6, 8, 12).contiguous(memory_format=torch.channels_last)
    sets = partition(x, 1)
    assert sets.data_ptr() == x.data_ptr() and merge(sets, 1, (8, 12)).data_ptr() == x.data_ptr()
    assert merge(sets, 1, (8, 12)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('size', [(7, 7), (14, 8), (3, 5), (1, 1), (2, 9)])
@pytest.mark.parametrize('bins', [1, 2, 4, 7])
def test_mean_grid_is_adaptive_average_pooling(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    points, expected = partition(x, 1), partition(F.adaptive_avg_pool2d(x, bins), 1)
    torch.testing.assert_close(mean_grid(size, 1, bins, x)[0] @ points, expected, rtol=1e-12, atol=1e-12)
    centers, point_mask, center_mask = mean_centers(points, size, 1, bins)
    torch.testing.assert_close(centers, expected, rtol=1e-12, atol=1e-12)
    equal = bins >= 2 * min(size)
    assert point_mask is None and (center_mask is not None) == equal
    if equal:
        assert int(center_mask[0].sum()) == len(torch.unique(mean_grid(size, 1, bins, x)[0], dim=0))


@pytest.mark.parametrize('n', range(1, 30))
@pytest.mark.parametrize('bins', [1, 2, 3, 4, 7])
def test_equal_bins_are_a_pooling_with_strides(n, bins):
    x = torch.randn(1, 1, n, dtype=torch.float64)
    expected = F.adaptive_avg_pool1d(x, bins)
    length, stride = equal_bins(n, bins)
    bounds = [(i * n // bins, math.ceil((i + 1) * n / bins)) for i in range(bins)]
    steps = {after[0] - before[0] for before, after in itertools.pairwise(bounds)}
    assert bool(length and stride) == (
        len({b - a for a, b in bounds}) == 1 and steps in ({max(steps, default=1)}, set()) and 0 not in steps
    )
    if length and stride:
        torch.testing.assert_close(F.avg_pool1d(x, length, stride), expected, rtol=1e-12, atol=1e-12)


def test_mean_grid_ignores_padding():
    weights = mean_grid((5, 4), 2, 2, torch.zeros((), dtype=torch.float64))  # regions of 3 x 2, the lower ones padded
    assert weights.shape == (4, 4, 6)
    assert torch.equal(weights.sum(2)[0], torch.ones(4).double())
    assert torch.equal(weights[2].unflatten(1, (3, 2))[:, 2], torch.zeros(4, 2).double())  # row 5 is padding
    narrow = mean_grid((4, 9), 8, 1, torch.zeros(()))  # 8 columns of regions of width 2: three are padding
    assert int((narrow.sum((1, 2)) == 0).sum()) == 64 - 4 * 5


def test_masks_of_padded_centers():
    points = partition(torch.ones(3, 2, 5, 4), 2)
    centers, point_mask, center_mask = mean_centers(points, (5, 4), 2, 2)
    assert point_mask.shape == (12, 6) and torch.equal(point_mask, (points[..., 0] > 0))
    assert torch.equal(center_mask.unsqueeze(-1).expand_as(centers), centers > 0)


@pytest.mark.parametrize('regions', [1, 2, 3, 7])
@pytest.mark.parametrize('bins', range(1, 9))
def test_distinct_bins(bins, regions):
    for size in range(1, 20):
        weights = mean_grid((size, 1), regions, bins, torch.zeros(()))
        rows = [row.nonzero().flatten().tolist() for row in weights.flatten(0, 1)]
        expected = [
            bool(row) and row not in rows[i - i % bins**2 : i]  # not equal to an earlier one of the region
            for i, row in enumerate(rows)
        ]
        assert distinct_bins((size, 1), regions, bins, torch.zeros(())).flatten().tolist() == expected
        assert distinct_bins((size, size), 1, bins, torch.zeros(())).all() == (bins < 2 * size)


def test_centers_that_all_differ_have_no_mask():
    """So that the clustering of most sizes does not compute masks."""
    for size, bins in itertools.product([(7, 7), (14, 28), (2, 3)], [1, 2, 3]):
        assert mean_centers(torch.zeros(2, size[0] * size[1], 3), size, 1, bins)[1:] == (None, None)


def test_point_mask():
    mask = point_mask((5, 4), 2, 1, torch.zeros(()))
    assert mask.dtype == torch.bool and mask.shape == (4, 6) and int(mask.sum()) == 20
    assert torch.equal(mask[2], torch.tensor([True, True, True, True, False, False]))
    assert pad_to_multiple(torch.ones(1, 1, 5, 4), 4).shape == (1, 1, 8, 4)
