"""Masks of single images of any size, in memory that does not grow with the number of classes times the image.

Logits are computed in rows of windows, and the mask in strips of rows, as soon as the logits of a strip are complete.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from cluster_zoo.errors import CheckpointError, ImageError
from cluster_zoo.features import eval_mode
from cluster_zoo.images import to_rgb
from cluster_zoo.training.runtime import option_errors

from ..data.transforms import EvaluationResize
from .inference import check, starts

__all__ = ['MAX_WHOLE', 'WINDOW', 'ImageLike', 'predict']

ImageLike: TypeAlias = Image.Image | np.ndarray | Tensor
Size: TypeAlias = int | tuple[int, int]

MAX_WHOLE = 2**21  # pixels of an image that is predicted as a whole, unless `mode` says otherwise
WINDOW = (1024, 768)  # size and stride of the windows of larger images
_STRIP = 2**24  # probabilities per strip: 64 MiB in float32


@torch.no_grad()
def predict(
    model: nn.Module,
    image: ImageLike,
    *,
    mode: str | None = None,
    crop: Size | None = None,
    stride: Size | None = None,
    pad: bool = False,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    scale: tuple[int, int] | None = None,
    multiple: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    chunk: int = 1,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """Predicts the class of each pixel of an image.

    The image is resized (`scale`, `multiple`, `scales`), scaled to 0..1, and normalized with `mean` and `std`. The
    logits are resized to the image, and the class has the highest probability, averaged over sizes and flips.

    Args:
        model: A `Segmenter`, or any module from normalized images [B, 3, H, W] to logits [B, K, H, W], on its device.
            It is in evaluation mode during the call.
        image: A PIL image of any mode, whose EXIF orientation is applied; an array uint8 [H, W, 3]; or a tensor
            [3, H, W], uint8 or float in 0..1.
        mode: ``'whole'``, or ``'slide'`` for overlapping windows. By default whole, and windows of 1024 px with a
            stride of 768 px for images of more than 2,097,152 pixels after resizing, which bounds the memory.
        crop, stride, pad: See `inference.predict`.
        flip: Average the probabilities of the image and its mirror image.
        scales: Factors of the size. Probabilities are averaged over them.
        scale: (long, short) sides that the image is resized into, keeping its aspect ratio (default: its own size).
        multiple: Both sides are rounded up to a multiple of this number.
        mean: Mean of each channel, for pixel values in 0..1 (default: that of the model, else ImageNet's).
        std: Standard deviation of each channel, for pixel values in 0..1, likewise.
        chunk: Number of windows per forward pass.
        autocast: Creates the context of the forward pass.

    Returns:
        Classes 0..K-1, int64 [H, W] at the size of the image (turned as its EXIF orientation says), on the CPU.

    Raises:
        ImageError: The image has another type, shape or range of values.
        OptionError: An option is invalid.
        CheckpointError: An output of the model is not finite.
    """
    pixels = to_pixels(image)
    images = getattr(model, 'pretrained_cfg', {})
    mean = images.get('mean', IMAGENET_DEFAULT_MEAN) if mean is None else mean
    std = images.get('std', IMAGENET_DEFAULT_STD) if std is None else std
    with option_errors('predict', TypeError):
        resize = EvaluationResize(scale, multiple, scales)
        check(mode or 'whole', crop, stride, chunk)
        if not len(mean) == len(std) == 3 or min(std) <= 0:
            raise ValueError(f'mean {mean}, std {std}: expected three numbers each, and std above 0')
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    parameter = next(model.parameters(), torch.empty(()))

    def forward(windows: Tensor, size: tuple[int, int]) -> Tensor:
        windows = normalize(windows.to(parameter.device)).to(parameter.dtype)
        windows = F.pad(windows, (0, size[1] - windows.shape[-1], 0, size[0] - windows.shape[-2]))
        with autocast():
            return model(windows)

    views = resize(pixels)
    sources = []
    for view in views if isinstance(views, tuple) else (views,):
        windows = _windows(tuple(view.shape[-2:]), mode, crop, stride, pad)
        sources += [_Logits(forward, view, flipped, *windows, chunk) for flipped in {False, flip}]
    with eval_mode(model):
        return _argmax(sources, tuple(pixels.shape[-2:]))


def to_pixels(image: ImageLike) -> Tensor:
    """Converts an image of one of the types of `predict` to a tensor [3, H, W], uint8 or float in 0..1.

    Raises:
        ImageError: The image has another type, shape or range of values.
    """
    if isinstance(image, Image.Image):
        return pil_to_tensor(to_rgb(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ImageError(f'expected an array uint8 [H, W, 3], got {image.dtype} {list(image.shape)}')
        return torch.tensor(image).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ImageError(f'expected a PIL image, an array or a tensor, got a {type(image).__name__}')
    is_float = image.is_floating_point()
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel() or not (is_float or image.dtype == torch.uint8):
        raise ImageError(f'expected a tensor [3, H, W], uint8 or float, got {image.dtype} {list(image.shape)}')
    if is_float:
        low, high = map(float, image.aminmax())
        if not 0 <= low <= high <= 1:  # false for NaN
            raise ImageError(
                f'values from {low:g} to {high:g}, expected 0 to 1: divide by 255, and leave the normalization to '
                'predict (mean, std)'
            )
    return image.detach().cpu()


class _Logits:
    """Logits of an image, averaged over its windows, which are computed when their rows are read.

    Args:
        forward: From windows [B, 3, <= h, <= w] and their padded size (h, w) to logits [B, K, h, w].
        image: The image [3, H, W].
        flipped: Whether the windows are those of the mirror image.
        crop, stride, pad, chunk: See `predict`.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, tuple[int, int]], Tensor],
        image: Tensor,
        flipped: bool,
        crop: Size,
        stride: Size,
        pad: bool,
        chunk: int,
    ) -> None:
        self.forward, self.flipped, self.chunk = forward, flipped, chunk
        self.image = image.flip(-1) if flipped else image
        self.size = tuple(image.shape[-2:])
        self.crop = to_2tuple(crop) if pad else tuple(map(min, to_2tuple(crop), self.size))
        padded = tuple(map(max, self.crop, self.size))
        self.tops, self.lefts = map(starts, padded, self.crop, to_2tuple(stride))
        self.counts = [torch.zeros(side) for side in padded]  # windows that cover a row, and a column
        for count, first, side in zip(self.counts, (self.tops, self.lefts), self.crop):
            for start in first:
                count[start : start + side] += 1
        self.top = 0  # row of the image that the sums start with
        self.sums: Tensor | None = None  # [K, rows, columns]

    def rows(self, first: int, last: int) -> Tensor:
        """Returns the logits [K, last - first, W] of rows. `first` must not be below that of an earlier call."""
        while self.tops and self.tops[0] < last:
            self._add(self.tops.pop(0), first)
        rows, columns = (count.to(self.sums) for count in self.counts)
        sums = self.sums[:, first - self.top : last - self.top] / (rows[first:last, None] * columns)
        sums = sums[..., : self.size[1]]
        return sums.flip(-1) if self.flipped else sums

    def _add(self, top: int, first: int) -> None:
        """Adds the logits of the windows that start in a row, and drops the rows before `first`."""
        h, w = self.crop
        for start in range(0, len(self.lefts), self.chunk):
            lefts = self.lefts[start : start + self.chunk]
            windows = torch.stack([self.image[:, top : top + h, left : left + w] for left in lefts])
            logits = self.forward(windows, self.crop)
            if start == 0:
                self._extend(logits, top + h, min(first, top))
            for left, values in zip(lefts, logits):
                self.sums[:, top - self.top : top - self.top + h, left : left + w] += values

    def _extend(self, logits: Tensor, last: int, first: int) -> None:
        """Makes the sums those of the rows from `first` to `last`, with zeros for new rows."""
        if self.sums is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            self.sums = logits.new_zeros(logits.shape[1], 0, len(self.counts[1]), dtype=dtype)
        kept = self.sums[:, first - self.top :].clone()
        self.sums = None  # frees the memory before more is allocated
        self.sums = kept.new_zeros(len(kept), last - first, kept.shape[2])
        self.sums[:, : kept.shape[1]] = kept
        self.top = first


