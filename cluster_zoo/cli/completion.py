"""``cluster-zoo --print-completion``: completion for the user's shell, written by shtab."""

import argparse
from typing import Any, NoReturn

from ..weights.metadata import package_models, package_tags
from .parser import Parser


def add_argument(parser: Parser) -> None:
    """Adds the option to the main parser."""
    try:
        import shtab

        shells = ', '.join(shtab.SUPPORTED_SHELLS)
    except ImportError:
        shells = 'bash, zsh and what else shtab knows, which is not installed'
    parser.add_argument(
        '--print-completion',
        action=_PrintCompletion,
        metavar='SHELL',
        help=f'print what makes a shell ({shells}) complete this command',
    )


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option_string: str | None = None
    ) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab: pip install 'cluster_zoo[completion]'")
        if shell not in shtab.SUPPORTED_SHELLS:
            parser.error(f'there is completion for {", ".join(shtab.SUPPORTED_SHELLS)}, not for {shell}')
        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for action in (action for command in commands.choices.values() for action in command._actions):
            if action.metavar == 'NAME':
                action.choices = [
                    *package_models(),
                    *package_tags(),
                ]  # as of now; argparse itself must not insist on them
            elif action.metavar in ('FILE', 'IMAGE'):
                action.complete = shtab.FILE
        print(shtab.complete(parser, shell))
        parser.exit()
