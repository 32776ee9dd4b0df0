"""Figures of clusters: mean colors, outlines, signs of contributions, panels; and the report of one image."""

import base64
import io
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import cluster_zoo  # noqa: F401
from cluster_zoo.explain import (
    anchor,
    center_view,
    cluster_maps,
    contributions,
    draw_center,
    draw_clusters,
    draw_contributions,
    draw_film,
    draw_page,
    explain_image,
    html_page,
    report,
    segments,
    similar_patches,
)

SMALL = dict(depths=(1, 1, 1, 2), dims=(16, 16, 24, 24), mlp_ratios=(2,) * 4, num_heads=(2,) * 4, head_dim=8)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('fec_small', num_classes=5, **SMALL).eval()


@pytest.fixture(scope='module')
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope='module')
def explained(model, photo):
    return explain_image(model, photo, 'photo.png', size=100)


def test_groups_have_their_mean_color(photo):
    labels = np.random.default_rng(1).integers(0, 3, (100, 140))
    figure = np.array(draw_clusters(photo, labels, opacity=1, line=0))
    for label in range(3):
        mean = np.array(photo, float)[labels == label].mean(0)
        assert (np.abs(figure[labels == label] - mean) <= 0.5).all()
    assert draw_clusters(photo, labels, opacity=0, line=0).tobytes() == photo.tobytes()
    half = np.array(draw_clusters(photo, labels, opacity=0.5, line=0), float)
    assert np.abs(half - (np.array(photo, float) + figure) / 2).max() <= 1


def test_outlines_are_where_labels_change(photo):
    labels = np.zeros((100, 140), int)
    labels[40:, 70:] = 5
    figure = np.array(draw_clusters(photo, labels, opacity=1, line=2))
    white = (figure == 255).all(-1)
    rows, columns = np.nonzero(white)
    assert white[50:99, 69:71].all() and white[39:41, 80:].all()
    assert rows.min() >= 39 and columns.min() >= 69 and white.sum() < 2 * (60 + 70) + 4
    assert not (np.array(draw_clusters(photo, np.zeros((100, 140), int))) == 255).all(-1).any()


def test_labels_of_another_size(photo):
    with pytest.raises(ValueError, match=r'Expected labels \[100, 140\]'):
        draw_clusters(photo, np.zeros((10, 14), int))


def test_contributions_are_green_or_orange(model, photo):
    maps = cluster_maps(model, photo, size=100)
    parts = contributions(model, maps)
    figure = np.array(draw_contributions(photo.convert('L'), maps, parts, line=0), float)
    labels = maps.at_pixels(parts.center, 32, photo.size)
    largest = np.abs(parts.clusters).argmax()
    redness = np.median((figure[..., 0] - figure[..., 1])[labels == largest])
    assert redness > 0 if parts.clusters[largest] < 0 else redness < 0


def test_page_has_a_panel_for_each_stage(model, explained):
    """The panels of the page are the drawings of the single maps."""
    page = draw_page([explained], groups=segments(model, explained.maps, 3))
    assert page.width == 1600
    width = (1600 - 16) // 4 - 16
    height = round(width * 100 / 140)
    photo = explained.image.resize((width, height), Image.Resampling.LANCZOS)
    for panel, stage in ((1, 0), (2, 1), (3, 2), (4, 3)):
        left, top = 16 + panel % 4 * (width + 16), 16 + panel // 4 * (height + 32 + 16) + 32
        found = explained.maps.at(stage)
        labels = explained.maps.at_pixels(found.center[0, 0], found.stride, photo.size)
        shown = np.array(page.crop((left, top, left + width, top + height)))
        drawings = [draw_clusters(photo, labels, opacity, line) for opacity, line in ((0.6, 2), (0.6, 1), (0.9, 0))]
        assert any(np.array_equal(shown, np.array(drawing)) for drawing in drawings)


def test_choice_of_panels(explained):
    def rows(columns, **options):
        width = (1600 - 16) // columns - 16
        height = round(width * 100 / 140) + 32 + 16
        return (draw_page([explained], **options).height - 60) // height

    assert rows(4) == 2  # image, 4 stages, all poolings, contributions
    assert rows(3, stage=3) == 2  # image, pooling, 2 blocks, all poolings, contributions
    assert rows(3, stage=0, block=0) == 2
    assert rows(4, every=True) == 3  # image, 3 poolings, 5 blocks, all poolings, contributions
    for options in (dict(stage=4), dict(block=1, stage=0), dict(head=2)):
        with pytest.raises(ValueError, match='has no'):
            draw_page([explained], **options)
    assert draw_page([explained] * 3).width == 16 + 7 * 316


