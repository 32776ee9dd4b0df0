"""Predictions from whole images, windows and flipped images, compared with loops in float64."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from segmentation.engine.inference import predict, starts

CLASSES = 5


@pytest.fixture(scope='module')
def model():
    """A small network that depends on neighboring pixels and borders, and is not symmetric."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, CLASSES, 3, padding=1)).double().eval()


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain_windows(model, image, crop, stride):
    """Averages the logits of one image [C, H, W] window by window."""
    height, width = image.shape[-2:]
    total, count = torch.zeros(CLASSES, height, width, dtype=image.dtype), torch.zeros(height, width)
    bottom = right = 0
    top = 0
    while bottom < height:
        bottom = min(top + crop[0], height)
        left = right = 0
        while right < width:
            right = min(left + crop[1], width)
            window = (..., slice(max(bottom - crop[0], 0), bottom), slice(max(right - crop[1], 0), right))
            total[window] += model(image[None][window])[0]
            count[window] += 1
            left += stride[1]
        top += stride[0]
    assert count.min() >= 1
    return total / count


@pytest.mark.parametrize(
    ('size', 'crop', 'stride'),
    [
        ((24, 31), 16, 16),  # no overlap, except of the last windows
        ((24, 31), (12, 9), (5, 7)),
        ((32, 16), 16, 8),  # exact fit
        ((10, 31), 16, 11),  # smaller than a window in height
        ((7, 9), 16, 16),  # smaller than a window
        ((23, 17), 16, 15),
    ],
)
@pytest.mark.parametrize('chunk', [1, 4, 100])
@torch.no_grad()
def test_windows_equal_loop(model, size, crop, stride, chunk):
    images = noise(3, 3, *size)
    found = predict(model, images, mode='slide', crop=crop, stride=stride, chunk=chunk)
    pairs = [side if isinstance(side, tuple) else (side, side) for side in (crop, stride)]
    expected = torch.stack([plain_windows(model, image, *pairs) for image in images]).softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_window_starts_cover_every_pixel_and_stay_inside():
    for whole in range(1, 30):
        for side in range(1, whole + 1):
            for step in range(1, side + 1):
                positions = starts(whole, side, step)
                assert {i for position in positions for i in range(position, position + side)} == set(range(whole))
                assert len(positions) == len(set(positions)) == -(-(whole - side) // step) + 1


@torch.no_grad()
def test_window_of_the_image_size_equals_whole_image(model):
    images = noise(2, 3, 20, 28)
    whole = predict(model, images)
    torch.testing.assert_close(whole, model(images).softmax(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(predict(model, images, mode='slide', crop=(20, 28)), whole, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_larger_window_equals_whole_image(model):
    images = noise(2, 3, 20, 28)
    expected = model(images).softmax(1)
    torch.testing.assert_close(predict(model, images, mode='slide', crop=32), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('size', [(10, 31), (31, 10), (7, 9), (24, 31)])
@torch.no_grad()
def test_padded_windows(model, size):
    """Images smaller than 16 x 12 are padded, and the logits cropped."""
    images = noise(2, 3, *size)
    padded = torch.zeros(2, 3, max(size[0], 16), max(size[1], 12), dtype=images.dtype)
    padded[..., : size[0], : size[1]] = images
    logits = torch.stack([plain_windows(model, image, (16, 12), (11, 12)) for image in padded])
    expected = logits[..., : size[0], : size[1]].softmax(1)
    options = dict(mode='slide', crop=(16, 12), stride=(11, 12))
    torch.testing.assert_close(predict(model, images, pad=True, **options), expected, rtol=1e-12, atol=1e-12)
    same = (predict(model, images, **options) - expected).abs().max() < 1e-12
    assert same == (size == (24, 31))


def test_padded_windows_have_one_size():
    sizes = set()

    def model(x):
        sizes.add(tuple(x.shape[-2:]))
        return x

    for size in ((8, 8), (20, 8), (8, 20), (20, 20)):
        predict(model, noise(1, 3, *size), mode='slide', crop=(16, 12), pad=True)
    assert sizes == {(16, 12)}


@torch.no_grad()
def test_flip_averages_probabilities(model):
    images = noise(2, 3, 24, 31)
    size = (37, 50)
    logits = model(images), model(images.flip(-1)).flip(-1)
    expected = sum(F.interpolate(each, size, mode='bilinear').softmax(1) for each in logits) / 2
    found = predict(model, images, flip=True, size=size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.ones(2, *size, dtype=torch.float64))


def test_chunks_of_windows():
    batches = []

    def model(x):
        assert x.shape[-2:] == (16, 16)
        batches.append(len(x))
        return x

    predict(model, noise(3, 3, 32, 32), mode='slide', crop=16, chunk=8)
    assert batches == [8, 4]  # 3 images with 4 windows each


def test_half_precision_is_averaged_in_float32(model):
    half = model.to(torch.bfloat16)
    images = noise(1, 3, 24, 24).bfloat16()
    try:
        found = predict(half, images, mode='slide', crop=16, stride=4, flip=True)
    finally:
        model.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(1, 24, 24))


def test_no_gradients(model):
    assert not predict(model, noise(1, 3, 16, 16)).requires_grad


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(mode='window'), "mode 'window': expected whole or slide"),
        (dict(mode='slide'), 'needs a crop'),
        (dict(mode='slide', crop=16, stride=17), 'stride 17'),
        (dict(mode='slide', crop=(16, 8), stride=(8, 9)), r'stride \(8, 9\)'),
        (dict(mode='slide', crop=0), 'crop 0'),
        (dict(mode='slide', crop=16, stride=0), 'stride 0'),
        (dict(mode='slide', crop=16, chunk=0), 'chunk 0'),
    ],
)
def test_invalid_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        predict(model, noise(1, 3, 16, 16), **options)
