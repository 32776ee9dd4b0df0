"""Losses of dense prediction: cross-entropy over labelled pixels, and the Dice loss that guides CondNet."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['cross_entropy', 'dice_loss']


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the labelled pixels, in float32 at least.

    The authors' framework divides the sum by the number of all pixels, ignored ones included, so loss and gradient
    shrink with the share that padding and unlabelled regions take of a batch. This is the mean as PyTorch has it: what
    a labelled pixel costs, which can be compared between crops, batches and datasets.

    Args:
        logits: [B, K, H, W].
        labels: int64 [B, H, W], values 0 .. K - 1 or ``ignore_index``.
        ignore_index: Label of pixels that do not count.

    Returns:
        A scalar; 0 where no pixel is labelled, where a plain mean would be NaN and end the training.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction='sum')
    return total / (labels != ignore_index).sum().clamp_min(1)


def dice_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255, smooth: float = 1e-5) -> Tensor:
    """One minus how well probabilities p and labels t overlap, the mean over classes and images (CondNet, section III).

    For each class of each image, ``1 - (2 sum(p t valid) + smooth) / (sum(p^2) + sum(t^2) + smooth)`` over its pixels,
    in float32 at least. A pixel without a label is not valid. As published, it still counts in both sums below the
    line, with t of the last class: the authors' framework clamps labels to 0 .. K - 1.

    Args:
        logits: Guidance logits [B, K, h, w]; p is their softmax.
        labels: int64 [B, h, w], values 0 .. K - 1 or ``ignore_index``.
        ignore_index: Label of pixels without a class.
        smooth: Added to both sides of the fraction, so that a class that does not occur has a loss too.

    Returns:
        A scalar, 0 .. 1.
    """
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    valid = (labels != ignore_index).unsqueeze(1)
    t = torch.zeros_like(p).scatter_(1, labels.unsqueeze(1).clamp(0, p.shape[1] - 1), 1.0)
    overlap = (p * t * valid).sum(dim=(2, 3))
    total = p.square().sum(dim=(2, 3)) + t.sum(dim=(2, 3))  # t is 0 or 1, so its own square
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()
