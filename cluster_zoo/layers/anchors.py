"""Record of the training images that the centroids of a head represent. It is part of the head's checkpoint.

`cluster_zoo.explain.anchor` writes it after training, and `cluster_zoo.explain.explain` reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

__all__ = ['AnchorMixin', 'AnchoredImage']

# Limits for an image in a checkpoint: bytes of its name, pixels of its thumbnail's side
MAX_NAME, MAX_SIDE = 1024, 256


@dataclass(frozen=True)
class AnchoredImage:
    """The training image that a sub-centroid represents.

    Attributes:
        index: Index in the training dataset.
        name: File name in the dataset, or the index as text.
        thumbnail: The image, small and square.
    """

    index: int
    name: str
    thumbnail: Image.Image


class AnchorMixin(nn.Module):
    """Mixin for a head with sub-centroids ``prototypes`` [K, k, D] that records the training image of each.

    The record consists of three buffers without a fixed shape. They are None, and so not in checkpoints, until a record
    is written. A head takes the record of the checkpoint that it loads; a checkpoint without a record clears it.

    Attributes:
        anchor_index: Index in the training dataset, int64 [K, k], -1 for no image; or None.
        anchor_name: UTF-8, padded with zeros, uint8 [K, k, L], L from 1 to 1024; or None.
        anchor_thumbnail: RGB, uint8 [K, k, 3, T, T], T from 1 to 256; or None.
    """

    prototypes: Tensor
    optional_entries = ('anchor_index', 'anchor_name', 'anchor_thumbnail')  # see `weights.check_fit`

    def __init__(self) -> None:
        super().__init__()
        for name in self.optional_entries:
            self.register_buffer(name, None)
        self.register_load_state_dict_pre_hook(_allocate)

    def record_anchors(self, index: Tensor, names: Sequence[str], thumbnails: Tensor) -> None:
        """Replaces the record.

        Args:
            index: int64 [K, k], -1 for sub-centroids without an image.
            names: Names of the K * k images, class by class; only the end of a name that is too long is kept.
            thumbnails: uint8 [K, k, 3, T, T].
        """
        encoded = [name.encode(errors='replace')[-MAX_NAME:] for name in names]
        length = max(1, *map(len, encoded))
        padded = bytearray().join(name.ljust(length, b'\0') for name in encoded)
        device = self.prototypes.device
        self.anchor_index = index.to(device, copy=True)
        self.anchor_name = torch.frombuffer(padded, dtype=torch.uint8).view(*index.shape, length).to(device)
        self.anchor_thumbnail = thumbnails.to(device)

    def forget_anchors(self) -> None:
        """Invalidates the record, because the centroids have moved. The entries of the state dict stay."""
        if self.anchor_index is not None:
            # timm's averaged copy of a model must have the same entries.
            self.anchor_index.fill_(-1)

    def drop_anchors(self) -> None:
        """Removes the record and its entries of the state dict."""
        self.anchor_index = self.anchor_name = self.anchor_thumbnail = None

    def anchored_image(self, class_index: int, sub_centroid: int) -> AnchoredImage | None:
        """The image that a sub-centroid represents, or None."""
        if self.anchor_index is None or self.anchor_index[class_index, sub_centroid] < 0:
            return None
        record = (self.anchor_index, self.anchor_name, self.anchor_thumbnail)
        index, name, thumbnail = (entry[class_index, sub_centroid].cpu().numpy() for entry in record)
        name = name.tobytes().rstrip(b'\0').decode(errors='replace')
        return AnchoredImage(int(index), name, Image.fromarray(thumbnail.transpose(1, 2, 0).copy()))

    def check_optional(self, entries: dict[str, Tensor]) -> None:
        """Raises ValueError unless the entries are a complete record for the head's sub-centroids, or empty."""
        if not entries:
            return
        missing = [name for name in self.optional_entries if name not in entries]
        if missing:
            raise ValueError(f'{", ".join(entries)} without {", ".join(missing)}')
        # The file determines these two sizes.
        length = min(max([1, *entries['anchor_name'].shape[-1:]]), MAX_NAME)
        side = min(max([1, *entries['anchor_thumbnail'].shape[-1:]]), MAX_SIDE)
        K, k, _ = self.prototypes.shape
        for name, dtype, shape in (
            ('anchor_index', torch.int64, [K, k]),
            ('anchor_name', torch.uint8, [K, k, length]),
            ('anchor_thumbnail', torch.uint8, [K, k, 3, side, side]),
        ):
            found = entries[name]
            if list(found.shape) != shape or found.dtype != dtype:
                raise ValueError(f'{name} of {found.dtype} {list(found.shape)}, expected {dtype} {shape}')


def _allocate(
    head: AnchorMixin, state_dict: dict[str, Tensor], prefix: str, metadata: dict, strict: bool, missing: list[str],
    unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Hook of ``load_state_dict``: allocates the buffers of the record that is loaded, or removes them."""
    entries = {name: state_dict[prefix + name] for name in head.optional_entries if prefix + name in state_dict}
    try:
        head.check_optional(entries)
    except ValueError as error:
        errors.append(f'{type(head).__name__} cannot take {error}.')
        for (
            name
        ) in entries:  # keeps the current record unchanged: PyTorch copies entries that fit in spite of the error
            del state_dict[prefix + name]
        return
    for name in head.optional_entries:
        found = entries.get(name)
        setattr(head, name, None if found is None else torch.empty_like(found, device=head.prototypes.device))
