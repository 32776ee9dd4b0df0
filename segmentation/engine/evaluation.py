"""A model's figures on a dataset: what both scripts run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.datasets import SegmentationDataset
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

    Images of equal size go through the model together. Where the dataset gives an image in several sizes, their
    probabilities are averaged. Each process takes its share of the images; the pixels of all are counted together, so
    that the figures do not depend on how many processes there are.

    Args:
        model: A `Segmenter`, on the device. It is put into evaluation mode for as long as this takes.
        dataset: Images, as the model wants them, with their labels; or the same image in several sizes, as a tuple.
        device: Where to predict and to count.
        autocast: Makes the context to predict in.
        protocol: Options of `inference.predict`, such as mode and flip (default: whole images).
        batch_size: Images, and windows, that go through the model together.
        workers: Processes that load images; 0: this one does.
        rank: Number of this process, from 0.
        world_size: How many processes take part. All of them have to call this.
        overlays: Draws a few of the predictions.

    Returns:
        What `SegmentationMetrics.compute` returns, of all processes; ``images``, their number;
        and ``images_per_second``, of all processes, with loading, without the first batch, which warms up.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # it would wait, with each batch, for processes that have fewer
    metrics = SegmentationMetrics(
        len(dataset.classes), dataset.classes, dataset.ignore_index, device, distributed=world_size > 1
    )
    indices = range(rank, len(dataset), world_size)
    loader = DataLoader(dataset, batch_size=None, sampler=indices, num_workers=workers)
    bar = tqdm(total=len(indices), desc='evaluate', leave=False, disable=rank > 0 or not sys.stderr.isatty())
    protocol = {'chunk': batch_size, **(protocol or {})}
    training, tuning = model.training, torch.backends.cudnn.benchmark
    model.eval()
    # Whole images come in many sizes, and for each of them cuDNN would try its kernels anew
    torch.backends.cudnn.benchmark = tuning and protocol.get('mode') == 'slide'
    start, counted, first = time.monotonic(), len(indices), True
    try:
        for chosen, views, labels in _batches(zip(indices, loader), batch_size):
            labels, size = labels.to(device), labels.shape[-2:]
            with autocast():
                each = (predict(model, images.to(device), size=size, **protocol) for images in views)
                predictions = reduce(Tensor.add_, each).argmax(1)  # the largest mean is the largest sum
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
        torch.backends.cudnn.benchmark = tuning
    figures = metrics.compute()
    elapsed = time.monotonic() - start
    return figures | dict(images=len(dataset), images_per_second=world_size * counted / elapsed)


def _batches(
    samples: Iterable[tuple[int, tuple[Tensor | Sequence[Tensor], Tensor]]],
    batch_size: int,
) -> Iterator[tuple[list[int], list[Tensor], Tensor]]:
    """Indices, images (one tensor a size) and labels, `batch_size` of equal sizes together, as they get complete."""
    waiting: dict[tuple, list] = {}
    for index, (image, labels) in samples:
        views = [image] if isinstance(image, Tensor) else image
        key = (*(view.shape for view in views), labels.shape)
        waiting.setdefault(key, []).append((index, views, labels))
        if len(waiting[key]) < batch_size:
            if sum(map(len, waiting.values())) < _WAITING_BATCHES * batch_size:
                continue
            key = max(waiting, key=lambda key: len(waiting[key]))
        yield _stacked(waiting.pop(key))
    yield from map(_stacked, waiting.values())


def _stacked(samples: list[tuple[int, Sequence[Tensor], Tensor]]) -> tuple[list[int], list[Tensor], Tensor]:
    indices, images, labels = zip(*samples)
    return list(indices), [torch.stack(views) for views in zip(*images)], torch.stack(labels)
