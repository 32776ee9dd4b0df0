"""IndexedImages of predictions: photograph, truth and prediction side by side, with a legend."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from ..data.datasets import SegmentationDataset

__all__ = ['OverlayWriter', 'draw_overlay']

_OPACITY = 0.55
_MARGIN = 10
_PAPER, _INK = (255, 255, 255), (30, 30, 30)


def draw_overlay(
    image: Tensor,
    mask: Tensor,
    classes: Sequence[str],
    colours: Sequence[Sequence[int]] | np.ndarray | Tensor,
    truth: Tensor | None = None,
    name: str = '',
) -> Image.Image:
    """Draws classes over a photograph, half-transparent.

    Args:
        image: Photograph, uint8 [3, H, W].
        mask: Predicted classes [H, W].
        classes: Names of the K classes.
        colours: Red, green and blue of each, 0..255, [K, 3].
        truth: True classes [H, W]. Labels from K on, which are ignored, darken the photograph.
        name: Title of the photograph, such as its file's name.

    Returns:
        Photograph, truth where it is given, and prediction, from left to right, and below them the names of the
        classes that occur.
    """
    # One more colour, for every label that is no class.
    palette = np.concatenate([np.asarray(colours, dtype=np.uint8).reshape(-1, 3), np.zeros((1, 3), np.uint8)])
    masks = {'truth': truth, 'prediction': mask}
    masks = {title: labels.cpu().numpy().clip(0, len(classes)) for title, labels in masks.items() if labels is not None}
    photograph = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    panels = {name or 'photograph': photograph}
    panels |= {title: Image.blend(photograph, Image.fromarray(palette[m]), _OPACITY) for title, m in masks.items()}
    occurring = sorted({int(k) for m in masks.values() for k in np.unique(m)})
    labels = [*classes, 'no label']
    return _layout(panels, [(labels[k], tuple(palette[k].tolist())) for k in occurring])


def _layout(panels: dict[str, Image.Image], legend: list[tuple[str, tuple[int, ...]]]) -> Image.Image:
    """IndexedImages of equal size beside each other under their titles, and the named colours in lines below."""
    width, height = next(iter(panels.values())).size
    font = ImageFont.load_default(min(28, max(12, width // 30)))
    line = round(1.6 * font.size)
    titles = max(font.getlength(title) for title in panels)
    step = max(width, round(titles)) + _MARGIN  # from one picture to the next; small ones are spread for their titles
    swatch = font.size
    entries = [(name, colour, swatch + _MARGIN // 2 + round(font.getlength(name))) for name, colour in legend]
    total = max([_MARGIN + step * len(panels), *(2 * _MARGIN + entry[-1] for entry in entries)])
    places, x, y = [], _MARGIN, line + height + _MARGIN
    for name, colour, length in entries:
        if x > _MARGIN and x + length > total - _MARGIN:
            x, y = _MARGIN, y + line
        places.append((x, y, name, colour))
        x += length + 2 * _MARGIN
    canvas = Image.new('RGB', (total, y + line + _MARGIN // 2), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, (title, picture) in enumerate(panels.items()):
        left = _MARGIN + column * step
        draw.text((left, line // 2), title, _INK, font, anchor='lm')
        canvas.paste(picture, (left, line))
    for x, y, name, colour in places:
        middle = y + line // 2
        draw.rectangle((x, middle - swatch // 2, x + swatch, middle + swatch // 2), fill=colour, outline=_INK)
        draw.text((x + swatch + _MARGIN // 2, middle), name, _INK, font, anchor='lm')
    return canvas


class OverlayWriter:
    """Writes overlays of a few images, spread evenly over a dataset.

    Args:
        dataset: The images and their labels. The photographs are taken from it as they are, without its transform.
        folder: Where the PNG files go, one an image, under its number and name; made if it is missing.
        count: How many to draw.
    """

    def __init__(self, dataset: SegmentationDataset, folder: str | Path, count: int = 4) -> None:
        self.dataset = copy.copy(dataset)
        self.dataset.transform = None
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        count = min(count, len(dataset))
        self.chosen = {len(dataset) * (2 * i + 1) // (2 * count) for i in range(count)}

    def __call__(self, index: int, prediction: Tensor) -> None:
        """Draws one image of the dataset, if it is among the few; `prediction` [H, W] has its classes."""
        if index not in self.chosen:
            return
        image, truth = self.dataset[index]
        path = Path(self.dataset.name(index))
        picture = draw_overlay(image, prediction, self.dataset.classes, self.dataset.colours, truth, path.name)
        picture.save(self.folder / f'{index:04d}-{path.stem}.png')
