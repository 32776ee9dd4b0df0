"""confusion.csv, classes.csv and the picture of the confusion matrix."""

import csv
import importlib.util
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cluster_zoo.errors import OptionError, RunError
from segmentation.engine import confusion
from segmentation.engine.metrics import SegmentationMetrics

CLASSES = ['sky', 'road, wet', 'car', 'tree']


@pytest.fixture
def metrics():
    """By hand: of four pixels of the sky one is road; of three of the road one is a car; no car, no tree."""
    metrics = SegmentationMetrics(4, CLASSES)
    true, predicted = [0, 0, 0, 0, 1, 1, 1, 255], [0, 0, 0, 1, 1, 1, 2, 3]
    metrics.update(torch.tensor([[predicted]]), torch.tensor([[true]]))
    return metrics.compute()


def read(path):
    with path.open(newline='') as file:
        return list(csv.reader(file))


def test_tables(metrics, tmp_path):
    confusion.write_tables(tmp_path, metrics)
    assert read(tmp_path / 'confusion.csv') == [
        ['', *CLASSES],
        ['sky', '3', '1', '0', '0'],
        ['road, wet', '0', '2', '1', '0'],
        ['car', '0', '0', '0', '0'],
        ['tree', '0', '0', '0', '0'],
    ]
    assert read(tmp_path / 'classes.csv') == [
        ['class', 'IoU', 'accuracy', 'pixels', 'predicted_pixels'],
        ['sky', '75.0', '75.0', '4', '3'],
        ['road, wet', '50.0', '66.6667', '3', '3'],
        ['car', '0.0', '', '0', '1'],
        ['tree', '', '', '0', '0'],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['classes.csv', 'confusion.csv']


def test_outputs_that_are_not_finite_have_no_metrics(tmp_path):
    metrics = SegmentationMetrics(2, 'ab')
    metrics.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]), torch.tensor([math.nan]))
    confusion.write_tables(tmp_path, metrics.compute())
    assert read(tmp_path / 'classes.csv')[1:] == [['a', '', '', '1', '1'], ['b', '', '', '1', '1']]


def test_a_folder_that_does_not_exist(metrics, tmp_path):
    with pytest.raises(RunError, match='missing'):
        confusion.write_tables(tmp_path / 'missing', metrics)


@pytest.mark.parametrize('count', [1, 4, 40])
def test_picture(tmp_path, count):
    """The cells of a diagonal matrix are dark on the diagonal only."""
    path = tmp_path / 'confusion.png'
    confusion.draw_confusion(
        path, (10**12 * torch.eye(count, dtype=torch.int64)).tolist(), [f'class {i}' for i in range(count)]
    )
    with Image.open(path) as picture:
        assert picture.format == 'PNG' and min(picture.size) > 300
        pixels = np.asarray(picture.convert('RGB'))
    dark = ((pixels[..., 0] < 60) & (pixels[..., 2] > 60)).sum()
    assert (dark > 0) == (count > 1)  # a single cell has no range of colors
    assert [path.name for path in tmp_path.iterdir()] == ['confusion.png']


def test_without_matplotlib(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(confusion, 'find_spec', lambda name: None if name == 'matplotlib' else find(name))
    with pytest.raises(OptionError, match=r"pip install 'cluster_zoo\[segmentation\]'"):
        confusion.draw_confusion(tmp_path / 'a.png', [[1, 0], [0, 1]], ['a', 'b'])
