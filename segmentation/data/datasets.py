"""Datasets of images with masks, read from a folder or directly from a tar.

`create_dataset` finds every image and its mask. `check` decodes them all, so that one
message lists the problems of a dataset before training starts.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from posixpath import join
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from tqdm.contrib.concurrent import thread_map

from cluster_zoo.errors import DataError, nearest

from .classes import IGNORE_INDEX, Classes, label_table, numbered_classes
from .files import Archive, Folder, open_files, read_image, read_labels
from .layouts import LAYOUTS, Layout

__all__ = ['DATASETS', 'DataError', 'SegmentationDataset', 'create_dataset']

DATASETS = tuple(LAYOUTS)
_logger = logging.getLogger(__name__)

_LISTED = 5  # number of files that a message lists
_MAPPED = 10  # number of labels in a proposed --remap
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'test')  # usual names


class _Sample(NamedTuple):
    image: str
    mask: str
    suffix: str  # of the mask; determines the meaning of its labels


class SegmentationDataset(Dataset):
    """Images with masks, see `create_dataset`.

    Attributes:
        classes: Names of the K classes.
        colours: [K, 3] uint8, the color of each class.
        ignore_index: Label of the pixels without class (255).
        transform: Applied to (image, mask) if not None.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        files: Folder | Archive,
        samples: list[_Sample],
        tables: dict[str, np.ndarray],
        classes: Classes,
        transform: Callable | None = None,
        advice: str = '',
        numbered: bool = False,
    ) -> None:
        self.files = files
        self.samples = samples
        self.tables = tables  # from labels to classes, by the suffix of the mask
        self.classes, self.colours = classes
        self.transform = transform
        self.advice = advice  # what to do about unknown labels
        self.numbered = numbered  # whether the labels are the classes, and nobody has said what 255 means

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Returns the path of an image in the dataset's folder or archive."""
        return self.samples[index].image

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Reads an image with its mask.

        Returns:
            The image, uint8 [3, H, W], and the mask, int64 [H, W] with values 0 to K - 1 or 255, as torchvision's
            tv_tensors; or the output of the transform.

        Raises:
            DataError: A file cannot be decoded, the sizes differ, or the mask has an unknown label.
        """
        image, mask = self._read(index)
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def check(self, workers: int = 1) -> None:
        """Decodes every image and mask, without the transform.

        Args:
            workers: Number of threads.

        Raises:
            DataError: Any sample is invalid, see `__getitem__`; the message lists the first ones. Or all labels of a
                `folder` are 0 and 255, which is ignored.
        """

        def read(index: int) -> str | set[int]:
            try:
                return set(self._read(index)[1].flatten().bincount().nonzero().flatten().tolist())
            except DataError as error:
                return str(error)

        results = thread_map(read, range(len(self)), max_workers=workers, desc='Checking the data', disable=None)
        if faults := [result for result in results if isinstance(result, str)]:
            advice = f': {self.advice}'
            unknown = any(fault.endswith(advice) for fault in faults)
            faults = [fault.removesuffix(advice) for fault in faults]
            raise DataError(
                f'{len(faults)} of {len(self)} images or their masks cannot be used: {_listed(faults, "; ")}. '
                + (f'For the labels, {self.advice}' if unknown else 'Repair or remove them')
            )
        if self.numbered and len(self.classes) > 1 and set().union(*results) == {0, IGNORE_INDEX}:
            raise DataError(_only_0_and_255(self.files))

    def count_pixels(self, workers: int = 1) -> np.ndarray:
        """Returns the number of pixels of each class, int64 [K], in all masks, which it reads."""

        def count(sample: _Sample) -> np.ndarray:
            labels = self.tables[sample.suffix][read_labels(self.files, sample.mask)].astype(np.int64)
            return np.bincount(labels[(labels >= 0) & (labels != IGNORE_INDEX)], minlength=len(self.classes))

        return sum(thread_map(count, self.samples, max_workers=workers, desc='Counting pixels', disable=None))

    def _read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        sample = self.samples[index]
        image = F.to_image(read_image(self.files, sample.image))
        labels = read_labels(self.files, sample.mask)
        if image.shape[1:] != labels.shape:
            (H, W), (h, w) = image.shape[1:], labels.shape
            raise DataError(
                f'{self.files.root / sample.image} is {W} x {H} pixels but its mask {self.files.root / sample.mask} '
                f'is {w} x {h}: resize the mask by nearest neighbor'
            )
        table = self.tables[sample.suffix]
        mask = table[labels]
        if mask.min() < 0:
            unknown, known = _spans(np.unique(labels[mask < 0])), _spans(np.flatnonzero(table >= 0))
            raise DataError(
                f'{self.files.root / sample.mask} has label {unknown}; known labels are {known}: {self.advice}'
            )
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
    `folder`                  `{split}/images/NAME.jpg` (or another format of images) and `{split}/masks/NAME.png`
                              (or `.tif`); optionally `classes.txt` with the class names, one per line
    `camvid`                  like `folder`, with splits train, val, test; 11 classes, label 11 is ignored
    `ade20k`                  `images/training/NAME.jpg`, `annotations/training/NAME.png`; 150 classes, 0 is ignored
    `cityscapes`              `leftImg8bit/train/CITY/NAME_leftImg8bit.png`, `gtFine/train/CITY/NAME_gtFine_*.png`: 19
                              classes, from labelTrainIds if these masks exist, otherwise from labelIds
    `pascal_context_59`       `JPEGImages/NAME.jpg`, `SegmentationClassContext/NAME.png`, names in
                              `ImageSets/SegmentationContext/train.txt`; 59 classes, 0 is ignored
    `pascal_voc`              `JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png`, names in
                              `ImageSets/Segmentation/train.txt`; 20 classes and the background
    `coco_stuff`              `images/train2017/NAME.jpg`, `annotations/train2017/NAME.png`, or
                              `NAME_labelTrainIds.png`; 171 classes
    `loveda`                  `Train/Urban/images_png/NAME.png`, `Train/Urban/masks_png/NAME.png`, the same in `Rural`
                              and `Val`; 7 classes, 0 is ignored
    ========================= ==========================================================================================

    Masks are PNGs (in a `folder` also TIFFs) with one channel: gray values of up to 16 bits, or palette indices. Label
    255 is ignored, unless `remap` makes it a class. Files in the folders of images and masks that are not used are
    counted in a warning.

    Args:
        name: Name of the layout.
        root: The dataset's folder, an uncompressed tar of it, or the folder that contains it.
        split: `train`, `val` or another split of the dataset; `train+val` for several.
        transform: Applied to (image, mask), see `transforms`.
        num_classes: Number of classes. If a `folder` has neither this, nor class names, nor `remap`, the highest label
            in the masks of all splits defines it, which requires to read them all. Otherwise it is only compared.
        remap: For `folder`, the class of each label, 255 to ignore it. Other labels are errors.
        workers: Number of threads that read masks, if they must be read.

    Raises:
        DataError: The dataset or split is unknown or empty, files are missing, or the number of classes differs.
    """
    if name not in LAYOUTS:
        raise DataError(f'--dataset: no dataset {name!r}{nearest(name, LAYOUTS)}: choose from {", ".join(LAYOUTS)}')
    if remap is not None and name != 'folder':
        raise DataError(f'--remap is only for --dataset folder: the labels of {name} are fixed')
    files, layout = open_files(root), LAYOUTS[name]
    top, splits = _find_splits(files, name, layout)
    samples = []
    for part in split.split('+'):
        folder = splits.get(part, part if part in splits.values() else None)
        if folder is None:
            raise DataError(_no_split(files, top, layout, part, splits))
        for one in folder.split('+'):
            samples += _find_samples(files, top, layout, one)
    labels, classes = layout.labels, layout.classes
    if name == 'folder':
        mask_folders = [join(top, layout.masks.format(split=folder)) for folder in splits]
        classes = _folder_classes(files, top, mask_folders, tuple(layout.labels), num_classes, remap, workers)
        known = {i: i for i in range(len(classes.names))} if remap is None else remap
        labels = dict.fromkeys(layout.labels, known)
    count = len(classes.names)
    if num_classes not in (None, count):
        source = f'its classes.txt lists {count}; ' if name == 'folder' else ''
        raise DataError(
            f'{name} in {root} has {count} classes, not {num_classes}: {source}leave out --num-classes {num_classes}, '
            'or give the data that the checkpoint was trained on'
        )
    tables = {suffix: label_table(mapping, count) for suffix, mapping in labels.items()}
    numbered = name == 'folder' and remap is None
    if numbered:
        more = 'complete classes.txt' if _class_names(files, join(top, 'classes.txt')) else 'raise --num-classes'
        advice = f'{more}, or give the class of every label with --remap'
    else:
        advice = (
            f'these are not masks of --dataset {name}'
            if remap is None
            else 'add every label to --remap, for example 2=255 to ignore label 2'
        )
    return SegmentationDataset(files, samples, tables, classes, transform, advice, numbered)


