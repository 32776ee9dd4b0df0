"""Which training images the centroids of a head stand for: a record that is part of the head's checkpoint.

`cluster_zoo.explain.anchor` writes it, when training is done, and `cluster_zoo.explain.explain` reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

__all__ = ['AnchorMixin', 'AnchoredImage']

# What a checkpoint may ask memory for, an image: bytes of the name, pixels of the thumbnail's side
MAX_NAME, MAX_SIDE = 1024, 256


@dataclass(frozen=True)
class AnchoredImage:
    """The training image that a sub-centroid stands for.

    Attributes:
        index: Its place in the training dataset.
        name: Its file name there, or the index as text.
        thumbnail: It, small and square.
    """

    index: int
    name: str
    thumbnail: Image.Image


class AnchorMixin(nn.Module):
    """What a head with sub-centroids ``prototypes`` [K, k, D] gets to know the training image of each.

    The record is made of three buffers. They have no fixed shape and are None, thus not in checkpoints, until they are
    written: so the record of a checkpoint loads into a new head, and loading a checkpoint without one clears it.

    Attributes:
        anchor_index: Place in the training dataset, int64 [K, k], -1 for none; or None.
        anchor_name: UTF-8, then zeros, uint8 [K, k, L], L from 1 to 1024; or None.
        anchor_thumbnail: Red, green and blue, uint8 [K, k, 3, T, T], T from 1 to 256; or None.
    """

    prototypes: Tensor
    optional_entries = ('anchor_index', 'anchor_name', 'anchor_thumbnail')  # see `weights.check_fit`

    def __init__(self) -> None:
        super().__init__()
        for name in self.optional_entries:
            self.register_buffer(name, None)

    def record_anchors(self, index: Tensor, names: Sequence[str], thumbnails: Tensor) -> None:
        """Take a record in place of the one before.

        Args:
            index: int64 [K, k], -1 for sub-centroids that are no image.
            names: Those of the K * k images, class by class; of a longer one the end is kept.
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
        """The centroids have moved and are no images any more."""
        if self.anchor_index is not None:
            # The entries stay: an averaged copy of a model is expected to have as many.
            self.anchor_index.fill_(-1)

    def drop_anchors(self) -> None:
        """Have no record any more, not even its entries."""
        self.anchor_index = self.anchor_name = self.anchor_thumbnail = None

    def anchored_image(self, class_index: int, sub_centroid: int) -> AnchoredImage | None:
        """The image that a sub-centroid stands for, if any."""
        if self.anchor_index is None or self.anchor_index[class_index, sub_centroid] < 0:
            return None
        record = (self.anchor_index, self.anchor_name, self.anchor_thumbnail)
        index, name, thumbnail = (entry[class_index, sub_centroid].cpu().numpy() for entry in record)
        name = name.tobytes().rstrip(b'\0').decode(errors='replace')
        return AnchoredImage(int(index), name, Image.fromarray(thumbnail.transpose(1, 2, 0).copy()))

    def check_optional(self, entries: dict[str, Tensor]) -> None:
        """Raise ValueError unless these are a whole record of as many sub-centroids, or nothing."""
        if not entries:
            return
        missing = [name for name in self.optional_entries if name not in entries]
        if missing:
            raise ValueError(f'{", ".join(entries)} without {", ".join(missing)}')
        # The file chooses these two.
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

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        entries = {name: state_dict[prefix + name] for name in self.optional_entries if prefix + name in state_dict}
        try:
            self.check_optional(entries)
        except ValueError as error:
            errors.append(f'{type(self).__name__} can not take {error}.')
            return
        for name in self.optional_entries:
            found = entries.get(name)
            # Room for what the file has, filled below as any other buffer
            setattr(self, name, None if found is None else torch.empty_like(found, device=self.prototypes.device))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
