"""Command-line options of ``train.py`` and ``validate.py``: timm's flags with timm's meaning, in argument groups.

Values come, weakest first, from timm's defaults, the recipe, the ``--config`` file and the flags on the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs as TimmParseKwargs

from ..errors import OptionError, nearest
from .recipes import PUBLISHED_CENTROIDS, RECIPES, recipe_for

LEFT_OUT = (
    "Not here, of timm's options: the NaFlex loader (--naflex-*), which needs models that take patches, and "
    'Weights & Biases logging (--log-wandb, --wandb-*); summary.csv has the same figures.'
)
_UNSET = object()


class ParseKwargs(TimmParseKwargs):
    """timm's action for words like ``name=value``, with an error for other words."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *args: Any) -> None:
        for word in values:
            if word.find('=') < 1:
                raise argparse.ArgumentError(self, f"'{word}' is not of the form name=value")
        super().__call__(parser, namespace, values, *args)


class Parser(argparse.ArgumentParser):
    """Argument parser whose values come from timm's defaults, a recipe, a config file and the command line."""

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong, with the nearest option where one is mistyped, and exits with status 2."""
        prefix = 'unrecognized arguments: '
        if message.startswith(prefix):
            known = [option for action in self._actions for option in action.option_strings]
            words = message.removeprefix(prefix).split()
            message += ''.join(nearest(word.split('=')[0], known) for word in words if word.startswith('-'))
        print(f'error: {message}\n(all options: {self.prog} --help)', file=sys.stderr)
        sys.exit(2)

    def resolve(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses a command line on top of the recipe and the config file.

        Args:
            argv: Arguments without the program's name; ``sys.argv[1:]`` when None.

        Returns:
            One value an option; ``args.recipe`` names the recipe in use, ``args.given`` the options that were typed.

        Raises:
            OptionError: The config file is missing, is no mapping, or has an unknown key or a value of the wrong type.
        """
        actions = {action.dest: action for action in reversed(self._actions) if action.dest != 'help'}
        # Everything starts unset, so that what was typed is told apart from a default of the same value.
        parsed = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions, _UNSET))))
        # A positional argument that is left out parses as None.
        typed = {dest: value for dest, value in parsed.items() if value is not _UNSET and value is not None}
        config = read_config(typed['config'], actions) if typed.get('config') else {}
        values = {dest: action.default for dest, action in actions.items()}
        if 'recipe' in actions:
            values |= self._recipe({**values, **config, **typed}, chosen={*config, *typed})
            config.pop('recipe', None), typed.pop('recipe', None)
        args = argparse.Namespace(**{**values, **config, **typed})
        args.given = sorted(typed)
        return args

    @staticmethod
    def _recipe(values: dict[str, Any], chosen: set[str]) -> dict[str, Any]:
        name = recipe_for(values['model']) if values['recipe'] == 'auto' else values['recipe']
        recipe = dict(RECIPES[name], recipe=name)
        if values['recipe'] == 'auto':
            # Who names the paper's recipe wants its centroids too; this package's learn faster.
            recipe = {dest: value for dest, value in recipe.items() if dest not in PUBLISHED_CENTROIDS}
        if 'lr_base' in chosen and 'lr' not in chosen:
            recipe.pop('lr', None)  # who sets the rate to be scaled does not want the recipe's fixed one
        return recipe


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
    """Converts a config value the way the command line would have; TypeError or ValueError if that cannot be."""
    if value is None:
        return action.default
    if isinstance(action, ParseKwargs):
        return dict(value)
    if action.nargs == 0:
        return _of_type(value, bool)
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise ValueError(value)
        return [_typed_item(action, item) for item in _of_type(value, (list, tuple))]
    return _typed_item(action, value)


