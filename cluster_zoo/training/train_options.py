"""Command-line options of ``train.py``; `shared_options` has those that it shares with ``validate.py``."""

from __future__ import annotations

import argparse

from ..errors import OptionError
from .parser import ParseKwargs, Parser
from .recipes import RECIPES
from .shared_options import (
    LEFT_OUT,
    add_dataset_options,
    add_input_options,
    add_logger_options,
    add_process_options,
    add_runtime_options,
)

__all__ = ['add_centroid_learning_options', 'check_train_options', 'is_mixing', 'train_parser']


_COMMON = (
    *('data', 'dataset', 'val_split', 'val_fraction', 'model', 'num_classes', 'pretrained', 'img_size', 'recipe'),
    *('epochs', 'batch_size', 'lr', 'opt', 'mixup', 'amp', 'device', 'workers', 'experiment', 'resume', 'dry_run'),
)


def _add_train_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet50', metavar='NAME', help='model to train (default: resnet50)')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', metavar='FILE', help='pretrained weights from a file, adapted like --pretrained')
    add('--initial-checkpoint', default='', metavar='FILE', help='load these weights strictly after building the model')
    add(
        '--resume',
        default='',
        metavar='FILE',
        help='resume from a checkpoint of this script; auto: from the newest one of --experiment, if any',
    )
    add('--no-resume-opt', action='store_true', help='resume the weights and the epoch, but not the optimizer')
    add('--num-classes', type=int, metavar='N', help="number of classes (default: the model's)")
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add('--head-init-scale', type=float, metavar='F', help='scale of the initial head weights')
    add('--head-init-bias', type=float, metavar='F', help='initial value of the head bias')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass to save memory')
    add('--drop', type=float, default=0.0, metavar='PCT', help='dropout of the head')
    add('--drop-connect', type=float, metavar='PCT', help='old name of --drop-path')
    add('--drop-path', type=float, metavar='PCT', help='stochastic depth')
    add('--drop-block', type=float, metavar='PCT', help='drop-block')
    add('--bn-tf', action='store_true', help="TensorFlow's batch-norm momentum and epsilon (0.01, 0.001)")
    add('--bn-momentum', type=float, metavar='F', help='batch-norm momentum')
    add('--bn-eps', type=float, metavar='F', help='batch-norm epsilon')
    add('--sync-bn', action='store_true', help='synchronize batch norm over processes')
    add(
        '--dist-bn',
        default='reduce',
        choices=('reduce', 'broadcast', ''),
        help="share batch-norm statistics over processes after each epoch: 'reduce' (default), 'broadcast' or ''",
    )
    add('--split-bn', action='store_true', help='separate batch-norm statistics for each augmentation split')
    add('--model-ema', action='store_true', help='keep an exponential moving average of the weights')
    add('--model-ema-force-cpu', action='store_true', help='keep the average on the CPU (it is not validated then)')
    add('--model-ema-decay', type=float, default=0.9998, metavar='F', help='decay of the average (default: 0.9998)')
    add(
        '--model-ema-warmup',
        action=argparse.BooleanOptionalAction,
        help='warm up the decay from 0 (default: in runs that are short for the decay)',
    )


def _add_centroid_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('centroids (dnc_* models)')
    add = group.add_argument
    add('--sub-centroids', type=int, metavar='K', help='sub-centroids per class (default: 4)')
    add('--common-start', type=float, metavar='F', help='common direction of initial sub-centroids (2; published: 0)')
    add_centroid_learning_options(group)


