"""The files of a folder, through links, and the members of a tar, of which none is left out in silence.

`replacing` writes files that are complete or not there.
"""

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import DataError, one_line, quoted

__all__ = ['PART', 'members', 'replace', 'replacing', 'sync', 'walk']

PART = '.*.part'  # incomplete files of `replacing`, which a killed process leaves


def walk(root: str | os.PathLike) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walks through a folder and its subfolders, which may be links, as ``os.walk`` does.

    A link to a folder that contains it is not followed, so that no file is found twice in a circle.

    Yields:
        Each folder, the names of its files, and the names of what cannot be read as a file: pipes, sockets, devices.
        A broken link counts as a file.

    Raises:
        DataError: A folder cannot be listed.
    """
    real = os.path.realpath(root)
    folders = [(os.fspath(root), real, _with_parents(real))]
    while folders:
        folder, real, above = folders.pop()
        files, others = [], []
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            raise DataError(f'{folder} cannot be listed: {error.strerror}') from error
        for entry in entries:
            if _is_folder(entry):
                path = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if path not in above:
                    folders.append((entry.path, path, above | _with_parents(path)))
            else:
                (files if _is_file(entry) else others).append(entry.name)
        yield folder, files, others


def _with_parents(path: str) -> set[str]:
    return {path, *map(str, Path(path).parents)}


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def members(file: BinaryIO, start: int = 0) -> Iterator[tarfile.TarInfo]:
    """Iterates over the members of an uncompressed tar, which ``tarfile`` ends in silence at a damaged header.

    Args:
        file: The tar.
        start: Position of the header of the first member.

    Raises:
        tarfile.ReadError: The tar is damaged or truncated. The message names the last member before.
    """
    last = None
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode='r:') as archive:
            for last in archive:
                yield last
            if not _is_end(file, archive.offset):
                raise tarfile.ReadError('damaged header')
    except Exception as error:  # a damaged header may raise any error
        where = f'after the member {quoted(last.name)}' if last else 'at the start'
        raise tarfile.ReadError(f'{one_line(error)} {where}') from error


def sync(path: str | os.PathLike) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(new: str | os.PathLike, path: str | os.PathLike) -> None:
    """Gives a complete file its name."""
    os.replace(new, path)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        sync(os.path.dirname(path) or '.')


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Returns a name to write a file to, which is then renamed to `path`; after an error it is removed instead."""
    scratch = path.with_name(f'.{os.getpid()}.part')  # short, because `path` may have the longest possible name
    try:
        yield scratch
        sync(scratch)
        replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _is_end(file: BinaryIO, position: int) -> bool:
    """Returns whether a tar ends: with the file, or with two blocks of zeros and no header after them."""
    file.seek(position)
    if file.read(2 * tarfile.BLOCKSIZE).strip(b'\0'):
        return False
    while block := file.read(tarfile.BLOCKSIZE):
        with contextlib.suppress(tarfile.HeaderError):
            tarfile.TarInfo.frombuf(block, tarfile.ENCODING, 'surrogateescape')
            return False
    return True
