"""What the commands print: strings that came from elsewhere, and lists cut short."""

from collections.abc import Sequence

_SHOWN_LABELS = 5


def printable(text: object) -> str:
    """On its line, whatever it is: control characters, line breaks and lone surrogates as Python would escape them."""
    return ''.join(
        character if character.isprintable() else character.encode('unicode_escape').decode() for character in str(text)
    )


def first_labels(labels: Sequence[str] | None) -> str:
    """The first names of the classes, as they follow their number."""
    if labels is None:
        return ', without names'
    shown = [label.partition(',')[0] for label in labels[:_SHOWN_LABELS]]  # one of ImageNet's synonyms will do
    return f': {", ".join(shown)}{", ..." if len(labels) > _SHOWN_LABELS else ""}'
