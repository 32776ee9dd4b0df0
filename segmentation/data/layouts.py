"""Layouts of the datasets: where images and masks are, and which classes the labels stand for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster_zoo.datasets import image_extensions

from .classes import (
    ADE20K,
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_IDS,
    COCO_STUFF,
    COCO_STUFF_IDS,
    IGNORE_INDEX,
    LOVEDA,
    PASCAL_CONTEXT_59,
    PASCAL_VOC,
    Classes,
    numbered_classes,
)

__all__ = ['LAYOUTS', 'Layout']


@dataclass(frozen=True)
class Layout:
    """The files of a dataset. `{split}` stands for the dataset's own name of a split; "A+B" is a split of two parts."""

    images: str  # folder of a split's images
    masks: str  # folder of a split's masks, which have the names of the images up to the suffix
    labels: Mapping[str, Mapping[int, int]]  # class of each label, by the mask's suffix; the first existing one is used
    classes: Classes
    splits: Mapping[str, str] | None = None  # own names of the splits, by common name; None: every folder is a split
    image_suffixes: tuple[str, ...] = tuple(sorted(image_extensions()))
    listing: str | None = None  # file with the images of a split, one name per line, without suffix; None: all images
    tops: tuple[str, ...] = ()  # names of the dataset's folder, to find it in `root`


def _labels_from_1(count: int) -> dict[int, int]:
    """Labels that are the class plus 1, and 0 for ignored pixels."""
    return {0: IGNORE_INDEX} | {label: label - 1 for label in range(1, count + 1)}


# Classes and labels of a folder depend on its files, see `create_dataset`.
_FOLDER = Layout(
    '{split}/images', '{split}/masks', labels={'.png': {}, '.tif': {}, '.tiff': {}}, classes=numbered_classes(0)
)
LAYOUTS = {
    'folder': _FOLDER,
    'camvid': replace(
        _FOLDER,
        labels={'.png': {label: label for label in range(11)} | {11: IGNORE_INDEX}},
        classes=CAMVID,
        splits=dict(train='train', val='val', test='test'),
        tops=('camvid',),
    ),
    'ade20k': Layout(
        images='images/{split}',
        masks='annotations/{split}',
        labels={'.png': _labels_from_1(150)},
        classes=ADE20K,
        splits=dict(train='training', val='validation'),
        tops=('ADEChallengeData2016',),
    ),
    'cityscapes': Layout(
        images='leftImg8bit/{split}',
        masks='gtFine/{split}',
        labels={
            '_gtFine_labelTrainIds.png': {label: label for label in range(19)},
            '_gtFine_labelIds.png': CITYSCAPES_IDS,
        },
        classes=CITYSCAPES,
        splits=dict(train='train', val='val'),
        image_suffixes=('_leftImg8bit.png',),
        tops=('cityscapes',),
    ),
    'pascal_context_59': Layout(
        images='JPEGImages',
        masks='SegmentationClassContext',
        labels={'.png': _labels_from_1(59)},
        classes=PASCAL_CONTEXT_59,
        splits=dict(train='train', val='val'),
        listing='ImageSets/SegmentationContext/{split}.txt',
        tops=('VOC2010', 'VOCdevkit/VOC2010'),
    ),
    'pascal_voc': Layout(
        images='JPEGImages',
        masks='SegmentationClass',
        labels={'.png': {label: label for label in range(21)}},
        classes=PASCAL_VOC,
        splits=dict(train='train', val='val'),
        listing='ImageSets/Segmentation/{split}.txt',
        tops=('VOC2012', 'VOCdevkit/VOC2012'),
    ),
    'coco_stuff': Layout(
        images='images/{split}',
        masks='annotations/{split}',
        labels={'_labelTrainIds.png': {label: label for label in range(171)}, '.png': COCO_STUFF_IDS},
        classes=COCO_STUFF,
        splits=dict(train='train2017', val='val2017'),
        tops=('coco_stuff164k', 'cocostuff'),
    ),
    'loveda': Layout(
        images='{split}/images_png',
        masks='{split}/masks_png',
        labels={'.png': _labels_from_1(7)},
        classes=LOVEDA,
        splits=dict(train='Train/Urban+Train/Rural', val='Val/Urban+Val/Rural'),
        tops=('LoveDA', 'loveDA'),
    ),
}