def _typed_item(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError(value)
    value = (action.type or str)(_of_type(value, (str, int, float)))
    if action.choices and value not in action.choices:
        raise ValueError(value)
    return value


def _of_type(value: Any, types: type | tuple[type, ...]) -> Any:
    if not isinstance(value, types):
        raise TypeError(value)
    return value


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
    add(
        '-d',
        '--dataset',
        default='',
        metavar='NAME',
        help='dataset type + name: empty for folders and tars, torch/..., '
        'hfds/..., hfids/..., wds/..., or cluster_zoo/cifar10_sample (bundled, no directory needed)',
    )
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
    add(
        '--amp-dtype',
        metavar='DTYPE',
        choices=('float16', 'bfloat16'),
        help='lower precision of --amp (default: float16, bfloat16 on a CPU)',
    )
    add(
        '--model-dtype',
        metavar='DTYPE',
        choices=('float32', 'float16', 'bfloat16'),
        help='precision of weights and activations when not using --amp (default: float32)',
    )
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--fuser', default='', help="TorchScript fuser: 'te', 'old' or 'nvfuser'")
    add('--fast-norm', action='store_true', help='norm layers in low precision under --amp')
    add('--torchscript', action='store_true', help='torch.jit.script the whole model')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further model arguments')
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import for a device backend')
    return group


def validate_parser() -> Parser:
    """The parser of ``validate.py``."""
    parser = Parser(
        prog='validate.py',
        usage='%(prog)s [DIR] [options]',
        description='Measure top-1 and top-5 accuracy and speed of one or several image classifiers.',
        epilog=LEFT_OUT,
    )
    group = add_dataset_options(parser)
    group.add_argument('--split', default='validation', metavar='NAME', help='split to measure on')
    group.add_argument('--num-samples', type=int, metavar='N', help='length of an iterable split')
    group.add_argument('--real-labels', default='', metavar='FILE', help='JSON of the reassessed ImageNet labels')
    group.add_argument('--valid-labels', default='', metavar='FILE', help='class indices, one a line, that images have')
    add = parser.add_argument_group('model').add_argument
    add(
        '-m',
        '--model',
        default='dpn92',
        metavar='NAMES',
        help='model, several with commas between them, a pattern such as '
        "'coc_*' (those with pretrained weights), 'all', or a file of names",
    )
    add('--pretrained', action='store_true', help='use pretrained weights; so it is when there is no --checkpoint')
    add('--checkpoint', default='', metavar='FILE', help='weights to measure, or a folder of them')
    add('--use-ema', action='store_true', help='prefer the averaged weights of a checkpoint')
    add('--num-classes', type=int, metavar='N', help="number of classes (default: the model's)")
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add('--sub-centroids', type=int, metavar='K', help='sub-centroids of each class of a dnc_* model (default: 4)')
    add('--test-pool', action='store_true', help="timm's test-time pooling, for images larger than the model's")
    add('--reparam', action='store_true', help='fuse the branches of models that can be')
    group = add_input_options(parser)
    group.add_argument(
        '--use-train-size', action='store_true', help='use the training image size where a model has two'
    )
    group.add_argument('--crop-mode', metavar='MODE', help='validation crop: center, squash or border')
    group.add_argument('--crop-border-pixels', type=int, metavar='N', help='pixels that --crop-mode border cuts off')
    group.add_argument('--tf-preprocessing', action='store_true', help="TensorFlow's preprocessing (needs TensorFlow)")
    group = add_runtime_options(parser)
    add = group.add_argument
    add('-b', '--batch-size', type=int, default=256, metavar='N', help='images in a batch (default: 256)')
    add('--num-gpu', type=int, default=1, metavar='N', help='GPUs to spread a batch over')
    add('--aot-autograd', action='store_true', help='AOT autograd with memory-efficient fusion')
    add('--legacy-jit', dest='fuser', action='store_const', const='old', help='the same as --fuser old')
    add('--seed', type=int, default=42, metavar='N', help='random seed')
    add('--retry', action='store_true', help='halve the batch size and try again when memory runs out')
    add = parser.add_argument_group('results').add_argument
    add('--log-freq', type=int, default=10, metavar='N', help='batches between log lines')
    add('--metrics-avg', choices=['micro', 'macro', 'weighted'], help='add precision, recall and F1, averaged so')
    add('--results-file', default='', metavar='FILE', help='write the results here, best model first')
    add('--results-format', default='', choices=('', 'csv', 'json'), help='format (default: from the name, else csv)')
    return parser
