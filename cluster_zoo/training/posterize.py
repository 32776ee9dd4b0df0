"""A fix for timm 1.0.31 with Pillow 13.

From magnitude 10 on, RandAugment may posterize an image to 0 bits, which is a black image. timm leaves this to Pillow,
and Pillow 13 raises an error instead. Remove this module when timm handles 0 bits.
"""

from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize

__all__ = ['allow_zero_bits']


def allow_zero_bits(dataset: Any) -> None:
    """Replaces the posterize function of all augmentations of a dataset."""
    for op in _augment_ops(dataset):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    return posterize(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else image.point(lambda value: 0)


def _augment_ops(holder: Any) -> Iterator[AugmentOp]:
    """All augmentations in a dataset, a transform or nested lists of them."""
    if isinstance(holder, AugmentOp):
        yield holder
    elif isinstance(holder, list | tuple):
        for item in holder:
            yield from _augment_ops(item)
    else:
        for name in ('transform', 'augmentation', 'transforms', 'ops', 'policy'):
            yield from _augment_ops(getattr(holder, name, ()) or ())
