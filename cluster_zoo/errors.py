"""Errors that a user can cause, and text for their messages."""

import difflib
from collections.abc import Iterable

__all__ = [
    'CheckpointError',
    'DataError',
    'ExportError',
    'ImageError',
    'OptionError',
    'UserError',
    'nearest',
    'one_line',
    'quoted',
]

_LONGEST = 200  # characters of text that comes from elsewhere


class UserError(Exception):
    """Base class of this package's errors. The message says what is wrong and what to do about it."""


class OptionError(UserError, ValueError):
    """An option has a value that cannot work, or two options exclude each other."""


class DataError(UserError, ValueError):
    """A dataset cannot be used.

    A loader's worker process passes the error on with its traceback as the message; only the message proper is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f'{type(self).__name__}: ', 1)[-1].strip())


class ImageError(UserError, ValueError):
    """An image cannot be read. The message does not repeat its name."""


class CheckpointError(UserError, RuntimeError):
    """Weights cannot be found, opened or trusted, or do not fit the model."""


class ExportError(UserError, RuntimeError):
    """A model cannot be exported, or the exported file does not compute what the model does."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``' (did you mean --batch-size?)'``; empty if no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f' (did you mean {" or ".join(close)}?)' if close else ''


def one_line(value: object) -> str:
    """Text of a file, a server or another library as one short line of printable characters."""
    text = ' '.join(''.join(c if c.isprintable() or c.isspace() else '?' for c in str(value)).split())
    if not text and isinstance(value, Exception):
        text = type(value).__name__
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'


def quoted(value: object) -> str:
    """A value of a file as Python writes it, on one short line."""
    return one_line(repr(value))
