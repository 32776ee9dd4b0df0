"""Where a dataset's files are read from: a folder, or an uncompressed tar that is read in place."""

import os
import tarfile
from pathlib import Path, PurePosixPath

from cluster_zoo.data import DataError

__all__ = ['Archive', 'Folder', 'open_files']


class Folder:
    """Files below a folder, by their paths in it ('/' between the parts on every system)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def exists(self, folder: str) -> bool:
        return (self.root / folder).is_dir()

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in one, sorted."""
        return sorted(entry.name for entry in (self.root / folder).iterdir() if entry.is_dir())

    def below(self, folder: str) -> list[str]:
        """Paths of all files in a folder and in the folders in it, sorted; hidden ones are left out."""
        paths = (Path(parent, name) for parent, _, names in os.walk(self.root / folder) for name in names)
        return sorted(path.relative_to(self.root).as_posix() for path in paths if not path.name.startswith('.'))

    def read(self, path: str) -> bytes:
        """Contents of a file.

        Raises:
            OSError: It can not be read.
        """
        return (self.root / path).read_bytes()


class Archive:
    """Files in an uncompressed tar, each read from where it lies.

    The archive is opened anew for each file: cheap, and neither threads nor worker processes share a position in it.

    Raises:
        DataError: It is compressed, damaged or no tar, or it holds links or paths that lead out of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._places: dict[str, tuple[int, int]] = {}
        self._folders = {''}
        try:
            with tarfile.open(root, 'r:') as archive:
                for member in archive:
                    self._add(member)
        except (OSError, tarfile.TarError) as error:
            raise DataError(
                f'{root} is not a complete, uncompressed tar ({error}): decompress or fetch it anew'
            ) from error

    def _add(self, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        plain = member.isdir() or (member.isreg() and not member.issparse())
        if not plain or path.is_absolute() or '..' in path.parts:
            raise DataError(f'{self.root} is not safe to read: {member.name} is a link, or leads out of the archive')
        folder = path if member.isdir() else path.parent
        self._folders.update('' if str(above) == '.' else str(above) for above in (folder, *folder.parents))
        if member.isreg():
            self._places[str(path)] = member.offset_data, member.size

    def exists(self, folder: str) -> bool:
        return folder in self._folders

    def folders(self, folder: str) -> list[str]:
        parent = folder or '.'
        return sorted(
            PurePosixPath(path).name for path in self._folders if path and str(PurePosixPath(path).parent) == parent
        )

    def below(self, folder: str) -> list[str]:
        start = f'{folder}/' if folder else ''
        return sorted(
            path for path in self._places if path.startswith(start) and not PurePosixPath(path).name.startswith('.')
        )

    def read(self, path: str) -> bytes:
        if path not in self._places:
            raise FileNotFoundError(f'{self.root} has no {path}')
        offset, size = self._places[path]
        with open(self.root, 'rb') as archive:
            archive.seek(offset)
            return archive.read(size)


def open_files(root: str | os.PathLike) -> Folder | Archive:
    """Opens a folder or a tar.

    Raises:
        DataError: There is no such file or folder, or it is not one of the two.
    """
    path = Path(root)
    if not path.exists():
        raise DataError(f'the data directory {root} does not exist')
    return Folder(path) if path.is_dir() else Archive(path)
