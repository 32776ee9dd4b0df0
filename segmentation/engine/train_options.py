"""Command-line options of ``segmentation/train.py``; `shared_options` has those that it shares with ``validate.py``.

Values come, in increasing priority, from the training of Semantic FPN with Context Cluster on ADE20K, the published
system of ``--segmenter``, the ``--config`` file and the command line.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster_zoo.errors import OptionError
from cluster_zoo.training.parser import ParseKwargs, Parser
from cluster_zoo.training.shared_options import add_device_options, add_logger_options, add_process_options
from cluster_zoo.training.train_options import add_centroid_learning_options

from ..models.published_systems import SegmenterConfig, segmenter_config
from .losses import LOSSES
from .optim import NORM_DECAYS, SCHEDULES
from .shared_options import add_data_options, add_model_options, add_test_options, config_options

# Fields of SegmenterConfig with the names of options
_SAME = (
    *('iterations', 'lr', 'momentum', 'weight_decay', 'schedule', 'power', 'min_lr', 'warmup', 'head_lr_scale'),
    *('norm_decay', 'guidance_weight', 'auxiliary_weight'),
)

# Lower bounds of numbers
_AT_LEAST = {
    1: (
        *('batch_size', 'grad_accum_steps', 'validation_batch_size', 'iterations', 'val_interval', 'log_interval'),
        *('checkpoint_hist', 'test_multiple'),
    ),
    0: (
        *('workers', 'warmup', 'warmup_ratio', 'weight_decay', 'guidance_weight', 'auxiliary_weight', 'overlays'),
        *('recovery_interval', 'focal_gamma'),
    ),
}
_ABOVE_0 = ('lr', 'head_lr_scale', 'clip_grad', 'dist_timeout')


_COMMON = (
    *('data', 'dataset', 'segmenter', 'head', 'backbone', 'classifier', 'pretrained_backbone', 'num_classes', 'crop'),
    *(
        'iterations',
        'batch_size',
        'lr',
        'opt',
        'loss',
        'amp',
        'device',
        'workers',
        'val_interval',
        'overlays',
        'experiment',
    ),
    *('resume', 'dry_run'),
)


class TrainParser(Parser):
    """A parser that takes its defaults from the published system of ``--segmenter``."""

    def resolve(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses a command line.

        Returns:
            One value per option; ``args.given`` is the list of options on the command line.

        Raises:
            OptionError: As in the base class; or there is no such published system, a value is out of range, or options
                exclude each other.
        """
        args = super().resolve(argv)
        if args.segmenter:
            self.set_defaults(**published_defaults(segmenter_config(args.segmenter)))
            args = super().resolve(argv)
        _check(args)
        return args


