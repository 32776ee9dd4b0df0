"""Archives that hold a checkpoint, such as the zip file that a browser makes of a Google Drive folder."""

import gzip
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import CheckpointError, one_line, quoted

__all__ = ['SUFFIXES', 'is_archive', 'unpack_checkpoint']

SUFFIXES = ('.pth.tar', '.pth', '.pt', '.ckpt', '.bin', '.safetensors')

_MAX_RATIO = 100  # bytes of the content over bytes of the archive: weights hardly compress, zeros may
_MAX_MEMBERS = 10_000
_CHUNK = 1 << 20
_SHOWN = 4


def is_archive(path: Path) -> bool:
    """Whether a file is a zip, tar or gzip archive, and no checkpoint itself."""
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:
                return not any(PurePosixPath(name).name == 'data.pkl' for name in archive.namelist())
    except Exception:  # it is damaged, which reading tells
        return False
    return _starts_with(path, b'\x1f\x8b') or _is_tar(path)


def _starts_with(path: Path, magic: bytes, offset: int = 0) -> bool:
    with path.open('rb') as file:
        file.seek(offset)
        return file.read(len(magic)) == magic


def _is_zip(path: Path) -> bool:
    return _starts_with(path, b'PK') and zipfile.is_zipfile(path)  # which takes a tar that ends with a zip for one


def _is_tar(path: Path) -> bool:
    return _starts_with(path, b'ustar', 257)


def unpack_checkpoint(path: Path, folder: Path) -> Path:
    """Copy the one checkpoint of an archive into a folder. Nothing else is unpacked, and its path has no effect."""
    limit = _MAX_RATIO * path.stat().st_size + _CHUNK
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:
                name = _only_checkpoint(path, [entry.filename for entry in archive.infolist() if not entry.is_dir()])
                with archive.open(name) as content:
                    return _copy(content, folder, limit, path)
        if _starts_with(path, b'\x1f\x8b'):
            with gzip.open(path) as content:
                unzipped = _copy(content, folder, limit, path, 'unzipped')
            return unpack_checkpoint(unzipped, folder) if _is_tar(unzipped) else unzipped
        with tarfile.open(path, 'r:') as archive:
            members = {}
            for member in archive:
                if member.size < 0 or len(members) > _MAX_MEMBERS:  # or reading would not end
                    raise CheckpointError(f"'{path}' was refused: its list of members is damaged or has no end.")
                if member.isreg():
                    members[member.name] = member
            with archive.extractfile(members[_only_checkpoint(path, [*members])]) as content:
                return _copy(content, folder, limit, path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive fails with any error, RecursionError included
        raise CheckpointError(
            f"'{path}' is damaged, or not an archive that can be read ({one_line(error)})."
        ) from error


def _only_checkpoint(path: Path, names: list[str]) -> str:
    found = [
        name
        for name in names
        if name.lower().endswith(SUFFIXES)
        and not name.startswith('__MACOSX/')
        and not PurePosixPath(name).name.startswith('.')
    ]
    if len(found) != 1:
        listed = ', '.join(map(quoted, (found or names)[:_SHOWN])) or 'nothing'
        what = f'{len(found)} checkpoints ({listed}, ...)' if found else f'no checkpoint, but {listed}'
        raise CheckpointError(f"'{path}' holds {what}. Unpack it and take the file that you need.")
    return found[0]


def _copy(content: BinaryIO, folder: Path, limit: int, path: Path, name: str = 'checkpoint') -> Path:
    """Write a stream to a file, piece by piece and no more than ``limit`` bytes."""
    target = folder / name
    with target.open('wb') as file:
        while piece := content.read(_CHUNK):
            if file.write(piece) and file.tell() > limit:
                raise CheckpointError(f"'{path}' was refused: it grows to more than {_MAX_RATIO} times its size.")
    return target
