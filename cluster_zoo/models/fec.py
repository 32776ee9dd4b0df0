"""FEC: Context Cluster in which clustering also reduces the points between stages.

Paper: 'Neural Clustering based Visual Representation Learning', CVPR 2024, https://arxiv.org/abs/2403.17409

Two differences from `context_cluster`: every member of a cluster counts one in its center, and cluster pooling stands
between the stages.
"""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import GroupNorm1
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor

from ..layers.clustering import group_mean, normalize, project_query
from ..layers.grids import divides, merge, partition
from ..layers.grids import point_mask as grid_mask
from ..layers.kernels import nearest_center
from ..weights import conversion
from .builder import build_model
from .context_cluster import VARIANTS as CONTEXT_CLUSTER_VARIANTS
from .context_cluster import ContextCluster, cfg, one_each

__all__ = ['FEC', 'ClusterPool']  # register_model adds the entry points


@register_notrace_module  # pads by the size of its input, which a symbolic trace cannot follow
class ClusterPool(nn.Module):
    """Half the points per axis: each new point gathers the points that look most like it (section 3.2).

    The new points start as the mean of 2 x 2 points; every point joins the one of highest cosine similarity, wherever
    in the region it lies; the mean of the members' values is added to a strided convolution.

    Args:
        in_chans: Channels C of the points.
        out_chans: Channels C' of the new points.
        regions: r, regions per axis that are clustered on their own.
    """

    def __init__(self, in_chans: int, out_chans: int, regions: int = 1, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.regions = regions
        self.skip = nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, **dd)
        self.f = nn.Conv2d(in_chans, out_chans, 1, **dd)
        self.v = nn.Conv2d(in_chans, out_chans, 1, **dd)
        self.norm = GroupNorm1(out_chans, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ceil(H / 2), ceil(W / 2)]"""
        size, r = (x.shape[-2], x.shape[-1]), self.regions
        half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        center_x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        # Every region of every image is a set of its own
        points, centers = partition(x, r, 2), partition(center_x, r)
        point_mask: Tensor | None = None
        center_mask: Tensor | None = None
        if not divides(size, 2 * r):
            point_mask = grid_mask(size, r, 2, x).repeat(x.shape[0], 1)
            center_mask = grid_mask(half, r, 1, x).repeat(x.shape[0], 1)
        bias = self.f.bias
        assert bias is not None  # for TorchScript, where any convolution may lack it
        with torch.no_grad():
            center_f = normalize(partition(self.f(center_x), r)).unsqueeze(2)  # one head
            query, offset = project_query(center_f, self.f.weight.flatten(1).unsqueeze(0), bias.unsqueeze(0))
            index = nearest_center(points, query.squeeze(1), offset.transpose(1, 2), center_mask)
        out = self.v(merge(group_mean(points, centers, index, point_mask), r, half))
        out = self.skip(x) + self.norm(out)
        if torch.is_grad_enabled():
            # Small changes of f leave every assignment as it is: its gradient is zero, not missing. Saying so keeps
            # DistributedDataParallel and gradient checks from treating its parameters as unused.
            out = out + 0 * self.f(x[:1, :, :1, :1]).sum()
        return out


class FEC(ContextCluster):
    """FEC, 'Neural Clustering based Visual Representation Learning', https://arxiv.org/abs/2403.17409

    Args:
        depths: Blocks of each stage.
        pool_regions: Regions per axis that cluster pooling treats on their own, one for all stages or one between each.
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
        """The features of cluster pooling: no gradient reaches them, and they stay as they are in the authors' code."""
        return {'stages.*.downsample.f.weight'}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint under this package's names; one of ours as it is."""
    return conversion.context_cluster(state_dict)


def _create_fec(variant: str, pretrained: bool = False, **kwargs: Any) -> FEC:
    out_indices = kwargs.pop('out_indices', (0, 1, 2, 3))
    return build_model(
        FEC,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, flatten_sequential=True),
        variant_args=VARIANTS[variant],
        **kwargs,
    )


# Sizes of Context Cluster, one set of points per image, more centers in the early stages.
VARIANTS: dict[str, dict[str, Any]] = {
    name: dict(CONTEXT_CLUSTER_VARIANTS[size], proposals=(4, 4, 2, 2), regions=1)
    for name, size in (('fec_small', 'coc_tiny'), ('fec_base', 'coc_small'), ('fec_large', 'coc_medium'))
}

_PAPER = dict(
    paper_name='Neural Clustering based Visual Representation Learning',
    paper_ids='arXiv:2403.17409',
)

# One folder has all of the authors' weights.
_RELEASED = cfg(
    url='https://drive.google.com/drive/folders/1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A',
    origin_url='https://github.com/guikunchen/FEC',
    license='apache-2.0',
    **_PAPER,
)

default_cfgs = generate_default_cfgs({f'{name}.in1k': _RELEASED for name in VARIANTS})


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
