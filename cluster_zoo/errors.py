"""Errors that a user can cause, and functions that format their messages."""

import difflib
import os
import sys
import traceback
from collections.abc import Iterable

__all__ = [
    'CheckpointError',
    'DataError',
    'ExportError',
    'ImageError',
    'OptionError',
    'RunError',
    'UserError',
    'nearest',
    'one_line',
    'print_error',
    'printable',
    'quoted',
]

_MAX_LENGTH = 200  # characters of external text in a message


class UserError(Exception):
    """Base class of this package's errors. The message states the problem and how to solve it.

    Attributes:
        status: Exit status of a command that ends with this error.
    """

    status = 2


class OptionError(UserError, ValueError):
    """An option has an invalid value, or two options exclude each other."""


class DataError(UserError, ValueError):
    """A dataset cannot be used."""

    def __init__(self, message: str) -> None:
        # A data loader raises a worker's error again with the whole traceback as its message
        super().__init__(message.rsplit(f'{type(self).__name__}: ', 1)[-1].strip())


class ImageError(UserError, ValueError):
    """An image cannot be read. The message does not contain the file name."""


class CheckpointError(UserError, RuntimeError):
    """Weights cannot be found or read, are refused, or do not fit the model."""


class RunError(UserError, RuntimeError):
    """A training run cannot go on: it diverged, its folder cannot be written, or a process is gone.

    Attributes:
        in_all_processes: Whether all processes raise the error at the same time.
    """

    status = 1
    in_all_processes = False


class ExportError(UserError, RuntimeError):
    """A model cannot be exported, or the exported file gives other results than the model."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns a hint such as ``' (did you mean --batch-size?)'``, empty if no known word is similar."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f' (did you mean {" or ".join(close)}?)' if close else ''


def one_line(value: object) -> str:
    """Returns text from a file, a server or another library as one short line of printable characters."""
    text = ' '.join(''.join(c if c.isprintable() or c.isspace() else '?' for c in str(value)).split())
    text = text or (type(value).__name__ if isinstance(value, Exception) else '')
    return text if len(text) <= _MAX_LENGTH else f'{text[:_MAX_LENGTH]}...'


def quoted(value: object) -> str:
    """Returns the ``repr`` of a value from a file as one short line."""
    return one_line(repr(value))


def printable(text: object) -> str:
    """Returns text with control characters, line breaks and lone surrogates escaped as in Python."""
    return ''.join(
        character if character.isprintable() else character.encode('unicode_escape').decode() for character in str(text)
    )


def print_error(error: Exception, subject: str = '') -> None:
    """Prints an error on standard error, after its traceback if ``CLUSTER_ZOO_DEBUG`` is set (``--debug``).

    Args:
        error: The error.
        subject: What the error is about, if the message does not contain it.
    """
    if os.environ.get('CLUSTER_ZOO_DEBUG', '0') not in ('', '0'):
        traceback.print_exception(error)
    lines = str(error).splitlines() if isinstance(error, UserError) else [' '.join(str(error).split())]
    message = '\n'.join(map(printable, lines)).strip() or type(error).__name__
    print('error:', f'{subject}: {message}' if subject else message, file=sys.stderr)
