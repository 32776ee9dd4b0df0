"""Files of a dataset, in a folder or in an uncompressed tar that is read in place; decoding of images and masks."""

import io
import os
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from cluster_zoo.errors import DataError, ImageError
from cluster_zoo.files import members, walk
from cluster_zoo.images import open_image

__all__ = ['Archive', 'Folder', 'open_files', 'read_image', 'read_labels']


_MAX_LABEL = (1 << 16) - 1


class Folder:
    """Files in a folder, by relative POSIX paths. Hidden files and folders are not listed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def exists(self, folder: str) -> bool:
        return (self.root / folder).is_dir()

    def folders(self, folder: str) -> list[str]:
        """Returns the sorted names of the folders directly in a folder."""
        return sorted(path.name for path in (self.root / folder).iterdir() if path.is_dir() and path.name[0] != '.')

    def below(self, folder: str) -> list[str]:
        """Returns the sorted paths of all files in a folder and its subfolders, which may be links; see `walk`.

        Raises:
            DataError: A folder cannot be listed.
        """
        paths = (Path(parent, name) for parent, names, _ in walk(self.root / folder) for name in names)
        return sorted(path.relative_to(self.root).as_posix() for path in paths if path.name[0] != '.')

    def read(self, path: str) -> bytes:
        """Reads a file. Raises OSError."""
        return (self.root / path).read_bytes()


class Archive:
    """Files in an uncompressed tar, with the methods of `Folder`.

    Each read opens the archive again, so that threads and worker processes do not share a file position.

    Raises:
        DataError: The file is compressed, damaged or not a tar, or contains links or paths that lead out of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._offsets: dict[str, tuple[int, int]] = {}  # offset and size
        self._folders = {''}
        try:
            with open(root, 'rb') as file:
                for member in members(file):
                    self._add(member)
        except (OSError, tarfile.TarError) as error:
            raise DataError(
                f'{root} is not a complete, uncompressed tar ({error}): decompress or download it again'
            ) from error

    def _add(self, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        plain = member.isdir() or (member.isreg() and not member.issparse())
        if not plain or path.is_absolute() or '..' in path.parts:
            raise DataError(f'{self.root} is not safe to read: {member.name} is a link or leads out of the archive')
        folders = [path, *path.parents] if member.isdir() else path.parents
        self._folders.update('' if str(folder) == '.' else str(folder) for folder in folders)
        if member.isreg():
            self._offsets[str(path)] = member.offset_data, member.size

    def exists(self, folder: str) -> bool:
        return folder in self._folders

    def folders(self, folder: str) -> list[str]:
        start = f'{folder}/' if folder else ''
        names = {path[len(start) :].partition('/')[0] for path in self._folders if path.startswith(start)}
        return sorted(name for name in names if name and name[0] != '.')

    def below(self, folder: str) -> list[str]:
        start = f'{folder}/' if folder else ''
        paths = (path for path in self._offsets if path.startswith(start))
        return sorted(path for path in paths if not path.rpartition('/')[2].startswith('.'))

    def read(self, path: str) -> bytes:
        if path not in self._offsets:
            raise FileNotFoundError(f'{self.root} has no {path}')
        offset, size = self._offsets[path]
        with open(self.root, 'rb') as archive:
            archive.seek(offset)
            return archive.read(size)


def open_files(root: str | os.PathLike) -> Folder | Archive:
    """Opens a folder or a tar.

    Raises:
        DataError: The path does not exist or is neither a folder nor a tar.
    """
    path = Path(root)
    if not path.exists():
        raise DataError(f'the data directory {root} does not exist')
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise DataError(f'the data directory {root} is neither a folder nor a tar')
    return Archive(path)


def read_image(files: Folder | Archive, path: str) -> Image.Image:
    """Decodes an RGB image. EXIF orientation is not applied, because masks have none.

    Raises:
        DataError: The image cannot be decoded or has more than 8 bits per channel.
    """
    image, _ = _decode(files, path)
    if image.mode == 'F' or image.mode.startswith('I'):  # Pillow would clip the values to 255
        raise DataError(f'{files.root / path} has more than 8 bits per channel ({image.mode}): convert it to 8 bits')
    return image.convert('RGB')


def read_labels(files: Folder | Archive, path: str) -> np.ndarray:
    """Decodes the labels of a mask, gray values or palette indices of a PNG or TIFF: uint16 [H, W].

    Raises:
        DataError: The mask cannot be decoded, has several channels or pages, fractions, or labels not in 0 to 65535.
    """
    image, stored_mode = _decode(files, path)
    if image.mode not in ('1', 'L', 'P') and not image.mode.startswith('I'):
        kind = 'has fractions' if image.mode == 'F' else 'is a color image'
        raise DataError(
            f'{files.root / path} {kind} ({image.mode}): masks must be grayscale or palette PNGs or TIFFs, with the '
            'number of a class in each pixel'
        )
    if getattr(image, 'n_frames', 1) > 1:
        raise DataError(f'{files.root / path} has {image.n_frames} pages: masks must have one')
    labels = np.asarray(image)
    if labels.min() < 0 or labels.max() > _MAX_LABEL:
        raise DataError(
            f'{files.root / path} has labels {labels.min()} to {labels.max()}: labels are 0 to {_MAX_LABEL}'
        )
    # Pillow scales gray values of 2 and 4 bits to 0..255, which would change the labels.
    return labels.astype(np.uint16) // {'L;2': 85, 'L;4': 17}.get(stored_mode, 1)


def _decode(files: Folder | Archive, path: str) -> tuple[Image.Image, object]:
    """Returns an image, and the mode of the stored pixels, which Pillow forgets after decoding."""
    try:
        image = open_image(io.BytesIO(files.read(path)))
        stored_mode = image.tile[0][3] if image.tile else None
        if isinstance(stored_mode, tuple):  # of TIFFs
            stored_mode = stored_mode[0]
        image.load()
    except ImageError:
        raise DataError(f'{files.root / path} is not an image of a known format') from None
    except Exception as error:  # decoders fail with any error on damaged files
        raise DataError(f'{files.root / path} is not a readable image ({error})') from error
    return image, stored_mode
