"""Archives that contain a checkpoint, such as the zip file that a browser downloads for a Google Drive folder."""

import gzip
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import CheckpointError, one_line, quoted

__all__ = ['SUFFIXES', 'is_archive', 'unpack_checkpoint']

SUFFIXES = ('.pth.tar', '.pth', '.pt', '.ckpt', '.bin', '.safetensors')

_MAX_RATIO = 100  # unpacked size over archive size: weights hardly compress, zeros compress a thousand times
_MAX_MEMBERS = 10_000
_CHUNK = 1 << 20
_SHOWN = 4


def _kind(path: Path) -> str | None:
    with path.open('rb') as file:
        start = file.read(262)
    if start.startswith(b'PK') and zipfile.is_zipfile(path):  # which alone accepts a tar file that ends with a zip file
        return 'zip'
    return 'gzip' if start.startswith(b'\x1f\x8b') else 'tar' if start.endswith(b'ustar') else None


def is_archive(path: Path) -> bool:
    """Whether a file is a zip, tar or gzip archive, but not a checkpoint written by ``torch.save``."""
    kind = _kind(path)
    try:
        if kind == 'zip':
            with zipfile.ZipFile(path) as archive:
                return all(PurePosixPath(name).name != 'data.pkl' for name in archive.namelist())
    except Exception:  # a damaged zip file, which `read_checkpoint` reports
        return False
    return kind is not None


def unpack_checkpoint(path: Path, folder: Path) -> Path:
    """Copies the only checkpoint of an archive into a folder, under a fixed name, and unpacks nothing else."""
    limit, kind = _MAX_RATIO * path.stat().st_size + _CHUNK, _kind(path)
    try:
        if kind == 'zip':
            with zipfile.ZipFile(path) as archive:
                name = _find_checkpoint(path, [entry.filename for entry in archive.infolist() if not entry.is_dir()])
                with archive.open(name) as content:
                    return _copy(content, folder / 'checkpoint', limit, path)
        if kind == 'gzip':
            with gzip.open(path) as content:
                unzipped = _copy(content, folder / 'unzipped', limit, path)
            return unpack_checkpoint(unzipped, folder) if _kind(unzipped) == 'tar' else unzipped
        with tarfile.open(path, 'r:') as archive:
            members = {}
            for member in archive:
                if member.size < 0 or len(members) > _MAX_MEMBERS:  # a negative size makes tarfile loop forever
                    raise CheckpointError(f"'{path}' was refused: its list of members is damaged or has no end.")
                if member.isreg():
                    members[member.name] = member
            with archive.extractfile(members[_find_checkpoint(path, [*members])]) as content:
                return _copy(content, folder / 'checkpoint', limit, path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive raises errors of any type, RecursionError included
        raise CheckpointError(f"'{path}' is damaged, or not a supported archive ({one_line(error)}).") from error


def _find_checkpoint(path: Path, names: list[str]) -> str:
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
        raise CheckpointError(f"'{path}' holds {what}. Unpack it and pass the file that you need.")
    return found[0]


def _copy(content: BinaryIO, target: Path, limit: int, path: Path) -> Path:
    with target.open('wb') as file:
        while chunk := content.read(_CHUNK):
            file.write(chunk)
            if file.tell() > limit:
                raise CheckpointError(f"'{path}' was refused: it grows to more than {_MAX_RATIO} times its size.")
    return target
