"""Datasets: those of timm, a bundled sample, and checks of labels and images.

`create_dataset` takes the names and options of ``timm.data.create_dataset``. It adds a small bundled dataset, images
with several labels, splits that are stored as ``train.tar`` and ``val.tar``, all image formats, and one type of error.
`check_dataset` finds mistakes that would otherwise only show as low accuracy.
"""

import copy
import inspect
import logging
import os
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset

from .errors import DataError
from .images import IMAGE_FORMATS, decode_image, image_extensions
from .label_files import LabelFileReader
from .readers import class_labels, empty_class_folders, open_reader, unused_files

__all__ = [
    'IMAGE_FORMATS',
    'DataError',
    'ImageDataset',
    'check_dataset',
    'class_counts',
    'class_names',
    'create_dataset',
    'find_split',
    'hold_out',
    'image_extensions',
    'image_names',
    'unreadable_images',
]

_logger = logging.getLogger(__name__)

_BUNDLED = {'cluster_zoo/cifar10_sample': Path(__file__).parent / 'assets' / 'cifar10_sample.tar'}
_STREAMED = ('wds', 'hfids', 'tfds')
_OTHERS = (*_STREAMED, 'torch', 'hfds')  # neither a folder nor an archive
_TRAIN = ('train', 'training')
_EVAL = ('val', 'valid', 'validation', 'eval', 'evaluation')
# Errors of the readers and of `decode_image` for a missing, truncated or damaged file
_UNREADABLE = (OSError, ValueError, EOFError, tarfile.TarError)
_MAX_CONSECUTIVE = 10  # unreadable images; more mean that a disk is missing or an archive is truncated


