"""``cluster-zoo export``: writes a model to a file for other programs, and checks the file against the model."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import timm
import torch.nn as nn

from ..export import FORMATS, OPSET, TOLERANCE, Export, check_request, export_model
from ..weights import load_checkpoint
from ..weights.loading import load_model
from . import segmenters
from .arguments import model_name, positive
from .parser import COMMANDS, Commands


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        'export',
        help=COMMANDS['export'].help,
        description='Write a model to a file for other programs. The export check opens the file and compares its '
        f"logits with the model's, within {TOLERANCE:.0e}, for several batches and image sizes.\n\n"
        'Batches may have any size. TorchScript files accept images of any size. ONNX and pt2 files accept sizes that '
        'the model need not pad, multiples of 32 px for most variants, and refuse others. --img-size writes a file for '
        "one size, which may be any; it is the default if the model's input size is not one of the accepted sizes. "
        'The file contains mean, std, input size and class names. Segmenters are written as ONNX or pt2.',
        epilog='examples:\n'
        '  cluster-zoo export coc_tiny_plain.cifar10 --to onnx\n'
        '  cluster-zoo export coc_small.in1k --to onnx --img-size 225 300 --output small.onnx\n'
        '  cluster-zoo export dnc_resnet50 --num-classes 10 --checkpoint model_best.pth.tar --to torchscript\n'
        '  cluster-zoo export output/segmentation/NAME/model_best.pth.tar --output streets.onnx\n',
    )
    add = parser.add_argument
    add(
        'name',
        type=_name,
        metavar='NAME',
        help='model with pretrained weights, hf-hub:ORG/NAME or local-dir:FOLDER; any model with --checkpoint; '
        'published segmenter, or checkpoint of cluster-zoo segment train',
    )
    add('--to', choices=list(FORMATS), default='onnx', help='format (default: %(default)s)')
    add('--output', metavar='FILE', type=Path, help='file to write (default: the name with .onnx, .pt or .pt2)')
    add('--opset', type=positive, default=OPSET, metavar='N', help='ONNX opset, at least 18 (default: %(default)s)')
    add('--img-size', type=positive, nargs='+', metavar='PX', help='side, or height and width, of the only image size')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', metavar='FILE', help='weights in place of the pretrained ones')
    weights.add_argument('--untrained', action='store_true', help='random weights, to test the file')
    add('--num-classes', type=positive, metavar='N', help='number of classes, with --checkpoint or --untrained')
    add('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=lambda args: _export(parser, args))


def _name(name: str) -> str:
    """Type of an argument: a model, a published segmenter, or a checkpoint of a segmenter."""
    return name if segmenters.can_load(name) else model_name(name)


def _export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    pretrained = not (args.checkpoint or args.untrained)
    if args.num_classes and pretrained:
        parser.error('--num-classes needs --checkpoint or --untrained: pretrained weights have their own classes')
    if args.img_size and len(args.img_size) > 2:
        parser.error('--img-size takes a side, or a height and a width')
    size = tuple(args.img_size * 2)[:2] if args.img_size else None
    stem = args.name.rpartition(':')[2].rstrip('/').rpartition('/')[2]
    output = args.output or Path(stem.removesuffix('.pth.tar').removesuffix('.pth') + FORMATS[args.to])
    check_request(output, args.to, size, args.opset)
    model = _load(args, pretrained, size)
    if not args.json:  # before the export, which is slow
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f'{args.name}: {parameters / 1e6:.2f} M parameters{", random" * args.untrained}', flush=True)
    export = export_model(model, output, args.to, size, args.opset)
    if args.json:
        opset = args.opset if args.to == 'onnx' else None
        result = dict(name=args.name, format=args.to, opset=opset) | asdict(export) | dict(path=str(export.path))
        print(json.dumps(result, indent=2))
    else:
        _print(export, args)


def _load(args: argparse.Namespace, pretrained: bool, size: tuple[int, int] | None) -> nn.Module:
    """Returns the model with its weights."""
    name = segmenters.local(args.name)
    if segmenters.can_load(name):
        return segmenters.load(name, args.checkpoint, args.untrained, args.num_classes)
    options = dict(num_classes=args.num_classes, exportable=True, scriptable=args.to == 'torchscript')
    cfg = timm.models.get_pretrained_cfg(args.name, allow_unregistered=True) if ':' not in args.name else None
    if size and cfg and cfg.fixed_input_size:
        options['img_size'] = size
    model = load_model(args.name, pretrained=pretrained, **options)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint)
    return model


def _print(export: Export, args: argparse.Namespace) -> None:
    shapes = ', '.join(f'{batch} x {height} x {width}' for batch, height, width in export.checked)
    print(f'{export.path}: {export.path.stat().st_size / 1e6:.1f} MB' + f', opset {args.opset}' * (args.to == 'onnx'))
    if export.sizes.fixed and not args.img_size:
        print(f'images: {export.sizes} only, the input size of the model, in batches of any size')
        print('        (--img-size writes a file for another size)')
    else:
        print(f'images: {export.sizes}, in batches of any size')
    print(f'checked: images of {shapes} px')
    if export.raised:
        print(f'checked: a copy of the model with {export.raised} small layer scales raised, to test all branches')
    print(f'largest difference of a logit: {export.difference:.1e}, at most {TOLERANCE:.0e}')
    if export.ties:
        print(f'{export.ties} images differ by more: rounding errors change the center of a point')
