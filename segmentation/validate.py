#!/usr/bin/env python3
"""Measure how well a model labels the pixels of a dataset, and how fast it is.

    python segmentation/validate.py DATA --checkpoint output/segmentation/NAME/model_best.pth.tar
    python segmentation/validate.py DATA --segmenter condnet_r50_ade20k --checkpoint FILE --scales 0.75 1 1.25 --flip
    torchrun --nproc-per-node=4 segmentation/validate.py DATA --checkpoint FILE --mode slide --crop 512 --stride 342

A checkpoint of segmentation/train.py knows its model, its dataset and how it is tested; options win over it. Read from
the bottom up: `main`, `measure`, and `prepare`, which builds what is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Started as a file, its own folder would be searched for modules, whose names are also others'.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from timm import utils

from cluster_zoo.errors import CheckpointError, DataError, OptionError
from cluster_zoo.training import build
from cluster_zoo.training.options import Parser, available_workers
from cluster_zoo.weights import load_checkpoint, read_checkpoint
from segmentation import Segmenter, create_segmenter, segmenter_config
from segmentation.data.datasets import SegmentationDataset, create_dataset
from segmentation.data.transforms import eval_transform
from segmentation.engine import inference, options
from segmentation.engine.evaluation import evaluate
from segmentation.engine.metrics import table
from segmentation.engine.overlays import OverlayWriter


def parser() -> Parser:
    """The script's options."""
    parser = Parser(
        prog='validate.py',
        usage='%(prog)s DATA [options]',
        description='Measure intersection over union, accuracy and speed of a segmentation model.',
    )
    group = options.add_data_options(parser)
    group.add_argument('--split', default='val', metavar='NAME', help='split to measure on (default: val)')
    group = options.add_model_options(parser)
    group.add_argument('--checkpoint', metavar='FILE', help="weights: of train.py, or a published system's")
    group.add_argument('--use-ema', action='store_true', help='take the averaged weights where the file has both')
    group = options.add_test_options(parser, prefix='')
    add = group.add_argument
    add('--scales', type=float, nargs='+', default=[1.0], metavar='F', help='average over these scales (default: 1)')
    add('--flip', action='store_true', help='average with the mirrored image')
    group = options.add_runtime_options(parser)
    group.add_argument('-b', '--batch-size', type=int, default=8, metavar='N', help='images in a batch (default: 8)')
    add = parser.add_argument_group('results').add_argument
    add('--results-file', metavar='FILE', help='write the results here, as JSON')
    add('--overlays', metavar='DIR', help='draw predictions over their photographs, into this folder')
    add('--num-overlays', type=int, default=4, metavar='N', help='so many of them (default: 4)')
    return parser


def saved_options(path: str) -> dict[str, Any]:
    """Options of the training run that a checkpoint comes from; empty for weights alone.

    Raises:
        CheckpointError: The file cannot be read.
    """
    checkpoint = read_checkpoint(path)
    saved = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else saved
    return saved if isinstance(saved, dict) else {}


def settle(args: argparse.Namespace) -> None:
    """Sets what was not given: from the checkpoint's run, unless another model is named, or the published system."""
    if not args.data:
        raise OptionError('no data given: name the folder of the dataset, or its .tar')
    if not args.checkpoint:
        raise OptionError('no --checkpoint given: figures of random weights mean nothing')
    saved = saved_options(args.checkpoint)
    if not (args.segmenter or args.head):
        options.fill(args, saved, (*options.MODEL_OPTIONS, *options.TEST_OPTIONS))
    options.fill(args, saved, options.DATA_OPTIONS)
    if args.segmenter:
        options.fill(args, options.config_options(segmenter_config(args.segmenter)), ('dataset', *options.TEST_OPTIONS))
    args.dataset = args.dataset or 'folder'


def set_up(args: argparse.Namespace) -> None:
    """Device and processes."""
    args.device = args.device or build.default_device()
    with build.option_errors(f'--device {args.device}'):
        torch.zeros(1, device=args.device)
    if args.device.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    utils.init_distributed_device(args)
    if 'workers' not in args.given:
        args.workers = available_workers(args.workers)
    if args.batch_size < 1 or args.workers < 0 or args.num_overlays < 0:
        raise OptionError('--batch-size must be at least 1, --workers and --num-overlays at least 0')


