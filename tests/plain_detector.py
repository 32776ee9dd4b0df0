"""Mask R-CNN on an FPN as mmdetection 2 computes it, step by step, from weights with its names.

It shares no code with the package. The feature maps of the backbone are given. Settings are those of its configuration
for Mask R-CNN with the schedule 1x. One step is torchvision's: detections below 0.01 pixels are dropped.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
STRIDES = (4, 8, 16, 32, 64)
MAX_RATIO = abs(math.log(16 / 1000))  # of the exponents of width and height, in both directions


def prepare(image: Tensor, short: int, long: int) -> Tensor:
    """[3, H, W], 0 to 1 -> normalized image whose sides are rounded to whole pixels"""
    h, w = image.shape[-2:]
    factor = min(long / max(h, w), short / min(h, w))
    image = rows_resized(image, int(h * factor + 0.5))
    image = rows_resized(image.transpose(1, 2), int(w * factor + 0.5)).transpose(1, 2)
    columns = (image.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (255 * image - next(columns)) / next(columns)


def rows_resized(image: Tensor, size: int) -> Tensor:
    """Linear interpolation between the centers of rows."""
    old = image.shape[1]
    position = ((torch.arange(size, dtype=image.dtype) + 0.5) * old / size - 0.5).clamp(0, old - 1)
    low = position.floor().long()
    high, part = (low + 1).clamp(max=old - 1), (position - low)[:, None]
    return image[:, low] * (1 - part) + image[:, high] * part


def batch(images: list[Tensor]) -> Tensor:
    """Pads with zeros at the bottom and at the right to a common multiple of 32."""
    H, W = (32 * math.ceil(max(image.shape[axis] for image in images) / 32) for axis in (1, 2))
    return torch.stack([F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1])) for image in images])


def neck(p: dict[str, Tensor], maps: list[Tensor]) -> list[Tensor]:
    """Lateral convolutions, sums from the coarsest level down, output convolutions, every second point of the last."""

    def conv(name, x, padding):
        return F.conv2d(x, p[f'neck.{name}.conv.weight'], p[f'neck.{name}.conv.bias'], padding=padding)

    lateral = [conv(f'lateral_convs.{i}', x, 0) for i, x in enumerate(maps)]
    for i in range(len(lateral) - 1, 0, -1):
        h, w = lateral[i - 1].shape[-2:]
        rows = torch.arange(h) * lateral[i].shape[-2] // h
        columns = torch.arange(w) * lateral[i].shape[-1] // w
        lateral[i - 1] = lateral[i - 1] + lateral[i][..., rows[:, None], columns]
    levels = [conv(f'fpn_convs.{i}', x, 1) for i, x in enumerate(lateral)]
    return [*levels, levels[-1][..., ::2, ::2]]


def anchors(stride: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """[height * width * 3, 4], around the corners of the cells"""
    ratio = torch.tensor([0.5, 1.0, 2.0])
    w, h = stride * (1 / ratio.sqrt()) * 8.0, stride * ratio.sqrt() * 8.0
    base = torch.stack([-0.5 * w, -0.5 * h, 0.5 * w, 0.5 * h], 1).to(dtype)
    boxes = []
    for y in range(height):
        for x in range(width):
            boxes.append(base + torch.tensor([x, y, x, y], dtype=dtype) * stride)
    return torch.cat(boxes)


def decode(boxes: Tensor, deltas: Tensor, stds: tuple, size: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] moved by offsets [N, 4] and clipped to the image."""
    deltas = deltas * deltas.new_tensor(stds)
    center, extent = (boxes[:, :2] + boxes[:, 2:]) * 0.5, boxes[:, 2:] - boxes[:, :2]
    center = center + extent * deltas[:, :2]
    extent = extent * deltas[:, 2:].clamp(-MAX_RATIO, MAX_RATIO).exp()
    moved = torch.cat([center - extent * 0.5, center + extent * 0.5], 1)
    limit = moved.new_tensor([size[1], size[0], size[1], size[0]])
    return torch.minimum(moved.clamp(min=0), limit)


def nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that no better box of the same group overlaps, best first."""
    x1y1, x2y2 = boxes[:, None, :2].maximum(boxes[:, :2]), boxes[:, None, 2:].minimum(boxes[:, 2:])
    both, area = (x2y2 - x1y1).clamp(min=0).prod(2), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    rivals = (both / (area[:, None] + area - both) > threshold) & (groups[:, None] == groups)
    kept, alive = [], torch.ones_like(scores, dtype=torch.bool)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if alive[i]:
            kept.append(i)
            alive &= ~rivals[i]
    return torch.tensor(kept, dtype=torch.long)


def proposals(
    p: dict[str, Tensor], levels: list[Tensor], image: int, size: tuple[int, int], candidates: int, limit: int
) -> Tensor:
    """RPN: candidates of each level, NMS within the levels, the best of them up to a limit."""
    boxes, scores, groups = [], [], []
    for i, (x, stride) in enumerate(zip(levels, STRIDES)):
        x = x[image : image + 1]
        x = F.conv2d(x, p['rpn_head.rpn_conv.weight'], p['rpn_head.rpn_conv.bias'], padding=1).relu()
        score = F.conv2d(x, p['rpn_head.rpn_cls.weight'], p['rpn_head.rpn_cls.bias'])[0].permute(1, 2, 0)
        delta = F.conv2d(x, p['rpn_head.rpn_reg.weight'], p['rpn_head.rpn_reg.bias'])[0].permute(1, 2, 0)
        score, best = score.flatten().sigmoid().sort(descending=True)
        grid = anchors(stride, *x.shape[-2:], x.dtype)
        score, best = score[:candidates], best[:candidates]
        boxes.append(decode(grid[best], delta.reshape(-1, 4)[best], (1, 1, 1, 1), size))
        scores.append(score)
        groups.append(torch.full_like(best, i))
    boxes, scores, groups = torch.cat(boxes), torch.cat(scores), torch.cat(groups)
    large = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    boxes, scores, groups = boxes[large], scores[large], groups[large]
    return boxes[nms(boxes, scores, groups, 0.7)[:limit]]


def sampling(start: float, end: float, cells: int, length: int, dtype: torch.dtype) -> Tensor:
    """Weights [cells, length] of one axis of RoIAlign: means of linear interpolations at evenly spaced points."""
    step = (end - start) / cells
    count = math.ceil(step)
    weights = torch.zeros(cells, length, dtype=dtype)
    for cell in range(cells):
        for i in range(count):
            at = start + cell * step + (i + 0.5) * step / count
            if at < -1 or at > length:
                continue
            at = min(max(at, 0), length - 1)
            low = int(at)
            high = min(low + 1, length - 1)
            weights[cell, low] += (1 - (at - low)) / count
            weights[cell, high] += (at - low) / count
    return weights


def pooled(levels: list[Tensor], image: int, boxes: Tensor, side: int) -> Tensor:
    """RoIAlign with half-pixel centers, [N, C, side, side], from the level that fits the area of the box."""
    out = []
    for box in boxes:
        x1, y1, x2, y2 = box.tolist()
        area = (x2 - x1) * (y2 - y1)
        level = min(max(math.floor(math.log2(math.sqrt(area) / 56 + 1e-6)), 0), 3)
        x, scale = levels[level][image], 1 / STRIDES[level]
        rows = sampling(y1 * scale - 0.5, y2 * scale - 0.5, side, x.shape[1], x.dtype)
        columns = sampling(x1 * scale - 0.5, x2 * scale - 0.5, side, x.shape[2], x.dtype)
        out.append(rows @ x @ columns.T)
    return torch.stack(out) if out else levels[0].new_zeros(0, levels[0].shape[1], side, side)


def box_head(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    prefix, x = 'roi_head.bbox_head', x.flatten(1)
    for i in (0, 1):
        x = F.linear(x, p[f'{prefix}.shared_fcs.{i}.weight'], p[f'{prefix}.shared_fcs.{i}.bias']).relu()
    scores = F.linear(x, p[f'{prefix}.fc_cls.weight'], p[f'{prefix}.fc_cls.bias']).softmax(1)
    return scores, F.linear(x, p[f'{prefix}.fc_reg.weight'], p[f'{prefix}.fc_reg.bias'])


def mask_head(p: dict[str, Tensor], x: Tensor) -> Tensor:
    prefix = 'roi_head.mask_head'
    for i in range(4):
        x = F.conv2d(x, p[f'{prefix}.convs.{i}.conv.weight'], p[f'{prefix}.convs.{i}.conv.bias'], padding=1).relu()
    x = F.conv_transpose2d(x, p[f'{prefix}.upsample.weight'], p[f'{prefix}.upsample.bias'], stride=2).relu()
    return F.conv2d(x, p[f'{prefix}.conv_logits.weight'], p[f'{prefix}.conv_logits.bias']).sigmoid()


def pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask [M, M] over a box, sampled at the centers of all pixels of the image."""
    x1, y1, x2, y2 = box.tolist()
    y = (torch.arange(size[0], dtype=mask.dtype) + 0.5 - y1) / (y2 - y1) * 2 - 1
    x = (torch.arange(size[1], dtype=mask.dtype) + 0.5 - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), 2)
    return F.grid_sample(mask[None, None], grid[None], mode='bilinear', padding_mode='zeros', align_corners=False)[0]


def detect(
    p: dict[str, Tensor],
    levels: list[Tensor],
    image: int,
    size: tuple[int, int],
    original: tuple[int, int],
    candidates: int = 1000,
    limit: int = 1000,
    detections: int = 100,
) -> dict[str, Tensor]:
    """Boxes, classes (from 0), scores and masks of an image, at its original size."""
    found = proposals(p, levels, image, size, candidates, limit)
    scores, deltas = box_head(p, pooled(levels, image, found, 7))
    num_classes = scores.shape[1] - 1  # the background is last
    boxes = torch.stack(
        [decode(found, deltas[:, 4 * k : 4 * k + 4], (0.1, 0.1, 0.2, 0.2), size) for k in range(num_classes)], 1
    ).flatten(0, 1)
    labels = torch.arange(num_classes).repeat(len(found))
    scores = scores[:, :-1].flatten()
    good = (scores > 0.05) & ((boxes[:, 2:] - boxes[:, :2]) >= 0.01).all(1)
    boxes, labels, scores = boxes[good], labels[good], scores[good]
    best = nms(boxes, scores, labels, 0.5)[:detections]
    boxes, labels, scores = boxes[best], labels[best], scores[best]
    masks = mask_head(p, pooled(levels, image, boxes, 14))[range(len(best)), labels]
    factor = boxes.new_tensor([size[1] / original[1], size[0] / original[0]] * 2)
    boxes = boxes / factor
    masks = [pasted(mask, box, original) for mask, box in zip(masks, boxes)]
    return dict(boxes=boxes, labels=labels, scores=scores, masks=torch.stack(masks))
