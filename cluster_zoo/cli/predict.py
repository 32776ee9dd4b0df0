"""``cluster-zoo predict``: classifies images."""

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
import torch.nn as nn

from ..errors import ImageError, OptionError, print_error, printable
from ..predict import Classified, classify, find_images, load_classifier
from ..weights.metadata import label_names, release
from .arguments import DEMO_MODEL, add_device, model_name, positive
from .parser import COMMANDS, Commands


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        'predict',
        help=COMMANDS['predict'].help,
        description='Classify images and print the most probable classes of each.\n\n'
        'Images are rotated according to their EXIF orientation, transparent pixels are blended with white, and then '
        "the model's evaluation transform is applied. Unreadable images are reported, and the others are classified.",
        epilog='examples:\n'
        '  cluster-zoo predict cat.jpg dog.png\n'
        '  cluster-zoo predict photos/ --model coc_small.in1k --top 1\n'
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
        metavar='NAME',
        help='any model of timm or of this package, model folder or hf-hub:ORG/NAME (default: '
        f'{DEMO_MODEL}, the bundled model for the ten classes of CIFAR-10)',
    )
    add('--top', type=positive, default=5, metavar='K', help='classes per image (default: %(default)s)')
    add('--batch-size', type=positive, default=32, metavar='N', help='images per batch (default: %(default)s)')
    add_device(parser)
    add('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=_predict)


def _describe(name: str | None, model: nn.Module) -> dict[str, Any]:
    """Returns what the model is, because a user may not know the default model or its classes."""
    data, several = release(name or DEMO_MODEL).data, getattr(model, 'multi_label', False)
    labels = label_names({**model.pretrained_cfg, 'num_classes': model.num_classes}) or []
    description = f'{name or DEMO_MODEL}: {model.num_classes} classes{f" of {data}" if data else ""}'
    description += ', an image can have several' if several else ''
    if not name:
        description += f' only ({", ".join(labels)}), because no --model is given'
    about = dict(model=name or DEMO_MODEL, num_classes=model.num_classes, trained_on=data)
    return about | dict(description=printable(description))


def _predict(args: argparse.Namespace) -> int:
    images = find_images(args.images)
    if all(isinstance(image, Classified) for image in images):
        for image in images:
            print_error(ImageError(image.error), printable(image.image))
        raise OptionError('There is no image to classify: name files or folders of images.')
    model = load_classifier(args.model or DEMO_MODEL, args.device)
    about = _describe(args.model, model)
    if not args.json:
        print(about['description'])
    results = []
    try:
        for result in classify(model, images, args.top, args.batch_size):
            results.append(result)
            if result.error:
                print_error(ImageError(result.error), printable(result.image))
            elif not args.json:
                print(printable(result.image))
                for ranked in result.classes:
                    label = printable(ranked.label or f'class {ranked.index}')
                    print(f'  {100 * ranked.probability:5.1f} %  {label}', flush=True)
    except torch.OutOfMemoryError as error:
        raise OptionError(f'Out of memory on {args.device}: use a smaller --batch-size, or --device cpu.') from error
    if args.json:
        records = [asdict(result) for result in results]
        for record in records:
            record.pop('classes' if record['error'] else 'error')
        print(json.dumps(about | {'images': records}, indent=2))
    return int(any(result.error for result in results))
