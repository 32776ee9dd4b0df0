"""Losses of dense prediction: those of ``--loss``, and the Dice loss of CondNet's guidance logits.

Focal, Lovasz and Tversky losses are those of segmentation_models_pytorch.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cluster_zoo.errors import OptionError

__all__ = ['LOSSES', 'PixelLoss', 'cross_entropy', 'dice_loss', 'hard_cross_entropy']

LOSSES = ('ce', 'ohem', 'focal', 'lovasz', 'tversky')


class PixelLoss(nn.Module):
    """Sum of losses over labeled pixels, in float32; cross-entropy in float32 or higher precision.

    Args:
        names: ``'ce'`` is `cross_entropy`, ``'ohem'`` `hard_cross_entropy`; ``'focal'``, ``'lovasz'`` and ``'tversky'``
            are the multiclass losses of segmentation_models_pytorch. Its focal loss decides about each class by itself.
        class_weights: Weight of each class [K]. Lovasz has none.
        focal_gamma: Exponent of the focal loss, at least 0.
        tversky_weights: Weights of false positives and false negatives; (0.5, 0.5) is the Dice loss.
        ignore_index: Label of ignored pixels.

    Raises:
        OptionError: A name is unknown or segmentation_models_pytorch is not installed.
    """

    def __init__(
        self,
        names: Sequence[str] = ('ce',),
        class_weights: Sequence[float] | None = None,
        focal_gamma: float = 2.0,
        tversky_weights: tuple[float, float] = (0.5, 0.5),
        ignore_index: int = 255,
    ):
        super().__init__()
        if unknown := [name for name in names if name not in LOSSES]:
            raise OptionError(f'There is no loss {unknown[0]!r}: choose (--loss) from {", ".join(LOSSES)}.')
        self.names = tuple(names)
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer('class_weights', weights, persistent=False)
        alpha, beta = tversky_weights
        options = dict(
            focal=dict(gamma=focal_gamma, class_weights=weights),
            lovasz={},
            tversky=dict(alpha=alpha, beta=beta, class_weights=weights),
        )
        self.library = nn.ModuleDict()
        for name in {*names} & {*options}:
            loss_class = getattr(_library_losses(), f'{name.capitalize()}Loss')
            self.library[name] = loss_class('multiclass', ignore_index=ignore_index, **options[name])

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the sum of the losses.

        Args:
            logits: [B, K, H, W].
            labels: int64 [B, H, W], values 0 .. K - 1 or ``ignore_index``.

        Returns:
            A scalar; 0 if no pixel is labeled.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = logits.new_zeros(())
        for name in self.names:
            if name not in self.library:
                function = cross_entropy if name == 'ce' else hard_cross_entropy
                total = total + function(logits, labels, self.ignore_index, self.class_weights)
            elif (labels != self.ignore_index).any():
                total = total + self.library[name](logits.float(), labels)  # Lovasz needs float32
            else:  # the library's mean over no pixel is NaN
                total = total + logits.sum() * 0.0
        return total


def _library_losses() -> ModuleType:
    """Returns ``segmentation_models_pytorch.losses``, or raises `OptionError` if the package is not installed."""
    try:
        from segmentation_models_pytorch import losses
    except ModuleNotFoundError as error:
        raise OptionError(
            "--loss focal, lovasz and tversky need segmentation_models_pytorch: pip install 'cluster_zoo[segmentation]'"
        ) from error
    return losses


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 255, weight: Tensor | None = None) -> Tensor:
    """Computes the mean cross-entropy over labeled pixels, in float32 or higher precision.

    mmsegmentation divides by the number of all pixels instead, so that its loss depends on the fraction of ignored
    pixels in a batch.

    Args:
        logits: [B, K, H, W].
        labels: int64 [B, H, W], values 0 .. K - 1 or ``ignore_index``.
        ignore_index: Label of ignored pixels.
        weight: Weight of each class [K]. The mean is weighted, as in PyTorch.

    Returns:
        A scalar; 0 if no pixel is labeled, where PyTorch's mean is NaN.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labeled = labels != ignore_index
    if weight is None:
        total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction='sum')
        return total / labeled.sum().clamp_min(1)
    weight = weight.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weight, ignore_index=ignore_index, reduction='sum')
    return total / _pixel_weights(weight, labels, labeled).sum().clamp_min(torch.finfo(weight.dtype).tiny)


def hard_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    threshold: float = 0.7,
    least: float = 1 / 16,
) -> Tensor:
    """Computes the cross-entropy of hard pixels only (online hard example mining, Shrivastava et al., CVPR 2016).

    Hard are the labeled pixels whose class has a probability below ``threshold``, and always the fraction ``least`` of
    those with the highest cross-entropy.

    Args:
        logits, labels, ignore_index, weight: See `cross_entropy`.
        threshold: Probability, above 0 and at most 1.
        least: Fraction of a batch, 0 .. 1.

    Returns:
        A scalar, the weighted mean over hard pixels; 0 if no pixel is labeled.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction='none')  # 0 for ignored pixels
    labeled = labels != ignore_index
    ordered = losses.detach().flatten().sort(descending=True).values
    last = (labeled.sum() * least).ceil().long().sub(1).clamp_min(0)
    limit = ordered.gather(0, last.view(1)).clamp_max(-math.log(threshold))
    weight = torch.ones(logits.shape[1], device=logits.device) if weight is None else weight
    kept = _pixel_weights(weight.to(logits.dtype), labels, labeled & (losses >= limit))
    return (losses * kept).sum() / kept.sum().clamp_min(torch.finfo(kept.dtype).tiny)


def _pixel_weights(weight: Tensor, labels: Tensor, selected: Tensor) -> Tensor:
    """Returns the weight of each pixel's class [B, H, W], 0 for pixels that are not selected."""
    return weight[labels.clamp(0, len(weight) - 1)] * selected


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