def _find_splits(files: Folder | Archive, name: str, layout: Layout) -> tuple[str, dict[str, str]]:
    """Returns the folder that contains the dataset, and the dataset's own names of the available splits."""
    if found := _search(files, layout):
        return found
    hint = ' or '.join(other for other in LAYOUTS if _search(files, LAYOUTS[other]))
    hint = f': choose --dataset {hint}' if hint else ''
    split, val = list((layout.splits or dict(train='train', val='val')).values())[:2]
    if layout.images == '{split}/images' and files.exists('images') and files.exists('masks'):
        folder = files.root.resolve()
        _, siblings = (isinstance(files, Folder) and _search(Folder(folder.parent), layout)) or ('', {})
        if {folder.name, *siblings} & {*_SPLITS}:
            hint = f': it is one split; give the folder that contains it, {folder.parent}'
        elif not files.folders('images'):
            hint = ': it has no splits; move images and masks into a folder for each split'
    inside = [join(one, two) for one in files.folders('') for two in files.folders(one) or ['']]
    raise DataError(
        f'{files.root} is not a dataset of type {name}: expected the folders {" and ".join(_folders(layout, split))} '
        f'(and those of {val.replace("+", " and ")}), found '
        f'{_listed([path.rstrip("/") for path in inside]) or "no folders"}{hint}'
    )


