"""segmentation.data.classes: names, colors and label tables."""

import re

import numpy as np
import pytest
from torchvision.datasets import Cityscapes
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights

from cluster_zoo.errors import DataError
from segmentation.data import classes
from segmentation.data.layouts import LAYOUTS


@pytest.mark.parametrize('known', sorted(name.upper() for name in LAYOUTS if name != 'folder'))
def test_names_and_colours(known):
    names, colours = getattr(classes, known)
    assert len(names) == len(set(names)) == len(colours)
    assert all(re.fullmatch(r'[a-z]+([ -][a-z]+)*', name) for name in names)
    assert colours.dtype == np.uint8
    assert len({tuple(colour) for colour in colours.tolist()} - {(0, 0, 0)}) == len(names)


def test_cityscapes_matches_torchvision():
    evaluated = sorted((known for known in Cityscapes.classes if 0 <= known.train_id < 255), key=lambda k: k.train_id)
    assert classes.CITYSCAPES.names == tuple(known.name for known in evaluated)
    assert classes.CITYSCAPES.colours.tolist() == [list(known.color) for known in evaluated]
    expected = {known.id: known.train_id for known in Cityscapes.classes if known.id >= 0}
    assert expected == classes.CITYSCAPES_IDS


def test_pascal_context_is_sorted():
    assert classes.PASCAL_CONTEXT_59.names == tuple(sorted(classes.PASCAL_CONTEXT_59.names))


def test_voc_matches_torchvision():
    _, *names = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta['categories']
    assert classes.PASCAL_VOC.names == ('background', *names)
    assert classes.PASCAL_VOC.colours[1:].tolist() == classes.pascal_colours(20).tolist()


def test_things_of_coco_stuff_match_torchvision():
    """Ids 1 to 90 are those of COCO's things, of which torchvision marks the unused ones."""
    things = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta['categories']  # by id
    used = [id for id in range(1, 91) if things[id] != 'N/A']
    assert classes.COCO_STUFF.names[:80] == tuple(things[id] for id in used)
    assert [classes.COCO_STUFF_IDS[id - 1] for id in used] == list(range(80))
    # Stuff has the ids 92 (banner) to 182 (wood)
    assert [classes.COCO_STUFF_IDS[id - 1] for id in range(92, 183)] == list(range(80, 171))
    assert (classes.COCO_STUFF.names[80], classes.COCO_STUFF.names[-1]) == ('banner', 'wood')
    assert len(classes.COCO_STUFF_IDS) == 171


def test_pascal_colours():
    # The first classes of PASCAL VOC (aeroplane, bicycle, bird, boat, bottle, bus, car, cat), and its border
    expected = [(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128)]
    colours = [tuple(colour) for colour in classes.pascal_colours(255).tolist()]
    assert colours[:8] == [*expected, (64, 0, 0)]
    assert colours[254] == (224, 224, 192)
    assert len(set(colours)) == 255


def test_label_table():
    table = classes.label_table({0: 255, 3: 1, 65535: 0}, 2)
    assert {label: int(table[label]) for label in np.flatnonzero(table >= 0)} == {0: 255, 3: 1, 255: 255, 65535: 0}
    assert classes.label_table({255: 1}, 2)[255] == 1  # only ignored by default


@pytest.mark.parametrize('labels', [{0: 2}, {0: -1}, {-1: 0}, {65536: 0}, {0: 256}])
def test_label_table_with_invalid_labels(labels):
    (label, number), *_ = labels.items()
    with pytest.raises(DataError, match=f'label {label} cannot be mapped to class {number}'):
        classes.label_table(labels, 2)
