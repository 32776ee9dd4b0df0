"""The ``cluster-zoo`` command: one file for each command or group of commands, and what they share in ``parser``."""

import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..data import DataError
from ..options import OptionError
from ..weights import CheckpointError
from . import completion, demo, export, models, predict, weights
from .parser import Parser

__all__ = ['main']

_EXIT_STATUS = """\
exit status:
  0    done
  1    some of the images could not be classified (predict)
  2    an error, or a wrong use; the message is on standard error
  130  interrupted
  141  whatever read the output went away, as in 'cluster-zoo list | head'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, see ``cluster-zoo --help``.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` when None.
    """
    try:
        try:
            args = _parser().parse_args(argv)
            return args.run(args) or 0
        finally:
            sys.stdout.flush()  # here, where a reader that went away is still noticed
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more as it ends
        return 141
    except (CheckpointError, DataError, OptionError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    parser = Parser(
        prog='cluster-zoo',
        description='Clustering as a vision backbone: Context Cluster, FEC and Deep Nearest Centroids.',
        epilog=f'examples:\n  cluster-zoo demo\n  cluster-zoo predict cat.jpg\n\n{_EXIT_STATUS}',
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    completion.add_argument(parser)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for command in (demo, models, weights, predict, export):
        command.add_parser(commands)
    return parser