def _folders(layout: Layout, split: str) -> list[str]:
    """Returns the folders of images and masks of a split, by the dataset's own name."""
    return [folder.format(split=one) for one in split.split('+') for folder in (layout.images, layout.masks)]


def _no_split(files: Folder | Archive, top: str, layout: Layout, split: str, splits: Mapping[str, str]) -> str:
    """Returns the message for a split that does not exist."""
    own = (layout.splits or {}).get(split, split)
    folders = [join(top, folder) for folder in _folders(layout, own)]
    missing = ' and '.join(folder for folder in folders if not files.exists(folder))
    missing = f', because there is no folder {missing}' if missing else ''
    return (
        f'{files.root} has no split {split!r}{nearest(split, splits)}{missing}: for --train-split, --val-split (or '
        f'--split in validate) choose from {", ".join(splits)}'
    )


def _search(files: Folder | Archive, layout: Layout) -> tuple[str, dict[str, str]] | None:
    """Returns the folder that contains a dataset, and its own names of the available splits; None without any."""
    inside = files.folders('')
    for top in ('', *layout.tops, *(inside if len(inside) == 1 else ())):
        if not files.exists(top):
            continue
        splits = layout.splits or {folder: folder for folder in files.folders(top)}
        found = {
            split: own
            for split, own in splits.items()
            if all(files.exists(join(top, folder)) for folder in _folders(layout, own))
        }
        if found:
            return top, found
    return None


def _find_samples(files: Folder | Archive, top: str, layout: Layout, split: str) -> list[_Sample]:
    images, masks = (join(top, folder.format(split=split)) for folder in (layout.images, layout.masks))
    stems: dict[str, str] = {}  # images by their paths in the folder, without suffix
    others = []
    for path in files.below(images):
        stem, suffix = _split_suffix(path[len(images) + 1 :], layout.image_suffixes)
        if suffix is None:
            others.append(path[len(images) + 1 :])
        elif stem in stems:
            raise DataError(f'{stems[stem]} and {path} would have the same mask: remove one of them')
        else:
            stems[stem] = path
    if layout.listing is not None:
        stems = _listed_stems(files, join(top, layout.listing.format(split=split)), stems)
    if not stems:
        formats = '*.jpg, *.png or another format' if len(layout.image_suffixes) > 1 else f'*{layout.image_suffixes[0]}'
        found = f', found {_listed(others)}' if others else ''
        raise DataError(f'{files.root / images} has no images of split {split} ({formats}){found}')
    available, unused = {}, []
    for path in files.below(masks):
        stem, suffix = _split_suffix(path[len(masks) + 1 :], layout.labels)
        if stem in stems and suffix is not None:
            available[stem, suffix] = path
        else:
            unused.append(path[len(masks) + 1 :])
    samples, missing = [], []
    for stem, image in stems.items():
        suffix = next((suffix for suffix in layout.labels if (stem, suffix) in available), None)
        if suffix is None:
            missing.append(image)
        else:
            samples.append(_Sample(image, available[stem, suffix], suffix))
    if missing:
        names = ' or '.join(f'NAME{suffix}' for suffix in layout.labels)
        found = f'; found {_listed(unused)}' if unused else ''
        if any(path.lower().endswith(('.jpg', '.jpeg')) for path in unused):
            found += '; JPEG changes labels, so masks must be PNGs or TIFFs'
        raise DataError(
            f'{len(missing)} of {len(stems)} images have no mask ({names} in {files.root / masks}{found}): '
            f'{_listed(missing)}'
        )
    if layout.listing is None:
        unused = [path for path in unused if _split_suffix(path, layout.labels)[1]]
        for folder, what, paths in (
            (images, 'files of no image format', others),
            (masks, 'masks without image', unused),
        ):
            if paths:
                _logger.warning(f'{files.root / folder}: {len(paths)} {what} not used: {_listed(paths)}')
    return samples


