"""Class probabilities of images: the whole image at once or in windows, and mirrored."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor

from ..models.decoders import resize

__all__ = ['MODES', 'predict']

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
    """Predicts the class of each pixel, averaging the probabilities of both directions.

    At any time there is one set of logits beside the result, however many windows there are.

    Args:
        model: From images [B, C, H, W] to logits [B, K, H, W], in evaluation mode.
        images: Normalised images [B, C, H, W].
        mode: ``'whole'``, or ``'slide'``: the logits of windows are averaged where they overlap. The last window of a
            row or column moves back inside.
        crop: Height and width of a window, or its side; only for ``'slide'``, which needs it.
        stride: From one window to the next, down and across (default: `crop`, windows side by side).
        pad: Whether images that are smaller than a window get zeros, the mean, at the right and at the bottom, as
            RegionProxy was tested. Else a window is as small as the image, as for CondNet.
        flip: Whether to look from left to right and from right to left.
        size: Height and width of the result, the labels' (default: the images').
        chunk: Windows that go through the model together (default: as many as there are images).

    Returns:
        Probabilities [B, K, *size], in float32 or the model's higher precision.

    Raises:
        ValueError: For options that can not be.
    """
    check(mode, crop, stride, chunk)
    size = size or images.shape[-2:]
    stride, chunk = crop if stride is None else stride, chunk or len(images)
    total = None
    for mirrored in (False, True) if flip else (False,):
        view = images.flip(-1) if mirrored else images
        logits = model(view) if mode == 'whole' else slide(model, view, crop, stride, pad, chunk)
        logits = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)
        probabilities = (logits.flip(-1) if mirrored else logits).softmax(1)
        del logits
        total = probabilities if total is None else total.add_(probabilities)
    return total.div_(2 if flip else 1)


def check(
    mode: str,
    crop: int | tuple[int, int] | None,
    stride: int | tuple[int, int] | None,
    chunk: int | None = None,
) -> None:
    """Raises ValueError for options that :func:`predict` can not follow."""
    if mode not in MODES:
        raise ValueError(f'mode {mode!r}: expected {" or ".join(MODES)}')
    if mode == 'slide' and crop is None:
        raise ValueError('mode slide needs a crop, the size of its windows')
    if mode == 'slide':
        sides, steps = to_2tuple(crop), to_2tuple(crop if stride is None else stride)
        if min(*sides, *steps) < 1 or any(step > side for side, step in zip(sides, steps)):
            raise ValueError(f'crop {crop}, stride {stride}: expected 1 <= stride <= crop, or pixels would be left out')
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
    """Logits [B, K, H, W] of images [B, C, H, W], averaged over the windows that cover a pixel; see `predict`."""
    crop, stride, (height, width) = to_2tuple(crop), to_2tuple(stride), images.shape[-2:]
    if pad:
        images = F.pad(images, (0, max(crop[1] - width, 0), 0, max(crop[0] - height, 0)))
    count, size = len(images), images.shape[-2:]
    crop = tuple(map(min, crop, size))
    rows, columns = (starts(*sides) for sides in zip(size, crop, stride))
    windows = list(product(range(count), rows, columns))
    total = None
    for first in range(0, len(windows), chunk):
        part = windows[first : first + chunk]
        logits = model(torch.stack([images[i, :, y : y + crop[0], x : x + crop[1]] for i, y, x in part]))
        if total is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            total = logits.new_zeros(count, logits.shape[1], *size, dtype=dtype)
        for (i, y, x), values in zip(part, logits):
            total[i, :, y : y + crop[0], x : x + crop[1]] += values
    # As many windows cover a pixel as cover its row, times as many as cover its column.
    total.div_(covered(rows, crop[0], total)[:, None]).div_(covered(columns, crop[1], total))
    return total[..., :height, :width]


def starts(whole: int, side: int, step: int) -> list[int]:
    """Where windows of length `side` begin, `step` apart, so that they cover 0..`whole` and stay inside."""
    return [min(start, whole - side) for start in range(0, max(whole - side + step, 1), step)]


def covered(places: list[int], side: int, like: Tensor) -> Tensor:
    """How many of the windows of length `side` that begin at `places` cover each point up to the last one's end."""
    counts = like.new_zeros(places[-1] + side)
    for place in places:
        counts[place : place + side] += 1
    return counts
