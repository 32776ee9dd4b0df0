"""Centroids that learn in several processes are equal in all, and equal to those of one process with all batches."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from plain_centroids import PlainLearner, head64, random_batch
from processes import run_processes
from torch.nn.parallel import DistributedDataParallel

from cluster_zoo.layers.centroid_learning import CentroidLearning

CLASSES = 5
# Sizes of the batches of up to three processes, step by step; with two, the third is left out.
EVEN = [(6, 6, 6)] * 6
UNEVEN = [(6, 6, 6), (4, 9, 5), (1, 3, 12), (7, 7, 7), (5, 0, 2), (3, 1, 1)]  # the last ones of an epoch


def batches(head, step: int, sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of all processes, the same in each process."""
    torch.manual_seed(step)
    made = [random_batch(head, size) for size in sizes]
    for rank, (x, labels) in enumerate(made):
        labels[labels == rank] = CLASSES - 1  # one class is missing in each process
        x[:1] = float('nan') if step == 2 else x[:1]
    return made


def joined(made: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the batches, interleaved so that the oldest samples are the oldest of each process."""
    if len({len(labels) for _, labels in made}) == 1:
        return tuple(torch.stack(part, dim=1).flatten(0, 1) for part in zip(*made))
    return tuple(torch.cat(part) for part in zip(*made))


def start(world: int, **learning) -> torch.nn.Module:
    torch.manual_seed(99)
    learning = {key: value * world if key == 'memory' else value for key, value in learning.items()}
    return head64(8, CLASSES, 2, momentum=0.8, **learning)


def run_schedule(world: int, rank: int, all_sizes: list[tuple[int, ...]], memory: int, every: int) -> None:
    """Learns in this process and compares with one process that gets all batches."""
    head, alone = (start(world, memory=memory, every=every) for _ in range(2))
    plain = PlainLearner(head, [memory] * world)
    for step, sizes in enumerate(all_sizes):
        made = batches(head, step, sizes[:world])
        with torch.no_grad():
            for each in (head, alone):
                each.feat_norm.weight.mul_(1.05)
        expected = plain.learn(made)
        x, labels = made[rank]
        head(x)
        head.learn(labels)
        torch.testing.assert_close(head.prototypes, expected, rtol=0, atol=1e-12)
        everywhere = [torch.empty_like(head.prototypes) for _ in range(world)]
        dist.all_gather(everywhere, head.prototypes)
        assert all(torch.equal(other, head.prototypes) for other in everywhere)
        assert len(head.memory.labels) == memory  # a process's share
        if all_sizes is EVEN or memory == 100:  # with uneven batches the memories differ
            _learn_alone(alone, *joined(made))
            torch.testing.assert_close(head.prototypes, alone.prototypes, rtol=0, atol=1e-12)
    assert not torch.allclose(head.prototypes, start(world).prototypes)


def _learn_alone(head, x, labels) -> None:
    """Learns as a single process, without sums over processes."""
    from cluster_zoo.layers import nearest_centroid as centroids

    world_size, centroids._world_size = centroids._world_size, lambda: 1
    try:
        head(x)
        head.learn(labels)
    finally:
        centroids._world_size = world_size


def run_ddp(world: int, rank: int) -> None:
    """DistributedDataParallel broadcasts the centroids of the first process, but not its memory."""
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), head64(8, CLASSES, 2, momentum=0.5, contrast=0.1).float())
    wrapped = DistributedDataParallel(model)
    head = model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x, labels = batches(start(world), step, (6, 6, 6))[rank]
        loss = torch.nn.functional.cross_entropy(wrapped(x.nan_to_num().float()), labels) + head.contrast_loss(labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = copy.deepcopy(head.memory)
        head.learn(labels)
        if before is not None:
            assert torch.equal(before.features[: 6 * step], head.memory.features[: 6 * step])
        everywhere = [torch.empty_like(head.prototypes) for _ in range(world)]
        dist.all_gather(everywhere, head.prototypes)
        assert all(torch.equal(other, head.prototypes) for other in everywhere)
        remembered = [torch.empty_like(head.memory.labels) for _ in range(world)]
        dist.all_gather(remembered, head.memory.labels)
        assert not torch.equal(remembered[0], remembered[1])
    assert head.memory.labels[:18].tolist() == [
        label for step in range(3) for label in batches(start(world), step, (6, 6, 6))[rank][1].tolist()
    ]


def work(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{store}', timedelta(seconds=60), rank=rank, world_size=world)
    for sizes in (EVEN, UNEVEN):
        for memory, every in ((100, 1), (9, 1), (14, 3)):
            run_schedule(world, rank, sizes, memory, every)
    run_ddp(world, rank)
    dist.destroy_process_group()


@pytest.mark.parametrize('world', [2, 3])
def test_processes_agree_with_each_other_and_with_one(world, tmp_path):
    run_processes(work, world, str(tmp_path / 'store'))


def test_share_of_the_memory(monkeypatch):
    from cluster_zoo.layers import nearest_centroid as centroids

    monkeypatch.setattr(centroids, '_world_size', lambda: 3)
    monkeypatch.setattr(dist, 'all_reduce', lambda x: None)
    head = head64(8, CLASSES, 2)
    head.learning = CentroidLearning(memory=100)
    head(torch.randn(2, 8).double())
    head.learn(torch.tensor([0, 1]))
    assert len(head.memory.labels) == 34  # rounded up
