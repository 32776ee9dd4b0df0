"""Feature maps as sets of points: equal regions, padding where they do not divide, mean-grid centers.

A map [B, C, H, W] that is partitioned into r x r regions is a batch of sets [B * r * r, N, C] (see `clustering`), in
row-major order. If r does not divide a side, the map is padded at the bottom and at the right, and masks mark the real
points and centers. In the channels_last memory format `partition` and `merge` do not copy a map of one region.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def divides(size: tuple[int, int], multiple: int) -> bool:
    """Whether both sides are multiples, so that no padding and no mask is needed."""
    return size[0] % multiple == 0 and size[1] % multiple == 0


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pads [..., H, W] with zeros at the bottom and at the right until both sides are multiples."""
    if divides((x.shape[-2], x.shape[-1]), multiple):
        return x
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple))


def partition(x: Tensor, regions: int, cell: int = 1) -> Tensor:
    """[B, C, H, W] -> [B * r * r, N, C], with N = H * W / r^2 after padding.

    Args:
        x: The map.
        regions: r, regions per axis.
        cell: Number that both sides of each region are padded to a multiple of.
    """
    x = pad_to_multiple(x, regions * cell)
    B, C, H, W = x.shape
    if regions == 1:
        return x.permute(0, 2, 3, 1).reshape(B, H * W, C)
    h, w = H // regions, W // regions
    x = x.permute(0, 2, 3, 1).reshape(B, regions, h, regions, w, C).transpose(2, 3)
    return x.reshape(B * regions * regions, h * w, C)


