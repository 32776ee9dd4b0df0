"""Layers of timm, and the residual connection, with fewer passes over channels_last maps on a GPU.

PyTorch's kernels are replaced where they copy such maps, or read and write them more often than needed:

- CUDA's group normalization works on NCHW: it copies the map, and the next convolution copies its output. With one
  group, the statistics do not depend on the order of the elements: a reduction and a scaling are enough.
- A 1x1 convolution adds its bias in a second pass, which a linear layer does not need.
- Autocast casts all operands of ``addcmul`` to float32 before it, although the kernel reads any dtype.

On other devices, in other memory formats, in a compiler and in TorchScript, the layers are those of timm.
"""

import torch
import torch.nn.functional as F
from timm.layers import GroupNorm1, Mlp
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor

from .cluster_mixer import is_modified
from .clustering import autocast_dtype

__all__ = ['GroupNorm', 'PointMlp', 'add_scaled']


def _is_applicable(x: Tensor) -> bool:
    if x.device.type != 'cuda' or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.dtype == torch.float64:
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


@register_notrace_module
class GroupNorm(GroupNorm1):
    """timm's ``GroupNorm1``. For channels_last maps on a GPU, the output has autocast's dtype instead of float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        if not torch.jit.is_scripting():  # TorchScript has no super()
            return group_norm(x, self.weight, self.bias, self.eps) if _is_applicable(x) else super().forward(x)
        return F.group_norm(x, 1, self.weight, self.bias, self.eps)


@register_notrace_module
class PointMlp(Mlp):
    """timm's ``Mlp`` with 1x1 convolutions."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__(dim, hidden_dim, use_conv=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript skips this branch only if it has no other condition
            if _is_applicable(x) and not is_modified(self.fc1) and not is_modified(self.fc2):
                x = self.act(F.linear(x.permute(0, 2, 3, 1), self.fc1.weight.flatten(1), self.fc1.bias))
                x = F.linear(self.norm(self.drop1(x)), self.fc2.weight.flatten(1), self.fc2.bias)
                return self.drop2(x).permute(0, 3, 1, 2)
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


@register_notrace_function
def add_scaled(x: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
    """``x + gamma * branch`` for maps [B, C, H, W] and gamma [C], in the wider dtype of the three."""
    if not torch.jit.is_scripting():  # noqa: SIM102
        if _is_applicable(x):
            return _AddScaled.apply(x, branch, gamma)
    return torch.addcmul(x, branch, gamma.view(-1, 1, 1))


@register_notrace_function
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``F.group_norm(x, 1, weight, bias, eps)`` in autocast's dtype, for maps [B, C, H, W] in any memory format."""
    return _GroupNorm.apply(x, weight, bias, eps)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x, dtype=autocast_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            var, mean = torch.var_mean(x.float(), (1, 2, 3), correction=0, keepdim=True)
            rstd = (var + eps).rsqrt_()
            scale = rstd * weight.view(-1, 1, 1)
            shift = torch.addcmul(bias.view(-1, 1, 1), mean, scale, value=-1)
            torch.addcmul(shift, x, scale, out=out)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
            out = F.group_norm(x, 1, weight.to(x.dtype), bias.to(x.dtype), ctx.eps)
            return *torch.autograd.grad(out, (x, weight, bias), gradient.to(out.dtype), create_graph=True), None
        n, weight = x[0].numel(), weight.view(-1, 1, 1)
        d_bias = gradient.sum((2, 3), keepdim=True, dtype=torch.float32)  # [B, C, 1, 1] until the end
        product = torch.mul(gradient, x, out=torch.empty_like(gradient))
        d_weight = torch.addcmul(product.sum((2, 3), keepdim=True, dtype=torch.float32), mean, d_bias, value=-1) * rstd
        scale = rstd * weight
        factor = (d_weight * scale).sum(1, keepdim=True) * (-rstd / n)
        constant = torch.addcmul((d_bias * scale).sum(1, keepdim=True) / -n, mean, factor, value=-1)
        d_x = torch.addcmul(constant, x, factor)
        d_x = torch.addcmul(d_x, gradient, scale, out=d_x if d_x.dtype == x.dtype else torch.empty_like(x))
        return d_x, d_weight.sum((0, 2, 3)), d_bias.sum((0, 2, 3)), None


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(branch, gamma)
        with torch.autocast(x.device.type, enabled=False):
            return torch.addcmul(x, branch, gamma.view(-1, 1, 1))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        branch, gamma = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradient, gradient * gamma.view(-1, 1, 1), (gradient * branch).sum((0, 2, 3))
        d_branch = torch.mul(gradient, gamma.view(-1, 1, 1), out=torch.empty_like(branch))
        product = torch.mul(gradient, branch, out=torch.empty_like(branch))
        return gradient, d_branch, product.sum((0, 2, 3), dtype=torch.float32)
