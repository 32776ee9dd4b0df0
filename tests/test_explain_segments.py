"""Segments and contributions: composed assignments, k-means, parts that sum to the logit, logits without a cluster."""

import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import cluster_zoo  # noqa: F401
from cluster_zoo.errors import OptionError
from cluster_zoo.explain import (
    center_view,
    cluster_maps,
    contributions,
    remove_cluster,
    segments,
    similar_patches,
)

SIZES = dict(dims=(16, 16, 24, 24), mlp_ratios=(2,) * 4, num_heads=(2,) * 4, head_dim=8, num_classes=5)
SMALL = dict(depths=(1, 1, 1, 2), **SIZES)


@pytest.fixture(scope='module', params=['fec_small', 'coc_tiny', 'coc_tiny_plain'])
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, **SMALL).eval()


@pytest.fixture(scope='module')
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((210, 150), Image.Resampling.BICUBIC)


# --- segments ---------------------------------------------------------------------------------------------------------


def test_every_pixel_ends_in_a_point_of_the_last_stage(model, photo):
    """One pixel after the other, through the poolings of FEC or the patches of Context Cluster."""
    maps = cluster_maps(model, photo, size=100)  # 100 x 140 pixels: 25 x 35, 13 x 18, 7 x 9, 4 x 5 points
    found = segments(model, maps, 4)
    width = [maps.at(stage).center.shape[-1] for stage in range(4)]
    assert found.labels.shape == (150, 210) and found.points.shape == (25, 35)
    for y, x in np.ndindex(25, 35):
        row, column = y, x
        for stage in (1, 2, 3):
            if 'FEC' in type(model).__name__:
                center = maps.at(stage, None).center[0, 0, row, column]
                row, column = divmod(center, width[stage])
            else:
                row, column = row // 2, column // 2
        assert found.points[y, x] == row * width[3] + column
    for y, x in np.ndindex(150, 210):
        point = found.points[int((y + 0.5) * 100 / 150) // 4, int((x + 0.5) * 140 / 210) // 4]
        assert found.labels[y, x] == found.point_labels.flatten()[point]


def test_segments_separate_features(photo):
    """Points of the last stage with two kinds of features become two segments, the larger one first."""
    torch.manual_seed(0)
    model = timm.create_model('coc_tiny_plain', **SMALL)
    kind = torch.zeros(4, 5, dtype=torch.int64)
    kind[1:3, 1:3] = 1
    features = torch.randn(2, 24)[kind].permute(2, 0, 1)
    features = features * (1 + torch.rand(1, 4, 5)) + 0.01 * torch.randn(24, 4, 5)  # the length does not matter
    maps = cluster_maps(model, photo, size=100)
    object.__setattr__(maps, 'features', features.unsqueeze(0))
    found = segments(model, maps, 2)
    assert np.array_equal(found.point_labels, kind.numpy())
    assert np.bincount(found.labels.flatten()).argmax() == 0


@pytest.mark.parametrize(('k', 'expected'), [(1, 1), (3, 3), (20, 20), (1000, 20)])
def test_number_of_segments(model, photo, k, expected):
    found = segments(model, photo, k, size=100)
    assert found.k == expected and set(np.unique(found.point_labels)) == set(range(expected))
    sizes = np.bincount(found.labels.flatten(), minlength=expected)
    assert (np.diff(np.bincount(found.point_labels.flatten()[found.points].flatten(), minlength=expected)) <= 0).all()
    assert sizes.sum() == 150 * 210
    again = segments(model, photo, k, size=100)
    assert np.array_equal(found.labels, again.labels)


def test_wrong_segments(model, photo, monkeypatch):
    with pytest.raises(ValueError, match='at least 1, got 0'):
        segments(model, photo, 0)
    with pytest.raises(ValueError, match='Expected one image'):
        segments(model, [photo, photo], 2, size=64)
    with pytest.raises(ValueError, match='maps of all stages'):
        segments(model, cluster_maps(model, photo, stage=0), 2)
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    with pytest.raises(OptionError, match=r"pip install 'cluster_zoo\[explain\]'"):
        segments(model, photo, 2, size=64)


# --- contributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('head', [0, 1, -1])
def test_parts_sum_to_the_logit(model, photo, head):
    maps = cluster_maps(model, photo, size=100)
    for index in range(5):
        parts = contributions(model, maps, index, head)
        assert parts.points.sum() + parts.bias == pytest.approx(maps.logits[0, index].item(), abs=1e-5)
        assert parts.clusters.sum() == pytest.approx(parts.points.sum(), abs=1e-12)
        for center, value in enumerate(parts.clusters):
            assert value == pytest.approx(parts.points[parts.center == center].sum(), abs=1e-12)
        assert np.array_equal(parts.center, maps.at(-1).center[0, head])
    assert contributions(model, maps).class_index == maps.logits[0].argmax()
    assert parts.class_name == 'class 4'
    assert parts.probability == pytest.approx(maps.logits[0].softmax(0)[4].item())


def test_points_are_gradient_times_normalized_features(model, photo):
    """The head is linear in the normalized features, so that autograd gives the same parts."""
    maps = cluster_maps(model, photo, size=100)
    normalized = model.norm(maps.features).detach().requires_grad_()
    model.forward_head(normalized)[0, 2].backward()
    expected = (normalized.grad * normalized).sum(1)[0].detach().numpy()
    np.testing.assert_allclose(contributions(model, maps, 2).points, expected, atol=1e-6)


def test_logits_without_a_cluster(model, photo):
    """The head applied to the other points only, written out in float64."""
    maps = cluster_maps(model, photo, size=100)
    center = maps.at(-1).center[0, 1]
    removed = center[0, 0]
    points = maps.features[0].double().permute(1, 2, 0).numpy()[center != removed]
    norm, fc = model.norm, model.head.fc
    points = (points - points.mean()) / np.sqrt(points.var() + norm.eps)
    points = points * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()
    expected = fc.weight.detach().double().numpy() @ points.mean(0) + fc.bias.detach().double().numpy()
    np.testing.assert_allclose(remove_cluster(model, photo, removed, head=1, size=100), expected, atol=1e-5)
    with pytest.raises(ValueError, match='No point of the last block joined center 99'):
        remove_cluster(model, maps, 99)


def test_only_one_cluster(photo):
    model = timm.create_model('coc_tiny', proposals=1, regions=1, **SMALL)
    with pytest.raises(ValueError, match='Every point of the last block joined center 0'):
        remove_cluster(model, photo, 0, size=64)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('coc_tiny', dict(global_pool=''), 'average pooling and a linear classifier'),
        ('coc_tiny', dict(global_pool='max'), 'average pooling and a linear classifier'),
        ('dnc_coc_tiny', {}, 'explained by cluster_zoo.explain.explain'),
        ('test_resnet', {}, 'ResNet is no Context Cluster or FEC classifier'),
    ],
)
def test_contributions_of_other_models(photo, name, options, message):
    with pytest.raises(ValueError, match=message):
        contributions(timm.create_model(name, **options), photo, size=64)


