"""Reference implementation of Context Cluster and FEC, written as the formulas of the papers.

It sums products [.., N, M, D], uses PyTorch's default memory format, and combines or reorders nothing. It shares only
the parameters of a model with the package.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Transcription(nn.Module):
    """The network of a registered Context Cluster or FEC model, with its parameters; only for sizes that divide."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, num_classes]"""
        model = self.model
        x = stem(model.stem, x)
        for stage in model.stages:
            if hasattr(stage.downsample, 'skip'):
                x = cluster_pool(stage.downsample, x)
            elif isinstance(stage.downsample, nn.Conv2d):
                x = F.conv2d(x, stage.downsample.weight, stage.downsample.bias, stride=2, padding=1)
            for block in stage.blocks:
                x = x + _column(block.ls1.gamma) * mixer(block.token_mixer, _norm(block.norm1, x))
                x = x + _column(block.ls2.gamma) * mlp(block.mlp, _norm(block.norm2, x))
        return F.linear(_norm(model.norm, x).mean((2, 3)), model.head.fc.weight, model.head.fc.bias)


def _column(x: Tensor) -> Tensor:
    return x[:, None, None]


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, 1, norm.weight, norm.bias, 1e-5)


def _conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias)


def stem(stem: nn.Module, x: Tensor) -> Tensor:
    B, _, H, W = x.shape
    rows = (torch.arange(H, device=x.device) / (H - 1) - 0.5).view(1, 1, H, 1).expand(B, 1, H, W)
    columns = (torch.arange(W, device=x.device) / (W - 1) - 0.5).view(1, 1, 1, W).expand(B, 1, H, W)
    weight = torch.cat([stem.proj.weight, stem.coord.weight], 1)
    return F.conv2d(torch.cat([x, rows.to(x.dtype), columns.to(x.dtype)], 1), weight, stem.proj.bias, stride=4)


def mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    x = F.linear(x.permute(0, 2, 3, 1), mlp.fc1.weight.flatten(1), mlp.fc1.bias)
    return F.linear(F.gelu(x), mlp.fc2.weight.flatten(1), mlp.fc2.bias).permute(0, 3, 1, 2)


def mixer(mixer: nn.Module, x: Tensor) -> Tensor:
    E, r, g = mixer.num_heads, mixer.regions, mixer.proposals
    B, _, H, W = x.shape
    h, w = H // r, W // r

    def sets(x: Tensor) -> Tensor:  # one for each region of each head of each image, [S, D, h, w]
        x = x.reshape(B * E, -1, r, h, r, w)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(B * E * r * r, -1, h, w)

    def points(x: Tensor) -> Tensor:  # [S, D, a, b] -> [S, a * b, D]
        return x.flatten(2).transpose(1, 2)

    f, v = sets(_conv1x1(mixer.f, x)), sets(_conv1x1(mixer.v, x))
    center_f, center_v = points(F.adaptive_avg_pool2d(f, g)), points(F.adaptive_avg_pool2d(v, g))
    f, v = points(f), points(v)
    cos = F.normalize(center_f, dim=-1) @ F.normalize(f, dim=-1).transpose(1, 2)
    s = torch.sigmoid(mixer.sim_beta + mixer.sim_alpha * cos)
    joined = torch.zeros_like(s).scatter_(1, s.argmax(1, keepdim=True), 1.0)  # [S, M, N]
    a = s * joined
    weight = a if mixer.weighted_mean else joined
    center = ((weight[..., None] * v[:, None]).sum(2) + center_v) / (1 + weight.sum(2, keepdim=True))
    out = (a[..., None] * center[:, :, None]).sum(1)  # [S, N, D]
    out = out.transpose(1, 2).reshape(B, E, r, r, -1, h, w).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, -1, H, W)
    return _conv1x1(mixer.proj, out)


def cluster_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """For one region. The products [N, M, D] would not fit in memory, so the sums use indices."""
    f, v = _conv1x1(pool.f, x), _conv1x1(pool.v, x)
    B, D, H, W = v.shape
    center_f, center_v = (F.adaptive_avg_pool2d(y, (H // 2, W // 2)).flatten(2).transpose(1, 2) for y in (f, v))
    f, v = f.flatten(2).transpose(1, 2), v.flatten(2).transpose(1, 2)
    cos = F.normalize(center_f, dim=-1) @ F.normalize(f, dim=-1).transpose(1, 2)
    index = cos.argmax(1)  # [B, N]
    total = center_v.scatter_add(1, index[..., None].expand_as(v), v)
    count = torch.ones_like(center_v[..., 0]).scatter_add(1, index, torch.ones_like(v[..., 0]))
    center = (total / count[..., None]).transpose(1, 2).reshape(B, D, H // 2, W // 2)
    skip = F.conv2d(x, pool.skip.weight, pool.skip.bias, stride=2, padding=1)
    return skip + _norm(pool.norm, center)
