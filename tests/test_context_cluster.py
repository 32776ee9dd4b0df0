"""Context Cluster: results of the authors' code, the formulas, and sizes that do not divide."""

import copy
import math

import pytest
import timm
import torch
from parity_cases import recipe, save_released, worst_error
from reference import bins, cluster_map

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.layers.cluster_mixer import ClusterMixer
from cluster_zoo.layers.point_stem import PointStem
from cluster_zoo.weights import load_checkpoint

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, num_classes=5)


@pytest.mark.parametrize('case', ['coc_tiny', 'coc_tiny_plain', 'coc_small', 'coc_medium'])
def test_equals_the_authors_code(case, tmp_path):
    model = timm.create_model(case).double().eval()
    load_checkpoint(model, save_released(case, tmp_path / 'checkpoint.pth.tar'))
    assert worst_error(model, case) < 1e-9


def test_load_state_dict_converts_the_authors_names(tmp_path):
    state_dict = recipe.state_dict('coc_tiny')
    torch.save(state_dict, tmp_path / 'authors.pth')
    model = timm.create_model('coc_tiny', checkpoint_path=str(tmp_path / 'authors.pth'))
    expected = model.state_dict()
    assert torch.equal(expected['norm.weight'], state_dict['norm.weight'].float())
    wrapped = torch.nn.ModuleDict({'net': copy.deepcopy(timm.create_model('coc_tiny'))})
    wrapped.load_state_dict({f'net.{name}': value for name, value in state_dict.items()})
    for name, value in wrapped['net'].state_dict().items():
        assert torch.equal(value, expected[name]), name
    del state_dict['norm.weight']
    with pytest.raises(RuntimeError, match=r'norm\.weight'):
        model.load_state_dict(state_dict)


@pytest.mark.parametrize(
    'name, millions', [('coc_tiny', 5.57), ('coc_tiny_plain', 5.57), ('coc_small', 14.66), ('coc_medium', 29.29)]
)
def test_number_of_parameters(name, millions):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def _identity_convolutions(mixer):
    """Sets f, v and proj to the identity, so that the mixer computes only the clustering."""
    for conv in (mixer.f, mixer.v, mixer.proj):
        conv.weight.data.copy_(torch.eye(len(conv.weight)).view_as(conv.weight))
        conv.bias.data.zero_()
    return mixer


@pytest.mark.parametrize('weighted', [True, False])
@pytest.mark.parametrize('size, proposals, regions', [
    ((6, 6), 2, 1),
    ((8, 12), 2, 2),
    ((7, 9), 2, 2),  # padded at the bottom and at the right
    ((5, 4), 3, 2),  # centers without real points
    ((9, 3), 2, 4),  # regions without real points
    ((1, 1), 2, 1),
    ((1, 5), 4, 3),
    ((1, 9), 3, 1),  # equal centers
    ((2, 7), 5, 1),
    ((5, 14), 7, 2),  # equal centers, also in padded regions
])  # fmt: skip
def test_mixer_matches_loops_on_any_size(size, proposals, regions, weighted):
    torch.manual_seed(0)
    mixer = ClusterMixer(6, 2, 3, proposals, regions, weighted).double().requires_grad_(False)
    _identity_convolutions(mixer)
    mixer.sim_alpha.fill_(2.5), mixer.sim_beta.fill_(-0.25)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    out = mixer(x)
    for b in range(2):
        for head in (slice(0, 3), slice(3, 6)):
            expected = cluster_map(x[b, head], x[b, head], proposals, regions, 2.5, -0.25, weighted)
            torch.testing.assert_close(out[b, head], expected, rtol=1e-10, atol=1e-12)


def test_stem_is_one_convolution_over_image_and_coordinates():
    stem = PointStem(3, 8).double()
    x = torch.randn(2, 3, 20, 32, dtype=torch.float64)
    rows = (torch.arange(20) / 19 - 0.5).view(1, 1, 20, 1).expand(2, 1, 20, 32)
    columns = (torch.arange(32) / 31 - 0.5).view(1, 1, 1, 32).expand(2, 1, 20, 32)
    weight = torch.cat([stem.proj.weight, stem.coord.weight], 1)
    expected = torch.nn.functional.conv2d(torch.cat([x, rows.double(), columns.double()], 1), weight, stem.proj.bias, 4)
    torch.testing.assert_close(stem(x), expected, rtol=1e-10, atol=1e-10)
    assert stem(x[..., :17, :31]).shape == (2, 8, 5, 8)


@pytest.mark.parametrize('size', [(32, 32), (33, 32), (47, 90), (224, 64), (100, 100)])
@pytest.mark.parametrize('name', ['coc_tiny', 'coc_tiny2', 'coc_tiny_plain'])
def test_any_size(name, size):
    model = timm.create_model(name, **TINY).eval()
    _set_layer_scales(model, 0.5)
    features, stages = model.forward_intermediates(torch.randn(1, 3, *size))
    for stage, stride in zip(stages, (4, 8, 16, 32)):
        assert stage.shape[2:] == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert torch.isfinite(model.forward_head(features)).all()


def _set_layer_scales(model, value):
    """At the initial scale of 1e-5 an error in a branch would not be visible."""
    for name, parameter in model.named_parameters():
        if name.endswith('gamma'):
            torch.nn.init.constant_(parameter, value)


def test_padding_does_not_depend_on_the_batch_and_trains():
    model = timm.create_model('coc_tiny', **TINY)
    _set_layer_scales(model, 0.5)
    x = torch.randn(3, 3, 45, 61)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize('size', [(32, 224), (160, 32)])
