"""The features that centroids learn from: those of the latest images."""

from typing import Any

import torch
from torch import Tensor

__all__ = ['FeatureMemory', 'from_oldest']


class FeatureMemory:
    """The latest features and their labels: a ring of fixed size, allocated once, on the device of the features.

    No buffer of a module, because DistributedDataParallel would copy the first process's to the others.

    Args:
        size: Features that it holds.
        width: Width D of a feature.
        device: Where.
        dtype: In what type.

    Attributes:
        features: [size, D]. Rows that are not filled yet are zero.
        labels: int64 [size], -1 for no example of any class, and where nothing is filled in yet.
        count: Features pushed so far, 0-dimensional. No number, because compiled code takes numbers for constant and
            would be compiled again for every batch.
    """

    def __init__(self, size: int, width: int, device: torch.device, dtype: torch.dtype):
        self.features = torch.zeros(size, width, device=device, dtype=dtype)
        self.labels = torch.full((size,), -1, device=device)
        self.count = torch.zeros((), device=device, dtype=torch.int64)

    def push(self, features: Tensor, labels: Tensor) -> None:
        """Remember features [N, D] and labels [N] in place of the oldest."""
        size = len(self.labels)
        features, labels = features[-size:], labels[-size:]
        rows = (self.count + torch.arange(len(labels), device=self.count.device)) % size
        self.features.index_copy_(0, rows, features.to(self.features))
        self.labels.index_copy_(0, rows, labels.to(self.labels))
        self.count += len(labels)

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint: the filled rows on the CPU, the row that is written next, the size."""
        count, size = int(self.count), len(self.labels)
        features, labels = (rows[: min(count, size)].cpu().clone() for rows in (self.features, self.labels))
        return dict(features=features, labels=labels, next=count % size, size=size)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; of a memory of another size the latest that fit.

        Raises:
            ValueError: The features are of another width, or the labels no numbers of classes.
        """
        features, labels = state['features'], state['labels']
        if labels.dtype != torch.int64:
            raise ValueError(f'The labels of remembered features are int64, got {labels.dtype}.')
        if features.ndim != 2 or features.shape != (len(labels), self.features.shape[1]):
            raise ValueError(
                f'The remembered features are {list(features.shape)}, the memory holds [N, {self.features.shape[1]}].'
            )
        self.features.zero_()
        self.labels.fill_(-1)
        # A full memory of this size to the same rows, so that sums over them round alike.
        self.count.fill_(state['next'] if len(labels) == len(self.labels) else 0)
        self.push(*from_oldest(state))


def from_oldest(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of a memory's state in the order in which they came."""
    return state['features'].roll(-state['next'], 0), state['labels'].roll(-state['next'], 0)
