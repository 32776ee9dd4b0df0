"""Image classification: predicts the most probable classes of files, folders, standard input and PIL images.

    model = load_classifier('coc_small.in1k')
    for result in classify(model, find_images(['photos/', 'cat.jpg'])):
        print(result.image, result.error or result.classes[0].label)

Images may come from untrusted sources: only pixel formats are opened, and sizes are limited before decoding. An
unreadable image gives a result with an error, and the other images are still classified.
"""

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
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

from .datasets import IMAGE_FORMATS, image_extensions
from .errors import ImageError, OptionError
from .weights.loading import load_model
from .weights.metadata import label_names

__all__ = ['Classified', 'Ranked', 'classify', 'find_images', 'load_classifier', 'read_image']

STANDARD_INPUT = '-'
MAX_BYTES = 64 * 2**20  # of standard input or a pipe
MAX_RATIO = 100  # of the sides: the transform resizes the short side, so a narrow image would need much memory


@dataclass(frozen=True)
class Ranked:
    """A class and its probability.

    Attributes:
        index: Index of the class in the model's output.
        label: Name of the class; None if the model has no class names.
        probability: Softmax probability, 0 .. 1; with several classes per image (``model.multi_label``), the sigmoid.
    """

    index: int
    label: str | None
    probability: float


@dataclass(frozen=True)
class Classified:
    """Result of one image.

    Attributes:
        image: The file name, ``-`` for standard input, or the given PIL image.
        classes: The most probable classes in descending order; empty if the image is not readable.
        error: Why the image is not readable, or None.
    """

    image: str | Image.Image
    classes: tuple[Ranked, ...] = ()
    error: str | None = None


def load_classifier(name: str, device: torch.device | str = 'cpu') -> nn.Module:
    """Loads a pretrained classifier in evaluation mode.

    Args:
        name: See `load_model`.
        device: Device to run on.

    Raises:
        OptionError: The model has no classes.
        CheckpointError: See `load_model`.
    """
    model = load_model(name)
    if model.num_classes < 1:
        raise OptionError(f"'{name}' has no classes: choose a model with a classifier.")
    return model.to(device).eval()


def find_images(sources: Iterable[str | Path]) -> list[str | Classified]:
    """Lists the images of files, folders and ``-`` (standard input).

    Args:
        sources: Files are listed whatever their extension. Folders are searched recursively for image extensions, in
            the order of the paths, without hidden files and folders.

    Returns:
        Names for `read_image`. A source without an image gives a result with an error in its place.
    """
    images: list[str | Classified] = []
    for source in map(os.fspath, sources):
        if os.path.isdir(source):
            images += _images_in_folder(source) or [Classified(source, error='no image in this folder')]
        elif source == STANDARD_INPUT or os.path.exists(source):
            images.append(source)
        elif re.match('[a-z][a-z0-9+.-]+://', source, re.IGNORECASE):
            error = 'addresses are not supported: download the image first, for example with curl, and give the file'
            images.append(Classified(source, error=error))
        else:
            images.append(Classified(source, error='no such file or folder'))
    return images


def _images_in_folder(folder: str) -> list[str | Classified]:
    extensions = image_extensions()
    paths, errors = [], []
    for root, folders, files in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith('.')]
        paths += [
            Path(root, name) for name in files if Path(name).suffix.lower() in extensions and not name.startswith('.')
        ]
    images = [str(path) for path in sorted(paths, key=lambda path: path.parts)]
    return images + [Classified(str(error.filename), error=_reason(error)) for error in errors]


def read_image(name: str) -> Image.Image:
    """Reads an image as RGB.

    Applies the orientation of the EXIF metadata, blends transparent pixels with white, scales 16-bit channels to 8 bits
    and returns the first of several frames. Color profiles are ignored, as in training.

    Args:
        name: A file, or ``-`` for standard input.

    Raises:
        ImageError: The file is missing, not an image, damaged or too large.
    """
    try:
        if name == STANDARD_INPUT:
            return _decode(io.BytesIO(_read_stream(sys.stdin.buffer, 'standard input')))
        with open(name, 'rb') as file:
            # A pipe, such as the shell's <(...), can be read only once.
            return _decode(file if file.seekable() else io.BytesIO(_read_stream(file, 'the pipe')))
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise ImageError(_reason(error)) from error