def test_wrong_class_and_head(model, photo):
    with pytest.raises(ValueError, match='no class 5: expected 0 to 4'):
        contributions(model, photo, 5, size=64)
    with pytest.raises(ValueError, match='no head 2: expected -2 to 1'):
        contributions(model, photo, head=2, size=64)


# --- centers ----------------------------------------------------------------------------------------------------------


def layer_features(model, layer, image):
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = cluster_maps(model, image, size=100).inputs
    handle.remove()
    return layer.f(seen[0]).detach()[0], inputs


@pytest.mark.parametrize(('stage', 'block', 'head'), [(0, 0, 1), (1, 0, 0), (3, 1, 1), (2, None, 0)])
def test_center_view(model, photo, stage, block, head):
    if block is None and 'FEC' not in type(model).__name__:
        with pytest.raises(ValueError, match='no cluster pooling into stage 2'):
            center_view(model, photo, stage, block, head, 0)
        return
    found = cluster_maps(model, photo, size=100).at(stage, block)
    center = int(found.center[0, head, -1, -1])
    view = center_view(model, photo, stage, block, head, center, size=100)
    members = found.center[0, head] == center
    assert np.array_equal(view.members, members) and members.any()
    np.testing.assert_allclose(view.similarity[members], found.similarity[0, head][members], atol=1e-5)
    compared = found.region[found.center[0, head]] == found.region[center]
    assert np.array_equal(np.isnan(view.similarity), ~compared)
    assert (view.similarity[compared] <= found.similarity[0, head][compared] + 1e-5).all()  # its own center is nearer

    # The most similar point of other images, among all points
    others = [photo.rotate(180), photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new('RGB', (60, 60), 'red')]
    layer = model.stages[stage].downsample if block is None else model.stages[stage].blocks[block].token_mixer
    patches = similar_patches(model, view, others, count=2, size=100)
    expected = []
    for number, other in enumerate(others):
        features, inputs = layer_features(model, layer, other)
        features = features.unflatten(0, (-1, len(view.feature)))[head]
        similarity = torch.cosine_similarity(features, view.feature[:, None, None], dim=0)
        row, column = divmod(int(similarity.argmax()), similarity.shape[1])
        factor = other.width / inputs.shape[-1]
        corner = (round(column * found.stride * factor), round(row * found.stride * factor))
        expected.append((similarity.max().item(), number, corner))
    expected.sort(reverse=True)
    for patch, (value, number, corner) in zip(patches, expected[:2], strict=True):
        assert patch.image is others[number]
        assert patch.similarity == pytest.approx(value, abs=1e-4)
        assert patch.box[:2] == corner
        assert patch.pixels.width >= patch.box[2] - patch.box[0]


@pytest.mark.parametrize(
    ('where', 'message'),
    [((0, 7, 0, 0), 'no block 7 in stage 0'), ((0, 0, 2, 0), 'no head 2'), ((0, 0, 0, 10**6), 'no center 1000000')],
)
def test_center_that_does_not_exist(model, photo, where, message):
    with pytest.raises(ValueError, match=message):
        center_view(model, photo, *where, size=64)


def test_similar_patches_of_files(model, photo, tmp_path):
    photo.save(tmp_path / 'a.png')
    view = center_view(model, photo, 0, 0, 0, 0, size=64)
    (patch,) = similar_patches(model, view, [str(tmp_path / 'a.png')], size=64)
    assert patch.image == str(tmp_path / 'a.png')
