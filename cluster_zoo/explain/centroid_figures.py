"""Figures of nearest-centroid models: one prediction, and the centroids of all classes."""

import functools
import math
from collections.abc import Mapping, Sequence

import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..layers.anchors import AnchoredImage
from ..layers.nearest_centroid import centroid_head
from .centroids import Explanation, Neighbour, resolve_class_names

__all__ = ['draw_centroids', 'draw_explanation']

# Pixels
_IMAGE = 228  # side of the explained image
_TILE = 104  # side of a training image
_SMALL_TILE = 72  # side of a training image in `draw_centroids`
_GAP = 10
_MARGIN = 24
_MIN_HEADING = 250  # width for a class's name and probability where the tiles are narrower

_TEXT, _FAINT, _EMPTY = '#1c1e21', '#70767d', '#eceef0'
_PREDICTED, _COMPETITOR = '#1f7a5a', '#b4532a'

_font = functools.cache(ImageFont.load_default)


def draw_explanation(explanation: Explanation, image: Image.Image) -> Image.Image:
    """Draws a prediction: the image, the centroids of the predicted class, and the competing centroid.

    The similarity of each centroid is shown as a number and as a bar.

    Args:
        explanation: Result of `explain`.
        image: The explained image.

    Returns:
        An RGB image. A sub-centroid that represents no training image is an empty tile with its index.
    """
    e = explanation
    columns = [_draw_column(_PREDICTED, 'is like', e.class_name, e.probability, e.neighbours)]
    if e.competitor:
        heading = 'rather than', e.competitor.class_name, e.competitor_probability
        columns.append(_draw_column(_COMPETITOR, *heading, (e.competitor,)))
    square = ImageOps.pad(image.convert('RGB'), (_IMAGE, _IMAGE), color=_EMPTY)

    width = 2 * _MARGIN + _IMAGE + sum(column.width + 2 * _MARGIN for column in columns) - _MARGIN
    sheet = Image.new('RGB', (width, _IMAGE + 2 * _MARGIN), 'white')
    sheet.paste(square, (_MARGIN, _MARGIN))
    left = 2 * _MARGIN + _IMAGE
    for index, column in enumerate(columns):
        if index > 0:
            ImageDraw.Draw(sheet).line((left - _MARGIN, _MARGIN, left - _MARGIN, _MARGIN + _IMAGE), _EMPTY, 2)
        sheet.paste(column, (left, _MARGIN))
        left += column.width + 2 * _MARGIN
    return sheet


def draw_centroids(
    model: nn.Module,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    columns: int | None = None,
) -> Image.Image:
    """Draws the training images of all sub-centroids, class by class.

    Args:
        model: An anchored model, see `anchor`.
        class_names: See `explain`.
        columns: Classes per row; by default as many as make the figure slightly wider than high.

    Returns:
        An RGB image. A sub-centroid that represents no training image is an empty tile with its index.

    Raises:
        ValueError: No sub-centroid represents a training image, or a class has no name.
    """
    head = centroid_head(model)
    names = resolve_class_names(class_names, head.num_classes)
    if head.anchor_index is None or (head.anchor_index < 0).all():
        raise ValueError('No centroid of the model represents a training image: call anchor(model, dataset) first.')
    step = _SMALL_TILE + 4
    width, height = head.sub_centroids * step - 4 + _MARGIN, 28 + _SMALL_TILE + _GAP
    if columns is None:
        columns = min(head.num_classes, max(1, round(math.sqrt(1.5 * head.num_classes * height / width))))
    rows = -(-head.num_classes // columns)
    sheet = Image.new('RGB', (_MARGIN + columns * width, 2 * _MARGIN - _GAP + rows * height), 'white')
    draw = ImageDraw.Draw(sheet)
    for index, name in enumerate(names):
        left, top = _MARGIN + index // rows * width, _MARGIN + index % rows * height
        draw.text((left, top), _truncate(name, width - _MARGIN, 16), _TEXT, _font(16))
        for sub_centroid in range(head.sub_centroids):
            tile = _draw_tile(head.anchored_image(index, sub_centroid), sub_centroid, _SMALL_TILE)
            sheet.paste(tile, (left + sub_centroid * step, top + 26))
    return sheet


def _draw_column(color: str, lead: str, name: str, probability: float, neighbours: Sequence[Neighbour]) -> Image.Image:
    """Draws a class and some of its centroids with their similarities and file names, as high as the image."""
    tiles = len(neighbours) * (_TILE + _GAP) - _GAP
    percent = f'  {100 * probability:.1f} %'
    heading = _truncate(name, max(tiles, _MIN_HEADING) - _font(22).getlength(percent), 22) + percent
    column = Image.new('RGB', (max(tiles, math.ceil(_font(22).getlength(heading))), _IMAGE), 'white')
    draw = ImageDraw.Draw(column)
    draw.text((0, 0), lead, _FAINT, _font(15))
    draw.text((0, 20), heading, color, _font(22))
    top = 62
    bar = top + _TILE + 8
    for index, neighbour in enumerate(neighbours):
        left = index * (_TILE + _GAP)
        column.paste(_draw_tile(neighbour.image, neighbour.sub_centroid, _TILE), (left, top))
        draw.rectangle((left, bar, left + _TILE - 1, bar + 5), _EMPTY)
        if filled := round(_TILE * min(max(neighbour.similarity, 0), 1)):
            draw.rectangle((left, bar, left + filled - 1, bar + 5), color)
        similarity = round(neighbour.similarity, 2) + 0.0  # avoids -0.00
        draw.text((left, bar + 12), f'{similarity:.2f}', _TEXT, _font(16))
        if neighbour.image:
            name = neighbour.image.name.rpartition('/')[2]
            draw.text((left, bar + 33), _truncate(name, _TILE, 12), _FAINT, _font(12))
    return column


def _draw_tile(image: AnchoredImage | None, sub_centroid: int, side: int) -> Image.Image:
    if image:
        return image.thumbnail.resize((side, side), Image.Resampling.BICUBIC)
    tile = Image.new('RGB', (side, side), _EMPTY)
    center = side / 2, side / 2
    ImageDraw.Draw(tile).text(center, f'centroid {sub_centroid}', _FAINT, _font(13), anchor='mm')
    return tile


def _truncate(text: str, width: float, size: int) -> str:
    """Shortens a line of text to a width in pixels."""
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(f'{text}...') > width:
        text = text[:-1]
    return f'{text}...'
