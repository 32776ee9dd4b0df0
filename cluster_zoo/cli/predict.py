"""``cluster-zoo predict``: what a model takes images for."""

import argparse
import json
import sys
from dataclasses import asdict

import torch

from ..errors import OptionError
from ..predict import Classified, classify, find_images, load_classifier
from .parser import DEMO_MODEL, Commands, add_device, model_name, positive
from .text import printable


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        'predict',
        help='classify images: files, folders, standard input',
        description='Classify images and print the most probable classes of each.\n\n'
        'Images are turned upright as the camera noted, laid over white where transparent, and then resized and '
        "cropped as in the model's validation. One that can not be read is reported, and the others are classified.",
        epilog='examples:\n'
        '  cluster-zoo predict cat.jpg dog.png\n'
        '  cluster-zoo predict photographs/ --model coc_small.in1k --top 1\n'
        '  cluster-zoo predict cat.jpg --model hf-hub:timm/resnet18.a1_in1k --json\n'
        '  cat cat.jpg | cluster-zoo predict - --model local-dir:my_model\n\n'
        'exit status: 0 all images were classified, 1 some were not, 2 an error\n',
    )
    add = parser.add_argument
    add(
        'images',
        nargs='+',
        metavar='IMAGE',
        help='a file, a folder (all images in and below it), or - for standard input',
    )
    add(
        '--model',
        type=model_name,
        default=DEMO_MODEL,
        metavar='NAME',
        help='any model of timm or of this package, hf-hub:ORG/NAME or local-dir:FOLDER (default: %(default)s, which '
        "is bundled and knows CIFAR-10's ten classes)",
    )
    add('--top', type=positive, default=5, metavar='K', help='classes to print of each image (default: %(default)s)')
    add('--batch-size', type=positive, default=32, metavar='N', help='images at once (default: %(default)s)')
    add_device(parser)
    add('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> int:
    images = find_images(args.images)
    if all(isinstance(image, Classified) for image in images):
        for image in images:
            _report(image)
        raise OptionError('no image to classify')
    model = load_classifier(args.model, args.device)
    shown, failed = [], 0
    try:
        for result in classify(model, images, args.top, args.batch_size):
            failed += result.error is not None
            if result.error:
                _report(result)
            if args.json:
                shown.append(_record(result))
            elif not result.error:
                _print(result)
    except torch.OutOfMemoryError as error:
        raise OptionError(f'out of memory on {args.device}: try a smaller --batch-size, or --device cpu') from error
    if args.json:
        print(json.dumps({'model': args.model, 'images': shown}, indent=2))
    return 1 if failed else 0


def _report(result: Classified) -> None:
    print(f'error: {printable(result.image)}: {printable(result.error)}', file=sys.stderr)


def _record(result: Classified) -> dict:
    record = asdict(result)
    record.pop('classes' if result.error else 'error')
    return record


def _print(result: Classified) -> None:
    print(printable(result.image))
    for ranked in result.classes:
        print(f'  {100 * ranked.probability:5.1f} %  {printable(ranked.label or f"class {ranked.index}")}', flush=True)