@pytest.mark.parametrize('name, proposals, hooked', [
    ('coc_tiny', 3, False),
    ('coc_tiny', 2, True),
    ('coc_tiny2', (4, 2, 7, 4), True),
    ('fec_small', (4, 4, 2, 2), True),
])  # fmt: skip
def test_equal_centers_do_not_depend_on_rounding(name, proposals, hooked, size, monkeypatch):
    """The last map has one row or column. Every decision is that of float64, for a batch and for its images alone."""
    torch.manual_seed(0)
    kwargs = dict(TINY, dims=(32, 64, 64, 96), num_heads=(4, 4, 4, 8), head_dim=24, mlp_ratios=(1, 1, 1, 1))
    model = timm.create_model(name, **kwargs, proposals=proposals).eval().requires_grad_(False)
    _set_layer_scales(model, 0.5)
    x = torch.randn(4, 3, *size)
    exact = copy.deepcopy(model).double()(x.double())
    if hooked:  # the mixer calls its convolutions
        for module in model.modules():
            if isinstance(module, ClusterMixer):
                module.f.register_forward_hook(lambda *args: None)
    for kernels in ('auto', 'plain'):
        monkeypatch.setenv('CLUSTER_ZOO_KERNELS', kernels)
        for logits in (model(x), torch.cat([model(image) for image in x.split(1)])):
            torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('proposals, size', [(2, (1, 9)), (3, (7, 1)), (5, (2, 3)), (7, (3, 2))])
def test_no_point_joins_a_center_that_is_equal_to_an_earlier_one(proposals, size, dtype, memory_format):
    torch.manual_seed(0)
    mixer = ClusterMixer(64, 8, 24, proposals).to(dtype)
    index = mixer.assign(torch.randn(4, 64, *size).to(dtype, memory_format=memory_format))
    windows = [(rows, columns) for rows in bins(size[0], proposals) for columns in bins(size[1], proposals)]
    assert {windows.index(window) for window in windows}.issuperset(index.unique().tolist())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_with_padding_and_blank_images_is_finite(dtype):
    model = timm.create_model('coc_tiny', **TINY).to(dtype).eval()
    _set_layer_scales(model, 0.5)
    assert torch.isfinite(model(torch.zeros(1, 3, 45, 61, dtype=dtype))).all()


def test_proposals_and_regions():
    model = timm.create_model('coc_small', proposals=5, regions=(8, 4, 2, 1), num_classes=0, features_only=True)
    mixers = [m for m in model.modules() if isinstance(m, ClusterMixer)]
    assert {m.proposals for m in mixers} == {5} and [m.regions for m in mixers] == [8] * 2 + [4] * 2 + [2] * 6 + [1] * 2
    dense = timm.create_model('coc_tiny', **TINY, regions=1, proposals=7)
    plain = timm.create_model('coc_tiny', **TINY, regions=1)
    plain.load_state_dict(dense.state_dict())  # the shapes of the weights do not depend on it
    _set_layer_scales(dense, 0.5), _set_layer_scales(plain, 0.5)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(dense.eval()(x), plain.eval()(x))


@pytest.mark.parametrize('kwargs', [dict(proposals=0), dict(regions=(8, 4)), dict(proposals=2.5), dict(regions=-1)])
def test_wrong_proposals_and_regions(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=name):
        timm.create_model('coc_tiny', **kwargs)


def test_initial_weights():
    model = timm.create_model('coc_tiny')
    block = model.stages[0].blocks[0]
    assert (block.ls1.gamma == 1e-5).all() and block.token_mixer.sim_alpha == 1 and block.token_mixer.sim_beta == 0
    assert abs(model.head.fc.weight.std().item() - 0.02) < 0.002 and (model.head.fc.bias == 0).all()
    bound = (5 * 16) ** -0.5
    for weight in (model.stem.proj.weight, model.stem.coord.weight):
        assert weight.abs().max() <= bound and abs(weight.std().item() - bound / 3**0.5) < 0.02


def test_drop_path_rises_over_the_blocks():
    model = timm.create_model('coc_tiny', drop_path_rate=0.13)
    rates = [getattr(b.drop_path1, 'drop_prob', 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(14)], abs=1e-7)


@pytest.mark.parametrize('stride', [8, 16])
def test_output_stride(stride):
    """Convolutions with the same weights on a denser grid agree where both grids have points."""
    torch.manual_seed(0)
    full = timm.create_model('coc_tiny', depths=(0, 0, 0, 0), features_only=True).double().eval()
    dense = timm.create_model('coc_tiny', depths=(0, 0, 0, 0), features_only=True, output_stride=stride).double().eval()
    dense.load_state_dict(full.state_dict())
    assert dense.feature_info.reduction() == [min(reduction, stride) for reduction in (4, 8, 16, 32)]
    image = torch.randn(1, 3, 96, 160, dtype=torch.float64)
    for expected, actual, reduction in zip(full(image), dense(image), (4, 8, 16, 32)):
        step = max(reduction // stride, 1)
        torch.testing.assert_close(actual[..., ::step, ::step], expected)


def test_output_stride_with_blocks():
    model = timm.create_model('coc_tiny', num_classes=3, output_stride=8)
    model.load_state_dict(timm.create_model('coc_tiny', num_classes=3).state_dict())
    assert model.forward_features(torch.randn(1, 3, 64, 96)).shape == (1, 320, 8, 12)
    model(torch.randn(1, 3, 33, 47)).sum().backward()
    for wrong in (4, 12, 64):
        with pytest.raises(ValueError, match=r'one of \[8, 16, 32\]'):
            timm.create_model('coc_tiny', output_stride=wrong)
    with pytest.raises(ValueError, match=r'one of \[32\]'):
        timm.create_model('fec_small', output_stride=16)
