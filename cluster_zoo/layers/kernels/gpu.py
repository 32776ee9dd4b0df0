"""Triton implementation of the clustering functions. It never stores a tensor of the size of centers times points.

Four operations make up `clustering.cluster` and all of its gradients. With points x_n of S sets, E heads, M centers a
head, and i(e, n) the index of the center that point n joined in head e:

- `assign`: i(e, n), the argmax over m of ``query[e, m] . x_n + offset[e, m]``, and the maximum;
- `select`: ``query[e, i] . x_n + offset[e, i]`` for a given i;
- `aggregate`: the sum of ``weight[e, n] x_n`` over the members n of each center, and the sum of the weights;
- `dispatch`: ``bias + sum over e of weight[e, n] values[e, i(e, n)]`` for each point.

The gradient of each is again one of them, because aggregation and dispatch are each other's transpose. So they can be
differentiated any number of times. A fifth operation, `row_norms`, computes norms. No operation uses atomic additions:
the same input gives the same bits.

float32 is multiplied in float32, or in TF32 if ``torch.set_float32_matmul_precision`` allows it.
`assign` never uses TF32.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import clustering
from ..clustering import HeadWeights, PointSets
from . import triton_kernels as kernels

__all__ = ['cluster', 'feature_norms', 'group_mean', 'nearest_center']


def _factors(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which numbers are multiplied; Triton's interpreter cannot multiply bfloat16."""
    if dtype == torch.bfloat16:
        return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return {torch.float32: tl.float32, torch.float16: tl.float16}[dtype]


