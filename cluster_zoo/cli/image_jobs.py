"""What ``segment predict`` and ``detect predict`` share: a PNG for each image of files and folders, and a JSON file."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from segmentation.engine.overlays import check_output_folder

from ..errors import ImageError, OptionError, print_error, printable
from ..files import replacing
from ..images import STANDARD_INPUT
from ..predict import Classified, find_images
from ..training.parser import Parser
from ..training.runtime import check_output_file, option_errors

STDOUT = '-'


class Job(NamedTuple):
    """An image and the PNG to write for it."""

    source: str | Classified  # an image, or an error in its place
    name: Path | None  # of the PNG in each folder of the output


def add_image_arguments(parser: Parser) -> None:
    """Adds the images to a parser."""
    help = 'a file, a folder (all images in and below it), or - for standard input'
    parser.add_argument('images', nargs='+', metavar='IMAGE', help=help)


def add_json_option(add: Callable[..., Any], content: str) -> None:
    """Adds ``--json`` with ``add``, the ``add_argument`` of a parser or a group."""
    help = f'write {content} to a .json file; without FILE to standard output'
    add('--json', nargs='?', const=STDOUT, type=_json_file, metavar='FILE', help=help)


def _json_file(name: str) -> str:
    """Type of an argument. An image must not be taken for the file to write."""
    if name != STDOUT and Path(name).suffix.lower() != '.json':
        raise argparse.ArgumentTypeError(f'{name} does not end in .json: give --json after the images, or a .json file')
    return name


def find_jobs(images: list[str], outputs: dict[str, str | None]) -> list[Job]:
    """Returns the images and the names of their PNGs.

    Args:
        images: Files, folders and ``-``.
        outputs: Folder of each option of the output; None if it is not given.

    Raises:
        OptionError: There is no image, two images have the same PNG, or a PNG has the name of one of the images.
    """
    folders = [Path(folder).resolve() for folder in outputs.values() if folder]
    jobs, written, left_out = [], {}, 0
    for source in images:
        inside = Path(source).resolve() if os.path.isdir(source) else None
        below = [folder for folder in folders if inside in folder.parents]
        for image in find_images([source]):
            if isinstance(image, Classified):
                jobs.append(Job(image, None))
                continue
            path = Path('stdin' if image == STANDARD_INPUT else image)
            real = path.resolve()
            if any(real.is_relative_to(folder) for folder in below):
                left_out += 1  # an output of an earlier call
                continue
            name = (path.relative_to(source) if inside else Path(path.name)).with_suffix('.png')
            other = written.setdefault(name, real)
            if other != real:
                raise OptionError(
                    f'{printable(real)} and {printable(other)} would have the same output {printable(name)}: give them '
                    'in two calls with different --output'
                )
            jobs.append(Job(image, name))
    if left_out:
        print(f'{left_out} images are left out: they are in the folders of the output', file=sys.stderr)
    if not written:
        for job in jobs:
            print_error(ImageError(job.source.error), printable(job.source.image))
        raise OptionError('There is no image to process: name files or folders of images.')
    if replaced := {folder / name for folder in folders for name in written} & {*written.values()}:
        raise OptionError(
            f'the image {printable(min(replaced))} would be replaced: choose another {", ".join(outputs)}'
        )
    return jobs


def check_outputs(outputs: dict[str, str | None], json_file: str | None) -> None:
    """Creates the folders of the output, and raises `OptionError` if something cannot be written."""
    for option, folder in outputs.items():
        if folder:
            with option_errors(f'{option} {folder}'):
                check_output_folder(folder)
    if json_file not in (None, STDOUT):
        check_output_file('--json', json_file)


def save_png(image: Image.Image, folder: str, name: Path, option: str) -> str:
    """Writes a PNG, complete or not at all, and returns its path."""
    path = Path(folder) / name
    with option_errors(f'{option} {folder}'):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            image.save(scratch, 'PNG')
    return str(path)


@contextmanager
def memory_errors(device: str, advice: str) -> Iterator[None]:
    """Raises `OptionError` with advice for the errors of a device without free memory."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and the error of an allocation on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OptionError(f'out of memory on {device}: {advice}') from error


def process_images(
    jobs: list[Job],
    process: Callable[[Job], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
    about: dict[str, Any],
    json_file: str | None,
) -> int:
    """Processes the images, reports those that are not readable, and writes the JSON file.

    Args:
        jobs: See `find_jobs`.
        process: Returns the record of an image for JSON.
        line: Returns a record as a line of text.
        about: Other content of the JSON file: ``model``, ``weights``, ``classes``.
        json_file: Name of the file, ``-`` for standard output, None for no JSON.

    Returns:
        The exit status: 0, or 1 if some images were not readable.
    """
    if json_file != STDOUT:
        text = f'{about["model"]}: {len(about["classes"])} classes, weights: {about["weights"]}'
        print(printable(text), flush=True)
    records = []
    bar = tqdm(jobs, desc='Predicting', unit='image', leave=False, disable=None if len(jobs) > 1 else True)
    for job in bar:
        try:
            if isinstance(job.source, Classified):
                raise ImageError(job.source.error)
            records.append(process(job))
        except ImageError as error:
            name = job.source.image if isinstance(job.source, Classified) else job.source
            records.append(dict(image=name, error=str(error)))
            with bar.external_write_mode(file=sys.stderr):
                print_error(error, printable(name))
        else:
            if json_file != STDOUT:
                bar.write(printable(line(records[-1])))
    _write_json(about | dict(images=records), json_file)
    return int(any('error' in record for record in records))


def _write_json(content: dict[str, Any], name: str | None) -> None:
    text = json.dumps(content, indent=2)
    if name == STDOUT:
        print(text)
    elif name is not None:
        with option_errors(f'--json {name}'), replacing(Path(name)) as scratch:
            scratch.write_text(text + '\n', encoding='utf-8')
