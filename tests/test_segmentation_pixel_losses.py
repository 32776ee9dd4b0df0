"""Losses of ``--loss`` and ``--class-weights``, compared with loops over pixels in float64."""

import builtins
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cluster_zoo.errors import OptionError
from segmentation.data.datasets import create_dataset
from segmentation.engine.build import build_loss
from segmentation.engine.losses import LOSSES, PixelLoss, cross_entropy, hard_cross_entropy
from segmentation.engine.train_options import train_parser

smp = pytest.importorskip('segmentation_models_pytorch')

B, K, H, W = 2, 3, 4, 5
WEIGHTS = (0.5, 1.0, 4.0)


@pytest.fixture
def logits():
    return 2 * torch.randn(B, K, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    labels = torch.randint(K, (B, H, W), generator=torch.Generator().manual_seed(1))
    labels[0, :2] = 255
    return labels


def pixels(logits, labels):
    """Yields the class and the probabilities of each labeled pixel."""
    for b, y, x in itertools.product(range(B), range(H), range(W)):
        if (label := int(labels[b, y, x])) != 255:
            exps = [math.exp(value) for value in logits[b, :, y, x].tolist()]
            yield label, [value / sum(exps) for value in exps], logits[b, :, y, x].tolist()


def plain_ohem(logits, labels, weights, threshold, least):
    found = sorted((p[label], label) for label, p, _ in pixels(logits, labels))
    count = max(sum(p < threshold for p, _ in found), math.ceil(least * len(found)))
    kept = found[:count]
    return sum(-weights[label] * math.log(p) for p, label in kept) / sum(weights[label] for _, label in kept)


def plain_focal(logits, labels, weights, gamma):
    """The mean over pixels for each class of the focal loss of a binary decision; the weighted mean over classes."""
    losses = []
    for k in range(K):
        terms = []
        for label, _, values in pixels(logits, labels):
            p = 1 / (1 + math.exp(-values[k]))
            right = p if label == k else 1 - p
            terms.append(-((1 - right) ** gamma) * math.log(right))
        losses.append(sum(terms) / len(terms))
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)


def plain_tversky(logits, labels, weights, alpha, beta):
    losses = []
    for k in range(K):
        both = sum(p[k] for label, p, _ in pixels(logits, labels) if label == k)
        false_positives = sum(p[k] for label, p, _ in pixels(logits, labels) if label != k)
        false_negatives = sum(1 - p[k] for label, p, _ in pixels(logits, labels) if label == k)
        losses.append(1 - both / (both + alpha * false_positives + beta * false_negatives))
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)


def plain_lovasz(logits, labels):
    """Sums, over the pixels by falling error, what each wrong pixel takes from the intersection over union."""
    losses = []
    for k in range(K):
        errors = [(1 - p[k] if label == k else p[k], label == k) for label, p, _ in pixels(logits, labels)]
        errors.sort(reverse=True)
        size = sum(inside for _, inside in errors)
        total = before = missed = extra = 0.0
        for error, inside in errors:
            missed, extra = missed + inside, extra + (not inside)
            jaccard = 1 - (size - missed) / (size + extra)
            total, before = total + error * (jaccard - before), jaccard
        losses.append(total)
    return sum(losses) / len(losses)


@pytest.mark.parametrize('weights', [None, WEIGHTS])
def test_losses_equal_loops(logits, labels, weights):
    w = weights or (1.0,) * K
    plain = {
        'ce': plain_ohem(logits, labels, w, 1.0, 1.0),
        'ohem': plain_ohem(logits, labels, w, 0.7, 1 / 16),
        'focal': plain_focal(logits, labels, w, 3.0),
        'lovasz': plain_lovasz(logits, labels),
        'tversky': plain_tversky(logits, labels, w, 0.3, 0.7),
    }
    assert set(plain) == set(LOSSES)
    for name, expected in plain.items():
        loss = PixelLoss([name], weights, focal_gamma=3.0, tversky_weights=(0.3, 0.7))
        assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-5), name
    both = PixelLoss(['ce', 'lovasz'], weights)(logits, labels).item()
    assert both == pytest.approx(plain['ce'] + plain['lovasz'], rel=1e-5)


@pytest.mark.parametrize(('threshold', 'least'), [(0.3, 0.0), (0.3, 0.5), (0.01, 0.25), (1.0, 0.0)])
def test_hard_pixels(logits, labels, threshold, least):
    expected = plain_ohem(logits, labels, (1.0,) * K, threshold, max(least, 1e-9))  # at least one pixel
    assert hard_cross_entropy(logits, labels, threshold=threshold, least=least).item() == pytest.approx(expected)