def published_defaults(config: SegmenterConfig) -> dict[str, Any]:
    """Returns the options that a published system was trained with. `create_segmenter` sets those of the model."""
    shared = config_options(config)
    del shared['num_classes']  # that of the dataset, which may differ
    return {
        **{name: getattr(config, name) for name in _SAME},
        **shared,
        # The published batch size is the sum over all processes.
        'batch_size': max(1, config.batch_size // int(os.environ.get('WORLD_SIZE', 1))),
        'crop': [config.crop],
        'scale': list(config.scale),
        'opt': dict(sgd='momentum').get(config.optimizer, config.optimizer),  # timm's sgd has Nesterov momentum
        'periods': list(config.periods) or None,
        'restart_weights': list(config.restart_weights) or None,
    }


def _bounds(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Yields for each bound whether a value violates it, and the message. None is always valid."""
    flags = {name: f'--{name.replace("_", "-")}' for name in vars(args)}
    for least, names in _AT_LEAST.items():
        for name in names:
            value = getattr(args, name)
            yield value is not None and not value >= least, f'{flags[name]} must be at least {least}'
    for name in _ABOVE_0:
        value = getattr(args, name)
        yield value is not None and not value > 0, f'{flags[name]} must be above 0'


def _loss_rules(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Yields whether the options of the loss are invalid, and the message."""
    for name, flag in (('focal', 'focal_gamma'), ('tversky', 'tversky_weights')):
        shown = f'--{flag.replace("_", "-")}'
        yield flag in args.given and name not in args.loss, f'{shown} needs --loss {name}'
    yield len({*args.loss}) < len(args.loss), f'--loss {" ".join(args.loss)}: name each loss once'
    both = {'ce', 'ohem'} <= {*args.loss}
    yield both, '--loss ce ohem: ohem is the cross-entropy of hard pixels; name one of them'
    valid = all(0 <= weight < math.inf for weight in args.tversky_weights) and sum(args.tversky_weights) > 0
    yield not valid, '--tversky-weights must be at least 0, and one above 0'
    if args.class_weights is not None:
        yield args.loss == ['lovasz'], '--class-weights: lovasz has no class weights; add another --loss or omit them'
        if args.class_weights != ['balanced']:
            try:
                fails = not all(0 < float(weight) < math.inf for weight in args.class_weights)
            except ValueError:
                fails = True
            yield fails, '--class-weights takes balanced, or a number above 0 for each class'


def _check(args: argparse.Namespace) -> None:
    ranges = (args.scale, args.ratio)
    rules = (
        (not args.data, 'no data given: name the folder of the dataset (DATA), or its .tar'),
        *_bounds(args),
        *_loss_rules(args),
        (args.layer_decay is not None and not 0 < args.layer_decay <= 1, '--layer-decay must be above 0, at most 1'),
        (not 0 <= args.model_ema_decay < 1, '--model-ema-decay must be at least 0, below 1'),
        (not 0 <= args.seed < 2**32, '--seed must be at least 0, below 2**32'),
        (args.std is not None and not min(args.std) > 0, '--std must be above 0'),
        (args.warmup >= args.iterations, f'--warmup {args.warmup} must be less than --iterations {args.iterations}'),
        (len(args.crop) > 2 or min(args.crop) < 1, '--crop takes a side, or height and width, in pixels'),
        (min(map(min, ranges)) <= 0, '--scale and --ratio must be above 0'),
        (not 0 < args.max_category <= 1, '--max-category must be above 0, at most 1'),
        (not 0 <= args.flip <= 1, '--flip must be 0 to 1'),
        (args.ratio[0] > args.ratio[1], '--ratio takes the lower bound first'),
        (args.resume == 'auto' and not args.experiment, '--resume auto needs --experiment, the name of the run folder'),
        (
            args.schedule != 'cosine_restarts' and bool({'periods', 'restart_weights'} & set(args.given)),
            '--periods and --restart-weights need --schedule cosine_restarts',
        ),
    )
    for broken, message in rules:
        if broken:
            raise OptionError(message)


def _add_start_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('weights').add_argument
    add(
        '--pretrained-backbone',
        nargs='?',
        const='timm',
        default='',
        metavar='FILE',
        help="start from a classifier's weights: timm's for this backbone, or a file",
    )
    add('--checkpoint', default='', metavar='FILE', help='start from the weights of a segmenter')
    add(
        '--sync-bn',
        action=argparse.BooleanOptionalAction,
        help='synchronize batch norm over processes, on GPUs (default: with --segmenter, as published)',
    )
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass to save memory')
    add_ema_options(add)


def add_ema_options(add: Callable[..., argparse.Action]) -> None:
    """Adds the options of averaged weights to a group by its ``add_argument``."""
    add('--model-ema', action='store_true', help='keep an exponential moving average of the weights and validate it')
    add('--model-ema-decay', type=float, default=0.9998, metavar='F', help='decay of the average (default: 0.9998)')
    add(
        '--model-ema-warmup',
        action=argparse.BooleanOptionalAction,
        help='warm up the decay from 0 (default: in runs that are short for the decay)',
    )


def _add_training_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--train-split', default='train', metavar='NAME', help='training split')
    add('--val-split', default='val', metavar='NAME', help='validation split')
    add('--no-check-data', action='store_true', help='do not read all images before the training')
    add('--crop', type=int, nargs='+', default=[512], metavar='N', help='training crop: side, or height and width')
    add('--scale', type=int, nargs=2, default=[2048, 512], metavar='N', help='long and short side of images')
    add('--ratio', type=float, nargs=2, default=[0.5, 2.0], metavar='F', help='range of random factors of --scale')
    add('--max-category', type=float, default=0.75, metavar='F', help='maximum fraction of a crop for one class')
    add('--flip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip (default: 0.5)')
    add('--no-distort', action='store_true', help='no photometric distortion')


def _add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('-b', '--batch-size', type=int, default=16, metavar='N', help='batch size per process (default: 16)')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='number of batches per iteration')
    add('--opt', default='adamw', metavar='NAME', help="one of timm's optimizers (default: adamw)")
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further optimizer arguments')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    add('--weight-decay', type=float, default=1e-4, metavar='F', help='weight decay (default: 1e-4)')
    add(
        '--norm-decay',
        choices=NORM_DECAYS,
        default='all',
        help='weight decay of norms, position embeddings and tokens: of all; of those in the heads only; of none, nor '
        'of biases (default: all)',
    )
    add('--layer-decay', type=float, metavar='F', help='layer-wise learning rate decay')
    add('--head-lr-scale', type=float, default=1.0, metavar='F', help='learning rate factor of the heads')
    add('--clip-grad', type=float, metavar='F', help='clip gradients (default: no clipping)')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='gradient clipping mode')
    _add_loss_options(parser)


