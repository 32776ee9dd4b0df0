"""The error that everything about weights raises, and text from elsewhere inside its messages."""

__all__ = ['CheckpointError', 'one_line', 'quoted']

_LONGEST = 200  # characters


class CheckpointError(RuntimeError):
    """Weights cannot be found, opened or trusted, or do not fit the model. The message says which and what to do."""


def one_line(value: object) -> str:
    """Text of a file, a server or another library for a message: one short line of printable characters."""
    text = ' '.join(''.join(c if c.isprintable() or c.isspace() else '?' for c in str(value)).split())
    if not text and isinstance(value, Exception):
        text = type(value).__name__
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'


def quoted(value: object) -> str:
    """A value of a file for a message, as Python writes it."""
    return one_line(repr(value))
