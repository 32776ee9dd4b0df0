"""Clustering sets of points: hard assignment, aggregation, dispatch.

The one operation that Context Cluster, FEC and their relatives share, as pure functions on sets of points. Nothing
here knows about images or modules. Points are rows: a batch of S sets of N points with C features is [S, N, C]. E heads
group the points of a set, each in its own way, around M centers a head.

The papers cluster features ``f = W x + b`` of the points x. What a center c needs to know of a point is the product
``c . f = (c W) . x + c . b``, so a center is given as a `probe` (c W, c . b) of the points as they come, and f need not
be cut into sets. Likewise a mean of values ``v = W x + b`` is W times the mean of x, plus b, so that `aggregate` takes
the points as they come too, and what follows it is computed for a few centers instead of for all points.

Padding: a set may be filled up with points that do not count. ``point_mask`` [..., N] and ``center_mask`` [..., M] mark
those that do; a masked center gets no point, and a masked point weighs nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """In autocast's precision where that is on: what it does itself to the arguments of each matrix product."""
    if not torch.jit.is_scripting():
        device = x.device.type
        # 'meta' has no autocast to ask for. torch.amp.is_autocast_available says so too, but 2.11 can not compile it.
        if device != 'meta' and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(device))
    return x


def normalize(x: Tensor) -> Tensor:
    """Rows scaled to length one, ``x / max(|x|, 1e-12)``; in float32 at least, because 1e-12 is zero in float16."""
    wide = x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
    return F.normalize(wide, dim=-1, eps=1e-12).to(x.dtype)


