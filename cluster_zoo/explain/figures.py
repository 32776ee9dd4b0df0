"""Pictures of what nearest-centroid models go by: one decision, or the centroids of all classes."""

import functools
import math
from collections.abc import Mapping, Sequence

import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont

from ..anchors import AnchoredImage
from .centroids import Explanation, Neighbour, centroid_head, names_of_classes

__all__ = ['draw_centroids', 'draw_explanation']

# Pixels
_PICTURE = 228  # side of the explained image
_TILE = 104  # side of a training image
_SMALL = 72  # the same on the sheet of all classes
_GAP = 10
_MARGIN = 24

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
    first = 2 * _MARGIN + _PICTURE
    second = first + len(like) * (_TILE + _GAP) - _GAP + 2 * _MARGIN
    width = (second + max(_TILE, _MARGIN * 6) if rather else second - 2 * _MARGIN) + _MARGIN
    sheet = Image.new('RGB', (width, _PICTURE + 2 * _MARGIN), 'white')
    draw = ImageDraw.Draw(sheet)
    sheet.paste(_framed(image.convert('RGB'), _PICTURE), (_MARGIN, _MARGIN))

    _heading(draw, first, 'is like', explanation.class_name, explanation.probability, _LIKE, second - first - _MARGIN)
    for place, neighbour in enumerate(like):
        _tile(sheet, first + place * (_TILE + _GAP), neighbour, _LIKE)
    if rather:
        middle = second - _MARGIN
        draw.line((middle, _MARGIN, middle, _MARGIN + _PICTURE), _EMPTY, 2)
        room = width - second - _MARGIN
        _heading(draw, second, 'rather than', rather.class_name, explanation.competitor_probability, _RATHER, room)
        _tile(sheet, second, rather, _RATHER)
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
        _text(draw, (left, top), name, _INK, 16, width - _MARGIN)
        for sub_centroid in range(head.sub_centroids):
            picture = _picture(head.anchored_image(index, sub_centroid), sub_centroid, _SMALL)
            sheet.paste(picture, (left + sub_centroid * (_SMALL + 4), top + 26))
    return sheet


def _heading(
    draw: ImageDraw.ImageDraw, left: int, lead: str, name: str, probability: float, colour: str, room: int
) -> None:
    draw.text((left, _MARGIN), lead, _FAINT, _font(15))
    tail = f'  {100 * probability:.1f} %'
    width = _text(draw, (left, _MARGIN + 20), name, colour, 22, room - draw.textlength(tail, _font(22)))
    draw.text((left + width, _MARGIN + 20), tail, colour, _font(22))


def _tile(sheet: Image.Image, left: int, neighbour: Neighbour, colour: str) -> None:
    """A training image, and under it its similarity and name."""
    draw, top = ImageDraw.Draw(sheet), _MARGIN + 62
    sheet.paste(_picture(neighbour.image, neighbour.sub_centroid, _TILE), (left, top))
    bar = top + _TILE + 8
    draw.rectangle((left, bar, left + _TILE - 1, bar + 5), _EMPTY)
    filled = round(_TILE * min(max(neighbour.similarity, 0), 1))
    if filled:
        draw.rectangle((left, bar, left + filled - 1, bar + 5), colour)
    similarity = round(neighbour.similarity, 2) + 0.0  # not -0.00
    draw.text((left, bar + 12), f'{similarity:.2f}', _INK, _font(16))
    if neighbour.image:
        _text(draw, (left, bar + 33), neighbour.image.name.rpartition('/')[2], _FAINT, 12, _TILE)


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


def _text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: str, size: int, room: float) -> float:
    """A line of text, cut where it needs more width than there is, and the width that it takes."""
    font = _font(size)
    if draw.textlength(text, font) > room:
        while text and draw.textlength(f'{text}...', font) > room:
            text = text[:-1]
        text = f'{text}...'
    draw.text(place, text, colour, font)
    return draw.textlength(text, font)


_font = functools.cache(ImageFont.load_default)