def add_centroid_learning_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of `CentroidLearning`; defaults are in parentheses."""
    add = group.add_argument
    add('--centroid-momentum', type=float, metavar='M', help='weight of a centroid against its new direction (0.999)')
    add('--centroid-temperature', type=float, metavar='T', help='temperature of the balanced assignment (0.05)')
    add('--centroid-memory', type=int, metavar='N', help='size of the feature memory over all processes (64 per class)')
    add('--centroid-every', type=int, metavar='N', help='use the memory in every N-th batch only (1)')
    add('--centroid-dtype', choices=('float32', 'bfloat16', 'float16'), help='dtype of the feature memory (float32)')
    add('--centroid-contrast', type=float, metavar='W', help='weight of the contrast loss (0; the paper: 0.005)')


def _add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='batch size per process (default: 128)')
    add('-vb', '--validation-batch-size', type=int, metavar='N', help='batch size of validation (default: -b)')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='number of batches per update')
    add('--opt', default='sgd', metavar='NAME', help="one of timm's optimizers (timm default: sgd)")
    add('--opt-eps', type=float, metavar='F', help='epsilon of the optimizer')
    add('--opt-betas', type=float, nargs='+', metavar='F', help='betas of the optimizer')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    add('--weight-decay', type=float, default=2e-5, metavar='F', help='weight decay')
    add('--clip-grad', type=float, metavar='F', help='clip gradients (default: no clipping)')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='gradient clipping mode')
    add('--layer-decay', type=float, metavar='F', help='layer-wise learning rate decay')
    add('--layer-decay-min-scale', type=float, default=0, metavar='F', help='smallest scale of --layer-decay')
    add('--layer-decay-no-opt-scale', type=float, metavar='F', help='freeze layers whose scale is below this')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further optimizer arguments')


def _add_schedule_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('learning rate schedule').add_argument
    add(
        '--sched',
        default='cosine',
        metavar='NAME',
        help='cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau or none',
    )
    add('--sched-on-updates', action='store_true', help='step after each update instead of each epoch')
    add('--lr', type=float, metavar='LR', help='learning rate (default: from --lr-base and the batch size)')
    add('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at --lr-base-size')
    add('--lr-base-size', type=int, default=256, metavar='N', help='batch size over all processes for --lr-base')
    add(
        '--lr-base-scale',
        default='',
        choices=('', 'linear', 'sqrt'),
        help='scaling with the batch size (default: sqrt for adaptive optimizers, else linear)',
    )
    add('--lr-noise', type=float, nargs='+', metavar='PCT', help='start and end of noise, as fractions of the schedule')
    add('--lr-noise-pct', type=float, default=0.67, metavar='PCT', help='noise limit')
    add('--lr-noise-std', type=float, default=1.0, metavar='F', help='noise standard deviation')
    add('--lr-cycle-mul', type=float, default=1.0, metavar='F', help='cycle length multiplier')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='F', help='learning rate decay per cycle')
    add('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    add('--lr-k-decay', type=float, default=1.0, metavar='F', help='k-decay of cosine and poly')
    add('--warmup-lr', type=float, default=1e-5, metavar='LR', help='initial learning rate of warm-up')
    add('--min-lr', type=float, default=0, metavar='LR', help='lower bound of cyclic schedules')
    add('--epochs', type=int, default=300, metavar='N', help='epochs to train (timm default: 300)')
    add('--epoch-repeats', type=float, default=0.0, metavar='F', help='passes over the data per epoch (wds, tfds)')
    add('--start-epoch', type=int, metavar='N', help='number of the first epoch (useful on restarts)')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs of multistep')
    add('--decay-epochs', type=float, default=90, metavar='N', help='epochs between decays')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    add('--warmup-prefix', action='store_true', help='warm up before the schedule instead of within it')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at min-lr after a cyclic schedule')
    add('--patience-epochs', type=int, default=10, metavar='N', help='patience of the plateau schedule')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='F', help='learning rate decay rate')


def _add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('augmentation and loss').add_argument
    add('--no-aug', action='store_true', help='no training augmentation at all, overrides the rest')
    add('--train-crop-mode', metavar='MODE', help='rrc (default), rkrc, rkrr, or pad (CIFAR: padding of 1/8)')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='F', help='random resize scale')
    add('--ratio', type=float, nargs='+', default=[3.0 / 4.0, 4.0 / 3.0], metavar='F', help='random aspect ratio')
    add('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    add('--vflip', type=float, default=0.0, metavar='P', help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, metavar='F', help='color jitter factor (not used with --aa)')
    add('--color-jitter-prob', type=float, metavar='P', help='probability of color jitter (default: always)')
    add('--grayscale-prob', type=float, metavar='P', help='probability of conversion to gray')
    add('--gaussian-blur-prob', type=float, metavar='P', help='probability of blurring')
    add('--aa', metavar='NAME', help='AutoAugment policy such as rand-m9-mstd0.5-inc1, v0, original, 3a')
    add('--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation (distributed only)')
    add('--aug-splits', type=int, default=0, metavar='N', help='augmentation splits, 0 or at least 2')
    add('--jsd-loss', action='store_true', help='Jensen-Shannon divergence + cross-entropy, needs --aug-splits')
    add('--class-weights', choices=('balanced',), help='weight classes in the loss by the inverse of their frequency')
    add('--bce-loss', action='store_true', help='binary cross-entropy')
    add('--bce-sum', action='store_true', help='sum over classes with --bce-loss')
    add('--bce-target-thresh', type=float, metavar='F', help='threshold that makes soft targets binary')
    add('--bce-pos-weight', type=float, metavar='F', help='weight of positives with --bce-loss')
    add('--reprob', type=float, default=0.0, metavar='P', help='random erasing probability')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='random erasing fill')
    add('--recount', type=int, default=1, metavar='N', help='erased boxes per image')
    add('--resplit', action='store_true', help='no random erasing in the first augmentation split')
    add('--mixup', type=float, default=0.0, metavar='A', help='mixup alpha, 0: off')
    add('--cutmix', type=float, default=0.0, metavar='A', help='cutmix alpha, 0: off')
    add('--cutmix-minmax', type=float, nargs='+', metavar='F', help='minimum and maximum cutmix ratio (sets alpha)')
    add('--mixup-prob', type=float, default=1.0, metavar='P', help='probability that a batch is mixed')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='of those, probability of cutmix')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='unit that gets its own mix')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='turn mixing off at this epoch, 0: never')
    add('--smoothing', type=float, default=0.1, metavar='F', help='label smoothing')
    add('--train-interpolation', default='random', metavar='NAME', help='resize interpolation of training')


def _add_size_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('scheduled image sizes').add_argument
    add('--train-img-sizes', type=int, nargs='+', metavar='N', help='train with batches of these image sizes')
    add('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size of each size (default: -b)')
    add('--train-size-probs', type=float, nargs='+', metavar='P', help='weight of each size (default: uniform)')
    add('--train-size-schedule', default='constant', choices=('constant', 'progressive'), help='how sizes are sampled')
    add('--train-size-schedule-spread', type=float, default=0.65, metavar='F', help='width of the progressive window')
    add('--train-size-random-mix', type=float, default=0.1, metavar='F', help='fraction of uniformly sampled sizes')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N', help='batches in an epoch')
    add(
        '--variable-batch-loss-scale',
        default='none',
        choices=('none', 'sqrt', 'linear'),
        help='scale the loss by the batch size over the largest one',
    )


def _add_distillation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('knowledge distillation').add_argument
    add('--kd-model-name', metavar='NAME', help='teacher model; enables distillation')
    add('--kd-distill-type', default='logit', choices=['logit', 'feature', 'token'], help='type of distillation')
    add('--kd-loss-type', default='kl', help='loss of logit distillation')
    add('--distill-loss-weight', type=float, metavar='F', help='weight of the distillation loss')
    add('--task-loss-weight', type=float, metavar='F', help='weight of the task loss (default of the other: 1 - F)')
    add('--kd-temperature', type=float, default=4.0, metavar='F', help='softmax temperature')
    add('--kd-student-feature-dim', type=int, metavar='N', help='width of student features (default: detected)')
    add('--kd-teacher-feature-dim', type=int, metavar='N', help='width of teacher features (default: detected)')
    add('--kd-token-distill-type', default='soft', choices=['soft', 'hard'], help='token distillation')


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('run')
    add = group.add_argument
    add('--seed', type=int, default=42, metavar='N', help='random seed (default: 42)')
    add('--worker-seeding', default='all', choices=('all', 'part'), help='generators of a worker to seed')
    add(
        '--persistent-workers',
        action=argparse.BooleanOptionalAction,
        help='keep data loading processes over epochs; resuming is not exact then (default on CUDA: on)',
    )
    add('--log-interval', type=int, default=50, metavar='N', help='updates between log lines')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    add('--recovery-interval', type=int, default=0, metavar='N', help='updates between recovery checkpoints, 0: none')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    add('--save-images', action='store_true', help='save training batches as images')
    add('--output', default='', metavar='DIR', help='parent of the run folder (default: ./output/train)')
    add(
        '--experiment',
        default='',
        metavar='NAME',
        help='name of the run folder, a new one (default: time, model, size)',
    )
    add('--overwrite', action='store_true', help='replace an earlier run of the same --experiment')
    add('--dry-run', action='store_true', help='build the run and print its options, images and updates, then stop')
    add(
        '--eval-metric',
        default='top1',
        choices=('top1', 'top5', 'map', 'loss'),
        help='metric that picks the best checkpoint (default: top1, map with --multi-label)',
    )
    add('--tta', type=int, default=0, metavar='N', help='average the outputs of every N validation images')
    add(
        '--use-multi-epochs-loader',
        action='store_true',
        help="timm's name of --persistent-workers",
    )
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in distributed training')
    add('--synchronize-step', action='store_true', help='synchronize the device after each step')
    add_process_options(group)
    add('--git-id', default='None', metavar='ID', help='recorded in args.yaml')


def train_parser(prog: str = 'train.py') -> Parser:
    """Returns the parser of ``train.py``."""
    parser = Parser(
        prog=prog,
        usage='%(prog)s [DIR] [options]',
        description='Train an image classifier. A recipe has the defaults (--recipe).',
        epilog=LEFT_OUT,
        common=_COMMON,
    )
    add = parser.add_argument
    add('-c', '--config', default='', metavar='FILE', help='YAML file of option values; flags have priority')
    add(
        '--recipe',
        default='auto',
        choices=('auto', *RECIPES),
        help="set of defaults; auto: the paper's for coc_*, fec_* and dnc_* models (without its learning of "
        "centroids), timm's for others",
    )
    group = add_dataset_options(parser)
    group.add_argument('--train-split', default='train', metavar='NAME', help='training split')
    group.add_argument('--val-split', default='validation', metavar='NAME', help="validation split; '' for none")
    group.add_argument('--train-num-samples', type=int, metavar='N', help='length of an iterable training split')
    group.add_argument('--val-num-samples', type=int, metavar='N', help='length of an iterable validation split')
    _add_train_model_options(parser)
    _add_centroid_options(parser)
    add_input_options(parser)
    _add_optimizer_options(parser)
    _add_schedule_options(parser)
    _add_augmentation_options(parser)
    _add_size_options(parser)
    _add_distillation_options(parser)
    add_runtime_options(parser)
    _add_run_options(parser)
    add_logger_options(parser)
    return parser


def is_mixing(args: argparse.Namespace) -> bool:
    """Returns whether mixup or cutmix is on, which makes the targets soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_train_options(args: argparse.Namespace) -> None:
    """Raises `OptionError` for values out of range and for options that exclude each other."""
    if args.multi_label and not args.sources.get('eval_metric'):
        args.eval_metric = 'map'
    args.persistent_workers = args.persistent_workers or args.use_multi_epochs_loader or None
    without_validation = not args.val_split and not args.val_fraction
    odd = [size for size in (args.batch_size, *(args.train_batch_sizes or ())) if size % 2]
    rules = (
        (args.batch_size < 1 or args.grad_accum_steps < 1, '--batch-size and --grad-accum-steps must be at least 1'),
        (is_mixing(args) and odd, f'mixup and cutmix mix pairs of images: a batch size of {odd} must be even'),
        (args.aug_splits == 1 or args.aug_splits < 0, '--aug-splits must be 0 or at least 2'),
        (args.jsd_loss and args.aug_splits < 2, '--jsd-loss compares augmentation splits: set --aug-splits'),
        (args.split_bn and args.aug_splits < 2 and not args.resplit, '--split-bn needs --aug-splits or --resplit'),
        (args.resume == 'auto' and not args.experiment, '--resume auto needs --experiment, the name of the run folder'),
        (args.train_batch_sizes and not args.train_img_sizes, '--train-batch-sizes needs --train-img-sizes'),
        (args.epochs < 1, '--epochs must be at least 1'),
        (args.checkpoint_hist < 1, '--checkpoint-hist must be at least 1'),
        (args.log_interval < 1, '--log-interval must be at least 1'),
        (args.dist_timeout is not None and args.dist_timeout <= 0, '--dist-timeout must be above 0'),
        (args.val_fraction is not None and not 0 < args.val_fraction < 1, '--val-fraction must be above 0, below 1'),
        (args.val_fraction and args.sources.get('val_split'), '--val-fraction and --val-split exclude each other'),
        (without_validation and args.sched == 'plateau', "--sched plateau needs validation: leave out --val-split ''"),
        (args.multi_label and args.eval_metric in ('top1', 'top5'), '--eval-metric of --multi-label: map or loss'),
        (not args.multi_label and args.eval_metric == 'map', '--eval-metric map needs --multi-label'),
        (
            args.persistent_workers and args.mixup_off_epoch,
            '--persistent-workers and --mixup-off-epoch exclude each other',
        ),
        (args.jsd_loss and (args.multi_label or args.class_weights), '--jsd-loss has one label, without class weights'),
        (
            args.train_crop_mode == 'pad' and (args.aug_splits or args.train_img_sizes),
            '--train-crop-mode pad cannot be combined with --aug-splits or --train-img-sizes',
        ),
    )
    for broken, message in rules:
        if broken:
            raise OptionError(message)
