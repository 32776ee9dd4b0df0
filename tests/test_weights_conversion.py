"""Conversion of checkpoints with the authors' names."""

import pytest
import timm
import torch
import torch.nn.functional as F
from parity_cases import recipe
from timm.models.swin_transformer import PatchMerging
from torch import nn

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.errors import CheckpointError
from cluster_zoo.models.dnc import NearestCentroidHead
from cluster_zoo.weights import conversion, load_checkpoint

BACKBONES = ['dnc_resnet18', 'dnc_resnet50', 'dnc_resnet18_cifar', 'dnc_mobilenetv2_100', 'dnc_swin_tiny']


def _before_june_2023(state_dict):
    """Weights with the names and shapes of the authors' first checkpoints."""
    names = {'token_mixer.f.': 'token_mixer.fc1.', 'token_mixer.v.': 'token_mixer.fc_v.'}
    names |= {'token_mixer.proj.': 'token_mixer.fc2.'}
    old = {}
    for name, value in state_dict.items():
        for new_part, old_part in names.items():
            name = name.replace(new_part, old_part)
        old[name] = value[:, :, None, None] if '.mlp.fc' in name and value.ndim == 2 else value
    return old


def test_converted_names_and_shapes_are_those_of_the_models():
    for case in ('coc_tiny', 'coc_small', 'fec_small', 'fec_base'):
        with torch.device('meta'):
            expected = {name: value.shape for name, value in timm.create_model(case).state_dict().items()}
        renamed = conversion.context_cluster(recipe.state_dict(case))
        assert {name: value.shape for name, value in renamed.items()} == expected


def test_old_and_new_checkpoints_are_converted_to_equal_weights():
    state_dict = recipe.state_dict('coc_tiny')
    old = _before_june_2023(state_dict)
    assert set(old) != set(state_dict)
    expected, renamed = conversion.context_cluster(state_dict), conversion.context_cluster(old)
    assert set(renamed) == set(expected)
    assert all(torch.equal(renamed[name], expected[name]) for name in expected)


def test_own_names_stay_unchanged():
    state_dict = timm.create_model('fec_small').state_dict()
    renamed = conversion.context_cluster(state_dict)
    assert list(renamed) == list(state_dict) and all(renamed[name] is state_dict[name] for name in renamed)


def test_own_linear_layers_become_convolutions():
    state_dict = timm.create_model('coc_tiny').state_dict()
    linear = {
        name: value.flatten(1) if '.mlp.fc' in name and value.ndim == 4 else value for name, value in state_dict.items()
    }
    renamed = conversion.context_cluster(linear)
    assert all(torch.equal(renamed[name], state_dict[name]) for name in state_dict)


@pytest.mark.parametrize('prefix', ['', 'head.'])
def test_nearest_centroid_head(prefix):
    state_dict = recipe.state_dict('dnc_head')
    named = {prefix + name: value for name, value in state_dict.items()}
    others = {'backbone.conv1.weight': torch.zeros(1), 'mask_norm.running_mean': torch.zeros(1), 'fc.weight': None}
    head = conversion.nearest_centroid_head({**named, **others})
    expected = {name: value for name, value in state_dict.items() if not name.startswith('convs.')}
    assert head.keys() == expected.keys() and all(head[name] is expected[name] for name in head)
    NearestCentroidHead(32, 5).load_state_dict(head)
    assert all(conversion.is_nearest_centroid_head(name) for name in named)
    assert not any(conversion.is_nearest_centroid_head(name) for name in others)
    assert not conversion.is_nearest_centroid_head('backbone.head.prototypes')


# ---- DNC checkpoints with the names of mmclassification ----


def mobilenet_modules():
    """Names of timm's modules and of mmclassification's."""
    modules = dict(conv_stem='conv1.conv', bn1='conv1.bn', conv_head='conv2.conv', bn2='conv2.bn')
    for layer, blocks in enumerate((1, 2, 3, 4, 3, 3, 1), start=1):
        for j in range(blocks):
            for k, conv in enumerate(['conv_dw', 'conv_pw'] if layer == 1 else ['conv_pw', 'conv_dw', 'conv_pwl']):
                timms, theirs = f'blocks.{layer - 1}.{j}', f'layer{layer}.{j}.conv.{k}'
                modules |= {f'{timms}.{conv}': f'{theirs}.conv', f'{timms}.bn{k + 1}': f'{theirs}.bn'}
    return modules


