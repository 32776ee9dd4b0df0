"""Evaluation of a model on a dataset, for training and validation scripts."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cluster_zoo.features import eval_mode
from cluster_zoo.training.signals import StopRequest, keep_workers

from ..data.datasets import SegmentationDataset
from .inference import predict
from .metrics import SegmentationMetrics
from .overlays import OverlayWriter

__all__ = ['evaluate']

# Maximum number of images, in batches, that wait for others of the same size
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
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Computes the metrics of a model on a dataset, at the size of the labels.

    Images of equal size are batched. If the dataset returns an image in several sizes, the probabilities are averaged.
    The images are split between the processes and the metrics computed from all of them, so that they do not depend on
    the number of processes.

    Args:
        model: A `Segmenter` on the device, in evaluation mode during the call. It must not be wrapped in DDP, which
            waits for processes that have fewer batches.
        dataset: Returns (image, labels), or (tuple of the same image in several sizes, labels).
        device: Device of the model.
        autocast: Creates the context of the forward pass.
        protocol: Options of `inference.predict`, such as mode and flip (default: whole images).
        batch_size: Images, and windows, per forward pass.
        workers: Number of data loading processes; 0 loads in this process.
        rank: Index of this process.
        world_size: Number of processes. All of them must call this function.
        overlays: Draws some of the predictions.
        stop: Ends the evaluation early if a stop is requested.

    Returns:
        The metrics of `SegmentationMetrics.compute`; ``images``, the number of images; and ``images_per_second`` of all
        processes, which includes data loading but not the first batch (warm-up). Empty if a stop was requested.
    """
    metrics = SegmentationMetrics(
        len(dataset.classes), dataset.classes, dataset.ignore_index, device, distributed=world_size > 1
    )
    indices = range(rank, len(dataset), world_size)
    loader = DataLoader(dataset, batch_size=None, sampler=indices, num_workers=workers)
    keep_workers(loader)
    bar = tqdm(total=len(indices), desc='evaluate', leave=False, disable=rank > 0 or not sys.stderr.isatty())
    protocol = {'chunk': batch_size, **(protocol or {})}
    benchmark = torch.backends.cudnn.benchmark
    # Whole images have many sizes, and cuDNN would benchmark its kernels for each of them.
    torch.backends.cudnn.benchmark = benchmark and protocol.get('mode') == 'slide'
    start, timed_images = time.monotonic(), len(indices)
    try:
        with eval_mode(model), bar:
            for batch_indices, views, labels in _batches(zip(indices, loader), batch_size):
                if stop is not None and stop.received:  # the processes do not have equally many batches to agree after
                    break
                labels, size = labels.to(device), labels.shape[-2:]
                with autocast():
                    probabilities = (predict(model, images.to(device), size=size, **protocol) for images in views)
                    outputs = reduce(Tensor.add_, probabilities)
                predictions = outputs.argmax(1)  # the sum has the argmax of the mean
                metrics.update(predictions, labels, outputs)
                if overlays is not None:
                    for index, prediction in zip(batch_indices, predictions):
                        overlays(index, prediction)
                bar.update(len(batch_indices))
                if timed_images == len(indices) and len(batch_indices) < len(indices):  # after the first batch
                    start, timed_images = time.monotonic(), len(indices) - len(batch_indices)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    if stop is not None and stop.requested():
        return {}
    results = metrics.compute()
    speed = world_size * timed_images / (time.monotonic() - start)
    return results | dict(images=len(dataset), images_per_second=speed)


def _batches(
    samples: Iterable[tuple[int, tuple[Tensor | Sequence[Tensor], Tensor]]], batch_size: int
) -> Iterator[tuple[tuple[int, ...], list[Tensor], Tensor]]:
    """Batches samples of equal sizes: yields indices, images (one tensor per size) and labels."""

    def stack(samples: list[tuple[int, Sequence[Tensor], Tensor]]) -> tuple[tuple[int, ...], list[Tensor], Tensor]:
        indices, images, labels = zip(*samples)
        return indices, [torch.stack(views) for views in zip(*images)], torch.stack(labels)

    waiting: dict[tuple, list] = {}
    for index, (image, labels) in samples:
        views = [image] if isinstance(image, Tensor) else image
        key = (*(view.shape for view in views), labels.shape)
        waiting.setdefault(key, []).append((index, views, labels))
        if len(waiting[key]) < batch_size:
            if sum(map(len, waiting.values())) < _WAITING_BATCHES * batch_size:
                continue
            key = max(waiting, key=lambda key: len(waiting[key]))
        yield stack(waiting.pop(key))
    yield from map(stack, waiting.values())