def _windows(
    size: tuple[int, int], mode: str | None, crop: Size | None, stride: Size | None, pad: bool
) -> tuple[Size, Size, bool]:
    """Returns crop, stride and pad for an image: the given ones, those for large images, or the whole image."""
    if mode == 'slide':
        return crop, stride or crop, pad
    if mode is None and size[0] * size[1] > MAX_WHOLE:
        return *WINDOW, False
    return size, size, False


def _argmax(sources: Sequence[_Logits], size: tuple[int, int]) -> Tensor:
    """Returns the class of the highest mean probability of each pixel, int64 [H, W]."""
    H, W = size
    mask = torch.empty(size, dtype=torch.int64)
    first, last = 0, 1
    while first < H:
        total = sum(_resized_rows(source, first, last, size).softmax(0) for source in sources)
        if not total.isfinite().all():
            raise CheckpointError('an output of the model is not finite: use the weights of an earlier checkpoint')
        mask[first:last] = total.argmax(0)
        first, last = last, min(H, last + max(1, _STRIP // (len(total) * W)))  # the first row tells K
    return mask


def _resized_rows(source: _Logits, first: int, last: int, size: tuple[int, int]) -> Tensor:
    """Returns rows [K, last - first, W] of the logits, resized bilinearly to a size, as by ``F.interpolate``."""
    (h, w), (H, W) = source.size, size
    if (h, w) == (H, W):
        return source.rows(first, last)
    y = ((torch.arange(first, last, dtype=torch.float64) + 0.5) * (h / H) - 0.5).clamp(0, h - 1)
    above = y.long()
    below = (above + 1).clamp(max=h - 1)
    start = int(above[0])
    rows = source.rows(start, int(below[-1]) + 1)
    weight = (y - above)[:, None].to(rows)
    above, below = ((indices - start).to(rows.device) for indices in (above, below))
    rows = torch.lerp(rows[:, above], rows[:, below], weight)
    return F.interpolate(rows[None], (last - first, W), mode='bilinear')[0]
