"""timm's interface of registered models.

The structural checks run for every name on the meta device, which is cheap. The numerical checks run for the smallest
model of each family. DNC models with timm's backbones are tested in `test_dnc.py`.
"""

import copy
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo, get_pretrained_cfg, list_models
from timm.models._manipulate import group_parameters

import cluster_zoo  # noqa: F401  registers the models

NAMES = list_models(['coc_*', 'fec_*', 'dnc_*'])
OWN = list_models(['coc_*', 'fec_*'])
SMALLEST = ['coc_tiny', 'coc_tiny2', 'fec_small', 'dnc_coc_tiny', 'dnc_fec_small']
FEATURE_CLASSES = ['list', 'dict', 'hook', 'fx', 'getter']


def _set_layer_scales(model):
    """At the initial scale of 1e-5 an error in a branch would not be visible."""
    for name, parameter in model.named_parameters():
        if name.endswith('.gamma'):
            torch.nn.init.constant_(parameter, 0.5)
    return model


def _create(name, **kwargs):
    torch.manual_seed(0)
    return _set_layer_scales(timm.create_model(name, **kwargs)).eval()


def _images(*size, batch=2, chans=3):
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(1))


def test_registered_names():
    coc = ['tiny', 'tiny2', 'tiny_plain', 'small', 'medium', 'base_dim64', 'base_dim96']
    assert set(list_models('coc_*')) == {f'coc_{size}' for size in coc}
    assert set(list_models('fec_*')) == {'fec_small', 'fec_base', 'fec_large'}
    assert len(list_models('dnc_*')) == 14
    assert set(list_models(module='context_cluster')) == set(list_models('coc_*'))
    assert 'coc_small.in1k' in list_models('coc_*', include_tags=True)


@pytest.mark.parametrize('name', NAMES)
def test_configuration_and_head_agree(name):
    classes = 10 if name.endswith('_cifar') else 1000
    with torch.device('meta'):
        model = timm.create_model(name)
        cfg = model.default_cfg
        images = torch.empty(2, *cfg['input_size'])
        features = model.forward_features(images)
        hidden = model.forward_head(features, pre_logits=True)
        assert model.pretrained_cfg is cfg and cfg['architecture'] == name and cfg == cfg | {'num_classes': classes}
        assert hidden.shape == (2, model.head_hidden_size) and model(images).shape == (2, classes)
        channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
        grid = features.shape[1:3] if channels_last else features.shape[2:]
        assert tuple(grid) == tuple(cfg['pool_size']) and model.num_features in features.shape
        for key in ('classifier', 'first_conv'):
            assert f'{cfg[key]}.weight' in model.state_dict()

        model.reset_classifier(7)
        assert model(images).shape == (2, 7) and model.num_classes == 7 and model.get_classifier() is not None
        model.reset_classifier(0)
        assert model(images).shape == hidden.shape and isinstance(model.get_classifier(), torch.nn.Identity)
        assert timm.create_model(name, num_classes=0)(images).shape == hidden.shape
        with pytest.raises(TypeError, match='not_an_option'):
            timm.create_model(name, not_an_option=1)


