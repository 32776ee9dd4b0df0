"""Losses of dense prediction: cross-entropy over labeled pixels, and the Dice loss of CondNet's guidance logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['cross_entropy', 'dice_loss']


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Computes the mean cross-entropy over labeled pixels, in float32 or higher precision.

    mmsegmentation divides by the number of all pixels instead, so that its loss depends on the fraction of ignored
    pixels in a batch.

    Args:
        logits: [B, K, H, W].
        labels: int64 [B, H, W], values 0 .. K - 1 or ``ignore_index``.
        ignore_index: Label of ignored pixels.

    Returns:
        A scalar; 0 if no pixel is labeled, where PyTorch's mean is NaN.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction='sum')
    return total / (labels != ignore_index).sum().clamp_min(1)


def dice_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255, smooth: float = 1e-5) -> Tensor:
    """Computes the Dice loss of the guidance logits, the mean over classes and images (CondNet, section III).

    With probabilities p and one-hot labels t, the loss of a class in an image is
    ``1 - (2 sum(p t valid) + smooth) / (sum(p^2) + sum(t^2) + smooth)``. Ignored pixels are not valid. As in the
    authors' code they count in the denominator, with t of the last class, because labels are clamped to 0 .. K - 1.

    Args:
        logits: Guidance logits [B, K, h, w].
        labels: int64 [B, h, w], values 0 .. K - 1 or ``ignore_index``.
        ignore_index: Label of ignored pixels.
        smooth: Added to numerator and denominator.

    Returns:
        A scalar, 0 .. 1, in float32 or higher precision.
    """
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    valid = (labels != ignore_index).unsqueeze(1)
    t = torch.zeros_like(p).scatter_(1, labels.unsqueeze(1).clamp(0, p.shape[1] - 1), 1.0)
    overlap = (p * t * valid).sum(dim=(2, 3))
    total = p.square().sum(dim=(2, 3)) + t.sum(dim=(2, 3))  # t^2 = t
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()
