"""Images in the forms that users have, as the input of a model at their own aspect ratio."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from ..images import check_sides, to_rgb

__all__ = ['ImageLike', 'prepare']

ImageLike: TypeAlias = Image.Image | np.ndarray | Tensor
MIN_SIDE = 32  # pixels, of the models


def prepare(model: nn.Module, images: ImageLike | Sequence[ImageLike], size: int | None) -> tuple[Tensor, list]:
    """Converts images to the model's input.

    Args:
        model: A model with or without timm's ``pretrained_cfg``.
        images: A PIL image of any mode, whose EXIF orientation is applied; an array uint8 [H, W] or [H, W, C] of one,
            three or four channels; a normalized tensor [C, H, W] or [B, C, H, W]; or a list of images that have the
            same size once they are scaled.
        size: Shorter side of the input in pixels; the model's test size if None. Tensors are not scaled.

    Returns:
        The input [B, C, H, W] on the model's device, and the images that it shows: the given ones as RGB, at their own
        size, or the tensors without the normalization.

    Raises:
        ValueError: An image has another type, shape or size.
        ImageError: An image is too narrow.
    """
    parameter = next(model.parameters())
    config = next((m.pretrained_cfg for m in model.modules() if getattr(m, 'pretrained_cfg', None)), {})
    channels = next((m.in_chans for m in model.modules() if hasattr(m, 'in_chans')), 3)
    mean = torch.tensor(config.get('mean', IMAGENET_DEFAULT_MEAN)[:channels]).view(-1, 1, 1)
    std = torch.tensor(config.get('std', IMAGENET_DEFAULT_STD)[:channels]).view(-1, 1, 1)
    if isinstance(images, Tensor):
        inputs = images.unsqueeze(0) if images.ndim == 3 else images
        if inputs.ndim != 4 or min(inputs.shape) < 1 or min(inputs.shape[-2:]) < MIN_SIDE:
            raise ValueError(f'Expected a tensor [C, H, W] or [B, C, H, W] from 32 px, got {list(images.shape)}.')
        pixels = inputs.detach().float().cpu()
        pixels = pixels * std + mean if pixels.shape[1] == len(mean) else pixels
        return inputs.to(parameter), [to_image(image) for image in pixels.clamp(0, 1)]

    if size is None:
        size = min((config.get('test_input_size') or config.get('input_size') or (3, 224, 224))[-2:])
    if size < MIN_SIDE:
        raise ValueError(f'size is at least {MIN_SIDE} pixels, got {size}.')
    shown = [_to_pil(image) for image in (images if isinstance(images, Sequence) else [images])]
    if not shown:
        raise ValueError('Expected an image, got an empty list.')
    scaled = [to_tensor(_scale(image, size, channels)) for image in shown]
    shapes = {tuple(image.shape) for image in scaled}
    if len(shapes) > 1:
        found = ', '.join(f'{width} x {height}' for _, height, width in sorted(shapes))
        raise ValueError(f'The images of a batch have one size, got {found} after scaling: pass them one by one.')
    return ((torch.stack(scaled) - mean) / std).to(parameter), shown


def to_image(pixels: Tensor) -> Image.Image:
    """[C, H, W] in 0 .. 1 -> an RGB image of the first three channels, or of the first one."""
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _to_pil(image: ImageLike) -> Image.Image:
    if isinstance(image, np.ndarray):
        shape = image.shape[2:] if image.ndim == 3 else ()
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or shape not in ((), (1,), (3,), (4,)) or not image.size:
            raise ValueError(f'Expected an array uint8 [H, W] or [H, W, C], got {image.dtype} {list(image.shape)}.')
        image = Image.fromarray(image[..., 0] if shape == (1,) else image)
    if not isinstance(image, Image.Image):
        raise ValueError(f'Expected a PIL image, an array or a tensor, got a {type(image).__name__}.')
    image = to_rgb(image)
    check_sides(image)
    return image


def _scale(image: Image.Image, size: int, channels: int) -> Image.Image:
    if channels not in (1, 3):
        raise ValueError(f'The model expects {channels} channels: pass a normalized tensor [C, H, W].')
    factor = size / min(image.size)
    # Whole patches of the longer side, so that no point is cut
    width, height = (
        size if side == min(image.size) else max(size, 4 * round(side * factor / 4)) for side in image.size
    )
    return image.convert('L' if channels == 1 else 'RGB').resize((width, height), Image.Resampling.BICUBIC)