def swin_modules(depths):
    """Names of timm's modules and of mmclassification's."""
    modules = {'patch_embed.proj': 'patch_embed.projection', 'patch_embed.norm': 'patch_embed.norm', 'norm': 'norm3'}
    parts = {'attn': 'attn.w_msa', 'attn.qkv': 'attn.w_msa.qkv', 'attn.proj': 'attn.w_msa.proj', 'norm1': 'norm1'}
    parts |= {'norm2': 'norm2', 'mlp.fc1': 'ffn.layers.0.0', 'mlp.fc2': 'ffn.layers.1'}
    for i, depth in enumerate(depths):
        for j in range(depth):
            modules |= {f'layers.{i}.blocks.{j}.{ours}': f'stages.{i}.blocks.{j}.{x}' for ours, x in parts.items()}
        for part in ('norm', 'reduction'):
            modules[f'layers.{i + 1}.downsample.{part}'] = f'stages.{i}.downsample.{part}'
    return modules


def unfolded(value):
    """Reorders an input of timm's patch merging to the order of unfolding, by merging numbered points with both."""
    channels = value.shape[-1] // 4
    numbers = torch.arange(4 * channels).reshape(1, channels, 2, 2)
    merging = PatchMerging(channels, norm_layer=lambda *_, **__: nn.Identity())
    merging.reduction = nn.Identity()
    timms = merging(numbers.permute(0, 2, 3, 1)).flatten()
    return value[..., timms.argsort()[F.unfold(numbers.double(), 2).flatten().long()]]


def in_their_names(model):
    """A model's weights with the names of the authors' framework, and further entries that it saves."""
    modules, theirs = {}, {'head.convs.0.conv.weight': torch.randn(4, 4, 1, 1), 'head.convs.0.conv.bias': torch.ones(4)}
    is_swin, head = hasattr(model, 'patch_embed'), f'{model.classifier_name}.'
    if hasattr(model, 'conv_stem'):
        modules = mobilenet_modules()
    elif is_swin:
        modules = swin_modules([len(stage.blocks) for stage in model.layers])
        attention = 'backbone.stages.0.blocks.1.attn'
        theirs[f'{attention}.w_msa.relative_position_index'] = torch.zeros(49, 49, dtype=torch.int64)
        theirs[f'{attention}.attn_mask'] = torch.zeros(64, 49, 49)
    for name, value in model.state_dict().items():
        module, _, tensor = name.rpartition('.')
        if name.startswith(head):
            theirs[name.replace(head, 'head.', 1)] = value
        else:
            value = unfolded(value) if is_swin and '.downsample.' in name else value
            theirs[f'backbone.{modules[module] if modules else module}.{tensor}'] = value
    return theirs


