"""RegionProxy: the tokens of a vision transformer classify, and pixels take over what their neighbour tokens say.

Paper: 'Semantic Segmentation by Early Region Proxy', CVPR 2022, https://arxiv.org/abs/2203.14043
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .decoders import SeparableConvNormAct, init_weights

__all__ = ['RegionProxy']


class RegionProxy(nn.Module):
    """Head on two layers of a vision transformer, early and last.

    The last layer gives the class logits of each token. The early one gives each of the 4 x 4 pixels of a token its
    affinity to the 3 x 3 tokens around it, with which it averages their logits.

    Args:
        in_channels: Channels of the early and of the last layer.
        num_classes: Classes K.
        cells: Pixels per axis that a token stands for.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, cells: int = 4, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        early, last = in_channels
        self.cells = cells
        self.affinity = nn.Sequential(
            SeparableConvNormAct(early, early, **dd),
            nn.Conv2d(early, 9 * cells * cells, 1, **dd),
        )
        self.classifier = nn.Linear(last, num_classes, **dd)
        self.affinity.apply(init_weights)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        """Tokens of the early and the last layer, both [B, C, h, w] -> ``logits`` [B, K, 4 h, 4 w]"""
        early, last = features
        B, _, h, w = early.shape
        s = self.cells
        affinity = self.affinity(early).reshape(B, 9, s * s, h, w)
        inside = _neighbours(torch.ones_like(early[:1, :1])) > 0  # [1, 1, 9, h, w]
        affinity = affinity.masked_fill(~inside.transpose(1, 2), float('-inf')).softmax(1)
        logits = self.classifier(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits = torch.einsum('bknhw,bnphw->bkphw', _neighbours(logits), affinity.to(logits.dtype))
        logits = logits.reshape(B, -1, s, s, h, w).permute(0, 1, 4, 2, 5, 3)
        return {'logits': logits.reshape(B, -1, s * h, s * w)}


def _neighbours(x: Tensor) -> Tensor:
    """The 3 x 3 neighbours of each point, row by row, zeros outside: [B, C, h, w] -> [B, C, 9, h, w]"""
    B, C, h, w = x.shape
    return F.unfold(x, 3, padding=1).reshape(B, C, 9, h, w)
