"""Command-line options of ``segmentation/train.py``; the ones shared with ``validate.py`` are in ``options``.

Values come, weakest first, from how Semantic FPN with Context Cluster was trained on ADE20K, the published system that
``--segmenter`` names, the ``--config`` file and the flags on the command line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

from cluster_zoo.errors import OptionError
from cluster_zoo.training.options import ParseKwargs, Parser
from cluster_zoo.training.train_options import add_centroid_learning_options

from ..models.configs import SegmenterConfig, segmenter_config
from .optim import SCHEDULES
from .options import add_data_options, add_model_options, add_runtime_options, add_test_options, config_options

# Whose names are those of the option
_SAME = (
    *('iterations', 'lr', 'momentum', 'weight_decay', 'schedule', 'power', 'min_lr', 'warmup', 'head_lr_scale'),
    *('guidance_weight', 'auxiliary_weight'),
)

# Lower bounds of numbers
_AT_LEAST = {
    1: (
        *('batch_size', 'grad_accum_steps', 'validation_batch_size', 'iterations', 'val_interval', 'log_interval'),
        *('checkpoint_hist', 'test_multiple'),
    ),
    0: (
        *('workers', 'warmup', 'warmup_ratio', 'weight_decay', 'guidance_weight', 'auxiliary_weight', 'overlays'),
        'recovery_interval',
    ),
}
_ABOVE_0 = ('lr', 'head_lr_scale', 'clip_grad')


class TrainParser(Parser):
    """A parser whose defaults are those of a published system, if ``--segmenter`` names one."""

    def resolve(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses a command line.

        Returns:
            One value an option, and ``args.given`` with the names of those that were typed.

        Raises:
            OptionError: As of the base class; there is no such published system; options contradict each other.
        """
        args = super().resolve(argv)
        if args.segmenter:
            self.set_defaults(**published_defaults(segmenter_config(args.segmenter)))
            args = super().resolve(argv)
        _check(args)
        return args


