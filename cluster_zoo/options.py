"""Command-line options of ``train.py`` and ``validate.py``: timm's flags with timm's meaning, in argument groups.

Values come, weakest first, from timm's defaults, the recipe, the ``--config`` file and the flags on the command line.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
import yaml
from timm.models import is_model, list_models
from timm.utils import ParseKwargs

from .recipes import RECIPES, recipe_for

_LEFT_OUT = (
    "Not here, of timm's options: the NaFlex loader (--naflex-*), which needs models that take patches, and "
    'Weights & Biases logging (--log-wandb, --wandb-*); summary.csv has the same figures.'
)
_UNSET = object()


class OptionError(ValueError):
    """A combination of options, or a value, that cannot work; the message says what to change."""


class Parser(argparse.ArgumentParser):
    """Argument parser that names the nearest option when one is mistyped."""

    def error(self, message: str) -> NoReturn:
        prefix = 'unrecognized arguments: '
        if message.startswith(prefix):
            known = [option for action in self._actions for option in action.option_strings]
            words = message.removeprefix(prefix).split()
            hints = [nearest(word.split('=')[0], known) for word in words if word.startswith('-')]
            message += ''.join(hints)
        print(f'error: {message}\n(see {self.prog} --help)', file=sys.stderr)
        sys.exit(2)

    def resolve(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses a command line on top of the recipe and the config file.

        Args:
            argv: Arguments without the program's name; ``sys.argv[1:]`` when None.

        Returns:
            One value an option. ``args.recipe`` names the recipe in use and ``args.given`` lists the destinations
            that the user set, by a flag or in the config file.

        Raises:
            OptionError: The config file is missing, is no mapping, or has an unknown key or a value of the wrong type.
        """
        actions = {a.dest: a for a in self._actions if a.dest != 'help'}
        # Everything starts unset, so that what the user typed is told apart from a default of the same value.
        typed = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions, _UNSET))))
        typed = {
            dest: value
            for dest, value in typed.items()
            if value is not _UNSET and (value is not None or actions[dest].option_strings)
        }
        config = read_config(typed['config'], actions) if typed.get('config') else {}
        defaults = {dest: action.default for dest, action in actions.items()}
        given = {**config, **typed}
        recipe = {}
        if 'recipe' in actions:
            name = given.get('recipe', 'auto')
            name = recipe_for(given.get('model', defaults['model'])) if name == 'auto' else name
            recipe = dict(RECIPES[name], recipe=name)
            given.pop('recipe', None)
            if 'lr_base' in given and 'lr' not in given:
                recipe.pop('lr', None)  # asking for a scaled learning rate overrides a recipe's fixed one
        args = argparse.Namespace(**{**defaults, **recipe, **given})
        args.given = sorted(given)
        return args


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``' (did you mean --batch-size?)'``, empty when nothing known is close to ``word``."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f' (did you mean {" or ".join(close)}?)' if close else ''


def check_model_name(name: str) -> None:
    """Raises OptionError, with the nearest names, for a model that timm does not know."""
    if ':' not in name and not is_model(name):  # 'hf-hub:...' and 'local-dir:...' are resolved by timm
        raise OptionError(f'unknown model {name!r}{nearest(name.split(".")[0], list_models())}')


