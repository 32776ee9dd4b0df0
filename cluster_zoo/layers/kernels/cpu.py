"""CPU implementations of the clustering functions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import clustering


def feature_norms(points: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """See `clustering.feature_norms`."""
    points, weight, bias = clustering.autocast(points), clustering.autocast(weight), clustering.autocast(bias)
    if not torch.is_grad_enabled():
        return clustering.norms(_features(points, weight, bias), heads)
    return FeatureNorms.apply(points, weight, bias, heads)


def nearest_center(points: Tensor, query: Tensor, offset: Tensor, center_mask: Tensor | None = None) -> Tensor:
    """See `clustering.nearest_center`; splits a single set, because torch runs one set on one core."""
    S, N, C = points.shape
    parts = math.gcd(N, torch.get_num_threads()) if S == 1 else 1
    if parts == 1:
        return clustering.nearest_center(points, query, offset, center_mask)
    points, query, offset = points.view(parts, N // parts, C), query.expand(parts, -1, -1), offset.expand(parts, -1, -1)
    mask = center_mask if center_mask is None else center_mask.expand(parts, -1)
    return clustering.nearest_center(points, query, offset, mask).view(S, N)


def products(points: Tensor, others: Tensor) -> Tensor:
    """See `kernels.products`. In float32 a 1x1 convolution of 16 images is twice as fast as a linear layer."""
    N, D = points.shape
    if points.dtype != torch.float32 or N == 0 or N % 16:
        return F.linear(points, others)
    images = points.view(16, N // 16, 1, D).permute(0, 3, 1, 2)  # channels_last, not copied
    return F.conv2d(images, others[:, :, None, None]).permute(0, 2, 3, 1).reshape(N, -1)


class FeatureNorms(torch.autograd.Function):
    """Norms of features. The backward pass computes the features again instead of storing them.

    They are up to three times as wide as the points, and the convolution that computes them is cheap.
    """

    @staticmethod
    def forward(ctx, points: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
        norms = clustering.norms(_features(points, weight, bias), heads)
        ctx.save_for_backward(points, weight, bias, norms)
        return norms

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        points, weight, bias, norms = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
            return *_differentiable_gradients(ctx, gradient), None
        f = _features(points, weight, bias)
        scale = (gradient / norms).to(f.dtype).transpose(1, 2)
        f.unflatten(2, (scale.shape[2], -1)).mul_(scale.unsqueeze(-1))  # d|f| = f / |f|
        d_points, d_weight, d_bias = torch.ops.aten.convolution_backward(
            _as_map(f),
            _as_map(points),
            weight[:, :, None, None],
            bias_sizes=[len(bias)],
            stride=[1, 1],
            padding=[0, 0],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=ctx.needs_input_grad[:3],
        )
        d_points = None if d_points is None else d_points.permute(0, 2, 3, 1).reshape(points.shape)
        return d_points, None if d_weight is None else d_weight.view(weight.shape), d_bias, None


def _as_map(points: Tensor) -> Tensor:
    """Points [S, N, C] as maps [S, C, N, 1] in the channels_last format, not copied."""
    return points.unsqueeze(2).permute(0, 3, 1, 2)


def _features(points: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer as a 1x1 convolution, which PyTorch runs with oneDNN."""
    f = F.conv2d(_as_map(points), weight[:, :, None, None], bias)
    return f.permute(0, 2, 3, 1).reshape(points.shape[0], points.shape[1], len(bias))


def _differentiable_gradients(ctx, gradient: Tensor) -> list[Tensor | None]:
    points, weight, bias, norms = ctx.saved_tensors
    again = clustering.feature_norms(points, weight, bias, norms.shape[1])
    wanted = [value for value, needed in zip((points, weight, bias), ctx.needs_input_grad) if needed]
    gradients = iter(torch.autograd.grad(again, wanted, gradient, create_graph=True))
    return [next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]]
