"""Matrix products that decide assignments. They are exact where PyTorch may be told to round.

TF32 keeps 10 bits of a float32 factor, and a product in half precision is rounded to it. Either changes which center is
nearest to some points. The functions here multiply float32 in IEEE float32 whatever
``torch.backends.cuda.matmul.fp32_precision`` is. Their gradients are usual products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['ieee_bmm', 'ieee_linear']


def ieee_bmm(a: Tensor, b: Tensor, wide: bool = False) -> Tensor:
    """``torch.bmm(a, b)`` of factors of one dtype, without TF32 and without autocast.

    Args:
        a: [B, N, K].
        b: [B, K, M].
        wide: Sum float16 and bfloat16 in float32, and return float32.

    Returns:
        [B, N, M].
    """
    half = a.dtype == torch.float16 or a.dtype == torch.bfloat16
    if not torch.jit.is_scripting():
        plain = a.device.type != 'cuda' or torch.compiler.is_exporting() or torch.jit.is_tracing()
        if not plain and (wide if half else a.dtype == torch.float32):
            return _bmm(a, b)
        if a.device.type != 'meta' and torch.is_autocast_enabled(a.device.type):
            with torch.autocast(a.device.type, enabled=False):
                return torch.bmm(a.float(), b.float()) if half and wide else torch.bmm(a, b)
    return torch.bmm(a.float(), b.float()) if half and wide else torch.bmm(a, b)


def ieee_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear(x, weight, bias)`` of x [S, N, C], float32 as in `ieee_bmm`."""
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript skips this branch only if it has no other condition
        if x.device.type == 'cuda' and x.dtype == torch.float32:
            return (
                ieee_bmm(x.flatten(0, 1).unsqueeze(0), weight.t().unsqueeze(0)).view(*x.shape[:2], bias.shape[0]) + bias
            )
    return F.linear(x, weight, bias)


@torch.library.custom_op('cluster_zoo::bmm', mutates_args=())
def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """`ieee_bmm` to float32 on CUDA, as one operation, so that a compiler does not see that the switch changes."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = 'ieee'
        with torch.autocast(a.device.type, enabled=False):
            return torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)
    finally:
        switch.fp32_precision = before


@_bmm.register_fake
def _(a, b):
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=torch.float32)


def _save_factors(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _bmm_gradients(ctx, gradient):
    a, b = ctx.saved_tensors
    gradient = gradient.to(a.dtype)
    d_a = torch.bmm(gradient, b.transpose(1, 2)) if ctx.needs_input_grad[0] else None
    return d_a, torch.bmm(a.transpose(1, 2), gradient) if ctx.needs_input_grad[1] else None


_bmm.register_autograd(_bmm_gradients, setup_context=_save_factors)