def _split_suffix(path: str, suffixes: Iterable[str]) -> tuple[str, str | None]:
    """Splits a path before the suffix, in capitals or not, that it ends with; None if it has none of them."""
    suffix = next((suffix for suffix in suffixes if path.lower().endswith(suffix.lower())), None)
    return (path, None) if suffix is None else (path[: -len(suffix)], suffix)


def _listed_stems(files: Folder | Archive, listing: str, stems: dict[str, str]) -> dict[str, str]:
    """Selects the images that a file lists."""
    try:
        wanted = files.read(listing).decode().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{files.root / listing}, the list of images, cannot be read ({error})') from error
    missing = [stem for stem in wanted if stem not in stems]
    if missing:
        raise DataError(
            f'{len(missing)} of {len(wanted)} images in {files.root / listing} are missing: {_listed(missing)}'
        )
    return {stem: stems[stem] for stem in wanted}


def _folder_classes(
    files: Folder | Archive,
    top: str,
    mask_folders: list[str],
    suffixes: tuple[str, ...],
    num_classes: int | None,
    remap: Mapping[int, int] | None,
    workers: int,
) -> Classes:
    """Returns the classes of a `folder`, from names, `num_classes`, `remap` or the highest label of all masks."""
    if names := _class_names(files, join(top, 'classes.txt')):
        count, source = len(names), 'classes.txt'
    elif num_classes is not None:
        count, source = num_classes, f'--num-classes {num_classes}'
    elif remap is not None:
        count = max((number for number in remap.values() if number != IGNORE_INDEX), default=-1) + 1
        source = 'the highest class of --remap'
    else:
        masks = [path for folder in mask_folders for path in files.below(folder) if path.lower().endswith(suffixes)]
        count, source = _count_classes(files, masks, workers), 'the highest label of the masks; --remap maps labels'
    if not 0 < count <= IGNORE_INDEX:
        raise DataError(f'{files.root} has {count} classes ({source}): it must have 1 to {IGNORE_INDEX}')
    classes = numbered_classes(count)
    return classes._replace(names=names) if names else classes


def _class_names(files: Folder | Archive, path: str) -> tuple[str, ...]:
    """Reads the class names; () if the file does not exist."""
    try:
        lines = files.read(path).decode().splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{files.root / path}, the list of classes, cannot be read ({error})') from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(set(names)) < len(names) or not names:
        raise DataError(f'{files.root / path} must contain the class names, one per line, each once')
    return names


def _count_classes(files: Folder | Archive, masks: list[str], workers: int) -> int:
    """Returns the highest label of the masks plus 1."""

    def read(path: str) -> set[int]:
        return set(np.flatnonzero(np.bincount(read_labels(files, path).ravel())).tolist())

    found = set().union(*thread_map(read, masks, max_workers=workers, desc='Counting classes', disable=None))
    labels = sorted(found - {IGNORE_INDEX})
    if found == {0, IGNORE_INDEX}:
        raise DataError(_only_0_and_255(files))
    if labels in ([], [0]):
        [label] = found or {0}
        raise DataError(
            f'the masks in {files.root} contain only the label {label}: expected the labels of several classes'
        )
    count = labels[-1] + 1
    if len(labels) < count <= IGNORE_INDEX:
        remap = ' '.join(f'{label}={number}' for number, label in enumerate(labels[:_MAPPED]))
        _logger.warning(
            f'{files.root}: {count} classes, because the highest label is {labels[-1]}, but {count - len(labels)} of '
            f'them have no pixel. To number the classes without gaps: --remap {remap}{" ..." * (len(labels) > _MAPPED)}'
        )
    return count


def _only_0_and_255(files: Folder | Archive) -> str:
    return (
        f'the masks in {files.root} contain only the labels 0 and {IGNORE_INDEX}, which is ignored. If {IGNORE_INDEX} '
        f'is a class: --remap 0=0 {IGNORE_INDEX}=1'
    )


def _spans(numbers: Iterable[int]) -> str:
    """Formats sorted numbers with ranges: ``0-11, 255``."""
    spans = []
    for _, pairs in itertools.groupby(enumerate(map(int, numbers)), lambda pair: pair[1] - pair[0]):
        span = [number for _, number in pairs]
        spans.append(f'{span[0]}-{span[-1]}' if len(span) > 1 else f'{span[0]}')
    return ', '.join(spans)


def _listed(names: list[str], separator: str = ', ') -> str:
    more = f'{separator}and {len(names) - _LISTED} more' if len(names) > _LISTED else ''
    return separator.join(names[:_LISTED]) + more