def merge(x: Tensor, regions: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `partition`, without the padding: [B * r * r, N, C] -> [B, C, H, W] with ``size`` = (H, W)."""
    h, w = (size[0] + regions - 1) // regions, (size[1] + regions - 1) // regions
    B, C = x.shape[0] // (regions * regions), x.shape[-1]
    x = x.reshape(B, regions, regions, h, w, C).transpose(2, 3).reshape(B, regions * h, regions * w, C)
    return x.permute(0, 3, 1, 2)[:, :, : size[0], : size[1]]


def point_mask(size: tuple[int, int], regions: int, cell: int, like: Tensor) -> Tensor:
    """Mask of the real points of a partitioned map: bool [r * r, N]."""
    mask = torch.ones((1, 1, size[0], size[1]), dtype=torch.uint8, device=like.device)
    return partition(mask, regions, cell)[..., 0] > 0


def mean_grid(size: tuple[int, int], regions: int, bins: int, like: Tensor) -> Tensor:
    """Weights [r * r, M, N] whose product with sets [..., N, C] is the mean grid of every region.

    The mean grid is adaptive average pooling of each region to g x g, without padded points: bin i of n positions
    covers floor(i n / g) .. ceil((i + 1) n / g). The weights of a bin without real points are zero.

    Args:
        size: (H, W) of the map before padding.
        regions: r, regions per axis.
        bins: g, centers per axis; M = g^2.
        like: Tensor with the dtype and device of the weights.
    """
    rows = _bin_weights(size[0], regions, bins, like)
    columns = _bin_weights(size[1], regions, bins, like)
    # [r, 1, g, 1, h, 1] x [1, r, 1, g, 1, w] -> [r * r, g * g, h * w]
    weights = rows[:, None, :, None, :, None] * columns[None, :, None, :, None, :]
    return weights.flatten(4).flatten(2, 3).flatten(0, 1)


def _bin_weights(size: int, regions: int, bins: int, like: Tensor) -> Tensor:
    """Weights of `mean_grid` along one axis, [r, g, ceil(size / r)]."""
    n = (size + regions - 1) // regions
    position = torch.arange(n, device=like.device)
    i = torch.arange(bins, device=like.device).unsqueeze(1)
    inside = (position >= i * n // bins) & (position < ((i + 1) * n + bins - 1) // bins)
    real = torch.arange(regions * n, device=like.device).reshape(regions, 1, n) < size
    weights = (inside & real).to(like.dtype)
    return weights / weights.sum(-1, keepdim=True).clamp_min(1)


def adaptive_pool(x: Tensor, bins: int) -> Tensor:
    """Adaptive average pooling [B, C, H, W] -> [B, C, g, g], with ``bins`` = g.

    An exported graph has a product with weights that it computes from the size of the map. The exporters would
    otherwise write the bins of the traced size, which are wrong for other sizes.
    """
    if not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x, bins)
    rows, columns = (_bin_weights(size, 1, bins, x)[0] for size in x.shape[-2:])  # [g, H], [g, W]
    return rows @ x @ columns.T


def distinct_bins(size: tuple[int, int], regions: int, bins: int, like: Tensor) -> Tensor:
    """Mask of the bins of `mean_grid` that contain real points and are not equal to an earlier bin: bool [r * r, M].

    Equal bins give equal centers, whose scores differ by rounding alone. Only the first of them may be chosen, as in
    exact arithmetic. Bins over n positions without padding are equal only if 2 n <= g.
    """
    rows = _is_distinct(size[0], regions, bins, like)
    columns = _is_distinct(size[1], regions, bins, like)
    # [r, 1, g, 1] x [1, r, 1, g] -> [r * r, g * g]
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _is_distinct(size: int, regions: int, bins: int, like: Tensor) -> Tensor:
    """`distinct_bins` along one axis, [r, g]."""
    n = (size + regions - 1) // regions
    real = (size - n * torch.arange(regions, device=like.device)).unsqueeze(1)
    i = torch.arange(-1, bins, device=like.device)  # from the bin before the first one
    start, stop = i * n // bins, torch.minimum(((i + 1) * n + bins - 1) // bins, real)
    both = start + stop  # neither decreases, so that the sums of two bins are equal only if the bins are
    return (both[:, 1:] > both[:, :-1]) & (stop > start)[:, 1:]


def equal_bins(n: int, bins: int) -> tuple[int, int]:
    """Length and stride of the bins of `mean_grid` over n positions, zeros if they are not equal."""
    starts, stops = [i * n // bins for i in range(bins + 1)], [-(-i * n // bins) for i in range(bins + 1)]
    lengths = {stop - start for start, stop in zip(starts[:-1], stops[1:])}
    strides = {after - before for before, after in pairwise(starts[:-1])} or {n}
    return (lengths.pop(), strides.pop()) if len(lengths) == len(strides) == 1 else (0, 0)


def mean_centers(
    points: Tensor,
    size: tuple[int, int],
    regions: int,
    bins: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Initial centers of a partitioned map, and the masks of `clustering`.

    Args:
        points: Sets of a map, [B * r * r, N, C].
        size, regions, bins: See `mean_grid`.

    Returns:
        The mean grid of every region, [B * r * r, M, C]; point mask, bool [B * r * r, N], None if no point is padded;
        and center mask, bool [B * r * r, M], see `distinct_bins`, None if all centers may be chosen.
    """
    if divides(size, regions):
        h, w = size[0] // regions, size[1] // regions
        distinct: Tensor | None = None
        if bins >= 2 * h or bins >= 2 * w:
            distinct = distinct_bins((h, w), 1, bins, points).expand(points.shape[0], -1)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript skips this branch only if it has no other condition
            if not torch.compiler.is_compiling():
                grid = points.unflatten(1, (h, w)).permute(0, 3, 1, 2)
                if points.device.type == 'cpu':
                    return F.adaptive_avg_pool2d(grid, bins).permute(0, 2, 3, 1).flatten(1, 2), None, distinct
                # While torch.jit.trace records, h and w are tensors
                windows = (0,) if torch.jit.is_tracing() else equal_bins(h, bins) + equal_bins(w, bins)
                if all(windows):
                    means = F.avg_pool2d(grid, windows[::2], windows[1::2])
                    return means.permute(0, 2, 3, 1).flatten(1, 2), None, distinct
        weights = mean_grid((h, w), 1, bins, points)
        return torch.bmm(weights.expand(points.shape[0], -1, -1), points), None, distinct
    images = points.shape[0] // (regions * regions)
    weights = mean_grid(size, regions, bins, points).repeat(images, 1, 1)
    mask = point_mask(size, regions, 1, points).repeat(images, 1)
    return torch.bmm(weights, points), mask, distinct_bins(size, regions, bins, points).repeat(images, 1)
