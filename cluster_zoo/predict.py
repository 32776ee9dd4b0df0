"""Image classification: predicts the most probable classes of files, folders, standard input and PIL images.

    model = load_classifier('coc_small.in1k')
    for result in classify(model, find_images(['photos/', 'cat.jpg'])):
        print(result.image, result.error or result.classes[0].label)

Images may come from untrusted sources: only pixel formats are opened, and sizes are limited before decoding. An
unreadable image gives a result with an error, and the other images are still classified.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from .datasets import image_extensions
from .errors import ImageError, OptionError
from .images import STANDARD_INPUT, check_sides, read_image, reason
from .weights.loading import load_model
from .weights.metadata import label_names

__all__ = ['Classified', 'Ranked', 'classify', 'find_images', 'load_classifier', 'read_image']


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
    return images + [Classified(str(error.filename), error=reason(error)) for error in errors]


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
            check_sides(pixels)
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