def random_model(name):
    """A model with random values in all tensors, including norms."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for value in model.state_dict().values():
        if not value.is_floating_point():
            value.random_(1000)
        elif value.ndim < 2:
            value.uniform_(0.5, 1.5)
    return model


def save(state_dict, path):
    meta = dict(mmcls_version='0.18.0', epoch=300, iter=375300, CLASSES=['a', 'b', 'c', 'd', 'e'], hook_msgs={})
    optimizer = dict(state={0: dict(momentum_buffer=torch.zeros(2))}, param_groups=[dict(lr=0.1, params=[0])])
    torch.save(dict(meta=meta, state_dict=state_dict, optimizer=optimizer), path)
    return path


@pytest.mark.parametrize('name', BACKBONES)
@torch.no_grad()
def test_dnc_checkpoint(name, tmp_path):
    model, other = random_model(name), timm.create_model(name, num_classes=5).eval()
    load_checkpoint(other, save(in_their_names(model), tmp_path / 'latest.pth'))
    expected, loaded = model.state_dict(), other.state_dict()
    assert loaded.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(loaded[key], expected[key])] == []
    images = torch.randn(1, 3, *(224, 224) if 'swin' in name else (64, 64))
    logits = model(images)
    assert logits.isfinite().all() and torch.equal(other(images), logits)


@pytest.mark.parametrize('name', [*BACKBONES, 'dnc_coc_tiny', 'dnc_fec_small'])
def test_own_names_of_dnc_stay_unchanged(name):
    model = timm.create_model(name, num_classes=5, device='meta')
    state_dict = model.state_dict()
    backbone, head = conversion.nearest_centroid(state_dict, model.classifier_name)
    assert list(backbone | head) == list(state_dict) and len(head) == 5
    assert all(value is state_dict[key] for key, value in (backbone | head).items())


@torch.no_grad()
def test_patch_merging_by_unfolding():
    torch.manual_seed(0)
    shapes = {'norm.weight': [24], 'norm.bias': [24], 'reduction.weight': [12, 24]}
    theirs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(2, 6, 10, 8, dtype=torch.float64)
    y = F.unfold(x, 2, stride=2).transpose(1, 2)
    y = F.linear(F.layer_norm(y, (24,), theirs['norm.weight'], theirs['norm.bias']), theirs['reduction.weight'])
    merging = PatchMerging(6).double()
    converted = conversion.swin({f'stages.0.downsample.{name}': value for name, value in theirs.items()})
    merging.load_state_dict({name.removeprefix('layers.1.downsample.'): value for name, value in converted.items()})
    torch.testing.assert_close(merging(x.permute(0, 2, 3, 1)).flatten(1, 2), y, rtol=1e-12, atol=1e-12)


def conv_module(weights, name, x, stride=1, groups=1, act=True):
    weight = weights[f'{name}.conv.weight']
    bn = [weights[f'{name}.bn.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias')]
    x = F.batch_norm(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups), *bn)
    return F.relu6(x) if act else x


@torch.no_grad()
def test_first_layers_of_mobilenet(tmp_path):
    model = timm.create_model('dnc_mobilenetv2_100', num_classes=5).double().eval()
    theirs = in_their_names(random_model('dnc_mobilenetv2_100').double())
    load_checkpoint(model, save(theirs, tmp_path / 'latest.pth'))
    weights = {name.removeprefix('backbone.'): value for name, value in theirs.items()}
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    x = conv_module(weights, 'conv1', images, stride=2)
    x = conv_module(weights, 'layer1.0.conv.0', x, groups=32)
    x = conv_module(weights, 'layer1.0.conv.1', x, act=False)
    for block, stride, width in (('layer2.0', 2, 96), ('layer2.1', 1, 144)):
        y = conv_module(weights, f'{block}.conv.0', x)
        y = conv_module(weights, f'{block}.conv.1', y, stride, groups=width)
        y = conv_module(weights, f'{block}.conv.2', y, act=False)
        x = x + y if stride == 1 else y
    ours = model.blocks[:2](model.bn1(model.conv_stem(images)))
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    'name, broken, message',
    [
        ('dnc_resnet18', 'layer2.0.', r'missing \(layer2\.0\.conv1\.weight'),
        ('dnc_mobilenetv2_100', 'layer1.0.', r'missing \(blocks\.0\.0\.conv_dw\.weight'),
        ('dnc_mobilenetv2_100', 'layer3.1.conv.1.conv.weight', r'blocks\.2\.1\.conv_dw\.weight: \[192, 1, 3, 2\] in'),
        ('dnc_swin_tiny', 'stages.0.blocks.0.', r'missing \(layers\.0\.blocks\.0\.norm1\.weight'),
        ('dnc_swin_tiny', 'stages.0.downsample.reduction.weight', r'reduction\.weight: \[192, 383\] in the file'),
    ],
)
def test_broken_dnc_checkpoint(name, broken, message, tmp_path):
    model, broken = random_model(name), f'backbone.{broken}'
    whole = {key: x for key, x in in_their_names(model).items() if broken[-1] != '.' or not key.startswith(broken)}
    theirs = {key: value[..., :-1] if key == broken else value for key, value in whole.items()}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, save(theirs, tmp_path / 'latest.pth'))