def feature_norms(points: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Euclidean norms of each head's features ``f = weight x + bias``.

    Args:
        points: x, [S, N, C].
        weight: [E * D, C].
        bias: [E * D].
        heads: E.

    Returns:
        [S, E, N], at least 1e-12; float32 if f has less.
    """
    return norms(F.linear(points, weight, bias), heads)


def norms(f: Tensor, heads: int) -> Tensor:
    """The same of features that are there: [S, N, E * D] -> [S, E, N]."""
    wide = torch.float32 if f.dtype == torch.float16 or f.dtype == torch.bfloat16 else f.dtype
    lengths = torch.linalg.vector_norm(f.reshape(f.shape[0], f.shape[1], heads, -1), dim=-1, dtype=wide)
    return lengths.clamp_min(1e-12).transpose(1, 2)


def project_query(centers: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Centers among features ``W x + b`` as an affine function of x, whose value is their product with the features.

    Args:
        centers: [S, M, E, D].
        weight: W of each head, [E, D, C].
        bias: b of each head, [E, D].

    Returns:
        Query [S, E, M, C] and offset [S, E, M].
    """
    S, M, E, D = centers.shape
    both = torch.bmm(centers.reshape(S * M, E, D).transpose(0, 1), torch.cat([weight, bias.unsqueeze(-1)], dim=-1))
    both = both.view(E, S, M, -1).transpose(0, 1).contiguous()
    return both[..., :-1], both[..., -1]


def assign(
    points: Tensor,
    query: Tensor,
    offset: Tensor,
    center_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hard assignment: each point joins the one center whose probe is highest, the first of equals.

    Args:
        points: [S, N, C].
        query: [S, E, M, C].
        offset: [S, E, M].
        center_mask: [S, M], true for centers that may be chosen.

    Returns:
        The center, int64 [S, E, N], values 0 .. M - 1, and its probe's value [S, E, N], through which gradients flow.
    """
    value = torch.bmm(query.flatten(1, 2), points.transpose(1, 2)).add_(offset.flatten(1).unsqueeze(2))
    value = value.view(query.shape[:3] + (-1,))
    largest, index = first_argmax(value.detach(), center_mask if center_mask is None else center_mask.unsqueeze(1))
    return index, value.gather(2, index.unsqueeze(2)).squeeze(2) if value.requires_grad else largest


def first_argmax(value: Tensor, center_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest over centers that count, [..., M, N] -> [..., N], and int64 the first index where it stands."""
    if center_mask is not None:
        value = value.masked_fill(~center_mask.unsqueeze(-1), -float('inf'))
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out this branch, but not half a condition
        if value.device.type == 'cpu' and not torch.compiler.is_compiling():
            # A pooling window over the centers with points as channels, which is vectorised over the points
            M, N = value.shape[-2:]
            rows = value.reshape(-1, M, 1, N).permute(0, 3, 1, 2)
            largest, index = F.max_pool2d(rows, (M, 1), return_indices=True)
            return largest.reshape(value.shape[:-2] + (N,)), index.reshape(value.shape[:-2] + (N,))
    return value.max(dim=-2)


def similarities(
    score: Tensor,
    lengths: Tensor,
    beta: Tensor,
    weighted: bool,
    point_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """How similar each point is to its center, and what it weighs there; arguments as in `cluster`, all [S, E, N]."""
    similarity = torch.sigmoid(torch.addcdiv(beta, score, lengths))
    weight = similarity if weighted else torch.ones_like(similarity)
    if point_mask is not None:
        similarity = similarity * point_mask.unsqueeze(1)
        weight = weight * point_mask.unsqueeze(1)
    return similarity, weight


def membership(index: Tensor, weight: Tensor, centers: int) -> Tensor:
    """What each point weighs in each center: [S, E, N] -> [S, E * M, N], zero but in the center that it joined."""
    members = weight.new_zeros(index.shape[0], index.shape[1], centers, index.shape[2])
    return members.scatter_(2, index.unsqueeze(2), weight.unsqueeze(2)).flatten(1, 2)


def aggregate(points: Tensor, members: Tensor, centers: Tensor) -> Tensor:
    """Mean of each center, which counts one, and its members, which count as much as they weigh.

    Args:
        points: [S, N, C].
        members: [S, E * M, N], see `membership`.
        centers: [S, M, C], the same for all heads.

    Returns:
        [S, E * M, C].
    """
    S, M, C = centers.shape
    total = torch.bmm(members, points).view(S, -1, M, C) + centers.unsqueeze(1)
    return total.view(S, -1, C) / (1 + members.sum(-1, keepdim=True))


def dispatch(values: Tensor, members: Tensor, bias: Tensor) -> Tensor:
    """Each point receives the sum over heads of the value of the center that it joined, times its weight there.

    Args:
        values: [S, E * M, C].
        members: [S, E * M, N], see `membership`.
        bias: Added to every point, [C].

    Returns:
        [S, N, C].
    """
    return torch.bmm(members.transpose(1, 2), values).add_(bias)


def center_values(means: Tensor, v_weight: Tensor, v_bias: Tensor, proj_weight: Tensor) -> Tensor:
    """What each center gives to its members: each head's value and its share of the projection of a mean of points.

    Args:
        means: [S, E * M, C].
        v_weight: [E, C, D].
        v_bias: [E, 1, D].
        proj_weight: [E, D, C'].

    Returns:
        [S, E * M, C'].
    """
    S, EM, C = means.shape
    E = v_weight.shape[0]
    means = means.view(S, E, EM // E, C).transpose(0, 1).reshape(E, -1, C)
    values = torch.bmm(torch.baddbmm(v_bias, means, v_weight), proj_weight)
    return values.view(E, S, EM // E, -1).transpose(0, 1).reshape(S, EM, -1)


def cluster(
    points: Tensor,
    lengths: Tensor,
    centers: Tensor,
    query: Tensor,
    offset: Tensor,
    beta: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    weighted: bool = True,
    point_mask: Tensor | None = None,
    center_mask: Tensor | None = None,
) -> Tensor:
    """Group points around centers and give every point what its groups hold (Context Cluster, section 3.2).

    ``s = sigmoid(beta + alpha * cos)``; each point joins its most similar center; a center becomes the mean of its own
    value and its members' values; each member receives its center, weighted by s; heads meet in the projection.

    Args:
        points: [S, N, C].
        lengths: Norms of the points' features in each head, [S, E, N].
        centers: [S, M, C].
        query, offset: [S, E, M, C] and [S, E, M]: probes of alpha times the unit centers.
        beta: Offset of the scaled cosine, one element.
        v_weight, v_bias, proj_weight: See `center_values`.
        proj_bias: [C'].
        weighted: Members count as much as their similarity (Context Cluster); if false each counts one (FEC).
        point_mask: [S, N], true for points that count.
        center_mask: [S, M], true for centers that count.

    Returns:
        [S, N, C'].
    """
    index, score = assign(points, query, offset, center_mask)
    similarity, weight = similarities(score, lengths, beta, weighted, point_mask)
    senders = membership(index, similarity.to(points.dtype), centers.shape[1])
    members = senders if weighted else membership(index, weight.to(points.dtype), centers.shape[1])
    values = center_values(aggregate(points, members, centers), v_weight, v_bias, proj_weight)
    return dispatch(values, senders, proj_bias)


def nearest_center(
    points: Tensor,
    query: Tensor,
    offset: Tensor,
    center_mask: Tensor | None = None,
    block: tuple[int, int] = (512, 512),
) -> Tensor:
    """The index of `assign` for one head and any number of centers.

    The values [M, N] are computed a block at a time, so memory grows with the number of points alone. No gradient
    flows: an index has none.

    Args:
        points: [S, N, C].
        query: [S, M, C].
        offset: [S, M, 1].
        center_mask: [S, M], true for centers that may be chosen.
        block: Centers and points of each set whose values exist at a time.

    Returns:
        int64 [S, N], values 0 .. M - 1.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102
        if torch.compiler.is_exporting():  # a graph for any size has no loop over it
            return first_argmax(torch.baddbmm(offset, query, points.transpose(1, 2)), center_mask)[1]
    joined = []
    for some in points.transpose(1, 2).split(block[1], dim=2):
        largest, index = torch.full_like(some[:, 0], -float('inf')), torch.zeros_like(some[:, 0], dtype=torch.int64)
        for start in range(0, query.shape[1], block[0]):
            stop = start + block[0]
            value = torch.baddbmm(offset[:, start:stop], query[:, start:stop], some)
            found, where = first_argmax(value, center_mask if center_mask is None else center_mask[:, start:stop])
            index = torch.where(found > largest, where + start, index)
            largest = torch.maximum(found, largest)
        joined.append(index)
    return torch.cat(joined, dim=1)


def group_mean(points: Tensor, centers: Tensor, index: Tensor, point_mask: Tensor | None = None) -> Tensor:
    """Mean of each center and the points that joined it, all counting one (FEC, cluster pooling).

    Args:
        points: [S, N, C].
        centers: [S, M, C].
        index: Center that each point joined, int64 [S, N].
        point_mask: [S, N], true for points that count.

    Returns:
        [S, M, C].
    """
    S, M, C = centers.shape
    members = torch.ones_like(points[..., :1])
    if point_mask is not None:
        members = members * point_mask.unsqueeze(-1)
        points = points * members
    rows = (index + M * torch.arange(S, device=index.device).unsqueeze(1)).flatten()
    total = centers.reshape(S * M, C).index_add(0, rows, points.reshape(-1, C).to(centers.dtype))
    count = torch.ones_like(total[:, :1]).index_add(0, rows, members.reshape(-1, 1).to(centers.dtype))
    return (total / count).reshape(S, M, C)
