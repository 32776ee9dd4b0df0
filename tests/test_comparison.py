"""cluster_zoo.comparison: files that are wrong somewhere, and images for which rounding decides."""

import pytest
import timm
import torch

from cluster_zoo.comparison import ExportError, compare

SHAPES = ((1, 32, 32), (3, 32, 69), (2, 40, 40), (1, 69, 40))


@pytest.fixture(scope='module', params=['coc_tiny', 'fec_small'])
def model(request):
    """A small network whose branches count."""
    torch.manual_seed(0)
    sizes = dict(depths=(1, 1), dims=(8, 16), mlp_ratios=(2, 2), num_heads=(2, 2), head_dim=8, proposals=2, regions=1)
    return timm.create_model(request.param, num_classes=3, init_values=0.5, **sizes).eval()


def _compare(model, change):
    with torch.no_grad():
        return compare(model, lambda images: change(model(images), images), SHAPES)


def _rows(chosen):
    return chosen.unsqueeze(1)


def _bright(images):
    return _rows(images.mean((1, 2, 3)) > 0)


def _smooth(images):
    return _rows((images[:, :, 1:] - images[:, :, :-1]).abs().mean((1, 2, 3)) < 0.5)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda logits, images: logits + 2e-4, 'for 1 image of 32 x 32 px their outputs differ by 2.0e-04, more than'),
        (lambda logits, images: torch.where(_bright(images), torch.nan, logits), 'the file gives .* not finite'),
        (lambda logits, images: torch.where(_bright(images), -torch.inf, logits), 'the file gives .* not finite'),
        (lambda logits, images: logits + 100 * _bright(images), 'differ by 1.0e'),
        (lambda logits, images: logits + 100 * ~_bright(images), 'differ by 1.0e'),
        (lambda logits, images: logits + 1e-3 * _smooth(images), 'differ by 1.0e-03'),
        (lambda logits, images: logits + 1e-3 * ~_smooth(images), 'differ by 1.0e-03'),
        (lambda logits, images: logits + (images.shape[2] > images.shape[3]), 'for 1 image of 69 x 40 px'),
        (lambda logits, images: logits + _rows(torch.arange(len(images)) == 2), 'for 3 images of 32 x 69 px .* 1.0e'),
        (lambda logits, images: logits[:1], r'for 3 images of 32 x 69 px it gives \[1, 3\], the model \[3, 3\]'),
        (lambda logits, images: 1 / 0, 'does not run on 1 image of 32 x 32 px: division by zero'),
    ],
)
def test_whatever_is_wrong_is_found(model, change, message):
    with pytest.raises(ExportError, match=message):
        _compare(model, change)


def test_the_difference_is_that_of_the_shape(model):
    """An earlier one within the tolerance, or a later one beyond it, is not what is reported."""
    wrong = {69: 3e-3, 40: 8e-3}
    with pytest.raises(ExportError, match=r'3 images of 32 x 69 px their outputs differ by 3\.0e-03'):
        _compare(model, lambda logits, images: logits + wrong.get(images.shape[3], 5e-5))


def test_what_agrees(model):
    near, far, images = _compare(model, lambda logits, images: logits + 5e-5)
    assert near == pytest.approx(5e-5, rel=1e-2) and far == [] and images == 2 * 7


def test_a_model_whose_own_results_are_not_finite():
    with pytest.raises(ExportError, match=r'the model gives .* not finite'):
        compare(_Edge(0.0, step=torch.nan), _Edge(0.0), SHAPES)


class _Edge(torch.nn.Module):
    """One thing or another, as the first pixel is above an edge or not."""

    in_chans = 3

    def __init__(self, edge, inclusive=False, step=0.02):
        super().__init__()
        self.edge, self.inclusive, self.step = edge, inclusive, step

    def forward(self, images):
        pixels = images[:, 0, 0, :1]
        above = pixels >= self.edge if self.inclusive else pixels > self.edge
        return torch.cat([self.step * above, images.mean((1, 2, 3)).unsqueeze(1)], 1)


@pytest.fixture(scope='module')
def pixel():
    """The first of the third image that is compared."""
    seen = []
    compare(_Edge(9.0), lambda images: (seen.append(images[0, 0, 0, 0].item()), _Edge(9.0)(images))[1], SHAPES)
    return seen[2]


def test_an_image_that_rounding_decides_is_counted_and_no_error(pixel):
    near, far, images = compare(_Edge(pixel), _Edge(pixel, inclusive=True), SHAPES)
    assert near == 0 and far == [pytest.approx(0.02)] and images == 14


@pytest.mark.parametrize('shift', [-1e-3, 1e-3])
def test_an_image_that_is_merely_near_is_an_error(pixel, shift):
    with pytest.raises(ExportError, match=r'for 3 images of 32 x 69 px their outputs differ by 2\.0e-02'):
        compare(_Edge(pixel - shift / 2), _Edge(pixel + shift / 2), SHAPES)


def test_an_undecided_image_has_to_be_one_or_the_other(pixel):
    """Not something third, even where it differs by less."""
    with pytest.raises(ExportError, match=r'differ by 1\.0e-02'):
        compare(_Edge(pixel), _Edge(pixel, inclusive=True, step=0.01), SHAPES)


def test_too_many_undecided_images():
    def toss(images, sign=1):
        return (sign * torch.sin(1e8 * images[:, 0, 0, :1]) > 0).float()

    model = _Edge(0.0)
    model.forward = toss
    with pytest.raises(ExportError, match='can not be compared with the model: 14 of 14 images'):
        compare(model, lambda images: toss(images, -1), SHAPES)
