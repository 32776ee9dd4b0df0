"""What plain PyTorch does faster on a CPU in another way."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import clustering


def head_lengths(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """See `clustering.head_lengths`."""
    if torch.is_autocast_enabled('cpu'):
        dtype = torch.get_autocast_dtype('cpu')
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return HeadLengths.apply(x, weight, bias, heads)


class HeadLengths(torch.autograd.Function):
    """Norms of features that are computed again in the backward pass instead of being kept.

    They are up to three times as wide as the points, and on a CPU a fresh piece of memory of that size costs more than
    the convolution that fills it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
        lengths = clustering.head_lengths(x, weight, bias, heads)
        ctx.save_for_backward(x, weight, bias, lengths)
        return lengths

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient shall have a gradient
            return *_plain_gradients(ctx, gradient), None
        f = F.conv2d(x, weight, bias)
        scale = (gradient / lengths).to(f.dtype)
        f.unflatten(1, (lengths.shape[1], -1)).mul_(scale.unsqueeze(2))  # d|f| = f / |f|
        gradients = torch.ops.aten.convolution_backward(
            f, x, weight, [len(bias)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, ctx.needs_input_grad[:3]
        )
        return *gradients, None


def _plain_gradients(ctx, gradient: Tensor) -> list[Tensor | None]:
    """The same by autograd, through which gradients flow."""
    x, weight, bias, lengths = ctx.saved_tensors
    again = clustering.head_lengths(x, weight, bias, lengths.shape[1])
    wanted = [value for value, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
    gradients = iter(torch.autograd.grad(again, wanted, gradient, create_graph=True))
    return [next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]]
