"""Clustering sets of points: similarity, hard assignment, aggregation, dispatch.

The one operation that Context Cluster, FEC and their relatives share, as pure functions on sets of points. Nothing
here knows about images or modules. A batch of sets is a tensor of *columns*: N points of D features are [..., D, N],
their M centers [..., D, M], so that the output of a 1x1 convolution is a batch of sets without a copy.

Padding: a set may be filled up with points that do not count. ``point_mask`` [..., N] and ``center_mask`` [..., M] mark
those that do; a masked point joins no cluster and a masked center gets no point.
"""

import torch
from torch import Tensor


def cosine_similarity(centers: Tensor, points: Tensor) -> Tensor:
    """Cosine of the angle between each center and each point, in -1 .. 1.

    Args:
        centers: [..., D, M].
        points: [..., D, N].

    Returns:
        [..., M, N]. Zero vectors are similar to nothing (0), not NaN.
    """
    return _unit(centers).transpose(-2, -1) @ _unit(points)


def _unit(x: Tensor) -> Tensor:
    """Columns scaled to length one, ``x / max(|x|, 1e-12)``; in float32 at least, because 1e-12 is zero in float16."""
    wide = x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
    return (wide * (wide * wide).sum(-2, keepdim=True).clamp_min(1e-24).rsqrt()).to(x.dtype)


def nearest_center(
    centers: Tensor,
    points: Tensor,
    center_mask: Tensor | None = None,
    block_elements: int = 1 << 20,
) -> Tensor:
    """Index of the center with the highest cosine similarity to each point, the first of equals.

    The [M, N] similarities are computed a block of points at a time, so memory grows with the number of points alone.
    No gradient flows: an index has none.

    Args:
        centers: [S, D, M].
        points: [S, D, N].
        center_mask: [..., M], true for centers that may be chosen.
        block_elements: Similarities of one set that exist at a time.

    Returns:
        int64 [S, N], values 0 .. M - 1.
    """
    centers, points = _unit(centers.detach()).transpose(-2, -1), _unit(points.detach())
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out this branch, but not half a condition
        if torch.compiler.is_exporting():  # a graph for any size has no loop over it
            return _first_largest(centers @ points, center_mask)
    size = max(1, block_elements // centers.shape[-2])
    blocks = [_first_largest(centers @ block, center_mask) for block in points.split(size, dim=-1)]
    return torch.cat(blocks, dim=-1)


def _first_largest(similarity: Tensor, center_mask: Tensor | None) -> Tensor:
    """[..., M, N] -> [..., N], the argument of the maximum over centers that count."""
    if center_mask is not None:
        similarity = similarity.masked_fill(~center_mask.unsqueeze(-1), -float('inf'))
    return similarity.max(dim=-2)[1]  # much faster than argmax over a dimension that is not the last


def assign(
    similarity: Tensor,
    point_mask: Tensor | None = None,
    center_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hard assignment: each point joins the one center it is most similar to, the first of equals.

    Args:
        similarity: [..., M, N].
        point_mask: [..., N], true for points that count.
        center_mask: [..., M], true for centers that count.

    Returns:
        membership [..., M, N], 1 where the point joined the center, else 0;
        and the similarity where it did, else 0, through which gradients flow.
    """
    index = _first_largest(similarity.detach(), center_mask).unsqueeze(-2)
    membership = torch.zeros_like(similarity).scatter(-2, index, 1.0)
    if point_mask is not None:
        membership = membership * point_mask.unsqueeze(-2)
    return membership, similarity * membership


def cluster(
    f: Tensor,
    v: Tensor,
    center_f: Tensor,
    center_v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weighted: bool = True,
    point_mask: Tensor | None = None,
    center_mask: Tensor | None = None,
) -> Tensor:
    """Group points around centers and give every point what its group holds (Context Cluster, section 3.2).

    ``s = sigmoid(beta + alpha * cos)``; each point joins its most similar center; a center becomes the mean of its own
    value and its members' values; each member receives its center, weighted by s.

    Args:
        f: Points' features for the similarity, [S, D, N].
        v: Points' values, [S, D, N].
        center_f: Centers' features, [S, D, M].
        center_v: Centers' values, [S, D, M].
        alpha: Scale of the cosine, one element.
        beta: Offset of the scaled cosine, one element.
        weighted: Members count as much as their similarity (Context Cluster); if false each counts one (FEC).
        point_mask: [..., N], true for points that count.
        center_mask: [..., M], true for centers that count.

    Returns:
        [S, D, N]; zero for points that do not count.
    """
    similarity = torch.sigmoid(beta + alpha * cosine_similarity(center_f, f))
    membership, similarity = assign(similarity, point_mask, center_mask)
    similarity = similarity.to(v.dtype)
    weight = similarity if weighted else membership.to(v.dtype)
    aggregated = (v @ weight.transpose(-2, -1) + center_v) / (1 + weight.sum(-1).unsqueeze(-2))
    return aggregated @ similarity


def group_mean(v: Tensor, center_v: Tensor, index: Tensor, point_mask: Tensor | None = None) -> Tensor:
    """Mean of each center's own value and the values of the points that joined it (FEC, cluster pooling).

    Args:
        v: Points' values, [S, D, N].
        center_v: Centers' values, [S, D, M].
        index: Center that each point joined, int64 [S, N].
        point_mask: [S, N], true for points that count.

    Returns:
        [S, D, M].
    """
    members = torch.ones_like(v[:, :1])
    if point_mask is not None:
        members = members * point_mask.unsqueeze(-2)
        v = v * members
    index = index.unsqueeze(-2)
    total = center_v.scatter_add(-1, index.expand_as(v), v.to(center_v.dtype))
    count = torch.ones_like(center_v[:, :1]).scatter_add(-1, index, members.to(center_v.dtype))
    return total / count
