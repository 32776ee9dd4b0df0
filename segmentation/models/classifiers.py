"""Classifiers: maps of features [B, C, h, w] to a dictionary with ``logits`` [B, K, h, w].

A classifier is built from the number of channels C and the number of classes K. It may return more than logits for its
own loss.
"""

import torch
import torch.nn as nn
from torch import Tensor

from cluster_zoo.layers.nearest_centroid import NearestCentroidHead

__all__ = ['CLASSIFIERS', 'CentroidClassifier', 'ConditionalClassifier', 'PlainClassifier']


class PlainClassifier(nn.Module):
    """A 1 x 1 convolution.

    Args:
        in_channels: Number of feature channels C.
        num_classes: Number of classes K.
    """

    def __init__(self, in_channels: int, num_classes: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 1, device=device, dtype=dtype)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features [B, C, h, w] -> ``logits`` [B, K, h, w]"""
        return {'logits': self.conv(x)}


class ConditionalClassifier(nn.Module):
    """Computes the weights of a linear classifier from each image's own mean features per class.

    'CondNet: Conditional Classifier for Scene Segmentation', IEEE SPL 2021, https://arxiv.org/abs/2109.10322.
    The guidance logits select the pixels of a class, and have their own loss.

    Args:
        in_channels: Number of feature channels C.
        num_classes: Number of classes K.
    """

    def __init__(self, in_channels: int, num_classes: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        C, K = in_channels, num_classes
        self.num_classes = num_classes
        self.guidance = nn.Conv2d(C, K, 1, **dd)
        # One group per class, as in the authors' code. The outputs of a group are not the filter of its class: forward
        # reads all outputs as one vector, first the K * C weights, then the K biases.
        self.filters = nn.Conv2d(K * C, K * (C + 1), 1, groups=K, **dd)
        for conv in (self.guidance, self.filters):
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features [B, C, h, w] -> ``logits`` and ``guidance``, both [B, K, h, w]"""
        B, C, h, w = x.shape
        K = self.num_classes
        guidance = self.guidance(x)
        points = x.flatten(2)
        attention = guidance.flatten(2).softmax(1)
        # Both factors share the division by h * w, because float16 overflows on the sum over a large map.
        root = (h * w) ** -0.5
        embeddings = torch.einsum('bkn,bcn->bkc', attention * root, points * root)
        filters = self.filters(embeddings.reshape(B, K * C, 1, 1)).flatten(1)
        weight, bias = filters[:, : K * C].reshape(B, K, C), filters[:, K * C :].unsqueeze(-1)
        logits = torch.baddbmm(bias.to(points.dtype), weight.to(points.dtype), points)
        return {'logits': logits.reshape(B, K, h, w), 'guidance': guidance}


class CentroidClassifier(nn.Module):
    """Assigns every pixel to the class of its nearest sub-centroid.

    'Visual Recognition with Deep Nearest Centroids', ICLR 2023, https://arxiv.org/abs/2209.07383, section 3. Centroids
    are not trained by gradients: call ``head.learn(labels)`` with labels [B, h, w] after each backward pass.

    Args:
        in_channels: Number of feature channels C.
        num_classes: Number of classes K.
        sub_centroids: Number of sub-centroids per class.
        common_start: See `cluster_zoo.layers.nearest_centroid.NearestCentroidHead`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        sub_centroids: int = 4,
        common_start: float = 2.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.head = NearestCentroidHead(in_channels, num_classes, sub_centroids, common_start=common_start, **dd)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features [B, C, h, w] -> ``logits`` [B, K, h, w]"""
        return {'logits': self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)}


CLASSIFIERS = {'plain': PlainClassifier, 'cond': ConditionalClassifier, 'dnc': CentroidClassifier}