class ImageDataset(timm.data.ImageDataset):
    """timm's dataset, which also records unreadable images or raises an error for them.

    Args:
        root: Folder or archive of images.
        strict: Raise a DataError for an unreadable image. Ten of them in a row always raise one.
        replace_unreadable: Replace an unreadable image by the next readable one, so that batches keep their size.
            Otherwise it becomes a black image with the target -1 in all positions, so that no image counts twice.
        class_map: Mapping from class names to indices, a file or a dictionary; sorted class names by default.
        **kwargs: Arguments of ``timm.data.ImageDataset``.
    """

    def __init__(
        self,
        root: str,
        strict: bool = False,
        replace_unreadable: bool = True,
        class_map: str | dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, class_map=class_map, **kwargs)
        self.strict = strict
        self.replace_unreadable = replace_unreadable
        self.class_map = class_map
        self._in_a_row = 0  # unreadable images that this process has just read
        self._reset_unreadable()

    def _reset_unreadable(self) -> None:
        # One flag per image instead of a counter, so that workers can write without a lock.
        self._unreadable = torch.zeros(len(self.reader), dtype=torch.bool).share_memory_()

    def subset(self, indices: Sequence[int], replace_unreadable: bool = True) -> 'ImageDataset':
        """Returns a dataset of some of the images of a folder or an archive, with the same classes."""
        dataset, reader = copy.copy(self), copy.copy(self.reader)
        dataset.reader, dataset.replace_unreadable = reader, replace_unreadable
        if isinstance(reader, ReaderImageInTar):
            reader.samples, reader.targets = reader.samples[indices], reader.targets[indices]
        else:
            reader.samples = [reader.samples[index] for index in indices]
        dataset._reset_unreadable()
        return dataset

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that were unreadable so far, in any process that shares this dataset."""
        return [self._name(index) for index in self._unreadable.nonzero().flatten().tolist()]

    def __getitem__(self, index: int) -> tuple:
        if index >= len(self):
            raise IndexError(index)  # ends `for sample in dataset`
        sample, candidate = None, index
        while sample is None:
            sample = self._read(candidate % len(self))
            self._in_a_row = 0 if sample else self._in_a_row + 1
            if self._in_a_row == _MAX_CONSECUTIVE:
                raise DataError(
                    f'{_MAX_CONSECUTIVE} images in a row are not readable, the last is {self._name(candidate)}: '
                    'check that the dataset is complete.'
                )
            if sample is None and not self.replace_unreadable:
                sample = self._black_image(candidate)
            candidate += 1
        image, target, *features = sample
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (image, target) if self.additional_features is None else (image, target, *features)

    def _read(self, index: int) -> tuple | None:
        """Returns the image, the target and additional features; None if the image is not readable."""
        try:
            file, target, *features = self.reader[index]
            with file:
                image = file.read() if self.load_bytes else decode_image(file, self.input_img_mode)
            return image, target, *features
        except _UNREADABLE as error:
            message = f'{self._name(index)} is not a readable image ({error})'
            if self.strict:
                raise DataError(f'{message}: repair or remove it, or skip unreadable images.') from error
            if not self._unreadable[index]:
                _logger.warning('Skipped: %s', message)
                self._unreadable[index] = True
        return None

    def _black_image(self, index: int) -> tuple:
        target = -1
        if isinstance(self.reader, LabelFileReader):
            target = torch.full_like(self.reader.samples[index][1], -1)
        return Image.new(self.input_img_mode or 'RGB', (256, 256)), target

    def _name(self, index: int) -> str:
        return self.filename(index) or f'image {index}'


def create_dataset(
    name: str | None,
    root: str | os.PathLike | None = None,
    split: str = 'validation',
    strict: bool = False,
    search_split: bool = True,
    replace_unreadable: bool = True,
    label_files: Sequence[str | os.PathLike] | None = None,
    **kwargs: Any,
) -> Dataset:
    """Opens a dataset by its timm name.

    Args:
        name: Empty for a folder or tar of images; ``torch/...``, ``hfds/...``, ``wds/...`` and so on as in timm; or
            ``cluster_zoo/cifar10_sample``, the first 100 test images of each class of CIFAR-10. The sample is part of
            this package and needs no ``root``. It has no splits, so every ``split`` is the whole sample.
        root: Folder or ``.tar`` of images with one subfolder per class. All formats that Pillow reads are images.
        split: Split to open.
        strict: Raise a `DataError` for unreadable images instead of skipping them. ``torch/...`` always raises;
            streamed datasets (``wds/``, ``hfids/``, ``tfds/``) always skip.
        search_split: Search ``root`` for a folder (``train``) or an archive (``train.tar``) with the name of the split
            or a synonym. A ``root`` without any split is used as a whole.
        replace_unreadable: See `ImageDataset`. Turn it off for evaluation.
        label_files: CSV files with the labels of images in a folder, which may have any number of them; see
            `cluster_zoo.label_files`. Targets are float32 [K]. The images need no subfolders.
        **kwargs: Other arguments of ``timm.data.create_dataset``.

    Returns:
        An `ImageDataset` where timm creates its own class, otherwise timm's or torchvision's dataset.

    Raises:
        DataError: The dataset does not exist, has no images, or needs a package that is not installed.
    """
    name = name or ''
    prefix = name.partition('/')[0].lower() if '/' in name else ''
    if strict and prefix in _STREAMED:
        raise DataError(f'{name} is a streamed dataset, which always skips unreadable images: turn strict off.')
    if prefix == 'cluster_zoo':
        if name not in _BUNDLED:
            raise DataError(f'There is no bundled dataset {name}: choose {", ".join(_BUNDLED)}.')
        # Opens the archive again for each image, so that loader workers share no file position.
        name, root, search_split = '', _BUNDLED[name], False
        kwargs['cache_tarfiles'] = False
    options = dict(strict=strict, replace_unreadable=replace_unreadable, class_map=kwargs.get('class_map'))
    options |= dict(input_img_mode=kwargs.get('input_img_mode', 'RGB'))
    local = prefix not in _OTHERS
    path = find_split(root, split, search_split) if local else None
    if label_files:
        if name or not path.is_dir():
            raise DataError(f'{name or path} is not a folder of images, whose labels CSV files can name.')
        return ImageDataset(str(path), reader=LabelFileReader(path, root, label_files, options['class_map']), **options)
    with _data_errors(name or path, split, prefix):
        if local:
            reader = open_reader(str(path), **_reader_options(kwargs))
            return ImageDataset(str(path), reader=reader, load_bytes=kwargs.get('load_bytes', False), **options)
        dataset = timm.data.create_dataset(
            name, None if root is None else str(root), split, search_split=search_split, **kwargs
        )
    if not isinstance(dataset, timm.data.ImageDataset):
        return dataset
    return ImageDataset(str(root), reader=dataset.reader, additional_features=dataset.additional_features, **options)


def _reader_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``timm.data.create_dataset`` that are those of a reader of local files."""
    others = inspect.signature(timm.data.create_dataset).parameters.keys() - {'class_map'}
    return {name: value for name, value in options.items() if value is not None and name not in others}


