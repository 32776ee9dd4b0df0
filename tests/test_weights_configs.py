"""Untrusted model configurations: valid ones are accepted, others raise one error with little time and memory."""

import copy
import json
import time

import pytest
import timm
import torch
from forged import refusal
from timm.models import save_for_hf

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.models.dnc import nearest_centroid
from cluster_zoo.weights import configs
from cluster_zoo.weights.configs import check_config, check_size, read_config
from cluster_zoo.weights.loading import load_model

SMALL = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4)


@pytest.mark.parametrize('name, args', [
    ('coc_tiny', dict(SMALL, proposals=3, regions=(4, 4, 2, 1), num_classes=7)),
    ('coc_tiny', dict(SMALL, in_chans=5, weighted_mean=False, init_values=1e-5, global_pool='avg')),
    ('coc_tiny_plain', dict(SMALL, num_classes=0, global_pool='')),
    ('fec_small', dict(num_classes=3)),
    ('dnc_resnet18_cifar', dict(num_classes=10, sub_centroids=2, common_start=0.5)),
    ('dnc_swin_tiny', dict(img_size=64, window_size=4, num_classes=5)),
    ('vit_tiny_patch16_224', dict(dynamic_img_size=True, act_layer='gelu_tanh', img_size=(96, 64), num_classes=5)),
])  # fmt: skip
def test_a_configuration_that_timm_saved_rebuilds_the_model(name, args, tmp_path):
    model = timm.create_model(name, **args)
    labels = [f'class {i}' for i in range(model.num_classes)]
    more = dict(label_names=labels, label_descriptions=dict.fromkeys(labels, 'über all'))
    save_for_hf(model, tmp_path, more | dict(source=dict(file='c.pth', sha256='1' * 64)), safe_serialization=True)
    config = read_config(tmp_path)
    again = timm.create_model(config['architecture'], **config['model_args'])
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    loaded = load_model(f'local-dir:{tmp_path}')
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_missing_values_and_small_values_are_accepted():
    cfg = dict(label_names={'0': 'cat', '1': 'dog'}, label_offset=0, crop_pct=2, num_classes=2, url='', file=None)
    check_config(dict(architecture='coc_tiny', pretrained_cfg=cfg, sha256=None, source=None, label_names=None), 'here')
    check_config(dict(architecture='resnet18', pretrained_cfg=cfg | dict(label_offset=1)), 'here')
    for size in (None, 64, [96, 64], 4096):
        check_config(dict(architecture='dnc_swin_tiny', pretrained_cfg=cfg, model_args=dict(img_size=size)), 'here')


def test_custom_backbones_are_accepted(tmp_path):
    save_for_hf(nearest_centroid('resnet10t', num_classes=3), tmp_path, safe_serialization=True)
    assert read_config(tmp_path)['architecture'] == 'resnet10t'


def test_pretrained_configurations_of_timm_are_accepted():
    """All pretrained configurations of timm except those with a custom loader."""
    names = timm.list_pretrained()
    custom = 0
    for name in names:
        cfg = timm.models.get_pretrained_cfg(name).to_dict(remove_source=True)
        config = dict(architecture=cfg.pop('architecture'), num_classes=cfg['num_classes'], pretrained_cfg=cfg)
        if cfg['custom_load']:
            custom += 1
            assert 'custom_load would load' in refusal(check_config, config, name)
        else:
            check_config(config, name)
    assert len(names) > 1000 and custom < len(names) / 10


