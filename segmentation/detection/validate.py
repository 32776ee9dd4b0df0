"""Measure the average precision of a detector: ``cluster-zoo detect validate``.

    cluster-zoo detect validate DATA --checkpoint output/detection/NAME/model_best.pth.tar
    cluster-zoo detect validate COCO --split val2017 --detector mask_rcnn_coc_small_25 --checkpoint FILE

It runs on one device. A checkpoint of the training script names its detector.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster_zoo.errors import OptionError, UserError, print_error
from cluster_zoo.training.runtime import (
    build_precision,
    check_output_file,
    option_errors,
    set_device_defaults,
    set_up_device,
)
from cluster_zoo.weights import extract_state_dict, read_checkpoint, training_metadata
from segmentation.detection.coco import create_dataset, eval_transform
from segmentation.detection.detectors import create_detector, has_masks, load_detector_weights
from segmentation.detection.evaluation import average_precision, evaluate, table
from segmentation.detection.options import MODEL_OPTIONS, model_arguments, validate_parser
from segmentation.detection.published_systems import CONFIGS

__all__ = ['main']


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates the detector on the split, see `evaluate`.

    Raises:
        UserError: Options, data or weights are missing or do not fit.
    """
    average_precision(masks=False)
    set_up_device(args)
    args.distributed, args.world_size, args.rank, args.local_rank = False, 1, 0, 0
    set_device_defaults(args)
    if not args.checkpoint:
        raise OptionError('no --checkpoint given: random weights cannot be evaluated')
    if args.results_file:
        check_output_file('--results-file', args.results_file)
    checkpoint = read_checkpoint(args.checkpoint)
    saved = training_metadata(checkpoint)['args']
    for name in MODEL_OPTIONS if not args.detector else ():
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name))
    if not args.detector:
        raise OptionError(
            f'--checkpoint {args.checkpoint} does not name its model: give --detector, and --backbone unless it is a '
            'published one'
        )
    dataset = create_dataset(args.data, args.split, eval_transform(), has_masks(args.detector), crowd=True)
    published = CONFIGS[args.detector].num_classes if args.detector in CONFIGS else len(dataset.classes)
    args.num_classes = args.num_classes or published
    if args.num_classes != len(dataset.classes):
        raise OptionError(f'the model has {args.num_classes} classes, {args.data} has {len(dataset.classes)}')
    with option_errors('model', TypeError):
        model = create_detector(**model_arguments(args))
    load_detector_weights(model, extract_state_dict(checkpoint, args.checkpoint, args.use_ema), args.checkpoint)
    autocast, _ = build_precision(args)
    return evaluate(model.to(args.device), dataset, args.device, autocast, args.batch_size, args.workers)


def _for_json(value: Any) -> Any:
    """Rounds for JSON, which has null instead of NaN."""
    if isinstance(value, dict):
        return {name: _for_json(one) for name, one in value.items()}
    return value if not isinstance(value, float) else None if math.isnan(value) else round(value, 4)


def main(argv: Sequence[str] | None = None, prog: str = 'cluster-zoo detect validate') -> int:
    """Runs the script and returns its exit status: 0, or 2 for an error of the user."""
    try:
        args = validate_parser(prog).resolve(argv)
        metrics = measure(args)
        print(table(metrics))
        print(f'{metrics["images"]} images, {metrics["images_per_second"]:.2f} images/s')
        if args.results_file:
            with option_errors(f'--results-file {args.results_file}'):
                path = Path(args.results_file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(_for_json(metrics), indent=4) + '\n')
    except UserError as error:
        print_error(error)
        return error.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