def read_config(path: str, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    """Reads a YAML file of option values, such as the ``args.yaml`` of an earlier run.

    Args:
        path: The file, a mapping of destinations (``batch_size``; ``batch-size`` is accepted) to values.
        actions: The parser's actions by destination.

    Returns:
        Values by destination, converted to the types of the options.

    Raises:
        OptionError: The file cannot be read, a key is unknown, or a value has the wrong type.
    """
    try:
        with open(path) as f:
            config = yaml.safe_load(f) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise OptionError(f'--config {path}: {e}') from None
    if not isinstance(config, dict):
        raise OptionError(f'--config {path}: expected a mapping of option names to values')
    values = {}
    for key, value in config.items():
        dest = str(key).replace('-', '_')
        if dest not in actions:
            raise OptionError(f'--config {path}: unknown key {key!r}{nearest(dest, actions)}')
        try:
            values[dest] = _typed(actions[dest], value)
        except (TypeError, ValueError):
            raise OptionError(f'--config {path}: {value!r} is not a value for {key!r}') from None
    return values


def _typed(action: argparse.Action, value: Any) -> Any:
    """Converts one config value the way the command line would have."""
    if value is None or value == action.default:
        return action.default if value is None and action.nargs == 0 else value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TypeError(value)
        return value
    if isinstance(action, ParseKwargs):
        return dict(value)
    convert = action.type or str
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        if isinstance(value, str) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            raise TypeError(value)
        return [convert(v) for v in value]
    if isinstance(value, (bool, list, dict)):
        raise TypeError(value)
    value = convert(value)
    if action.choices and value not in action.choices:
        raise ValueError(value)
    return value


def default_device() -> str:
    """The accelerator of this machine (``cuda``, ``mps``, ...), or ``cpu``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else 'cpu'


def available_workers(workers: int) -> int:
    """``workers``, at most one for each processor that this process may use."""
    return min(workers, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)


# --- groups that both scripts share -----------------------------------------------------------------------------------


def add_dataset_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where the images come from."""
    group = parser.add_argument_group('dataset')
    add = group.add_argument
    add('data', nargs='?', metavar='DIR', help='folder or tar of images (positional, the same as --data-dir)')
    add('--data-dir', '--data_dir', metavar='DIR', help='folder or tar of images, or root of the dataset')
    add('-d', '--dataset', default='', metavar='NAME', help='dataset type + name: empty for folders and tars, torch/..., '
        'hfds/..., hfids/..., wds/..., or cluster_zoo/cifar10_sample (bundled, no directory needed)')
    add('--dataset-download', action='store_true', help='download torch/ and tfds/ datasets that support it')
    add('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    add('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: RGB, or L for 1 channel)')
    add('--input-key', help='key of the image in a dataset of records')
    add('--target-key', help='key of the label in a dataset of records')
    add('--dataset-trust-remote-code', action='store_true', help="let Hugging Face datasets run the dataset's own code")
    add('--strict', action='store_true', help='stop at an unreadable image (default: skip, count and report it)')
    return group


def add_input_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What an image looks like when it reaches the model; unset values come from the model's pretrained_cfg."""
    group = parser.add_argument_group('input')
    add = group.add_argument
    add('--img-size', type=int, metavar='N', help='image side in pixels')
    add('--in-chans', type=int, metavar='N', help='image channels')
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width (overrides the two above)')
    add('--crop-pct', type=float, metavar='N', help='share of the resized image that the validation crop keeps')
    add('--mean', type=float, nargs='+', metavar='M', help='normalisation mean, 0..1 scale')
    add('--std', type=float, nargs='+', metavar='S', help='normalisation standard deviation')
    add('--interpolation', default='', metavar='NAME', help='resize interpolation of validation')
    return group


def add_runtime_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How and where the model runs."""
    group = parser.add_argument_group('runtime')
    add = group.add_argument
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes, 0: none (default: 4)')
    add('--pin-mem', action='store_true', help='pin memory for faster transfer to the device')
    add('--no-prefetcher', action='store_true', help="do not use timm's prefetcher (never used on a CPU)")
    add('--device', help='device to run on (default: the accelerator that is there, else cpu)')
    add('--amp', '--native-amp', '--apex-amp', action='store_true', help='automatic mixed precision')
    add('--amp-dtype', metavar='DTYPE', choices=('float16', 'bfloat16'),
        help='lower precision of --amp (default: float16, bfloat16 on a CPU)')
    add('--model-dtype', metavar='DTYPE', choices=('float32', 'float16', 'bfloat16'),
        help='precision of weights and activations when not using --amp (default: float32)')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--fuser', default='', help="TorchScript fuser: 'te', 'old' or 'nvfuser'")
    add('--fast-norm', action='store_true', help='norm layers in low precision under --amp')
    add('--torchscript', action='store_true', help='torch.jit.script the whole model')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further model arguments')
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import for a device backend')
    return group


# --- training -----------------------------------------------------------------------------------------------------------


def _add_train_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet50', metavar='NAME', help='model to train (default: resnet50)')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', metavar='FILE', help='pretrained weights from a file, adapted like --pretrained')
    add('--initial-checkpoint', default='', metavar='FILE', help='load these weights, which must fit, after building')
    add('--resume', default='', metavar='FILE', help='go on from a checkpoint of this script; auto: from the last one '
        'of --experiment, if there is one')
    add('--no-resume-opt', action='store_true', help='resume weights and epoch only, start the optimizer afresh')
    add('--num-classes', type=int, metavar='N', help="number of classes (default: the model's)")
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add('--head-init-scale', type=float, metavar='F', help='scale of the initial head weights')
    add('--head-init-bias', type=float, metavar='F', help='initial value of the head bias')
    add('--grad-checkpointing', action='store_true', help='trade compute for activation memory')
    add('--drop', type=float, default=0.0, metavar='PCT', help='dropout of the head')
    add('--drop-connect', type=float, metavar='PCT', help='old name of --drop-path')
    add('--drop-path', type=float, metavar='PCT', help='stochastic depth')
    add('--drop-block', type=float, metavar='PCT', help='drop-block')
    add('--bn-tf', action='store_true', help="TensorFlow's batch-norm momentum and epsilon (0.01, 0.001)")
    add('--bn-momentum', type=float, metavar='F', help='batch-norm momentum')
    add('--bn-eps', type=float, metavar='F', help='batch-norm epsilon')
    add('--sync-bn', action='store_true', help='synchronise batch-norm over processes')
    add('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''), help='share batch-norm statistics over '
        "processes after each epoch: 'reduce' (default), 'broadcast' or ''")
    add('--split-bn', action='store_true', help='separate batch-norm statistics for each augmentation split')
    add('--model-ema', action='store_true', help='keep an exponential moving average of the weights')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU (it is not validated then)')
    add('--model-ema-decay', type=float, default=0.9998, metavar='F', help='its decay (default: 0.9998)')
    add('--model-ema-warmup', action='store_true', help='raise the decay from 0 in the first updates')


def _add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='images a process in a batch (default: 128)')
    add('-vb', '--validation-batch-size', type=int, metavar='N', help='the same for validation (default: -b)')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches whose gradients make one update')
    add('--opt', default='sgd', metavar='NAME', help="one of timm's optimizers (timm default: sgd)")
    add('--opt-eps', type=float, metavar='F', help='epsilon of the optimizer')
    add('--opt-betas', type=float, nargs='+', metavar='F', help='betas of the optimizer')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    add('--weight-decay', type=float, default=2e-5, metavar='F', help='weight decay')
    add('--clip-grad', type=float, metavar='F', help='clip gradients (default: no clipping)')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what --clip-grad bounds')
    add('--layer-decay', type=float, metavar='F', help='layer-wise learning rate decay')
    add('--layer-decay-min-scale', type=float, default=0, metavar='F', help='smallest scale of --layer-decay')
    add('--layer-decay-no-opt-scale', type=float, metavar='F', help='freeze layers whose scale is below this')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further optimizer arguments')


def _add_schedule_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('learning rate schedule').add_argument
    add('--sched', default='cosine', metavar='NAME', help='cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, '
        'plateau or none')
    add('--sched-on-updates', action='store_true', help='step after each update instead of each epoch')
    add('--lr', type=float, metavar='LR', help='learning rate (default: from --lr-base and the batch size)')
    add('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at --lr-base-size')
    add('--lr-base-size', type=int, default=256, metavar='N', help='batch size over all processes for --lr-base')
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'), help='scaling with the batch size '
        '(default: sqrt for adaptive optimizers, else linear)')
    add('--lr-noise', type=float, nargs='+', metavar='PCT', help='noise on and off points, in shares of the schedule')
    add('--lr-noise-pct', type=float, default=0.67, metavar='PCT', help='noise limit')
    add('--lr-noise-std', type=float, default=1.0, metavar='F', help='noise standard deviation')
    add('--lr-cycle-mul', type=float, default=1.0, metavar='F', help='cycle length multiplier')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='F', help='learning rate decay a cycle')
    add('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    add('--lr-k-decay', type=float, default=1.0, metavar='F', help='k-decay of cosine and poly')
    add('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate that warm-up starts from')
    add('--min-lr', type=float, default=0, metavar='LR', help='lower bound of cyclic schedules')
    add('--epochs', type=int, default=300, metavar='N', help='epochs to train (timm default: 300)')
    add('--epoch-repeats', type=float, default=0.0, metavar='F', help='passes over the data in an epoch (wds, tfds)')
    add('--start-epoch', type=int, metavar='N', help='number of the first epoch (useful on restarts)')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs of multistep')
    add('--decay-epochs', type=float, default=90, metavar='N', help='epochs between two decays')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    add('--warmup-prefix', action='store_true', help='warm-up comes before the schedule instead of within it')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at min-lr after a cyclic schedule')
    add('--patience-epochs', type=int, default=10, metavar='N', help='patience of the plateau schedule')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='F', help='learning rate decay rate')


def _add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('augmentation and loss').add_argument
    add('--no-aug', action='store_true', help='no training augmentation at all, overrides the rest')
    add('--train-crop-mode', metavar='MODE', help='training crop: rrc (default), rkrc or rkrr')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='F', help='random resize scale')
    add('--ratio', type=float, nargs='+', default=[3.0 / 4.0, 4.0 / 3.0], metavar='F', help='random aspect ratio')
    add('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    add('--vflip', type=float, default=0.0, metavar='P', help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, metavar='F', help='colour jitter factor (not used with --aa)')
    add('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter (default: always)')
    add('--grayscale-prob', type=float, metavar='P', help='probability of conversion to gray')
    add('--gaussian-blur-prob', type=float, metavar='P', help='probability of blurring')
    add('--aa', metavar='NAME', help='AutoAugment policy such as rand-m9-mstd0.5-inc1, v0, original, 3a')
    add('--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation (distributed only)')
    add('--aug-splits', type=int, default=0, metavar='N', help='augmentation splits, 0 or at least 2')
    add('--jsd-loss', action='store_true', help='Jensen-Shannon divergence + cross-entropy, needs --aug-splits')
    add('--bce-loss', action='store_true', help='binary cross-entropy')
    add('--bce-sum', action='store_true', help='sum over classes with --bce-loss')
    add('--bce-target-thresh', type=float, metavar='F', help='threshold that makes soft targets binary')
    add('--bce-pos-weight', type=float, metavar='F', help='weight of positives with --bce-loss')
    add('--reprob', type=float, default=0.0, metavar='P', help='random erasing probability')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='random erasing fill')
    add('--recount', type=int, default=1, metavar='N', help='erased boxes an image')
    add('--resplit', action='store_true', help='leave the first augmentation split unerased')
    add('--mixup', type=float, default=0.0, metavar='A', help='mixup alpha, 0: off')
    add('--cutmix', type=float, default=0.0, metavar='A', help='cutmix alpha, 0: off')
    add('--cutmix-minmax', type=float, nargs='+', metavar='F', help='smallest and largest cutmix ratio (sets alpha)')
    add('--mixup-prob', type=float, default=1.0, metavar='P', help='probability that a batch is mixed')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='of those, probability of cutmix')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem', 'half'), help='what gets its own mix')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixing from this epoch on, 0: never off')
    add('--smoothing', type=float, default=0.1, metavar='F', help='label smoothing')
    add('--train-interpolation', default='random', metavar='NAME', help='resize interpolation of training')


def _add_size_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('scheduled image sizes').add_argument
    add('--train-img-sizes', type=int, nargs='+', metavar='N', help='train with batches of these image sizes')
    add('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size of each (default: -b)')
    add('--train-size-probs', type=float, nargs='+', metavar='P', help='weight of each (default: uniform)')
    add('--train-size-schedule', default='constant', choices=('constant', 'progressive'), help='how sizes are drawn')
    add('--train-size-schedule-spread', type=float, default=0.65, metavar='F', help='width of the progressive window')
    add('--train-size-random-mix', type=float, default=0.1, metavar='F', help='share of uniformly drawn sizes')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N', help='batches in an epoch')
    add('--variable-batch-loss-scale', default='none', choices=('none', 'sqrt', 'linear'),
        help='scale the loss by the batch size over the largest one')


def _add_distillation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('knowledge distillation').add_argument
    add('--kd-model-name', metavar='NAME', help='teacher; turns distillation on')
    add('--kd-distill-type', default='logit', choices=['logit', 'feature', 'token'], help='what is compared')
    add('--kd-loss-type', default='kl', help='loss of logit distillation')
    add('--distill-loss-weight', type=float, metavar='F', help='weight of the distillation loss')
    add('--task-loss-weight', type=float, metavar='F', help='weight of the label loss; alone, the other is 1 - this')
    add('--kd-temperature', type=float, default=4.0, metavar='F', help='softmax temperature')
    add('--kd-student-feature-dim', type=int, metavar='N', help='width of student features (default: found out)')
    add('--kd-teacher-feature-dim', type=int, metavar='N', help='width of teacher features (default: found out)')
    add('--kd-token-distill-type', default='soft', choices=['soft', 'hard'], help='token distillation')


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('run').add_argument
    add('--seed', type=int, default=42, metavar='N', help='random seed (default: 42)')
    add('--worker-seeding', default='all', choices=('all', 'part'), help='which generators of a worker are seeded')
    add('--log-interval', type=int, default=50, metavar='N', help='batches between log lines')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    add('--recovery-interval', type=int, default=0, metavar='N', help='batches between recovery checkpoints, 0: none')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    add('--save-images', action='store_true', help='save training batches as they reach the model')
    add('--output', default='', metavar='DIR', help='parent of the run folder (default: ./output/train)')
    add('--experiment', default='', metavar='NAME', help='name of the run folder (default: time, model and size)')
    add('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'), help='metric that picks the best checkpoint')
    add('--tta', type=int, default=0, metavar='N', help='average the outputs of each N images of validation')
    add('--use-multi-epochs-loader', action='store_true', help='keep one loader iteration alive over epochs; a resumed '
        'run then differs from an uninterrupted one')
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in distributed training')
    add('--synchronize-step', action='store_true', help='synchronise the device after each step')
    add('--local_rank', '--local-rank', type=int, default=0, metavar='N', help='set by torch.distributed.launch')
    add('--git-id', default='None', metavar='ID', help='noted in args.yaml, nothing else')


def train_parser() -> Parser:
    """The parser of ``train.py``."""
    parser = Parser(
        prog='train.py',
        description="Train an image classifier with timm's parts. Defaults are those of a recipe (--recipe).",
        epilog=_LEFT_OUT,
    )
    add = parser.add_argument
    add('-c', '--config', default='', metavar='FILE', help='YAML file of option values; flags win over it')
    add('--recipe', default='auto', choices=('auto', *RECIPES), help="defaults to start from; auto: the paper's for coc_*, "
        "fec_* and dnc_* models, timm's for any other")
    group = add_dataset_options(parser)
    group.add_argument('--train-split', default='train', metavar='NAME', help='training split')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='validation split')
    group.add_argument('--train-num-samples', type=int, metavar='N', help='length of an iterable training split')
    group.add_argument('--val-num-samples', type=int, metavar='N', help='length of an iterable validation split')
    _add_train_model_options(parser)
    add_input_options(parser)
    _add_optimizer_options(parser)
    _add_schedule_options(parser)
    _add_augmentation_options(parser)
    _add_size_options(parser)
    _add_distillation_options(parser)
    add_runtime_options(parser)
    _add_run_options(parser)
    return parser