def published_defaults(config: SegmenterConfig) -> dict[str, Any]:
    """How a published system was trained, as values of the options; what it is made of, `create_segmenter` knows."""
    shared = config_options(config)
    del shared['num_classes']  # the dataset's, which may be another
    return {
        **{name: getattr(config, name) for name in _SAME},
        **shared,
        # The published batch is that of all processes.
        'batch_size': max(1, config.batch_size // int(os.environ.get('WORLD_SIZE', 1))),
        'crop': [config.crop],
        'scale': list(config.scale),
        'opt': dict(sgd='momentum').get(config.optimizer, config.optimizer),  # timm's sgd is Nesterov's
        'no_norm_decay': not config.decay_norms,
        'periods': list(config.periods) or None,
        'restart_weights': list(config.restart_weights) or None,
    }


def _bounds(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Rules for `_check`: whether a number is below its bound, and what to say then. None, unset, never is."""
    flags = {name: f'--{name.replace("_", "-")}' for name in vars(args)}
    for least, names in _AT_LEAST.items():
        for name in names:
            value = getattr(args, name)
            yield value is not None and not value >= least, f'{flags[name]} must be at least {least}'
    for name in _ABOVE_0:
        value = getattr(args, name)
        yield value is not None and not value > 0, f'{flags[name]} must be above 0'


def _check(args: argparse.Namespace) -> None:
    ranges = (args.scale, args.ratio)
    rules = (
        (not args.data, 'where are the images? Give their folder or tar: train.py DATA'),
        *_bounds(args),
        (args.layer_decay is not None and not 0 < args.layer_decay <= 1, '--layer-decay must be above 0, at most 1'),
        (not 0 <= args.model_ema_decay < 1, '--model-ema-decay must be at least 0, below 1'),
        (not 0 <= args.seed < 2**32, '--seed must be at least 0, below 2**32'),
        (args.std is not None and not min(args.std) > 0, '--std must be above 0'),
        (args.warmup >= args.iterations, f'--warmup {args.warmup} must be less than the {args.iterations} iterations'),
        (len(args.crop) > 2 or min(args.crop) < 1, '--crop takes a side, or height and width, in pixels'),
        (min(map(min, ranges)) <= 0, '--scale and --ratio must be above 0'),
        (args.ratio[0] > args.ratio[1], '--ratio takes the lower bound first'),
        (args.resume == 'auto' and not args.experiment, '--resume auto needs --experiment, to know where to look'),
        (
            args.schedule != 'cosine_restarts' and bool({'periods', 'restart_weights'} & set(args.given)),
            '--periods and --restart-weights are of --schedule cosine_restarts',
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
        help="start from a classifier's weights: those that timm has for the backbone's name, or of a file",
    )
    add('--checkpoint', default='', metavar='FILE', help='start from the weights of a segmenter')
    add(
        '--sync-bn',
        action=argparse.BooleanOptionalAction,
        help='synchronise batch-norm over processes, on GPUs (default: with --segmenter, as published)',
    )
    add('--grad-checkpointing', action='store_true', help='trade compute for activation memory')
    add('--model-ema', action='store_true', help='keep an average of the weights, and validate that')
    add('--model-ema-decay', type=float, default=0.9998, metavar='F', help='its decay (default: 0.9998)')
    add('--model-ema-warmup', action='store_true', help='raise the decay from 0 in the first updates')


def _add_training_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--train-split', default='train', metavar='NAME', help='training split')
    add('--val-split', default='val', metavar='NAME', help='validation split')
    add('--no-check-data', action='store_true', help='do not open every image before training starts')
    add('--crop', type=int, nargs='+', default=[512], metavar='N', help='training crop: side, or height and width')
    add('--scale', type=int, nargs=2, default=[2048, 512], metavar='N', help='size that images are fitted into')
    add('--ratio', type=float, nargs=2, default=[0.5, 2.0], metavar='F', help='range of random factors on --scale')
    add('--max-category', type=float, default=0.75, metavar='F', help='most of a crop that one class may fill')
    add('--flip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip (default: 0.5)')
    add('--no-distort', action='store_true', help='no photometric distortion')


def _add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('-b', '--batch-size', type=int, default=16, metavar='N', help='crops a process in a batch (default: 16)')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches whose gradients make one iteration')
    add('--opt', default='adamw', metavar='NAME', help="one of timm's optimizers (default: adamw)")
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further optimizer arguments')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    add('--weight-decay', type=float, default=1e-4, metavar='F', help='weight decay (default: 1e-4)')
    add(
        '--no-norm-decay',
        action=argparse.BooleanOptionalAction,
        default=False,
        help="no weight decay of norms, positions, class tokens and biases (which the authors' code lets decay)",
    )
    add('--layer-decay', type=float, metavar='F', help='learning rate of a layer over that of the next one')
    add('--head-lr-scale', type=float, default=1.0, metavar='F', help='learning rate of all but the backbone, times')
    add('--clip-grad', type=float, metavar='F', help='clip gradients (default: no clipping)')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what --clip-grad bounds')
    add('--guidance-weight', type=float, default=0.2, metavar='F', help="Dice loss of --classifier cond's guidance")
    add('--auxiliary-weight', type=float, default=0.4, metavar='F', help='loss of the --auxiliary head')


def _add_schedule_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('learning rate schedule').add_argument
    add('--iterations', type=int, default=80_000, metavar='N', help='updates to train (default: 80000)')
    add('--lr', type=float, default=1e-4, metavar='LR', help='learning rate (default: 1e-4)')
    add('--schedule', default='poly', choices=SCHEDULES, help='default: poly')
    add('--power', type=float, default=0.9, metavar='F', help='exponent of poly (default: 0.9)')
    add('--min-lr', type=float, default=0.0, metavar='LR', help='learning rate that schedules end at')
    add('--periods', type=int, nargs='+', metavar='N', help='iterations of each of the cosine_restarts')
    add('--restart-weights', type=float, nargs='+', metavar='F', help='where each starts, as a share of --lr')
    add('--warmup', type=int, default=0, metavar='N', help='iterations of linear warm-up')
    add('--warmup-ratio', type=float, default=1e-6, metavar='F', help='share of --lr that warm-up starts from')


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('run').add_argument
    add('--seed', type=int, default=42, metavar='N', help='random seed (default: 42)')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    add('--log-interval', type=int, default=50, metavar='N', help='iterations between log lines')
    add('--val-interval', type=int, default=8000, metavar='N', help='iterations between validations (default: 8000)')
    add('-vb', '--validation-batch-size', type=int, default=1, metavar='N', help='images of a validation batch')
    add('--overlays', type=int, default=0, metavar='N', help='pictures of predictions that each validation draws')
    add(
        '--recovery-interval', type=int, default=0, metavar='N', help='iterations between recovery checkpoints, 0: none'
    )
    add('--checkpoint-hist', type=int, default=1, metavar='N', help='checkpoints to keep beside the last (default: 1)')
    add(
        '--resume',
        default='',
        metavar='FILE',
        help='go on from a checkpoint of this script; auto: from the last one of --experiment, if there is one',
    )
    add('--output', default='', metavar='DIR', help='parent of the run folder (default: ./output/segmentation)')
    add('--experiment', default='', metavar='NAME', help='name of the run folder (default: time, head and backbone)')
    add('--local_rank', '--local-rank', type=int, default=0, metavar='N', help='set by torch.distributed.launch')


def train_parser() -> TrainParser:
    """The parser of ``segmentation/train.py``."""
    parser = TrainParser(
        prog='segmentation/train.py',
        usage='%(prog)s DATA [options]',
        description='Train a segmenter. Defaults are those of Semantic FPN with Context Cluster on ADE20K.',
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
    add_runtime_options(parser)
    _add_run_options(parser)
    parser.set_defaults(dataset='ade20k')
    return parser
