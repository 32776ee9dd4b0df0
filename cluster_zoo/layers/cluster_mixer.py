"""The cluster mixer: the token mixer of Context Cluster and FEC.

Paper: 'Image as Set of Points', ICLR 2023, https://arxiv.org/abs/2303.01494, section 3.2
"""

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from .clustering import (
    HeadWeights,
    PointSets,
    assign,
    assign_features,
    autocast,
    cluster_features,
    normalize,
    project_query,
)
from .grids import mean_centers, merge, partition
from .kernels import cluster, feature_norms
from .products import ieee_linear


def is_modified(conv: nn.Module) -> bool:
    """Whether a convolution was replaced, parametrized or hooked, so that its weights do not define its output."""
    hooks = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks
    return type(conv) is not nn.Conv2d or bool(hooks) or 'forward' in conv.__dict__


@register_notrace_module
class ClusterMixer(nn.Module):
    """Points of a region exchange features through the region's centers (section 3.2).

    ``f``, ``v`` and ``proj`` are the paper's three convolutions. The forward pass applies their weights to centers and
    norms (see `clustering`), which is faster than calling them on all points. If one of them is not exactly an
    ``nn.Conv2d`` (an adapter, a parametrized or quantized convolution) or has hooks, the forward pass calls all three.
    TorchScript does not run hooks on them.

    Args:
        dim: Channels C of the points.
        num_heads: E, number of heads. Each clusters the points separately.
        head_dim: D, channels of one head.
        proposals: g, centers per axis of a region; M = g^2.
        regions: r, regions per axis.
        weighted_mean: The weight of a member in its center is its similarity; if false it is one, as in FEC and in
            Context Cluster's weights from before June 2023.
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
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript skips this branch only if it has no other condition
            if is_modified(self.f) or is_modified(self.v) or is_modified(self.proj):
                return self._call_convolutions(x)
        E, r, C = self.num_heads, self.regions, x.shape[1]
        size = (x.shape[-2], x.shape[-1])
        v_bias, proj_bias = self.v.bias, self.proj.bias
        assert v_bias is not None and proj_bias is not None  # for TorchScript
        points = partition(autocast(x), r)  # cast once instead of in each product
        f_weight, f_bias = self.f_weights()
        norms = feature_norms(points, f_weight, f_bias, E)
        centers, point_mask, center_mask = mean_centers(points, size, r, self.proposals)
        query, offset = self.project_queries(centers, f_weight, f_bias)
        weights = HeadWeights(
            self.sim_beta,
            self.v.weight.view(E, -1, C).transpose(1, 2),
            v_bias.view(E, 1, -1),
            self.proj.weight.view(C, E, -1).permute(1, 2, 0),
            proj_bias,
        )
        sets = PointSets(points, centers, point_mask, center_mask)
        return merge(cluster(sets, query, offset, norms, weights, self.weighted_mean), r, size)

    @torch.jit.unused
    def _call_convolutions(self, x: Tensor) -> Tensor:
        """`forward` by calls of ``f``, ``v`` and ``proj``."""
        f, v = self.head_sets(self.f(x)), self.head_sets(self.v(x))
        out = cluster_features(f, v, self.sim_alpha, self.sim_beta, self.weighted_mean)
        out = merge(out, self.regions, x.shape[-2:])
        return self.proj(out.reshape(x.shape[0], self.num_heads * out.shape[1], *x.shape[-2:]))

    @torch.jit.unused
    def head_sets(self, features: Tensor) -> PointSets:
        """[B, E * D, H, W] -> sets of D channels, one for each region of each head of each image."""
        features = features.contiguous(memory_format=torch.channels_last)  # torch.compile mispredicts its strides
        H, W = features.shape[-2:]
        points = partition(features.unflatten(1, (self.num_heads, -1)).flatten(0, 1), self.regions)
        return PointSets(points, *mean_centers(points, (H, W), self.regions, self.proposals))

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """Index of the center that each point joins: [B, C, H, W] -> int64 [B * r * r, E, N], values 0 .. M - 1."""
        r = self.regions
        if is_modified(self.f):
            index, _ = assign_features(self.head_sets(self.f(x)), self.sim_alpha)
            return index.view(x.shape[0], self.num_heads, r * r, index.shape[-1]).transpose(1, 2).flatten(0, 1)
        points = partition(autocast(x), r)
        centers, _, center_mask = mean_centers(points, (x.shape[-2], x.shape[-1]), r, self.proposals)
        return assign(points, *self.project_queries(centers, *self.f_weights()), center_mask)[0]

    def f_weights(self) -> tuple[Tensor, Tensor]:
        """Weight [E * D, C] and bias [E * D] of ``f``, in autocast's dtype."""
        bias = self.f.bias
        assert bias is not None  # for TorchScript
        return autocast(self.f.weight).flatten(1), autocast(bias)

    def project_queries(self, centers: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Centers [S, M, C] and weights of ``f`` -> query [S, E, M, C] and offset [S, E, M].

        For a point x, ``query . x + offset`` is alpha times the cosine similarity to the center, times the norm of
        f(x). The norm is the same for all centers, so that the center of highest similarity has the highest value.
        """
        E, C = self.num_heads, centers.shape[2]
        f = ieee_linear(centers, weight, bias).unflatten(2, (E, bias.shape[0] // E))
        return project_query(normalize(f, self.sim_alpha), weight.view(E, -1, C), bias.view(E, -1))
