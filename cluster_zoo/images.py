"""Images from files, standard input and untrusted sources, as RGB.

Only pixel formats are opened, and sizes are limited before decoding.
"""

import contextlib
import io
import sys
import warnings
from textwrap import shorten
from typing import BinaryIO

import torch
from PIL import Image, ImageOps

from .errors import ImageError

__all__ = [
    'IMAGE_FORMATS',
    'check_sides',
    'decode_image',
    'image_extensions',
    'open_image',
    'read_image',
    'reason',
    'to_rgb',
]

# Formats that contain only pixels. EPS is left out because Pillow runs it with Ghostscript.
IMAGE_FORMATS = (
    'JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'AVIF', 'JPEG2000', 'MPO', 'PPM', 'ICO', 'QOI', 'PCX', 'SGI', 'TGA',
)  # fmt: skip
STANDARD_INPUT = '-'
MAX_BYTES = 64 * 2**20  # of standard input or a pipe
MAX_RATIO = 100  # of the sides


def image_extensions() -> set[str]:
    """Returns the file name extensions of the image formats that Pillow can read here, such as ``'.jpg'``."""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}


def open_image(file: BinaryIO) -> Image.Image:
    """Opens an image of one of `IMAGE_FORMATS` without decoding it.

    Raises:
        ImageError: The file has no such format. Damaged headers may raise other errors.
    """
    Image.init()
    try:
        return Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError as error:
        raise ImageError('not an image, or an unsupported format') from error


def decode_image(file: BinaryIO, mode: str | None = 'RGB') -> Image.Image:
    """Decodes an image of a dataset, the first of several frames.

    As in timm, EXIF orientation, transparency and color profiles are ignored. 16-bit channels are scaled to 8 bits.

    Args:
        file: The image file.
        mode: Pillow's mode of the result; empty for the mode of the image.

    Raises:
        ImageError: The image is damaged or too narrow, or has an unsupported format.
    """
    try:
        image = open_image(file)
        check_sides(image)
        image.load()
        if not mode:
            return image
        return (image if _is_deep(mode) else _to_8_bits(image)).convert(mode)
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise ImageError(reason(error)) from error


def read_image(name: str, max_pixels: int | None = None) -> Image.Image:
    """Reads an image as RGB.

    Applies the orientation of the EXIF metadata, blends transparent pixels with white, scales 16-bit channels to 8 bits
    and returns the first of several frames. Color profiles are ignored, as in training.

    Args:
        name: A file, or ``-`` for standard input.
        max_pixels: Largest product of width and height.

    Raises:
        ImageError: The file is missing, not an image, damaged or too large.
    """
    try:
        if name == STANDARD_INPUT:
            return _decode(io.BytesIO(_read_stream(sys.stdin.buffer, 'standard input')), max_pixels)
        with open(name, 'rb') as file:
            # A pipe, such as the shell's <(...), can be read only once.
            return _decode(file if file.seekable() else io.BytesIO(_read_stream(file, 'the pipe')), max_pixels)
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise ImageError(reason(error)) from error


def _read_stream(stream: BinaryIO, name: str) -> bytes:
    if stream.isatty():
        raise ImageError('standard input is a terminal: pipe an image into the command')
    content = stream.read(MAX_BYTES + 1)
    if not content:
        raise ImageError(f'{name} is empty')
    if len(content) > MAX_BYTES:
        raise ImageError(f'more than {MAX_BYTES // 2**20} MB')
    return content


def _decode(file: BinaryIO, max_pixels: int | None) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns about odd metadata and large images. It raises an error above 179 million pixels.
        warnings.simplefilter('ignore')
        image = open_image(file)
        if max_pixels and image.width * image.height > max_pixels:
            raise ImageError(f'{image.width} x {image.height} pixels, more than {max_pixels / 1e6:g} million')
        image.load()
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, as `read_image` does.

    Raises:
        ImageError: Gray values are out of range.
    """
    with contextlib.suppress(Exception):  # an image with damaged metadata is still readable
        image = ImageOps.exif_transpose(image)
    image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def check_sides(image: Image.Image) -> None:
    """Raises `ImageError` for a narrow image, which needs much memory when its shorter side is resized."""
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ImageError(f'too narrow: {image.width} x {image.height} pixels')


def _is_deep(mode: str) -> bool:
    return mode.startswith('I') or mode == 'F'


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit integers and floats in 0 .. 1 to 8 bits, where Pillow would clip both at 255."""
    if not _is_deep(image.mode):
        return image
    pixels = torch.frombuffer(bytearray(image.convert('F').tobytes()), dtype=torch.float32)
    low, high = pixels.aminmax()
    scale = 1 if image.mode == 'F' else 65535
    if not 0 <= low <= high <= scale:  # false for NaN
        raise ImageError(f'gray values from {low:g} to {high:g}, expected 0 to {scale}')
    return Image.frombytes('L', image.size, (pixels * (255 / scale)).round().to(torch.uint8).numpy().tobytes())


def reason(error: Exception) -> str:
    """Returns the message of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shorten(str(error), 400, placeholder=' ...') or type(error).__name__
