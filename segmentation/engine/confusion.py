"""Files about the errors of a model: the confusion matrix and the metrics of each class."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cluster_zoo.errors import OptionError
from cluster_zoo.files import replacing
from cluster_zoo.training.files import write_csv

__all__ = ['check_matplotlib', 'draw_confusion', 'write_tables']

_MAX_NUMBERS = 30  # classes of a picture that has numbers in its cells


def write_tables(folder: str | Path, metrics: dict[str, Any]) -> None:
    """Writes ``confusion.csv`` and ``classes.csv``.

    ``confusion.csv`` has a row for each true class, a column for each predicted class, and numbers of pixels.
    ``classes.csv`` has IoU and accuracy in percent, and the true and predicted pixels; metrics without pixels are
    empty.

    Args:
        folder: An existing folder.
        metrics: See `SegmentationMetrics.compute`.

    Raises:
        RunError: A file cannot be written.
    """
    counts, names = torch.tensor(metrics['confusion']), list(metrics['IoU'])
    rows = [{'': name, **dict(zip(names, row))} for name, row in zip(names, counts.tolist())]
    write_csv(Path(folder) / 'confusion.csv', rows)
    rows = []
    for name, pixels, predicted in zip(names, counts.sum(1).tolist(), counts.sum(0).tolist()):
        values = dict(IoU=metrics['IoU'][name], accuracy=metrics['Acc'][name])
        values = {key: '' if math.isnan(value) else round(value, 4) for key, value in values.items()}
        rows.append({'class': name, **values, 'pixels': pixels, 'predicted_pixels': predicted})
    write_csv(Path(folder) / 'classes.csv', rows)


def check_matplotlib() -> None:
    """Raises `OptionError` if matplotlib, which draws the confusion matrix, is not installed."""
    if find_spec('matplotlib') is None:
        raise OptionError("The confusion matrix needs matplotlib: pip install 'cluster_zoo[segmentation]'")


def draw_confusion(path: str | Path, counts: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Draws the confusion matrix in percent of the pixels of each true class.

    Args:
        path: PNG file to write.
        counts: Pixels by true and predicted class, K lists of K.
        classes: Names of the K classes.

    Raises:
        OptionError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from torchmetrics.utilities.plot import plot_confusion_matrix

    numbers = len(classes) <= _MAX_NUMBERS
    side = 3 + len(classes) * (0.6 if numbers else 0.2)  # inches
    axes = Figure(figsize=(side, side), layout='constrained').subplots()
    counts = torch.tensor(counts)
    percent = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).round().long()
    figure, _ = plot_confusion_matrix(percent, axes, numbers, list(classes), cmap='Blues')
    axes.set_xticks(axes.get_xticks(), classes, rotation=90)
    axes.set_yticks(axes.get_yticks(), classes, rotation=0)
    axes.set_title('Percent of the pixels of each true class')
    with replacing(Path(path)) as scratch:
        figure.savefig(scratch, format='png')
