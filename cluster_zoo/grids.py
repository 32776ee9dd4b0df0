"""Grids of an image as sets of points: equal regions, padding where they do not divide, mean-grid centers.

A set has one point a column (see `clustering`): a map [B, E * D, H, W] of E heads, cut into r x r regions, is the batch
of sets [B * E, r * r, D, N]. Rows are H and come first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def divides(size: tuple[int, int], multiple: int) -> bool:
    """Whether both sides are a multiple, so that nothing must be padded or masked."""
    return size[0] % multiple == 0 and size[1] % multiple == 0


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and at the right of [..., H, W] until both sides are multiples."""
    bottom = (x.shape[-2] + multiple - 1) // multiple * multiple - x.shape[-2]
    right = (x.shape[-1] + multiple - 1) // multiple * multiple - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom))


def partition(x: Tensor, heads: int, regions: int) -> Tensor:
    """[B, E * D, H, W] -> [B * E, r * r, D, N], where r divides H and W and N = H * W / r^2."""
    B, C, H, W = x.shape
    x = x.reshape(B * heads, C // heads, regions, H // regions, regions, W // regions)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)


def merge(x: Tensor, heads: int, regions: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `partition`: [B * E, r * r, D, N] -> [B, E * D, H, W] with ``size`` = (H, W)."""
    S, _, D, _ = x.shape
    H, W = size
    x = x.reshape(S, regions, regions, D, H // regions, W // regions)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(S // heads, heads * D, H, W)


def point_mask(size: tuple[int, int], regions: int, multiple: int, like: Tensor) -> Tensor:
    """Which points of a grid are real once it is padded to a multiple: bool [r * r, N]."""
    mask = torch.ones((1, 1, size[0], size[1]), dtype=torch.uint8, device=like.device)
    return partition(pad_to_multiple(mask, multiple), 1, regions)[0, :, 0] > 0


def mean_grid(size: tuple[int, int], regions: int, bins: int, like: Tensor) -> Tensor:
    """Weights [r * r, N, M] whose product with sets [..., r * r, D, N] is the mean grid of every region.

    That is adaptive average pooling of each region to g x g, with points beyond ``size`` left out: bin i of n positions
    covers floor(i n / g) .. ceil((i + 1) n / g). A bin that holds no real point has only zeros.

    Args:
        size: (H, W) of the grid before it is padded to a multiple of ``regions``.
        regions: r, regions per axis.
        bins: g, centers per axis; M = g^2.
        like: Tensor whose dtype and device the weights take.
    """
    rows = _bin_weights(size[0], regions, bins, like)
    columns = _bin_weights(size[1], regions, bins, like)
    # [r, 1, h, 1, g, 1] x [1, r, 1, w, 1, g] -> [r * r, h * w, g * g]
    weights = rows[:, None, :, None, :, None] * columns[None, :, None, :, None, :]
    return weights.flatten(4).flatten(2, 3).flatten(0, 1)


def _bin_weights(size: int, regions: int, bins: int, like: Tensor) -> Tensor:
    """One axis of `mean_grid`, [r, ceil(size / r), g]."""
    n = (size + regions - 1) // regions
    position = torch.arange(n, device=like.device).unsqueeze(1)
    i = torch.arange(bins, device=like.device)
    inside = (position >= i * n // bins) & (position < ((i + 1) * n + bins - 1) // bins)
    real = torch.arange(regions * n, device=like.device).reshape(regions, n, 1) < size
    weights = (inside & real).to(like.dtype)
    return weights / weights.sum(1, keepdim=True).clamp_min(1)
