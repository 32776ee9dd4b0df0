"""Which training sample comes when, as a pure function of a seed and a position: what makes --resume exact."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ['IterationSampler', 'SeededDataset']


class IterationSampler(Sampler[tuple[int, int]]):
    """Samples of a run that counts iterations, each with a seed for its augmentation.

    All processes read one endless sequence: epoch after epoch, each a shuffle of the dataset of its own, without a gap
    between them. An iteration takes the next `batch_size * world_size` of it, of which each process has its
    contiguous share. What comes at a position depends on the position and the seed only, so a run goes on exactly from
    any iteration, also with other numbers of processes as long as `batch_size * world_size` stays.

    Args:
        length: Number of samples in the dataset.
        seed: Seed of the run, not negative.
        start: Iteration to begin with, from 0.
        iterations: Iteration to end before.
        batch_size: Samples of an iteration in each process.
        rank: Number of this process.
        world_size: Number of processes.

    Yields:
        `(index, seed)` pairs, `batch_size` of them an iteration.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        start: int = 0,
        iterations: int = 1,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1 or batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f'no batches of {batch_size} from {length} samples for process {rank} of {world_size}')
        self.length = length
        self.seed = seed
        self.start = start
        self.iterations = iterations
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return max(self.iterations - self.start, 0) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shuffled, order = -1, []
        for iteration in range(self.start, self.iterations):
            first = (iteration * self.world_size + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.length)
                if epoch != shuffled:
                    shuffled, order = epoch, self._shuffle(epoch)
                yield order[place], _mix(self.seed, 1, position)

    def _shuffle(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, 0, epoch))
        return torch.randperm(self.length, generator=generator).tolist()


class SeededDataset(Dataset):
    """A dataset that is asked for `(index, seed)`: what is random in a sample depends on the seed alone.

    Only torch's generator of the CPU is seeded, for the time of the sample: neither the process that asks nor its
    accelerators notice.
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


def _mix(*numbers: int) -> int:
    """A seed that differs, as random numbers do, wherever one of the numbers differs."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