def _tiles(x: Tensor, E: int, M: int) -> dict[str, Any]:
    """Tile sizes and dtype for points or values x [..., C]. They depend on shape and dtype alone.

    Powers of two, at least 16 on each side of a matrix product. A tile has at most 64 centers, 64 points and 64
    channels (32 points and channels in float32): so it fits in the registers from compute capability 8.0, and two tiles
    take at most 48 KiB of shared memory. The sizes have not been tuned on a device.
    """
    C, block = x.shape[-1], 128 // x.element_size()
    width = min(64, max(2, triton.next_power_of_2(M)))
    return dict(
        C=C,
        HEADS=max(min(triton.next_power_of_2(E), 64 // width), 16 // width),
        WIDTH=width,
        BLOCK_N=block,
        BLOCK_C=min(block, max(16, triton.next_power_of_2(C))),
        FACTORS=_factors(x.dtype),
        PRECISION='tf32' if torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'ieee',
        num_warps=4,
        num_stages=2,
    )


def _row_tiles(D: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(D)
    return dict(D=D, BLOCK_D=block_d, BLOCK=max(1, 4096 // block_d))


@torch.library.custom_op('cluster_zoo::assign', mutates_args=())
def assign(points: Tensor, query: Tensor, offset: Tensor, center_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The center of the highest score for each point, the first of equals, and the score.

    Args:
        points: [S, N, C].
        query: [S, E, M, C].
        offset: [S, E, M].
        center_mask: bool [S, M], true for centers that may be chosen.

    Returns:
        int32 [S, E, N], values 0 .. M - 1 (0 if no center may be chosen), and float32 [S, E, N].
    """
    (S, N, _), (E, M) = points.shape, query.shape[1:3]
    index = points.new_empty((S, E, N), dtype=torch.int32)
    score = points.new_empty((S, E, N), dtype=torch.float32)
    tiles = _tiles(points, E, M)
    grid = (S * triton.cdiv(N, tiles['BLOCK_N']), triton.cdiv(E, tiles['HEADS']))
    tiles['PRECISION'] = 'ieee'
    mask = None if center_mask is None else center_mask.contiguous()
    with torch.cuda.device_of(points):
        kernels.assign[grid](
            points.contiguous(), query.contiguous(), offset.contiguous(), mask, index, score, N, E, M, **tiles
        )
    return index, score


@torch.library.custom_op('cluster_zoo::select', mutates_args=())
def select(points: Tensor, index: Tensor, query: Tensor, offset: Tensor | None) -> Tensor:
    """The score of one given center for each point and head, float32 [S, E, N]; arguments as in `assign`."""
    (S, N, _), (E, M) = points.shape, query.shape[1:3]
    score = points.new_empty((S, E, N), dtype=torch.float32)
    tiles = _tiles(points, E, M)
    grid = (S * triton.cdiv(N, tiles['BLOCK_N']), triton.cdiv(E, tiles['HEADS']))
    offset = None if offset is None else offset.contiguous()
    with torch.cuda.device_of(points):
        kernels.select[grid](
            points.contiguous(), query.contiguous(), offset, index.contiguous(), score, N, E, M, **tiles
        )
    return score


@torch.library.custom_op('cluster_zoo::aggregate', mutates_args=())
def aggregate(points: Tensor, index: Tensor, weight: Tensor, centers: int) -> tuple[Tensor, Tensor]:
    """Weighted sums of each center's members, and sums of their weights.

    Args:
        points: [S, N, C].
        index: int32 [S, E, N].
        weight: float32 [S, E, N].
        centers: M.

    Returns:
        float32 [S, E, M, C] and float32 [S, E, M].
    """
    (S, N, C), E, M = points.shape, index.shape[1], centers
    tiles = _tiles(points, E, M)
    blocks = triton.cdiv(E, tiles['HEADS']) * triton.cdiv(M, tiles['WIDTH']), triton.cdiv(C, tiles['BLOCK_C'])
    # A few large sets are split into spans of at least 256 points, to run about four programs on each multiprocessor.
    splits = max(1, min(512 // max(1, S * blocks[0] * blocks[1]), N // 256))
    span = triton.cdiv(triton.cdiv(N, splits), tiles['BLOCK_N']) * tiles['BLOCK_N']
    splits = triton.cdiv(N, span)
    sums = points.new_empty((S, splits, E, M, C), dtype=torch.float32)
    totals = points.new_empty((S, splits, E, M), dtype=torch.float32)
    with torch.cuda.device_of(points):
        kernels.aggregate[(S * splits, *blocks)](
            points.contiguous(), index.contiguous(), weight.contiguous(), sums, totals, N, E, M, splits, span, **tiles
        )
    return (sums.sum(1), totals.sum(1)) if splits > 1 else (sums.squeeze(1), totals.squeeze(1))


@torch.library.custom_op('cluster_zoo::dispatch', mutates_args=())
def dispatch(values: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each point receives the weighted sum over heads of its centers' values.

    Args:
        values: [S, E, M, C].
        index: int32 [S, E, N].
        weight: float32 [S, E, N].
        bias: Added to every point, [C].

    Returns:
        [S, N, C], in the dtype of the values.
    """
    (S, E, M, C), N = values.shape, index.shape[2]
    out = values.new_empty((S, N, C))
    tiles = _tiles(values, E, M)
    grid = (S * triton.cdiv(N, tiles['BLOCK_N']), triton.cdiv(C, tiles['BLOCK_C']))
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(values):
        kernels.dispatch[grid](
            values.contiguous(), index.contiguous(), weight.contiguous(), bias, out, N, E, M, **tiles
        )
    return out


@torch.library.custom_op('cluster_zoo::row_norms', mutates_args=())
def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms, at least 1e-12: [..., D] -> float32 [...]."""
    out = rows.new_empty(rows.shape[:-1], dtype=torch.float32)
    tiles = _row_tiles(rows.shape[-1])
    with torch.cuda.device_of(rows):
        kernels.row_norms[(triton.cdiv(out.numel(), tiles['BLOCK']),)](rows.contiguous(), out, out.numel(), **tiles)
    return out


@torch.library.custom_op('cluster_zoo::row_norms_backward', mutates_args=())
def row_norms_backward(gradient: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    """``gradient * rows / norms``: float32 [...], [..., D] and the norms, float32 [...] -> [..., D]."""
    out = rows.new_empty(rows.shape)
    tiles = _row_tiles(rows.shape[-1])
    with torch.cuda.device_of(rows):
        kernels.row_norms_backward[(triton.cdiv(norms.numel(), tiles['BLOCK']),)](
            gradient.contiguous(), rows.contiguous(), norms, out, norms.numel(), **tiles
        )
    return out


# Shapes for torch.compile and torch.export ------------------------------------------------------------------------


@assign.register_fake
def _(points, query, offset, center_mask):
    shape = (points.shape[0], query.shape[1], points.shape[1])
    return points.new_empty(shape, dtype=torch.int32), points.new_empty(shape, dtype=torch.float32)


@select.register_fake
def _(points, index, query, offset):
    return points.new_empty(index.shape, dtype=torch.float32)


@aggregate.register_fake
def _(points, index, weight, centers):
    S, E, _ = index.shape
    sums = points.new_empty((S, E, centers, points.shape[2]), dtype=torch.float32)
    return sums, points.new_empty((S, E, centers), dtype=torch.float32)


@dispatch.register_fake
def _(values, index, weight, bias):
    return values.new_empty((values.shape[0], index.shape[2], values.shape[3]))


@row_norms.register_fake
def _(rows):
    return rows.new_empty(rows.shape[:-1], dtype=torch.float32)


@row_norms_backward.register_fake
def _(gradient, rows, norms):
    return rows.new_empty(rows.shape)


# Gradients --------------------------------------------------------------------------------------------------------
# Autograd casts each to the dtype of its tensor.


def _score_gradients(points: Tensor, index: Tensor, query: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of points, query and offset in `assign` and `select`."""
    d_points = dispatch(query.to(points.dtype), index, gradient, None)
    return d_points, *aggregate(points, index, gradient, query.shape[2])


def _assign_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0], inputs[1])


def _assign_backward(ctx, _, gradient):
    return *_score_gradients(*ctx.saved_tensors, gradient), None


def _select_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.with_offset = inputs[3] is not None


def _select_backward(ctx, gradient):
    d_points, d_query, d_offset = _score_gradients(*ctx.saved_tensors, gradient)
    return d_points, None, d_query, d_offset if ctx.with_offset else None


def _save_three(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _aggregate_backward(ctx, d_sums, d_totals):
    points, index, weight = ctx.saved_tensors
    d_points = dispatch(d_sums.to(points.dtype), index, weight, None)
    d_weight = select(points, index, d_sums, d_totals) if ctx.needs_input_grad[2] else None
    return d_points, None, d_weight, None


def _dispatch_backward(ctx, gradient):
    values, index, weight = ctx.saved_tensors
    d_values, _ = aggregate(gradient, index, weight, values.shape[2])
    d_bias = gradient.sum((0, 1)) if ctx.needs_input_grad[3] else None
    return d_values, None, select(gradient, index, values, None), d_bias


def _row_norms_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _row_norms_backward(ctx, gradient):
    rows, norms = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
        return (gradient / norms).unsqueeze(-1) * rows
    return row_norms_backward(gradient, rows, norms)


assign.register_autograd(_assign_backward, setup_context=_assign_setup)
select.register_autograd(_select_backward, setup_context=_select_setup)
aggregate.register_autograd(_aggregate_backward, setup_context=_save_three)
dispatch.register_autograd(_dispatch_backward, setup_context=_save_three)
row_norms.register_autograd(_row_norms_backward, setup_context=_row_norms_setup)


# The functions of `clustering` ------------------------------------------------------------------------------------


def feature_norms(points: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """See `clustering.feature_norms`."""
    return row_norms(F.linear(points, weight, bias).unflatten(-1, (heads, -1))).transpose(1, 2)


def cluster(
    sets: PointSets,
    query: Tensor,
    offset: Tensor,
    norms: Tensor,
    weights: HeadWeights,
    weighted: bool = True,
) -> Tensor:
    """See `clustering.cluster`; similarities are float32."""
    points, centers = clustering.autocast(sets.points), sets.centers
    index, score = assign(points, clustering.autocast(query), offset, sets.center_mask)
    similarity, weight = clustering.similarities(score, norms, weights.beta, weighted, sets.point_mask)
    sums, totals = aggregate(points, index, weight, centers.shape[1])
    means = (sums + centers.unsqueeze(1)) * (1 + totals).reciprocal().unsqueeze(-1)
    values = clustering.center_values(means.to(points.dtype).flatten(1, 2), weights)
    return dispatch(values.unflatten(1, query.shape[1:3]), index, similarity, weights.proj_bias)


def group_mean(points: Tensor, centers: Tensor, index: Tensor, point_mask: Tensor | None = None) -> Tensor:
    """See `clustering.group_mean`."""
    weight = torch.ones_like(index, dtype=torch.float32) if point_mask is None else point_mask.float()
    sums, totals = aggregate(points, index.int().unsqueeze(1), weight.unsqueeze(1), centers.shape[1])
    return ((sums.squeeze(1) + centers) / (1 + totals).transpose(1, 2)).to(centers.dtype)


def nearest_center(points: Tensor, query: Tensor, offset: Tensor, center_mask: Tensor | None = None) -> Tensor:
    """See `clustering.nearest_center`."""
    with torch.no_grad():
        index, _ = assign(
            clustering.autocast(points), clustering.autocast(query).unsqueeze(1), offset.transpose(1, 2), center_mask
        )
    return index.squeeze(1).long()
