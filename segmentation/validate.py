#!/usr/bin/env python3
"""Measure accuracy and speed of a segmenter: ``segmentation/validate.py`` and ``cluster-zoo segment validate``.

    python segmentation/validate.py DATA --checkpoint output/segmentation/NAME/model_best.pth.tar
    python segmentation/validate.py DATA --segmenter condnet_r50_ade20k --checkpoint FILE --scales 0.75 1 1.25 --flip
    torchrun --nproc-per-node=4 segmentation/validate.py DATA --checkpoint FILE --mode slide --crop 512 --stride 342

A checkpoint of ``segmentation/train.py`` contains the options of its model, dataset and test; flags have priority. Read
this file from the bottom up: `main`, `measure`, and `prepare`, which builds the model and the dataset.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Python puts the folder of a script on the import path; its modules must not hide others.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == '__main__':  # Ctrl-C during the imports ends the script without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
from timm import utils

from cluster_zoo.errors import OptionError, UserError, print_error
from cluster_zoo.training.engine import run_options
from cluster_zoo.training.parser import Parser
from cluster_zoo.training.runtime import (
    build_precision,
    check_output_file,
    option_errors,
    set_device_defaults,
    set_up_device,
)
from cluster_zoo.training.shared_options import add_device_options
from cluster_zoo.weights import extract_state_dict, load_weights, read_checkpoint, training_metadata, weights_in_use
from segmentation import Segmenter, create_segmenter
from segmentation.data.datasets import SegmentationDataset, create_dataset
from segmentation.engine import shared_options
from segmentation.engine.build import build_eval_transform
from segmentation.engine.confusion import check_matplotlib, draw_confusion, write_tables
from segmentation.engine.evaluation import evaluate
from segmentation.engine.metrics import confusion_matrix_class, table
from segmentation.engine.overlays import OverlayWriter, check_output_folder
from segmentation.models.segmenter import check_is_segmenter

__all__ = ['main']


_COMMON = (
    *('data', 'dataset', 'split', 'segmenter', 'head', 'backbone', 'checkpoint', 'use_ema', 'test_mode', 'test_crop'),
    *('scales', 'flip', 'batch_size', 'amp', 'device', 'workers', 'results_file', 'results_dir', 'overlays'),
)


def validate_parser(prog: str = 'segmentation/validate.py') -> Parser:
    """Returns the parser of this script."""
    parser = Parser(
        prog=prog,
        usage='%(prog)s DATA [options]',
        description='Measure intersection over union, accuracy and speed of a segmentation model.',
        common=_COMMON,
    )
    group = shared_options.add_data_options(parser)
    group.add_argument('--split', default='val', metavar='NAME', help='split to evaluate (default: val)')
    group = shared_options.add_model_options(parser)
    group.add_argument('--checkpoint', metavar='FILE', help='weights: of train.py, or the released ones of a system')
    group.add_argument('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    group = shared_options.add_test_options(parser, prefix='')
    shared_options.add_average_options(group)
    group = add_device_options(parser)
    group.add_argument('-b', '--batch-size', type=int, default=8, metavar='N', help='batch size (default: 8)')
    add = parser.add_argument_group('results').add_argument
    add('--results-file', metavar='FILE', help='write the results to this JSON file')
    add('--results-dir', metavar='DIR', help='write the confusion matrix and a row for each class into this folder')
    add('--overlays', metavar='DIR', help='draw predictions over their images, into this folder')
    add('--num-overlays', type=int, default=4, metavar='N', help='number of images to draw (default: 4)')
    return parser


def complete_options(args: argparse.Namespace) -> Any:
    """Sets options that are not given: from the checkpoint, unless another model is named, or the published system.

    Returns:
        The content of the checkpoint.

    Raises:
        CheckpointError: The file cannot be read.
        OptionError: Data or weights are missing, or the checkpoint is not of a segmenter.
    """
    if not args.data:
        raise OptionError('no data given: name the folder of the dataset, or its .tar')
    if not args.checkpoint:
        raise OptionError('no --checkpoint given: random weights cannot be evaluated')
    checkpoint = read_checkpoint(args.checkpoint)
    check_is_segmenter(extract_state_dict(checkpoint, args.checkpoint, args.use_ema), args.checkpoint)
    saved = training_metadata(checkpoint)['args']
    missing = (
        f'--checkpoint {args.checkpoint} does not name its model: give --segmenter NAME, or --head and --backbone, '
        'with --classifier, --channels and so on as in the training; and --dataset, unless it is a folder'
    )
    shared_options.complete(args, saved, missing)
    return checkpoint


def build_model(args: argparse.Namespace, dataset: SegmentationDataset, checkpoint: Any) -> Segmenter:
    """Builds the model with its weights on the device, without the auxiliary head."""
    if args.num_classes is None and not args.segmenter:
        args.num_classes = len(dataset.classes)
    arguments = shared_options.model_options(args)
    with option_errors('model', TypeError):
        model = create_segmenter(**arguments)
        load_weights(model, extract_state_dict(checkpoint, args.checkpoint, args.use_ema))
    if utils.is_primary(args):
        print(f'{args.checkpoint}: weights: {weights_in_use(checkpoint, args.use_ema)}')
    if model.num_classes != len(dataset.classes):
        raise OptionError(
            f'the model has {model.num_classes} classes, {args.dataset} has {len(dataset.classes)}: give the --dataset '
            'that the model was trained for'
        )
    model.auxiliary = None
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(device=args.device, memory_format=memory_format)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the arguments of `evaluate` from the options."""
    confusion_matrix_class()
    set_up_device(args)
    utils.init_distributed_device(args)
    set_device_defaults(args)
    if args.batch_size < 1 or args.workers < 0 or args.num_overlays < 0:
        raise OptionError('--batch-size must be at least 1, --workers and --num-overlays at least 0')
    if not utils.is_primary(args):
        logging.getLogger('segmentation').setLevel(logging.ERROR)
    if min(args.scales) <= 0:
        raise OptionError('--scales must be above 0')
    if args.std is not None and min(args.std) <= 0:
        raise OptionError('--std must be above 0')
    checkpoint = complete_options(args)
    protocol = shared_options.test_protocol(args, prefix='') | dict(flip=args.flip)
    if args.results_file and utils.is_primary(args):
        check_output_file('--results-file', args.results_file)
    if args.results_dir:
        check_matplotlib()
        with option_errors(f'--results-dir {args.results_dir}'):
            check_output_folder(args.results_dir)
    if args.overlays:
        with option_errors(f'--overlays {args.overlays}'):
            check_output_folder(args.overlays)
    dataset = create_dataset(
        args.dataset,
        args.data,
        args.split,
        build_eval_transform(args, args.scales),
        num_classes=args.num_classes,
        remap=shared_options.label_remap(args),
        workers=max(1, args.workers),
    )
    model = build_model(args, dataset, checkpoint)
    overlays = OverlayWriter(dataset, args.overlays, args.num_overlays) if args.overlays else None
    return dict(
        model=model,
        dataset=dataset,
        device=args.device,
        autocast=build_precision(args)[0],
        protocol=protocol,
        batch_size=args.batch_size,
        workers=args.workers,
        rank=args.rank,
        world_size=args.world_size,
        overlays=overlays,
    )


