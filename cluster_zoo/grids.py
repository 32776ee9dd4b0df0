"""Grids of an image as sets of points: equal regions, padding where they do not divide, mean-grid centers.

A set has one point a column (see `clustering`): a map [B, E * D, H, W] of E heads, cut into r x r regions, is the batch
of sets [B * E, r * r, D, N]. Rows are H and come first. Where r does not divide a side, the grid is filled up at the
bottom and at the right, and masks say which points and centers are real.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def divides(size: tuple[int, int], multiple: int) -> bool:
    """Whether both sides are a multiple, so that nothing must be padded or masked."""
    return size[0] % multiple == 0 and size[1] % multiple == 0


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and at the right of [..., H, W] until both sides are multiples."""
    if divides((x.shape[-2], x.shape[-1]), multiple):
        return x
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple))


def partition(x: Tensor, heads: int, regions: int, cell: int = 1) -> Tensor:
    """[B, E * D, H, W] -> [B * E, r * r, D, N], with N = H * W / r^2 once padded.

    Args:
        x: The map.
        heads: E.
        regions: r, regions per axis.
        cell: Each region's sides become a multiple of this.
    """
    x = pad_to_multiple(x, regions * cell)
    B, C, H, W = x.shape
    x = x.reshape(B * heads, C // heads, regions, H // regions, regions, W // regions)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)


def merge(x: Tensor, heads: int, regions: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `partition`, padding cut off: [B * E, r * r, D, N] -> [B, E * D, H, W] with ``size`` = (H, W)."""
    S, _, D, _ = x.shape
    h, w = (size[0] + regions - 1) // regions, (size[1] + regions - 1) // regions
    x = x.reshape(S, regions, regions, D, h, w).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(S // heads, heads * D, regions * h, regions * w)[:, :, : size[0], : size[1]]


def point_mask(size: tuple[int, int], regions: int, cell: int, like: Tensor) -> Tensor:
    """Which points of a partitioned grid are real: bool [r * r, N]."""
    mask = torch.ones((1, 1, size[0], size[1]), dtype=torch.uint8, device=like.device)
    return partition(mask, 1, regions, cell)[0, :, 0] > 0


def mean_grid(size: tuple[int, int], regions: int, bins: int, like: Tensor) -> Tensor:
    """Weights [r * r, N, M] whose product with sets [..., r * r, D, N] is the mean grid of every region.

    That is adaptive average pooling of each region to g x g, with points beyond ``size`` left out: bin i of n positions
    covers floor(i n / g) .. ceil((i + 1) n / g). A bin that holds no real point has only zeros.

    Args:
        size: (H, W) of the grid before it is padded.
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


def mean_centers(
    size: tuple[int, int],
    regions: int,
    bins: int,
    like: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """How the centers of a partitioned grid arise, and what of it counts.

    Args:
        size, regions, bins, like: See `mean_grid`.

    Returns:
        Weights of the points in the centers, [r * r, N, M], or [N, M] for all regions if they are alike;
        which points count, bool [r * r, N], and which centers, bool [r * r, M], or None if all do.
    """
    weights = mean_grid(size, regions, bins, like)
    if divides(size, regions):
        return weights[0], None, None
    return weights, point_mask(size, regions, 1, like), weights.sum(-2) > 0
