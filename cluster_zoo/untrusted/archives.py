"""Archives: checkpoints that are zip files, and archives that hold a checkpoint."""

import gzip
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from .errors import CheckpointError, damaged, first, quoted, refused

_MAX_DIRECTORY = 8 * 2**20  # bytes of a zip's directory, some 80,000 entries
_MAX_ENTRIES = 50_000
_MAX_UNPACKED = 16 * 2**30
_MAX_RATIO = 100  # unpacked over packed: weights hardly compress, optimizer states full of zeros may
_CHUNK = 2**20

_SUFFIXES = ('.pth.tar', '.pth', '.pt', '.ckpt', '.bin', '.safetensors')
_ZIP_MAGIC = b'PK\3\4'
_GZIP_MAGIC = b'\x1f\x8b'
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error)  # what `zipfile` raises for it


def check_archive(path: str | Path) -> dict[str, tuple[int, int]]:
    """Raise unless a zip file is laid out as ``torch.save`` writes it.

    That is: entries are stored as they are, not compressed, one after the other in one folder, so that all of them
    together are no larger than the file.

    Args:
        path: A file that begins as a zip does.

    Returns:
        Where the content of each entry begins in the file and how many bytes it has, by the name below the folder.

    Raises:
        CheckpointError: It is laid out otherwise. The message says how.
    """
    path = Path(path)
    try:
        with path.open('rb') as file:
            start = _directory_start(file)
            with zipfile.ZipFile(file) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            _check_names([entry.filename for entry in entries], path)
            inner = [PurePosixPath(*PurePosixPath(entry.filename).parts[1:]).as_posix() for entry in entries]
            if 'data.pkl' not in inner:
                raise refused(path, f'it is an archive of {first(e.filename for e in entries)}; unpack it first')
            if 'constants.pkl' in inner:
                raise refused(path, 'it is a TorchScript program, and not a checkpoint of weights')
            if len({PurePosixPath(entry.filename).parts[0] for entry in entries}) > 1:
                raise refused(path, 'its entries are not in one folder')
            return dict(zip(inner, _places(file, entries, start, path)))
    except _DAMAGE as error:
        raise damaged(path, 'a checkpoint', error) from error


def _directory_start(file: IO[bytes]) -> int:
    """Where a zip's directory begins.

    Readers of zip files search for the directory in different ways, and may find different ones. They agree where it is
    followed by nothing but its own end records, as there is nothing to search for.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 98, 0))
    tail = file.read().rjust(98, b'\0')  # end record of 64 bits (56 bytes), its locator (20), end record (22)
    magic, length, offset, comment = struct.unpack('<4s8x2IH', tail[76:])
    if magic != b'PK\5\6' or comment:
        raise zipfile.BadZipFile('it does not end as a zip file does')
    end = size - 22
    locator, wide_end = struct.unpack('<4s4xQ4x', tail[56:76])
    if locator == b'PK\6\7':
        magic, length, offset = struct.unpack('<4s36x2Q', tail[:56])
        end = size - 98
        if magic != b'PK\6\6' or wide_end != end:
            raise zipfile.BadZipFile('its end records contradict each other')
    if offset + length != end:
        raise zipfile.BadZipFile('its directory is not where its end says')
    if length > _MAX_DIRECTORY:
        raise zipfile.BadZipFile(f'its directory takes {length} bytes')
    file.seek(0)
    return offset


def _places(file: IO[bytes], entries: list[zipfile.ZipInfo], end: int, path: Path) -> list[tuple[int, int]]:
    """Position and size of stored entries that follow one another from the file's first byte to its directory."""
    if entries[0].header_offset != 0:
        raise zipfile.BadZipFile('it does not begin with an entry')
    places = []
    for entry, limit in zip(entries, [*(entry.header_offset for entry in entries[1:]), end]):
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise refused(
                path, f'its entry {quoted(entry.filename)} is compressed or encrypted, as torch.save never does'
            )
        file.seek(entry.header_offset)
        magic, name_size, extra_size = struct.unpack('<4s22x2H', file.read(30))
        if magic != _ZIP_MAGIC:
            raise zipfile.BadZipFile(f'there is no entry {quoted(entry.filename)}')
        position = entry.header_offset + 30 + name_size + extra_size
        if position + entry.file_size > limit:
            raise refused(path, f'its entry {quoted(entry.filename)} reaches into the next one or beyond the file')
        places.append((position, entry.file_size))
    return places


def _check_names(names: list[str], path: Path) -> None:
    """None leads out of the archive's folder, and no two are one file, on any system."""
    if len(names) > _MAX_ENTRIES:
        raise refused(path, f'it has {len(names)} entries')
    seen = set()
    for name in names:
        if not name.strip('/.') or name.startswith('/') or '\\' in name or '..' in name.split('/'):
            raise refused(path, f'its entry {quoted(name)} names a place outside of the archive')
        folded = PurePosixPath(name).as_posix().casefold()
        if folded in seen:
            raise refused(path, f'it has two entries {quoted(name)}')
        seen.add(folded)


