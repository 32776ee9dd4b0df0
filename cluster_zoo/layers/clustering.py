"""Clustering of sets of points: hard assignment, aggregation, dispatch.

Pure functions on sets of points, shared by Context Cluster, FEC and related models. They use neither images nor
modules. Points are rows: a batch of S sets of N points with C features is [S, N, C]. Each of E heads groups the points
of a set around M centers.

The papers cluster features ``f = W x + b`` of the points x. `cluster_features` does so. The other functions give the
same result without computing features of every point for the product with the centers: for a center c,
``c . f = (c W) . x + c . b``. So a center becomes a projected query, ``query = c W`` and ``offset = c . b``, that is
compared with x. In the same way the mean of values ``v = W x + b`` is W times the mean of x, plus b: `aggregate` works
on x, and the values are computed for a few centers instead of for all points.

Padding: a set may contain padded points and centers. ``point_mask`` [S, N] and ``center_mask`` [S, M] are true for the
real ones, and None if all are real. No point joins a masked center, and a masked point has weight zero.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import ieee_bmm


class PointSets(NamedTuple):
    """Sets of points and the centers that they start with.

    Attributes:
        points: [S, N, C].
        centers: [S, M, C].
        point_mask: Real points, bool [S, N]; None if all are.
        center_mask: Real centers, bool [S, M]; None if all are.
    """

    points: Tensor
    centers: Tensor
    point_mask: Tensor | None = None
    center_mask: Tensor | None = None


class HeadWeights(NamedTuple):
    """Weights of a cluster mixer after the assignment.

    Attributes:
        beta: Offset of the scaled cosine similarity, one element.
        v_weight: Value convolution, [E, C, D].
        v_bias: [E, 1, D].
        proj_weight: Output projection, [E, D, C'].
        proj_bias: [C'].
    """

    beta: Tensor
    v_weight: Tensor
    v_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of autocast if it is enabled on the device of x, else that of x. float64 stays."""
    if not torch.jit.is_scripting():
        device = x.device.type
        # is_autocast_enabled fails for 'meta', and torch.compile of 2.11 cannot compile is_autocast_available.
        if device != 'meta' and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
    return x.dtype


def autocast(x: Tensor) -> Tensor:
    """Casts to autocast's dtype if autocast is enabled, as autocast does for the inputs of a matrix product."""
    return x.to(autocast_dtype(x))


def normalize(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """``scale * x / max(|x|, 1e-12)`` over the last dimension; the factor is float32 or more."""
    norm = vector_norm(x).unsqueeze(-1)
    return (x / norm if scale is None else x * (scale / norm)).to(x.dtype)


def vector_norm(x: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, at least 1e-12; float32 if x has lower precision."""
    wide = torch.float32 if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x.dtype
    return torch.linalg.vector_norm(x, dim=-1, dtype=wide).clamp_min(1e-12)


class _VectorNorm(torch.autograd.Function):
    """`vector_norm` with a gradient that reads and writes x once; that of PyTorch does so four times, in float32."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        norm = vector_norm(x)
        ctx.save_for_backward(x, norm)
        return norm

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        x, norm = ctx.saved_tensors
        scale = torch.where(norm > 1e-12, gradient / norm, 0.0).unsqueeze(-1)
        if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
            return x * scale
        return torch.mul(x, scale, out=torch.empty_like(x))


def feature_norms(points: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Euclidean norms of each head's features ``f = weight x + bias``.

    Args:
        points: x, [S, N, C].
        weight: [E * D, C].
        bias: [E * D].
        heads: E.

    Returns:
        [S, E, N], at least 1e-12; float32 if f has lower precision.
    """
    return norms(F.linear(points, weight, bias), heads)


def norms(f: Tensor, heads: int) -> Tensor:
    """Norms of features that are already computed: [S, N, E * D] -> [S, E, N], see `feature_norms`."""
    f = f.unflatten(2, (heads, f.shape[2] // heads))
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript skips this branch only if it has no other condition
        if f.device.type == 'cuda' and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            return _VectorNorm.apply(f).transpose(1, 2)
    return vector_norm(f).transpose(1, 2)


def project_query(centers: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Projects queries onto the points: ``query . x + offset`` is the product of a center with the feature W x + b.

    Args:
        centers: Centers in feature space, [S, M, E, D].
        weight: W of each head, [E, D, C].
        bias: b of each head, [E, D].

    Returns:
        Query [S, E, M, C] in the dtype of the factors, and offset [S, E, M], float32 or more.
    """
    S, M, E, D = centers.shape
    centers = centers.reshape(S * M, E, D).transpose(0, 1)
    query, offset = ieee_bmm(centers, weight), ieee_bmm(centers, bias.unsqueeze(-1), wide=True)
    return query.view(E, S, M, weight.shape[2]).transpose(0, 1).contiguous(), offset.view(E, S, M).transpose(0, 1)


def assign(
    points: Tensor,
    query: Tensor,
    offset: Tensor,
    center_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hard assignment: each point joins the center of the highest score, the first of equals.

    Args:
        points: [S, N, C].
        query: Projected queries, [S, E, M, C].
        offset: [S, E, M].
        center_mask: [S, M], true for centers that may be chosen.

    Returns:
        The index of the center, int64 [S, E, N], values 0 .. M - 1, and its score ``query . x + offset`` [S, E, N],
        float32 or more, which is differentiable.
    """
    value = ieee_bmm(query.flatten(1, 2), points.transpose(1, 2), wide=True).add_(offset.flatten(1).unsqueeze(2))
    value = value.unflatten(1, query.shape[1:3])
    if center_mask is None and points.device.type != 'cpu':
        largest, index = value.max(dim=2)
        return index, largest
    largest, index = first_argmax(value.detach(), center_mask if center_mask is None else center_mask.unsqueeze(1))
    return index, value.gather(2, index.unsqueeze(2)).squeeze(2) if value.requires_grad else largest


def first_argmax(value: Tensor, center_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Maximum over the centers that may be chosen, [..., M, N] -> [..., N], and its first index, int64 [..., N]."""
    if center_mask is not None:
        value = value.masked_fill(~center_mask.unsqueeze(-1), -float('inf'))
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript skips this branch only if it has no other condition
        if value.device.type == 'cpu' and not torch.compiler.is_compiling() and value.numel():
            # Max pooling over the centers, with points as channels, is vectorized over the points.
            M, N = value.shape[-2:]
            rows = value.reshape(-1, M, 1, N).permute(0, 3, 1, 2)
            largest, index = F.max_pool2d(rows, (M, 1), return_indices=True)
            return largest.reshape(value.shape[:-2] + (N,)), index.reshape(value.shape[:-2] + (N,))
    return value.max(dim=-2)


def similarities(
    score: Tensor,
    norms: Tensor,
    beta: Tensor,
    weighted: bool,
    point_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Similarity of each point to its center and the point's weight in the center; arguments as in `cluster`."""
    similarity = torch.sigmoid(torch.addcdiv(beta, score, norms))
    weight = similarity if weighted else torch.ones_like(similarity)
    if point_mask is not None:
        similarity = similarity * point_mask.unsqueeze(1)
        weight = weight * point_mask.unsqueeze(1)
    return similarity, weight


def membership(index: Tensor, weight: Tensor, centers: int) -> Tensor:
    """Assignment matrix [S, E * M, N]: the weight [S, E, N] of a point at the center that it joined, else zero."""
    members = weight.new_zeros(index.shape[0], index.shape[1], centers, index.shape[2])
    return members.scatter_(2, index.unsqueeze(2), weight.unsqueeze(2)).flatten(1, 2)


def aggregate(points: Tensor, members: Tensor, centers: Tensor) -> Tensor:
    """Weighted mean of each center, whose own weight is one, and its members.

    Args:
        points: [S, N, C].
        members: [S, E * M, N], see `membership`.
        centers: [S, M, C], the same for all heads.

    Returns:
        [S, E * M, C].
    """
    S, M, C = centers.shape
    total = torch.bmm(members, points).view(S, members.shape[1] // M, M, C) + centers.unsqueeze(1)
    return total.flatten(1, 2) * (1 + members.sum(-1, keepdim=True)).reciprocal()


def dispatch(values: Tensor, members: Tensor, bias: Tensor) -> Tensor:
    """Each point receives the values of its centers, one from each head, times its weights; they are added.

    Args:
        values: [S, E * M, C].
        members: [S, E * M, N], see `membership`.
        bias: Added to every point, [C].

    Returns:
        [S, N, C].
    """
    return torch.bmm(members.transpose(1, 2), values).add_(bias)


def center_values(means: Tensor, weights: HeadWeights) -> Tensor:
    """Value of each center and the projection of it: [S, E * M, C] -> [S, E * M, C'], without ``proj_bias``."""
    S, EM, C = means.shape
    E = weights.v_weight.shape[0]
    means = means.view(S, E, EM // E, C).transpose(0, 1).reshape(E, S * (EM // E), C)
    values = torch.bmm(torch.baddbmm(weights.v_bias, means, weights.v_weight), weights.proj_weight)
    return values.view(E, S, EM // E, values.shape[2]).transpose(0, 1).flatten(1, 2)


def cluster(
    sets: PointSets,
    query: Tensor,
    offset: Tensor,
    norms: Tensor,
    weights: HeadWeights,
    weighted: bool = True,
) -> Tensor:
    """Clusters points and returns to every point the values of its clusters (Context Cluster, section 3.2).

    ``s = sigmoid(beta + alpha * cos)``. Each point joins its most similar center. A center becomes the weighted mean of
    its own value and its members' values. Each member receives its center times s. The heads are added in the output
    projection.

    Args:
        sets: Points x and centers.
        query: Projected queries of alpha times the normalized centers, [S, E, M, C], see `project_query`.
        offset: [S, E, M].
        norms: Norms of the points' features, [S, E, N], see `feature_norms`.
        weights: See `HeadWeights`.
        weighted: The weight of a member in its center is s (Context Cluster); if false it is one (FEC).

    Returns:
        [S, N, C'].
    """
    points, centers = sets.points, sets.centers
    index, score = assign(points, query, offset, sets.center_mask)
    similarity, weight = similarities(score, norms, weights.beta, weighted, sets.point_mask)
    senders = membership(index, similarity.to(points.dtype), centers.shape[1])
    members = senders if weighted else membership(index, weight.to(points.dtype), centers.shape[1])
    values = center_values(aggregate(points, members, centers), weights)
    return dispatch(values, senders, weights.proj_bias)


def cluster_features(
    f: PointSets,
    v: PointSets,
    alpha: Tensor,
    beta: Tensor,
    weighted: bool = True,
) -> Tensor:
    """`cluster` for one head, from features and values that are already computed, as the paper writes it.

    Args:
        f: Features of points and centers, D channels, with the masks.
        v: Values of points and centers, D channels.
        alpha: Factor of the cosine similarity, one element.
        beta: Offset of the scaled cosine similarity, one element.
        weighted: See `cluster`.

    Returns:
        [S, N, D].
    """
    index, score = assign_features(f, alpha)
    similarity, weight = similarities(score, torch.ones_like(score), beta, weighted, f.point_mask)
    senders, members = (membership(index, x.to(v.points.dtype), v.centers.shape[1]) for x in (similarity, weight))
    return torch.bmm(senders.transpose(1, 2), aggregate(v.points, members, v.centers))


def assign_features(f: PointSets, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """`assign` for one head, from features that are already computed; arguments as in `cluster_features`."""
    query = normalize(f.centers, alpha).unsqueeze(1)
    return assign(normalize(f.points), query, torch.zeros_like(query[..., 0]), f.center_mask)


def nearest_center(
    points: Tensor,
    query: Tensor,
    offset: Tensor,
    center_mask: Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """The index of `assign` for one head and any number of centers, without gradients.

    The scores [M, N] are computed in blocks, so that memory is proportional to the number of points.

    Args:
        points: [S, N, C].
        query: [S, M, C].
        offset: [S, M, 1].
        center_mask: [S, M], true for centers that may be chosen.
        block: Number of centers and of points of each set in a block; None for 512 of each, on a GPU 2048 centers.

    Returns:
        int64 [S, N], values 0 .. M - 1.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102
        if torch.compiler.is_exporting():  # an exported graph for any size cannot have a loop over the blocks
            value = ieee_bmm(query, points.transpose(1, 2), wide=True) + offset
            return first_argmax(value, center_mask)[1]
    if block is None:
        block = (512 if points.device.type == 'cpu' else 2048, 512)
    if points.device.type != 'cpu':
        points, query = append_offset(points, query, offset)
    joined = []
    for some in points.transpose(1, 2).split(block[1], dim=2):
        scores, indices = [], []
        for start in range(0, query.shape[1], block[0]):
            stop = start + block[0]
            value = ieee_bmm(query[:, start:stop], some, wide=True)
            if points.device.type == 'cpu':
                value += offset[:, start:stop]
            score, index = first_argmax(value, center_mask if center_mask is None else center_mask[:, start:stop])
            scores.append(score)
            indices.append(index + start)
        if len(scores) > 1:
            _, best = first_argmax(torch.stack(scores, dim=1))
            joined.append(torch.stack(indices, dim=1).gather(1, best.unsqueeze(1)).squeeze(1))
        else:
            joined.append(indices[0])
    return torch.cat(joined, dim=1)


def append_offset(points: Tensor, query: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Points and queries with eight more features, whose product contains the offset; arguments as in `nearest_center`.

    This saves a pass over all scores. Three parts in half precision add up to the offset in float32.
    """
    C = points.shape[-1]
    points, query = F.pad(points, (0, 8)), F.pad(query, (0, 8))
    points[..., C : C + 3] = 1
    for i in range(C, C + 3):
        query[..., i : i + 1] = offset
        offset = offset - query[..., i : i + 1]
    return points, query


def group_mean(points: Tensor, centers: Tensor, index: Tensor, point_mask: Tensor | None = None) -> Tensor:
    """Mean of each center and the points that joined it, each with weight one (FEC, cluster pooling).

    Half precision is summed in float32. The same input gives the same bits.

    Args:
        points: [S, N, C].
        centers: [S, M, C].
        index: Index of the center that each point joined, int64 [S, N].
        point_mask: [S, N], true for real points.

    Returns:
        [S, M, C].
    """
    S, M, C = centers.shape
    dtype = torch.float64 if centers.dtype == torch.float64 else torch.float32
    members = torch.ones_like(points[..., :1], dtype=dtype)
    if point_mask is not None:
        members = members * point_mask.unsqueeze(-1)
        points = points * members
    rows = (index + M * torch.arange(S, device=index.device).unsqueeze(1)).flatten()
    total, points = centers.reshape(S * M, C).to(dtype), points.flatten(0, 1).to(dtype)
    if points.device.type == 'cuda':  # sorts the rows instead of adding them in any order
        total = total.index_put([rows], points, accumulate=True)
    else:
        total = total.index_add(0, rows, points)
    count = torch.ones_like(total[:, :1]).index_add(0, rows, members.flatten(0, 1))  # integers: exact in any order
    return (total / count).reshape(S, M, C).to(centers.dtype)
