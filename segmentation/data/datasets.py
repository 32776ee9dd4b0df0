"""Datasets of images with masks: five layouts of files, each read from a folder or straight from a tar.

:func:`create_dataset` finds every image and its mask, :meth:`SegmentationDataset.check` decodes them all: what is wrong
with a dataset shows in one message before training starts. Images are taken as they are stored: an orientation in a
photograph's EXIF data is not applied, because masks have none.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from cluster_zoo.errors import DataError, nearest

from .classes import (
    ADE20K,
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_IDS,
    IGNORE_INDEX,
    PASCAL_CONTEXT_59,
    Classes,
    label_table,
    numbered_classes,
)
from .files import Archive, Folder, open_files, read_image, read_labels

__all__ = ['DATASETS', 'DataError', 'SegmentationDataset', 'create_dataset']

_LISTED = 5  # that many of the faults are named in a message


@dataclass(frozen=True)
class Layout:
    """Where a dataset has its images and masks, and what the numbers in its masks mean.

    Args:
        images: Folder of a split's images; `{split}` stands for the dataset's own name of the split.
        masks: Folder of its masks, where a mask has the name of its image up to the endings.
        labels: What the labels stand for (class by label) by the ending of a mask's name. Of several endings the first
            is taken that there is a mask with.
        classes: The classes.
        splits: The dataset's own names of its splits, by ours; without any, every folder with images is a split.
        image_endings: How the names of images end.
        listing: File with the names of a split's images, one a line without ending; without one the split is all of the
            folder.
        tops: Folders that the dataset may come in, to be found where `root` is the one above.
    """

    images: str
    masks: str
    labels: Mapping[str, Mapping[int, int]]
    classes: Classes
    splits: Mapping[str, str] | None = None
    image_endings: tuple[str, ...] = get_img_extensions()
    listing: str | None = None
    tops: tuple[str, ...] = ()


def _same(count: int) -> dict[int, int]:
    return {label: label for label in range(count)}


def _from_one(count: int) -> dict[int, int]:
    """Labels that are 1 more than the class; 0 is what belongs to none."""
    return {0: IGNORE_INDEX} | {label: label - 1 for label in range(1, count + 1)}


_FOLDER = Layout('{split}/images', '{split}/masks', {'.png': {}}, numbered_classes(0))  # the folder tells which
_LAYOUTS = {
    'folder': _FOLDER,
    'camvid': replace(
        _FOLDER,
        labels={'.png': _same(11) | {11: IGNORE_INDEX}},
        classes=CAMVID,
        splits=dict(train='train', val='val', test='test'),
        tops=('camvid',),
    ),
    'ade20k': Layout(
        images='images/{split}',
        masks='annotations/{split}',
        labels={'.png': _from_one(150)},
        classes=ADE20K,
        splits=dict(train='training', val='validation'),
        tops=('ADEChallengeData2016',),
    ),
    'cityscapes': Layout(
        images='leftImg8bit/{split}',
        masks='gtFine/{split}',
        labels={'_gtFine_labelTrainIds.png': _same(19), '_gtFine_labelIds.png': CITYSCAPES_IDS},
        classes=CITYSCAPES,
        splits=dict(train='train', val='val'),
        image_endings=('_leftImg8bit.png',),
        tops=('cityscapes',),
    ),
    'pascal_context_59': Layout(
        images='JPEGImages',
        masks='SegmentationClassContext',
        labels={'.png': _from_one(59)},
        classes=PASCAL_CONTEXT_59,
        splits=dict(train='train', val='val'),
        listing='ImageSets/SegmentationContext/{split}.txt',
        tops=('VOC2010', 'VOCdevkit/VOC2010'),
    ),
}
DATASETS = tuple(_LAYOUTS)


class _Sample(NamedTuple):
    image: str
    mask: str
    ending: str  # of the mask's name: what its labels mean depends on it


class SegmentationDataset(Dataset):
    """Images with masks; made by :func:`create_dataset`.

    Attributes:
        classes: Names of the K classes.
        colours: [K, 3] uint8, a colour for each class.
        ignore_index: Label of the pixels that belong to no class (255).
        transform: Applied to (image, mask), None for none.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        files: Folder | Archive,
        samples: list[_Sample],
        tables: dict[str, np.ndarray],
        classes: Classes,
        transform: Callable | None = None,
    ) -> None:
        self.files = files
        self.samples = samples
        self.tables = tables  # from labels to classes, by the ending of the mask
        self.classes, self.colours = classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Path of an image in the dataset's folder or archive."""
        return self.samples[index].image

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """An image with its mask.

        Returns:
            The image, uint8 [3, H, W], and the mask, int64 [H, W] in 0 to K - 1 or 255, as torchvision's tensors; what
            the transform makes of them if there is one.

        Raises:
            DataError: A file can not be read, the sizes differ, or a label is no class.
        """
        image, mask = self._read(index)
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def check(self, workers: int = 1) -> None:
        """Decodes every image and mask, without the transform.

        Args:
            workers: Number of threads.

        Raises:
            DataError: For what :meth:`__getitem__` refuses, naming the first few files.
        """

        def fault(index: int) -> str | None:
            try:
                self._read(index)
            except DataError as error:
                return str(error)
            return None

        faults = [found for found in _in_threads(fault, range(len(self)), workers, 'Checking the data') if found]
        if faults:
            raise DataError(
                f'{len(faults)} of {len(self)} images with their masks can not be used: {_listed(faults, "; ")}. '
                'Mend or remove them'
            )

    def _read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        sample = self.samples[index]
        image = F.to_image(read_image(self.files, sample.image))
        labels = read_labels(self.files, sample.mask)
        if image.shape[1:] != labels.shape:
            (height, width), (rows, columns) = image.shape[1:], labels.shape
            raise DataError(
                f'{self.files.root / sample.image} is {width} x {height} pixels but its mask '
                f'{self.files.root / sample.mask} {columns} x {rows}'
            )
        table = self.tables[sample.ending]
        mask = table[labels]
        if mask.min() < 0:
            known = _spans(np.flatnonzero(table >= 0))
            unknown = _spans(np.unique(labels[mask < 0]))
            raise DataError(f'{self.files.root / sample.mask} has label {unknown}; known are {known}')
        return image, tv_tensors.Mask(torch.from_numpy(mask.astype(np.int64)))


