"""segmentation.data.transforms: each step compared with loops, and consistency of image and mask."""

import colorsys

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from segmentation.data.transforms import (
    CategoryLimitedCrop,
    EvaluationResize,
    PadTo,
    PhotometricDistortion,
    RandomScale,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    eval_transform,
    keep_ratio_size,
    train_transform,
)

PLAIN = dict(mean=(0, 0, 0), std=(1, 1, 1))


def _pair(height, width, classes=5, seed=0):
    """Returns an image with channels (mask, row, column), and a random mask."""
    mask = torch.randint(classes, (height, width), generator=torch.Generator().manual_seed(seed))
    rows, columns = torch.arange(height)[:, None].expand(height, width), torch.arange(width).expand(height, width)
    image = torch.stack([mask, rows, columns]).to(torch.uint8)
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


def _image(height=8, width=8, seed=0):
    return tv_tensors.Image(torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)))


# Resizing


@pytest.mark.parametrize(
    ('size', 'scale', 'expected'),
    [
        ((480, 640), (2048, 512), (512, 683)),  # limited by the short side
        ((640, 480), (2048, 512), (683, 512)),
        ((200, 2000), (2048, 512), (205, 2048)),  # limited by the long side
        ((1024, 2048), (2048, 1024), (1024, 2048)),
        ((360, 480), (240.0, 180.0), (180, 240)),
        ((1, 4000), (400, 100), (1, 400)),  # at least 1
    ],
)
def test_keep_ratio_size(size, scale, expected):
    assert keep_ratio_size(size, scale) == expected
    assert keep_ratio_size(size, scale[::-1]) == expected


def test_random_scale_is_uniform():
    torch.manual_seed(0)
    scale = RandomScale((200, 50), (0.5, 2.0))
    heights = []
    for _ in range(300):
        image, mask = scale(*_pair(20, 30))
        assert image.shape[1:] == mask.shape
        assert abs(mask.shape[1] - 1.5 * mask.shape[0]) <= 1.25  # rounding of both sides
        heights.append(mask.shape[0])
    assert (min(heights), max(heights)) == pytest.approx((25, 100), abs=1)
    assert sum(heights) / 300 == pytest.approx(62.5, abs=4 * 75 / 12**0.5 / 300**0.5)  # uniform


def test_random_scale_of_the_image_size():
    torch.manual_seed(0)
    image, mask = RandomScale(None, (1, 1))(*_pair(21, 34))
    assert torch.equal(image[0], mask)
    assert mask.shape == (21, 34)
    assert RandomScale(None, (3, 3))(*_pair(5, 4))[1].shape == (15, 12)


def test_masks_are_resized_by_nearest_neighbor():
    torch.manual_seed(0)
    mask = tv_tensors.Mask(torch.tensor([[0, 254], [255, 7]]))
    image = tv_tensors.Image(torch.zeros(3, 2, 2, dtype=torch.uint8))
    resized = RandomScale(None, (3, 3))(image, mask)[1]
    assert resized.dtype == torch.int64
    assert torch.equal(resized, mask.repeat_interleave(3, 0).repeat_interleave(3, 1))


def _bilinear(image, height, width):
    """Resizes bilinearly in loops, with half-pixel centers and clamped borders."""

    def neighbors(position, size, length):
        source = max((position + 0.5) * length / size - 0.5, 0)
        low = min(int(source), length - 1)
        return low, min(low + 1, length - 1), source - low

    resized = np.zeros((3, height, width))
    for row in range(height):
        top, bottom, down = neighbors(row, height, image.shape[1])
        for column in range(width):
            left, right, along = neighbors(column, width, image.shape[2])
            upper = image[:, top, left] * (1 - along) + image[:, top, right] * along
            lower = image[:, bottom, left] * (1 - along) + image[:, bottom, right] * along
            resized[:, row, column] = upper * (1 - down) + lower * down
    return resized


