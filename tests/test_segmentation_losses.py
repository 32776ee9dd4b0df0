"""Losses of dense prediction, compared with loops over pixels in float64."""

import math

import pytest
import torch

from segmentation.engine.losses import cross_entropy, dice_loss

B, K, H, W = 2, 3, 4, 5


@pytest.fixture
def logits():
    return torch.randn(B, K, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    labels = torch.randint(K, (B, H, W), generator=torch.Generator().manual_seed(1))
    labels[0, :2] = 255
    labels[1][labels[1] == 2] = 0  # class 2 does not occur in this image
    return labels


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def plain_dice(logits: torch.Tensor, labels: torch.Tensor, smooth: float) -> float:
    losses = []
    for image in range(B):
        for k in range(K):
            overlap = predicted = true = 0.0
            for y in range(H):
                for x in range(W):
                    p = softmax(logits[image, :, y, x].tolist())[k]
                    t = float(min(labels[image, y, x], K - 1) == k)  # as in the authors' code, for ignored pixels too
                    valid = float(labels[image, y, x] != 255)
                    overlap += p * t * valid
                    predicted += p**2
                    true += t**2
            losses.append(1 - (2 * overlap + smooth) / (predicted + true + smooth))
    return sum(losses) / len(losses)


@pytest.mark.parametrize('smooth', [1e-5, 1.0])
def test_dice_equals_loop(logits, labels, smooth):
    expected = plain_dice(logits, labels, smooth)
    assert dice_loss(logits, labels, smooth=smooth).item() == pytest.approx(expected, rel=1e-12)


def test_dice_by_hand():
    """One of two classes fills the image and is predicted, or not, with certainty."""
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    sure = torch.tensor([50.0, -50.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    # Predicted: 1 - (2 * 4) / (4 + 4), and 1 - smooth / smooth for the other class
    assert dice_loss(sure, labels).item() == pytest.approx(0, abs=1e-6)
    # Not predicted: 1 - smooth / 4 for both classes
    assert dice_loss(-sure, labels).item() == pytest.approx(1, abs=1e-5)


def test_dice_with_another_ignore_index(logits, labels):
    other = torch.where(labels == 255, 7, labels)
    assert torch.equal(dice_loss(logits, other, ignore_index=7), dice_loss(logits, labels))


def test_cross_entropy_equals_loop(logits, labels):
    losses = [
        -math.log(softmax(logits[image, :, y, x].tolist())[labels[image, y, x]])
        for image in range(B)
        for y in range(H)
        for x in range(W)
        if labels[image, y, x] != 255
    ]
    assert cross_entropy(logits, labels).item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize('loss', [cross_entropy, dice_loss])
def test_batch_without_labels(loss, logits):
    logits.requires_grad_()
    value = loss(logits, torch.full((B, H, W), 255))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
    if loss is cross_entropy:
        assert value == 0 and not logits.grad.any()


@pytest.mark.parametrize('loss', [cross_entropy, dice_loss])
def test_half_precision_is_accumulated_in_float32(loss, labels):
    """Sums 4096 pixel losses of about 1; bfloat16 has integers up to 256 only."""
    logits = torch.zeros(1, K, 64, 64, dtype=torch.bfloat16)
    labels = torch.arange(64 * 64).reshape(1, 64, 64) % K
    value = loss(logits, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(logits.double(), labels).item(), rel=1e-5)


@pytest.mark.parametrize('loss', [cross_entropy, dice_loss])
def test_gradients(loss, logits, labels):
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())
