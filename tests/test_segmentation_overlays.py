"""Overlays: contents of the images, and which images of a dataset are drawn."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torchvision import tv_tensors

from segmentation.engine.overlays import OverlayWriter, draw_overlay

CLASSES = ('sky', 'road', 'tree', 'car')
COLOURS = np.array([(0, 0, 255), (255, 0, 0), (0, 255, 0), (200, 200, 0)], np.uint8)
HEIGHT, WIDTH = 90, 120
PAINT = (120, 60, 30)  # of the image; not gray like the edges of text


@pytest.fixture
def image():
    return torch.tensor(PAINT, dtype=torch.uint8).view(3, 1, 1).expand(3, HEIGHT, WIDTH)


@pytest.fixture
def masks():
    """A prediction of sky and road, and true classes with a tree and ignored pixels."""
    prediction = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    prediction[HEIGHT // 2 :] = 1
    truth = prediction.clone()
    truth[:, : WIDTH // 3] = 2
    truth[:, -WIDTH // 3 :] = 255
    return prediction, truth


def find(overlay, color):
    """Returns the bounding box of the pixels of a color; None if there are none."""
    same = ImageChops.difference(overlay, Image.new('RGB', overlay.size, tuple(int(c) for c in color)))
    return Image.fromarray((np.asarray(same).sum(2) == 0).astype(np.uint8) * 255).getbbox()


def blended(color):
    """Blends the color of a class with the image."""
    return [int(under + 0.55 * (int(over) - under)) for under, over in zip(PAINT, color)]


def test_panels(image, masks):
    prediction, truth = masks
    overlay = draw_overlay(image, prediction, CLASSES, COLOURS, truth, name='street.jpg')
    left, top, right, bottom = find(overlay, PAINT)
    assert (right - left, bottom - top) == (WIDTH, HEIGHT)
    pixels = np.asarray(overlay)[top:bottom]
    step = WIDTH + 10
    middle = pixels[:, left + step :][:, :WIDTH]
    last = pixels[:, left + 2 * step :][:, :WIDTH]
    for panel, mask in ((middle, truth), (last, prediction)):
        for label, color in (*enumerate(COLOURS), (255, (0, 0, 0))):
            found = panel[(mask == label).numpy()]
            assert np.abs(found.astype(int) - blended(color)).max(initial=0) <= 1
    assert overlay.width == left + 2 * step + WIDTH + 10


def test_legend(image, masks):
    prediction, truth = masks
    legend = {name: tuple(map(int, color)) for name, color in zip(CLASSES, COLOURS)}
    alone = draw_overlay(image, prediction, CLASSES, COLOURS)
    both = draw_overlay(image, prediction, CLASSES, COLOURS, truth)
    for overlay, there in ((alone, {'sky', 'road'}), (both, {'sky', 'road', 'tree'})):
        for name, color in legend.items():
            box = find(overlay, color)
            assert (box is not None) == (name in there)
            assert box is None or box[1] > HEIGHT  # in the legend, because the panels have blended colors
    assert find(both, (0, 0, 0)) is not None  # ignored pixels
    assert find(alone, (0, 0, 0)) is None


def test_text(image, masks):
    """Finds the pixels of the words."""
    overlay = draw_overlay(image, masks[0], CLASSES, COLOURS, name='street.jpg')
    ink = np.asarray(overlay.convert('L')) < 128
    for word in ('street.jpg', 'prediction', 'sky', 'road'):
        font = ImageFont.load_default(12)
        left, top, right, bottom = map(int, font.getbbox(word, anchor='lm'))
        sample = Image.new('L', (right - left + 1, bottom - top + 1), 255)
        ImageDraw.Draw(sample).text((-left, -top), word, 30, font, anchor='lm')
        pattern = np.asarray(sample) < 128
        windows = np.lib.stride_tricks.sliding_window_view(ink, pattern.shape)
        assert (windows == pattern).all((2, 3)).any(), word


def test_legend_with_many_classes(image):
    names = [f'class number {i}' for i in range(40)]
    mask = (torch.arange(HEIGHT * WIDTH) % 40).view(HEIGHT, WIDTH)
    colours = np.stack([np.arange(40) * 6, np.full(40, 77), 255 - np.arange(40) * 6], 1).astype(np.uint8)
    overlay = draw_overlay(image, mask, names, colours, mask)
    boxes = [find(overlay, color) for color in colours]
    assert len({box[1] for box in boxes}) > 5
    assert all(box[2] <= overlay.width and box[3] <= overlay.height for box in boxes)
    size = boxes[0][2] - boxes[0][0]
    assert all((box[2] - box[0], box[3] - box[1]) == (size, size) for box in boxes)  # not cropped or covered


@pytest.mark.parametrize('kind', [list, np.asarray, torch.as_tensor])
def test_types_of_colors(image, masks, kind):
    expected = draw_overlay(image, masks[0], CLASSES, COLOURS)
    assert not ImageChops.difference(draw_overlay(image, masks[0], CLASSES, kind(COLOURS)), expected).getbbox()


class Streets:
    """A dataset of ten images with a transform."""

    classes, colours = CLASSES, COLOURS

    def __init__(self):
        self.transform = lambda image, mask: (torch.zeros(3, 8, 8), mask)

    def __len__(self):
        return 10

    def name(self, index):
        return f'val/images/city/street_{index}.jpg'

    def __getitem__(self, index):
        image = tv_tensors.Image(torch.full((3, HEIGHT, WIDTH), 10 * index, dtype=torch.uint8))
        mask = tv_tensors.Mask(torch.full((HEIGHT, WIDTH), index % 4))
        return self.transform(image, mask) if self.transform else (image, mask)


def test_writer(tmp_path):
    dataset = Streets()
    writer = OverlayWriter(dataset, tmp_path / 'run' / 'overlays', count=3)
    for index in range(10):
        writer(index, torch.full((HEIGHT, WIDTH), index % 4))
    names = sorted(path.name for path in (tmp_path / 'run' / 'overlays').iterdir())
    assert names == ['0001-street_1.png', '0005-street_5.png', '0008-street_8.png']
    expected = draw_overlay(
        torch.full((3, HEIGHT, WIDTH), 50, dtype=torch.uint8),
        torch.full((HEIGHT, WIDTH), 1),
        CLASSES,
        COLOURS,
        torch.full((HEIGHT, WIDTH), 1),
        'street_5.jpg',
    )
    with Image.open(tmp_path / 'run' / 'overlays' / names[1]) as overlay:
        assert not ImageChops.difference(overlay, expected).getbbox()
    assert dataset.transform is not None  # unchanged


@pytest.mark.parametrize(('count', 'chosen'), [(0, 0), (1, 1), (10, 10), (50, 10)])
def test_number_of_overlays(tmp_path, count, chosen):
    assert len(OverlayWriter(Streets(), tmp_path, count).chosen) == chosen
