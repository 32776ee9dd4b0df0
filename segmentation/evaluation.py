"""A model's figures on a dataset: what both scripts run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from .datasets import SegmentationDataset
from .inference import predict
from .metrics import SegmentationMetrics
from .overlays import OverlayWriter

__all__ = ['evaluate']

# So many batches of images at most wait for others of their size.
_WAITING_BATCHES = 4


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    protocol: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    overlays: OverlayWriter | None = None,
) -> dict[str, Any]:
    """Predicts every image of a dataset once, at the size of its labels, and compares.

    Images of equal size go through the model together. Each process takes its share of the images; the pixels of all
    are counted together, so that the figures do not depend on how many processes there are.

    Args:
        model: A `Segmenter`, on the device. It is put into evaluation mode for as long as this takes.
        dataset: Images, as the model wants them, with their labels.
        device: Where to predict and to count.
        autocast: Makes the context to predict in.
        protocol: Options of :func:`~segmentation.inference.predict`, such as mode and scales (default: whole images).
        batch_size: Images, and windows, that go through the model together.
        workers: Processes that load images; 0: this one does.
        rank: Number of this process, from 0.
        world_size: How many processes take part. All of them have to call this.
        overlays: Draws a few of the predictions.

    Returns:
        What :meth:`~segmentation.metrics.SegmentationMetrics.compute` does, of all processes; ``images``, their number;
        and ``images_per_second``, of all processes, with loading, without the first batch, which chooses kernels.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # it would wait, with each batch, for processes that have fewer
    metrics = SegmentationMetrics(
        len(dataset.classes), dataset.classes, dataset.ignore_index, device, distributed=world_size > 1
    )
    indices = range(rank, len(dataset), world_size)
    loader = DataLoader(dataset, batch_size=None, sampler=indices, num_workers=workers)
    bar = tqdm(total=len(indices), desc='evaluate', leave=False, disable=rank > 0 or not sys.stderr.isatty())
    training = model.training
    model.eval()
    start, counted, first = time.monotonic(), len(indices), True
    try:
        for chosen, images, labels in _batches(zip(indices, loader), batch_size):
            images, labels = images.to(device), labels.to(device)
            with autocast():
                probabilities = predict(
                    model, images, size=labels.shape[-2:], **{'chunk': batch_size, **(protocol or {})}
                )
            predictions = probabilities.argmax(1)
            del probabilities
            metrics.update(predictions, labels)
            if overlays is not None:
                for index, prediction in zip(chosen, predictions):
                    overlays(index, prediction)
            bar.update(len(chosen))
            if first and len(chosen) < len(indices):
                start, counted = time.monotonic(), len(indices) - len(chosen)
            first = False
    finally:
        bar.close()
        model.train(training)
    figures = metrics.compute()
    elapsed = time.monotonic() - start
    return figures | dict(images=len(dataset), images_per_second=world_size * counted / elapsed)


def _batches(
    samples: Iterable[tuple[int, tuple[Tensor, Tensor]]],
    batch_size: int,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, images and labels, `batch_size` of equal size together, in the order in which they get complete."""
    waiting: dict[tuple, list] = {}
    for index, (image, labels) in samples:
        key = (image.shape, labels.shape)
        waiting.setdefault(key, []).append((index, image, labels))
        if len(waiting[key]) < batch_size:
            if sum(map(len, waiting.values())) < _WAITING_BATCHES * batch_size:
                continue
            key = max(waiting, key=lambda key: len(waiting[key]))
        yield _stacked(waiting.pop(key))
    yield from map(_stacked, waiting.values())


def _stacked(samples: list[tuple[int, Tensor, Tensor]]) -> tuple[list[int], Tensor, Tensor]:
    indices, images, labels = zip(*samples)
    return list(indices), torch.stack(images), torch.stack(labels)
