"""Faster versions of the functions of `clustering`, and where they are chosen.

The environment variable ``CLUSTER_ZOO_KERNELS`` set to ``plain`` forces the functions of `clustering` themselves.
"""

import os

import torch
from torch import Tensor

from .. import clustering
from . import cpu

__all__ = ['cluster', 'head_lengths']


def _chosen(x: Tensor) -> str:
    if os.environ.get('CLUSTER_ZOO_KERNELS') == 'plain' or torch.compiler.is_compiling():
        return 'plain'
    return x.device.type


def head_lengths(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """See `clustering.head_lengths`."""
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out this branch, but not half a condition
        if _chosen(x) == 'cpu':
            return cpu.head_lengths(x, weight, bias, heads)
    return clustering.head_lengths(x, weight, bias, heads)


cluster = clustering.cluster
