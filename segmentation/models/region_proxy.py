"""RegionProxy: classifies the tokens of a vision transformer, and interpolates between tokens by learned affinities.

Paper: 'Semantic Segmentation by Early Region Proxy', CVPR 2022, https://arxiv.org/abs/2203.14043
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .decoders import SeparableConvNormAct, init_weights

__all__ = ['RegionProxy']

CELLS = 4  # output pixels per token and axis


class RegionProxy(nn.Module):
    """Head on the tokens of an early and of the last layer.

    The last layer gives the class logits of each token. The early layer gives, for each of the 4 x 4 output pixels of a
    token, affinities to the 3 x 3 tokens around it. A pixel's logits are the weighted mean of their logits.

    Args:
        in_channels: Channels of the early and of the last layer.
        num_classes: Number of classes K.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        early, last = in_channels
        self.affinity = nn.Sequential(
            SeparableConvNormAct(early, early, **dd),
            nn.Conv2d(early, 9 * CELLS * CELLS, 1, **dd),
        )
        self.classifier = nn.Linear(last, num_classes, **dd)
        self.affinity.apply(init_weights)
        nn.init.kaiming_normal_(self.affinity[1].weight, mode='fan_out', nonlinearity='relu')
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        """Tokens of the early and the last layer, both [B, C, h, w] -> ``logits`` [B, K, 4 h, 4 w]"""
        early, last = features
        B, _, h, w = early.shape
        affinity = self.affinity(early).reshape(B, 9, CELLS * CELLS, h, w)
        inside = neighbors(early.new_ones(1, 1, h, w)) > 0  # [1, 1, 9, h, w]
        affinity = affinity.masked_fill(~inside.transpose(1, 2), float('-inf')).softmax(1)
        logits = self.classifier(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits = torch.einsum('bknhw,bnphw->bkphw', neighbors(logits), affinity.to(logits.dtype))
        logits = logits.reshape(B, -1, CELLS, CELLS, h, w).permute(0, 1, 4, 2, 5, 3)
        return {'logits': logits.reshape(B, -1, CELLS * h, CELLS * w)}


def neighbors(x: Tensor) -> Tensor:
    """The 3 x 3 neighbors of each point in row-major order, zeros outside: [B, C, h, w] -> [B, C, 9, h, w]"""
    B, C, h, w = x.shape
    return F.unfold(x, 3, padding=1).reshape(B, C, 9, h, w)
