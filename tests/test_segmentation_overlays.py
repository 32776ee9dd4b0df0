"""IndexedImages of predictions: what is where in them, and which images get one."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torchvision import tv_tensors

from segmentation.engine.overlays import OverlayWriter, draw_overlay

CLASSES = ('sky', 'road', 'tree', 'car')
COLOURS = np.array([(0, 0, 255), (255, 0, 0), (0, 255, 0), (200, 200, 0)], np.uint8)
HEIGHT, WIDTH = 90, 120
PAINT = (120, 60, 30)  # of the photograph: no shade of grey, which writing has at its edges


@pytest.fixture
def photograph():
    return torch.tensor(PAINT, dtype=torch.uint8).view(3, 1, 1).expand(3, HEIGHT, WIDTH)


@pytest.fixture
def masks():
    """The prediction, of sky and road, and the truth, with a tree and pixels without a label."""
    prediction = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    prediction[HEIGHT // 2 :] = 1
    truth = prediction.clone()
    truth[:, : WIDTH // 3] = 2
    truth[:, -WIDTH // 3 :] = 255
    return prediction, truth


def find(picture, colour):
    """(left, top, right, bottom) of the pixels of a colour, None if there are none."""
    same = ImageChops.difference(picture, Image.new('RGB', picture.size, tuple(int(c) for c in colour)))
    return Image.fromarray((np.asarray(same).sum(2) == 0).astype(np.uint8) * 255).getbbox()


def blended(colour):
    """A class's colour over the photograph, at the overlay's opacity."""
    return [int(under + 0.55 * (int(over) - under)) for under, over in zip(PAINT, colour)]


def test_panels_lie_side_by_side(photograph, masks):
    prediction, truth = masks
    picture = draw_overlay(photograph, prediction, CLASSES, COLOURS, truth, name='street.jpg')
    left, top, right, bottom = find(picture, PAINT)
    assert (right - left, bottom - top) == (WIDTH, HEIGHT)
    pixels = np.asarray(picture)[top:bottom]
    step = WIDTH + 10
    middle = pixels[:, left + step :][:, :WIDTH]
    last = pixels[:, left + 2 * step :][:, :WIDTH]
    for panel, mask in ((middle, truth), (last, prediction)):
        for label, colour in (*enumerate(COLOURS), (255, (0, 0, 0))):
            found = panel[(mask == label).numpy()]
            assert np.abs(found.astype(int) - blended(colour)).max(initial=0) <= 1
    assert picture.width == left + 2 * step + WIDTH + 10


def test_legend_has_the_classes_that_occur(photograph, masks):
    prediction, truth = masks
    legend = {name: tuple(map(int, colour)) for name, colour in zip(CLASSES, COLOURS)}
    alone = draw_overlay(photograph, prediction, CLASSES, COLOURS)
    both = draw_overlay(photograph, prediction, CLASSES, COLOURS, truth)
    for picture, there in ((alone, {'sky', 'road'}), (both, {'sky', 'road', 'tree'})):
        for name, colour in legend.items():
            box = find(picture, colour)
            assert (box is not None) == (name in there)
            assert box is None or box[1] > HEIGHT  # below the panels, which have no pure colours
    assert find(both, (0, 0, 0)) is not None  # what has no label
    assert find(alone, (0, 0, 0)) is None


def test_names_and_title_are_written(photograph, masks):
    """By their pixels: PIL writes the same word the same way."""
    picture = draw_overlay(photograph, masks[0], CLASSES, COLOURS, name='street.jpg')
    ink = np.asarray(picture.convert('L')) < 128
    for word in ('street.jpg', 'prediction', 'sky', 'road'):
        font = ImageFont.load_default(12)
        left, top, right, bottom = map(int, font.getbbox(word, anchor='lm'))
        sample = Image.new('L', (right - left + 1, bottom - top + 1), 255)
        ImageDraw.Draw(sample).text((-left, -top), word, 30, font, anchor='lm')
        pattern = np.asarray(sample) < 128
        windows = np.lib.stride_tricks.sliding_window_view(ink, pattern.shape)
        assert (windows == pattern).all((2, 3)).any(), word


def test_many_classes_go_on_in_further_lines(photograph):
    names = [f'class number {i}' for i in range(40)]
    mask = (torch.arange(HEIGHT * WIDTH) % 40).view(HEIGHT, WIDTH)
    colours = np.stack([np.arange(40) * 6, np.full(40, 77), 255 - np.arange(40) * 6], 1).astype(np.uint8)
    picture = draw_overlay(photograph, mask, names, colours, mask)
    boxes = [find(picture, colour) for colour in colours]
    assert len({box[1] for box in boxes}) > 5
    assert all(box[2] <= picture.width and box[3] <= picture.height for box in boxes)
    size = boxes[0][2] - boxes[0][0]
    assert all((box[2] - box[0], box[3] - box[1]) == (size, size) for box in boxes)  # none is cut or covered


@pytest.mark.parametrize('kind', [list, np.asarray, torch.as_tensor])
def test_colours_of_any_kind(photograph, masks, kind):
    expected = draw_overlay(photograph, masks[0], CLASSES, COLOURS)
    assert not ImageChops.difference(draw_overlay(photograph, masks[0], CLASSES, kind(COLOURS)), expected).getbbox()


class Streets:
    """Ten images as a dataset whose transform makes other ones of them."""

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


def test_writer_draws_a_few_spread_over_the_dataset(tmp_path):
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
    with Image.open(tmp_path / 'run' / 'overlays' / names[1]) as picture:
        assert not ImageChops.difference(picture, expected).getbbox()
    assert dataset.transform is not None  # the dataset itself goes on as it is


@pytest.mark.parametrize(('count', 'chosen'), [(0, 0), (1, 1), (10, 10), (50, 10)])
def test_writer_draws_as_many_as_there_are(tmp_path, count, chosen):
    assert len(OverlayWriter(Streets(), tmp_path, count).chosen) == chosen
