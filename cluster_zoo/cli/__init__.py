"""The ``cluster-zoo`` command: one file for each command or group of commands, and what they share in ``parser``."""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..errors import CheckpointError, DataError, ExportError, OptionError
from . import completion, demo, export, predict, weights
from .parser import Parser
from .text import printable

__all__ = ['main']

_EXIT_STATUS = """\
exit status:
  0    done
  1    some of the images could not be classified (predict)
  2    an error, or a wrong use; the message is on standard error
  130  interrupted
  141  whatever read the output went away, as in 'cluster-zoo list | head'
  143  terminated
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, see ``cluster-zoo --help``.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` when None.
    """
    _prepare_streams()
    try:
        try:
            with _termination():
                args = _parser().parse_args(argv)
                return args.run(args) or 0
        finally:
            sys.stdout.flush()  # here, where a reader that went away is still noticed
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more as it ends
        return 141
    except (CheckpointError, DataError, ExportError, OptionError, OSError) as error:
        print('error:', _message(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _message(error: Exception) -> str:
    """This package's own in as many lines as they have, those of the system and of other libraries in one."""
    lines = [' '.join(str(error).split())] if isinstance(error, OSError) else str(error).splitlines()
    return '\n'.join(map(printable, lines)).strip() or type(error).__name__


def _prepare_streams() -> None:
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115  for as long as the process runs
        elif isinstance(stream, io.TextIOWrapper):  # any name of a file can be printed somehow
            stream.reconfigure(errors='backslashreplace')


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that what is temporary goes."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser() -> Parser:
    parser = Parser(
        prog='cluster-zoo',
        description='Clustering as a vision backbone: Context Cluster, FEC and Deep Nearest Centroids.',
        epilog=f'examples:\n  cluster-zoo demo\n  cluster-zoo predict cat.jpg\n\n{_EXIT_STATUS}',
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    completion.add_argument(parser)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for command in (demo, weights, predict, export):
        command.add_parser(commands)
    return parser
