"""Text of the commands' output."""

from collections.abc import Sequence

_SHOWN_LABELS = 5


def first_labels(labels: Sequence[str] | None) -> str:
    """Returns the names of the first classes, in the form that follows the number of classes."""
    if labels is None:
        return ', without names'
    shown = [label.partition(',')[0] for label in labels[:_SHOWN_LABELS]]  # the first of ImageNet's synonyms
    return f': {", ".join(shown)}{", ..." if len(labels) > _SHOWN_LABELS else ""}'
