"""Classes of the datasets: names, colors, and tables from the labels of a dataset to classes."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cluster_zoo.errors import DataError

__all__ = ['ADE20K', 'CAMVID', 'CITYSCAPES', 'CITYSCAPES_IDS', 'COCO_STUFF', 'COCO_STUFF_IDS', 'IGNORE_INDEX', 'LOVEDA']
__all__ += ['PASCAL_CONTEXT_59', 'PASCAL_VOC', 'Classes', 'label_table', 'numbered_classes', 'pascal_colours']

IGNORE_INDEX = 255  # label of the pixels that losses and metrics ignore
_LABELS = 1 << 16  # masks have at most 16 bits per pixel


class Classes(NamedTuple):
    """The K classes of a dataset, by index.

    Args:
        names: [K] names, lower case.
        colours: [K, 3] uint8, distinct, and not black, the color of ignored pixels.
    """

    names: tuple[str, ...]
    colours: np.ndarray


def pascal_colours(count: int) -> np.ndarray:
    """Returns the first colors of the PASCAL VOC color map after black: [count, 3] uint8.

    The bits of the index are distributed to red, green and blue in turn, the lowest bits to the highest.
    """
    index = np.arange(1, count + 1)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        channel, shift = bit % 3, 7 - bit // 3
        colours[:, channel] |= ((index >> bit & 1) << shift).astype(np.uint8)
    return colours


def numbered_classes(count: int) -> Classes:
    """Returns classes whose names are their indices."""
    return Classes(tuple(map(str, range(count))), pascal_colours(count))


def label_table(labels: Mapping[int, int], count: int) -> np.ndarray:
    """Converts a mapping from labels to classes to a lookup table.

    Args:
        labels: Class of each label. Label 255 is ignored unless the mapping contains it.
        count: Number of classes.

    Returns:
        int16 [65536], the class of each label, and -1 for labels that the mapping does not contain.

    Raises:
        DataError: A label is not in 0 to 65535, or a class is neither in 0 to `count` - 1 nor 255, which ignores it.
    """
    for label, number in labels.items():
        if not 0 <= label < _LABELS or not (0 <= number < count or number == IGNORE_INDEX):
            raise DataError(
                f'label {label} cannot be mapped to class {number} (--remap {label}={number}): labels are 0 to '
                f'{_LABELS - 1}, classes 0 to {count - 1}, or {IGNORE_INDEX} to ignore the label'
            )
    table = np.full(_LABELS, -1, np.int16)
    table[IGNORE_INDEX] = IGNORE_INDEX
    table[list(labels)] = list(labels.values())
    return table


def _classes(names: str, colours: str = '') -> Classes:
    """Parses names, separated by commas, and colors, in hexadecimal digits."""
    split = tuple(names.split(', '))
    if not colours:
        return Classes(split, pascal_colours(len(split)))
    return Classes(split, np.array(list(bytes.fromhex(colours)), np.uint8).reshape(-1, 3))


CAMVID = _classes(
    'sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist',
    '808080 800000 c0c080 804080 0000c0 808000 c08080 404080 400080 404000 0080c0',
)

CITYSCAPES = _classes(
    'road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, '
    'rider, car, truck, bus, train, motorcycle, bicycle',
    '804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c '
    'ff0000 00008e 000046 003c64 005064 0000e6 770b20',
)

# Ids in *_labelIds.png that are evaluated, by class index; the other 15 of 34 ids are ignored.
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

_VOC_NAMES = (
    'aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person, '
    'pottedplant, sheep, sofa, train, tvmonitor'
)
# The published background is black, here the color of ignored pixels: the two are exchanged.
_VOC_VOID = np.array([[224, 224, 192]], np.uint8)
PASCAL_VOC = Classes(('background', *_VOC_NAMES.split(', ')), np.concatenate([_VOC_VOID, pascal_colours(20)]))

LOVEDA = _classes(
    'background, building, road, water, barren, forest, agricultural',
    'ffffff ff0000 ffff00 0000ff 9f81b7 00ff00 ffc380',
)

COCO_STUFF = _classes(
    'person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, '
    'parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, '
    'handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, '
    'surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, '
    'broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, '
    'laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, '
    'scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, '
    'cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, '
    'desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, '
    'fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, '
    'mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, '
    'playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, '
    'snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable, '
    'wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, '
    'window-blind, window-other, wood'
)

# Labels of the original masks that have no class: the ids 12, 26, ... of COCO, which are the labels plus 1.
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_STUFF_IDS = {
    label: number for number, label in enumerate(sorted({*range(182)} - {unused - 1 for unused in _UNUSED_IDS}))
}
