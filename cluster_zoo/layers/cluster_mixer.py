"""The cluster mixer: what Context Cluster and FEC have instead of attention or a convolution.

Paper: 'Image as Set of Points', ICLR 2023, https://arxiv.org/abs/2303.01494, section 3.2
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from .clustering import autocast, normalize, project_query
from .grids import mean_centers, merge, partition
from .kernels import cluster, feature_norms


@register_notrace_module
class ClusterMixer(nn.Module):
    """Points of a region exchange what they hold through the region's centers (section 3.2).

    ``f``, ``v`` and ``proj`` hold the weights of the paper's three convolutions. Their weights act on centers and norms
    (see `clustering`) and the modules are never called: hooks on them do not run, and `forward` refuses with a
    `TypeError` what is not a convolution, such as an adapter that wraps one.

    Args:
        dim: Channels C of the points.
        num_heads: E, each of which clusters on its own.
        head_dim: D, channels of one head.
        proposals: g, centers per axis of a region; M = g^2.
        regions: r, regions per axis.
        weighted_mean: Members count in their center as much as they are similar; if false each counts one, as in FEC
            and in Context Cluster's weights from before June 2023.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        head_dim: int = 24,
        proposals: int = 2,
        regions: int = 1,
        weighted_mean: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.proposals = proposals
        self.regions = regions
        self.weighted_mean = weighted_mean
        self.f = nn.Conv2d(dim, num_heads * head_dim, 1, **dd)
        self.v = nn.Conv2d(dim, num_heads * head_dim, 1, **dd)
        self.proj = nn.Conv2d(num_heads * head_dim, dim, 1, **dd)
        self.sim_alpha = nn.Parameter(torch.ones(1, **dd))
        self.sim_beta = nn.Parameter(torch.zeros(1, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        E, r = self.num_heads, self.regions
        size = (x.shape[-2], x.shape[-1])
        if not torch.jit.is_scripting():
            self._check_convolutions()
        f_bias, v_bias, proj_bias = self.f.bias, self.v.bias, self.proj.bias
        # For TorchScript, where any convolution may lack it
        assert f_bias is not None and v_bias is not None and proj_bias is not None
        points = partition(autocast(x), r)  # once instead of in each product
        lengths = feature_norms(points, self.f.weight.view(-1, x.shape[1]), f_bias, E)
        centers, point_mask, center_mask = mean_centers(points, size, r, self.proposals)
        query, offset = self.project_queries(centers)
        points = cluster(
            points,
            lengths,
            centers,
            query,
            offset,
            self.sim_beta,
            self.v.weight.view(E, -1, x.shape[1]).transpose(1, 2),
            v_bias.view(E, 1, -1),
            self.proj.weight.view(x.shape[1], E, -1).permute(1, 2, 0),
            proj_bias,
            self.weighted_mean,
            point_mask,
            center_mask,
        )
        return merge(points, r, size)

    @torch.jit.unused
    def _check_convolutions(self) -> None:
        for name in ('f', 'v', 'proj'):
            module = getattr(self, name)
            if not isinstance(module, nn.Conv2d):
                raise TypeError(
                    f"a cluster mixer's {name} is a {type(module).__name__}, which would be ignored: only the weights "
                    'of a Conv2d are used. Merge an adapter into the weights, or adapt other layers, such as mlp.fc1.'
                )

    def project_queries(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Centers [S, M, C] -> query [S, E, M, C] and offset [S, E, M].

        For a point x, ``query . x + offset`` is alpha times the cosine to the center, times the length of f(x). The
        length is the same for all centers, so that the highest belongs to the center of highest similarity.
        """
        E, bias = self.num_heads, self.f.bias
        assert bias is not None  # for TorchScript
        S, M, C = centers.shape
        f = F.linear(centers, self.f.weight.view(-1, C), bias).view(S, M, E, -1)
        return project_query(self.sim_alpha * normalize(f), self.f.weight.view(E, -1, C), bias.view(E, -1))
