"""The ``cluster-zoo`` command. Each module has a command or a group of commands; `parser` has a table of them.

The module of a command is imported when it runs, so that the help and the errors of mistyped commands are fast.
"""

import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..errors import UserError, print_error
from . import completion, training
from .parser import COMMANDS, Parser

__all__ = ['exit_on_sigterm', 'main']

_EXIT_STATUS = """\
exit status:
  0    done
  1    some of the images could not be processed (predict, explain, segment predict, detect predict)
  2    an error; the message is on standard error
  130  interrupted
  141  the reader of the output ended, as in 'cluster-zoo list | head'
  143  terminated
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, see ``cluster-zoo --help``.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.
    """
    _prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            if argv[:1] == ['--debug']:
                os.environ['CLUSTER_ZOO_DEBUG'] = '1'
                del argv[0]
            if not argv or argv[0] == 'help':
                argv = [*argv[1:], '--help']
            named = [argv[0]] if argv and argv[0] in COMMANDS else []
            if named and COMMANDS[argv[0]].module != 'training':
                importlib.import_module('..models', __name__)  # registers the models
            status = training.run_script(argv)
            if status is None:
                with exit_on_sigterm():
                    args = _parser(named).parse_args(argv)
                    if getattr(args, 'debug', False):
                        os.environ['CLUSTER_ZOO_DEBUG'] = '1'
                    status = args.run(args) or 0
            return status
        finally:
            sys.stdout.flush()  # a broken pipe must raise here, inside of the try statement
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at exit
        return 141
    except (UserError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130


def _prepare_streams() -> None:
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115  for as long as the process runs
        elif isinstance(stream, io.TextIOWrapper):  # prints names of files in any encoding
            stream.reconfigure(errors='backslashreplace')


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raises SystemExit on SIGTERM, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser(names: Iterable[str] = COMMANDS) -> Parser:
    """Returns the parser of the command. The modules of the named commands are imported for their parsers."""
    parser = Parser(
        prog='cluster-zoo',
        description='Clustering as a vision backbone: Context Cluster, FEC and Deep Nearest Centroids.',
        epilog=f'examples:\n  cluster-zoo demo\n  cluster-zoo predict cat.jpg\n\n{_EXIT_STATUS}',
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    completion.add_argument(parser, _parser)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    modules = {COMMANDS[name].module for name in names}
    for module in modules:
        importlib.import_module(f'.{module}', __name__).add_parser(commands)
    for name, command in COMMANDS.items():
        if name not in commands.choices:
            commands.add_parser(name, help=command.help, add_help=False)
    return parser
