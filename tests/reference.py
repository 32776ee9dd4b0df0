"""The papers' formulas as loops over points and centers, independent of the package."""

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a / max(a.norm().item(), 1e-12)) @ (b / max(b.norm().item(), 1e-12))


def context_cluster_set(f: Tensor, v: Tensor, centers, alpha: float, beta: float, weighted: bool) -> Tensor:
    """One set of points.

    Args:
        f, v: [N, D], features and values of the points.
        centers: For each center the list of the points whose mean is its initial value.

    Returns:
        [N, D], the value that each point receives.
    """
    center_f = [f[members].mean(0) for members in centers]
    center_v = [v[members].mean(0) for members in centers]
    joined, score = [], []
    for n in range(len(f)):
        s = [1 / (1 + math.exp(-(beta + alpha * cosine(c, f[n]).item()))) for c in center_f]
        joined.append(max(range(len(s)), key=lambda m: (s[m], -m)))
        score.append(s[joined[-1]])
    out = torch.zeros_like(v)
    for m, total in enumerate(center_v):
        members = [n for n in range(len(f)) if joined[n] == m]
        count = 1.0
        for n in members:
            weight = score[n] if weighted else 1.0
            total, count = total + weight * v[n], count + weight
        for n in members:
            out[n] = score[n] * total / count
    return out


def bins(n: int, g: int) -> list[range]:
    """Positions, out of n, of each of g bins of adaptive pooling."""
    return [range(math.floor(i * n / g), math.ceil((i + 1) * n / g)) for i in range(g)]


def cluster_map(f: Tensor, v: Tensor, g: int, r: int, alpha: float, beta: float, weighted: bool) -> Tensor:
    """A cluster mixer without its convolutions, one image and one head: [D, H, W] -> [D, H, W].

    If the regions do not divide the grid, they have ceil(H / r) x ceil(W / r) points, the last ones fewer or none.
    Centers without points do not exist.
    """
    _, H, W = f.shape
    h, w = math.ceil(H / r), math.ceil(W / r)
    out = torch.zeros_like(v)
    for top in range(0, H, h):
        for left in range(0, W, w):
            points = [(i, j) for i in range(top, min(top + h, H)) for j in range(left, min(left + w, W))]
            index = {point: n for n, point in enumerate(points)}
            centers = [
                [index[top + i, left + j] for i in rows for j in columns if (top + i, left + j) in index]
                for rows in bins(h, g)
                for columns in bins(w, g)
            ]
            rows, columns = zip(*points)
            result = context_cluster_set(
                f[:, rows, columns].T, v[:, rows, columns].T, [c for c in centers if c], alpha, beta, weighted
            )
            for (i, j), n in index.items():
                out[:, i, j] = result[n]
    return out


def cluster_pool(f: Tensor, v: Tensor, r: int) -> Tensor:
    """FEC's pooling without its convolutions and norm, one image: [D, H, W] -> [D, ceil(H / 2), ceil(W / 2)]."""
    _, H, W = f.shape
    h, w = math.ceil(H / (2 * r)) * 2, math.ceil(W / (2 * r)) * 2
    out = v.new_zeros(len(v), math.ceil(H / 2), math.ceil(W / 2))
    for top in range(0, H, h):
        for left in range(0, W, w):
            bottom, right = min(top + h, H), min(left + w, W)
            cells = [(i, j) for i in range(top, bottom, 2) for j in range(left, right, 2)]
            corners = [(slice(None), slice(i, min(i + 2, bottom)), slice(j, min(j + 2, right))) for i, j in cells]
            center_f = [f[corner].mean((1, 2)) for corner in corners]
            total = [v[corner].mean((1, 2)) for corner in corners]
            count = [1] * len(cells)
            for i in range(top, bottom):
                for j in range(left, right):
                    s = [cosine(c, f[:, i, j]).item() for c in center_f]
                    m = max(range(len(s)), key=lambda m: (s[m], -m))
                    total[m], count[m] = total[m] + v[:, i, j], count[m] + 1
            for (i, j), t, c in zip(cells, total, count):
                out[:, i // 2, j // 2] = t / c
    return out