def is_archive(path: str | Path) -> bool:
    """Whether a file is one for `unpack_checkpoint`: a zip that is no checkpoint itself, a tar, a gzip."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open('rb') as file:
        begin = file.read(262)
        if not begin.startswith(_ZIP_MAGIC):
            return begin.startswith(_GZIP_MAGIC) or begin[257:262] == b'ustar'
        try:
            _directory_start(file)
            with zipfile.ZipFile(file) as archive:
                return not any(name.endswith('/data.pkl') for name in archive.namelist())
        except _DAMAGE:
            return False


def unpack_checkpoint(path: str | Path, folder: str | Path) -> Path:
    """The one checkpoint of an archive, such as a browser makes of a Google Drive folder.

    Nothing else is unpacked, and of its name only the last part is used.

    Args:
        path: A ``.zip``, ``.tar`` or ``.tar.gz`` file.
        folder: Where to write the checkpoint. A file of the same name is replaced once the new one is complete.

    Returns:
        The written file.

    Raises:
        CheckpointError: No such archive or a damaged one; it has links, absolute names or ``..``, would grow a hundred
            times, or has not exactly one checkpoint.
        OSError: The folder cannot be written to.
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file():
        raise CheckpointError(f"No archive at '{path}'.")
    try:
        with path.open('rb') as file:
            begin = file.read(4)
            file.seek(0)
            if begin == _ZIP_MAGIC:
                return _unpack_zip(file, path, folder)
            if begin.startswith(_GZIP_MAGIC):
                with gzip.GzipFile(fileobj=file) as unzipped:
                    return _unpack_tar(unzipped, path, folder)
            return _unpack_tar(file, path, folder)
    except (*_DAMAGE, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise damaged(path, 'an archive (.zip, .tar, .tar.gz)', error) from error


def _unpack_zip(file: IO[bytes], path: Path, folder: Path) -> Path:
    _directory_start(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise refused(path, f'its entry {quoted(entry.filename)} is a link')
        entry = archive.getinfo(_only_checkpoint([entry.filename for entry in entries], path))
        name = quoted(entry.filename)
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refused(path, f'its entry {name} is encrypted or compressed in an unusual way; unpack it yourself')
        if entry.file_size > _largest(entry.compress_size):
            raise refused(path, f'its entry {name} would grow from {entry.compress_size} bytes to {entry.file_size}')
        with archive.open(entry) as source:
            return _write(source, entry.file_size, folder, entry.filename)


def _unpack_tar(file: IO[bytes], path: Path, folder: Path) -> Path:
    content = _BoundedReads(file, _largest(path.stat().st_size), path)
    names = []
    with tarfile.open(fileobj=content, mode='r:') as archive:
        for member in archive:
            if not (member.isdir() or member.isreg()) or member.issparse():
                kind = 'a link' if member.issym() or member.islnk() else 'neither a plain file nor a folder'
                raise refused(path, f'its entry {quoted(member.name)} is {kind}')
            if member.size < 0:  # what follows it would be itself, without end
                raise refused(path, f'its entry {quoted(member.name)} has a size of {member.size}')
            names.append(member.name + '/' * member.isdir())
            if len(names) > _MAX_ENTRIES:
                raise refused(path, f'it has more than {_MAX_ENTRIES} entries')
        member = archive.getmember(_only_checkpoint(names, path))
        while content.read(_CHUNK):  # to the end, where gzip keeps its checksum
            pass
        with archive.extractfile(member) as source:
            return _write(source, member.size, folder, member.name)


class _BoundedReads:
    """A file that is not read in large pieces, nor to positions that it cannot have.

    A tar's headers may have a size of their own, and `tarfile` takes as much into memory.
    """

    def __init__(self, file: IO[bytes], limit: int, path: Path):
        self.file, self.limit, self.path = file, limit, path
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise refused(self.path, 'its headers are too large')
        content = self.file.read(size)
        self._check(self.file.tell())
        return content

    def seek(self, position: int) -> int:
        self._check(position)
        return self.file.seek(position)

    def _check(self, position: int) -> None:
        if position > self.limit:
            raise refused(self.path, f'it would grow to more than {self.limit} bytes')


def _largest(packed: int) -> int:
    """Bytes that so many bytes of an archive may become."""
    return min(_MAX_UNPACKED, _MAX_RATIO * packed + _CHUNK)


def _only_checkpoint(names: list[str], path: Path) -> str:
    _check_names(names, path)
    found = [
        name
        for name in names
        if name.lower().endswith(_SUFFIXES)
        and not name.startswith('__MACOSX/')
        and not PurePosixPath(name).name.startswith('.')
    ]
    if len(found) > 1:
        raise CheckpointError(
            f"'{path}' holds {len(found)} checkpoints ({first(found)}). Unpack it and take one of them."
        )
    if not found:
        raise CheckpointError(
            f"'{path}' holds no checkpoint ({', '.join(_SUFFIXES)}), but {first(names) or 'nothing'}."
        )
    return found[0]


def _write(source: IO[bytes], size: int, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / PureWindowsPath(name).name  # the last part for any system's separators and drives
    partial = target.with_name(f'{target.name}.partial')
    try:
        with partial.open('wb') as file:
            shutil.copyfileobj(source, file, _CHUNK)
            if file.tell() != size:
                raise EOFError(f'{quoted(name)} ends early')
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
