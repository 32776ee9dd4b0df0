"""benchmarks/explain.py: the measures of segments and of orders of pixels against plain loops; masks of COCO."""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip('scipy')
SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'explain.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('explain_benchmark', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_boundary(labels, y, x):
    neighbors = [(y, x + 1), (y + 1, x)]
    pairs = [(labels[y][x], labels[i][j]) for i, j in neighbors if i < len(labels) and j < len(labels[0])]
    return any(a != b and a >= 0 and b >= 0 for a, b in pairs)


def plain_measures(labels, truth, tolerance):
    pixels = [(y, x) for y in range(len(truth)) for x in range(len(truth[0]))]
    edges = [(y, x) for y, x in pixels if plain_boundary(truth, y, x)]
    cuts = [(y, x) for y, x in pixels if plain_boundary(labels, y, x)]
    near = [any(max(abs(y - i), abs(x - j)) <= tolerance for i, j in cuts) for y, x in pixels]
    hits = sum(hit and (y, x) in edges for hit, (y, x) in zip(near, pixels))
    known = [(y, x) for y, x in pixels if truth[y][x] >= 0]
    error = correct = 0
    for segment in {labels[y][x] for y, x in known}:
        members = [truth[y][x] for y, x in known if labels[y][x] == segment]
        error += sum(min(members.count(region), len(members) - members.count(region)) for region in set(members))
        correct += max(members.count(region) for region in set(members))
    recall = 100 * hits / len(edges) if edges else math.nan
    percent = dict(near=sum(near) / len(pixels), error=error / len(known), accuracy=correct / len(known))
    return dict(recall=recall, **{name: 100 * value for name, value in percent.items()})


@pytest.mark.parametrize('tolerance', [0, 1, 2])
@pytest.mark.parametrize('seed', range(5))
def test_measures_equal_plain_loops(script, seed, tolerance):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(-1, 3, (3, 4))  # with ignored pixels and labels that are not consecutive
    truth = 5 * coarse.repeat(4, 0).repeat(3, 1)[:11]
    truth[truth < 0] = -1
    labels = generator.integers(0, 6, (4, 3)).repeat(3, 0).repeat(4, 1)[:11]
    assert labels.shape == truth.shape == (11, 12)
    expected = plain_measures(labels.tolist(), truth.tolist(), tolerance)
    assert script.measure(labels, truth, tolerance) == pytest.approx(expected, nan_ok=True)


def test_measures_of_halves(script):
    """4 x 4 pixels in left and right halves; the only cut of the segments is one column to the right."""
    truth = np.array([[0, 0, 1, 1]] * 4)
    perfect = dict(near=100, recall=100, error=0, accuracy=100)
    assert script.measure(truth, truth) == perfect
    assert script.measure(np.arange(16).reshape(4, 4), truth) == perfect
    shifted = np.array([[0, 0, 0, 1]] * 4)
    # Segment 0 has 8 pixels in the left half and 4 in the right: min(8, 4) + min(4, 8) of 16 pixels.
    assert script.measure(shifted, truth, 0) == dict(near=25, recall=0, error=50, accuracy=75)
    assert script.measure(shifted, truth, 1) == dict(near=75, recall=100, error=50, accuracy=75)
    assert script.measure(np.zeros_like(truth), truth) == dict(near=0, recall=0, error=100, accuracy=50)
    assert math.isnan(script.measure(truth, np.zeros_like(truth))['recall'])


def test_ignored_pixels_do_not_count(script):
    truth = np.array([[0, 0, -1, -1, 1, 1]] * 3)
    labels = np.array([[0, 0, 0, 1, 1, 1]] * 3)
    measured = script.measure(labels, truth)
    assert math.isnan(measured['recall']) and (measured['error'], measured['accuracy']) == (0, 100)


def test_numbers_of_segments(script):
    pytest.importorskip('skimage')
    labels = np.array([[0, 1, 0], [1, 1, 0], [0, 1, 2]])
    assert script.count_segments(labels) == dict(segments=3, parts=5)


@pytest.mark.parametrize('k', [1, 2, 10, 25, 50, 100])
def test_grid(script, k):
    for size in ((480, 360), (64, 64), (300, 30)):
        cells = script.grid(Image.new('RGB', size), k)
        assert cells.shape == size[::-1]
        areas = np.bincount(cells.ravel())
        assert abs(len(areas) - k) <= 0.2 * k and areas.min() > 0.7 * areas.max()


def test_masks_of_coco(script):
    """The runs are 3, 4, 5, 100, 40, 8 (column by column); from the fourth on, differences to the run two before."""
    mask = script.decode_mask([16, 10], encode([3, 4, 5, 100, 40, 8]))
    expected = np.zeros(160, bool)
    expected[3:7] = expected[12:112] = expected[152:] = True
    assert (mask == expected.reshape(10, 16).T).all()


def encode(runs):
    text = ''
    for index, value in enumerate(runs):
        value -= runs[index - 2] if index > 2 else 0
        while True:
            digit, value = value & 31, value >> 5
            last = value == (-1 if digit & 16 else 0)
            text += chr(48 + digit + (0 if last else 32))
            if last:
                break
    return text


def test_ranks(script):
    importance = torch.tensor([[0.5, 0.0, 2.0], [0.0, -1.0, 0.0]])
    rank = script.ranks(importance, seed=0)
    assert (rank[0, 2], rank[0, 0], rank[1, 1]) == (0, 1, 5)
    assert sorted(rank.flatten().tolist()) == list(range(6))
    ties = {tuple(script.ranks(torch.zeros(2, 3), seed).flatten().tolist()) for seed in range(20)}
    assert len(ties) > 10


class LinearProbability(nn.Module):
    """The probability of class 1 is the mean of the image."""

    def forward(self, x):
        return torch.stack([1 - x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1).log()


def test_curve_equals_plain_loop(script):
    generator = torch.Generator().manual_seed(0)
    image, other = torch.rand(2, 3, 4, 5, generator=generator)
    rank = script.ranks(torch.rand(4, 5, generator=generator), seed=1)
    steps = 10
    expected, current = [image.mean().item()], image.clone()
    for position in range(20):
        y, x = (rank == position).nonzero()[0].tolist()
        current[:, y, x] = other[:, y, x]
        if position % 2 == 1:
            expected.append(current.mean().item())
    values = script.curve(LinearProbability(), image, other, rank, 1, steps)
    assert values.tolist() == pytest.approx(expected, abs=1e-6)
    plain = sum((a + b) / 2 / steps for a, b in itertools.pairwise(expected))
    assert script.area(values) == pytest.approx(plain, abs=1e-6)


def test_the_best_order_of_a_linear_model(script):
    """Removing the brightest pixels first has the smallest area of all orders, and the largest in reverse."""
    image = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    areas = [
        script.area(script.curve(LinearProbability(), image, torch.zeros(1, 4, 4), script.ranks(order, 0), 1, 16))
        for order in (image[0], torch.zeros(4, 4), -image[0])
    ]
    assert areas == sorted(areas) and areas[0] < areas[2]