def measure(prepared: dict[str, Any]) -> dict[str, Any]:
    """Evaluates the model on the split.

    Returns:
        The metrics of `evaluate`, ``parameters`` in millions, and on a GPU the peak ``memory`` in MiB.
    """
    device = torch.device(prepared['device'])
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    try:
        metrics = evaluate(**prepared)
    except torch.OutOfMemoryError as error:
        raise OptionError(f'out of memory with batches of {prepared["batch_size"]}: lower --batch-size') from error
    metrics['parameters'] = sum(parameter.numel() for parameter in prepared['model'].parameters()) / 1e6
    if device.type == 'cuda':
        metrics['memory'] = torch.cuda.max_memory_allocated(device) / 2**20
    return metrics


def report(args: argparse.Namespace, metrics: dict[str, Any]) -> None:
    """Prints the metrics and writes them: with the options to ``--results-file``, by class to ``--results-dir``."""
    print(table(metrics))
    memory = f', {metrics["memory"]:.0f} MiB' if 'memory' in metrics else ''
    print(
        f'{metrics["images"]} images, {metrics["images_per_second"]:.2f} images/s, '
        f'{metrics["parameters"]:.2f} M parameters{memory}'
    )
    if args.results_dir:
        with option_errors(f'--results-dir {args.results_dir}'):
            write_tables(args.results_dir, metrics)
            draw_confusion(Path(args.results_dir) / 'confusion.png', metrics['confusion'], list(metrics['IoU']))
    metrics = {name: value for name, value in metrics.items() if name != 'confusion'}
    if args.results_file:
        with option_errors(f'--results-file {args.results_file}'):
            path = Path(args.results_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_rounded(metrics) | dict(options=run_options(args)), indent=4) + '\n')


def _rounded(metrics: dict[str, Any]) -> dict[str, Any]:
    """Rounds for JSON, which has null instead of NaN."""
    rounded = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            value = _rounded(value)
        elif isinstance(value, float):
            value = None if math.isnan(value) else round(value, 4)
        rounded[name] = value
    return rounded


def main(argv: Sequence[str] | None = None, prog: str = 'segmentation/validate.py') -> int:
    """Runs the script.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.
        prog: Name of the program in messages.

    Returns:
        The exit status: 0, or 2 for an error of the user.
    """
    prepared = None
    try:
        args = validate_parser(prog).resolve(argv)
        prepared = prepare(args)
        metrics = measure(prepared)
        if utils.is_primary(args):
            report(args, metrics)
    except UserError as error:
        # Before the first image, all processes raise the same error.
        if prepared is not None or os.environ.get('LOCAL_RANK', '0') == '0':
            print_error(error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
