"""How the centroids of a nearest-centroid head learn: settings, targets, assignment, update.

Paper: 'Visual Recognition with Deep Nearest Centroids', ICLR 2023, https://arxiv.org/abs/2209.07383, section 3.2

Centroids are not trained by gradients. Each update assigns the features of the images of a class to the class's
sub-centroids and moves every sub-centroid towards the mean of its features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['CentroidLearning', 'balanced_assignment', 'class_of_target', 'normalize', 'update_centroids']

CHUNK = 4096  # features that are processed at a time


@dataclass(frozen=True)
class CentroidLearning:
    """Settings of centroid learning.

    Attributes:
        momentum: Weight of a centroid against the new direction, 0 .. 1.
        temperature: Temperature of `balanced_assignment`, at least 0.02, so that its exponentials fit in float32.
        iterations: Iterations of `balanced_assignment`.
        memory: Number of features in the memory, those of the latest images, over all processes. If None and ``every``
            is 1: 64 for each class, at most 16,384 and at least one batch. If None and ``every`` is larger: the
            features of ``every`` batches, at most 131,072. Each use compares all of them with all centroids.
        every: Number of batches between two uses of the memory; the other batches move the centroids by their own
            features only. 1 uses the memory in every batch. The authors' code uses 1000 (Swin-T 500, S 400, B 300) and
            stores as many batches.
        dtype: dtype of the features in the memory; None: float32, or float64 in a float64 model.
        contrast: Weight of the contrast loss, see `NearestCentroidHead.contrast_loss`.
        contrast_temperature: Temperature of the contrast loss.

    Raises:
        ValueError: A value is out of range.
    """

    momentum: float = 0.999
    temperature: float = 0.05
    iterations: int = 3
    memory: int | None = None
    every: int = 1
    dtype: torch.dtype | None = None
    contrast: float = 0.0
    contrast_temperature: float = 0.1

    def __post_init__(self) -> None:
        rules = (
            (0 <= self.momentum <= 1, 'momentum', 'of 0 to 1'),
            (self.temperature >= 0.02, 'temperature', 'of at least 0.02'),
            (self.iterations >= 1, 'iterations', 'of at least 1'),
            (self.memory is None or self.memory >= 1, 'memory', 'of at least 1'),
            (self.every >= 1, 'every', 'of at least 1'),
            (self.dtype is None or self.dtype.is_floating_point, 'dtype', 'that is floating point'),
            (self.contrast >= 0, 'contrast', 'of at least 0'),
            (self.contrast_temperature > 0, 'contrast_temperature', 'above 0'),
        )
        for holds, name, expected in rules:
            if not holds:
                raise ValueError(f'Centroid learning needs {name} {expected}, got {getattr(self, name)}.')


def normalize(x: Tensor) -> Tensor:
    """Unit vectors: [..., D] -> [..., D]."""
    # The usual eps of 1e-12 is zero in float16, and the constant features of a blank image would be divided by it.
    return F.normalize(x, dim=-1, eps=1e-6)


def class_of_target(target: Tensor, num_classes: int) -> Tensor:
    """The class of a target, -1 for no class.

    Args:
        target: Class indices, integer [...], where numbers outside 0 .. K - 1 mean no class; or soft targets, float
            [..., K], of mixup, cutmix and label smoothing. The class of a soft target is the one with more than half
            of its weight; an even mixture has no class.
        num_classes: K.

    Returns:
        int64 [...], values -1 .. K - 1.
    """
    if target.is_floating_point():
        total = target.sum(-1)
        weight, target = target.max(-1)
        return torch.where(2 * weight > total, target, -1)
    target = target.long()
    return torch.where((target >= 0) & (target < num_classes), target, -1)


def balanced_assignment(
    similarity: Tensor,
    labels: Tensor,
    num_classes: int,
    temperature: float = 0.05,
    iterations: int = 3,
    all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Assigns the samples of each class evenly to its sub-centroids (Sinkhorn-Knopp; section 3.2).

    All classes are processed at once: sums over the samples of a class are sums over rows with the same label.

    Args:
        similarity: Cosine similarity of each sample to the k sub-centroids of its class, [M, k], values -1 .. 1.
        labels: Classes, int64 [M]; -1 for samples to ignore.
        num_classes: K.
        temperature: Divisor of the similarity. With a lower temperature more samples join their most similar
            sub-centroid.
        iterations: Rounds of normalizing over the samples, then over the sub-centroids.
        all_reduce: Sums a tensor over processes.

    Returns:
        The sub-centroid of each sample, int64 [M], values 0 .. k - 1.
    """
    rows = labels.clamp_min(0)
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))  # exp overflows in float16
    share = (similarity / temperature).exp() * (labels >= 0).unsqueeze(-1)
    tiny = torch.finfo(share.dtype).tiny
    for _ in range(iterations):
        # The constant factors 1 / k and 1 / n do not change the assignment and are omitted.
        load = all_reduce(share.new_zeros(num_classes, share.shape[-1]).index_add(0, rows, share))
        share = share / load.clamp_min(tiny)[rows]
        share = share / share.sum(-1, keepdim=True).clamp_min(tiny)
    return share.argmax(-1)


def update_centroids(
    centroids: Tensor,
    features: Tensor,
    labels: Tensor,
    assigned: Tensor,
    momentum: float = 0.999,
    all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Moves each centroid towards the mean direction of its samples (section 3.2).

    Args:
        centroids: Unit vectors [K, k, D].
        features: Unit vectors [M, D], summed in the dtype of the centroids.
        labels: Classes, int64 [M]; -1 for samples to ignore.
        assigned: Sub-centroid of each sample in its class, int64 [M].
        momentum: Weight of the centroid; the new direction has the weight 1 - momentum.
        all_reduce: Sums a tensor over processes.

    Returns:
        Unit vectors [K, k, D]; a centroid without samples is unchanged.
    """
    K, k, D = centroids.shape
    rows = torch.where(labels >= 0, labels * k + assigned, K * k)  # ignored samples are added to a last row
    total = centroids.new_zeros(K * k + 1, D)
    for some, row in zip(features.split(CHUNK), rows.split(CHUNK)):
        some = some.to(total.dtype)
        # scatter_add is several times as fast as index_add on a CPU, but not deterministic on a GPU.
        if total.device.type == 'cpu':
            total.scatter_add_(0, row.unsqueeze(-1).expand(-1, D), some)
        else:
            total.index_add_(0, row, some)
    direction = all_reduce(total[:-1]).view_as(centroids)
    moved = normalize(momentum * centroids + (1 - momentum) * normalize(direction))
    return torch.where((direction != 0).any(-1, keepdim=True), moved, centroids)