def _add_loss_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('loss').add_argument
    add(
        '--loss',
        nargs='+',
        choices=LOSSES,
        default=['ce'],
        metavar='NAME',
        help='ce (cross-entropy), ohem, focal, lovasz or tversky, or the sum of several (default: ce)',
    )
    add(
        '--class-weights',
        nargs='+',
        metavar='F',
        help='balanced, for weights by the inverse frequency of the classes, or one number for each class; not for '
        'lovasz',
    )
    add('--focal-gamma', type=float, default=2.0, metavar='F', help='exponent of focal (default: 2)')
    add(
        '--tversky-weights',
        type=float,
        nargs=2,
        default=[0.5, 0.5],
        metavar='F',
        help='weights of false positives and false negatives of tversky (default: 0.5 0.5, the Dice loss)',
    )
    add('--guidance-weight', type=float, default=0.2, metavar='F', help='weight of the guidance loss of cond')
    add('--auxiliary-weight', type=float, default=0.4, metavar='F', help='weight of the loss of the --auxiliary head')


def _add_schedule_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('learning rate schedule').add_argument
    add('--iterations', type=int, default=80_000, metavar='N', help='updates to train (default: 80000)')
    add('--lr', type=float, default=1e-4, metavar='LR', help='learning rate (default: 1e-4)')
    add('--schedule', default='poly', choices=SCHEDULES, help='default: poly')
    add('--power', type=float, default=0.9, metavar='F', help='exponent of poly (default: 0.9)')
    add('--min-lr', type=float, default=0.0, metavar='LR', help='final learning rate, of all parameters')
    add('--periods', type=int, nargs='+', metavar='N', help='iterations of each period of cosine_restarts')
    add('--restart-weights', type=float, nargs='+', metavar='F', help='initial rate of each, as a fraction of --lr')
    add('--warmup', type=int, default=0, metavar='N', help='iterations of linear warm-up')
    add('--warmup-ratio', type=float, default=1e-6, metavar='F', help='initial rate of warm-up, as a fraction of --lr')


def add_run_options(
    parser: argparse.ArgumentParser, output: str, val_interval: int | None = None
) -> argparse._ArgumentGroup:
    """Adds the options of a run of iterations, and returns their group.

    Args:
        parser: The parser.
        output: Default parent of the run folder.
        val_interval: Default of ``--val-interval``; None for an epoch.
    """
    group = parser.add_argument_group('run')
    add = group.add_argument
    add('--seed', type=int, default=42, metavar='N', help='random seed (default: 42)')
    add('--log-interval', type=int, default=50, metavar='N', help='iterations between log lines')
    intervals = f'iterations between validations (default: {val_interval or "an epoch"})'
    add('--val-interval', type=int, default=val_interval, metavar='N', help=intervals)
    add('-vb', '--validation-batch-size', type=int, default=1, metavar='N', help='batch size of validation')
    add('--recovery-interval', type=int, default=0, metavar='N', help='iterations between recovery checkpoints')
    add('--checkpoint-hist', type=int, default=1, metavar='N', help='checkpoints to keep besides the last (1)')
    add(
        '--resume',
        default='',
        metavar='FILE',
        help='resume from a checkpoint of this script; auto: from the newest one of --experiment, if any',
    )
    add('--output', default='', metavar='DIR', help=f'parent of the run folder (default: {output})')
    add('--experiment', default='', metavar='NAME', help='name of the run folder, a new one (default: time and model)')
    add('--overwrite', action='store_true', help='replace an earlier run of the same --experiment')
    add('--dry-run', action='store_true', help='build the run and print its options and images, then stop')
    add_process_options(group)
    return group


def train_parser(prog: str = 'segmentation/train.py') -> TrainParser:
    """Returns the parser of ``segmentation/train.py``."""
    parser = TrainParser(
        prog=prog,
        usage='%(prog)s DATA [options]',
        description='Train a segmenter. The defaults of the training are those of Semantic FPN with Context Cluster on '
        'ADE20K.',
        common=_COMMON,
    )
    add = parser.add_argument
    add('-c', '--config', default='', metavar='FILE', help='YAML file of option values; flags win over it')
    _add_training_data_options(add_data_options(parser))
    add_model_options(parser)
    _add_start_options(parser)
    add_centroid_learning_options(parser.add_argument_group('centroids (--classifier dnc)'))
    _add_optimizer_options(parser)
    _add_schedule_options(parser)
    add_test_options(parser)
    add_device_options(parser)
    add = add_run_options(parser, './output/segmentation', 8000).add_argument
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    add('--overlays', type=int, default=0, metavar='N', help='images to draw predictions of in each validation')
    add_logger_options(parser)
    parser.set_defaults(dataset='folder')
    return parser
