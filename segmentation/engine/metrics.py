"""Segmentation metrics: intersection over union and accuracy, per class and overall."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cluster_zoo.errors import OptionError

__all__ = ['SegmentationMetrics', 'confusion_matrix_class', 'table']


def confusion_matrix_class() -> type:
    """Returns torchmetrics' ``MulticlassConfusionMatrix``, or raises `OptionError` if torchmetrics is not installed."""
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ModuleNotFoundError as error:
        raise OptionError("Metrics need torchmetrics: pip install 'cluster_zoo[segmentation]'") from error
    return MulticlassConfusionMatrix


class SegmentationMetrics:
    """Accumulates the confusion matrix of all images and computes metrics from it.

    Args:
        num_classes: Number of classes K.
        classes: Names of the classes (default: their indices).
        ignore_index: Label of ignored pixels.
        device: Device of the confusion matrix.
        distributed: Sum over all processes. All of them must call `compute`.
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
            raise ValueError(f'{num_classes} classes need distinct names, got {len(set(self.classes))}')
        # The dataset checks its labels, and the validation of torchmetrics is slower than counting.
        confusion_class = confusion_matrix_class()  # raises an error without torchmetrics
        from torchmetrics import SumMetric

        self.confusion = confusion_class(
            num_classes, ignore_index=ignore_index, validate_args=False, sync_on_compute=distributed
        ).to(device)
        self.broken = SumMetric(sync_on_compute=distributed).to(device)  # number of outputs that are not finite

    def update(self, prediction: Tensor, labels: Tensor, outputs: Tensor | None = None) -> None:
        """Adds images.

        Args:
            prediction: Predicted classes [B, H, W], 0..K-1.
            labels: True classes [B, H, W], 0..K-1 or `ignore_index`.
            outputs: Outputs of the model that ``prediction`` is the argmax of. All metrics are NaN if one is not
                finite, because the argmax of NaN is class 0.
        """
        self.confusion.update(prediction, labels)
        if outputs is not None:
            self.broken.update((~outputs.isfinite()).sum())

    def compute(self) -> dict[str, Any]:
        """Computes the metrics of all images, in percent.

        Returns:
            ``mIoU`` (mean over classes that occur or are predicted), ``aAcc`` (pixel accuracy), ``mAcc`` (mean accuracy
            of the classes that occur), and dictionaries ``IoU`` and ``Acc`` by class name. Metrics without pixels are
            NaN, and are not part of the means. All of them are NaN if an output was not finite. ``confusion`` is the
            number of pixels by true and predicted class, K lists of K.
        """
        confusion = self.confusion.compute().cpu().reshape(len(self.classes), -1)  # a scalar for one class
        counts = confusion.double()
        if self.broken.compute() > 0:
            counts = torch.full_like(counts, math.nan)
        hits, true, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        iou, acc = 100 * hits / (true + predicted - hits), 100 * hits / true
        return dict(
            mIoU=iou.nanmean().item(),
            aAcc=(100 * hits.sum() / counts.sum()).item(),
            mAcc=acc.nanmean().item(),
            IoU=dict(zip(self.classes, iou.tolist())),
            Acc=dict(zip(self.classes, acc.tolist())),
            confusion=confusion.tolist(),
        )


def table(metrics: dict[str, Any]) -> str:
    """Formats metrics as text: a line per class, and a line with the means."""
    width = max(map(len, (*metrics['IoU'], 'class')))
    lines = [f'{"class":<{width}}  {"IoU":>6}  {"Acc":>6}']
    for name, iou in metrics['IoU'].items():
        cells = ('-' if math.isnan(value) else f'{value:.2f}' for value in (iou, metrics['Acc'][name]))
        lines.append(f'{name:<{width}}  ' + '  '.join(f'{cell:>6}' for cell in cells))
    return '\n'.join([*lines, f'mIoU {metrics["mIoU"]:.2f}  aAcc {metrics["aAcc"]:.2f}  mAcc {metrics["mAcc"]:.2f}'])
