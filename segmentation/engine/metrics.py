"""How well predictions agree with labels: intersection over union and accuracy, of classes and overall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from torchmetrics.classification import MulticlassConfusionMatrix
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Measuring needs torchmetrics: pip install 'cluster_zoo[segmentation]'") from error

__all__ = ['SegmentationMetrics']


class SegmentationMetrics:
    """Counts pixels by true and predicted class, over all images of a dataset, and then divides.

    Args:
        num_classes: Number of classes, K.
        classes: Their names (default: their numbers).
        ignore_index: Label of the pixels that do not count.
        device: Where to count.
        distributed: Add up the counts of all processes; then all have to call :meth:`compute`.
    """

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        ignore_index: int = 255,
        device: torch.device | str = 'cpu',
        distributed: bool = False,
    ) -> None:
        self.classes = list(map(str, range(num_classes) if classes is None else classes))
        if len(set(self.classes)) != num_classes:
            raise ValueError(f'{num_classes} classes have {len(set(self.classes))} different names')
        # The dataset has checked its labels; torchmetrics' own check of every batch takes longer than counting.
        self.confusion = MulticlassConfusionMatrix(
            num_classes, ignore_index=ignore_index, validate_args=False, sync_on_compute=distributed
        ).to(device)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Adds images.

        Args:
            prediction: Predicted classes [B, H, W], 0..K-1.
            labels: True classes [B, H, W], 0..K-1 or `ignore_index`.
        """
        self.confusion.update(prediction, labels)

    def compute(self) -> dict[str, Any]:
        """The figures of all images so far, in percent.

        Returns:
            ``mIoU`` (mean over the classes that occur or are predicted), ``aAcc`` (accuracy of pixels), ``mAcc`` (mean
            accuracy of the classes that occur), and ``IoU`` and ``Acc`` of each class by its name. A figure without
            pixels to compute it from is nan, and left out of the means.
        """
        counts = self.confusion.compute().double().cpu().reshape(len(self.classes), -1)  # one class has no axes
        hits, true, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        iou, acc = 100 * hits / (true + predicted - hits), 100 * hits / true
        return dict(
            mIoU=iou.nanmean().item(),
            aAcc=(100 * hits.sum() / counts.sum()).item(),
            mAcc=acc.nanmean().item(),
            IoU=dict(zip(self.classes, iou.tolist())),
            Acc=dict(zip(self.classes, acc.tolist())),
        )


def table(metrics: dict[str, Any]) -> str:
    """The figures of each class as lines of text, and those over all classes below."""
    width = max(map(len, (*metrics['IoU'], 'class')))
    rows = [(name, iou, metrics['Acc'][name]) for name, iou in metrics['IoU'].items()]
    lines = [f'{"class":<{width}}  {"IoU":>6}  {"Acc":>6}']
    lines += [f'{name:<{width}}  {_figure(iou)}  {_figure(acc)}' for name, iou, acc in rows]
    return '\n'.join([*lines, f'mIoU {metrics["mIoU"]:.2f}  aAcc {metrics["aAcc"]:.2f}  mAcc {metrics["mAcc"]:.2f}'])


def _figure(value: float) -> str:
    return f'{"-" if math.isnan(value) else f"{value:.2f}":>6}'