def _read_stream(stream: BinaryIO, name: str) -> bytes:
    if stream.isatty():
        raise ImageError('standard input is a terminal: pipe an image into the command')
    content = stream.read(MAX_BYTES + 1)
    if not content:
        raise ImageError(f'{name} is empty')
    if len(content) > MAX_BYTES:
        raise ImageError(f'more than {MAX_BYTES // 2**20} MB')
    return content


def _decode(file: BinaryIO) -> Image.Image:
    Image.init()
    with warnings.catch_warnings():
        # Pillow warns about odd metadata and large images. It raises an error above 179 million pixels.
        warnings.simplefilter('ignore')
        try:
            image = Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
        except Image.UnidentifiedImageError as error:
            raise ImageError('not an image, or an unsupported format') from error
        image.load()
        with contextlib.suppress(Exception):  # an image with damaged metadata is still readable
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I') or image.mode == 'F':
            image = _to_8_bits(image)
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert('RGB')


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit integers and floats in 0 .. 1 to 8 bits, where Pillow would clip both at 255."""
    pixels = torch.frombuffer(bytearray(image.convert('F').tobytes()), dtype=torch.float32)
    low, high = pixels.aminmax()
    scale = 1 if image.mode == 'F' else 65535
    if not 0 <= low <= high <= scale:  # false for NaN
        raise ImageError(f'gray values from {low:g} to {high:g}, expected 0 to {scale}')
    return Image.frombytes('L', image.size, (pixels * (255 / scale)).round().to(torch.uint8).numpy().tobytes())


def _reason(error: Exception) -> str:
    """Returns the message of an error in one line."""
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
    """Classifies images with the model's evaluation transform.

    Args:
        model: A classifier of timm or of this package, in evaluation mode, see `load_classifier`.
        images: Names from `find_images`, or PIL images. Results among them are passed through.
        top: Number of classes per image.
        batch_size: Images per batch.

    Yields:
        A result for each image in the same order, including unreadable ones.

    Raises:
        OptionError: The model expects images with other than one or three channels.
    """
    channels = resolve_model_data_config(model)['input_size'][0]  # test sizes of timm always have three channels
    mode = {1: 'L', 3: 'RGB'}.get(channels)
    if mode is None:
        raise OptionError(f'The model expects images with {channels} channels: choose a model for 1 or 3 channels.')
    transform = create_transform(**resolve_model_data_config(model, use_test_size=True))
    labels = label_names({**model.pretrained_cfg, 'num_classes': model.num_classes})
    device = next(model.parameters()).device

    def prepare(image: str | Image.Image | Classified) -> Tensor | Classified:
        if isinstance(image, Classified):
            return image
        try:
            pixels = (image if isinstance(image, Image.Image) else read_image(image)).convert(mode)
            if max(pixels.size) > MAX_RATIO * min(pixels.size):
                raise ImageError(f'too narrow: {pixels.width} x {pixels.height} pixels')
            return transform(pixels)
        except ImageError as error:
            return Classified(image, error=str(error))

    images = iter(images)
    while batch := list(islice(images, batch_size)):
        prepared = [prepare(image) for image in batch]
        inputs = [image for image in prepared if isinstance(image, Tensor)]
        ranked = iter(())
        if inputs:
            logits = model(torch.stack(inputs).to(device)).float()
            probability = logits.sigmoid() if getattr(model, 'multi_label', False) else logits.softmax(-1)
            ranked = zip(*(x.tolist() for x in probability.topk(min(top, probability.shape[-1]))))
        for image, result in zip(batch, prepared):
            if isinstance(result, Tensor):
                classes = (Ranked(index, labels[index] if labels else None, p) for p, index in zip(*next(ranked)))
                result = Classified(image, tuple(classes))
            yield result