def test_weighted_cross_entropy_equals_torch(logits, labels):
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels, weight, ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, labels, weight=weight), expected)
    assert torch.autograd.gradcheck(lambda x: hard_cross_entropy(x, labels, weight=weight), logits.requires_grad_())


@pytest.mark.parametrize('name', LOSSES)
def test_batch_without_labels(name, logits):
    logits.requires_grad_()
    value = PixelLoss([name], WEIGHTS)(logits, torch.full((B, H, W), 255))
    value.backward()
    assert value.shape == () and value == 0 and not logits.grad.any()


@pytest.mark.parametrize('name', LOSSES)
def test_half_precision(name, labels):
    logits = torch.randn(B, K, H, W, generator=torch.Generator().manual_seed(2)).bfloat16()
    value = PixelLoss([name], WEIGHTS)(logits, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(PixelLoss([name], WEIGHTS)(logits.double(), labels).item(), rel=1e-4)


def test_library_is_not_installed(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith('segmentation_models_pytorch'):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    PixelLoss(['ce', 'ohem'])
    with pytest.raises(OptionError, match=r"pip install 'cluster_zoo\[segmentation\]'"):
        PixelLoss(['ce', 'lovasz'])
    with pytest.raises(OptionError, match="no loss 'dice'"):
        PixelLoss(['dice'])


# ---- Options ----


@pytest.fixture
def data(tmp_path):
    """One image each for training and validation; classes 0, 1, 2 and ignored pixels as 10 : 5 : 0 : 5."""
    for split in ('train', 'val'):
        for folder in ('images', 'masks'):
            (tmp_path / split / folder).mkdir(parents=True)
        Image.new('RGB', (5, 4)).save(tmp_path / split / 'images' / 'a.png')
        mask = np.repeat(np.array([0, 0, 1, 255], np.uint8), 5).reshape(4, 5)
        Image.fromarray(mask).save(tmp_path / split / 'masks' / 'a.png')
    return tmp_path


def loss_of(data, *flags):
    args = train_parser().resolve([str(data), *map(str, flags)])
    args.distributed, args.rank, args.workers = False, 0, 1
    return build_loss(args, create_dataset('folder', data, 'train', num_classes=3))


def test_class_weights(data):
    # 15 labeled pixels, 3 classes: 15 / (3 * 10), 15 / (3 * 5), and 1 for the class that does not occur
    assert loss_of(data, '--class-weights', 'balanced').class_weights.tolist() == [0.5, 1.0, 1.0]
    assert loss_of(data, '--class-weights', 2, 0.25, 1).class_weights.tolist() == [2.0, 0.25, 1.0]
    loss = loss_of(data)
    assert loss.class_weights is None and loss.names == ('ce',)
    loss = loss_of(data, '--loss', 'focal', 'tversky', '--focal-gamma', 1, '--tversky-weights', 0.3, 0.7)
    assert (loss.names, loss.library['tversky'].beta) == (('focal', 'tversky'), 0.7)


def test_options_of_a_file(data, tmp_path):
    (tmp_path / 'run.yaml').write_text('loss: [ohem]\nclass_weights: [balanced]\n')
    loss = loss_of(data, '--config', tmp_path / 'run.yaml')
    assert loss.names == ('ohem',) and loss.class_weights is not None


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--loss', 'dice'], 'dice'),
        (['--loss', 'ce', 'ce'], 'name each loss once'),
        (['--loss', 'ohem', 'ce'], 'name one of them'),
        (['--loss', 'lovasz', '--class-weights', 'balanced'], 'lovasz has no class weights'),
        (['--class-weights', 'balance'], '--class-weights takes balanced, or a number above 0'),
        (['--class-weights', 1, 0, 1], '--class-weights takes balanced, or a number above 0'),
        (['--class-weights', 1, 'nan', 1], '--class-weights takes balanced, or a number above 0'),
        (['--class-weights', 1, 2], 'has 2 numbers, but there are 3 classes'),
        (['--focal-gamma', 1], '--focal-gamma needs --loss focal'),
        (['--loss', 'focal', '--focal-gamma', -1], '--focal-gamma must be at least 0'),
        (['--tversky-weights', 1, 1], '--tversky-weights needs --loss tversky'),
        (['--loss', 'tversky', '--tversky-weights', 0, 0], '--tversky-weights must be at least 0, and one above 0'),
        (['--loss', 'tversky', '--tversky-weights', -1, 2], '--tversky-weights must be at least 0'),
    ],
)
def test_invalid_options(data, flags, message, capsys):
    with pytest.raises((OptionError, SystemExit)) as error:
        loss_of(data, *flags)
    lines = capsys.readouterr().err.splitlines() or [str(error.value)]
    assert [message in line for line in lines].count(True) == 1 and len(lines) <= 3 and '\n' not in lines[0]