def build_dataset(args: argparse.Namespace) -> SegmentationDataset:
    """The split to measure on, its images as the model wants them."""
    normalisation = {name: getattr(args, name) for name in ('mean', 'std') if getattr(args, name) is not None}
    with build.option_errors('test images'):
        transform = eval_transform(args.test_scale, args.test_multiple, args.scales, **normalisation)
    return create_dataset(
        args.dataset,
        args.data,
        args.split,
        transform,
        num_classes=args.num_classes,
        remap=options.label_remap(args),
        workers=max(1, args.workers),
    )


def build_model(args: argparse.Namespace, dataset: SegmentationDataset) -> Segmenter:
    """The model with its weights, without the head that only training needs, on the device."""
    if args.num_classes is None and not args.segmenter:
        args.num_classes = len(dataset.classes)
    arguments = options.model_options(args)
    with build.option_errors('model'):
        model = create_segmenter(**arguments)
        load_checkpoint(model, args.checkpoint, args.use_ema)
    if model.num_classes != len(dataset.classes):
        raise OptionError(
            f'the model tells {model.num_classes} classes apart, {args.dataset} has {len(dataset.classes)}: give the '
            '--dataset that it was trained for'
        )
    model.auxiliary = None
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(device=args.device, memory_format=memory_format)


def build_overlays(args: argparse.Namespace, dataset: SegmentationDataset) -> OverlayWriter | None:
    """What draws predictions, if `--overlays` names a folder for them."""
    if not args.overlays:
        return None
    with build.option_errors(f'--overlays {args.overlays}'):
        return OverlayWriter(dataset, args.overlays, args.num_overlays)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Builds what the options say, as arguments of `evaluate`."""
    set_up(args)
    settle(args)
    protocol = options.test_protocol(args) | dict(flip=args.flip)
    with build.option_errors('test'):
        inference.check(protocol['mode'], protocol.get('crop'), protocol.get('stride'))
    dataset = build_dataset(args)
    return dict(
        model=build_model(args, dataset),
        dataset=dataset,
        device=args.device,
        autocast=build.build_precision(args)[0],
        protocol=protocol,
        batch_size=args.batch_size,
        workers=args.workers,
        rank=args.rank,
        world_size=args.world_size,
        overlays=build_overlays(args, dataset),
    )


def measure(prepared: dict[str, Any]) -> dict[str, Any]:
    """Goes over the split once.

    Returns:
        The figures of `evaluate`, ``parameters`` in millions, and on a GPU the most ``memory`` that was in use, in MiB.
    """
    device = torch.device(prepared['device'])
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    try:
        figures = evaluate(**prepared)
    except torch.OutOfMemoryError as error:
        raise OptionError(f'out of memory with batches of {prepared["batch_size"]}: lower --batch-size') from error
    figures['parameters'] = sum(parameter.numel() for parameter in prepared['model'].parameters()) / 1e6
    if device.type == 'cuda':
        figures['memory'] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures


def report(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Prints the figures, and writes them with the options to `--results-file`."""
    print(table(figures))
    memory = f', {figures["memory"]:.0f} MiB' if 'memory' in figures else ''
    print(
        f'{figures["images"]} images, {figures["images_per_second"]:.2f} images/s, '
        f'{figures["parameters"]:.2f} M parameters{memory}'
    )
    if args.results_file:
        process = ('given', 'distributed', 'world_size', 'rank', 'local_rank')
        given = {name: value for name, value in vars(args).items() if name not in process}
        with build.option_errors(f'--results-file {args.results_file}'):
            path = Path(args.results_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_rounded(figures) | dict(options=given), indent=4) + '\n')


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has no nan."""
    rounded = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            value = _rounded(value)
        elif isinstance(value, float):
            value = None if math.isnan(value) else round(value, 4)
        rounded[name] = value
    return rounded


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script.

    Args:
        argv: Arguments without the script's name; `sys.argv[1:]` when None.

    Returns:
        The exit status: 0, or 2 after a mistake of the user's.
    """
    prepared = None
    try:
        args = parser().resolve(argv)
        prepared = prepare(args)
        figures = measure(prepared)
        if utils.is_primary(args):
            report(args, figures)
    except (OptionError, DataError, CheckpointError) as error:
        # Before the first image, all processes make the same mistake.
        if prepared is not None or os.environ.get('LOCAL_RANK', '0') == '0':
            print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == '__main__':
    sys.exit(main())
