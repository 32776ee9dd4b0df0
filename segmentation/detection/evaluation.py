"""Evaluation of a detector: average precision and recall of boxes and masks, overall, by size and by class."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cluster_zoo.errors import OptionError
from cluster_zoo.features import eval_mode
from cluster_zoo.training.signals import StopRequest, keep_workers

from .coco import CocoDataset, coco_backend

__all__ = ['average_precision', 'collate', 'evaluate', 'table']

# Names of the results and those of torchmetrics
_METRICS = {
    'AP': 'map',
    'AP50': 'map_50',
    'AP75': 'map_75',
    'AP_small': 'map_small',
    'AP_medium': 'map_medium',
    'AP_large': 'map_large',
}
_KINDS = {'bbox': 'box', 'segm': 'mask'}


def collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Batches samples as lists, because images and targets have different sizes."""
    images, targets = zip(*samples)
    return list(images), list(targets)


def average_precision(masks: bool) -> Any:
    """Returns torchmetrics' ``MeanAveragePrecision`` of boxes and, with ``masks``, of masks.

    Raises:
        OptionError: torchmetrics or a library for COCO is not installed.
    """
    backend, _ = coco_backend()
    try:
        from torchmetrics.detection import MeanAveragePrecision
    except ModuleNotFoundError as error:
        raise OptionError("Average precision needs torchmetrics: pip install 'cluster_zoo[detection]'") from error
    kinds = ('bbox', 'segm') if masks else ('bbox',)
    return MeanAveragePrecision(iou_type=kinds, class_metrics=True, backend=backend)


def evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    batch_size: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Computes the average precision of a detector on a dataset, of at most 100 detections per image.

    The images are split between the processes and the metrics computed from all of them.

    Args:
        model: A detector on the device, in evaluation mode during the call, not wrapped in DDP.
        dataset: Images in float32, 0 to 1, see `coco.eval_transform`. Masks are evaluated if it has them. Detections in
            its crowds do not count.
        device: Device of the model.
        autocast: Creates the context of the forward pass.
        batch_size: Images per forward pass.
        workers: Number of data loading processes; 0 loads in this process.
        rank: Index of this process.
        world_size: Number of processes, at most one for each image. All of them must call this function.
        stop: Ends the evaluation early if a stop is requested.

    Returns:
        In percent, of boxes, and of masks with ``mask`` in place of ``box``: ``box_AP`` (mean over IoU 0.5 to 0.95 and
        classes), ``box_AP50``, ``box_AP75``, ``box_AP_small`` (areas below 32^2 pixels), ``box_AP_medium``,
        ``box_AP_large`` (above 96^2), and ``box_AP_by_class``, a dictionary. NaN where there are no objects. Also
        ``images`` and ``images_per_second`` of all processes. Empty if a stop was requested.
    """
    metric = average_precision(dataset.masks).to(device)
    indices = range(rank, len(dataset), world_size)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=indices,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )
    keep_workers(loader)
    start = time.monotonic()
    with eval_mode(model), torch.inference_mode():
        for images, targets in tqdm(loader, 'evaluate', leave=False, disable=rank > 0 or not sys.stderr.isatty()):
            if stop is not None and stop.received:
                break
            with autocast():
                found = model([image.to(device) for image in images])
            metric.update([_detections(one) for one in found], [_to(target, device) for target in targets])
    if stop is not None and stop.requested():
        return {}
    speed = len(dataset) / (time.monotonic() - start)
    return _results(metric.compute(), dataset) | dict(images=len(dataset), images_per_second=speed)


def _detections(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detections for torchmetrics, whose masks are boolean [N, H, W]."""
    kept = {name: found[name].float() if name != 'labels' else found[name] for name in ('boxes', 'scores', 'labels')}
    return kept | (dict(masks=found['masks'][:, 0] >= 0.5) if 'masks' in found else {})


def _to(target: dict[str, Any], device: torch.device | str) -> dict[str, Tensor]:
    tensors = {name: value.to(device) for name, value in target.items() if isinstance(value, Tensor)}
    return tensors | (dict(masks=tensors['masks'].bool()) if 'masks' in tensors else {})


def _results(computed: dict[str, Tensor], dataset: CocoDataset) -> dict[str, Any]:
    kinds = [kind for kind in _KINDS if dataset.masks or kind == 'bbox']
    results: dict[str, Any] = {}
    for kind in kinds:
        prefix = f'{kind}_' if len(kinds) > 1 else ''  # as torchmetrics names them
        for name, theirs in _METRICS.items():
            results[f'{_KINDS[kind]}_{name}'] = _percent(computed[prefix + theirs].item())
        by_class = dict.fromkeys(dataset.classes, math.nan)
        labels, values = computed['classes'].reshape(-1).tolist(), computed[f'{prefix}map_per_class'].reshape(-1)
        by_class |= {dataset.classes[label - 1]: _percent(value) for label, value in zip(labels, values.tolist())}
        results[f'{_KINDS[kind]}_AP_by_class'] = by_class
    return results


def _percent(value: float) -> float:
    return math.nan if value < 0 else 100 * value  # -1: no objects


def table(metrics: dict[str, Any]) -> str:
    """Formats metrics as text: a line for each class, then the means of boxes and of masks."""
    kinds = [kind for kind in _KINDS.values() if f'{kind}_AP' in metrics]
    rows = {name: [metrics[f'{kind}_AP_by_class'][name] for kind in kinds] for name in metrics['box_AP_by_class']}
    width = max(map(len, (*rows, 'class')))
    lines = [f'{"class":<{width}}' + ''.join(f'  {kind + " AP":>7}' for kind in kinds)]
    lines += [f'{name:<{width}}' + ''.join(f'  {_cell(value):>7}' for value in values) for name, values in rows.items()]
    for kind in kinds:
        lines.append('  '.join(f'{kind}_{name} {_cell(metrics[f"{kind}_{name}"])}' for name in _METRICS))
    return '\n'.join(lines)


def _cell(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.2f}'
