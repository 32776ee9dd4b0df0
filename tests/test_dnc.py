"""DNC models as timm models. Their heads are tested in `test_centroids.py`."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from plain_centroids import set_head
from timm.optim import param_groups_layer_decay
from torch import nn

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.errors import CheckpointError
from cluster_zoo.models.dnc import (
    VARIANTS,
    NearestCentroidHead,
    NearestCentroidMixin,
    checkpoint_filter_fn,
    nearest_centroid,
)
from cluster_zoo.weights import load_checkpoint

# A ResNet of 0.2 M parameters with the feature width of the reference results
TINY = dict(channels=(8, 16, 24, 32), num_classes=5)
SMALLEST = ['dnc_resnet18', 'dnc_mobilenetv2_100', 'dnc_coc_tiny']


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**kwargs) -> nn.Module:
    return timm.create_model('dnc_resnet18', **{**TINY, **kwargs})


# ---- Registered models ----


@pytest.mark.parametrize('name', VARIANTS)
def test_every_name(name):
    assert timm.is_model(name) and timm.list_models(name) == [name]
    with torch.device('meta'):
        model = timm.create_model(name)
        backbone = timm.create_model(VARIANTS[name][0], num_classes=0)
    assert isinstance(model, type(backbone)) and isinstance(model, NearestCentroidMixin)
    head = model.get_classifier()
    assert isinstance(head, NearestCentroidHead)
    classes = 10 if 'cifar' in name else 1000
    assert head.prototypes.shape == (classes, 4, model.num_features)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model) == count(backbone) + 2 * model.num_features + 2 * classes  # two norms, no class weights
    cfg, theirs = model.pretrained_cfg, backbone.pretrained_cfg
    assert cfg['architecture'] == name and cfg['classifier'] == f'{theirs["classifier"]}.mask_norm'
    for key in ('input_size', 'pool_size', 'first_conv', 'mean', 'std', 'fixed_input_size'):
        assert cfg[key] == theirs[key], key


@pytest.mark.parametrize('name', SMALLEST)
def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=7, sub_centroids=2, drop_rate=0.1, drop_path_rate=0.1)
    assert model.get_classifier().prototypes.shape == (7, 2, model.num_features)
    model(torch.randn(2, 3, 64, 32)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    model.eval()
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        y = model(x)
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.get_classifier()(pooled), y)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model(x[:1]), y[:1], rtol=1e-3, atol=1e-3)
        model.set_grad_checkpointing()
        torch.testing.assert_close(model(x), y)
        final, levels = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
        assert [f.shape[1] for f in levels] == [info['num_chs'] for info in model.feature_info]
        with torch.autocast('cpu', torch.bfloat16):
            assert model(x).isfinite().all()
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)


def test_reset_classifier_creates_a_centroid_head():
    model = tiny(sub_centroids=3).eval()
    model.reset_classifier(9)
    head = model.get_classifier()
    assert isinstance(head, NearestCentroidHead) and head.prototypes.shape == (9, 3, 32)
    assert not head.training and model.num_classes == 9
    model.reset_classifier(2, 'catavgmax')
    assert model.get_classifier().in_features == model.head_hidden_size == 64
    model.double().reset_classifier(4)
    assert {t.dtype for t in model.get_classifier().state_dict().values()} == {torch.float64}
    model.reset_classifier(0, '')
    assert isinstance(model.get_classifier(), nn.Identity)
    assert tiny(num_classes=0).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 32)


def test_model_without_classes():
    model = tiny(num_classes=0)
    model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match='num_classes=0'):
        model.learn(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match='num_classes=0'):
        model.embed(torch.randn(2, 3, 32, 32))


def test_embed():
    model = tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    z, head = model.embed(x), model.get_classifier()
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2))
    scores = torch.einsum('bd,ckd->bck', z, head.prototypes).amax(-1)
    torch.testing.assert_close(head.mask_norm(scores), model(x))


def test_prune_intermediate_layers():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[2], intermediates_only=True)
    model.prune_intermediate_layers([2])
    torch.testing.assert_close(model.forward_intermediates(x, indices=[2], intermediates_only=True), expected)
    model.reset_classifier(4, 'avg')
    assert isinstance(model.get_classifier(), NearestCentroidHead) and model(x).shape == (1, 4)


@pytest.mark.parametrize('name', [*SMALLEST, 'dnc_swin_tiny'])
@pytest.mark.parametrize('feature_cls', [None, 'list', 'dict', 'hook', 'getter', 'fx'])
def test_features_only(name, feature_cls):
    kwargs = dict(img_size=64, depths=(1, 1, 1, 1)) if 'swin' in name else {}
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(1, 3), **kwargs).eval()
    features = model(torch.randn(1, 3, 64, 64))
    features = list(features.values()) if isinstance(features, dict) else features
    channel = 3 if 'swin' in name and feature_cls != 'getter' else 1  # timm's Swin has channels last
    assert [f.shape[channel] for f in features] == model.feature_info.channels()
    assert [64 // f.shape[2] for f in features] == model.feature_info.reduction()
    assert not any(isinstance(m, NearestCentroidHead) for m in model.modules())


def test_swin_sizes():
    model = timm.create_model('dnc_swin_tiny', img_size=(64, 96), depths=(1, 1, 1, 1), num_classes=5).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)
    model.set_input_size(img_size=(96, 64))
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 5)


@pytest.mark.parametrize('in_chans', [1, 4])
def test_in_chans(in_chans):
    assert tiny(in_chans=in_chans).eval()(torch.randn(1, in_chans, 32, 32)).shape == (1, 5)


def test_invalid_arguments():
    with pytest.raises(TypeError):
        tiny(not_an_argument=1)
    with pytest.raises(ValueError, match='sub_centroids'):
        tiny(sub_centroids=0)


def test_layer_decay_puts_the_head_last():
    model = tiny()
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert {scale[id(p)] for p in model.get_classifier().parameters()} == {1.0}
    assert min(scale.values()) < 0.1


# ---- PyTorch's tools ----


@pytest.fixture(scope='module')
def compact():
    torch.manual_seed(0)
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return model, x, model(x)


def test_copy_and_pickle(compact):
    model, x, y = compact
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and twin is not model
        assert torch.equal(twin(x), y)
        twin.reset_classifier(3)
        assert isinstance(twin.get_classifier(), NearestCentroidHead)


def test_pickled_model_loads_in_another_process(compact, tmp_path):
    model, x, y = compact
    torch.save((model, x, y), tmp_path / 'model.pt')
    code = (
        'import torch, sys\n'
        'model, x, y = torch.load(sys.argv[1], weights_only=False)\n'
        'assert type(model).__name__ == "NearestCentroidResNet"\n'
        'torch.testing.assert_close(model(x), y)\n'
    )
    run = [sys.executable, '-c', code, str(tmp_path / 'model.pt')]
    assert subprocess.run(run, capture_output=True, text=True).stderr == ''


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore:.*torch.jit:DeprecationWarning')
def test_script(compact):
    model, x, y = compact
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), y)


def test_fx_export_and_compile(compact):
    model, x, y = compact
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), y)
        batch = torch.export.Dim('batch', min=1, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(exported(x[:1]), y[:1], rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(x), y)


# ---- Checkpoints ----


def test_own_checkpoint_is_unchanged(tmp_path):
    model, other = tiny(), tiny()
    state_dict = model.state_dict()
    filtered = checkpoint_filter_fn(dict(state_dict), other)
    assert filtered.keys() == state_dict.keys() and all(filtered[k] is state_dict[k] for k in filtered)
    torch.save(state_dict, tmp_path / 'own.pth')
    load_checkpoint(other, tmp_path / 'own.pth')
    assert torch.equal(other.get_classifier().prototypes, model.get_classifier().prototypes)


@pytest.mark.parametrize('prefix', ['', 'head.', 'module.'])
@pytest.mark.parametrize('name', ['dnc_resnet18', 'dnc_swin_tiny'])
def test_authors_names(tmp_path, name, prefix):
    kwargs = dict(img_size=64, depths=(1, 1, 1, 1), num_classes=5) if 'swin' in name else TINY
    model, other = timm.create_model(name, **kwargs), timm.create_model(name, **kwargs)
    nn.init.normal_(model.get_classifier().mask_norm.bias)
    head_name = f'{model.classifier_name}.'
    released = {prefix + 'convs.0.conv.weight': torch.randn(512, 512, 1, 1)}
    for key, value in model.state_dict().items():
        if key.startswith(head_name):
            released[prefix + key.removeprefix(head_name)] = value
        else:
            released[('module.' if prefix == 'module.' else '') + key] = value
    torch.save({'state_dict': released}, tmp_path / 'released.pth')
    load_checkpoint(other, tmp_path / 'released.pth')
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    if prefix == 'head.':  # timm's checkpoint_path calls load_state_dict
        for another in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            nn.init.zeros_(another.get_classifier().prototypes)
            another.load_state_dict(released, strict=False)
            assert torch.equal(another.get_classifier().prototypes, model.get_classifier().prototypes)


def pretrained(path, **kwargs) -> nn.Module:
    """A tiny model with the weights of a file of 5 classes."""
    return tiny(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=5), **kwargs)


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    torch.manual_seed(1)
    model = tiny()
    set_head(model.get_classifier())
    path = tmp_path_factory.mktemp('dnc') / 'own.pth'
    torch.save(model.state_dict(), path)
    return path, model.state_dict()


def test_pretrained(own):
    path, state_dict = own
    for key, value in pretrained(path).state_dict().items():
        assert torch.equal(value, state_dict[key]), key


def test_other_number_of_classes_gets_new_centroids(own):
    path, state_dict = own
    model = pretrained(path, num_classes=3)
    head = model.get_classifier()
    assert head.prototypes.shape == (3, 4, 32)
    torch.testing.assert_close(head.prototypes.norm(dim=-1), torch.ones(3, 4))
    assert torch.equal(head.mask_norm.weight, torch.ones(3))
    assert torch.equal(head.feat_norm.weight, state_dict['fc.feat_norm.weight'])
    assert torch.equal(model.conv1.weight, state_dict['conv1.weight'])


def test_pretrained_features_need_no_head(own):
    path, state_dict = own
    assert torch.equal(pretrained(path, num_classes=0).conv1.weight, state_dict['conv1.weight'])
    # the configuration has 1000 classes, the file 5
    overlay, channels = dict(file=str(path)), TINY['channels']
    features = timm.create_model(
        'dnc_resnet18',
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        channels=channels,
        features_only=True,
        in_chans=1,
    )
    assert torch.equal(features.bn1.weight, state_dict['bn1.weight'])
    torch.testing.assert_close(features.conv1.weight, state_dict['conv1.weight'].sum(1, keepdim=True))


def test_checkpoint_that_does_not_fit(own, tmp_path):
    path, _ = own
    with pytest.raises(CheckpointError, match='prototypes'):
        pretrained(path, sub_centroids=2)
    with pytest.raises(CheckpointError, match='prototypes'):
        load_checkpoint(tiny(num_classes=3), path)
    with pytest.raises(CheckpointError):
        load_checkpoint(tiny(channels=(8, 16, 24, 40)), path)


def test_checkpoint_with_a_linear_classifier(tmp_path):
    linear = timm.create_model('resnet18', **TINY)
    path = tmp_path / 'linear.pth'
    torch.save(linear.state_dict(), path)
    with pytest.raises(CheckpointError, match=r'missing .*fc\.prototypes.* unknown .*fc\.weight'):
        load_checkpoint(tiny(), path)
    with pytest.raises(CheckpointError, match='missing'):
        pretrained(path)
    overlay = dict(file=str(path), num_classes=5)
    model = nearest_centroid('resnet18', 5, pretrained=True, pretrained_cfg_overlay=overlay, channels=TINY['channels'])
    assert torch.equal(model.conv1.weight, linear.conv1.weight)
    assert isinstance(model.get_classifier(), NearestCentroidHead)


def test_swin_checkpoint_of_another_size(tmp_path):
    kwargs = dict(depths=(1, 1, 1, 1), num_classes=5)
    small = timm.create_model('dnc_swin_tiny', img_size=64, window_size=2, **kwargs)
    torch.save(small.state_dict(), tmp_path / 'small.pth')
    overlay = dict(file=str(tmp_path / 'small.pth'), num_classes=5)
    large = timm.create_model(
        'dnc_swin_tiny', pretrained=True, pretrained_cfg_overlay=overlay, img_size=96, window_size=3, **kwargs
    )
    assert torch.equal(large.get_classifier().prototypes, small.get_classifier().prototypes)
    assert large.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 5)


# ---- Any timm classifier ----


@pytest.mark.parametrize('name', ['test_convnext', 'test_vit', 'test_efficientnet', 'test_mambaout', 'coc_tiny'])
def test_any_backbone(name):
    model = nearest_centroid(name, num_classes=6, sub_centroids=2).eval()
    plain = timm.create_model(name, num_classes=6).eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing == [f'{model.classifier_name}.weight', f'{model.classifier_name}.bias']
    x = torch.randn(1, *model.pretrained_cfg['input_size'])
    features = model.forward_features(x)
    torch.testing.assert_close(features, plain.forward_features(x))
    pooled = plain.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    assert f'{model.pretrained_cfg["classifier"]}.weight' in model.state_dict()
    model.reset_classifier(3)
    assert copy.deepcopy(model)(x).shape == (1, 3)
    assert isinstance(model.get_classifier(), NearestCentroidHead)


def test_nearest_centroid_arguments(tmp_path):
    first = nearest_centroid('test_convnext', num_classes=4, drop_rate=0.2)
    torch.save(first.state_dict(), tmp_path / 'first.pth')
    second = nearest_centroid('test_convnext', num_classes=4, checkpoint_path=tmp_path / 'first.pth')
    assert torch.equal(second.get_classifier().prototypes, first.get_classifier().prototypes)
    assert nearest_centroid('test_convnext').num_classes == 1000
    features = nearest_centroid('test_convnext', num_classes=0)
    assert features.eval()(torch.randn(1, 3, 64, 64)).shape == (1, features.head_hidden_size)
    features.reset_classifier(2)
    assert isinstance(features.get_classifier(), NearestCentroidHead)


@pytest.mark.parametrize(
    'name, kwargs, message',
    [
        ('deit_tiny_distilled_patch16_224', {}, 'head, head_dist'),
        ('resnetv2_18', {}, r"ResNetV2 .*'head.fc'"),
        ('test_convnext', dict(global_pool=''), 'global pooling'),
        ('dnc_resnet18', {}, 'already'),
        ('test_convnext', dict(features_only=True), r"timm\.create_model\('test_convnext', features_only=True\)"),
        ('test_convnext', dict(sub_centroids=-1), 'sub_centroids .*-1'),
    ],
)
def test_models_that_cannot_have_a_centroid_head(name, kwargs, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        nearest_centroid(name, num_classes=10, **kwargs)


def test_unknown_backbone():
    with pytest.raises(RuntimeError, match='Unknown model'):
        nearest_centroid('no_such_model', num_classes=10)