@pytest.mark.parametrize(('scale', 'size'), [((24, 18), (18, 22)), ((8, 4), (4, 5))])
def test_images_are_resized_bilinearly_without_antialiasing(scale, size):
    pixels = torch.randint(256, (3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    resized = EvaluationResize(scale)(tv_tensors.Image(pixels))
    assert resized.shape[1:] == size
    error = np.abs(resized.double().numpy() - _bilinear(pixels.double().numpy(), *size))
    assert error.max() <= 1 and error.mean() < 0.4  # rounded to integers once per axis


def test_second_resize_to_a_multiple():
    """Semantic FPN of Context Cluster first fits an image into 2048 x 512, then resizes it to multiples of 32."""
    pixels = torch.randint(0, 256, (3, 60, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized = EvaluationResize((90, 50), 32)(tv_tensors.Image(pixels))
    assert resized.shape[1:] == (64, 96)
    first = np.floor(_bilinear(pixels.double().numpy(), 50, 83) + 0.5)
    error = np.abs(resized.double().numpy() - _bilinear(first, 64, 96))
    assert error.max() <= 2 and error.mean() < 0.5  # rounded to integers once per axis and resize
    once = np.abs(resized.double().numpy() - _bilinear(pixels.double().numpy(), 64, 96))
    assert once.mean() > 10 * error.mean()


# Cropping


def test_crop_is_the_same_for_image_and_mask():
    torch.manual_seed(0)
    positions = set()
    for _ in range(200):
        image, mask = CategoryLimitedCrop((4, 6))(*_pair(7, 8))
        assert mask.shape == (4, 6)
        assert torch.equal(image[0], mask)
        positions.add((int(image[1, 0, 0]), int(image[2, 0, 0])))
    assert positions == {(top, left) for top in range(4) for left in range(3)}


@pytest.mark.parametrize('size', [(4, 20), (20, 6), (9, 9)])
def test_crop_of_a_small_image(size):
    image, mask = CategoryLimitedCrop(size)(*_pair(7, 8))
    assert mask.shape == (min(size[0], 7), min(size[1], 8))
    assert torch.equal(image[0], mask)


def _share(mask):
    counts = {}
    for label in mask.flatten().tolist():
        if label != 255:
            counts[label] = counts.get(label, 0) + 1
    return max(counts.values()) / sum(counts.values()) if counts else None


def test_crop_limits_the_most_frequent_class():
    """The left half has one class, the right half four."""
    torch.manual_seed(0)
    image, mask = _pair(16, 32, classes=4)
    mask[:, :16] = 0
    limited, free = ([], [])
    for _ in range(300):
        limited.append(_share(CategoryLimitedCrop((8, 8), 0.75)(image, mask)[1]))
        free.append(_share(CategoryLimitedCrop((8, 8), 1)(image, mask)[1]))
    too_much = sum(share > 0.75 for share in free) / 300
    assert 0.3 < too_much < 0.7
    # Ten tries that all fail have a probability of too_much ** 10, below 0.03.
    assert sum(share > 0.75 for share in limited) / 300 < 0.04


def test_tenth_crop_is_always_used():
    image, mask = _pair(16, 16, classes=1)
    torch.manual_seed(5)
    cropped, _ = CategoryLimitedCrop((4, 4))(image, mask)
    torch.manual_seed(5)
    positions = [(int(torch.randint(13, ())), int(torch.randint(13, ()))) for _ in range(10)]
    assert (int(cropped[1, 0, 0]), int(cropped[2, 0, 0])) == positions[-1]


def test_limit_ignores_unlabeled_pixels():
    crop = CategoryLimitedCrop((2, 4), 0.75)
    assert crop._is_mixed(torch.tensor([[1, 1, 1, 2], [255] * 4]))  # exactly 3 of 4
    assert not crop._is_mixed(torch.tensor([[1, 1, 1, 1], [2, 255, 255, 255]]))  # 4 of 5
    assert not crop._is_mixed(torch.full((2, 4), 255))


# Distortion


def test_brightness_and_contrast_equal_loops():
    image = _image()
    for amount in (-0.3, 0.125, 0.9):
        expected = [min(max(value + amount, 0), 1) for value in image.flatten().tolist()]
        assert adjust_brightness(image, amount).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    for factor in (0.5, 1.5):
        expected = [min(value * factor, 1) for value in image.flatten().tolist()]
        assert adjust_contrast(image, factor).flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('factor', [0.5, 0.9, 1.0, 1.5])
def test_saturation_of_hsv(factor):
    image = _image(12, 12)
    image[:, 0, :6] = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.2, 0.9])  # includes gray, black and white
    image[:, 1, 0] = torch.tensor([1.0, 0.0, 0.0])  # fully saturated
    result = adjust_saturation(image, factor)
    for pixel, changed in zip(image.flatten(1).T.tolist(), result.flatten(1).T.tolist()):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        assert changed == pytest.approx(colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value), abs=1e-5)


def test_hue_of_hsv():
    image = _image(4, 4)
    distortion = PhotometricDistortion()
    result = distortion.transform(image, dict(steps=[(F.adjust_hue, 0.1)]))
    for pixel, changed in zip(image.flatten(1).T.tolist(), result.flatten(1).T.tolist()):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        assert changed == pytest.approx(colorsys.hsv_to_rgb((hue + 0.1) % 1, saturation, value), abs=1e-5)


def test_distortion_probabilities_and_ranges():
    torch.manual_seed(0)
    drawn = [PhotometricDistortion().make_params([])['steps'] for _ in range(1000)]
    bounds = {
        adjust_brightness: (-32 / 255, 32 / 255),
        adjust_contrast: (0.5, 1.5),
        adjust_saturation: (0.5, 1.5),
        F.adjust_hue: (-0.1, 0.1),
    }
    for step, (low, high) in bounds.items():
        amounts = [amount for steps in drawn for taken, amount in steps if taken is step]
        assert 430 < len(amounts) < 570  # half of 1000, 4 standard deviations
        assert low <= min(amounts) < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < max(amounts) <= high
    orders = [[step for step, _ in steps] for steps in drawn if len(steps) == 4]
    brightness, contrast, saturation, hue = bounds
    early, late = [brightness, contrast, saturation, hue], [brightness, saturation, hue, contrast]
    assert {tuple(order) for order in orders} == {tuple(early), tuple(late)}


def test_distortion_keeps_masks_and_range():
    torch.manual_seed(0)
    changed = 0
    for seed in range(20):
        image, mask = _image(seed=seed), tv_tensors.Mask(torch.arange(64).reshape(8, 8))
        result, same = PhotometricDistortion()(image, mask)
        assert type(result) is tv_tensors.Image
        assert torch.equal(same, mask)
        assert result.min() >= 0 and result.max() <= 1
        changed += not torch.equal(result, image)
    assert changed > 10


# Complete transforms


def test_pad_to():
    image, mask = PadTo((5, 7))(_image(3, 4), tv_tensors.Mask(torch.ones(3, 4, dtype=torch.int64)))
    assert image.shape == (3, 5, 7)
    assert image[:, 3:].abs().max() == image[:, :, 4:].abs().max() == 0
    assert torch.equal(image[:, :3, :4], _image(3, 4))
    assert (mask == 255).sum() == 35 - 12
    assert mask[:3, :4].eq(1).all()
    image, mask = _pair(9, 8)
    assert PadTo((5, 7))(image, mask)[1].shape == (9, 8)


def test_train_transform_is_the_same_for_image_and_mask():
    torch.manual_seed(0)
    transform = train_transform((6, 8), scale=None, ratio=(1, 1), distort=False, **PLAIN)
    mirrored = 0
    for _ in range(100):
        image, mask = transform(*_pair(5, 12))
        assert (image.dtype, mask.dtype) == (torch.float32, torch.int64)
        assert image.shape[1:] == mask.shape == (6, 8)
        seen = mask != 255
        assert seen[:5].all() and not seen[5:].any()  # one row of padding
        assert torch.equal((image[0] * 255).round().long()[seen], mask[seen].as_subclass(torch.Tensor))
        mirrored += bool(image[2, 0, 0] > image[2, 0, 1])
    assert 30 < mirrored < 70


def test_padding_is_the_mean():
    image = tv_tensors.Image(torch.full((3, 4, 4), 200, dtype=torch.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    result, _ = train_transform(8, None, (1, 1), distort=False)(image, tv_tensors.Mask(torch.zeros(4, 4).long()))
    expected = [(200 / 255 - m) / s for m, s in zip(mean, std)]
    assert result[:, :4, :4].flatten(1).mean(1).tolist() == pytest.approx(expected, abs=1e-5)
    assert result[:, 4:].abs().max() == 0


def test_train_transform_is_deterministic():
    transform = train_transform(16, scale=(40, 20))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(transform(*_pair(18, 30)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize(
    ('scale', 'multiple', 'expected'),
    [
        (None, None, (30, 45)),
        (None, 32, (32, 64)),
        ((2048, 512), None, (512, 768)),
        ((2048, 500), 32, (512, 768)),  # 500 x 750, rounded up
        ((600, 500), 32, (416, 608)),  # 400 x 600, rounded up
    ],
)
def test_eval_transform_resizes_only_the_image(scale, multiple, expected):
    image, mask = _pair(30, 45)
    result, same = eval_transform(scale, multiple)(image, mask)
    assert (tuple(result.shape[1:]), result.dtype) == (expected, torch.float32)
    assert torch.equal(same, mask)
    assert torch.equal(eval_transform(scale, multiple)(image), result)  # an image alone


def test_every_ratio_is_resized_from_the_original():
    image, mask = _pair(30, 45)
    views, same = eval_transform((90, 40), 16, (0.5, 1, 1.75))(image, mask)
    assert [tuple(view.shape[1:]) for view in views] == [(32, 32), (48, 64), (80, 112)]
    assert torch.equal(same, mask)
    for view, size in zip(views, ([20, 30], [40, 60], [70, 105])):
        first = F.resize(image, size, antialias=False)
        plain = F.normalize(
            F.resize(first, list(view.shape[1:]), antialias=False).float() / 255,
            *([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        )
        torch.testing.assert_close(view.as_subclass(torch.Tensor), plain.as_subclass(torch.Tensor))
    alone = eval_transform((90, 40), 16, (0.5, 1, 1.75))(image)
    assert all(torch.equal(one, view) for one, view in zip(alone, views, strict=True))
    own = eval_transform(ratios=(1, 1.5))(image)
    assert [tuple(view.shape[1:]) for view in own] == [(30, 45), (45, 68)]
    assert eval_transform(ratios=[0.5])(image).shape[1:] == (15, 23)  # not a tuple


def test_eval_transform_normalizes():
    image = tv_tensors.Image(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2))
    result = eval_transform(mean=(0.5, 0.1, 0.2), std=(0.5, 0.2, 0.4))(image)
    assert result[:, 0, 0].tolist() == pytest.approx([-1, 0.5, 2])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(crop=0), 'crop'),
        (dict(crop=(4, 4, 4)), 'crop'),
        (dict(crop=4, ratio=(2, 1)), 'ratio'),
        (dict(crop=4, ratio=(0, 1)), 'ratio'),
        (dict(crop=4, scale=(0, 5)), 'scale'),
        (dict(crop=4, max_category=0), 'max_category'),
        (dict(crop=4, max_category=75), 'max_category'),
    ],
)
def test_invalid_train_options(options, message):
    with pytest.raises(ValueError, match=message):
        train_transform(**options)


def test_invalid_eval_options():
    with pytest.raises(ValueError, match='scale'):
        eval_transform(scale=(0, 4))
    with pytest.raises(ValueError, match='-32'):
        eval_transform(multiple=-32)
    with pytest.raises(ValueError, match='ratios'):
        eval_transform(ratios=())
    with pytest.raises(ValueError, match='ratios'):
        eval_transform(ratios=(1, 0))
