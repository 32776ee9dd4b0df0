"""FEC: Context Cluster with clustering between the stages.

Paper: 'Neural Clustering based Visual Representation Learning', CVPR 2024, https://arxiv.org/abs/2403.17409

Two differences from `context_cluster`: every member of a cluster has weight one in its center, and cluster pooling
replaces the strided convolutions between stages.
"""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor

from ..layers.channels_last import GroupNorm
from ..layers.cluster_mixer import is_modified
from ..layers.clustering import PointSets, autocast, normalize, project_query
from ..layers.grids import divides, merge, partition
from ..layers.grids import point_mask as grid_mask
from ..layers.kernels import group_mean, nearest_center
from ..layers.products import ieee_linear
from .builder import ASSETS
from .context_cluster import CIFAR10, ContextCluster, cfg, checkpoint_filter_fn, create, one_each
from .context_cluster import VARIANTS as CONTEXT_CLUSTER_VARIANTS

__all__ = ['FEC', 'ClusterPool', 'checkpoint_filter_fn']  # register_model adds the entry points


@register_notrace_module  # pads by the size of its input, which a symbolic trace cannot follow
class ClusterPool(nn.Module):
    """Cluster pooling: half the points per axis, each the mean of the points most similar to it (section 3.2).

    The new points start as the mean of 2 x 2 points. Every point joins the new point of highest cosine similarity in
    its region. The mean of the members' values is normalized and added to a strided convolution.

    ``f`` and ``v`` are applied to means of points, which is faster than to all points. If one of them was replaced or
    has hooks, both are called on all points, see `ClusterMixer`.

    Args:
        in_chans: Channels C of the points.
        out_chans: Channels C' of the new points.
        regions: r, regions per axis that are clustered separately.
    """

    def __init__(self, in_chans: int, out_chans: int, regions: int = 1, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.regions = regions
        self.skip = nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, **dd)
        self.f = nn.Conv2d(in_chans, out_chans, 1, **dd)
        self.v = nn.Conv2d(in_chans, out_chans, 1, **dd)
        self.norm = GroupNorm(out_chans, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ceil(H / 2), ceil(W / 2)]"""
        x = autocast(x)  # cast once instead of in each product
        half = ((x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2)
        modified = False
        if not torch.jit.is_scripting():
            modified = is_modified(self.f) or is_modified(self.v)
        if modified:
            f, sets = self.f(x), self.head_sets(self.v(x))
            index = self._nearest_features(self.head_sets(f.detach()))
        else:
            f, sets = self.f(x[:1, :, :1, :1]), self.head_sets(x)
            index = self._nearest(sets)
        means = group_mean(sets.points, sets.centers, index, sets.point_mask)
        if torch.is_grad_enabled():
            # The assignment is hard, so the gradient of f is zero. This term makes it zero instead of None, which
            # DistributedDataParallel requires.
            means = means + 0 * f[:1, :, :1, :1].sum().to(means.dtype)
        out = merge(means, self.regions, half)
        return self.skip(x) + self.norm(out if modified else self.v(out))

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """Index of the new point that each point joins: [B, C, H, W] -> int64 [B * r * r, N], see `head_sets`."""
        if is_modified(self.f) or is_modified(self.v):
            return self._nearest_features(self.head_sets(self.f(x)))
        return self._nearest(self.head_sets(x))

    def head_sets(self, x: Tensor) -> PointSets:
        """[B, C, H, W] -> one set for each region: all points [B * r * r, N, C], and the means of 2 x 2 of them."""
        size, r = (x.shape[-2], x.shape[-1]), self.regions
        point_mask: Tensor | None = None
        center_mask: Tensor | None = None
        if not divides(size, 2 * r):
            half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
            point_mask = grid_mask(size, r, 2, x).repeat(x.shape[0], 1)
            center_mask = grid_mask(half, r, 1, x).repeat(x.shape[0], 1)
        means = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return PointSets(partition(x, r, 2), partition(means, r), point_mask, center_mask)

    def _nearest(self, sets: PointSets) -> Tensor:
        bias = self.f.bias
        assert bias is not None  # for TorchScript
        with torch.no_grad():
            weight, bias = autocast(self.f.weight).flatten(1), autocast(bias)
            center_f = normalize(ieee_linear(sets.centers, weight, bias)).unsqueeze(2)  # one head
            query, offset = project_query(center_f, weight.unsqueeze(0), bias.unsqueeze(0))
            return nearest_center(sets.points, query.squeeze(1), offset.transpose(1, 2), sets.center_mask)

    @torch.jit.unused
    def _nearest_features(self, sets: PointSets) -> Tensor:
        query = normalize(sets.centers)
        return nearest_center(sets.points, query, torch.zeros_like(query[..., :1]), sets.center_mask)


class FEC(ContextCluster):
    """FEC, 'Neural Clustering based Visual Representation Learning', https://arxiv.org/abs/2403.17409

    Args:
        depths: Blocks of each stage.
        pool_regions: Regions per axis that cluster pooling clusters separately, one for all poolings or one for each.
        **kwargs: See `ContextCluster`.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 4, 5, 2),
        pool_regions: int | tuple[int, ...] = 1,
        **kwargs: Any,
    ):
        pool_regions = one_each('pool_regions', pool_regions, len(depths) - 1)
        super().__init__(
            depths=depths,
            weighted_mean=False,
            downsample_layers=[partial(ClusterPool, regions=regions) for regions in pool_regions],
            **kwargs,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Weights of ``f`` in cluster pooling: they get no gradient and stay unchanged, as in the authors' code."""
        return {'stages.*.downsample.f.weight'}


def _create_fec(variant: str, pretrained: bool, **kwargs: Any) -> FEC:
    return create(FEC, variant, VARIANTS[variant], pretrained, **kwargs)


# The sizes of Context Cluster, without regions and with more centers in the early stages
VARIANTS: dict[str, dict[str, Any]] = {
    name: dict(CONTEXT_CLUSTER_VARIANTS[size], proposals=(4, 4, 2, 2), regions=1)
    for name, size in (('fec_small', 'coc_tiny'), ('fec_base', 'coc_small'), ('fec_large', 'coc_medium'))
}

_PAPER = dict(
    paper_name='Neural Clustering based Visual Representation Learning',
    paper_ids='arXiv:2403.17409',
)

# The authors' folder at Google Drive contains all weights.
_RELEASED = cfg(
    url='https://drive.google.com/drive/folders/1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A',
    origin_url='https://github.com/guikunchen/FEC',
    license='apache-2.0',
    **_PAPER,
)

default_cfgs = generate_default_cfgs(
    {
        # Trained by this project, see `coc_tiny_plain.cifar10`
        'fec_small.cifar10': cfg(file=str(ASSETS / 'fec_small.cifar10.safetensors'), **CIFAR10, **_PAPER),
        'fec_small.in1k*': _RELEASED,
        'fec_base.in1k': _RELEASED,
        'fec_large.in1k': _RELEASED,
    }
)


@register_model
def fec_small(pretrained: bool = False, **kwargs: Any) -> FEC:
    """FEC, small: 5.73 M parameters."""
    return _create_fec('fec_small', pretrained, **kwargs)


@register_model
def fec_base(pretrained: bool = False, **kwargs: Any) -> FEC:
    """FEC, base: 15.09 M parameters."""
    return _create_fec('fec_base', pretrained, **kwargs)


@register_model
def fec_large(pretrained: bool = False, **kwargs: Any) -> FEC:
    """FEC, large: 29.72 M parameters."""
    return _create_fec('fec_large', pretrained, **kwargs)
