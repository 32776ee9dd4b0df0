"""Datasets: timm's, the bundled sample, and what to do with a dataset that is not in order.

:func:`create_dataset` takes the names and options of ``timm.data.create_dataset``. It adds a small bundled dataset,
finds splits that are kept as ``train.tar`` and ``val.tar``, and says in one message what is wrong with a dataset that
can not be opened. :func:`check_dataset` looks for the mistakes that would otherwise show as a poor result after a day.
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
# What the readers and Pillow raise for a file that is missing, cut short, damaged, or no image at all.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, tarfile.TarError, Image.DecompressionBombError)
# More unreadable images than this in a row are no accident: a disk is gone, or an archive is cut short.
_MAX_CONSECUTIVE = 10


class ImageDataset(timm.data.ImageDataset):
    """timm's dataset, with unreadable images remembered or refused.

    An image that can not be read is replaced by the next one that can, so that batches keep their size. Which ones were
    replaced is known in the main process too, whatever process met them (:attr:`unreadable`).

    Args:
        root: Folder or archive of the images.
        strict: Refuse an unreadable image instead of replacing it.
        class_map: Which number each class has, as a file or a dictionary; without one they are numbered in order.
        **kwargs: As for ``timm.data.ImageDataset``.

    Raises:
        DataError: On access, for an unreadable image if ``strict``, or for ten of them in a row.
    """

    def __init__(self, root: str, strict: bool = False, class_map: str | dict | None = None, **kwargs: Any) -> None:
        super().__init__(root, class_map=class_map, **kwargs)
        self.strict = strict
        self.class_map = class_map
        # One flag an image rather than a counter: written by several processes without a lock, it still counts right.
        self._unreadable = torch.zeros(len(self.reader), dtype=torch.bool).share_memory_()

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far, by any process that shares this dataset."""
        return [self._name(index) for index in self._unreadable.nonzero().flatten().tolist()]

    def __getitem__(self, index: int) -> tuple:
        if index >= len(self):
            raise IndexError(index)  # ends `for sample in dataset`
        candidate = index
        for _ in range(_MAX_CONSECUTIVE):
            try:
                image, target, *features = self._read(candidate)
                break
            except _UNREADABLE as error:
                self._note_unreadable(candidate, error)
                candidate = (candidate + 1) % len(self)
        else:
            raise DataError(
                f'{_MAX_CONSECUTIVE} images in a row can not be read, from {self._name(index)} on: '
                'is the dataset complete?'
            )
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (image, target) if self.additional_features is None else (image, target, *features)

    def _read(self, index: int) -> tuple:
        file, *rest = self.reader[index]
        with file:
            if self.load_bytes:
                return file.read(), *rest
            image = Image.open(file)
            image.load()
        return image.convert(self.input_img_mode) if self.input_img_mode else image, *rest

    def _note_unreadable(self, index: int, error: Exception) -> None:
        message = f'{self._name(index)} is not a readable image ({error})'
        if self.strict:
            raise DataError(f'{message}. Mend or remove it, or let unreadable images be skipped') from error
        if not self._unreadable[index]:
            _logger.warning('Skipped: %s', message)
            self._unreadable[index] = True

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
        name: Empty for a folder or tar of images, ``torch/...``, ``hfds/...``, ``wds/...`` and so on as in timm, or
            ``cluster_zoo/cifar10_sample``: 1,000 of CIFAR-10's test images, the first 100 of each class, which are part
            of this package and need no ``root``. It has no splits: every ``split`` is all of it.
        root: Folder or ``.tar`` of the images, one sub-folder a class.
        split: Split to open.
        strict: Refuse unreadable images with a :class:`DataError` instead of skipping them. The datasets of
            ``torch/...`` always refuse them, the streamed ones (``wds/``, ``hfids/``, ``tfds/``) can only skip them.
        search_split: Look inside ``root`` for a folder (``train``) or an archive (``train.tar``) of the split's name
            or of a synonym. A ``root`` that holds no split at all is taken whole.
        **kwargs: The other options of ``timm.data.create_dataset``.

    Returns:
        An :class:`ImageDataset` wherever timm would make its own one, else timm's or torchvision's dataset.

    Raises:
        DataError: Where there is no such dataset, nothing in it, or a package that it needs is not installed.
    """
    name = name or ''
    prefix = name.partition('/')[0].lower() if '/' in name else ''
    if strict and prefix in _STREAMED:
        raise DataError(f'{name} is a streamed dataset, whose reader skips unreadable images: leave strict off')
    if prefix == 'cluster_zoo':
        if name not in _BUNDLED:
            raise DataError(f'there is no bundled dataset {name}; there is {", ".join(_BUNDLED)}')
        # The archive is opened anew for each image: cheap, and no loader worker inherits a file position from another.
        name, root, search_split = '', _BUNDLED[name], False
        kwargs['cache_tarfiles'] = False
    if prefix not in (*_STREAMED, 'torch', 'hfds'):
        root, search_split = _find_images(root, split, search_split), False
    try:
        dataset = timm.data.create_dataset(
            name, None if root is None else str(root), split, search_split=search_split, **kwargs
        )
    except ImportError as error:
        raise DataError(f'{name} needs a package that is not installed: pip install {error.name}') from error
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError, tarfile.TarError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'can not open the {split} split of {name or root}: {reason}') from error
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


def check_dataset(
    dataset: Dataset,
    num_classes: int,
    split: str,
    like: Dataset | None = None,
) -> None:
    """Refuses a dataset that a model would learn from, or be measured on, wrongly.

    What can be told without reading the images is looked at; a dataset that does not name its classes passes.

    Args:
        dataset: From :func:`create_dataset`.
        num_classes: Number of classes that the model tells apart.
        split: Name of the split, for the message. In a training split every class of a class map needs images.
        like: Dataset that numbers its classes rightly (the training split), for `dataset` to agree with.

    Raises:
        DataError: If the dataset is empty, a class of it is empty, its classes are not `num_classes` (with a class map:
            not below `num_classes`), or the classes of `like` have other numbers.
    """
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise DataError(f'the {split} split has no images')
    names = class_names(dataset)
    if not names:
        return
    mapped = bool(getattr(dataset, 'class_map', None))
    empty = _empty_folders(dataset)
    if mapped and split.split('[')[0] in _TRAIN:
        present = set(_targets(dataset))
        empty += [name for index, name in names.items() if index not in present]
    if empty:
        raise DataError(
            f'the {split} split has no images ({" ".join(get_img_extensions())}) of {_listed(empty)}: '
            'add some, or remove what is not a class'
        )
    if max(names) >= num_classes or (not mapped and len(names) != num_classes):
        count = max(names) + 1 if mapped else len(names)
        raise DataError(
            f'the {split} split has {count} classes ({_listed(names.values())}) but the model {num_classes}: '
            f'use a model with num_classes={count}, or the dataset that the model is meant for'
        )
    expected = class_names(like) if like is not None else {}
    wrong = [name for index, name in names.items() if expected and expected.get(index) != name]
    if wrong:
        raise DataError(f'the {split} split numbers its classes differently from the training split: {_listed(wrong)}')


def class_names(dataset: Dataset) -> dict[int, str]:
    """Names of a dataset's classes by their number; empty where the dataset does not tell."""
    holder = getattr(dataset, 'reader', dataset)
    for attribute in ('class_to_idx', 'class_name_to_idx'):
        if named := getattr(holder, attribute, None):
            return dict(sorted((index, str(name)) for name, index in named.items()))
    return dict(enumerate(map(str, getattr(holder, 'classes', ()))))


