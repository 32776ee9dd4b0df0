"""Faster versions of the functions of `clustering`, and the choice among them.

The environment variable ``CLUSTER_ZOO_KERNELS`` selects the version:

- ``auto``, the default: on a GPU those of `gpu` if Triton is installed and `self_check` trusts them with the device and
  the dtype, on a CPU those of `cpu`;
- ``plain``: the functions of `clustering` themselves;
- ``triton``: those of `gpu` on any device. On a CPU this needs Triton's interpreter, ``TRITON_INTERPRET=1``.

float64, torch.export, tracing and TorchScript always use the plain functions.
"""

import os
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import clustering
from ..clustering import HeadWeights, PointSets
from . import cpu
from .self_check import is_trusted

__all__ = ['cluster', 'feature_norms', 'group_mean', 'nearest_center', 'products']

_HAS_TRITON = find_spec('triton') is not None


def _gpu() -> ModuleType:
    from . import gpu  # imported here because it imports Triton, which is slow and may not be installed

    return gpu


def _chosen(x: Tensor) -> str:
    """'plain', 'cpu' or 'gpu'."""
    choice = os.environ.get('CLUSTER_ZOO_KERNELS', 'auto')
    if choice not in ('auto', 'plain', 'triton'):
        raise ValueError(f'CLUSTER_ZOO_KERNELS must be auto, plain or triton, got {choice!r}.')
    if choice == 'plain' or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return 'plain'
    narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if narrow and (choice == 'triton' or (x.device.type == 'cuda' and _HAS_TRITON and is_trusted(x.device, x.dtype))):
        return 'gpu'
    return 'cpu' if x.device.type == 'cpu' and not torch.compiler.is_compiling() else 'plain'


# TorchScript skips a branch on `is_scripting` only if it has no other condition.


def feature_norms(points: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """See `clustering.feature_norms`."""
    if not torch.jit.is_scripting():
        chosen = _chosen(points)
        if chosen == 'gpu':
            return _gpu().feature_norms(points, weight, bias, heads)
        if chosen == 'cpu':
            return cpu.feature_norms(points, weight, bias, heads)
    return clustering.feature_norms(points, weight, bias, heads)


def products(points: Tensor, others: Tensor) -> Tensor:
    """Scalar products of points [N, D] and others [M, D], without gradients: [N, M]."""
    return cpu.products(points, others) if _chosen(points) == 'cpu' else F.linear(points, others)


def cluster(
    sets: PointSets,
    query: Tensor,
    offset: Tensor,
    norms: Tensor,
    weights: HeadWeights,
    weighted: bool = True,
) -> Tensor:
    """See `clustering.cluster`."""
    if not torch.jit.is_scripting():  # noqa: SIM102
        if _chosen(sets.points) == 'gpu':
            return _gpu().cluster(sets, query, offset, norms, weights, weighted)
    return clustering.cluster(sets, query, offset, norms, weights, weighted)


def group_mean(points: Tensor, centers: Tensor, index: Tensor, point_mask: Tensor | None = None) -> Tensor:
    """See `clustering.group_mean`."""
    if not torch.jit.is_scripting():  # noqa: SIM102
        if _chosen(points) == 'gpu':
            return _gpu().group_mean(points, centers, index, point_mask)
    return clustering.group_mean(points, centers, index, point_mask)


def nearest_center(points: Tensor, query: Tensor, offset: Tensor, center_mask: Tensor | None = None) -> Tensor:
    """See `clustering.nearest_center`."""
    if not torch.jit.is_scripting():
        chosen = _chosen(points)
        if chosen == 'gpu':
            return _gpu().nearest_center(points, query, offset, center_mask)
        if chosen == 'cpu':
            return cpu.nearest_center(points, query, offset, center_mask)
    return clustering.nearest_center(points, query, offset, center_mask)
