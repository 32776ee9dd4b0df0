"""``cluster-zoo detect predict``: draws the objects in images."""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from segmentation.detection.coco import coco_backend
from segmentation.detection.options import add_model_options, check_ranges, model_arguments
from segmentation.detection.prediction import Detected, draw_objects
from segmentation.detection.trained import TrainedDetector, load_trained

from ..errors import OptionError
from ..images import read_image
from ..training.parser import Parser
from ..training.runtime import set_up_device
from . import exit_on_sigterm
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


def predict_parser(prog: str = 'cluster-zoo detect predict') -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        prog=prog,
        usage='%(prog)s IMAGE ... --checkpoint FILE [options]',
        description='Draw the boxes and masks of the objects in each image, in a PNG. Images are rotated according to '
        'their EXIF orientation, and transparent pixels are blended with white. Unreadable images are reported, and '
        'the others are processed. Existing files are replaced. Exit status: 0 all images were processed, 1 some were '
        'not, 2 an error.',
    )
    add_image_arguments(parser)
    add = add_model_options(parser).add_argument
    add('--checkpoint', metavar='FILE', help='a checkpoint of detect train, which knows model and classes')
    add('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    add('--device', help='device (default: the accelerator of this machine, else cpu)')
    parser.epilog = "The authors' checkpoints need --detector NAME. The last one of several --min-size is used."
    add = parser.add_argument_group('output').add_argument
    add('-o', '--output', default='objects', metavar='DIR', help='folder of the pictures (default: objects)')
    add('--threshold', type=float, default=0.5, metavar='P', help='least score of an object, 0 to 1 (default: 0.5)')
    add_json_option(add, 'boxes, scores and masks (run-length encodings of COCO)')
    return parser


def _load(args: argparse.Namespace) -> TrainedDetector:
    if not args.checkpoint:
        raise OptionError('no --checkpoint given: name a file of detect train or of the authors')
    check_ranges(args)
    if not 0 <= args.threshold <= 1:
        raise OptionError('--threshold must be from 0 to 1')
    set_up_device(args)
    trained = load_trained(args.checkpoint, use_ema=args.use_ema, device=args.device, **model_arguments(args))
    if trained.masks and args.json:
        coco_backend()  # before the work
    return trained


def _record(found: Detected, classes: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
    """Returns an object as JSON, in an image of height and width ``size``."""
    record = dict(index=found.label, label=classes[found.label - 1], score=found.score, box=list(found.box))
    if found.mask is None:
        return record
    encoded = coco_backend()[1].encode(np.asfortranarray(found.full_mask(size).numpy().view(np.uint8)))
    segmentation = dict(size=list(size), counts=encoded['counts'].decode('ascii'))
    return record | dict(area=int(found.mask.sum()), segmentation=segmentation)


def _detect(job: Job, trained: TrainedDetector, args: argparse.Namespace) -> dict[str, Any]:
    """Draws the objects of an image, and returns its record.

    Raises:
        ImageError: The image is not readable.
        OptionError: The memory is not sufficient, or an output cannot be written.
    """
    image = read_image(job.source)
    with memory_errors(args.device, 'use a smaller --min-size and --max-size'):
        objects = trained.predict(image, args.threshold)
    picture = draw_objects(image, objects, trained.classes)
    record = dict(image=job.source, picture=save_png(picture, args.output, job.name, '--output'))
    found = Counter(trained.classes[one.label - 1] for one in objects)
    record |= dict(width=image.width, height=image.height, counts=dict(found.most_common()))
    if args.json:
        size = image.height, image.width
        record['objects'] = [_record(one, trained.classes, size) for one in objects]
    return record


def _line(record: dict[str, Any]) -> str:
    """Returns a record as a line of text."""
    shown = ', '.join(f'{count} {name}' for name, count in record['counts'].items())
    return f'{record["image"]}: {record["picture"]}: {shown or "no objects"}'


def main(argv: Sequence[str] | None = None, prog: str = 'cluster-zoo detect predict') -> int:
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
        args = predict_parser(prog).resolve(argv)
        outputs = {'--output': args.output}
        jobs = find_jobs(args.images, outputs)
        check_outputs(outputs, args.json)
        trained = _load(args)
        about = dict(model=str(args.checkpoint), weights=trained.weights, classes=list(trained.classes))
        return process_images(jobs, lambda job: _detect(job, trained, args), _line, about, args.json)
