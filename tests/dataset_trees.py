"""Small datasets of images with masks in all layouts, and the errors of datasets."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from cluster_zoo.errors import DataError
from segmentation.data.datasets import create_dataset

HEIGHT, WIDTH = 6, 10

# Folders of images and of masks of two splits, suffixes of images and masks, and class of each label in the masks
TREES = {
    'folder': (('train/images', 'val/images'), ('train/masks', 'val/masks'), '.jpg', '.png', {0: 0, 2: 2, 255: 255}),
    'camvid': (('train/images', 'val/images'), ('train/masks', 'val/masks'), '.jpg', '.png', {0: 0, 10: 10, 11: 255}),
    'ade20k': (
        ('images/training', 'images/validation'),
        ('annotations/training', 'annotations/validation'),
        '.jpg',
        '.png',
        {0: 255, 1: 0, 150: 149},
    ),
    'cityscapes': (
        ('leftImg8bit/train/ulm', 'leftImg8bit/val/bonn'),
        ('gtFine/train/ulm', 'gtFine/val/bonn'),
        '_leftImg8bit.png',
        '_gtFine_labelIds.png',
        {0: 255, 7: 0, 16: 255, 33: 18},
    ),
    'pascal_context_59': (
        ('JPEGImages', 'JPEGImages'),
        ('SegmentationClassContext', 'SegmentationClassContext'),
        '.jpg',
        '.png',
        {0: 255, 1: 0, 59: 58},
    ),
    'pascal_voc': (
        ('JPEGImages', 'JPEGImages'),
        ('SegmentationClass', 'SegmentationClass'),
        '.jpg',
        '.png',
        {0: 0, 20: 20, 255: 255},
    ),
    'coco_stuff': (
        ('images/train2017', 'images/val2017'),
        ('annotations/train2017', 'annotations/val2017'),
        '.jpg',
        '.png',
        {0: 0, 10: 10, 12: 11, 91: 80, 181: 170, 255: 255},
    ),
}
LISTINGS = {'pascal_context_59': 'ImageSets/SegmentationContext', 'pascal_voc': 'ImageSets/Segmentation'}
COUNTS = {'folder': 3, 'camvid': 11, 'ade20k': 150, 'cityscapes': 19, 'pascal_context_59': 59}
COUNTS |= {'pascal_voc': 21, 'coco_stuff': 171}


def _encoded(array, form, **options):
    data = io.BytesIO()
    Image.fromarray(array).save(data, form, **options)
    return data.getvalue()


def image_file(seed=0, form='JPEG', size=(HEIGHT, WIDTH)):
    return _encoded(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8), form)


def mask_file(labels, size=(HEIGHT, WIDTH), dtype=np.uint8):
    """Encodes a mask that repeats the labels along the rows."""
    return _encoded(np.resize(np.array(labels, dtype), size), 'PNG')


def write_tree(root, name):
    """Writes two training images and one validation image with their masks."""
    images, masks, image_ending, mask_ending, labels = TREES[name]
    written = {}
    for split, stems in enumerate((('a', 'b'), ('c',))):
        for seed, stem in enumerate(stems):
            written[f'{images[split]}/{stem}{image_ending}'] = image_file(
                seed, 'JPEG' if 'jpg' in image_ending else 'PNG'
            )
            written[f'{masks[split]}/{stem}{mask_ending}'] = mask_file(list(labels))
    if name in LISTINGS:
        written[f'{LISTINGS[name]}/train.txt'] = b'a\nb\n'
        written[f'{LISTINGS[name]}/val.txt'] = b'c\n'
    for path, data in written.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return written


def pack(path, root, prefix=''):
    with tarfile.open(path, 'w') as archive:
        archive.add(root, prefix or '.')
    return path


def message_of(error):
    assert '\n' not in str(error.value)
    return str(error.value)


def refused(*args, check=False, **kwargs):
    with pytest.raises(DataError) as error:
        dataset = create_dataset(*args, **kwargs)
        if check:
            dataset.check(2)
    return message_of(error)
