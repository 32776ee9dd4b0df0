"""Objects in single images of any size, and pictures of them.

Masks are kept inside their boxes, so that the memory does not grow with the number of objects times the image.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from cluster_zoo.errors import CheckpointError
from cluster_zoo.features import eval_mode

from ..engine.masks import ImageLike, to_pixels
from .conventions import paste_masks

__all__ = ['Detected', 'draw_objects', 'predict']

_OPACITY = 0.45
_HUE_STEP = 0.618  # of successive objects, so that neighbors in the list differ


@dataclass(frozen=True)
class Detected:
    """An object.

    Attributes:
        label: Label of its class, 1 to K.
        score: Probability, 0 to 1.
        box: x1, y1, x2, y2 in pixels of the image.
        region: The smallest rectangle of whole pixels that contains the box: left, top, right, bottom.
        mask: Which pixels of the region belong to the object, bool [bottom - top, right - left]; None without masks.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    region: tuple[int, int, int, int]
    mask: Tensor | None = None

    def full_mask(self, size: tuple[int, int]) -> Tensor:
        """Returns the mask in an image of height and width ``size``, bool [H, W]."""
        full = torch.zeros(size, dtype=torch.bool)
        left, top, right, bottom = self.region
        full[top:bottom, left:right] = self.mask
        return full


@torch.no_grad()
def predict(model: nn.Module, image: ImageLike, threshold: float = 0.5) -> list[Detected]:
    """Finds the objects in an image.

    Args:
        model: A detector of `create_detector`, on its device. It is in evaluation mode during the call.
        image: A PIL image of any mode, whose EXIF orientation is applied; an array uint8 [H, W, 3]; or a tensor
            [3, H, W], uint8 or float in 0..1.
        threshold: Least score of an object. Scores below the detector's own limit (0.05) are never found.

    Returns:
        The objects, the most probable first.

    Raises:
        ImageError: The image is of another type or shape.
        CheckpointError: The model gives NaN or infinity.
    """
    pixels = to_dtype(to_pixels(image), torch.float32, scale=True)
    H, W = pixels.shape[-2:]
    transform, weight = model.transform, next(model.parameters())
    try:
        transform.paste = False
        with eval_mode(model):
            found = model([pixels.to(weight)])[0]
    finally:
        transform.paste = True
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise CheckpointError('an output of the model is not finite: use the weights of an earlier checkpoint')
    found = {name: value[found['scores'] >= threshold].cpu() for name, value in found.items()}
    objects = []
    for i, box in enumerate(found['boxes']):
        x1, y1, x2, y2 = box.tolist()
        region = math.floor(x1), math.floor(y1), min(math.ceil(x2), W), min(math.ceil(y2), H)
        mask = _mask(found['masks'][i], box, region) if 'masks' in found else None
        objects.append(Detected(int(found['labels'][i]), float(found['scores'][i]), (x1, y1, x2, y2), region, mask))
    return objects


def _mask(probabilities: Tensor, box: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """Resamples the mask [1, M, M] of a box [4] to the pixels of a region."""
    left, top, right, bottom = region
    inside = box - box.new_tensor([left, top, left, top])
    return paste_masks(probabilities[None], inside[None], (bottom - top, right - left))[0, 0] >= 0.5


def draw_objects(image: Image.Image, objects: Sequence[Detected], classes: Sequence[str]) -> Image.Image:
    """Draws boxes and masks over an image, each object in its own color, with class and score where they fit in.

    Args:
        image: RGB image.
        objects: See `predict`.
        classes: Names of the K classes.
    """
    pixels = np.array(image)
    colors = [np.array(colorsys.hsv_to_rgb(i * _HUE_STEP % 1, 0.8, 1)) * 255 for i in range(len(objects))]
    for found, color in zip(objects, colors):
        if found.mask is not None:
            left, top, right, bottom = found.region
            inside, mask = pixels[top:bottom, left:right], found.mask.numpy()
            inside[mask] = (1 - _OPACITY) * inside[mask] + _OPACITY * color
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(10, min(canvas.size) // 40))
    width = max(1, min(canvas.size) // 300)
    for found, color in zip(objects, colors):
        x1, y1, x2, y2 = found.box
        left, top, right, bottom = found.region
        draw.rectangle((left, top, right - 1, bottom - 1), None, tuple(map(int, color)), width)
        text = f'{classes[found.label - 1]} {found.score:.2f}'
        if font.getlength(text) + 2 * width < x2 - x1 and 1.5 * font.size < y2 - y1:
            draw.text((x1 + 2 * width, y1 + width), text, 'white', font, stroke_width=1, stroke_fill='black')
    return canvas
