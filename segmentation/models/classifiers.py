"""Classifiers: from a map of features to class logits.

A classifier is built from the width of the features and the number of classes, and maps [B, C, h, w] to a dictionary of
``logits`` [B, K, h, w] and whatever its loss needs beside them.
"""

import torch
import torch.nn as nn
from torch import Tensor

from cluster_zoo.layers.nearest_centroid import NearestCentroidHead

__all__ = ['CLASSIFIERS', 'CentroidClassifier', 'ConditionalClassifier', 'PlainClassifier']


class PlainClassifier(nn.Module):
    """The same linear classifier for every pixel of every image.

    Args:
        in_channels: Width C of the features.
        num_classes: Classes K.
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
    """A linear classifier that each image makes for itself, from its own mean features of every class.

    'CondNet: Conditional Classifier for Scene Segmentation', IEEE SPL 2021, https://arxiv.org/abs/2109.10322.
    The guidance logits, a first guess that says which pixels are averaged, have a loss of their own.

    Args:
        in_channels: Width C of the features.
        num_classes: Classes K.
    """

    def __init__(self, in_channels: int, num_classes: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_channels, self.num_classes = in_channels, num_classes
        self.guidance = nn.Conv2d(in_channels, num_classes, 1, **dd)
        # As published: a group is a class, and its C + 1 outputs are not that class' weights and bias, see forward.
        self.filters = nn.Conv2d(
            num_classes * in_channels, num_classes * (in_channels + 1), 1, groups=num_classes, **dd
        )
        for conv in (self.guidance, self.filters):
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features [B, C, h, w] -> ``logits`` and ``guidance``, both [B, K, h, w]"""
        B, C, h, w = x.shape
        K = self.num_classes
        guidance = self.guidance(x)
        points = x.flatten(2)
        share = guidance.flatten(2).softmax(1)
        root = (h * w) ** -0.5  # half of the division for each factor: float16 could not hold the sum over a large map
        embeddings = torch.einsum('bkn,bcn->bkc', share * root, points * root)
        filters = self.filters(embeddings.reshape(B, K * C, 1, 1)).flatten(1)
        # The published layout: first all weights, class after class, then all biases.
        weight, bias = filters[:, : K * C].reshape(B, K, C), filters[:, K * C :].unsqueeze(-1)
        logits = torch.baddbmm(bias.to(points.dtype), weight.to(points.dtype), points)
        return {'logits': logits.reshape(B, K, h, w), 'guidance': guidance}


class CentroidClassifier(nn.Module):
    """Every pixel belongs to the class of its nearest sub-centroid; there are no class weights.

    'Visual Recognition with Deep Nearest Centroids', ICLR 2023, https://arxiv.org/abs/2209.07383, section 3. The
    centroids follow the features in training: ``head.learn(labels)`` with labels [B, h, w].

    Args:
        in_channels: Width C of the features.
        num_classes: Classes K.
        sub_centroids: Sub-centroids of each class.
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
