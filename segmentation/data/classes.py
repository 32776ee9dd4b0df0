"""What the numbers in a mask stand for: class names, colours, and the tables from a dataset's labels to classes."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cluster_zoo.errors import DataError

__all__ = ['ADE20K', 'CAMVID', 'CITYSCAPES', 'CITYSCAPES_IDS', 'IGNORE_INDEX', 'PASCAL_CONTEXT_59', 'Classes']
__all__ += ['label_table', 'numbered_classes', 'pascal_colours']

IGNORE_INDEX = 255  # in the masks that a dataset yields: a pixel that is neither learned from nor measured on
_LABELS = 1 << 16  # a mask has at most 16 bits a pixel


class Classes(NamedTuple):
    """The classes of a dataset, in the order of their numbers.

    Args:
        names: [K] names, lower case.
        colours: [K, 3] uint8, distinct; black is left to pixels that are ignored.
    """

    names: tuple[str, ...]
    colours: np.ndarray


def pascal_colours(count: int) -> np.ndarray:
    """The first `count` colours of the PASCAL VOC colour map after its black: [count, 3] uint8.

    The bits of a number go in turn to red, green and blue, the lowest ones to the brightest halves: neighbouring
    numbers get colours that are easily told apart, and all 255 are distinct.
    """
    number = np.arange(1, count + 1)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        channel, shift = bit % 3, 7 - bit // 3
        colours[:, channel] |= ((number >> bit & 1) << shift).astype(np.uint8)
    return colours


def numbered_classes(count: int) -> Classes:
    """Classes of which only the number is known, named by it."""
    return Classes(tuple(map(str, range(count))), pascal_colours(count))


def label_table(labels: Mapping[int, int], count: int) -> np.ndarray:
    """A mapping from a mask's labels to classes, as an array to look them up in.

    Args:
        labels: Classes by label. 255 is ignored unless the mapping says otherwise.
        count: Number of classes.

    Returns:
        [65536] int16: the class of each label, -1 for labels that the mapping does not name.

    Raises:
        DataError: A label is not in 0 to 65535, or a class not in 0 to `count` - 1 (or 255, to ignore the label).
    """
    for label, number in labels.items():
        if not 0 <= label < _LABELS or not (0 <= number < count or number == IGNORE_INDEX):
            raise DataError(
                f'label {label} can not become class {number}: labels are 0 to {_LABELS - 1}, classes 0 to '
                f'{count - 1}, or {IGNORE_INDEX} to ignore the label'
            )
    table = np.full(_LABELS, -1, np.int16)
    table[IGNORE_INDEX] = IGNORE_INDEX
    table[list(labels)] = list(labels.values())
    return table


def _classes(names: str, colours: list[tuple[int, int, int]] | None = None) -> Classes:
    split = tuple(names.split(', '))
    return Classes(split, pascal_colours(len(split)) if colours is None else np.array(colours, np.uint8))


CAMVID = _classes(
    'sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist',
    [
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ],
)

CITYSCAPES = _classes(
    'road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, '
    'rider, car, truck, bus, train, motorcycle, bicycle',
    [
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ],
)

# The label ids of *_labelIds.png that are evaluated, in the order of their classes; the other 15 of 34 are not.
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_IDS = dict.fromkeys(range(34), IGNORE_INDEX) | {label: number for number, label in enumerate(_EVALUATED)}

ADE20K = _classes(
    'wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, '
    'table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, '
    'armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, '
    'chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, '
    'case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, '
    'book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, '
    'hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, '
    'dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, '
    'fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, '
    'minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, '
    'screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, '
    'monitor, bulletin board, shower, radiator, glass, clock, flag'
)

PASCAL_CONTEXT_59 = _classes(
    'aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat, '
    'ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse, '
    'keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves, '
    'sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood'
)
