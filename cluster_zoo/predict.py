"""Classifying images: files, folders and standard input to the classes that a model takes them for.

    model = load_classifier('coc_small.in1k')
    for result in classify(model, find_images(['photographs/', 'cat.jpg'])):
        print(result.image, result.error or result.classes[0].label)

An image may be anything at all: only formats of pixels are opened, sizes are limited before anything is decoded, and
one that can not be read is a result with an error, which stops nothing.
"""

import io
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import BinaryIO

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from .errors import ImageError, OptionError
from .weights.loading import load_model
from .weights.metadata import label_names

__all__ = ['Classified', 'Ranked', 'classify', 'find_images', 'load_classifier', 'read_image']

STANDARD_INPUT = '-'
MAX_BYTES = 64 * 2**20  # of standard input or of a pipe
MAX_RATIO = 100  # of the sides: models see the middle of what is resized to their height, however long that is

# Formats that are nothing but pixels. EPS, which Pillow would hand to Ghostscript as the program that it is, is not.
_FORMATS = (
    'JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'AVIF', 'JPEG2000', 'MPO', 'PPM', 'ICO', 'QOI', 'PCX', 'SGI', 'TGA',
)  # fmt: skip


@dataclass(frozen=True)
class Ranked:
    """A class that an image may be of.

    Attributes:
        index: Of the model's output.
        label: Its name; None where the model has none.
        probability: After softmax over all classes, 0..1.
    """

    index: int
    label: str | None
    probability: float


@dataclass(frozen=True)
class Classified:
    """What became of an image.

    Attributes:
        image: The file, ``-``, or the image itself where that is what was given.
        classes: The most probable first; empty if the image could not be read.
        error: Why it could not be read, else None.
    """

    image: str | Image.Image
    classes: tuple[Ranked, ...] = ()
    error: str | None = None


def load_classifier(name: str, device: torch.device | str = 'cpu') -> nn.Module:
    """A pretrained model, ready to classify.

    Args:
        name: See `load_model`.
        device: Where it is to run.

    Raises:
        OptionError: It has no classes.
        CheckpointError: See `load_model`.
    """
    model = load_model(name)
    if model.num_classes < 1:
        raise OptionError(f"'{name}' has features but no classes: it can not classify.")
    return model.to(device).eval()


def find_images(sources: Iterable[str | Path]) -> list[str | Classified]:
    """The images that files, folders and ``-`` (standard input) stand for.

    Args:
        sources: A folder stands for the images in it and below it, in the order of their paths, told by their
            extensions and without hidden ones; everything else stands for itself.

    Returns:
        Names for `read_image`, and in their places results with errors, for sources that stand for no image.
    """
    images: list[str | Classified] = []
    for source in map(os.fspath, sources):
        if os.path.isdir(source):
            images += _below(source) or [Classified(source, error='no image in this folder')]
        elif source == STANDARD_INPUT or os.path.exists(source):
            images.append(source)
        elif re.match('[a-z][a-z0-9+.-]+://', source, re.IGNORECASE):
            error = 'addresses are not read: download the image first, for example with curl, and give the file'
            images.append(Classified(source, error=error))
        else:
            images.append(Classified(source, error='no such file or folder'))
    return images


def _below(folder: str) -> list[str | Classified]:
    Image.init()
    extensions = {name for name, format in Image.registered_extensions().items() if format in _FORMATS}
    found, refused = [], []
    for root, folders, files in os.walk(folder, onerror=refused.append):
        folders[:] = [name for name in folders if not name.startswith('.')]
        found += [
            Path(root, name) for name in files if Path(name).suffix.lower() in extensions and not name.startswith('.')
        ]
    errors = [Classified(str(error.filename), error=_reason(error)) for error in refused]
    return [str(path) for path in sorted(found, key=lambda path: path.parts)] + errors


def read_image(name: str) -> Image.Image:
    """An image as it is looked at: upright, in RGB, of the first frame.

    The orientation that a camera noted is applied, transparency is laid over white, and channels of 16 bits are scaled
    to 8. Colour profiles are not applied, as in training.

    Args:
        name: A file, or ``-`` for standard input.

    Raises:
        ImageError: It can not be had, is no image, is damaged or too large.
    """
    try:
        if name == STANDARD_INPUT:
            return _decode(io.BytesIO(_read_all(sys.stdin.buffer, 'standard input')))
        with open(name, 'rb') as file:
            # What is no plain file, such as the shell's <(...), can be read but once
            return _decode(file if file.seekable() else io.BytesIO(_read_all(file, 'this pipe')))
    except ImageError:
        raise
    except Exception as error:  # a damaged file fails anywhere in a decoder, with any error
        raise ImageError(_reason(error)) from error


