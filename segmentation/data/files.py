"""A dataset's files, in a folder or in an uncompressed tar that is read in place; decoding images and masks."""

import io
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cluster_zoo.errors import DataError

__all__ = ['Archive', 'Folder', 'open_files', 'read_image', 'read_labels']


class Folder:
    """Files below a folder, by their paths in it ('/' between the parts on every system)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def exists(self, folder: str) -> bool:
        return (self.root / folder).is_dir()

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in one, sorted; hidden ones are left out, as everywhere here."""
        names = (entry.name for entry in (self.root / folder).iterdir() if entry.is_dir())
        return sorted(name for name in names if not name.startswith('.'))

    def below(self, folder: str) -> list[str]:
        """Paths of all files in a folder and in the folders in it, sorted."""
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
        start = f'{folder}/' if folder else ''
        inside = {path[len(start) :].partition('/')[0] for path in self._folders if path.startswith(start)}
        return sorted(name for name in inside if name and name[0] != '.')

    def below(self, folder: str) -> list[str]:
        start = f'{folder}/' if folder else ''
        paths = (path for path in self._places if path.startswith(start))
        return sorted(path for path in paths if not path.rpartition('/')[2].startswith('.'))

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


def read_image(files: Folder | Archive, path: str) -> Image.Image:
    """Decodes an image, in RGB.

    Raises:
        DataError: It can not be read, or it has more than 8 bits a channel.
    """
    image, _ = _decode(files, path)
    if image.mode == 'F' or image.mode.startswith('I'):  # which Pillow would cut off at 255
        raise DataError(f'{files.root / path} has more than 8 bits a pixel ({image.mode}): convert it to 8')
    return image.convert('RGB')


def read_labels(files: Folder | Archive, path: str) -> np.ndarray:
    """The numbers that a mask holds, of grey its values and of a palette its indices: [H, W] uint16.

    Raises:
        DataError: It can not be read, or it is a picture in colour.
    """
    image, stored = _decode(files, path)
    if image.mode not in ('1', 'L', 'P', 'I', 'I;16'):
        raise DataError(
            f'{files.root / path} is a picture in colour ({image.mode}): expected one number a pixel, grey or a palette'
        )
    # Pillow stretches grey of 2 and 4 bits to 0..255, which would make other labels of them.
    return np.asarray(image).astype(np.uint16) // {'L;2': 85, 'L;4': 17}.get(stored, 1)


def _decode(files: Folder | Archive, path: str) -> tuple[Image.Image, Any]:
    """An image, and how its pixels are stored in Pillow's words (known before it is decoded only)."""
    try:
        image = Image.open(io.BytesIO(files.read(path)))
        stored = image.tile[0][3] if image.tile else None
        image.load()
    except UnidentifiedImageError:
        raise DataError(f'{files.root / path} is not an image of a known format') from None
    except Exception as error:  # what is damaged fails anywhere in the decoders, with any error
        raise DataError(f'{files.root / path} is not a readable image ({error})') from error
    return image, stored
