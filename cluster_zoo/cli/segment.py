"""``cluster-zoo segment predict``: writes the masks of images."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from segmentation.data.classes import Classes
from segmentation.engine.overlays import draw_overlay
from segmentation.engine.shared_options import add_average_options, add_test_options
from segmentation.engine.trained import TrainedSegmenter, load_trained

from ..errors import OptionError, printable
from ..images import STANDARD_INPUT, read_image
from ..training.parser import Parser
from ..training.runtime import set_up_device
from . import exit_on_sigterm
from .arguments import positive
from .image_jobs import (
    Job,
    add_image_arguments,
    add_json_option,
    check_outputs,
    find_jobs,
    memory_errors,
    process_images,
    save_png,
)

_LISTED = 5  # classes of an image that are printed


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
    add_image_arguments(parser)
    add = parser.add_argument_group('model').add_argument
    add('--checkpoint', metavar='FILE', help='a checkpoint of segment train, which knows classes and test protocol')
    help = "weights by name, such as semantic_fpn_coc_tiny.camvid; with --checkpoint, the system of the authors' file"
    add('--model', metavar='NAME', help=help)
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
    add_json_option(add, 'the areas of the classes')
    return parser


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


def _segment(job: Job, trained: TrainedSegmenter, args: argparse.Namespace) -> dict[str, Any]:
    """Writes the outputs of an image, and returns its record.

    Raises:
        ImageError: The image is not readable.
        OptionError: The memory is not sufficient, or an output cannot be written.
    """
    image = read_image(job.source)
    with memory_errors(args.device, 'use a smaller --window or --batch-size'):
        mask = trained.predict(image, scales=args.scales, flip=args.flip, chunk=args.batch_size)
    found, classes = areas(mask, trained.classes), trained.classes
    mask = mask.to(torch.uint8)
    record = dict(image=job.source, mask=save_png(palette_image(mask, classes), args.output, job.name, '--output'))
    if args.overlays:
        title = printable(job.name.stem if job.source == STANDARD_INPUT else Path(job.source).name)
        overlay = draw_overlay(pil_to_tensor(image), mask, classes.names, classes.colours, name=title)
        record['overlay'] = save_png(overlay, args.overlays, job.name, '--overlays')
    return record | dict(width=image.width, height=image.height, areas=found)


def _line(record: dict[str, Any]) -> str:
    """Returns a record as a line of text."""
    shown = [f'{area["label"]} {100 * area["fraction"]:.1f} %' for area in record['areas']]
    more = f', {len(shown) - _LISTED} more' if len(shown) > _LISTED else ''
    return f'{record["image"]}: {record["mask"]}: {", ".join(shown[:_LISTED])}{more}'


def _run(args: argparse.Namespace) -> int:
    outputs = {'--output': args.output, '--overlays': args.overlays}
    jobs = find_jobs(args.images, outputs)
    if args.overlays and Path(args.overlays).resolve() == Path(args.output).resolve():
        raise OptionError(f'--overlays {args.overlays} is the folder of the masks: choose another one')
    check_outputs(outputs, args.json)
    trained = _load(args)
    about = dict(model=args.model or str(args.checkpoint), weights=trained.weights, classes=list(trained.classes.names))
    return process_images(jobs, lambda job: _segment(job, trained, args), _line, about, args.json)


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
