"""Conventions of mmdetection 2 that torchvision's detectors do not follow, so that its checkpoints compute the same.

Coordinates are those of torchvision and mmdetection 2 alike: x1, y1, x2, y2 in pixels, where the first pixel covers
0 to 1, so that a box has the width x2 - x1.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align

__all__ = [
    'AlignedRoIPool',
    'ClampedBoxCoder',
    'PreciseDistanceCoder',
    'RoundedResize',
    'StrideAnchors',
    'paste_masks',
    'resized',
]

_FINEST_SCALE = 56  # square root of the area, in pixels, below which a box is pooled from the finest level
_EPSILON = 1e-6  # of the level of a box


class StrideAnchors(AnchorGenerator):
    """Anchors of exact size at multiples of a level's stride.

    torchvision rounds the corners of anchors. It computes strides from the sizes of image and map, and so finds 61
    pixels instead of 64 on the fifth level of an image that is 800 pixels high.

    Args:
        strides: Distance of the anchors of each level, pixels.
        sizes: Square roots of the anchors' areas on each level, pixels.
        ratios: Height / width of the anchors.
    """

    def __init__(self, strides: Sequence[int], sizes: Sequence[Sequence[float]], ratios: Sequence[float]):
        self.strides = tuple(strides)
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device('cpu'),  # noqa: B008  as in torchvision
    ) -> Tensor:
        """Returns the boxes [ratios x scales, 4] around the origin, in this order."""
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        width, height = (scales * (1 / roots)).flatten(), (scales * roots).flatten()
        return torch.stack([-width, -height, width, height], 1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Returns the anchors [A, 4] of all levels for each image: rows, then columns, then those of one place."""
        first = feature_maps[0]
        strides = [(stride, stride) for stride in self.strides]
        self.set_cell_anchors(first.dtype, first.device)
        anchors = torch.cat(self.grid_anchors([tuple(x.shape[-2:]) for x in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class ClampedBoxCoder(BoxCoder):
    """Offsets of boxes, decoded in the precision of the boxes.

    The factor of width and height is limited to 62.5 and to 1 / 62.5; torchvision has no lower limit. Offsets in half
    precision, of autocast, are not used to compute in half precision: bfloat16 knows only multiples of 4 around 800.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Offsets [N, 4 K] to boxes [N, 4] -> boxes [N, 4 K]"""
        low = [-math.inf, -math.inf, *(-self.bbox_xform_clip * weight for weight in self.weights[2:])]
        codes = rel_codes.to(boxes.dtype).unflatten(1, (-1, 4))
        return super().decode_single(codes.maximum(codes.new_tensor(low)).flatten(1), boxes)


class PreciseDistanceCoder(BoxLinearCoder):
    """Distances to the sides of a box, of FCOS, decoded in the precision of the boxes."""

    def decode(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Distances [..., 4] from the centers of boxes [..., 4] -> boxes [..., 4]"""
        return super().decode(rel_codes.to(boxes.dtype), boxes)


class AlignedRoIPool(MultiScaleRoIAlign):
    """RoIAlign with exact positions (half a pixel from torchvision's) on the level that fits the size of a box.

    The number of sampling points grows with the box. A box of area s^2 is pooled from level floor(log2(s / 56)), where
    level 0 is the finest.

    Args:
        strides: Stride of each level, finest first. The maps have the names '0', '1', ...
        output_size: Side of the result.
    """

    def __init__(self, strides: Sequence[int], output_size: int):
        super().__init__(list(map(str, range(len(strides)))), output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps [B, C, H, W] by name, boxes [N, 4] of each of B images -> [sum of N, C, side, side]"""
        image = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(boxes)], 1)
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        levels = torch.log2(sides / _FINEST_SCALE + _EPSILON).floor().clamp(0, len(self.strides) - 1)
        maps = [x[name] for name in self.featmap_names]
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (features, stride) in enumerate(zip(maps, self.strides)):
            chosen = torch.where(levels == level)[0]
            pooled = roi_align(
                features, rois[chosen].to(features.dtype), self.output_size, 1 / stride, self.sampling_ratio, True
            )
            out[chosen] = pooled.to(out.dtype)
        return out


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resamples masks to the pixels of an image, by bilinear interpolation at the centers of the pixels.

    Bilinear interpolation is separable: a product with the weights of rows and one with those of columns.

    Args:
        masks: Probabilities [N, 1, M, M] over a box; 0 outside.
        boxes: Boxes [N, 4] in pixels of the image.
        size: Height and width of the image.

    Returns:
        Probabilities [N, 1, H, W].
    """
    M = masks.shape[-1]

    def weights(start: Tensor, end: Tensor, length: int) -> Tensor:  # [N], [N] -> [N, length, M]
        pixels = torch.arange(length, dtype=boxes.dtype, device=boxes.device) + 0.5
        extent = (end - start).clamp(min=torch.finfo(boxes.dtype).tiny)
        position = (pixels - start[:, None]) / extent[:, None] * M - 0.5
        cells = torch.arange(M, dtype=boxes.dtype, device=boxes.device)
        return (1 - (position[..., None] - cells).abs()).clamp(min=0).to(masks.dtype)

    x1, y1, x2, y2 = boxes.unbind(1)
    with torch.autocast(masks.device.type, enabled=False):
        pasted = weights(y1, y2, size[0]) @ masks[:, 0] @ weights(x1, x2, size[1]).transpose(1, 2)
    return pasted[:, None]


def resized(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Returns the size at which the short side has ``short`` pixels or the long side ``long``, whichever is smaller."""
    scale = min(short / min(size), long / max(size))
    H, W = (max(int(side * scale + 0.5), 1) for side in size)
    return H, W


class RoundedResize(GeneralizedRCNNTransform):
    """torchvision's preparation of images and targets, with sides that are rounded, not cut, to whole pixels.

    Predicted boxes and masks are returned at the original size, masks by `paste_masks`.

    Attributes:
        crop: Side that training images are resized to in place of ``min_size``, see `coco.RandomCrop`; None for none.
        paste: Whether masks are returned in the image, [N, 1, H, W]; otherwise in their boxes, [N, 1, M, M].
    """

    crop: int | None = None
    paste: bool = True

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resizes an image [C, H, W] with its boxes [N, 4] and masks [N, H, W]."""
        old = tuple(image.shape[-2:])
        short = (self.crop or self.torch_choice(self.min_size)) if self.training else self.min_size[-1]
        new = resized(old, short, self.max_size)
        if new != old:
            image = F.interpolate(image[None], new, mode='bilinear', align_corners=False)[0]
        if target is not None:
            target['boxes'] = _scaled(target['boxes'], old, new)
            if 'masks' in target and new != old:
                target['masks'] = F.interpolate(target['masks'][:, None].byte(), new, mode='nearest')[:, 0]
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Scales boxes [N, 4] to the original images, and pastes masks [N, 1, M, M] into them."""
        if self.training:
            return result
        for found, size, original in zip(result, image_shapes, original_image_sizes):
            found['boxes'] = _scaled(found['boxes'], size, original)
            if 'masks' in found and self.paste:
                found['masks'] = paste_masks(found['masks'], found['boxes'], original)
        return result


def _scaled(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    y, x = (b / a for a, b in zip(old, new))
    return boxes * boxes.new_tensor([x, y, x, y])