def test_the_earlier_layout_is_accepted():
    config = dict(architecture='resnet18', num_features=512, labels=['a', 'b'], num_classes=2, mean=[0.5], std=[0.5])
    check_config(config, 'here')
    assert 'its url would load' in refusal(check_config, config | dict(url='http://x'), 'here')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A model folder as timm saves it."""
    folder = tmp_path_factory.mktemp('model')
    save_for_hf(timm.create_model('coc_tiny', **SMALL), folder, safe_serialization=True)
    return folder


def _nested(depth):
    return 1 if depth == 0 else [_nested(depth - 1)]


NAN, INFINITY = float('nan'), float('inf')
CHANGES = {
    # Code
    'auto_map': [{'AutoModel': 'evil--modeling.Evil'}],
    'trust_remote_code': [True],
    'custom_pipelines': [{'a': 1}],
    'pretrained_cfg.custom_load': [True, 'hf'],
    'model_args._target_': ['os.system'],
    'architecture': ['os.system', 'hf-hub:evil/coc_tiny', 'local-dir:/tmp', '../coc_tiny', '', None, 7, ['coc_tiny']],
    # Other weights
    'pretrained_cfg.url': ['http://localhost/w.pth', ['x'], 7],
    'pretrained_cfg.file': ['/etc/passwd'],
    'pretrained_cfg.hf_hub_id': ['evil/model'],
    'pretrained_cfg.hf_hub_filename': ['../model.safetensors'],
    'pretrained_cfg.source': ['url'],
    'pretrained_cfg.state_dict': [{'a': 1}],
    'pretrained_cfg.surprise': [1],
    'pretrained_cfg': ['in1k', []],
    # Arguments
    **{f'model_args.{key}': ['x'] for key in (
        'checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict',
        'pretrained_filter_fn', 'variant_args', 'args_from_weights', 'features_only', 'feature_cls', 'feature_cfg',
        'cache_dir', 'device', 'model_cls', 'variant', 'kwargs_filter', 'model_name', '__class__', 'a-b', '', 'colour',
    )},
    'model_args.norm_layer': [
        'torch.nn.LayerNorm', 'os:system', '/etc/passwd', 'a' * 100, {'a': 1}, [[[8]]], [8] * 1000, 'a\x1b[2J'
    ],
    'model_args': [[1], 'x', {'\x1b[2J': 1}, {'dims': _nested(500)}, {'x' * 100_000: 1}],
    'model_args.dims': [[10**9, 8, 8, 8], [2000, 2000, 2000, 30000], [-8, 8, 8, 8], 'abc'],
    'model_args.depths': [[70_000], 'abc'],
    'model_args.head_dim': [10**9, NAN, INFINITY, 0],
    'model_args.img_size': [4097, [28672, 28672], 'large', 0, 6.5, 10**6],
    # Wrong types and sizes
    'sha256': ['', ['a'], 'g' * 64, '0' * 63],
    'num_classes': ['7', 10**9, -3, 2.5, {}],
    'pretrained_cfg.num_classes': [10**9],
    'pretrained_cfg.input_size': [[3, 224], [3, 0, 224], [3, 10**6, 10**6], 224, {'a': 1}, [], [3, NAN, 3]],
    'pretrained_cfg.test_input_size': [['3', 1, 1]],
    'pretrained_cfg.mean': [0.5, [0.5, 'x', 0.5], [0.5] * 1000, [NAN] * 3, [0.5, 0.5]],
    'pretrained_cfg.std': [[0.0, 0.5, 0.5], [INFINITY] * 3],
    'pretrained_cfg.crop_pct': [0, '0.9', NAN, 0.01],
    'pretrained_cfg.interpolation': [3, 'evil', ['bicubic']],
    'pretrained_cfg.crop_mode': ['x'],
    'pretrained_cfg.license': ['mit\x07'],
    'label_names': ['a\x1b[2Jb', ['a\x07']],
    'label_descriptions': [{'a': {'b': '\x07'}}],
}  # fmt: skip


def _changed(whole, folder, *changes):
    """Writes a copy of a folder with changes in its configuration."""
    config = json.loads((whole / 'config.json').read_text())
    for path, value in changes:
        *parents, key = path.split('.')
        target = config
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = value
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'model.safetensors').hardlink_to(whole / 'model.safetensors')
    return folder


@pytest.mark.parametrize('path, value', [(path, x) for path, values in CHANGES.items() for x in values], ids=str)
def test_invalid_configurations_are_refused(path, value, whole, tmp_path):
    folder = _changed(whole, tmp_path, (path, value))
    refusal(load_model, f'local-dir:{folder}')


@pytest.mark.parametrize('path, value, words', [
    ('auto_map', {'a': 'b'}, 'auto_map would load custom code'),
    ('architecture', 'os.system', "'os.system', is unknown"),
    ('pretrained_cfg.url', 'http://x', 'url would load'),
    ('model_args.checkpoint_path', 'x', 'checkpoint_path is not an argument of a model'),
    ('model_args.norm_layer', 'os.system', 'norm_layer must be a number'),
    ('pretrained_cfg.interpolation', 'evil', 'interpolation'),
    ('model_args.dims', [2000, 2000, 2000, 30000], 'describes a model of'),
    ('model_args.colour', 3, 'no model that can be built'),
])  # fmt: skip
def test_the_message_contains_the_key(path, value, words, whole, tmp_path):
    assert words in refusal(load_model, f'local-dir:{_changed(whole, tmp_path, (path, value))}')


@pytest.mark.parametrize('changes, words', [
    ([('model_args.act_layer', 'os.system')], 'model_args.act_layer must be a number'),
    ([('model_args.layers', [60_000] * 4)], 'takes more than'),
    ([('model_args.width', 3)], 'no model that can be built'),
    ([('pretrained_cfg.url', 'http://localhost')], 'its url would load'),
])  # fmt: skip
def test_architectures_of_timm_are_checked_too(changes, words, tmp_path, monkeypatch):
    monkeypatch.setattr(configs, '_SECONDS', 1)
    save_for_hf(timm.create_model('resnet18', num_classes=2), tmp_path, safe_serialization=True)
    (tmp_path / 'new').mkdir()
    folder = _changed(tmp_path, tmp_path / 'new', *changes)
    start = time.monotonic()
    assert words in refusal(load_model, f'local-dir:{folder}')
    assert words in refusal(load_model, f'local-dir:{folder}', pretrained=False)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize('name, args', [
    ('coc_tiny', dict(SMALL, depths=[60_000, 1, 1, 1])),
    ('dnc_swin_tiny', dict(depths=[60_000, 1, 1, 1])),
    ('resnet18', dict(layers=[60_000] * 4)),
    ('vit_tiny_patch16_224', dict(depth=60_000)),
])  # fmt: skip
def test_building_a_huge_depth_stops_at_the_time_limit(name, args, monkeypatch):
    monkeypatch.setattr(configs, '_SECONDS', 1)
    start = time.monotonic()
    assert 'more than 1 s' in refusal(check_size, lambda: timm.create_model(name, **args), None, 'it')
    assert time.monotonic() - start < 5


@pytest.mark.parametrize('content', [
    b'', b'{"architecture": "coc_tiny"', b'\xff\xfe', b'[]', b'null', b'"x"', b'7', b'[' * 100_000,
    b'{"a":' * 100_000 + b'1' + b'}' * 100_000, b'{"architecture": "coc_tiny", "mean": [NaN]}',
    b'{"architecture": "coc_tiny", "mean": [1e999]}',
    b'{"architecture": "coc_tiny", "num_classes": ' + b'9' * 5000 + b'}',
    b'{"architecture": "coc_tiny", "num_classes": ' + b'9' * 4000 + b'}', b' ' * (5 << 20),
    b'{"architecture": "coc_tiny", "notes": "' + b'x' * (5 << 20) + b'"}', b'{"architecture": "\\ud800"}',
    b'{"architecture": "coc_tiny", "label_names": ["\\ud800"]}', b'{"pretrained_cfg": {}}', b'{}',
])  # fmt: skip
def test_files_without_a_configuration_are_refused(content, tmp_path):
    (tmp_path / 'config.json').write_bytes(content)
    refusal(read_config, tmp_path)
    refusal(load_model, f'local-dir:{tmp_path}')


def test_folders_without_a_configuration_are_refused(tmp_path, whole):
    assert 'no config.json' in refusal(read_config, tmp_path)
    assert 'no config.json' in refusal(read_config, tmp_path / 'missing')
    (tmp_path / 'config.json').mkdir()
    assert 'damaged' in refusal(read_config, tmp_path)
    assert 'its architecture is coc_tiny, not coc_small' in refusal(read_config, whole, 'coc_small')


def test_the_sha256_of_the_weights_is_checked(whole, tmp_path):
    folder = _changed(whole, tmp_path, ('sha256', '0' * 64))
    assert 'its SHA-256 is' in refusal(load_model, f'local-dir:{folder}')
    assert 'its SHA-256 is' in refusal(timm.create_model, f'local-dir:{folder}', pretrained=True)


def test_values_of_any_type_are_accepted_or_refused_with_one_line():
    base = dict(architecture='coc_tiny', pretrained_cfg=dict(input_size=[3, 224, 224], mean=[0.5] * 3), model_args={})
    values = [None, True, 0, -1, 10**400, 1e308, float('nan'), '', 'x' * 10_000, [], {}, [[]], [None], {'': None}, '\0']
    keys = [
        *base,
        *(f'pretrained_cfg.{key}' for key in timm.models.PretrainedCfg().__dict__),
        'model_args.dims',
        'labels',
    ]
    for path in keys:
        for value in values:
            config = copy.deepcopy(base)
            *parents, key = path.split('.')
            (config[parents[0]] if parents else config)[key] = value
            try:
                check_config(config, 'here')
            except configs.CheckpointError as error:
                assert str(error).isprintable() and len(str(error)) < 1000
