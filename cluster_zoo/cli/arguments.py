"""Arguments that several commands have, and their types."""

import argparse
import os
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.models import parse_model_name

from ..errors import nearest
from ..models.builder import ASSETS

DEMO_MODEL = 'coc_tiny_plain.cifar10'  # its weights are part of the package
BUNDLED_MODELS = (DEMO_MODEL, 'fec_small.cifar10')
PHOTO = ASSETS / 'cat.jpg'  # scikit-image's chelsea.png, by Stefan van der Walt, CC0


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""
    parser.add_argument(
        '--device',
        type=_device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='device, for example cpu or cuda (default: %(default)s)',
    )


def _device(name: str) -> torch.device:
    available = ['cpu']
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        available += [kind, *(f'{kind}:{index}' for index in range(torch.accelerator.device_count()))]
    if name not in available:
        raise argparse.ArgumentTypeError(f'there is no device {name}, only {", ".join(available)}')
    return torch.device(name)


def model_name(name: str) -> str:
    """Type of an argument: a model name of ``timm.create_model``, or the path of a model folder."""
    if (Path(name) / 'config.json').is_file():
        return f'local-dir:{name}'
    if Path(name).is_file():
        raise argparse.ArgumentTypeError(
            f'{name} is a file, expected a model folder. Convert a checkpoint: cluster-zoo import {name} --to FOLDER'
        )
    if Path(name).is_dir():
        raise argparse.ArgumentTypeError(f'{name} is no model folder: it has no config.json')
    try:
        source, _ = parse_model_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if source:
        return name
    architecture, _, tag = name.partition('.')
    if not timm.is_model(architecture):
        raise argparse.ArgumentTypeError(
            f"there is no model '{architecture}'{nearest(architecture, timm.list_models())}"
        )
    names = timm.list_models(f'{architecture}.*', include_tags=True)
    if tag and name not in names:
        raise argparse.ArgumentTypeError(f"there are no weights '{name}', only {', '.join(names) or architecture}")
    return name


def image_path(name: str) -> Path:
    """Type of an argument: an image file to write."""
    if Path(name).suffix.lower() not in Image.registered_extensions():
        raise argparse.ArgumentTypeError(f'{name} has no extension of an image format: use .png')
    return output_path(name)


def output_path(name: str) -> Path:
    """Type of an argument: a file to write."""
    path = Path(name)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f'the folder {folder} does not exist')
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f'{path.absolute()} cannot be written: choose another file')
    return path


def positive(value: str) -> int:
    """Type of an argument: a whole number of at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f'{value} is not a whole number of at least 1')
    return int(value)
