"""Joint transforms of an image and its mask, based on torchvision's v2: the data preparation of all papers.

Images are resized bilinearly without antialiasing, masks by nearest neighbor, as for the published models. All random
values are drawn from torch's default generator.
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
    """Creates the training transform: resize, crop, flip, distort, normalize, pad.

    Args:
        crop: Output size, one number or (H, W).
        scale: (long, short) sides that an image is resized into, keeping its aspect ratio; None for its own size.
        ratio: Range of the random factor on `scale`.
        max_category: Maximum fraction of a crop's labeled pixels that belong to one class.
        flip: Probability of a horizontal flip.
        distort: Whether to distort brightness, contrast, saturation and hue.
        mean: Mean of each channel, for pixel values in 0 to 1.
        std: Standard deviation of each channel, for pixel values in 0 to 1.

    Returns:
        A transform of (uint8 image [3, H, W], mask [H, W]) to (float image [3, *crop], mask [*crop]). Images smaller
        than the crop are padded with the mean, which is 0 after normalization, and masks with 255.

    Raises:
        ValueError: A size, range or fraction is invalid.
    """
    crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if len(crop) != 2 or min(crop) < 1:
        raise ValueError(f'crop must be one number or (H, W), at least 1, got {crop}')
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
    """Creates the evaluation transform: resize and normalize the image, and keep the mask.

    Args:
        scale, multiple, ratios: See `EvaluationResize`.
        mean: Mean of each channel, for pixel values in 0 to 1.
        std: Standard deviation of each channel, for pixel values in 0 to 1.

    Returns:
        A transform of (uint8 image [3, H, W], mask [H, W]) to (float image [3, h, w], mask [H, W]), or of an image
        alone. With several ratios the image is a tuple of images.

    Raises:
        ValueError: A size or ratio is invalid.
    """
    resize = EvaluationResize(scale, multiple, ratios)
    return v2.Compose([resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def keep_ratio_size(size: Sequence[int], scale: tuple[float, float]) -> tuple[int, int]:
    """Returns the largest size (h, w) with the aspect ratio of `size` (H, W) that fits into the sides `scale`."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return tuple(max(1, int(side * factor + 0.5)) for side in size)


class RandomScale(v2.Transform):
    """Resizes image and mask by a random factor, keeping the aspect ratio.

    Args:
        scale: (long, short) sides for a factor of 1; None for the image's own size.
        ratio: Range of the factor, which is uniformly distributed.
    """

    def __init__(self, scale: tuple[int, int] | None, ratio: tuple[float, float]) -> None:
        super().__init__()
        if not 0 < ratio[0] <= ratio[1] or (scale is not None and min(scale) < 1):
            raise ValueError(f'scale must be at least 1, and ratio a range above 0, got {scale} and {ratio}')
        self.scale = scale
        self.ratio = ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = F.get_size(flat_inputs[0])
        factor = float(torch.empty(()).uniform_(*self.ratio))
        return dict(size=keep_ratio_size(size, tuple(side * factor for side in self.scale or size)))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params['size'], antialias=False)


class CategoryLimitedCrop(v2.Transform):
    """Crops image and mask at random, avoiding crops that consist of almost one class.

    Crops are drawn until the most frequent class has at most `max_category` of the labeled pixels; the tenth crop is
    always used. Sides shorter than the crop are not changed.

    Args:
        size: (H, W) of the crop.
        max_category: Maximum fraction of the most frequent class; 1 for no limit.
    """

    def __init__(self, size: tuple[int, int], max_category: float = 0.75) -> None:
        super().__init__()
        if not 0 < max_category <= 1:
            raise ValueError(f'max_category must be above 0 and at most 1, got {max_category}')
        self.size = size
        self.max_category = max_category

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        H, W = F.get_size(flat_inputs[0])
        h, w = min(H, self.size[0]), min(W, self.size[1])
        mask = next((inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask)), None)
        for _ in range(_CROP_TRIES):
            top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
            window = dict(top=top, left=left, height=h, width=w)
            if mask is None or self._is_mixed(F.crop(mask, **window)):
                break
        return window

    def _is_mixed(self, mask: Tensor) -> bool:
        if self.max_category == 1:
            return True
        labeled = mask[mask != IGNORE_INDEX]
        return len(labeled) > 0 and int(labeled.bincount().max()) <= self.max_category * len(labeled)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):
    """Changes brightness, contrast, saturation and hue at random, each with probability 0.5.

    The steps are those of mmsegmentation, applied to float images in 0 to 1: add up to 32/255 for brightness, multiply
    the pixels by 0.5 to 1.5 for contrast, multiply S of HSV by 0.5 to 1.5 for saturation, and shift the hue by up to
    18/180. Contrast comes before or after saturation and hue. torchvision's `ColorJitter` and
    `RandomPhotometricDistort` blend with gray instead.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        steps = [
            (adjust_brightness, (-32 / 255, 32 / 255)),
            (adjust_saturation, (0.5, 1.5)),
            (F.adjust_hue, (-18 / 180, 18 / 180)),
        ]
        steps.insert(1 if torch.rand(()) < 0.5 else 3, (adjust_contrast, (0.5, 1.5)))
        drawn = [(step, float(torch.empty(()).uniform_(*bounds)), bool(torch.rand(()) < 0.5)) for step, bounds in steps]
        return dict(steps=[(step, amount) for step, amount, used in drawn if used])

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
    """Multiplies S of HSV of an image [..., 3, H, W] in 0 to 1, and limits it to 1."""
    value = image.amax(-3, keepdim=True)
    saturation = (value - image.amin(-3, keepdim=True)) / value.clamp(min=1e-12)
    # S is linear in the distance of each channel from V.
    factor = torch.minimum(torch.full_like(saturation, factor), 1 / saturation.clamp(min=1e-12))
    return (value - (value - image) * factor).clamp(0, 1)


class PadTo(v2.Transform):
    """Pads image and mask to (H, W) at the right and at the bottom, images with 0 and masks with 255."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        right, bottom = max(self.size[1] - width, 0), max(self.size[0] - height, 0)
        fill = IGNORE_INDEX if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, [0, 0, right, bottom], fill=fill) if right or bottom else inpt


class EvaluationResize(v2.Transform):
    """Resizes the image. The mask keeps its size, at which predictions are evaluated.

    Args:
        scale: (long, short) sides that the image is resized into, keeping its aspect ratio; None for its own size.
        multiple: A second resize rounds both sides up to a multiple of this number, as in the published test of Context
            Cluster; None for no rounding.
        ratios: Factors on `scale`. With several factors the output is a tuple of images.
    """

    def __init__(
        self, scale: tuple[int, int] | None = None, multiple: int | None = None, ratios: Sequence[float] = (1.0,)
    ) -> None:
        super().__init__()
        if (scale is not None and min(scale) < 1) or (multiple is not None and multiple < 1):
            raise ValueError(f'scale and multiple must be at least 1, got {scale} and {multiple}')
        if not ratios or min(ratios) <= 0:
            raise ValueError(f'ratios must be one or more factors above 0, got {list(ratios)}')
        self.scale = scale
        self.multiple = multiple or 1
        self.ratios = ratios

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        images = []
        for ratio in self.ratios:
            size = F.get_size(inpt)
            size = keep_ratio_size(size, tuple(side * ratio for side in self.scale or size))
            image = F.resize(inpt, size, antialias=False)
            size = [math.ceil(side / self.multiple) * self.multiple for side in size]
            images.append(F.resize(image, size, antialias=False))
        return tuple(images) if len(images) > 1 else images[0]
