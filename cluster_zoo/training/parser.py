"""The argument parser of the training and validation scripts.

Values come, in increasing priority, from the parser's defaults, a recipe, a YAML file (``--config``) and the command
line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs as TimmParseKwargs

from ..errors import OptionError, nearest
from .help import HelpFormatter, add_help_options
from .recipes import PUBLISHED_CENTROIDS, RECIPES, recipe_for

__all__ = ['ParseKwargs', 'Parser']

_UNSET = object()
_UNUSED = ('debug', argparse.SUPPRESS)  # destinations that are no options of a run


class ParseKwargs(TimmParseKwargs):
    """timm's action for words like ``name=value``, with an error for other words."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *args: Any) -> None:
        for word in values:
            if word.find('=') < 1:
                raise argparse.ArgumentError(self, f"'{word}' does not have the form name=value")
        super().__call__(parser, namespace, values, *args)


class Parser(argparse.ArgumentParser):
    """Argument parser that merges defaults, a recipe, a config file and the command line.

    Args:
        common: Destinations of the options that ``--help`` prints, by default all; ``--help-all`` prints all.
        **kwargs: Arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, common: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**dict(add_help=False, formatter_class=HelpFormatter) | kwargs)
        self.common = common
        add_help_options(self)
        self.add_argument('--debug', action='store_true', help='print the traceback of an error')

    def error(self, message: str) -> NoReturn:
        """Prints the error, with the nearest option for a mistyped one, and exits with status 2."""
        prefix = 'unrecognized arguments: '
        if message.startswith(prefix):
            known = [option for action in self._actions for option in action.option_strings]
            words = message.removeprefix(prefix).split()
            message += ''.join(nearest(word.split('=')[0], known) for word in words if word.startswith('-'))
        self.exit(2, f'error: {message}\n(all options: {self.prog} --help-all)\n')

    def resolve(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses a command line and merges it with the recipe and the config file.

        Args:
            argv: Arguments without the program's name; ``sys.argv[1:]`` if None.

        Returns:
            One value per option. ``args.recipe`` is the name of the recipe that is used, ``args.given`` the sorted
            list of options on the command line, ``args.sources`` where the values come from that are no defaults, and
            ``args.resolved`` a copy of all values.

        Raises:
            OptionError: The config file cannot be read, is not a mapping, or has an unknown key or a value of the wrong
                type.
        """
        actions = {action.dest: action for action in reversed(self._actions) if action.dest not in _UNUSED}
        # All options start unset, to tell an option with the value of its default from a missing one.
        parsed = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions, _UNSET))))
        if parsed.pop('debug'):
            os.environ['CLUSTER_ZOO_DEBUG'] = '1'
        given = {dest: value for dest, value in parsed.items() if value is not _UNSET and value is not None}
        config = read_config(given['config'], actions) if given.get('config') else {}
        values, recipe = {dest: action.default for dest, action in actions.items()}, {}
        if 'recipe' in actions:
            recipe = _recipe({**values, **config, **given}, chosen={*config, *given})
            config.pop('recipe', None), given.pop('recipe', None)
        sources = dict.fromkeys(recipe, f'recipe {recipe.get("recipe")}')
        sources |= dict.fromkeys(config, 'config') | dict.fromkeys(given, 'flag')
        values |= recipe | config | given
        return argparse.Namespace(**values, given=sorted(given), sources=sources, resolved=dict(values))


def _recipe(values: dict[str, Any], chosen: set[str]) -> dict[str, Any]:
    name = recipe_for(values['model']) if values['recipe'] == 'auto' else values['recipe']
    recipe = dict(RECIPES[name], recipe=name)
    if values['recipe'] == 'auto':
        # The published learning of centroids needs `--recipe NAME`: this package's defaults for it measure better.
        recipe = {dest: value for dest, value in recipe.items() if dest not in PUBLISHED_CENTROIDS}
    if 'lr_base' in chosen and 'lr' not in chosen:
        recipe.pop('lr', None)  # the base rate would have no effect beside the recipe's fixed rate
    return recipe


def read_config(path: str, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    """Reads a YAML file of option values, for example the ``args.yaml`` of an earlier run.

    Args:
        path: The file, a mapping of destinations (``batch_size`` or ``batch-size``) to values.
        actions: The parser's actions by destination.

    Returns:
        Values by destination, converted to the types of the options.

    Raises:
        OptionError: The file cannot be read, a key is unknown, or a value has the wrong type.
    """
    try:
        with open(path) as file:
            config = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f'--config {path}: {error}') from error
    if not isinstance(config, dict):
        raise OptionError(f'--config {path}: expected a mapping of option names to values')
    values = {}
    for key, value in config.items():
        dest = str(key).replace('-', '_')
        if dest not in actions:
            raise OptionError(f'--config {path}: unknown key {key!r}{nearest(dest, actions)}')
        try:
            values[dest] = _convert(actions[dest], value)
        except (TypeError, ValueError) as error:
            raise OptionError(f'--config {path}: {value!r} is not a value of {key!r}') from error
    return values


def _convert(action: argparse.Action, value: Any) -> Any:
    """Converts a value of a config file to the type of an option; raises TypeError or ValueError if it cannot."""
    if value is None:
        return action.default
    if isinstance(action, ParseKwargs):
        return dict(value)
    if action.nargs == 0:
        return _check_type(value, bool)
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise ValueError(value)
        return [_convert_item(action, item) for item in _check_type(value, (list, tuple))]
    return _convert_item(action, value)


def _convert_item(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError(value)
    value = (action.type or str)(_check_type(value, (str, int, float)))
    if action.choices and value not in action.choices:
        raise ValueError(value)
    return value


def _check_type(value: Any, types: type | tuple[type, ...]) -> Any:
    if not isinstance(value, types):
        raise TypeError(value)
    return value
