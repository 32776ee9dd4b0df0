"""Triton kernels of the clustering operations, on tiles of points and tiles of centers.

A tile of centers contains HEADS heads with WIDTH centers each, side by side, so that a few centers in several heads
fill a matrix product. The assignment matrix of a tile has at most one entry per point and head. It is built in
registers from the index of each point's center.

All tensors are contiguous. Shapes are named as in `clustering`; s, n, m, c are indices along S, N, M, C. A program
first moves its pointers to its set s, in 64-bit arithmetic; 32 bits are enough within a set. Products are computed in
the dtype FACTORS, sums in float32.
"""

import triton
import triton.language as tl


@triton.jit
def _scores(
    points_ptr, query_ptr, offset_ptr, n, first_head, first_center, N, E, M,
    C: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    FACTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``query . x + offset`` of points n in a tile of centers, float32 [BLOCK_N, HEADS, WIDTH]; 0 beyond E, M."""
    column = tl.arange(0, HEADS * WIDTH)
    head, m = first_head + column // WIDTH, first_center + column % WIDTH
    real = (head < E) & (m < M)
    row = head * M + m
    value = tl.zeros((BLOCK_N, HEADS * WIDTH), tl.float32)
    for first_c in range(0, C, BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C)
        points = tl.load(
            points_ptr + n[:, None] * C + c[None, :],
            mask=(n < N)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        query = tl.load(
            query_ptr + row[None, :] * C + c[:, None],
            mask=real[None, :] & (c < C)[:, None],
            other=0.0,
        )
        value = tl.dot(points.to(FACTORS), query.to(FACTORS), value, input_precision=PRECISION)
    if offset_ptr is not None:
        value += tl.load(offset_ptr + row, mask=real, other=0.0).to(tl.float32)[None, :]
    return tl.reshape(value, (BLOCK_N, HEADS, WIDTH))


@triton.jit
def _members(
    index_ptr, weight_ptr, n, first_head, first_center, N, E,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Assignment matrix of points n and a tile of centers, float32 [BLOCK_N, HEADS * WIDTH]."""
    head = first_head + tl.arange(0, HEADS)
    position = head[None, :] * N + n[:, None]
    real = (head < E)[None, :] & (n < N)[:, None]
    index = tl.load(index_ptr + position, mask=real, other=-1)
    weight = tl.load(weight_ptr + position, mask=real, other=0.0)
    m = first_center + tl.arange(0, WIDTH)
    members = tl.where(index[:, :, None] == m[None, None, :], weight[:, :, None], 0.0)
    return tl.reshape(members, (BLOCK_N, HEADS * WIDTH))


@triton.jit
def assign(
    points_ptr, query_ptr, offset_ptr, center_mask_ptr, index_ptr, score_ptr, N, E, M,
    C: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    FACTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (s and block of points, block of heads): a running maximum over blocks of centers."""
    blocks = tl.cdiv(N, BLOCK_N)
    s = (tl.program_id(0) // blocks).to(tl.int64)
    points_ptr += s * N * C
    query_ptr += s * E * M * C
    offset_ptr += s * E * M
    if center_mask_ptr is not None:
        center_mask_ptr += s * M
    index_ptr += s * E * N
    score_ptr += s * E * N
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_head = tl.program_id(1) * HEADS
    highest = tl.full((BLOCK_N, HEADS), -float('inf'), tl.float32)
    index = tl.zeros((BLOCK_N, HEADS), tl.int32)
    for first_center in range(0, M, WIDTH):
        value = _scores(
            points_ptr, query_ptr, offset_ptr, n, first_head, first_center, N, E, M, C, HEADS, WIDTH, BLOCK_N,
            BLOCK_C, FACTORS, PRECISION,
        )  # fmt: skip
        value = tl.where(value == value, value, float('inf'))  # NaN is the maximum, as in torch.max
        m = first_center + tl.arange(0, WIDTH)
        allowed = m < M
        if center_mask_ptr is not None:
            allowed = allowed & (tl.load(center_mask_ptr + m, mask=m < M, other=0) != 0)
        value = tl.where(allowed[None, None, :], value, -float('inf'))
        top, at = tl.max(value, 2, return_indices=True, return_indices_tie_break_left=True)
        index = tl.where(top > highest, first_center + at, index)
        highest = tl.maximum(highest, top)
    score = tl.where(highest == float('inf'), float('nan'), highest)
    score = tl.where(highest == -float('inf'), 0.0, score)  # all centers masked: finite gradients
    head = first_head + tl.arange(0, HEADS)
    position = head[None, :] * N + n[:, None]
    real = (head < E)[None, :] & (n < N)[:, None]
    tl.store(index_ptr + position, index, mask=real)
    tl.store(score_ptr + position, score, mask=real)


@triton.jit
def select(
    points_ptr, query_ptr, offset_ptr, index_ptr, score_ptr, N, E, M,
    C: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    FACTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (s and block of points, block of heads): as `assign`, for given centers."""
    blocks = tl.cdiv(N, BLOCK_N)
    s = (tl.program_id(0) // blocks).to(tl.int64)
    points_ptr += s * N * C
    query_ptr += s * E * M * C
    if offset_ptr is not None:
        offset_ptr += s * E * M
    index_ptr += s * E * N
    score_ptr += s * E * N
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_head = tl.program_id(1) * HEADS
    head = first_head + tl.arange(0, HEADS)
    position = head[None, :] * N + n[:, None]
    real = (head < E)[None, :] & (n < N)[:, None]
    index = tl.load(index_ptr + position, mask=real, other=-1)
    score = tl.zeros((BLOCK_N, HEADS), tl.float32)
    for first_center in range(0, M, WIDTH):
        value = _scores(
            points_ptr, query_ptr, offset_ptr, n, first_head, first_center, N, E, M, C, HEADS, WIDTH, BLOCK_N,
            BLOCK_C, FACTORS, PRECISION,
        )  # fmt: skip
        m = first_center + tl.arange(0, WIDTH)
        score += tl.sum(tl.where(index[:, :, None] == m[None, None, :], value, 0.0), 2)
    tl.store(score_ptr + position, score, mask=real)


@triton.jit
def aggregate(
    points_ptr, index_ptr, weight_ptr, sums_ptr, totals_ptr, N, E, M, splits, span,
    C: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    FACTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (s and one of its spans of points, tile of centers, block of C): sums over the span."""
    part = tl.program_id(0).to(tl.int64)
    s = part // splits
    points_ptr += s * N * C
    index_ptr += s * E * N
    weight_ptr += s * E * N
    sums_ptr += part * E * M * C
    totals_ptr += part * E * M
    first_n = (tl.program_id(0) % splits) * span
    width_blocks = tl.cdiv(M, WIDTH)
    first_head = tl.program_id(1) // width_blocks * HEADS
    first_center = tl.program_id(1) % width_blocks * WIDTH
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((HEADS * WIDTH, BLOCK_C), tl.float32)
    totals = tl.zeros((HEADS * WIDTH,), tl.float32)
    for block_n in range(first_n, tl.minimum(first_n + span, N), BLOCK_N):
        n = block_n + tl.arange(0, BLOCK_N)
        points = tl.load(
            points_ptr + n[:, None] * C + c[None, :],
            mask=(n < N)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        members = _members(index_ptr, weight_ptr, n, first_head, first_center, N, E, HEADS, WIDTH, BLOCK_N)
        members = members.to(FACTORS)
        sums = tl.dot(tl.trans(members), points.to(FACTORS), sums, input_precision=PRECISION)
        totals += tl.sum(members.to(tl.float32), 0)
    column = tl.arange(0, HEADS * WIDTH)
    head, m = first_head + column // WIDTH, first_center + column % WIDTH
    real = (head < E) & (m < M)
    row = head * M + m
    tl.store(sums_ptr + row[:, None] * C + c[None, :], sums, mask=real[:, None] & (c < C)[None, :])
    if tl.program_id(2) == 0:
        tl.store(totals_ptr + row, totals, mask=real)


@triton.jit
def dispatch(
    values_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr, N, E, M,
    C: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    FACTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (s and block of points, block of C): a sum over tiles of centers."""
    blocks = tl.cdiv(N, BLOCK_N)
    s = (tl.program_id(0) // blocks).to(tl.int64)
    values_ptr += s * E * M * C
    index_ptr += s * E * N
    weight_ptr += s * E * N
    out_ptr += s * N * C
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.arange(0, HEADS * WIDTH)
    out = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    width_blocks = tl.cdiv(M, WIDTH)
    for tile in range(0, tl.cdiv(E, HEADS) * width_blocks):
        first_head = tile // width_blocks * HEADS
        first_center = tile % width_blocks * WIDTH
        head, m = first_head + column // WIDTH, first_center + column % WIDTH
        values = tl.load(
            values_ptr + (head * M + m)[:, None] * C + c[None, :],
            mask=((head < E) & (m < M))[:, None] & (c < C)[None, :],
            other=0.0,
        )
        members = _members(index_ptr, weight_ptr, n, first_head, first_center, N, E, HEADS, WIDTH, BLOCK_N)
        out = tl.dot(members.to(FACTORS), values.to(FACTORS), out, input_precision=PRECISION)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + n[:, None] * C + c[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(n < N)[:, None] & (c < C)[None, :],
    )


@triton.jit
def row_norms(rows_ptr, norms_ptr, count, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Program (block of rows)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    real = (row < count)[:, None] & (d < D)[None, :]
    rows = tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(norms_ptr + row, tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), 1e-12), mask=row < count)


@triton.jit
def row_norms_backward(
    gradient_ptr, rows_ptr, norms_ptr, out_ptr, count,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (block of rows): gradient * row / norm, 0 where the norm is clamped."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    real = (row < count)[:, None] & (d < D)[None, :]
    rows = tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + row, mask=row < count, other=0.0)
    norms = tl.load(norms_ptr + row, mask=row < count, other=1.0)
    scale = tl.where(norms > 1e-12, gradient / norms, 0.0)
    tl.store(out_ptr + row[:, None] * D + d[None, :], (scale[:, None] * rows).to(out_ptr.dtype.element_ty), mask=real)
