"""segmentation.predict: masks of single images, compared with the argmax of whole maps of probabilities."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import segmentation
from cluster_zoo.errors import CheckpointError, ImageError, OptionError, UserError
from segmentation.engine import masks

CLASSES = 5
HEIGHT, WIDTH = 37, 53
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope='module')
def model():
    """A small network that depends on neighboring pixels and borders, and is not symmetric."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Dropout(0.9), nn.Conv2d(8, CLASSES, 3, padding=1)
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope='module')
def pixels():
    """An image uint8 [3, H, W], smooth enough for all classes to have areas."""
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(3))
    return F.interpolate(coarse, (HEIGHT, WIDTH), mode='bicubic')[0].mul(255).round().clamp(0, 255).to(torch.uint8)


def normalized(pixels):
    """[3, H, W] in 0 .. 255 -> [1, 3, H, W]"""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels[None].float() / 255 - mean) / std


def window_logits(model, image, crop, stride):
    """Averages the logits of normalized images [1, 3, H, W] window by window."""
    H, W = image.shape[-2:]
    total, count = torch.zeros(1, CLASSES, H, W), torch.zeros(H, W)
    for top in range(0, max(H - crop[0] + stride[0], 1), stride[0]):
        for left in range(0, max(W - crop[1] + stride[1], 1), stride[1]):
            y, x = max(0, min(top, H - crop[0])), max(0, min(left, W - crop[1]))
            window = (..., slice(y, y + crop[0]), slice(x, x + crop[1]))
            total[window] += model(image[window])
            count[window] += 1
    return total / count


def check(mask, probabilities):
    """The mask has the argmax, except where rounding decides between two classes."""
    expected = probabilities[0].argmax(0)
    best = probabilities[0].topk(2, 0).values
    clear = best[0] - best[1] > 1e-5
    assert mask.dtype == torch.int64 and mask.shape == expected.shape and mask.device.type == 'cpu'
    assert clear.float().mean() > 0.99 and torch.equal(mask[clear], expected[clear])
    assert len(expected.unique()) > 2


@pytest.fixture(params=[2**24, 7 * CLASSES * WIDTH, 1], ids=['one strip', '7 rows', '1 row'])
def strips(request, monkeypatch):
    monkeypatch.setattr(masks, '_STRIP', request.param)


@torch.no_grad()
def test_whole_image(model, pixels, strips):
    check(segmentation.predict(model, pixels), model(normalized(pixels)).softmax(1))


@pytest.mark.parametrize(('crop', 'stride'), [(16, 16), ((12, 20), (5, 17)), (40, 13), (100, 100)])
@pytest.mark.parametrize('chunk', [1, 3])
@torch.no_grad()
def test_windows(model, pixels, strips, crop, stride, chunk):
    sides, steps = (value if isinstance(value, tuple) else (value, value) for value in (crop, stride))
    expected = window_logits(model, normalized(pixels), sides, steps).softmax(1)
    check(segmentation.predict(model, pixels, mode='slide', crop=crop, stride=stride, chunk=chunk), expected)


@torch.no_grad()
def test_padded_window(model, pixels):
    image = F.pad(normalized(pixels), (0, 64 - WIDTH, 0, 64 - HEIGHT))
    expected = model(image)[..., :HEIGHT, :WIDTH].softmax(1)
    found = segmentation.predict(model, pixels, mode='slide', crop=64, pad=True)
    check(found, expected)
    assert not torch.equal(found, segmentation.predict(model, pixels, mode='slide', crop=64))


@torch.no_grad()
def test_flip(model, pixels, strips):
    image = normalized(pixels)
    expected = (model(image).softmax(1) + model(image.flip(-1)).flip(-1).softmax(1)) / 2
    check(segmentation.predict(model, pixels, flip=True), expected)


@pytest.mark.parametrize('scales', [(0.5,), (1.0, 4.0), (0.4, 1.0, 2.5)])
@pytest.mark.parametrize('windows', [False, True])
@torch.no_grad()
def test_scales(model, pixels, strips, scales, windows):
    """Sizes are factors of 48 x 33, then multiples of 4; the logits are resized to the image."""
    expected = 0
    for factor in scales:
        size = [int(side * factor * 48 / WIDTH + 0.5) for side in (HEIGHT, WIDTH)]
        resized = F.interpolate(pixels[None].float(), size, mode='bilinear')
        resized = F.interpolate(resized, [4 * math.ceil(side / 4) for side in size], mode='bilinear')[0]
        image = normalized(resized)
        logits = window_logits(model, image, (24, 24), (10, 10)) if windows else model(image)
        expected = expected + F.interpolate(logits, (HEIGHT, WIDTH), mode='bilinear').softmax(1) / len(scales)
    options = dict(mode='slide', crop=24, stride=10) if windows else {}
    image = pixels / 255  # uint8 would be rounded after the resize
    check(segmentation.predict(model, image, scales=scales, scale=(48, 40), multiple=4, **options), expected)


