"""Memory of the features of the latest images, from which centroids learn."""

from typing import Any

import torch
from torch import Tensor

__all__ = ['FeatureMemory', 'from_oldest']


class FeatureMemory:
    """Ring buffer of the latest features and their labels, allocated once.

    It is not a buffer of a module, because DistributedDataParallel would broadcast it from the first process.

    Args:
        size: Number of features.
        width: Width D of a feature.
        device: Device of the memory.
        dtype: dtype of the features.

    Attributes:
        features: [size, D], zero in rows that are not filled yet.
        labels: int64 [size], -1 for no class and in rows that are not filled yet.
        count: Number of features pushed so far, 0-dimensional. It is a tensor, because compiled code treats a Python
            number as a constant and would be compiled again for every batch.
    """

    def __init__(self, size: int, width: int, device: torch.device, dtype: torch.dtype):
        self.features = torch.zeros(size, width, device=device, dtype=dtype)
        self.labels = torch.full((size,), -1, device=device)
        self.count = torch.zeros((), device=device, dtype=torch.int64)

    def push(self, features: Tensor, labels: Tensor) -> None:
        """Replaces the oldest rows by features [N, D] and labels [N]."""
        size = len(self.labels)
        features, labels = features[-size:], labels[-size:]
        rows = (self.count + torch.arange(len(labels), device=self.count.device)) % size
        self.features.index_copy_(0, rows, features.to(self.features))
        self.labels.index_copy_(0, rows, labels.to(self.labels))
        self.count += len(labels)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: the filled rows on the CPU, the row that is written next, the size."""
        count, size = int(self.count), len(self.labels)
        features, labels = (rows[: min(count, size)].cpu().clone() for rows in (self.features, self.labels))
        return dict(features=features, labels=labels, next=count % size, size=size)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of `state_dict`; from a memory of another size, the latest features that fit.

        Raises:
            ValueError: The features have another width, or the labels are not int64.
        """
        features, labels = state['features'], state['labels']
        if labels.dtype != torch.int64:
            raise ValueError(f'The labels of the memory must be int64, got {labels.dtype}.')
        if features.ndim != 2 or features.shape != (len(labels), self.features.shape[1]):
            raise ValueError(
                f'The features must be [N, {self.features.shape[1]}] for this memory, got {list(features.shape)}.'
            )
        self.features.zero_()
        self.labels.fill_(-1)
        # A full memory of this size goes to the same rows, so that sums over them are rounded equally.
        self.count.fill_(state['next'] if len(labels) == len(self.labels) else 0)
        self.push(*from_oldest(state))


def from_oldest(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of a memory's state, from the oldest to the latest."""
    return state['features'].roll(-state['next'], 0), state['labels'].roll(-state['next'], 0)
