"""Measure the average precision of a detector: ``cluster-zoo detect validate``.

    cluster-zoo detect validate DATA --checkpoint output/detection/NAME/model_best.pth.tar
    cluster-zoo detect validate COCO --split val2017 --detector mask_rcnn_coc_small_25 --checkpoint FILE
    torchrun --nproc-per-node=8 -m cluster_zoo detect validate COCO --split val2017 --checkpoint FILE

A checkpoint of the training script names its detector.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from timm import utils

from cluster_zoo.errors import OptionError, UserError, print_error
from cluster_zoo.training.runtime import (
    build_precision,
    check_output_file,
    option_errors,
    set_device_defaults,
    set_up_device,
)
from segmentation.detection.coco import create_dataset, eval_transform
from segmentation.detection.evaluation import average_precision, evaluate, table
from segmentation.detection.options import model_arguments, validate_parser
from segmentation.detection.trained import load_trained

__all__ = ['main']


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the arguments of `evaluate` from the options.

    Raises:
        UserError: Options, data or weights are missing or do not fit.
    """
    average_precision(masks=False)
    set_up_device(args)
    utils.init_distributed_device(args)
    set_device_defaults(args)
    if not utils.is_primary(args):
        logging.getLogger('segmentation').setLevel(logging.ERROR)
    if not args.checkpoint:
        raise OptionError('no --checkpoint given: random weights cannot be evaluated')
    if args.results_file and utils.is_primary(args):
        check_output_file('--results-file', args.results_file)
    trained = load_trained(args.checkpoint, use_ema=args.use_ema, device=args.device, **model_arguments(args))
    dataset = create_dataset(args.data, args.split, eval_transform(), trained.masks, crowd=True)
    if len(trained.classes) != len(dataset.classes):
        raise OptionError(f'the model has {len(trained.classes)} classes, {args.data} has {len(dataset.classes)}')
    if len(dataset) < args.world_size:
        raise OptionError(f'{len(dataset)} images are too few for {args.world_size} processes')
    if utils.is_primary(args):
        print(f'{args.checkpoint}: weights: {trained.weights}')
    return dict(
        model=trained.model,
        dataset=dataset,
        device=args.device,
        autocast=build_precision(args)[0],
        batch_size=args.batch_size,
        workers=args.workers,
        rank=args.rank,
        world_size=args.world_size,
    )


def report(args: argparse.Namespace, metrics: dict[str, Any]) -> None:
    """Prints the metrics and writes them to ``--results-file``."""
    print(table(metrics))
    print(f'{metrics["images"]} images, {metrics["images_per_second"]:.2f} images/s')
    if args.results_file:
        with option_errors(f'--results-file {args.results_file}'):
            path = Path(args.results_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_for_json(metrics), indent=4) + '\n')


def _for_json(value: Any) -> Any:
    """Rounds for JSON, which has null instead of NaN."""
    if isinstance(value, dict):
        return {name: _for_json(one) for name, one in value.items()}
    return value if not isinstance(value, float) else None if math.isnan(value) else round(value, 4)


def main(argv: Sequence[str] | None = None, prog: str = 'cluster-zoo detect validate') -> int:
    """Runs the script and returns its exit status: 0, or 2 for an error of the user."""
    prepared = None
    try:
        args = validate_parser(prog).resolve(argv)
        prepared = prepare(args)
        metrics = evaluate(**prepared)
        if utils.is_primary(args):
            report(args, metrics)
    except UserError as error:
        # Before the first image, all processes raise the same error.
        if prepared is not None or os.environ.get('LOCAL_RANK', '0') == '0':
            print_error(error)
        return error.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
