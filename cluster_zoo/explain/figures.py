"""IndexedImages of what nearest-centroid models go by: one decision, or the centroids of all classes."""

import functools
import math
from collections.abc import Mapping, Sequence

import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont

from ..layers.anchors import AnchoredImage
from ..layers.nearest_centroid import centroid_head
from .centroids import Explanation, Neighbour, names_of_classes

__all__ = ['draw_centroids', 'draw_explanation']

# Pixels
_PICTURE = 228  # side of the explained image
_TILE = 104  # side of a training image
_SMALL = 72  # the same on the sheet of all classes
_GAP = 10
_MARGIN = 24
_HEADING = 250  # width of a class's name and probability, where the images under it are narrower

_INK, _FAINT, _EMPTY = '#1c1e21', '#70767d', '#eceef0'
_LIKE, _RATHER = '#1f7a5a', '#b4532a'  # the decision, its competitor


def draw_explanation(explanation: Explanation, image: Image.Image) -> Image.Image:
    """One decision: the image, the centroids of its class, nearest first, and the nearest of the class that is second.

    Under each centroid is its similarity, as a number and as a bar.

    Args:
        explanation: From `explain`.
        image: The picture that it is about.

    Returns:
        An RGB picture. A sub-centroid that is no training image is an empty tile with its number.
    """
    like, rather = explanation.neighbours, explanation.competitor
    columns = [(_LIKE, 'is like', explanation.class_name, explanation.probability, like)]
    if rather:
        columns += [(_RATHER, 'rather than', rather.class_name, explanation.competitor_probability, (rather,))]
    drawn = [_column(*column) for column in columns]
    width = 2 * _MARGIN + _PICTURE + sum(column.width + 2 * _MARGIN for column in drawn) - _MARGIN
    sheet = Image.new('RGB', (width, _PICTURE + 2 * _MARGIN), 'white')
    sheet.paste(_framed(image.convert('RGB'), _PICTURE), (_MARGIN, _MARGIN))
    left = 2 * _MARGIN + _PICTURE
    for place, column in enumerate(drawn):
        if place:
            ImageDraw.Draw(sheet).line((left - _MARGIN, _MARGIN, left - _MARGIN, _MARGIN + _PICTURE), _EMPTY, 2)
        sheet.paste(column, (left, _MARGIN))
        left += column.width + 2 * _MARGIN
    return sheet


def draw_centroids(
    model: nn.Module,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    columns: int | None = None,
) -> Image.Image:
    """A sheet with the training images of all sub-centroids, class by class.

    Args:
        model: A model that `anchor` has been applied to.
        class_names: As for `explain`.
        columns: Classes side by side; None: as many as make the sheet somewhat wider than high.

    Returns:
        An RGB picture. A sub-centroid that is no training image is an empty tile with its number.

    Raises:
        ValueError: No sub-centroid of the model is a training image, or a class has no name.
    """
    head = centroid_head(model)
    names = names_of_classes(class_names, head.num_classes)
    if head.anchor_index is None or (head.anchor_index < 0).all():
        raise ValueError('No centroid of the model is a training image: call anchor(model, dataset) first.')
    width = head.sub_centroids * (_SMALL + 4) - 4 + _MARGIN
    height = 28 + _SMALL + _GAP
    if columns is None:
        columns = min(head.num_classes, max(1, round(math.sqrt(1.5 * head.num_classes * height / width))))
    rows = -(-head.num_classes // columns)
    sheet = Image.new('RGB', (_MARGIN + columns * width, 2 * _MARGIN - _GAP + rows * height), 'white')
    draw = ImageDraw.Draw(sheet)
    for index, name in enumerate(names):
        left, top = _MARGIN + index // rows * width, _MARGIN + index % rows * height
        draw.text((left, top), _cut(name, width - _MARGIN, 16), _INK, _font(16))
        for sub_centroid in range(head.sub_centroids):
            picture = _picture(head.anchored_image(index, sub_centroid), sub_centroid, _SMALL)
            sheet.paste(picture, (left + sub_centroid * (_SMALL + 4), top + 26))
    return sheet


def _column(colour: str, lead: str, name: str, probability: float, neighbours: Sequence[Neighbour]) -> Image.Image:
    """A class and some of its centroids, as high as the explained image."""
    tiles = len(neighbours) * (_TILE + _GAP) - _GAP
    tail = f'  {100 * probability:.1f} %'
    name = _cut(name, max(tiles, _HEADING) - _font(22).getlength(tail), 22)
    column = Image.new('RGB', (max(tiles, math.ceil(_font(22).getlength(name + tail))), _PICTURE), 'white')
    draw = ImageDraw.Draw(column)
    draw.text((0, 0), lead, _FAINT, _font(15))
    draw.text((0, 20), name + tail, colour, _font(22))
    for place, neighbour in enumerate(neighbours):
        _tile(column, place * (_TILE + _GAP), 62, neighbour, colour)
    return column


def _tile(column: Image.Image, left: int, top: int, neighbour: Neighbour, colour: str) -> None:
    """A training image, and under it its similarity and name."""
    column.paste(_picture(neighbour.image, neighbour.sub_centroid, _TILE), (left, top))
    draw, bar = ImageDraw.Draw(column), top + _TILE + 8
    draw.rectangle((left, bar, left + _TILE - 1, bar + 5), _EMPTY)
    filled = round(_TILE * min(max(neighbour.similarity, 0), 1))
    if filled:
        draw.rectangle((left, bar, left + filled - 1, bar + 5), colour)
    similarity = round(neighbour.similarity, 2) + 0.0  # not -0.00
    draw.text((left, bar + 12), f'{similarity:.2f}', _INK, _font(16))
    if neighbour.image:
        draw.text((left, bar + 33), _cut(neighbour.image.name.rpartition('/')[2], _TILE, 12), _FAINT, _font(12))


def _picture(image: AnchoredImage | None, sub_centroid: int, side: int) -> Image.Image:
    if image:
        return image.thumbnail.resize((side, side), Image.Resampling.BICUBIC)
    empty = Image.new('RGB', (side, side), _EMPTY)
    draw = ImageDraw.Draw(empty)
    draw.text((side / 2, side / 2), f'centroid {sub_centroid}', _FAINT, _font(13), anchor='mm')
    return empty


def _framed(image: Image.Image, side: int) -> Image.Image:
    """The whole picture in the middle of a square."""
    scale = side / max(image.size)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    square = Image.new('RGB', (side, side), _EMPTY)
    square.paste(image, tuple((side - length) // 2 for length in image.size))
    return square


def _cut(text: str, room: float, size: int) -> str:
    """A line of text as far as it fits into so many pixels."""
    font = _font(size)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f'{text}...') > room:
        text = text[:-1]
    return f'{text}...'


_font = functools.cache(ImageFont.load_default)