@pytest.mark.parametrize('name', OWN)
def test_parameter_groups_by_depth(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    fine, coarse = (group_parameters(model, model.group_matcher(coarse=coarse)) for coarse in (False, True))
    assert len(fine) == 2 + sum(len(stage.blocks) for stage in model.stages)  # stem, blocks, head
    assert len(coarse) == 2 + len(model.stages)
    assert sum(map(len, fine.values())) == len(list(model.parameters()))
    assert 'stem.proj.weight' in fine[0]


@pytest.mark.parametrize('name', OWN)
def test_default_configuration(name):
    cfg = get_pretrained_cfg(name)
    assert (cfg.crop_pct, cfg.interpolation, cfg.input_size) == (0.9, 'bicubic', (3, 224, 224))
    with torch.device('meta'), pytest.raises(RuntimeError, match=f'No pretrained weights for {name}'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('feature_cls', [None, *FEATURE_CLASSES])
@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
def test_features_only(name, feature_cls):
    kwargs = dict(feature_cls=feature_cls) if feature_cls else {}
    model = _create(name, features_only=True, **kwargs)
    x = _images(64, 96)
    outputs = model(x)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert model.feature_info.channels() == [o.shape[1] for o in outputs] == [32, 64, 196, 320]
    assert [tuple(o.shape[2:]) for o in outputs] == [(64 // r, 96 // r) for r in model.feature_info.reduction()]
    expected = _create(name).forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert len(timm.create_model(name, features_only=True, out_indices=(1, 3), **kwargs)(x)) == 2


@pytest.mark.parametrize('name', SMALLEST)
@pytest.mark.parametrize('training', [False, True])
def test_an_empty_batch_gives_an_empty_result(name, training):
    model = _create(name).train(training)
    for size in (64, 72):  # 72 does not divide: the sets are padded
        logits = model(_images(size, size, batch=0))
        assert logits.shape == (0, 1000)
    if training:
        logits.sum().backward()


@pytest.mark.parametrize('name', SMALLEST)
def test_forward_intermediates(name):
    model = _create(name)
    x = _images(64, 64)
    with torch.no_grad():
        final, stages = model.forward_intermediates(x)
        assert FeatureInfo(model.feature_info, 4).channels() == [stage.shape[1] for stage in stages]
        torch.testing.assert_close(final, model.forward_features(x))
        torch.testing.assert_close(model.forward_head(final), model(x))
        assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
        (second,) = model.forward_intermediates(x, indices=[-3], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(second, stages[1])
        (last,) = model.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)
        torch.testing.assert_close(last, final)
        with pytest.raises(AssertionError, match='NCHW'):
            model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('name', SMALLEST)
def test_prune_intermediate_layers(name):
    model = _create(name)
    x = _images(64, 64)
    with torch.no_grad():
        stages = model.forward_intermediates(x, intermediates_only=True)
        for i, stage in enumerate(stages):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([i], prune_norm=True) == [i]
            torch.testing.assert_close(pruned.forward_features(x), stage)
            assert pruned.num_classes == 0 and pruned.num_features == stage.shape[1]
            pruned.reset_classifier(3, 'avg')
            assert pruned(x).shape == (2, 3)
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers([3], prune_head=False)
        torch.testing.assert_close(kept(x), model(x))


@pytest.mark.parametrize('name', SMALLEST)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(name):
    model = _create(name, num_classes=5)
    x = _images(64, 64)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        gradients.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('name', SMALLEST)
def test_torchscript_and_fx(name):
    model = _create(name, num_classes=5, scriptable=True)
    scripted, traced = torch.jit.script(model), _trace(model)
    with torch.no_grad():
        for size in ((64, 64), (33, 70)):
            x = _images(*size)
            torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)
        x = _images(64, 64)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def _trace(model):
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    options = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    _, nodes = get_graph_node_names(model, tracer_kwargs=options)
    extractor = create_feature_extractor(model, {nodes[-1]: 'output'}, tracer_kwargs=options)
    return lambda x: extractor(x)['output']


SHALLOW = dict(depths=(1, 1, 1, 1), num_classes=5)  # compiles faster


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
def test_compile_without_graph_breaks_or_a_graph_for_every_batch_size(name):
    model = _create(name, **SHALLOW)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch in (2, 3, 5, 8):
            x = _images(64, 64, batch=batch)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2  # one for the first batch size, one for all others


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', SMALLEST)
def test_autocast_and_half_precision_stay_near(name, dtype):
    model = _create(name, num_classes=5)
    x = _images(64, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', dtype=dtype):
            under_autocast = model(x)
        assert under_autocast.dtype == dtype or 'dnc' in name
        half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    for output in (under_autocast, half):
        # Rounding may change the center that a point joins, so the outputs are only similar.
        assert torch.isfinite(output).all()
        assert torch.nn.functional.cosine_similarity(output.float(), expected).min() > 0.9


@pytest.mark.parametrize('name', SMALLEST)
def test_memory_format_size_batch_and_channels(name):
    model = _create(name, num_classes=5)
    x = _images(64, 64)
    with torch.no_grad():
        strided = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(strided, _create(name, num_classes=5)(x), rtol=1e-4, atol=1e-5)
        for batch, height, width in ((1, 32, 32), (2, 37, 90), (1, 32, 200)):
            output, stages = model.forward_intermediates(_images(height, width, batch=batch))
            assert torch.isfinite(output).all()
            for stage, stride in zip(stages, (4, 8, 16, 32)):
                assert stage.shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))
        for chans in (1, 4):
            assert _create(name, num_classes=5, in_chans=chans)(_images(32, 32, chans=chans)).shape == (2, 5)


@pytest.mark.parametrize('name', SMALLEST)
def test_global_pool_and_drop_rate(name):
    x = _images(64, 96)
    with torch.no_grad():
        assert _create(name, num_classes=0, global_pool='')(x).shape == (2, 320, 2, 3)
        features = _create(name, num_classes=0, global_pool='max')
        torch.testing.assert_close(features(x), features.forward_features(x).amax((2, 3)))
        noisy = _create(name, drop_rate=0.5, drop_path_rate=0.2).train()
        assert not torch.equal(noisy(x), noisy(x))