def create_dataset(
    name: str,
    root: str | os.PathLike,
    split: str,
    transform: Callable | None = None,
    *,
    num_classes: int | None = None,
    remap: Mapping[int, int] | None = None,
    workers: int = 1,
) -> SegmentationDataset:
    """Opens a dataset of images with masks.

    ========================= ==========================================================================================
    name                      files in `root`
    ========================= ==========================================================================================
    `folder`                  `{split}/images/NAME.jpg` (or .jpeg, .png) and `{split}/masks/NAME.png`; class names in
                              `classes.txt`, one a line, if there is one
    `camvid`                  the same with splits train, val, test; 11 classes, label 11 is ignored
    `ade20k`                  `images/training/NAME.jpg`, `annotations/training/NAME.png`; 150 classes, 0 is ignored
    `cityscapes`              `leftImg8bit/train/CITY/NAME_leftImg8bit.png`, `gtFine/train/CITY/NAME_gtFine_*.png`: 19
                              classes, from labelTrainIds where there are such masks, else from labelIds
    `pascal_context_59`       `JPEGImages/NAME.jpg`, `SegmentationClassContext/NAME.png`, names in
                              `ImageSets/SegmentationContext/train.txt`; 59 classes, 0 is ignored
    ========================= ==========================================================================================

    Masks are PNGs of one channel: grey of any depth, or a palette, whose indices count and not its colours. Label 255
    is ignored everywhere.

    Args:
        name: One of the above.
        root: The folder, or an uncompressed tar of it. It may also be what holds the dataset's folder.
        split: `train`, `val` or what the dataset has; several as `train+val`.
        transform: Of (image, mask), such as those of :mod:`segmentation.data.transforms`.
        num_classes: Number of classes. For `folder` without class names and without `remap` the highest label in all
            masks of all splits gives it, which means to read them all; else it is only compared.
        remap: For `folder`, the class of each label, 255 to ignore it. A label that is not in it is an error.
        workers: Threads that read masks, where they have to be read.

    Raises:
        DataError: There is no such dataset or split, the files are not laid out so, the split is empty, a mask is
            missing, or the number of classes is another one.
    """
    if name not in _LAYOUTS:
        raise DataError(f'no dataset {name!r}{nearest(name, _LAYOUTS)}: there is {", ".join(_LAYOUTS)}')
    if remap is not None and name != 'folder':
        raise DataError(f'the labels of {name} are known: remap is for a dataset of kind folder')
    files = open_files(root)
    layout = _LAYOUTS[name]
    top, splits = _find_splits(files, name, layout)
    samples = []
    for part in split.split('+'):
        own = splits.get(part, part if part in splits.values() else None)
        if own is None:
            raise DataError(f'{root} has no split {part!r}{nearest(part, splits)}: there is {", ".join(splits)}')
        samples += _find_samples(files, top, layout, own)
    if name == 'folder':
        layout = _describe_folder(files, top, layout, splits, num_classes, remap, workers)
    count = len(layout.classes.names)
    if num_classes not in (None, count):
        raise DataError(f'{name} in {root} has {count} classes, not {num_classes}')
    tables = {ending: label_table(labels, count) for ending, labels in layout.labels.items()}
    return SegmentationDataset(files, samples, tables, layout.classes, transform)


def _find_splits(files: Folder | Archive, name: str, layout: Layout) -> tuple[str, dict[str, str]]:
    """The folder of the files that the dataset is in, and its own names of the splits that are there, by ours."""
    inside = files.folders('')
    for top in ('', *layout.tops, *(inside if len(inside) == 1 else ())):
        if not files.exists(top):
            continue
        splits = layout.splits or {folder: folder for folder in files.folders(top)}
        needed = (layout.images, layout.masks)
        present = {
            split: own
            for split, own in splits.items()
            if all(files.exists(_join(top, folder.format(split=own))) for folder in needed)
        }
        if present:
            return top, present
    split = next(iter((layout.splits or dict(train='train')).values()))
    raise DataError(
        f'{files.root} is no dataset of kind {name}: expected {layout.images.format(split=split)} and '
        f'{layout.masks.format(split=split)} in it, found {_listed(inside) or "no folders"}'
    )


