"""Segmentation metrics, compared with a loop and with values by hand, and in several processes."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from segmentation.engine.metrics import SegmentationMetrics, table

ROOT = Path(__file__).parents[1]


def loop_metrics(prediction, labels, num_classes, ignore):
    """Counts pixel by pixel."""
    hits, true, predicted = ([0] * num_classes for _ in range(3))
    for p, t in zip(prediction.flatten().tolist(), labels.flatten().tolist()):
        if t == ignore:
            continue
        true[t] += 1
        predicted[p] += 1
        hits[t] += p == t
    iou = {k: 100 * hits[k] / (true[k] + predicted[k] - hits[k]) for k in range(num_classes) if true[k] + predicted[k]}
    acc = {k: 100 * hits[k] / true[k] for k in range(num_classes) if true[k]}
    mean = [sum(values.values()) / len(values) for values in (iou, acc)]
    return iou, acc, mean[0], 100 * sum(hits) / sum(true), mean[1]


@pytest.mark.parametrize('ignore', [255, 2])
def test_metrics_equal_loop(ignore):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 5, (6, 9, 11), generator=generator)
    labels = torch.where(torch.rand(6, 9, 11, generator=generator) < 0.6, prediction, prediction.roll(3, 2))
    labels[torch.rand(6, 9, 11, generator=generator) < 0.2] = ignore
    metrics = SegmentationMetrics(5, 'abcde', ignore_index=ignore)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metrics.update(prediction[part], labels[part])
    found = metrics.compute()
    iou, acc, miou, aacc, macc = loop_metrics(prediction, labels, 5, ignore)
    assert (found['mIoU'], found['aAcc'], found['mAcc']) == pytest.approx((miou, aacc, macc))
    for number, name in enumerate('abcde'):
        assert found['IoU'][name] == pytest.approx(iou.get(number, math.nan), nan_ok=True)
        assert found['Acc'][name] == pytest.approx(acc.get(number, math.nan), nan_ok=True)


def by_hand():
    #      sky  sky  road road   sky  car*      * predicted, not true; no tree
    true = [0, 0, 1, 1, 0, 1, 255]
    predicted = [0, 0, 1, 1, 1, 2, 2]
    metrics = SegmentationMetrics(4, ['sky', 'road', 'car', 'tree'])
    metrics.update(torch.tensor([[predicted]]), torch.tensor([[true]]))
    return metrics.compute()


def test_metrics_by_hand():
    found = by_hand()
    assert found['IoU'] == pytest.approx(dict(sky=200 / 3, road=50, car=0, tree=math.nan), nan_ok=True)
    assert found['Acc'] == pytest.approx(dict(sky=200 / 3, road=200 / 3, car=math.nan, tree=math.nan), nan_ok=True)
    # car is predicted only: it has an IoU of 0 and no accuracy; tree has neither
    assert found['mIoU'] == pytest.approx((200 / 3 + 50 + 0) / 3)
    assert found['mAcc'] == pytest.approx(200 / 3)
    assert found['aAcc'] == pytest.approx(400 / 6)
    assert found['confusion'] == [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_table():
    lines = table(by_hand()).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ['class', 'IoU', 'Acc'],
        ['sky', '66.67', '66.67'],
        ['road', '50.00', '66.67'],
        ['car', '0.00', '-'],
        ['tree', '-', '-'],
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5:] == ['mIoU 38.89  aAcc 66.67  mAcc 66.67']


def test_perfect_and_all_wrong():
    labels = torch.tensor([[[0, 1], [1, 255]]])
    for prediction, expected in ((labels.clamp(max=1), 100), (1 - labels.clamp(max=1), 0)):
        metrics = SegmentationMetrics(2)
        metrics.update(prediction, labels)
        found = metrics.compute()
        assert (found['mIoU'], found['aAcc'], found['mAcc']) == (expected,) * 3
        assert found['IoU'] == {'0': expected, '1': expected}


def test_only_ignored_pixels():
    metrics = SegmentationMetrics(2)
    metrics.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), 255))
    found = metrics.compute()
    assert all(math.isnan(found[name]) for name in ('mIoU', 'aAcc', 'mAcc'))


def test_counts_are_exact():
    """Float32 is not exact above 2^24."""
    metrics = SegmentationMetrics(2)
    labels = torch.zeros(1, 4096, 4097, dtype=torch.long)
    prediction = labels.clone()
    prediction[0, 0, 0] = 1
    metrics.update(prediction, labels)
    assert metrics.compute()['aAcc'] == 100 * (1 - 1 / labels.numel())


@pytest.mark.parametrize('names', [['a'], ['a', 'b', 'b'], ['a', 'b', 'c', 'd']])
def test_invalid_class_names(names):
    with pytest.raises(ValueError, match='3 classes'):
        SegmentationMetrics(3, names)


def _share(rank, world, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    metrics = SegmentationMetrics(3, distributed=True)
    generator = torch.Generator().manual_seed(0)
    prediction, labels = torch.randint(0, 3, (2, 5, 8, 8), generator=generator)
    metrics.update(prediction[rank::world], labels[rank::world])
    torch.save(metrics.compute(), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_metrics_of_all_processes(tmp_path):
    run_processes(_share, 2, str(tmp_path))
    prediction, labels = torch.randint(0, 3, (2, 5, 8, 8), generator=torch.Generator().manual_seed(0))
    metrics = SegmentationMetrics(3)
    metrics.update(prediction, labels)
    assert torch.load(tmp_path / '0.pt') == torch.load(tmp_path / '1.pt') == metrics.compute()


def test_one_class():
    metrics = SegmentationMetrics(1)
    metrics.update(torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([[[0, 0, 255], [0, 255, 255]]]))
    assert metrics.compute() == dict(
        mIoU=100.0, aAcc=100.0, mAcc=100.0, IoU={'0': 100.0}, Acc={'0': 100.0}, confusion=[[3]]
    )


def test_error_without_torchmetrics():
    """The scripts say so before they do anything else, in one line."""
    script = "import sys; sys.modules['torchmetrics.classification'] = None; from segmentation import train, validate;"
    script += (
        "print([script.main(['data', '--head', 'fcn', '--backbone', 'resnet18']) for script in (train, validate)])"
    )
    run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == '[2, 2]\n'
    lines = run.stderr.splitlines()
    assert len(lines) == 2 and len(set(lines)) == 1 and lines[0].startswith('error: ')
    assert "pip install 'cluster_zoo[segmentation]'" in lines[0]
