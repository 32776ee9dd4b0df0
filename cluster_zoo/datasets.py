"""Datasets: those of timm, a bundled sample, and checks of labels and images.

`create_dataset` takes the names and options of ``timm.data.create_dataset``. It adds a small bundled dataset,
finds splits that are stored as ``train.tar`` and ``val.tar``, and raises one type of error. `check_dataset` finds
mistakes that would otherwise only show as low accuracy.
"""

import logging
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset

from .errors import DataError

__all__ = ['DataError', 'ImageDataset', 'check_dataset', 'class_names', 'create_dataset', 'unreadable_images']

_logger = logging.getLogger(__name__)

_BUNDLED = {'cluster_zoo/cifar10_sample': Path(__file__).parent / 'assets' / 'cifar10_sample.tar'}
_STREAMED = ('wds', 'hfids', 'tfds')
_TRAIN = ('train', 'training')
_EVAL = ('val', 'valid', 'validation', 'eval', 'evaluation')
# Errors of the readers and of Pillow for a missing, truncated or damaged file
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, tarfile.TarError, Image.DecompressionBombError)
_MAX_CONSECUTIVE = 10  # unreadable images; more mean that a disk is missing or an archive is truncated


class ImageDataset(timm.data.ImageDataset):
    """timm's dataset, which also records unreadable images or raises an error for them.

    An unreadable image is replaced by the next readable one, so that batches keep their size.

    Args:
        root: Folder or archive of images.
        strict: Raise a DataError for an unreadable image. Ten of them in a row always raise one.
        class_map: Mapping from class names to indices, a file or a dictionary; sorted class names by default.
        **kwargs: Arguments of ``timm.data.ImageDataset``.
    """

    def __init__(self, root: str, strict: bool = False, class_map: str | dict | None = None, **kwargs: Any) -> None:
        super().__init__(root, class_map=class_map, **kwargs)
        self.strict = strict
        self.class_map = class_map
        # One flag per image instead of a counter, so that workers can write without a lock.
        self._unreadable = torch.zeros(len(self.reader), dtype=torch.bool).share_memory_()

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that were unreadable so far, in any process that shares this dataset."""
        return [self._name(index) for index in self._unreadable.nonzero().flatten().tolist()]

    def __getitem__(self, index: int) -> tuple:
        if index >= len(self):
            raise IndexError(index)  # ends `for sample in dataset`
        for candidate in (i % len(self) for i in range(index, index + _MAX_CONSECUTIVE)):
            try:
                file, target, *features = self.reader[candidate]
                with file:
                    if self.load_bytes:
                        image = file.read()
                    else:
                        image = Image.open(file)
                        image.load()
                        image = image.convert(self.input_img_mode) if self.input_img_mode else image
                break
            except _UNREADABLE as error:
                message = f'{self._name(candidate)} is not a readable image ({error})'
                if self.strict:
                    raise DataError(f'{message}: repair or remove it, or skip unreadable images.') from error
                if not self._unreadable[candidate]:
                    _logger.warning('Skipped: %s', message)
                    self._unreadable[candidate] = True
        else:
            raise DataError(
                f'{_MAX_CONSECUTIVE} images in a row are not readable, starting with {self._name(index)}: '
                'check that the dataset is complete.'
            )
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (image, target) if self.additional_features is None else (image, target, *features)

    def _name(self, index: int) -> str:
        return self.filename(index) or f'image {index}'


def create_dataset(
    name: str | None,
    root: str | os.PathLike | None = None,
    split: str = 'validation',
    strict: bool = False,
    search_split: bool = True,
    **kwargs: Any,
) -> Dataset:
    """Opens a dataset by its timm name.

    Args:
        name: Empty for a folder or tar of images; ``torch/...``, ``hfds/...``, ``wds/...`` and so on as in timm; or
            ``cluster_zoo/cifar10_sample``, the first 100 test images of each class of CIFAR-10. The sample is part of
            this package and needs no ``root``. It has no splits, so every ``split`` is the whole sample.
        root: Folder or ``.tar`` of images with one subfolder per class.
        split: Split to open.
        strict: Raise a `DataError` for unreadable images instead of skipping them. ``torch/...`` always raises;
            streamed datasets (``wds/``, ``hfids/``, ``tfds/``) always skip.
        search_split: Search ``root`` for a folder (``train``) or an archive (``train.tar``) with the name of the split
            or a synonym. A ``root`` without any split is used as a whole.
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
    if prefix not in (*_STREAMED, 'torch', 'hfds'):
        root, search_split = _find_split(root, split, search_split), False
    try:
        dataset = timm.data.create_dataset(
            name, None if root is None else str(root), split, search_split=search_split, **kwargs
        )
    except ImportError as error:
        raise DataError(f'{name} needs a package that is not installed: pip install {error.name}') from error
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError, tarfile.TarError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'Cannot open the {split} split of {name or root}: {reason}') from error
    if not isinstance(dataset, timm.data.ImageDataset):
        return dataset
    return ImageDataset(
        str(root),
        strict=strict,
        reader=dataset.reader,
        load_bytes=dataset.load_bytes,
        input_img_mode=dataset.input_img_mode,
        additional_features=dataset.additional_features,
        class_map=kwargs.get('class_map'),
    )


