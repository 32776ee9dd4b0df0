"""Prediction of class probabilities from whole images or sliding windows, with flip augmentation."""

from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor

from ..models.decoders import resize

__all__ = ['MODES', 'check', 'predict']

MODES = ('whole', 'slide')


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    *,
    mode: str = 'whole',
    crop: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    pad: bool = False,
    flip: bool = False,
    size: tuple[int, int] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Predicts the class probabilities of each pixel.

    Args:
        model: From images [B, C, H, W] to logits [B, K, H, W], in evaluation mode.
        images: Normalized images [B, C, H, W].
        mode: ``'whole'``, or ``'slide'`` to average the logits of overlapping windows. The last window of a row or
            column is moved inside the image.
        crop: Size of a window, one number or (height, width); required by ``'slide'``.
        stride: Distance of the windows, one number or (vertical, horizontal) (default: `crop`).
        pad: Whether images smaller than a window are padded with zeros at the right and at the bottom, as in the test
            of RegionProxy. By default windows are as small as the image, as in the test of CondNet.
        flip: Horizontal-flip test-time augmentation: average the probabilities of the image and its mirror image.
        size: Output size (height, width) (default: that of the images).
        chunk: Number of windows per forward pass (default: the number of images).

    Returns:
        Probabilities [B, K, *size], in float32 or the model's higher precision.

    Raises:
        ValueError: An option is invalid, see `check`.
    """
    check(mode, crop, stride, chunk)
    size = size or images.shape[-2:]
    total = None
    for flipped in (False, True) if flip else (False,):
        x = images.flip(-1) if flipped else images
        logits = model(x) if mode == 'whole' else slide(model, x, crop, stride or crop, pad, chunk or len(x))
        logits = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)
        probabilities = (logits.flip(-1) if flipped else logits).softmax(1)
        del logits  # of all intermediate results, only the sum is kept
        total = probabilities if total is None else total.add_(probabilities)
    return total.div_(2 if flip else 1)


def check(
    mode: str, crop: int | tuple[int, int] | None, stride: int | tuple[int, int] | None, chunk: int | None = None
) -> None:
    """Raises ValueError if `predict` does not accept these options."""
    if mode not in MODES:
        raise ValueError(f'mode {mode!r}: expected {" or ".join(MODES)}')
    if mode == 'slide' and crop is None:
        raise ValueError('mode slide needs a crop, the size of its windows')
    if mode == 'slide':
        sides, steps = to_2tuple(crop), to_2tuple(crop if stride is None else stride)
        if min(*sides, *steps) < 1 or any(step > side for side, step in zip(sides, steps)):
            raise ValueError(f'crop {crop}, stride {stride}: expected 1 <= stride <= crop, to cover all pixels')
    if chunk is not None and chunk < 1:
        raise ValueError(f'chunk {chunk}: expected at least one window')


def slide(
    model: nn.Module,
    images: Tensor,
    crop: int | tuple[int, int],
    stride: int | tuple[int, int],
    pad: bool,
    chunk: int,
) -> Tensor:
    """Averages the logits [B, K, H, W] of the windows that cover a pixel of images [B, C, H, W], see `predict`."""
    crop, stride, (H, W) = to_2tuple(crop), to_2tuple(stride), images.shape[-2:]
    if pad:
        images = F.pad(images, (0, max(crop[1] - W, 0), 0, max(crop[0] - H, 0)))
    size = images.shape[-2:]
    h, w = map(min, crop, size)
    rows, columns = starts(size[0], h, stride[0]), starts(size[1], w, stride[1])
    windows = list(product(range(len(images)), rows, columns))
    total = None
    for first in range(0, len(windows), chunk):
        batch = windows[first : first + chunk]
        logits = model(torch.stack([images[i, :, y : y + h, x : x + w] for i, y, x in batch]))
        if total is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            total = logits.new_zeros(len(images), logits.shape[1], *size, dtype=dtype)
            count = logits.new_zeros(len(images), 1, *size, dtype=dtype)
        for (i, y, x), values in zip(batch, logits):
            total[i, :, y : y + h, x : x + w] += values
            count[i, :, y : y + h, x : x + w] += 1
    return total.div_(count)[..., :H, :W]


def starts(whole: int, side: int, step: int) -> list[int]:
    """Returns the starts of windows of length `side`, `step` apart, that cover 0..`whole` and stay inside."""
    return [min(start, whole - side) for start in range(0, max(whole - side + step, 1), step)]
