"""``cluster-zoo segment predict``: writes the masks of images."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from segmentation.data.classes import Classes
from segmentation.engine.overlays import check_output_folder, draw_overlay
from segmentation.engine.shared_options import add_average_options, add_test_options
from segmentation.engine.trained import TrainedSegmenter, load_trained

from ..errors import ImageError, OptionError, print_error, printable
from ..files import replacing
from ..images import STANDARD_INPUT, read_image
from ..predict import Classified, find_images
from ..training.parser import Parser
from ..training.runtime import check_output_file, option_errors, set_up_device
from . import exit_on_sigterm
from .arguments import positive

_LISTED = 5  # classes of an image that are printed
_STDOUT = '-'


def predict_parser(prog: str = 'cluster-zoo segment predict') -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        prog=prog,
        usage='%(prog)s IMAGE ... (--checkpoint FILE | --model NAME) [options]',
        description='Write the mask of each image, a PNG with the index of a class in each pixel and the colors of the '
        'classes as its palette. Images are rotated according to their EXIF orientation, and transparent pixels are '
        'blended with white. Unreadable images are reported, and the others are segmented. Existing files are '
        'replaced. Exit status: 0 all images were segmented, 1 some were not, 2 an error.',
    )
    help = 'a file, a folder (all images in and below it), or - for standard input'
    parser.add_argument('images', nargs='+', metavar='IMAGE', help=help)
    add = parser.add_argument_group('model').add_argument
    add('--checkpoint', metavar='FILE', help='a checkpoint of segment train, which knows classes and test protocol')
    add('--model', metavar='NAME', help="pretrained weights; with --checkpoint, the system of the authors' file")
    add('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    add('--device', help='device (default: the accelerator of this machine, else cpu)')
    group = add_test_options(parser, prefix='', crop='window')
    add_average_options(group)
    help = 'windows per forward pass (default: 1)'
    group.add_argument('-b', '--batch-size', type=positive, default=1, metavar='N', help=help)
    parser.epilog = (
        'The test options are those of the checkpoint or of the published system. --window N selects --mode slide. '
        'Without --mode and --window, an image of more than 2 megapixels, which would be predicted as a whole, is '
        'predicted in windows of 1024 px.'
    )
    add = parser.add_argument_group('output').add_argument
    add('-o', '--output', default='masks', metavar='DIR', help='folder of the masks (default: masks)')
    add('--overlays', metavar='DIR', help='draw predictions over their images, with a legend, into this folder')
    help = 'write the areas of the classes to a .json file; without FILE to standard output'
    add('--json', nargs='?', const=_STDOUT, type=_json_file, metavar='FILE', help=help)
    return parser


def _json_file(name: str) -> str:
    """Type of an argument. An image must not be taken for the file to write."""
    if name != _STDOUT and Path(name).suffix.lower() != '.json':
        raise argparse.ArgumentTypeError(f'{name} does not end in .json: give --json after the images, or a .json file')
    return name


class _Job(NamedTuple):
    source: str | Classified  # an image, or an error in its place
    name: Path | None  # of the mask in --output, and of the overlay in --overlays


def _jobs(args: argparse.Namespace) -> list[_Job]:
    """Returns the images and the names of their masks.

    Raises:
        OptionError: There is no image, two images have the same mask, or a mask has the name of one of the images.
    """
    outputs = [Path(folder).resolve() for folder in (args.output, args.overlays) if folder]
    jobs, masks, left_out = [], {}, 0
    for source in args.images:
        folder = Path(source).resolve() if os.path.isdir(source) else None
        below = [output for output in outputs if folder in output.parents]
        for image in find_images([source]):
            if isinstance(image, Classified):
                jobs.append(_Job(image, None))
                continue
            path = Path('stdin' if image == STANDARD_INPUT else image)
            real = path.resolve()
            if any(real.is_relative_to(output) for output in below):
                left_out += 1  # a mask of an earlier call
                continue
            name = (path.relative_to(source) if folder else Path(path.name)).with_suffix('.png')
            other = masks.setdefault(name, real)
            if other != real:
                raise OptionError(
                    f'{printable(real)} and {printable(other)} would have the same mask {printable(name)}: give them '
                    'in two calls with different --output'
                )
            jobs.append(_Job(image, name))
    if left_out:
        print(f'{left_out} images are left out: they are in the folders of the output', file=sys.stderr)
    if not masks:
        for job in jobs:
            print_error(ImageError(job.source.error), printable(job.source.image))
        raise OptionError('There is no image to segment: name files or folders of images.')
    if replaced := {output / name for output in outputs for name in masks} & {*masks.values()}:
        raise OptionError(
            f'the image {printable(min(replaced))} would be replaced: choose another --output, --overlays'
        )
    return jobs


def _load(args: argparse.Namespace) -> TrainedSegmenter:
    if 'test_crop' in args.given:  # the mode and the stride of the checkpoint are for other windows
        args.test_mode, args.test_stride = args.test_mode or 'slide', args.test_stride or args.test_crop
    if min(args.scales) <= 0:
        raise OptionError('--scales must be above 0')
    set_up_device(args)
    options = {name: value for name, value in vars(args).items() if name.startswith('test_') or name == 'given'}
    trained = load_trained(args.checkpoint, args.model, args.use_ema, args.device, argparse.Namespace(**options))
    if len(trained.classes.names) > 256:
        raise OptionError(f'{len(trained.classes.names)} classes: a palette PNG has at most 256')
    return trained


def _check_outputs(args: argparse.Namespace) -> None:
    """Creates the folders of the output, and raises `OptionError` if something cannot be written."""
    if args.overlays and Path(args.overlays).resolve() == Path(args.output).resolve():
        raise OptionError(f'--overlays {args.overlays} is the folder of the masks: choose another one')
    for name in ('output', 'overlays'):
        if folder := getattr(args, name):
            with option_errors(f'--{name} {folder}'):
                check_output_folder(folder)
    if args.json not in (None, _STDOUT):
        check_output_file('--json', args.json)


def palette_image(mask: Tensor, classes: Classes) -> Image.Image:
    """Returns an image with the classes of a mask [H, W] as palette indices, and their colors as palette."""
    image = Image.fromarray(mask.to(torch.uint8).numpy())
    image.putpalette(np.asarray(classes.colours, np.uint8).tobytes())
    return image


def areas(mask: Tensor, classes: Classes) -> list[dict[str, Any]]:
    """Returns the classes in a mask [H, W] with their pixels and fractions of the image, the largest first."""
    counts = mask.flatten().bincount(minlength=len(classes.names)).tolist()
    found = (
        dict(index=index, label=classes.names[index], pixels=count, fraction=count / mask.numel())
        for index, count in enumerate(counts)
        if count
    )
    return sorted(found, key=lambda area: -area['pixels'])


def _save(image: Image.Image, folder: str, name: Path, option: str) -> str:
    """Writes a PNG, complete or not at all, and returns its path."""
    path = Path(folder) / name
    with option_errors(f'{option} {folder}'):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            image.save(scratch, 'PNG')
    return str(path)


def _segment(job: _Job, trained: TrainedSegmenter, args: argparse.Namespace) -> dict[str, Any]:
    """Writes the outputs of an image, and returns its record.

    Raises:
        ImageError: The image is not readable.
        OptionError: The memory is not sufficient, or an output cannot be written.
    """
    if isinstance(job.source, Classified):
        raise ImageError(job.source.error)
    image = read_image(job.source)
    try:
        mask = trained.predict(image, scales=args.scales, flip=args.flip, chunk=args.batch_size)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and the error of an allocation on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OptionError(f'out of memory on {args.device}: use a smaller --window or --batch-size') from error
    found, classes = areas(mask, trained.classes), trained.classes
    mask = mask.to(torch.uint8)
    record = dict(image=job.source, mask=_save(palette_image(mask, classes), args.output, job.name, '--output'))
    if args.overlays:
        title = printable(job.name.stem if job.source == STANDARD_INPUT else Path(job.source).name)
        overlay = draw_overlay(pil_to_tensor(image), mask, classes.names, classes.colours, name=title)
        record['overlay'] = _save(overlay, args.overlays, job.name, '--overlays')
    return record | dict(width=image.width, height=image.height, areas=found)


def _line(record: dict[str, Any]) -> str:
    """Returns a record as a line of text."""
    shown = [f'{area["label"]} {100 * area["fraction"]:.1f} %' for area in record['areas']]
    more = f', {len(shown) - _LISTED} more' if len(shown) > _LISTED else ''
    return printable(f'{record["image"]}: {record["mask"]}: {", ".join(shown[:_LISTED])}{more}')


def _run(args: argparse.Namespace) -> int:
    jobs = _jobs(args)
    _check_outputs(args)
    trained = _load(args)
    records = []
    about = dict(model=args.model or str(args.checkpoint), weights=trained.weights, classes=list(trained.classes.names))
    if args.json != _STDOUT:
        print(printable(f'{about["model"]}: {len(about["classes"])} classes, weights: {trained.weights}'), flush=True)
    bar = tqdm(jobs, desc='Segmenting', unit='image', leave=False, disable=None if len(jobs) > 1 else True)
    for job in bar:
        try:
            records.append(_segment(job, trained, args))
        except ImageError as error:
            name = job.source.image if isinstance(job.source, Classified) else job.source
            records.append(dict(image=name, error=str(error)))
            with bar.external_write_mode(file=sys.stderr):
                print_error(error, printable(name))
        else:
            if args.json != _STDOUT:
                bar.write(_line(records[-1]))
    _write_json(about | dict(images=records), args.json)
    return int(any('error' in record for record in records))


def _write_json(content: dict[str, Any], name: str | None) -> None:
    text = json.dumps(content, indent=2)
    if name == _STDOUT:
        print(text)
    elif name is not None:
        with option_errors(f'--json {name}'), replacing(Path(name)) as scratch:
            scratch.write_text(text + '\n', encoding='utf-8')


def main(argv: Sequence[str] | None = None, prog: str = 'cluster-zoo segment predict') -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.
        prog: Name of the program in messages.

    Returns:
        The exit status: 0, or 1 if some images were not readable.

    Raises:
        UserError: The command cannot do what it is asked for.
    """
    with exit_on_sigterm():
        return _run(predict_parser(prog).resolve(argv))