def _find_split(root: str | os.PathLike | None, split: str, search_split: bool) -> Path:
    """Returns the folder or archive of a split."""
    if not root:
        raise DataError('No data directory is given: set a folder or a .tar of images with one subfolder per class.')
    root = Path(root)
    if not root.exists():
        raise DataError(f'The data directory {root} does not exist.')
    if root.is_file() and root.suffix != '.tar':
        raise DataError(f'{root} is a file, expected a folder or a .tar of images with one subfolder per class.')
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


def check_dataset(
    dataset: Dataset,
    num_classes: int,
    split: str,
    like: Dataset | None = None,
) -> None:
    """Checks that the labels of a dataset match a model, without reading images.

    A dataset without class names is only checked to have images.

    Args:
        dataset: Result of `create_dataset`.
        num_classes: Number of classes of the model.
        split: Name of the split. In a training split every class of a class map needs images.
        like: Dataset whose class indices must be the same, usually the training split.

    Raises:
        DataError: The dataset or a class has no images, the number of classes differs from `num_classes` (with a class
            map: an index is not below `num_classes`), or class indices differ from those of `like`.
    """
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise DataError(f'The {split} split has no images: check the data directory.')
    names = class_names(dataset)
    if not names:
        return
    mapped = bool(getattr(dataset, 'class_map', None))
    empty = _empty_class_folders(getattr(dataset, 'reader', None))
    if mapped and split.split('[')[0] in _TRAIN:
        present = _labels(dataset.reader)
        empty += [name for index, name in names.items() if index not in present]
    if empty:
        raise DataError(
            f'The {split} split has no images ({" ".join(get_img_extensions())}) of {_shorten(empty)}: '
            'add images, or remove what is not a class.'
        )
    if max(names) >= num_classes or (not mapped and len(names) != num_classes):
        count = max(names) + 1 if mapped else len(names)
        raise DataError(
            f'The {split} split has {count} classes ({_shorten(names.values())}) but the model has {num_classes}: '
            f'use a model with num_classes={count}, or the dataset of the model.'
        )
    expected = class_names(like) if like is not None else {}
    wrong = [name for index, name in names.items() if expected and expected.get(index) != name]
    if wrong:
        raise DataError(
            f'The {split} split numbers its classes differently from the training split: {_shorten(wrong)}. '
            'Use the same class folders in both.'
        )


def _labels(reader: Any) -> set[int]:
    if isinstance(reader, ReaderImageFolder):
        return {label for _, label in reader.samples}
    return set(reader.targets.tolist() if isinstance(reader, ReaderImageInTar) else reader.iter_targets())


def _empty_class_folders(reader: Any) -> list[str]:
    """Returns class folders without images. timm skips them, which shifts the indices of all later classes."""

    def is_image(path: Path) -> bool:
        return path.suffix.lower() in extensions

    extensions = get_img_extensions(as_set=True)
    if isinstance(reader, ReaderImageFolder):
        root = Path(reader.root)
        filled = {Path(path).parent for path, _ in reader.samples} - {root}
        siblings = {folder for parent in {folder.parent for folder in filled} for folder in parent.iterdir()} - filled
        # A class map may leave out folders with images.
        empty = [folder for folder in siblings if folder.is_dir() and not any(map(is_image, folder.rglob('*')))]
        empty = [folder.relative_to(root) for folder in empty]
    elif isinstance(reader, ReaderImageInTar):
        with tarfile.open(reader.root) as archive:
            members = [(Path(info.name), info.isdir()) for info in archive]
        filled = {Path(inner.name) for _, _, inner in reader.samples if inner}
        filled |= {path.parent for path, _ in members if is_image(path)}
        filled |= {parent for folder in filled for parent in folder.parents}
        empty = [path for path, is_dir in members if (is_dir or path.suffix.lower() == '.tar') and path not in filled]
    else:
        return []
    return sorted(str(folder) for folder in empty if not folder.name.startswith('.'))


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
