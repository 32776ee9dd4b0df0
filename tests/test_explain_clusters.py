"""Cluster maps agree with the mixers' outputs, and drawings with the maps."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import cluster_zoo  # noqa: F401
from cluster_zoo.explain import cluster_map, draw_clusters

STAGES = dict(depths=(1, 2), dims=(16, 24), mlp_ratios=(2, 2), num_heads=(2, 3), head_dim=8, num_classes=4)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('coc_tiny', proposals=(2, 3), regions=(2, 2), **STAGES)


@pytest.mark.parametrize('size', [(32, 48), (68, 52)], ids=['divides', 'padded inside'])
@pytest.mark.parametrize(('stage', 'block', 'head'), [(0, 0, 1), (1, -1, 2), (-1, 0, 0)])
def test_members_of_a_cluster_get_parallel_outputs(model, size, stage, block, head):
    """Before the projection, a point's output is its center times a scale: parallel in a cluster, and only there."""
    images = torch.randn(2, 3, *size)
    clusters = cluster_map(model, images, stage, block, head)
    stride = 4 * 2 ** (stage % 2)
    height, width = (-(-side // stride) for side in size)
    assert clusters.shape == (2, height, width) and clusters.dtype == torch.int64

    mixer, seen = model.stages[stage].blocks[block].token_mixer, []
    handle = mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.eval()(images)
    handle.remove()
    unprojected = copy.deepcopy(mixer).requires_grad_(False)
    unprojected.proj.weight.copy_(torch.eye(len(mixer.proj.weight))[:, :, None, None]), unprojected.proj.bias.zero_()
    outputs = unprojected(seen[0].detach()).unflatten(1, (mixer.num_heads, -1))[:, head]
    outputs = F.normalize(outputs.flatten(2), dim=1)
    parallel = (outputs.transpose(1, 2) @ outputs) > 1 - 1e-5
    together = clusters.flatten(1).unsqueeze(1) == clusters.flatten(1).unsqueeze(2)
    assert torch.equal(parallel, together)
    assert 1 < clusters.unique().numel() <= (mixer.regions * mixer.proposals) ** 2

    # A center is in the same region as its members.
    per_axis = mixer.regions * mixer.proposals
    for axis, center in ((0, clusters // per_axis), (1, clusters % per_axis)):
        count = clusters.shape[1 + axis]
        region = torch.arange(count) // -(-count // mixer.regions)
        assert torch.equal(center // mixer.proposals, region.unsqueeze(1 - axis).expand_as(center))


def test_centers_are_numbered_row_by_row(model):
    """One-hot features per cell of a region assign every point to the center of its own cell."""
    rows, columns = torch.arange(8), torch.arange(12)
    cell = (rows // 2).unsqueeze(1) * 4 + columns // 3  # 2 x 2 regions of 2 x 2 centers
    within = (rows // 2 % 2).unsqueeze(1) * 2 + columns // 3 % 2
    features = F.one_hot(within, 8).permute(2, 0, 1).float().repeat(2, 1, 1)
    model = copy.deepcopy(model).requires_grad_(False)
    mixer = model.stages[0].blocks[0].token_mixer
    mixer.f.weight.copy_(torch.eye(16)[:, :, None, None]), mixer.f.bias.zero_()
    mixer.register_forward_pre_hook(lambda *_: (features.unsqueeze(0),))
    clusters = cluster_map(model, torch.randn(1, 3, 32, 48), stage=0)
    assert torch.equal(clusters[0], cell)


def test_fec_and_training_mode_is_restored():
    model = timm.create_model('fec_small', proposals=2, regions=1, **STAGES).train()
    assert cluster_map(model, torch.randn(1, 3, 32, 32), stage=1).shape == (1, 4, 4)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ('where', 'what'),
    [(dict(stage=2), 'stage 2'), (dict(stage=0, block=-2), 'block -2'), (dict(stage=0, head=2), 'head 2')],
)
def test_index_out_of_range(model, where, what):
    with pytest.raises(ValueError, match=f'no {what}: expected'):
        cluster_map(model, torch.randn(1, 3, 32, 32), **where)


def test_model_without_clusters():
    with pytest.raises(ValueError, match='ResNet has no clusters'):
        cluster_map(timm.create_model('resnet10t'), torch.randn(1, 3, 32, 32), stage=0)


@pytest.mark.parametrize(('size', 'stride'), [((50, 33), 4), ((33, 70), 32), ((64, 64), 16)])
def test_drawing_has_the_size_of_the_image_and_colors_patches(size, stride):
    width, height = size
    columns, rows = (-(-side // stride) for side in size)
    clusters = torch.arange(rows * columns).reshape(rows, columns)
    image = draw_clusters(Image.new('L', size, 200), clusters, opacity=1.0)
    assert image.size == size
    colors = {}
    for y in range(height):
        for x in range(width):
            colors.setdefault(int(clusters[y // stride, x // stride]), set()).add(image.getpixel((x, y)))
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == rows * columns


def test_more_than_256_clusters_and_opacity():
    clusters = torch.arange(32 * 32).reshape(32, 32)
    image = Image.new('RGB', (128, 128), (10, 20, 30))
    assert draw_clusters(image, clusters, opacity=0.0).tobytes() == image.tobytes()
    half, full = (draw_clusters(image, clusters, opacity).getpixel((127, 127)) for opacity in (0.5, 1.0))
    assert all(abs(h - (i + f) / 2) <= 1 for h, i, f in zip(half, (10, 20, 30), full))