@torch.no_grad()
def test_normalization_of_the_model(model, pixels, monkeypatch):
    images = dict(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    expected = segmentation.predict(model, pixels, **images)
    assert not torch.equal(segmentation.predict(model, pixels), expected)
    monkeypatch.setattr(model, 'pretrained_cfg', images, raising=False)  # as of a segmenter
    assert torch.equal(segmentation.predict(model, pixels), expected)


@torch.no_grad()
def test_large_images_have_windows(model, pixels, monkeypatch):
    monkeypatch.setattr(masks, 'MAX_WHOLE', HEIGHT * WIDTH - 1)
    monkeypatch.setattr(masks, 'WINDOW', (20, 15))
    image = normalized(pixels)
    check(segmentation.predict(model, pixels), window_logits(model, image, (20, 20), (15, 15)).softmax(1))
    check(segmentation.predict(model, pixels, mode='whole'), model(image).softmax(1))
    small = segmentation.predict(model, pixels[:, 1:])
    check(small, model(image[..., 1:, :]).softmax(1))


def test_logits_of_few_rows_are_kept(model, monkeypatch):
    """A high image needs no more memory than a window and a strip."""
    monkeypatch.setattr(masks, '_STRIP', CLASSES * 32 * 10)
    kept, extend = [], masks._Logits._extend

    def record(self, *args):
        extend(self, *args)
        kept.append(self.sums.shape[1])

    monkeypatch.setattr(masks._Logits, '_extend', record)
    image = torch.zeros(3, 1000, 32, dtype=torch.uint8)
    segmentation.predict(model, image, mode='slide', crop=32, stride=24, flip=True)
    assert len(kept) > 80 and max(kept) <= 32 + 24 + 10


def test_types_of_images(model, pixels):
    expected = segmentation.predict(model, pixels)
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    array.flags.writeable = False
    assert torch.equal(segmentation.predict(model, array), expected)
    assert torch.equal(segmentation.predict(model, Image.fromarray(array)), expected)
    assert torch.equal(segmentation.predict(model, pixels.float() / 255), expected)
    assert torch.equal(segmentation.predict(model, (pixels.double() / 255).requires_grad_()), expected)
    found = segmentation.predict(model, Image.fromarray(array).convert('L'))
    assert torch.equal(found, segmentation.predict(model, Image.fromarray(array).convert('L').convert('RGB')))
    found[0, 0] = 3  # a usual tensor


def test_exif_orientation(model, pixels):
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    expected = segmentation.predict(model, image.transpose(Image.Transpose.ROTATE_270))
    image.getexif()[0x112] = 6
    assert torch.equal(segmentation.predict(model, image), expected) and expected.shape == (WIDTH, HEIGHT)


def test_normalization(model, pixels):
    found = segmentation.predict(model, pixels, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    check(found, model(((pixels / 255 - mean) / std)[None]).detach().softmax(1))


def test_the_mode_of_the_model_is_restored(model, pixels):
    expected = segmentation.predict(model, pixels)
    model.train()
    try:
        assert torch.equal(segmentation.predict(model, pixels), expected) and model[2].training
    finally:
        model.eval()


@pytest.mark.parametrize('size', [(1, 1), (1, 40), (40, 1), (33, 64)])
def test_a_segmenter_accepts_any_size(size):
    segmenter = segmentation.create_segmenter('semantic_fpn', 'coc_tiny', 3)
    assert segmentation.predict(segmenter, torch.zeros(3, *size)).shape == size
    sliding = dict(mode='slide', crop=32, flip=True, scales=(0.5, 2))
    assert segmentation.predict(segmenter, torch.zeros(3, *size), **sliding).shape == size


def test_double_and_half_precision(model, pixels):
    expected = segmentation.predict(model, pixels)
    try:
        assert (segmentation.predict(model.double(), pixels) == expected).float().mean() > 0.99
        assert (segmentation.predict(model.bfloat16(), pixels) == expected).float().mean() > 0.9
    finally:
        model.float()


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (np.zeros((3, 8, 8), np.uint8), r'uint8 \[H, W, 3\], got uint8 \[3, 8, 8\]'),
        (np.zeros((8, 8), np.uint8), r'got uint8 \[8, 8\]'),
        (np.zeros((8, 8, 3)), r'got float64 \[8, 8, 3\]'),
        (np.zeros((0, 8, 3), np.uint8), r'got uint8 \[0, 8, 3\]'),
        (torch.zeros(8, 8, 3), r'tensor \[3, H, W\], uint8 or float, got torch.float32 \[8, 8, 3\]'),
        (torch.zeros(1, 3, 8, 8), r'got torch.float32 \[1, 3, 8, 8\]'),
        (torch.zeros(3, 8, 0), r'got torch.float32 \[3, 8, 0\]'),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r'got torch.int64'),
        (torch.full((3, 8, 8), 255.0), 'values from 255 to 255, expected 0 to 1: divide by 255'),
        (torch.full((3, 8, 8), -0.1), 'values from -0.1 to -0.1'),
        (torch.full((3, 8, 8), math.nan), 'values from nan to nan'),
        ('cat.jpg', 'expected a PIL image, an array or a tensor, got a str'),
        (None, 'got a NoneType'),
    ],
)
def test_invalid_images(model, image, message):
    with pytest.raises(ImageError, match=message) as error:
        segmentation.predict(model, image)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(mode='window'), "mode 'window': expected whole or slide"),
        (dict(mode='slide'), 'needs a crop'),
        (dict(mode='slide', crop=16, stride=17), 'stride 17'),
        (dict(chunk=0), 'chunk 0'),
        (dict(scales=()), 'ratios'),
        (dict(scales=(1, -1)), 'ratios'),
        (dict(scale=(0, 4)), 'scale'),
        (dict(std=(1, 0, 1)), 'std above 0'),
        (dict(mean=(0.5,)), 'three numbers each'),
    ],
)
def test_invalid_options(model, pixels, options, message):
    with pytest.raises(OptionError, match=f'^predict: .*{message}'):
        segmentation.predict(model, pixels, **options)


def test_outputs_that_are_not_finite(pixels):
    class Broken(nn.Module):
        def forward(self, x):
            return x / 0

    with pytest.raises(CheckpointError, match='not finite') as error:
        segmentation.predict(Broken(), pixels)
    assert isinstance(error.value, UserError)
