"""What every command's arguments share: help as it was written, errors that name what was meant, types of arguments."""

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
        """Paragraphs are filled; where one has indented lines, as examples have, they stay as they are."""
        fill = super()._fill_text
        paragraphs = text.strip().split('\n\n')
        return '\n\n'.join(one if '\n ' in one else fill(one, width, indent) for one in paragraphs)


class Parser(argparse.ArgumentParser):
    """Argument parser of the command, or of one of its commands.

    Args:
        **kwargs: As for ``argparse.ArgumentParser``.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Abbreviations would make a new option change the meaning of a command that worked.
        kwargs = dict(formatter_class=_HelpFormatter, allow_abbrev=False) | kwargs
        super().__init__(**kwargs)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses; whatever this parser does not know is an error of this parser, which knows its options."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hints = ''.join(nearest(word.partition('=')[0], known) for word in unknown if word.startswith('-'))
            self.error(f'unknown argument{"s" * (len(unknown) > 1)} {" ".join(unknown)}{hints}')
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong and where to look, and exits with status 2."""
        mistyped = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if mistyped:
            known = [name.strip(" '") for name in mistyped[2].split(',')]
            message = f"there is no command '{mistyped[1]}'{nearest(mistyped[1], known)}"
        self.exit(2, f'error: {message}\n(see {self.prog} --help)\n')


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, where a model runs."""
    parser.add_argument(
        '--device',
        type=_device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='where to run, such as cpu or cuda (default: %(default)s)',
    )


def _device(name: str) -> torch.device:
    there = ['cpu']
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        there += [kind, *(f'{kind}:{index}' for index in range(torch.accelerator.device_count()))]
    if name not in there:
        raise argparse.ArgumentTypeError(f'can not run on {name}, only on {", ".join(there)}')
    return torch.device(name)


def model_name(name: str) -> str:
    """Type of an argument: what ``timm.create_model`` may know a model by, or the path of a model folder."""
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