def _find_samples(files: Folder | Archive, top: str, layout: Layout, split: str) -> list[_Sample]:
    images, masks = (_join(top, folder.format(split=split)) for folder in (layout.images, layout.masks))
    stems = _stems(files.below(images), images, layout.image_endings)
    if layout.listing is not None:
        stems = _listed_stems(files, _join(top, layout.listing.format(split=split)), stems)
    if not stems:
        raise DataError(f'{files.root / images} has no images (*{", *".join(layout.image_endings)}) of split {split}')
    there = set(files.below(masks))
    samples, lacking = [], []
    for stem, image in stems.items():
        ending = next((ending for ending in layout.labels if f'{masks}/{stem}{ending}' in there), None)
        if ending is None:
            lacking.append(image)
        else:
            samples.append(_Sample(image, f'{masks}/{stem}{ending}', ending))
    if lacking:
        endings = ' or '.join(f'NAME{ending}' for ending in layout.labels)
        raise DataError(
            f'{len(lacking)} of {len(stems)} images have no mask ({endings} in {files.root / masks}): '
            f'{_listed(lacking)}'
        )
    return samples


def _stems(paths: Iterable[str], folder: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Images by their paths in the folder, less the ending."""
    stems: dict[str, str] = {}
    for path in paths:
        ending = next((ending for ending in endings if path.lower().endswith(ending.lower())), None)
        if ending is not None:
            stem = path[len(folder) + 1 : -len(ending)]
            if stem in stems:
                raise DataError(f'{stems[stem]} and {path} would have the same mask: remove one of them')
            stems[stem] = path
    return stems


def _listed_stems(files: Folder | Archive, listing: str, stems: dict[str, str]) -> dict[str, str]:
    try:
        wanted = files.read(listing).decode().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{files.root / listing}, which lists the images, can not be read ({error})') from error
    lacking = [stem for stem in wanted if stem not in stems]
    if lacking:
        raise DataError(
            f'{len(lacking)} of {len(wanted)} images in {files.root / listing} are missing: {_listed(lacking)}'
        )
    return {stem: stems[stem] for stem in wanted}


def _describe_folder(
    files: Folder | Archive,
    top: str,
    layout: Layout,
    splits: dict[str, str],
    num_classes: int | None,
    remap: Mapping[int, int] | None,
    workers: int,
) -> Layout:
    """The layout of kind `folder`, with the classes and labels of this one."""
    names = _class_names(files, _join(top, 'classes.txt'))
    count = len(names) or num_classes
    if not count and remap is not None:
        count = max((number for number in remap.values() if number != IGNORE_INDEX), default=-1) + 1
    if not count:
        masks = [path for split in splits for path in files.below(_join(top, layout.masks.format(split=split)))]
        count = _count_classes(files, [path for path in masks if path.endswith('.png')], workers)
    if not 0 < count <= IGNORE_INDEX:
        raise DataError(f'{files.root} would have {count} classes: 1 to {IGNORE_INDEX} are possible')
    classes = numbered_classes(count)
    labels = _same(count) if remap is None else remap
    return replace(layout, labels={'.png': labels}, classes=classes._replace(names=names or classes.names))


def _class_names(files: Folder | Archive, path: str) -> tuple[str, ...]:
    try:
        lines = files.read(path).decode().splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{files.root / path}, which names the classes, can not be read ({error})') from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(set(names)) < len(names) or not names:
        raise DataError(f'{files.root / path} does not name the classes: expected one name a line, each once')
    return names


def _count_classes(files: Folder | Archive, masks: list[str], workers: int) -> int:
    def highest(path: str) -> int:
        labels = read_labels(files, path)
        return int(labels[labels != IGNORE_INDEX].max(initial=0))

    count = max(_in_threads(highest, masks, workers, 'Counting classes')) + 1
    if count < 2:
        raise DataError(
            f'the masks in {files.root} have no label but 0 and {IGNORE_INDEX}, which is ignored: if it is a class, '
            f'say so (remap {{0: 0, {IGNORE_INDEX}: 1}})'
        )
    return count


def _in_threads(function: Callable, items: Iterable, workers: int, title: str) -> list:
    items = list(items)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        return list(tqdm(pool.map(function, items), title, len(items), disable=None))


def _join(folder: str, path: str) -> str:
    return f'{folder}/{path}' if folder else path


def _spans(numbers: Iterable[int]) -> str:
    """Sorted numbers, neighbours together: ``0-11, 255``."""
    spans: list[list[int]] = []
    for number in map(int, numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ', '.join('-'.join(map(str, span)) for span in spans)


def _listed(names: Iterable[str], separator: str = ', ') -> str:
    names = list(names)
    more = f'{separator}and {len(names) - _LISTED} more' if len(names) > _LISTED else ''
    return separator.join(names[:_LISTED]) + more
