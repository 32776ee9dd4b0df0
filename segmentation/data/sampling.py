"""Sampling as a pure function of a seed and a position, so that a run can be resumed exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ['IterationSampler', 'SeededDataset']


@dataclass(eq=False)
class IterationSampler(Sampler[tuple[int, int]]):
    """Samples of a run that counts iterations, each with a seed for its augmentation.

    All processes read one infinite sequence of shuffled epochs. Each iteration takes the next `batch_size * world_size`
    samples, and each process a contiguous part of them. The sequence depends only on the seed, so a run can be resumed
    at any iteration, even with another number of processes if `batch_size * world_size` stays the same.

    Args:
        length: Number of samples in the dataset.
        seed: Seed of the run, not negative.
        start: First iteration, from 0.
        iterations: Iteration to stop before.
        batch_size: Samples per iteration in each process.
        rank: Index of this process.
        world_size: Number of processes.

    Yields:
        Pairs `(index, seed)`, `batch_size` of them per iteration.
    """

    length: int
    seed: int = 0
    start: int = 0
    iterations: int = 1
    batch_size: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.length < 1 or self.batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f'length and batch_size must be at least 1, and rank below world_size, got {self}')

    def __len__(self) -> int:
        return max(self.iterations - self.start, 0) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shuffled_epoch = None
        for iteration in range(self.start, self.iterations):
            first = (iteration * self.world_size + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                epoch, index = divmod(position, self.length)
                if epoch != shuffled_epoch:
                    generator = torch.Generator().manual_seed(_hash(self.seed, 0, epoch))
                    order = torch.randperm(self.length, generator=generator).tolist()
                    shuffled_epoch = epoch
                yield order[index], _hash(self.seed, 1, position)


class SeededDataset(Dataset):
    """A dataset indexed by `(index, seed)`. The seed determines all random augmentation of the sample.

    Only torch's CPU generator is seeded, and its state is restored afterwards.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: tuple[int, int]) -> Any:
        index, seed = sample
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]


def _hash(*numbers: int) -> int:
    """Combines numbers to a 64-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