def _read_all(stream: BinaryIO, what: str) -> bytes:
    if stream.isatty():
        raise ImageError('standard input is a terminal: pipe an image into it')
    content = stream.read(MAX_BYTES + 1)
    if not content:
        raise ImageError(f'{what} was empty')
    if len(content) > MAX_BYTES:
        raise ImageError(f'more than {MAX_BYTES // 2**20} MB')
    return content


def _decode(file: BinaryIO) -> Image.Image:
    Image.init()
    with warnings.catch_warnings():
        # Of odd metadata, and of large images: Pillow refuses those of more than 179 million pixels
        warnings.simplefilter('ignore')
        try:
            image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
        except Image.UnidentifiedImageError as error:
            raise ImageError('not an image, or of a format that is not read') from error
        image.load()
        return _rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the metadata is damaged, the image is not
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith('I') or image.mode == 'F':
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('RGB')


def _eight_bits(image: Image.Image) -> Image.Image:
    """Integers of 16 bits and floats of 0..1 as a gray image; Pillow would cut both off at 255."""
    pixels = torch.frombuffer(bytearray(image.convert('F').tobytes()), dtype=torch.float32)
    low, high = pixels.aminmax()
    scale = 1 if image.mode == 'F' else 65535
    if not 0 <= low <= high <= scale:  # NaN as well
        raise ImageError(f'gray values of {low:g} to {high:g}, where 0 to {scale} was expected')
    return Image.frombytes('L', image.size, (pixels * (255 / scale)).round().to(torch.uint8).numpy().tobytes())


def _reason(error: object) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shorten(str(error), 400, placeholder=' ...') or type(error).__name__


@torch.inference_mode()
def classify(
    model: nn.Module,
    images: Iterable[str | Image.Image | Classified],
    top: int = 5,
    batch_size: int = 32,
) -> Iterator[Classified]:
    """What a model takes images for, each resized and cropped as in the model's validation.

    Args:
        model: A classifier of timm or of this package, in evaluation mode, see `load_classifier`.
        images: From `find_images`, or images that were opened already; results among them are passed on.
        top: Classes of each image.
        batch_size: Images that the model sees at once.

    Yields:
        A result for each image, in their order, unreadable ones included.

    Raises:
        OptionError: The model takes other images than those of one or three channels.
    """
    config = resolve_model_data_config(model, use_test_size=True)
    channels = resolve_model_data_config(model)['input_size'][0]  # timm's sizes for testing always say three
    mode = {1: 'L', 3: 'RGB'}.get(channels)
    if mode is None:
        raise OptionError(f'the model takes images of {channels} channels: only 1 or 3 can be read')
    transform = create_transform(**config)
    labels = label_names({**model.pretrained_cfg, 'num_classes': model.num_classes})
    device = next(model.parameters()).device

    def prepare(image: str | Image.Image | Classified) -> Tensor | Classified:
        if isinstance(image, Classified):
            return image
        try:
            pixels = (image if isinstance(image, Image.Image) else read_image(image)).convert(mode)
            if max(pixels.size) > MAX_RATIO * min(pixels.size):
                raise ImageError(f'{pixels.width} x {pixels.height} pixels are too narrow to be classified')
            return transform(pixels)
        except ImageError as error:
            return Classified(image, error=str(error))

    images = iter(images)
    while batch := list(islice(images, batch_size)):
        prepared = [prepare(image) for image in batch]
        inputs = [image for image in prepared if isinstance(image, Tensor)]
        ranked = iter(_rank(model(torch.stack(inputs).to(device)), top, labels) if inputs else ())
        for name, image in zip(batch, prepared):
            yield image if isinstance(image, Classified) else Classified(name, next(ranked))


def _rank(logits: Tensor, top: int, labels: Sequence[str] | None) -> Iterator[tuple[Ranked, ...]]:
    """The ``top`` classes of logits [B, K] for each image."""
    probabilities, indices = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    for row in zip(indices.tolist(), probabilities.tolist()):
        yield tuple(Ranked(index, labels[index] if labels else None, value) for index, value in zip(*row))
