"""The one error for everything that is wrong with a checkpoint, and how files are refused with it."""

from collections.abc import Iterable
from pathlib import Path

_SHOWN = 4  # names in one message
_LONGEST = 100  # characters of one of them


class CheckpointError(RuntimeError):
    """A checkpoint cannot be opened, is not safe to open, or does not fit the model. The message says which and why."""


def refused(path: str | Path, reason: str) -> CheckpointError:
    """The error for a file that may be whole, but holds what it should not."""
    return CheckpointError(f"'{path}' was refused: {reason}.")


def damaged(path: str | Path, what: str, reason: object = '') -> CheckpointError:
    """The error for a file that is not ``what`` it should be, as most often after a broken download."""
    return CheckpointError(
        f"'{path}' is truncated, damaged or not {what}{f' ({reason})' if str(reason) else ''}. Get the file again."
    )


def first(names: Iterable[str]) -> str:
    """The first of some names that a file chose, for a message of one line."""
    names = list(names)
    return ', '.join(quoted(name) for name in names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')


def quoted(name: object) -> str:
    """What a file chose, as Python writes it: in one line, without what a terminal would act on, not too long."""
    text = repr(name)
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'
