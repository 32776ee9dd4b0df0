"""Centroid learning as in section 3.2 of the DNC paper: loops over classes and sub-centroids, lists of features."""

from collections import deque
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster_zoo.layers.centroid_learning import CentroidLearning
from cluster_zoo.layers.nearest_centroid import NearestCentroidHead


def sinkhorn(similarity: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments [n] of one class's samples to its sub-centroids, from similarities [n, k]."""
    n, k = similarity.shape
    Q = (similarity / temperature).exp().T
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / k
        Q = Q / Q.sum(0, keepdim=True) / n
    return (Q * n).argmax(0)


def update(head: NearestCentroidHead, features: Tensor, labels: Tensor) -> Tensor:
    """The head's centroids [K, k, D] after one update by unit features [M, D] with labels [M]."""
    learning, K, k = head.learning, head.num_classes, head.sub_centroids
    before = F.normalize(head.prototypes, dim=-1)
    after = before.clone()
    for c in range(K):
        z = features[labels == c]
        if len(z) == 0:
            continue
        assigned = sinkhorn(z @ before[c].T, learning.temperature, learning.iterations)
        scores = torch.stack([(z @ before[other].T).max(1).values for other in range(K)], dim=1)
        correct = head.mask_norm(scores).argmax(1) == c
        for j in range(k):
            members = z[correct & (assigned == j)]
            if len(members):
                new = F.normalize(members.sum(0), dim=0)
                after[c, j] = F.normalize(learning.momentum * before[c, j] + (1 - learning.momentum) * new, dim=0)
    return after


def unit_features(head: NearestCentroidHead, x: Tensor) -> Tensor:
    return F.normalize(head.feat_norm(x), dim=-1)


class PlainLearner:
    """Expected centroids after batches of one or several processes, from lists of features.

    Args:
        head: The head, which is not changed.
        shares: Size of each process's memory.
    """

    def __init__(self, head: NearestCentroidHead, shares: list[int]):
        self.head = head
        self.memories = [deque(maxlen=share) for share in shares]
        self.batches = 0

    @torch.no_grad()
    def learn(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Centroids after the features and labels of each process."""
        seen = [list(zip(unit_features(self.head, x), labels.tolist())) for x, labels in batches]
        for memory, batch in zip(self.memories, seen):
            memory.extend(batch)
        self.batches += 1
        used = self.memories if self.batches % self.head.learning.every == 0 else seen
        used = [(z, label) for each in used for z, label in each if label >= 0 and z.isfinite().all()]
        if not used:
            return F.normalize(self.head.prototypes, dim=-1)
        features, labels = zip(*used)
        return update(self.head, torch.stack(features), torch.tensor(labels))


def set_head(head: NearestCentroidHead) -> NearestCentroidHead:
    """Sets random norm parameters, and centroids that are not unit vectors."""
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.3)
    head.prototypes.normal_()
    return head


def random_batch(head: NearestCentroidHead, size: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features [size, D] around the centroids of random classes, so that some are classified correctly."""
    labels = torch.randint(head.num_classes, (size,))
    centers = head.prototypes[labels, torch.randint(head.sub_centroids, (size,))]
    return centers + noise * torch.randn_like(centers), labels


def learn(head: NearestCentroidHead, x: Tensor, target: Tensor) -> Tensor:
    """Centroids of the head after a batch."""
    head(x)
    head.learn(target)
    return head.prototypes


def head64(
    width: int = 12, classes: int = 5, sub_centroids: int = 3, **learning: float | torch.dtype
) -> NearestCentroidHead:
    head = NearestCentroidHead(width, classes, sub_centroids, CentroidLearning(**learning)).double()
    return set_head(head).train()
