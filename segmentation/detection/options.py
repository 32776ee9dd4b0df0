"""Options of the training and validation scripts of detectors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cluster_zoo.errors import OptionError
from cluster_zoo.training.parser import ParseKwargs, Parser
from cluster_zoo.training.shared_options import add_device_options, add_logger_options
from segmentation.engine.train_options import add_ema_options, add_run_options

__all__ = ['MODEL_OPTIONS', 'add_model_options', 'check_ranges', 'model_arguments', 'train_parser', 'validate_parser']

MODEL_OPTIONS = ('detector', 'backbone', 'num_classes', 'min_size', 'max_size', 'model_kwargs')
_AT_LEAST = {
    1: ('batch_size', 'validation_batch_size', 'grad_accum_steps', 'epochs', 'iterations', 'val_interval'),
    0: ('workers', 'warmup', 'weight_decay', 'recovery_interval'),
}
_AT_LEAST[1] += ('log_interval', 'checkpoint_hist', 'min_size', 'max_size', 'crop', 'num_classes')
_ABOVE_0 = ('lr', 'clip_grad', 'dist_timeout')
_COMMON = (
    *('data', 'detector', 'backbone', 'pretrained_backbone', 'checkpoint', 'min_size', 'max_size', 'epochs'),
    *('batch_size', 'lr', 'amp', 'device', 'workers', 'experiment', 'resume', 'dry_run', 'split', 'results_file'),
)


class _Parser(Parser):
    """A parser that checks ranges."""

    def resolve(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        args = super().resolve(argv)
        if not args.data:
            raise OptionError('no data given: name the folder of a dataset in the format of COCO (DATA), or its .tar')
        check_ranges(args)
        return args


def check_ranges(args: argparse.Namespace) -> None:
    """Raises `OptionError` for a number that is too small."""
    values = {name: value for name, value in vars(args).items() if isinstance(value, (int, float))}
    if args.min_size:
        values['min_size'] = min(args.min_size)
    for least, names in _AT_LEAST.items():
        for name in names:
            if not values.get(name, least) >= least:
                raise OptionError(f'--{name.replace("_", "-")} must be at least {least}')
    for name in _ABOVE_0:
        if not values.get(name, 1) > 0:
            raise OptionError(f'--{name.replace("_", "-")} must be above 0')


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options that name a detector, see `model_arguments`, and returns their group."""
    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--detector', metavar='NAME', help='mask_rcnn, faster_rcnn, retinanet or fcos, or a published detector')
    add('--backbone', metavar='NAME', help='a registered model, such as coc_tiny or resnet18')
    add('--num-classes', type=int, metavar='K', help="number of classes without background (default: the dataset's)")
    add(
        '--min-size',
        type=int,
        nargs='+',
        metavar='N',
        help='short side that images are resized to, pixels (default: 800); training draws one of several for each '
        'image, validation has the last',
    )
    add('--max-size', type=int, metavar='N', help='limit of the long side, pixels (default: 1333)')
    add('--model-kwargs', nargs='*', action=ParseKwargs, metavar='K=V', help='arguments of detector and backbone')
    return group


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `create_detector`."""
    values = {name: getattr(args, name) for name in MODEL_OPTIONS if getattr(args, name) is not None}
    return {**values.pop('model_kwargs', {}), **values}


def validate_parser(prog: str) -> Parser:
    """Returns the parser of ``segmentation/detection/validate.py``."""
    parser = _Parser(
        prog=prog,
        usage='%(prog)s DATA [options]',
        description='Measure the average precision of a detector on a dataset in the format of COCO.',
        common=_COMMON,
    )
    add = parser.add_argument_group('dataset').add_argument
    add('data', nargs='?', metavar='DATA', help='folder of the dataset, or a .tar of it')
    add('--split', default='val', metavar='NAME', help='split to evaluate (default: val)')
    add = add_model_options(parser).add_argument
    add('--checkpoint', metavar='FILE', help="weights: of this package's training, or the authors'")
    add('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    group = add_device_options(parser)
    group.add_argument('-b', '--batch-size', type=int, default=1, metavar='N', help='batch size (default: 1)')
    group.add_argument('--results-file', metavar='FILE', help='write the results to this JSON file')
    return parser


def train_parser(prog: str) -> Parser:
    """Returns the parser of ``segmentation/detection/train.py``."""
    parser = _Parser(
        prog=prog,
        usage='%(prog)s DATA [options]',
        description='Train a detector on a dataset in the format of COCO. The defaults are those of Mask R-CNN with '
        'Context Cluster and FEC, whose learning rate is for 32 images per iteration.',
        common=_COMMON,
    )
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file of option values; flags win')
    add = parser.add_argument_group('dataset').add_argument
    add('data', nargs='?', metavar='DATA', help='folder of the dataset, or a .tar of it')
    add('--train-split', default='train', metavar='NAME', help='training split (default: train)')
    add('--val-split', default='val', metavar='NAME', help='validation split (default: val)')
    add('--no-check-data', action='store_true', help='do not read all images before the training')
    add('--crop', type=int, metavar='N', help='train on random crops of N x N pixels of the resized images')
    add('--flip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip (default: 0.5)')
    add = add_model_options(parser).add_argument
    add(
        '--pretrained-backbone',
        nargs='?',
        const='timm',
        default='',
        metavar='FILE',
        help="start from a classifier's weights: timm's for this backbone, or a file",
    )
    add('--checkpoint', metavar='FILE', help='start from the weights of a detector, of any number of classes')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass to save memory')
    _add_optimizer_options(parser)
    add_device_options(parser)
    add_run_options(parser, './output/detection')
    add_logger_options(parser)
    return parser


def _add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('--epochs', type=int, default=12, metavar='N', help='epochs to train (default: 12)')
    add('--iterations', type=int, metavar='N', help='updates to train, in place of --epochs')
    add('-b', '--batch-size', type=int, default=4, metavar='N', help='batch size per process (default: 4)')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='number of batches per iteration')
    add('--opt', default='adamw', metavar='NAME', help="one of timm's optimizers (default: adamw)")
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further optimizer arguments')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    add('--lr', type=float, default=2e-4, metavar='LR', help='learning rate (default: 2e-4)')
    add('--steps', type=float, nargs='+', metavar='F', help='parts of the run after which the rate is divided by 10')
    add('--warmup', type=int, metavar='N', help='iterations of linear warm-up (default: 500, at most a tenth)')
    add('--weight-decay', type=float, default=1e-4, metavar='F', help='weight decay (default: 1e-4)')
    add('--clip-grad', type=float, metavar='F', help='clip gradients (default: no clipping)')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='gradient clipping mode')
    add_ema_options(add)