def test_film(explained):
    frames = draw_film(explained.maps, head=1)
    assert len(frames) == 1 + 3 + 5 and {frame.size for frame in frames} == {frames[0].size}


def test_center_and_patches(model, photo):
    """The brightest points are the most similar ones; patches are beside them."""
    found = cluster_maps(model, photo, size=100).at(1, 0)
    view = center_view(model, photo, 1, 0, 1, int(found.center[0, 1, 0, 0]), size=100)
    patches = similar_patches(model, view, [photo, photo.rotate(180)], size=100)
    figure = draw_center(photo, view, patches)
    assert figure.width == 16 + 760 + 16 + 2 * (150 + 16)
    alone = draw_center(Image.new('RGB', photo.size, 'gray'), view)
    assert alone.width == 16 + 760 + 16
    shown = np.array(alone.crop((16, 16 + 32, 16 + 760, 16 + 32 + round(760 * 100 / 140))))[..., 0].astype(float)
    similarity = view.at_pixels(view.similarity, (760, len(shown)))
    inside = ~view.at_pixels(view.members, (760, len(shown)))  # outlines surround the members
    points = [shown[inside & (similarity == value)] for value in np.unique(similarity[inside])]
    medians = [np.median(values) for values in points if len(values) > 100]
    assert len(medians) > 5 and medians == sorted(medians) and medians[-1] > medians[0] + 20


def test_report_is_json_with_the_same_numbers(model, explained):
    data = json.loads(json.dumps(report(model, explained, ks=[2, 3], top=3)))
    assert (data['name'], data['width'], data['height'], data['input']) == ('photo.png', 140, 100, [100, 140])
    probability = explained.maps.logits[0].softmax(0)
    assert [one['index'] for one in data['classes']] == probability.topk(3).indices.tolist()
    assert [one['probability'] for one in data['classes']] == pytest.approx(probability.topk(3).values.tolist())
    for layer, found in zip(data['layers'], explained.maps.maps, strict=True):
        assert (layer['stage'], layer['block'], tuple(layer['grid'])) == (found.stage, found.block, found.grid)
        assert np.array_equal(layer['center'], found.center[0].reshape(found.heads, -1))
        np.testing.assert_allclose(layer['similarity'], found.similarity[0].reshape(found.heads, -1), atol=6e-4)
        assert layer['region'] == found.region.tolist()
    three = segments(model, explained.maps, 3)
    assert data['segments']['3'] == three.point_labels.flatten().tolist()
    assert data['ends']['points'] == three.points.flatten().tolist()
    for one in data['contributions']:
        assert sum(one['points']) + one['bias'] == pytest.approx(one['logit'], abs=1e-4)
        assert one['logit'] == pytest.approx(explained.maps.logits[0, one['index']].item(), abs=1e-6)
    assert data['neighbours'] == []


def test_class_that_is_asked_for_comes_first(model, photo):
    last = int(cluster_maps(model, photo, size=64).logits[0].argmin())
    data = report(model, explain_image(model, photo, size=64, class_index=last), top=2)
    assert data['contributions'][0]['index'] == last and len(data['contributions']) == 3


@pytest.mark.parametrize('name', ['dnc_coc_tiny', 'dnc_resnet18_cifar'])
def test_report_of_centroids(name, photo):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            return photo.rotate(40 * index), index % 3

    anchor(model, Images(), thumbnail=8)
    explained = explain_image(model, photo, size=32)
    data = report(model, explained)
    decision = explained.decision
    predicted = [one for one in data['neighbours'] if one['predicted']]
    assert [one['similarity'] for one in predicted] == [one.similarity for one in decision.neighbours]
    (other,) = (one for one in data['neighbours'] if not one['predicted'])
    assert other['label'] == decision.competitor.class_name and other['label'] != predicted[0]['label']
    assert [one['index'] for one in data['classes']][:2] == [decision.class_index, decision.competitor.class_index]
    assert bool(data['layers']) == (name == 'dnc_coc_tiny') and data['contributions'] == []
    assert html_page(model, name, [explained]).count('data:image/png;base64,') == len(data['neighbours'])


def test_web_page_is_one_file(model, photo):
    hostile = '</script><script>alert(1)</script><!--'
    page = html_page(model, 'fec_small', [explain_image(model, photo, hostile, size=64)])
    assert hostile not in page and page.count('</script') == page.count('<script') == 1
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//|@import|url\(', page)
    records = json.loads(page.split('const RECORDS = ', 1)[1].split(';\n', 1)[0])
    assert records[0]['name'] == hostile and list(records[0]['segments']) == [str(k) for k in range(2, 13)]
    shown = Image.open(io.BytesIO(base64.b64decode(records[0]['photo'].partition(',')[2])))
    assert shown.size == photo.size
