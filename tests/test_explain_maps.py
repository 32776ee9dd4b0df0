"""Cluster maps agree with plain loops and with the mixers' outputs, for every layer, input and wrapper."""

import copy
import io

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import cluster_zoo  # noqa: F401
from cluster_zoo.errors import ImageError
from cluster_zoo.explain import cluster_maps
from segmentation import create_segmenter

STAGES = dict(depths=(1, 2), dims=(16, 24), mlp_ratios=(2, 2), num_heads=(2, 3), head_dim=8, num_classes=4)


@pytest.fixture(scope='module')
def coc():
    torch.manual_seed(0)
    return timm.create_model('coc_tiny', proposals=(2, 3), regions=(2, 2), **STAGES)


@pytest.fixture(scope='module', params=[1, 2], ids=['one region', 'regions'])
def fec(request):
    torch.manual_seed(0)
    return timm.create_model('fec_small', proposals=2, regions=1, pool_regions=request.param, **STAGES)


def inputs_of(module, model, images):
    """Input of a module in a forward pass."""
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize('size', [(32, 48), (68, 52)], ids=['divides', 'padded inside'])
@pytest.mark.parametrize(('stage', 'block', 'head'), [(0, 0, 1), (1, -1, 2), (-1, 0, 0)])
def test_members_of_a_cluster_get_parallel_outputs(coc, size, stage, block, head):
    """Before the projection, a point's output is its center times a scale: parallel in a cluster, and only there."""
    images = torch.randn(2, 3, *size)
    found = cluster_maps(coc, images).at(stage, block)
    clusters = torch.from_numpy(found.center[:, head])
    stride = 4 * 2 ** (stage % 2)
    assert clusters.shape == (2, *(-(-side // stride) for side in size)) and found.stride == stride

    mixer = coc.stages[stage].blocks[block].token_mixer
    unprojected = copy.deepcopy(mixer).requires_grad_(False)
    unprojected.proj.weight.copy_(torch.eye(len(mixer.proj.weight))[:, :, None, None]), unprojected.proj.bias.zero_()
    outputs = unprojected(inputs_of(mixer, coc, images)).unflatten(1, (mixer.num_heads, -1))[:, head]
    outputs = F.normalize(outputs.flatten(2), dim=1)
    parallel = (outputs.transpose(1, 2) @ outputs) > 1 - 1e-5
    assert torch.equal(parallel, clusters.flatten(1).unsqueeze(1) == clusters.flatten(1).unsqueeze(2))
    assert 1 < clusters.unique().numel() <= np.prod(found.grid)


@pytest.mark.parametrize('size', [(32, 48), (60, 52)], ids=['divides', 'padded inside'])
def test_mixer_against_plain_loops(coc, size):
    """Centers, similarities, regions and positions, one point after the other."""
    images = torch.randn(2, 3, *size)
    found, mixer = cluster_maps(coc, images).at(1, 0), coc.stages[1].blocks[0].token_mixer
    f = mixer.f(inputs_of(mixer, coc, images)).detach().double().unflatten(1, (3, 8))  # [B, E, D, H, W]
    r, g = mixer.regions, mixer.proposals
    height, width = f.shape[-2:]
    h, w = -(-height // r), -(-width // r)
    assert found.grid == (r * g, r * g)
    centers, position = {}, {}
    for row in range(r * g):
        for column in range(r * g):
            bins = []
            for i, n, side in ((row, h, height), (column, w, width)):
                start, stop = i % g * n // g, -(-(i % g + 1) * n // g)
                bins.append((i // g * n + start, min(i // g * n + stop, side)))
            (top, bottom), (left, right) = bins
            number = row * r * g + column
            assert found.region[number] == row // g * r + column // g
            assert found.index[number] == row % g * g + column % g
            if top < bottom and left < right:
                centers[number] = f[..., top:bottom, left:right].mean((-2, -1))
                position[number] = (8 * (top + bottom) / 2, 8 * (left + right) / 2)
                np.testing.assert_allclose(found.position[number], position[number])
            else:
                assert np.isnan(found.position[number]).any()
    for b, e, y, x in np.ndindex(2, 3, height, width):
        similar = {
            number: F.cosine_similarity(f[b, e, :, y, x], center[b, e], dim=0).item()
            for number, center in centers.items()
            if found.region[number] == y // h * r + x // w
        }
        joined = found.center[b, e, y, x]
        assert similar[joined] == pytest.approx(found.similarity[b, e, y, x], abs=1e-5)
        assert similar[joined] >= max(similar.values()) - 1e-5


@pytest.mark.parametrize('size', [(32, 48), (36, 60), (44, 52)], ids=['divides', 'odd', 'padded inside'])
def test_pooling_against_plain_loops(fec, size):
    images = torch.randn(2, 3, *size)
    found, pool = cluster_maps(fec, images).at(1, None), fec.stages[1].downsample
    f = pool.f(inputs_of(pool, fec, images)).detach().double()
    height, width = f.shape[-2:]
    grid = (-(-height // 2), -(-width // 2))
    assert found.grid == grid and found.block is None and found.center.shape == (2, 1, height, width)
    h, w = (-(-side // pool.regions) for side in grid)
    for number, (row, column) in enumerate(np.ndindex(*grid)):
        assert found.region[number] == row // h * pool.regions + column // w
        assert found.position[number] == pytest.approx(
            [2 * (2 * row + min(2 * row + 2, height)), 2 * (2 * column + min(2 * column + 2, width))]
        )
    for b, y, x in np.ndindex(2, height, width):
        similar = {
            number: F.cosine_similarity(
                f[b, :, y, x], f[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((-2, -1)), dim=0
            ).item()
            for number, (row, column) in enumerate(np.ndindex(*grid))
            if (row // h, column // w) == (y // 2 // h, x // 2 // w)
        }
        joined = found.center[b, 0, y, x]
        assert similar[joined] == pytest.approx(found.similarity[b, 0, y, x], abs=1e-5)
        assert similar[joined] >= max(similar.values()) - 1e-5


def test_centers_are_numbered_row_by_row(coc):
    """One-hot features per cell of a region assign every point to the center of its own cell."""
    rows, columns = torch.arange(8), torch.arange(12)
    cell = (rows // 2).unsqueeze(1) * 4 + columns // 3  # 2 x 2 regions of 2 x 2 centers
    within = (rows // 2 % 2).unsqueeze(1) * 2 + columns // 3 % 2
    features = F.one_hot(within, 8).permute(2, 0, 1).float().repeat(2, 1, 1)
    model = copy.deepcopy(coc).requires_grad_(False)
    mixer = model.stages[0].blocks[0].token_mixer
    mixer.f.weight.copy_(torch.eye(16)[:, :, None, None]), mixer.f.bias.zero_()
    mixer.register_forward_pre_hook(lambda *_: (features.unsqueeze(0),))
    found = cluster_maps(model, torch.randn(1, 3, 32, 48)).at(0)
    assert np.array_equal(found.center[0, 0], cell.numpy()) and np.allclose(found.similarity, 1)


def test_all_layers_in_one_forward_pass_and_the_model_stays_as_it_was(fec):
    images = torch.randn(2, 3, 40, 52)
    fec.train()
    fec.stages[0].eval()
    calls = []
    handle = fec.stem.register_forward_pre_hook(lambda *_: calls.append(1))
    maps = cluster_maps(fec, images)
    handle.remove()
    assert len(calls) == 1
    assert [(found.stage, found.block) for found in maps.maps] == [(0, 0), (1, None), (1, 0), (1, 1)]
    assert [found.name for found in maps.maps][1:3] == ['pooling into stage 1', 'stage 1, block 0']
    assert fec.training and not fec.stages[0].training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in fec.modules())
    with torch.no_grad():
        torch.testing.assert_close(maps.logits, fec.eval()(images))
    one = cluster_maps(fec, images[1])
    for found, alone in zip(maps.maps, one.maps):
        assert np.array_equal(found.center[1:], alone.center)


def test_one_stage_ends_the_forward_pass(fec):
    images = torch.randn(1, 3, 40, 52)
    calls = []
    handles = [
        fec.stages[0].blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append('mlp')),
        fec.stages[1].register_forward_pre_hook(lambda *_: calls.append('stage 1')),
    ]
    first = cluster_maps(fec, images, stage=0)
    assert not calls and first.logits is None and len(first.maps) == 1
    for handle in handles:
        handle.remove()
    every, last = cluster_maps(fec, images), cluster_maps(fec, images, stage=-1)
    assert np.array_equal(first.at(0).center, every.at(0).center)
    assert [found.stage for found in last.maps] == [1, 1, 1]
    assert np.array_equal(last.at(1, None).center, every.at(1, None).center)
    with pytest.raises(ValueError, match='no map of stage 0: expected one of 1'):
        last.at(0)


def test_other_models_that_contain_one():
    image = torch.randn(1, 3, 64, 96)
    torch.manual_seed(0)
    whole = timm.create_model('fec_small')
    features = timm.create_model('fec_small', features_only=True)
    features.load_state_dict(
        {name.replace('stages.', 'stages_'): w for name, w in whole.state_dict().items()}, strict=False
    )
    segmenter = create_segmenter('semantic_fpn', 'fec_small', num_classes=3)
    segmenter.backbone.model.load_state_dict(whole.state_dict(), strict=False)
    expected = cluster_maps(whole, image)
    assert len(expected.maps) == 17 and expected.features.shape == (1, 320, 2, 3)
    for model in (features, segmenter, torch.compile(whole), torch.nn.DataParallel(whole)):
        maps = cluster_maps(model, image)
        assert all(np.array_equal(a.center, b.center) for a, b in zip(maps.maps, expected.maps, strict=True))
        torch.testing.assert_close(maps.features, expected.features)


def photo(mode='RGB', size=(60, 40)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_images_of_many_kinds(coc):
    rgb = cluster_maps(coc, photo(), size=40)
    assert rgb.inputs.shape == (1, 3, 40, 60) and rgb.images[0].size == (60, 40)
    mean, std = (torch.tensor(coc.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    expected = (torch.from_numpy(np.array(photo())).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(rgb.inputs[0], expected)
    for image in (np.array(photo()), [photo()], rgb.inputs, rgb.inputs[0]):
        torch.testing.assert_close(cluster_maps(coc, image, size=40).inputs, rgb.inputs)
    assert np.array_equal(np.array(cluster_maps(coc, rgb.inputs).images[0]), np.array(photo()))
    for image in (
        photo('L'),
        photo('P'),
        photo('CMYK'),
        photo('RGBA'),
        photo('1'),
        np.array(photo('L')),
        photo('I;16'),
    ):
        assert cluster_maps(coc, image, size=40).inputs.shape == (1, 3, 40, 60)
    assert cluster_maps(coc, photo(), stage=0).inputs.shape == (1, 3, 224, 336)  # the model's size
    assert cluster_maps(coc, photo(size=(90, 41)), stage=0, size=41).inputs.shape == (1, 3, 41, 88)
    assert cluster_maps(coc, [photo(), photo('L')], stage=0, size=32).inputs.shape == (2, 3, 32, 48)


def test_exif_orientation_is_applied(coc):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    photo().save(buffer, 'PNG', exif=exif)
    maps = cluster_maps(coc, Image.open(buffer), size=40)
    assert maps.images[0].size == (40, 60)
    assert np.array_equal(np.array(maps.images[0]), np.array(photo().transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize(
    ('images', 'options', 'message'),
    [
        (torch.randn(3, 16, 40), {}, r'from 32 px, got \[3, 16, 40\]'),
        (torch.randn(40, 40), {}, r'got \[40, 40\]'),
        (np.zeros((40, 40, 3)), {}, 'array uint8 .* got float64'),
        (np.zeros((40, 40, 2), np.uint8), {}, 'array uint8'),
        ('photo.jpg', {}, 'got a str'),
        ([], {}, 'empty list'),
        ([photo(), photo(size=(40, 40))], {}, 'one size, got'),
        (photo(), dict(size=31), 'at least 32 pixels, got 31'),
        (photo(), dict(stage=2), 'no stage 2: expected -2 to 1'),
    ],
)
def test_wrong_input(coc, images, options, message):
    with pytest.raises(ValueError, match=message):
        cluster_maps(coc, images, **options)
    assert not any(module._forward_pre_hooks for module in coc.modules())


def test_narrow_image(coc):
    with pytest.raises(ImageError, match='too narrow'):
        cluster_maps(coc, photo(size=(1000, 2)))


@pytest.mark.parametrize(
    ('where', 'message'),
    [((2,), 'no stage 2: expected -2 to 1'), ((0, -2), 'no block -2'), ((0, None), 'No cluster pooling')],
)
def test_index_out_of_range(coc, where, message):
    with pytest.raises(ValueError, match=message):
        cluster_maps(coc, torch.randn(1, 3, 32, 32)).at(*where)


def test_model_without_clusters():
    with pytest.raises(ValueError, match='ResNet has no clusters'):
        cluster_maps(timm.create_model('resnet10t'), torch.randn(1, 3, 32, 32))


def test_gray_model():
    model = timm.create_model('coc_tiny', in_chans=1, regions=1, **STAGES)
    assert cluster_maps(model, photo(), size=32).inputs.shape == (1, 1, 32, 48)


def test_values_at_pixels(coc):
    maps = cluster_maps(coc, torch.randn(3, 44, 66))  # 17 x 11 points, the last column is cut
    values = np.arange(11 * 17).reshape(11, 17)
    shown = maps.at_pixels(values, 4, (66, 44))
    assert all(shown[y, x] == values[y // 4, x // 4] for y, x in np.ndindex(44, 66))
    small = maps.at_pixels(values, 4, (33, 22))
    assert all(small[y, x] == values[(2 * y + 1) // 4, (2 * x + 1) // 4] for y, x in np.ndindex(22, 33))