def unreadable_images(dataset: Dataset) -> list[str]:
    """Names of the images that were skipped so far, for any dataset, however wrapped; empty where none are counted."""
    while not hasattr(dataset, 'unreadable') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return getattr(dataset, 'unreadable', [])


def _find_images(root: str | os.PathLike | None, split: str, search_split: bool) -> Path:
    if not root:
        raise DataError('no data directory given: name a folder or a .tar of images, one sub-folder a class')
    root = Path(root)
    if not root.exists():
        raise DataError(f'the data directory {root} does not exist')
    if root.is_file() and root.suffix != '.tar':
        raise DataError(f'{root} is a file: expected a folder or a .tar of images, one sub-folder a class')
    if root.is_file() or not search_split:
        return root
    wanted = split.split('[')[0]
    group = next((group for group in (_TRAIN, _EVAL) if wanted in group), ())
    present = {path.stem: path for path in root.iterdir() if path.is_dir() or path.suffix == '.tar'}
    for name in (wanted, *group):
        if name in present:
            return present[name]
    other = [name for name in (*_TRAIN, *_EVAL) if name in present]
    if other:
        raise DataError(f'{root} has no {split} split, only {_listed(other)}: name the split that you mean')
    return root


def _targets(dataset: Dataset) -> Iterable[int]:
    reader = getattr(dataset, 'reader', None)
    if isinstance(reader, ReaderImageFolder):
        return (target for _, target in reader.samples)
    if isinstance(reader, ReaderImageInTar):
        return reader.targets.tolist()
    return reader.iter_targets() if hasattr(reader, 'iter_targets') else ()


def _empty_folders(dataset: Dataset) -> list[str]:
    """Class folders without an image: timm leaves them out, which renumbers every class after them."""
    reader = getattr(dataset, 'reader', None)
    if isinstance(reader, ReaderImageFolder):
        return _empty_directories(Path(reader.root), {Path(path).parent for path, _ in reader.samples})
    if isinstance(reader, ReaderImageInTar):
        return _empty_members(reader)
    return []


def _empty_directories(root: Path, filled: set[Path]) -> list[str]:
    parents = {path.parent for path in filled if path != root}
    beside = (path for parent in parents for path in parent.iterdir() if path not in filled)
    return sorted(
        str(path.relative_to(root))
        for path in beside
        if path.is_dir() and not path.name.startswith('.') and not _holds_images(path)
    )


def _holds_images(folder: Path) -> bool:
    extensions = get_img_extensions(as_set=True)
    return any(Path(name).suffix.lower() in extensions for _, _, names in os.walk(folder) for name in names)


def _empty_members(reader: ReaderImageInTar) -> list[str]:
    with tarfile.open(reader.root) as archive:
        members = archive.getmembers()
    filled = {Path(info.name).parent for info, _, _ in reader.samples}
    filled |= {Path(inner.name) for _, _, inner in reader.samples if inner is not None}
    filled |= {above for path in filled for above in path.parents}
    classes = (Path(info.name) for info in members if info.isdir() or info.name.lower().endswith('.tar'))
    return sorted(str(path) for path in classes if path not in filled and not path.name.startswith('.'))


def _listed(names: Iterable[str], most: int = 3) -> str:
    """First few of some names: ``cat, dog, horse and 7 more``."""
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
