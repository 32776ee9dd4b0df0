"""Argument parser of the commands, and types of arguments that several commands have."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from timm.models import parse_model_name

from ..errors import nearest

DEMO_MODEL = 'coc_tiny_plain.cifar10'  # its weights are part of the package

Commands = argparse._SubParsersAction  # what ``add_subparsers`` returns, for annotations


class _HelpFormatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fills paragraphs, except those with indented lines such as examples."""
        fill = super()._fill_text
        paragraphs = text.strip().split('\n\n')
        return '\n\n'.join(one if '\n ' in one else fill(one, width, indent) for one in paragraphs)


class Parser(argparse.ArgumentParser):
    """Argument parser of the command, or of one of its commands.

    Args:
        **kwargs: As for ``argparse.ArgumentParser``.
    """

    def __init__(self, **kwargs: Any) -> None:
        # With abbreviations, a new option could change the meaning of existing commands.
        kwargs = dict(formatter_class=_HelpFormatter, allow_abbrev=False) | kwargs
        super().__init__(**kwargs)
        self.add_argument(
            '--debug', action='store_true', default=argparse.SUPPRESS, help='print the traceback of an error'
        )

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses arguments. Unknown ones are an error of this parser, which can name the nearest option."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hints = ''.join(nearest(word.partition('=')[0], known) for word in unknown if word.startswith('-'))
            self.error(f'unknown argument{"s" * (len(unknown) > 1)} {" ".join(unknown)}{hints}')
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Prints the error and the command for help, and exits with status 2."""
        mistyped = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if mistyped:
            known = [name.strip(" '") for name in mistyped[2].split(',')]
            message = f"there is no command '{mistyped[1]}'{nearest(mistyped[1], known)}"
        self.exit(2, f'error: {message}\n(see {self.prog} --help)\n')


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""
    parser.add_argument(
        '--device',
        type=_device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='device, for example cpu or cuda (default: %(default)s)',
    )


def _device(name: str) -> torch.device:
    available = ['cpu']
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        available += [kind, *(f'{kind}:{index}' for index in range(torch.accelerator.device_count()))]
    if name not in available:
        raise argparse.ArgumentTypeError(f'there is no device {name}, only {", ".join(available)}')
    return torch.device(name)


def model_name(name: str) -> str:
    """Type of an argument: a model name of ``timm.create_model``, or the path of a model folder."""
    if (Path(name) / 'config.json').is_file():
        return f'local-dir:{name}'
    try:
        source, _ = parse_model_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if source:
        return name
    architecture, _, tag = name.partition('.')
    if not timm.is_model(architecture):
        raise argparse.ArgumentTypeError(
            f"there is no model '{architecture}'{nearest(architecture, timm.list_models())}"
        )
    names = timm.list_models(f'{architecture}.*', include_tags=True)
    if tag and name not in names:
        raise argparse.ArgumentTypeError(f"there are no weights '{name}', only {', '.join(names) or architecture}")
    return name


def positive(value: str) -> int:
    """Type of an argument: a whole number of at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f'{value} is not a whole number of at least 1')
    return int(value)
