"""``cluster-zoo --print-completion``: completion for the user's shell, written by shtab."""

import argparse
from typing import Any, NoReturn

_SHELLS = ('bash', 'zsh', 'tcsh')


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option to the main parser."""
    parser.add_argument(
        '--print-completion',
        action=_PrintCompletion,
        choices=_SHELLS,
        metavar='SHELL',
        help=f'print what makes {", ".join(_SHELLS[:-1])} or {_SHELLS[-1]} complete this command',
    )


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab: pip install 'cluster_zoo[completion]'")
        print(shtab.complete(parser, values))
        parser.exit()
