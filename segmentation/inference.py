"""Class probabilities of images: the whole image at once or in windows, at several scales, and mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor

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
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    multiple: int | None = None,
    size: tuple[int, int] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Predicts the class of each pixel, averaging the probabilities of all scales and of both directions.

    At any time there is one set of logits beside the result, however many scales and windows there are.

    Args:
        model: From images [B, C, H, W] to logits [B, K, H, W], in evaluation mode.
        images: Normalised images [B, C, H, W].
        mode: ``'whole'``, or ``'slide'``: the logits of windows are averaged where they overlap. The last window of a
            row or column moves back inside; of an image that is smaller, a window is as small, as published.
        crop: Height and width of a window, or its side; only for ``'slide'``, which needs it.
        stride: From one window to the next, down and across (default: `crop`, windows side by side).
        scales: Sizes at which to look, relative to the images.
        flip: Whether to look at each size from left to right and from right to left.
        multiple: Sides of scaled images are rounded up to a multiple of this; images of scale 1 stay as they are.
        size: Height and width of the result, the labels' (default: the images').
        chunk: Windows that go through the model together (default: as many as there are images).

    Returns:
        Probabilities [B, K, *size], in float32 or the model's higher precision.

    Raises:
        ValueError: For options that can not be.
    """
    check(mode, crop, stride, scales, chunk)
    size = size or images.shape[-2:]
    stride, chunk = crop if stride is None else stride, chunk or len(images)
    total = None
    for scale, mirrored in product(scales, (False, True) if flip else (False,)):
        view = images if scale == 1 else resize(images, scaled_size(images.shape[-2:], scale, multiple))
        view = view.flip(-1) if mirrored else view
        logits = model(view) if mode == 'whole' else slide(model, view, crop, stride, chunk)
        logits = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)
        probabilities = (logits.flip(-1) if mirrored else logits).softmax(1)
        del logits
        total = probabilities if total is None else total.add_(probabilities)
    return total.div_(len(scales) * (2 if flip else 1))


def check(
    mode: str,
    crop: int | tuple[int, int] | None,
    stride: int | tuple[int, int] | None,
    scales: Sequence[float],
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
    if not scales or min(scales) <= 0:
        raise ValueError(f'scales {list(scales)}: expected one or more factors above 0')
    if chunk is not None and chunk < 1:
        raise ValueError(f'chunk {chunk}: expected at least one window')


def slide(
    model: nn.Module,
    images: Tensor,
    crop: int | tuple[int, int],
    stride: int | tuple[int, int],
    chunk: int,
) -> Tensor:
    """Logits [B, K, H, W] of images [B, C, H, W], averaged over the windows that cover a pixel; see `predict`."""
    count, size = len(images), images.shape[-2:]
    crop, stride = tuple(map(min, to_2tuple(crop), size)), to_2tuple(stride)
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
    return total.div_(covered(rows, crop[0], total)[:, None]).div_(covered(columns, crop[1], total))


def starts(whole: int, side: int, step: int) -> list[int]:
    """Where windows of length `side` begin, `step` apart, so that they cover 0..`whole` and stay inside."""
    return [min(start, whole - side) for start in range(0, max(whole - side + step, 1), step)]


def covered(places: list[int], side: int, like: Tensor) -> Tensor:
    """How many of the windows of length `side` that begin at `places` cover each point up to the last one's end."""
    counts = like.new_zeros(places[-1] + side)
    for place in places:
        counts[place : place + side] += 1
    return counts


def scaled_size(size: tuple[int, int], scale: float, multiple: int | None) -> tuple[int, int]:
    """Height and width times `scale`, rounded; with `multiple`, up to the next multiple of it."""
    sides = (max(1, int(side * scale + 0.5)) for side in size)
    return tuple(-(-side // multiple) * multiple if multiple else side for side in sides)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of [B, C, H, W] to `size`, pixels being areas (``align_corners`` off)."""
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode='bilinear', align_corners=False)
