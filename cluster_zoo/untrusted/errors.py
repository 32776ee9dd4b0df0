"""The one error for everything that is wrong with a checkpoint, and how files are refused with it."""

from collections.abc import Iterable
from pathlib import Path

_SHOWN = 4  # names in one message
_LONGEST = 200  # characters of one of them
_LONGEST_REASON = 400


class CheckpointError(RuntimeError):
    """A checkpoint cannot be opened, is not safe to open, or does not fit the model. The message says which and why."""


def refused(path: str | Path, reason: str) -> CheckpointError:
    """The error for a file that may be whole, but holds what it should not."""
    return CheckpointError(f"'{path}' was refused: {one_line(reason)}.")


def damaged(path: str | Path, what: str, reason: object = '') -> CheckpointError:
    """The error for a file that is not ``what`` it should be, as most often after a broken download."""
    reason = one_line(str(reason).strip().partition('\n')[0])
    return CheckpointError(
        f"'{path}' is truncated, damaged or not {what}{f' ({reason})' if reason else ''}. Get the file again."
    )


def one_line(text: str) -> str:
    """Text that a file may have chosen, for a message: one line, not long, without what a terminal would act on."""
    shown = ''.join(c if c.isprintable() else '?' for c in text[:_LONGEST_REASON])
    return shown if len(text) <= _LONGEST_REASON else f'{shown}...'


def reason(error: Exception) -> str:
    """What another library says is wrong, in one line; its kind of error where it says nothing."""
    return one_line(' '.join(str(error).split())) or type(error).__name__


def first(names: Iterable[object]) -> str:
    """The first of some names that a file chose, for a message."""
    names = list(names)
    return ', '.join(quoted(name) for name in names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')


def quoted(value: object) -> str:
    """A value that a file chose, for a message: as Python writes it, and not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'
