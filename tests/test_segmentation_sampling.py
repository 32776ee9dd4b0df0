"""segmentation.data.sampling: order and augmentation of samples depend on seed and position only."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from segmentation.data.sampling import IterationSampler, SeededDataset


class Noise(Dataset):
    """Samples (index, random numbers)."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index, torch.rand(3)


def _stream(count, length=7, seed=0):
    return list(IterationSampler(length, seed, iterations=count))


def test_epochs_are_permutations():
    indices = [index for index, _ in _stream(7 * 20)]
    epochs = [tuple(indices[start : start + 7]) for start in range(0, len(indices), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def test_permutations_are_uniform():
    firsts = [_stream(1, length=5, seed=seed)[0][0] for seed in range(1000)]
    assert all(150 < firsts.count(index) < 250 for index in range(5))  # 200 +- 4 standard deviations


def test_seeds_differ():
    seeds = [seed for run in range(3) for _, seed in _stream(500, seed=run)]
    assert len(set(seeds)) == len(seeds)
    assert _stream(500, seed=1) == _stream(500, seed=1)


@pytest.mark.parametrize('start', [0, 1, 3, 10, 11])
def test_resumed_run(start):
    options = dict(length=7, seed=4, iterations=11, batch_size=3, rank=1, world_size=2)
    whole = list(IterationSampler(**options))
    rest = IterationSampler(**options, start=start)
    assert list(rest) == whole[start * 3 :]
    assert len(rest) == len(whole[start * 3 :])
    assert list(rest) == list(rest)  # stateless


@pytest.mark.parametrize('world_size', [1, 2, 3, 6])
def test_processes_share_the_sequence(world_size):
    size = 12 // world_size
    # 10 iterations of 12 samples.
    shares = [list(IterationSampler(50, 9, 0, 10, size, rank, world_size)) for rank in range(world_size)]
    assert [len(share) for share in shares] == [10 * size] * world_size
    batches = [
        list(itertools.chain(*(share[iteration * size : (iteration + 1) * size] for share in shares)))
        for iteration in range(10)
    ]
    stream = list(itertools.chain(*batches))
    assert stream == _stream(120, length=50, seed=9)  # the same sequence with any number of processes
    assert sorted(index for index, _ in stream[:50]) == list(range(50))


def test_finished_run_is_empty():
    sampler = IterationSampler(7, start=5, iterations=5)
    assert (len(sampler), list(sampler)) == (0, [])
    assert len(IterationSampler(7, start=9, iterations=5)) == 0


@pytest.mark.parametrize('options', [dict(length=0), dict(batch_size=0), dict(rank=2, world_size=2), dict(rank=-1)])
def test_invalid_arguments(options):
    with pytest.raises(ValueError, match='must be'):
        IterationSampler(**{'length': 3, **options})


def test_sample_depends_on_its_seed():
    samples = SeededDataset(Noise())
    first = samples[2, 11][1]
    torch.manual_seed(77)
    torch.rand(5)
    assert torch.equal(samples[2, 11][1], first)
    assert not torch.equal(samples[2, 12][1], first)
    assert not torch.equal(samples[2, 11 + (1 << 40)][1], samples[2, 12][1])
    assert len(samples) == 7


def test_global_generator_is_unchanged():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    before = torch.rand(2)
    SeededDataset(Noise())[0, 5]
    assert torch.equal(torch.cat([before, torch.rand(2)]), expected)


def test_global_generator_is_unchanged_after_an_error():
    class Broken(Noise):
        def __getitem__(self, index):
            torch.rand(3)
            raise OSError

    state = torch.get_rng_state()
    with pytest.raises(OSError):
        SeededDataset(Broken())[0, 5]
    assert torch.equal(torch.get_rng_state(), state)


def test_worker_processes():
    def batches(workers, start=0):
        sampler = IterationSampler(7, 1, start, iterations=6, batch_size=2)
        return list(DataLoader(SeededDataset(Noise()), batch_size=2, sampler=sampler, num_workers=workers))

    alone, resumed = batches(0), batches(2, start=2)
    assert len(alone) == 6
    for expected, batch in zip(alone[2:], resumed, strict=True):
        assert torch.equal(expected[0], batch[0])
        assert torch.equal(expected[1], batch[1])
