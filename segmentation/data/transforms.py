"""Transforms of an image with its mask, on torchvision's v2: the data preparation that all of the papers share.

Images are resized bilinearly without antialiasing and masks to the nearest pixel: that is what the published models
were trained and measured with. Everything random is drawn from torch's default generator.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .classes import IGNORE_INDEX

__all__ = ['CategoryLimitedCrop', 'EvaluationResize', 'PadTo', 'PhotometricDistortion', 'RandomScale']
__all__ += ['eval_transform', 'keep_ratio_size', 'train_transform']

_CROP_TRIES = 10


def train_transform(
    crop: int | tuple[int, int],
    scale: tuple[int, int] | None = (2048, 512),
    ratio: tuple[float, float] = (0.5, 2.0),
    max_category: float = 0.75,
    flip: float = 0.5,
    distort: bool = True,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Transform:
    """What a training sample goes through: resize, crop, flip, distort, normalise, pad.

    Args:
        crop: Size of the result, one number or (H, W).
        scale: (long, short): the sides that an image is fitted into, keeping its shape; None for its own sides.
        ratio: Range of the random factor that `scale` is multiplied by.
        max_category: Share of a crop's labelled pixels that its commonest class may have.
        flip: Probability of a horizontal flip.
        distort: Whether to distort brightness, contrast, saturation and hue.
        mean: Mean of each channel, for pixels in 0 to 1.
        std: Standard deviation of each channel, for pixels in 0 to 1.

    Returns:
        A transform of (uint8 image [3, H, W], mask [H, W]) to (float image [3, *crop], mask [*crop]). Where the image
        is smaller than the crop, the image ends in zeros, which is the mean, and the mask in 255.

    Raises:
        ValueError: A size, a range or a share is not one.
    """
    crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if len(crop) != 2 or min(crop) < 1:
        raise ValueError(f'crop {crop} is no size: expected one number or (H, W), at least 1')
    return v2.Compose(
        [
            RandomScale(scale, ratio),
            CategoryLimitedCrop(crop, max_category),
            v2.RandomHorizontalFlip(flip),
            v2.ToDtype(torch.float32, scale=True),
            *([PhotometricDistortion()] if distort else []),
            v2.Normalize(mean, std),
            PadTo(crop),
        ]
    )


def eval_transform(
    scale: tuple[int, int] | None = None,
    multiple: int | None = None,
    ratios: Sequence[float] = (1.0,),
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Transform:
    """What an image goes through that is measured on: resize (the image only), normalise.

    Args:
        scale: (long, short): the sides that the image is fitted into, keeping its shape; None for its own.
        multiple: Number that both sides are rounded up to a multiple of, by resizing; None for no rounding.
        ratios: Factors on `scale`, each of which gives an image.
        mean: Mean of each channel, for pixels in 0 to 1.
        std: Standard deviation of each channel, for pixels in 0 to 1.

    Returns:
        A transform of (uint8 image [3, H, W], mask [H, W]) to (float image [3, h, w], mask [H, W]), or of an image
        alone. With several ratios there is a tuple of images in the image's place.

    Raises:
        ValueError: There is no such size.
    """
    resize = EvaluationResize(scale, multiple, ratios)
    return v2.Compose([resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def keep_ratio_size(size: Sequence[int], scale: tuple[float, float]) -> tuple[int, int]:
    """The largest size of an image's shape that fits into `scale`.

    Args:
        size: (H, W) of the image.
        scale: The most that the longer and the shorter side may have, in either order.

    Returns:
        (h, w), rounded, at least 1.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return tuple(max(1, int(side * factor + 0.5)) for side in size)


class RandomScale(v2.Transform):
    """Fits image and mask into a size that is multiplied by a random factor; the shape is kept.

    Args:
        scale: (long, short) sides for a factor of 1; None for the image's own.
        ratio: Range of the factor, drawn uniformly.
    """

    def __init__(self, scale: tuple[int, int] | None, ratio: tuple[float, float]) -> None:
        super().__init__()
        if not 0 < ratio[0] <= ratio[1] or (scale is not None and min(scale) < 1):
            raise ValueError(f'scale {scale} times {ratio} is no range of sizes')
        self.scale = scale
        self.ratio = ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = F.get_size(flat_inputs[0])
        factor = float(torch.empty(()).uniform_(*self.ratio))
        return dict(size=keep_ratio_size(size, tuple(side * factor for side in self.scale or size)))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params['size'], antialias=False)


