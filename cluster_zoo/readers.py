"""Images in folders and archives as timm's readers, and what these do not use."""

import functools
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from .errors import DataError
from .files import members, walk
from .images import image_extensions
from .label_files import LabelFileReader

__all__ = ['FolderReader', 'class_labels', 'empty_class_folders', 'open_reader', 'unused_files']


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder, with the listing of `walk`: files only, and no link to a folder that contains it.

    Args:
        root: Folder with one subfolder per class.
        class_map: Mapping from class names to indices, a file or a dictionary; sorted class names by default.
        input_key: File name extensions of images, separated by ``;``.

    Raises:
        DataError: A folder cannot be listed.
        RuntimeError: There are no images.
    """

    def __init__(self, root: str, class_map: str | dict | None = None, input_key: str | None = None) -> None:
        Reader.__init__(self)
        self.root = root
        extensions = set(input_key.split(';')) if input_key else {*get_img_extensions(), *image_extensions()}
        found = []
        for folder, files, _ in walk(root):
            label = '' if folder == root else os.path.basename(folder)
            found += [(os.path.join(folder, name), label) for name in files if _suffix(name) in extensions]
        if class_map:
            self.class_to_idx = load_class_map(class_map, root)
        else:
            labels = sorted({label for _, label in found}, key=natural_key)
            self.class_to_idx = {label: index for index, label in enumerate(labels)}
        found = [(path, self.class_to_idx[label]) for path, label in found if label in self.class_to_idx]
        if not found:
            raise RuntimeError(f'Found 0 images in subfolders of {root}')
        self.samples = sorted(found, key=lambda sample: natural_key(sample[0]))


def open_reader(root: str, class_map: str | dict | None = None, **kwargs: Any) -> FolderReader | ReaderImageInTar:
    """Opens a folder or a ``.tar`` of images of all `IMAGE_FORMATS`.

    Args:
        root: The folder, or an uncompressed tar of images or of tars.
        class_map: Mapping from class names to indices, a file or a dictionary; sorted class names by default.
        **kwargs: Other arguments of `FolderReader` or of timm's ``ReaderImageInTar``.

    Raises:
        DataError: A folder cannot be listed, or the archive is damaged or truncated.
        Exception: Other errors of timm's readers, for example that there are no images.
    """
    if os.path.isdir(root):
        return FolderReader(root, class_map, **kwargs)
    try:
        try:
            with _all_extensions():
                reader = ReaderImageInTar(root, class_map, **kwargs)
        except Exception:
            _check_archive(root)  # whose error says where the damage is
            raise
        _check_ends(reader)
    except tarfile.ReadError as error:
        raise DataError(
            f'{root} is not a complete, uncompressed tar ({error}): decompress or download it again.'
        ) from error
    return reader


@contextmanager
def _all_extensions() -> Iterator[None]:
    """Makes timm's reader of archives list all image formats."""
    previous = get_img_extensions()
    set_img_extensions(sorted({*previous, *image_extensions()}))
    try:
        yield
    finally:
        set_img_extensions(previous)


def _check_archive(path: str) -> None:
    """Raises tarfile.ReadError for a damaged archive, also in an archive. Reads all headers."""
    with open(path, 'rb') as file, tarfile.open(path, 'r:') as archive:
        for member in members(file):
            if member.isfile() and _suffix(member.name) == '.tar':
                _check_members(archive.extractfile(member), member.name)


def _check_ends(reader: ReaderImageInTar) -> None:
    """Raises tarfile.ReadError for archives that timm has not read to the end. Reads from the last image of each on."""
    starts: dict[tarfile.TarInfo | None, int] = {None: 0}
    for member, _, inner in reader.samples:
        starts[inner] = max(starts.get(inner, 0), member.offset)
    starts[None] = max(inner.offset if inner else start for inner, start in starts.items())
    with open(reader.root, 'rb') as file, tarfile.open(reader.root, 'r:') as archive:
        for inner, start in starts.items():
            if inner:
                _check_members(archive.extractfile(inner), inner.name, start)
            else:
                _check_members(file, '', start)


def _check_members(file: BinaryIO, name: str, start: int = 0) -> None:
    try:
        for _ in members(file, start):
            pass
    except tarfile.ReadError as error:
        raise tarfile.ReadError(f'{name}: {error}' if name else str(error)) from error


def class_labels(reader: Any) -> set[int]:
    """Returns the class indices that have images."""
    if isinstance(reader, ReaderImageFolder):
        return {label for _, label in reader.samples}
    return set(reader.targets.tolist() if isinstance(reader, ReaderImageInTar) else reader.iter_targets())


def empty_class_folders(reader: Any) -> list[str]:
    """Returns class folders without images. timm skips them, which shifts the indices of all later classes."""
    extensions = image_extensions()
    if isinstance(reader, ReaderImageFolder):
        root = Path(reader.root)
        filled = {Path(path).parent for path, _ in reader.samples} - {root}
        siblings = {folder for parent in {folder.parent for folder in filled} for folder in parent.iterdir()} - filled
        # A class map may leave out folders with images.
        empty = [
            folder.relative_to(root)
            for folder in siblings
            if folder.is_dir()
            and not any(_suffix(name) in extensions for _, files, _ in walk(folder) for name in files)
        ]
    elif isinstance(reader, ReaderImageInTar):
        names = _archive_members(reader.root)
        filled = {Path(inner.name) for _, _, inner in reader.samples if inner}
        filled |= {Path(name).parent for name, is_dir in names if _suffix(name) in extensions and not is_dir}
        filled |= {parent for folder in filled for parent in folder.parents}
        folders = [Path(name) for name, is_dir in names if is_dir or _suffix(name) == '.tar']
        empty = [folder for folder in folders if folder not in filled]
    else:
        return []
    return sorted(str(folder) for folder in empty if not folder.name.startswith('.'))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@functools.lru_cache(maxsize=1)
def _archive_members(path: str) -> list[tuple[str, bool]]:
    """Returns the names in an archive, and whether they are folders."""
    with tarfile.open(path) as archive:
        return [(info.name, info.isdir()) for info in archive]


def unused_files(reader: Any) -> Counter[str]:
    """Counts the files in the folder or archive of a reader that it does not contain, by kind."""
    special = 0
    if isinstance(reader, ReaderImageFolder | LabelFileReader):
        used, names = {path for path, _ in reader.samples}, []
        for folder, files, others in walk(reader.root):
            names += [path for name in files if (path := os.path.join(folder, name)) not in used]
            special += len(others)
    elif isinstance(reader, ReaderImageInTar) and os.path.isfile(reader.root):
        used = {member.name for member, _, inner in reader.samples if inner is None}
        names = [name for name, is_dir in _archive_members(reader.root) if not is_dir and name not in used]
    else:
        return Counter()
    kinds = Counter(_suffix(name) or 'without extension' for name in names if _is_visible(name))
    kinds.pop('.tar', None)  # of a class
    images = sum(kinds.pop(kind) for kind in image_extensions() & kinds.keys())
    return kinds + Counter({'images without a class': images, 'pipes, sockets or devices': special})


def _is_visible(path: str) -> bool:
    return not os.path.basename(path).startswith('.')