@contextmanager
def _data_errors(source: str | Path, split: str, prefix: str = '') -> Iterator[None]:
    """Replaces the errors of timm and its readers by a DataError."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f'{source} needs a package that is not installed: {_install(prefix, error.name)}') from error
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError, tarfile.TarError) as error:
        if 'lease install' in str(error):  # of a reader of timm
            raise DataError(f'{source} needs a package that is not installed: {_install(prefix)}') from error
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'Cannot open the {split} split of {source}: {reason}') from error


def _install(prefix: str, package: str | None = None) -> str:
    extra = "'cluster_zoo[datasets]'" if prefix in ('hfds', 'hfids', 'wds') else package or prefix
    return f'pip install {extra}'


def find_split(root: str | os.PathLike | None, split: str, search_split: bool = True) -> Path:
    """Returns the folder or archive of a split of a folder of images; ``root`` itself if it has no splits.

    Raises:
        DataError: ``root`` does not exist, is neither a folder nor a .tar, or has other splits only.
    """
    if not root:
        raise DataError('No data directory is given: set a folder or a .tar of images with one subfolder per class.')
    root = Path(root)
    if not root.exists():
        raise DataError(f'The data directory {root} does not exist.')
    if not root.is_dir() and not (root.is_file() and root.suffix == '.tar'):
        raise DataError(f'{root} is neither a folder nor a .tar of images with one subfolder per class.')
    if root.is_file() or not search_split:
        return root
    split = split.split('[')[0]
    synonyms = next((group for group in (_TRAIN, _EVAL) if split in group), ())
    present = {path.stem: path for path in root.iterdir() if path.is_dir() or path.suffix == '.tar'}
    for name in (split, *synonyms):
        if name in present:
            return present[name]
    others = [name for name in (*_TRAIN, *_EVAL) if name in present]
    if others:
        raise DataError(f'{root} has no {split} split, only {_shorten(others)}: choose another split.')
    return root


def image_names(dataset: ImageDataset) -> list[str]:
    """Returns a unique name for each image of a folder or an archive, relative to it."""
    names = dataset.filenames()
    if isinstance(dataset.reader, ReaderImageInTar):  # the same name may be in several inner archives
        outer = [(parent, inner.name if inner else None) for _, parent, inner in dataset.reader.samples]
        names = ['/'.join(filter(None, (*parts, name))) for parts, name in zip(outer, names)]
    return [os.path.normpath(name) for name in names]


def hold_out(
    dataset: Dataset, fraction: float, seed: int, names: Collection[str] = ()
) -> tuple[ImageDataset, ImageDataset]:
    """Splits a dataset at random, separately for each class or combination of labels.

    Args:
        dataset: A folder or an archive of images, see `create_dataset`.
        fraction: Fraction of the images of each class to hold out: at least one, and never all of them.
        seed: Seed of the random choice.
        names: Images to hold out instead of a random choice, see `image_names`. Missing ones are logged.

    Returns:
        The remaining images and the held-out ones, whose unreadable images are not replaced.

    Raises:
        DataError: The dataset is of another kind, no class has two images, or none of ``names`` is in the dataset.
    """
    reader = getattr(dataset, 'reader', None)
    if not isinstance(reader, ReaderImageFolder | ReaderImageInTar | LabelFileReader):
        raise DataError('Images can be held out of a folder or a .tar only: name a validation split of this dataset.')
    held = _indices(dataset, set(names)) if names else _choose(dataset, fraction, seed)
    rest = np.setdiff1d(np.arange(len(dataset)), held).tolist()
    return dataset.subset(rest), dataset.subset(sorted(held), replace_unreadable=False)


def _choose(dataset: ImageDataset, fraction: float, seed: int) -> list[int]:
    """Returns indices of images for `hold_out`, chosen at random."""
    generator, held, single = np.random.default_rng(seed), [], 0
    _, classes = np.unique(_targets(dataset), axis=0, return_inverse=True)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held += generator.permutation(members)[:count].tolist()
        single += not count
    if not held:
        raise DataError(f'No class of {dataset.reader.root} has two images, so none can be held out for validation.')
    if single:
        kind = 'combinations of labels' if isinstance(dataset.reader, LabelFileReader) else 'classes'
        _logger.warning(f'Not validated, because they have a single image, which is trained on: {single} {kind}.')
    return held


def _indices(dataset: ImageDataset, names: set[str]) -> list[int]:
    """Returns the indices of the images with these names."""
    found = [index for index, name in enumerate(image_names(dataset)) if name in names]
    if not found:
        raise DataError(
            f'{dataset.reader.root} has none of the {len(names)} held-out images of the checkpoint: name the folder of '
            'its training, or a split with other images (validate: --split, train: --val-split).'
        )
    if missing := len(names) - len(found):
        _logger.warning(f'{dataset.reader.root} lacks {missing} of the {len(names)} held-out images of the checkpoint.')
    return found


def _targets(dataset: Dataset) -> np.ndarray:
    """Returns the class indices [N] or targets [N, K] of all images, without reading them."""
    reader = getattr(dataset, 'reader', dataset)
    if isinstance(reader, ReaderImageFolder | LabelFileReader):
        return np.array([np.asarray(target) for _, target in reader.samples])
    if (targets := getattr(reader, 'targets', None)) is None:
        raise DataError('The classes of this dataset are not known without reading all images.')
    return np.asarray(targets)


def class_counts(dataset: Dataset, num_classes: int) -> tuple[np.ndarray, int]:
    """Returns the number of images of each class [num_classes], and that of all images.

    Raises:
        DataError: The dataset has its labels beside each image only, such as streamed ones.
    """
    targets = _targets(dataset)
    if targets.ndim == 2:
        return targets.sum(0), len(targets)
    return np.bincount(targets, minlength=num_classes), len(targets)


def check_dataset(
    dataset: Dataset,
    num_classes: int,
    split: str = '',
    like: Dataset | None = None,
) -> None:
    """Checks that the labels of a dataset match a model, without reading images, and logs how many files are no images.

    A dataset without class names is only checked to have images.

    Args:
        dataset: Result of `create_dataset`.
        num_classes: Number of classes of the model.
        split: Name of the split of a training; '' for other data. In a training split every class of a class map needs
            images.
        like: Dataset whose class indices must be the same, usually the training split.

    Raises:
        DataError: The dataset or a class has no images, images are in hidden folders or outside of class folders, the
            number of classes differs from `num_classes` (with a class map: an index is not below `num_classes`), or
            class indices differ from those of `like`.
    """
    where = f'The {split} split' if split else 'The dataset'
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise DataError(f'{where} has no images: check the data directory.')
    names = class_names(dataset)
    if not names:
        return
    reader = getattr(dataset, 'reader', None)
    mapped = bool(getattr(dataset, 'class_map', None))
    if '' in names.values():
        loose = int((_targets(dataset) == list(names.values()).index('')).sum())
        raise DataError(
            f'{reader.root} has {loose} images outside of class folders: expected {reader.root}/CLASS/*.jpg. '
            'For images with several labels: --multi-label FILE.csv'
        )
    if hidden := [name for name in names.values() if name.startswith('.')]:
        raise DataError(f'{reader.root} has images in hidden folders ({_shorten(hidden)}): remove these folders.')
    empty = empty_class_folders(reader) if split or not mapped else []
    if mapped and split.split('[')[0] in _TRAIN and not isinstance(reader, LabelFileReader):
        present = class_labels(reader)
        empty += [name for index, name in names.items() if index not in present]
    if empty:
        fix = 'add images' if split else 'number the classes with --class-map FILE'
        raise DataError(f'{where} has no images of {_shorten(empty)}: {fix}, or remove what is not a class.')
    expected = class_names(like) if like is not None else {}
    if expected and not mapped and (differ := set(names.values()) ^ set(expected.values())):
        raise DataError(
            f'{where} and the training split have different classes, only one of them has {_shorten(sorted(differ))}: '
            'use the same class folders in both, or number the classes with --class-map FILE.'
        )
    if max(names) >= num_classes or (not mapped and len(names) != num_classes):
        count = max(names) + 1 if mapped else len(names)
        fix = f'set --num-classes {count}' if split else 'number them as in the model with --class-map FILE'
        raise DataError(
            f'{where} has {count} classes ({_shorten(names.values())}) but the model has {num_classes}: {fix}, or use '
            'the dataset of the model.'
        )
    wrong = [name for index, name in names.items() if expected and expected.get(index) != name]
    if wrong:
        raise DataError(
            f'{where} numbers its classes differently from the training split: {_shorten(wrong)}. '
            'Use the same class folders in both.'
        )
    if unused := unused_files(reader):
        kinds = ', '.join(f'{count} {kind}' for kind, count in unused.most_common())
        _logger.info(f'{reader.root}: {unused.total()} files are not used: {kinds}.')


def class_names(dataset: Dataset) -> dict[int, str]:
    """Returns the class names of a dataset by index, empty if it has none."""
    source = getattr(dataset, 'reader', dataset)
    for attribute in ('class_to_idx', 'class_name_to_idx'):
        if class_to_idx := getattr(source, attribute, None):
            return dict(sorted((index, str(name)) for name, index in class_to_idx.items()))
    return dict(enumerate(map(str, getattr(source, 'classes', ()))))


def unreadable_images(dataset: Dataset) -> list[str]:
    """Returns the names of the images that were skipped so far. The dataset may be wrapped by others."""
    while not hasattr(dataset, 'unreadable') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return getattr(dataset, 'unreadable', [])


def _shorten(names: Iterable[str], most: int = 3) -> str:
    """Lists the first names: ``cat, dog, horse and 7 more``."""
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
