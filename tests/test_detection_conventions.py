"""segmentation.detection.conventions: anchors, offsets, pooling, sizes and masks, each against a plain computation."""

import math

import pytest
import torch
from plain_detector import MAX_RATIO, anchors, decode, pasted, pooled, prepare
from torchvision.models.detection.image_list import ImageList

from segmentation.detection.conventions import (
    AlignedRoIPool,
    ClampedBoxCoder,
    RoundedResize,
    StrideAnchors,
    paste_masks,
    resized,
)

F64 = torch.float64


def test_anchors_have_the_strides_of_the_levels():
    """An image of 800 x 1344 pixels has 13 rows on the fifth level, 64 pixels apart, and not 800 / 13."""
    maps = [torch.empty(1, 1, 800 // stride, 1344 // stride, dtype=F64) for stride in (4, 8, 16, 32)]
    maps.append(torch.empty(1, 1, 13, 21, dtype=F64))
    strides = (4, 8, 16, 32, 64)
    generator = StrideAnchors(strides, [[8 * stride] for stride in strides], (0.5, 1.0, 2.0))
    first, second = generator(ImageList(torch.empty(2, 3, 800, 1344), [(800, 1333), (750, 1344)]), maps)
    assert torch.equal(first, second)
    expected = torch.cat([anchors(stride, *x.shape[-2:], F64) for stride, x in list(zip(strides, maps))[2:]])
    assert torch.equal(first[-len(expected) :], expected)
    assert first[-1].tolist() == pytest.approx(
        [1280 - 128 * math.sqrt(2), 768 - 256 * math.sqrt(2), 1280 + 128 * math.sqrt(2), 768 + 256 * math.sqrt(2)]
    )


@pytest.mark.parametrize('stds', [(1, 1, 1, 1), (0.1, 0.1, 0.2, 0.2)])
def test_offsets_are_limited_in_both_directions(stds):
    torch.manual_seed(0)
    boxes = torch.rand(50, 4, dtype=F64) * 20
    boxes[:, 2:] += boxes[:, :2] + 1
    deltas = torch.randn(50, 8, dtype=F64) * 4 / torch.tensor(stds * 2)
    found = ClampedBoxCoder(tuple(1 / std for std in stds)).decode(deltas, [boxes[:20], boxes[20:]])
    assert found.shape == (50, 2, 4)
    scaled = (deltas * torch.tensor(stds * 2)).abs()
    assert (scaled.unflatten(1, (2, 4))[..., 2:] > MAX_RATIO).any()
    for i in (0, 1):
        expected = decode(boxes, deltas[:, 4 * i : 4 * i + 4], stds, (10**9, 10**9))
        torch.testing.assert_close(found[:, i].clamp(0, 10**9), expected, rtol=1e-12, atol=1e-9)


def test_offsets_in_half_precision_move_boxes_in_full_precision():
    boxes = torch.tensor([[801.0, 3.0, 1003.0, 7.0]])
    found = ClampedBoxCoder((1.0, 1.0, 1.0, 1.0)).decode(torch.zeros(1, 4, dtype=torch.bfloat16), [boxes])
    assert torch.equal(found[0], boxes)


def test_pooling_on_the_level_of_the_box():
    """Boxes of all levels, at the limits between them, outside of the image, and tiny."""
    torch.manual_seed(0)
    strides = (4, 8, 16, 32)
    maps = [torch.randn(2, 3, 512 // stride, 640 // stride, dtype=F64) for stride in strides]
    sides = [0.5, 30, 55.99, 56, 111.99, 112, 200, 223.99, 224, 447.99, 448, 500]
    boxes = torch.tensor([[3.3, 2.2, 3.3 + side, 2.2 + side] for side in sides], dtype=F64)
    boxes = torch.cat([boxes, torch.tensor([[-20.0, -9.0, 70.0, 90.0], [500.0, 400.0, 700.0, 600.0]], dtype=F64)])
    found = AlignedRoIPool(strides, 7)({str(i): x for i, x in enumerate(maps)}, [boxes[:5], boxes[5:]], [(512, 640)])
    expected = torch.cat([pooled(maps, 0, boxes[:5], 7), pooled(maps, 1, boxes[5:], 7)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_pooling_of_no_boxes():
    maps = {str(i): torch.zeros(1, 3, 8, 8) for i in range(4)}
    assert AlignedRoIPool((4, 8, 16, 32), 7)(maps, [torch.zeros(0, 4)], [(32, 32)]).shape == (0, 3, 7, 7)


def test_masks_are_pasted_at_the_centers_of_pixels():
    torch.manual_seed(0)
    masks = torch.rand(4, 1, 28, 28, dtype=F64)
    boxes = torch.tensor([[3.2, 5.7, 20.9, 30.1], [-4, -3, 9, 60], [0, 0, 48, 40], [10, 10, 10.4, 10.3]], dtype=F64)
    found = paste_masks(masks, boxes, (40, 48))
    for mask, box, one in zip(masks, boxes, found):
        torch.testing.assert_close(one, pasted(mask[0], box, (40, 48)), rtol=1e-9, atol=1e-12)
    assert paste_masks(masks[:0], boxes[:0], (40, 48)).shape == (0, 1, 40, 48)
    assert paste_masks(masks[:1], torch.tensor([[5.0, 5, 5, 9]], dtype=F64), (40, 48)).isfinite().all()  # empty box
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(paste_masks(masks, boxes, (40, 48)), found)


@pytest.mark.parametrize(
    'size, short, long, expected',
    [
        ((480, 640), 800, 1333, (800, 1067)),  # torchvision: 1066
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 1000), 800, 1333, (400, 1333)),
        ((1, 3000), 800, 1333, (1, 1333)),
        ((800, 800), 800, 1333, (800, 800)),
    ],
)
def test_size_of_the_input(size, short, long, expected):
    assert resized(size, short, long) == expected


def test_images_and_targets_are_resized():
    torch.manual_seed(0)
    images = [torch.rand(3, 31, 47, dtype=F64), torch.rand(3, 64, 64, dtype=F64)]
    masks = torch.zeros(1, 31, 47, dtype=torch.uint8)
    masks[0, 10:20, 5:25] = 1
    target = dict(boxes=torch.tensor([[5.0, 10, 25, 20]], dtype=F64), labels=torch.tensor([1]), masks=masks)
    transform = RoundedResize(64, 90, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    batch, targets = transform(images, [target, dict(boxes=torch.zeros(0, 4), masks=torch.zeros(0, 64, 64))])
    assert batch.tensors.shape == (2, 3, 64, 96) and batch.image_sizes == [(59, 90), (64, 64)]
    torch.testing.assert_close(batch.tensors[0, :, :59, :90], prepare(images[0], 64, 90), rtol=1e-9, atol=1e-9)
    assert not batch.tensors[0, :, 59:].any() and not batch.tensors[0, :, :, 90:].any()
    assert target['masks'] is masks  # the caller's target is not changed
    factor = torch.tensor([90 / 47, 59 / 31] * 2, dtype=F64)
    torch.testing.assert_close(targets[0]['boxes'], target['boxes'] * factor)
    rows, columns = (targets[0]['masks'][0].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    assert (rows[0], rows[-1] + 1) == (math.ceil(10 * 59 / 31), math.ceil(20 * 59 / 31))
    assert (columns[0], columns[-1] + 1) == (math.ceil(5 * 90 / 47), math.ceil(25 * 90 / 47))
    transform.eval()
    (back, _) = transform.postprocess(
        [dict(boxes=targets[0]['boxes']), dict(boxes=torch.zeros(0, 4))], batch.image_sizes, [(31, 47), (64, 64)]
    )
    torch.testing.assert_close(back['boxes'], target['boxes'])
