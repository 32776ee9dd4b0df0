"""Decoders: combine the feature maps of a backbone into one map for a classifier.

A decoder is built from the channels of the feature maps ("levels"). Its attribute ``channels`` is the number of output
channels, and ``levels`` are the indices of the maps that it reads. It maps a list of [B, C_i, H_i, W_i], finest first,
to [B, channels, h, w]. Interpolation does not align corners.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor

from cluster_zoo.layers.grids import adaptive_pool

__all__ = ['FCN', 'DeepLabV3Plus', 'SemanticFPN', 'SeparableConvNormAct', 'UPerNet', 'init_weights', 'resize']


def resize(x: Tensor, size: Sequence[int], mode: str = 'bilinear') -> Tensor:
    """[B, C, H, W] -> [B, C, *size]"""
    # A comparison of sizes would restrict an exported graph to some of them
    if not torch.compiler.is_exporting() and list(x.shape[-2:]) == list(size):
        return x
    return F.interpolate(x, size=size, mode=mode)


def init_weights(module: nn.Module) -> None:
    """Initializes convolutions: Kaiming where a ReLU follows, Xavier elsewhere; biases are zero."""
    if isinstance(module, ConvNormAct):
        nn.init.kaiming_normal_(module.conv.weight, mode='fan_out', nonlinearity='relu')
    elif isinstance(module, nn.Conv2d) and module.bias is not None:  # a convolution of ConvNormAct has no bias
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class AdaptivePool(nn.Module):
    """Adaptive average pooling to a square map, which can be exported for images of any size.

    Args:
        bins: Output size.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, bins, bins]"""
        return adaptive_pool(x, self.bins)


class SeparableConvNormAct(nn.Module):
    """Depthwise 3 x 3 and pointwise convolution, each followed by batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.depthwise_conv = ConvNormAct(in_channels, in_channels, 3, dilation=dilation, groups=in_channels, **dd)
        self.pointwise_conv = ConvNormAct(in_channels, out_channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]"""
        return self.pointwise_conv(self.depthwise_conv(x))


class SemanticFPN(nn.Module):
    """Sums the upsampled levels of a feature pyramid: 'Panoptic Feature Pyramid Networks', CVPR 2019.

    Args:
        in_channels: Channels of the four levels.
        channels: Number of output channels.
        pyramid_channels: Channels of the pyramid.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int = 128, pyramid_channels: int = 256, device=None, dtype=None
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.channels = channels
        self.levels = range(len(in_channels))
        P = pyramid_channels
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, P, 1, **dd) for c in in_channels)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(P, P, 3, padding=1, **dd) for _ in in_channels)
        # Level i has i convolutions, each followed by a 2x upsampling; level 0 has one convolution, not upsampled.
        self.scale_heads = nn.ModuleList(
            nn.ModuleList(ConvNormAct(channels if step else P, channels, 3, **dd) for step in range(max(i, 1)))
            for i in self.levels
        )
        self.apply(init_weights)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Levels at stride 4, 8, 16, 32 -> [B, channels, H / 4, W / 4]"""
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, features)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:], 'nearest')
        levels = [conv(x) for conv, x in zip(self.fpn_convs, levels)]
        out = self.scale_heads[0][0](levels[0])
        for x, convs in zip(levels[1:], self.scale_heads[1:]):
            for conv in convs:
                x = conv(x)
                x = resize(x, [2 * side for side in x.shape[-2:]])
            out = out + resize(x, out.shape[-2:])
        return out


class UPerNet(nn.Module):
    """Pyramid pooling of the last level and a feature pyramid: 'Unified Perceptual Parsing', ECCV 2018.

    Args:
        in_channels: Channels of the levels.
        channels: Channels of all convolutions and of the output.
        pool_scales: Output sizes of the average pooling of the last level.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.channels = channels
        self.levels = range(len(in_channels))
        *fine, last = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AdaptivePool(scale), ConvNormAct(last, channels, 1, **dd)) for scale in pool_scales
        )
        self.bottleneck = ConvNormAct(last + len(pool_scales) * channels, channels, 3, **dd)
        self.lateral_convs = nn.ModuleList(ConvNormAct(c, channels, 1, **dd) for c in fine)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3, **dd) for _ in fine)
        self.fpn_bottleneck = ConvNormAct(len(in_channels) * channels, channels, 3, **dd)
        self.apply(init_weights)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Levels -> [B, channels, h, w], the size of the finest level"""
        last, size = features[-1], features[0].shape[-2:]
        pooled = [resize(module(last), last.shape[-2:]) for module in self.psp_modules]
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, features)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])
        levels = [*(conv(x) for conv, x in zip(self.fpn_convs, levels)), levels[-1]]
        return self.fpn_bottleneck(torch.cat([resize(x, size) for x in levels], dim=1))


class DeepLabV3Plus(nn.Module):
    """Atrous pyramid pooling with separable convolutions, refined by the first level: DeepLabV3+, ECCV 2018.

    Args:
        in_channels: Channels of the levels. Only the first and the last level are read.
        channels: Channels of the pooling branches and of the output.
        low_level_channels: Channels that the first level is projected to.
        rates: Dilations of the pooling branches. The first branch is a 1 x 1 convolution.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 512,
        low_level_channels: int = 48,
        rates: Sequence[int] = (1, 12, 24, 36),
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.channels = channels
        self.levels = (0, len(in_channels) - 1)
        first, last = in_channels[0], in_channels[-1]
        self.image_pool = nn.Sequential(AdaptivePool(1), ConvNormAct(last, channels, 1, **dd))
        self.aspp_modules = nn.ModuleList(
            [ConvNormAct(last, channels, 1, **dd)]
            + [SeparableConvNormAct(last, channels, dilation=rate, **dd) for rate in rates[1:]]
        )
        self.bottleneck = ConvNormAct((len(rates) + 1) * channels, channels, 3, **dd)
        self.c1_bottleneck = ConvNormAct(first, low_level_channels, 1, **dd)
        self.sep_bottleneck = nn.Sequential(
            SeparableConvNormAct(channels + low_level_channels, channels, **dd),
            SeparableConvNormAct(channels, channels, **dd),
        )
        self.apply(init_weights)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Levels -> [B, channels, h, w], the size of the first level"""
        first, last = features[0], features[-1]
        pooled = resize(self.image_pool(last), last.shape[-2:])
        x = self.bottleneck(torch.cat([pooled, *(module(last) for module in self.aspp_modules)], dim=1))
        x = torch.cat([resize(x, first.shape[-2:]), self.c1_bottleneck(first)], dim=1)
        return self.sep_bottleneck(x)


class FCN(nn.Module):
    """Convolutions on one level: 'Fully Convolutional Networks for Semantic Segmentation', CVPR 2015.

    Args:
        in_channels: Channels of the levels.
        channels: Channels of the convolutions and of the output.
        num_convs: Number of 3 x 3 convolutions.
        concat_input: Whether one more convolution reads the level concatenated with the output of the others.
        level: Index of the level; negative indices count from the last.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 512,
        num_convs: int = 2,
        concat_input: bool = True,
        level: int = -1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.channels = channels
        self.levels = (level % len(in_channels),)
        width = in_channels[level]
        self.convs = nn.Sequential(
            *(ConvNormAct(channels if i else width, channels, 3, **dd) for i in range(num_convs))
        )
        self.conv_cat = ConvNormAct(width + channels, channels, 3, **dd) if concat_input else None
        self.apply(init_weights)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Levels -> [B, channels, h, w], the size of the level"""
        x = features[self.levels[0]]
        out = self.convs(x)
        return out if self.conv_cat is None else self.conv_cat(torch.cat([x, out], dim=1))