class CategoryLimitedCrop(v2.Transform):
    """A random crop that is not nearly all of one class.

    Crops are drawn until the commonest class has at most its share of the labelled pixels; the tenth is taken as it is.
    Sides that are shorter than the crop stay as they are.

    Args:
        size: (H, W) of the crop.
        max_category: Share of the commonest class, 1 for any crop.
        ignore_index: Label of the pixels that do not count.
    """

    def __init__(self, size: tuple[int, int], max_category: float = 0.75, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        if not 0 < max_category <= 1:
            raise ValueError(f'max_category is a share of the pixels, above 0 and at most 1, not {max_category}')
        self.size = size
        self.max_category = max_category
        self.ignore_index = ignore_index

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        size = dict(height=min(height, self.size[0]), width=min(width, self.size[1]))
        mask = next((inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask)), None)
        for _ in range(_CROP_TRIES):
            top = int(torch.randint(height - size['height'] + 1, ()))
            left = int(torch.randint(width - size['width'] + 1, ()))
            window = dict(top=top, left=left, **size)
            if mask is None or self._is_mixed(F.crop(mask, **window)):
                break
        return window

    def _is_mixed(self, mask: Tensor) -> bool:
        if self.max_category == 1:
            return True
        labelled = mask[mask != self.ignore_index]
        return len(labelled) > 0 and int(labelled.bincount().max()) <= self.max_category * len(labelled)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):
    """Random brightness, contrast, saturation and hue, each with probability 0.5.

    The steps are those of the published pipelines, on the image's float values: brightness is added, contrast
    multiplies the pixels, saturation multiplies S of HSV, and contrast comes before or after saturation and hue. (The
    steps of torchvision's `ColorJitter` and `RandomPhotometricDistort` with these names blend with grey instead.)

    Args:
        brightness: Largest amount that is added, for pixels in 0 to 1.
        contrast: Range of the factor.
        saturation: Range of the factor.
        hue: Largest part of the colour circle that hues are turned by.
    """

    def __init__(
        self,
        brightness: float = 32 / 255,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 18 / 180,
    ) -> None:
        super().__init__()
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        steps = [
            (adjust_brightness, (-self.brightness, self.brightness)),
            (adjust_saturation, self.saturation),
            (F.adjust_hue, (-self.hue, self.hue)),
        ]
        steps.insert(1 if torch.rand(()) < 0.5 else 3, (adjust_contrast, self.contrast))
        drawn = [(step, float(torch.empty(()).uniform_(*bounds)), bool(torch.rand(()) < 0.5)) for step, bounds in steps]
        return dict(steps=[(step, amount) for step, amount, taken in drawn if taken])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        image = inpt.as_subclass(Tensor)
        for step, amount in params['steps']:
            image = step(image, amount)
        return tv_tensors.wrap(image, like=inpt)


def adjust_brightness(image: Tensor, amount: float) -> Tensor:
    """Adds to the pixels of an image [..., 3, H, W] in 0 to 1."""
    return (image + amount).clamp(0, 1)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Multiplies the pixels of an image [..., 3, H, W] in 0 to 1."""
    return (image * factor).clamp(0, 1)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiplies S of HSV of an image [..., 3, H, W] in 0 to 1, at most to 1; H and V stay."""
    value = image.amax(-3, keepdim=True)
    saturation = (value - image.amin(-3, keepdim=True)) / value.clamp(min=1e-12)
    # S is linear in each channel's distance from V.
    factor = torch.minimum(torch.full_like(saturation, factor), 1 / saturation.clamp(min=1e-12))
    return (value - (value - image) * factor).clamp(0, 1)


class PadTo(v2.Transform):
    """Adds pixels at the right and at the bottom up to a size: zeros to images, `ignore_index` to masks."""

    def __init__(self, size: tuple[int, int], ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.size = size
        self.ignore_index = ignore_index

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        right, bottom = max(self.size[1] - width, 0), max(self.size[0] - height, 0)
        fill = self.ignore_index if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, [0, 0, right, bottom], fill=fill) if right or bottom else inpt


class EvaluationResize(v2.Transform):
    """Resizes the image and leaves the mask at its own size, which predictions are compared at.

    Args:
        scale: (long, short) sides that the image is fitted into; None for its own.
        multiple: Number that both sides are then rounded up to a multiple of; None for no rounding. It is one resize,
            to the rounded size: the shape changes by less than `multiple` pixels.
        ratios: Factors on `scale`. With several of them, a tuple of images takes the image's place, each resized from
            the original.
    """

    def __init__(
        self,
        scale: tuple[int, int] | None = None,
        multiple: int | None = None,
        ratios: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if (scale is not None and min(scale) < 1) or (multiple is not None and multiple < 1):
            raise ValueError(f'scale {scale} rounded up to a multiple of {multiple} is no size')
        if not ratios or min(ratios) <= 0:
            raise ValueError(f'ratios {list(ratios)}: expected one or more factors above 0')
        self.scale = scale
        self.multiple = multiple
        self.ratios = ratios

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        views = tuple(F.resize(inpt, self._size(F.get_size(inpt), ratio), antialias=False) for ratio in self.ratios)
        return views if len(views) > 1 else views[0]

    def _size(self, size: list[int], ratio: float) -> list[int]:
        size = keep_ratio_size(size, tuple(side * ratio for side in self.scale or size))
        return [math.ceil(side / (self.multiple or 1)) * (self.multiple or 1) for side in size]
