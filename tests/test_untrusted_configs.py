"""Model configurations whose author is not trusted."""

import copy
import json

import pytest
import timm
from forged import refusal
from timm.models import save_for_hf

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.dnc import nearest_centroid
from cluster_zoo.untrusted import check_config, read_config_file

SMALL = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4)


# What is accepted


@pytest.mark.parametrize('name, args', [
    ('coc_tiny', dict(SMALL, proposals=3, regions=(4, 4, 2, 1), num_classes=7)),
    ('coc_tiny', dict(SMALL, in_chans=5, weighted_mean=False, init_values=1e-5, global_pool='avg')),
    ('coc_tiny_plain', dict(SMALL, num_classes=0, global_pool='')),
    ('fec_small', dict(num_classes=3)),
    ('dnc_resnet18_cifar', dict(num_classes=10, sub_centroids=2, common_start=0.5)),
    ('dnc_swin_tiny', dict(img_size=64, window_size=4, num_classes=5)),
    ('vit_tiny_patch16_224', dict(dynamic_img_size=True, act_layer='gelu_tanh', img_size=(96, 64), num_classes=5)),
])  # fmt: skip
def test_what_timm_saves_is_accepted_and_makes_the_model_again(name, args, tmp_path):
    model = timm.create_model(name, **args)
    labels = [f'class {i}' for i in range(model.num_classes)]
    more = dict(label_names=labels, label_descriptions=dict.fromkeys(labels, 'über all'), sha256='0' * 64)
    save_for_hf(model, tmp_path, more | dict(source=dict(file='c.pth', sha256='1' * 64)), safe_serialization=True)
    config = read_config_file(tmp_path / 'config.json')
    assert config['sha256'] == '0' * 64
    again = timm.create_model(config['architecture'], **config['model_args'])
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}


def test_what_is_left_out_says_nothing_and_what_is_small_is_accepted():
    cfg = dict(label_names={'0': 'cat', '1': 'dog'}, label_offset=0, crop_pct=2, num_classes=2, url='', file=None)
    check_config(dict(architecture='coc_tiny', pretrained_cfg=cfg, sha256=None, source=None, label_names=None), 'here')
    check_config(dict(architecture='resnet18', pretrained_cfg=cfg | dict(label_offset=1)), 'here')  # timm does so
    for size in (None, 64, [96, 64], 4096):
        check_config(dict(architecture='dnc_swin_tiny', pretrained_cfg=cfg, model_args=dict(img_size=size)), 'here')


def test_backbones_of_ones_own_are_accepted(tmp_path):
    save_for_hf(nearest_centroid('resnet10t', num_classes=3), tmp_path, safe_serialization=True)
    assert read_config_file(tmp_path / 'config.json')['architecture'] == 'resnet10t'


def test_what_timm_publishes_is_accepted():
    """Every pretrained configuration of timm, but those whose weights have a loader of their own."""
    names = timm.list_pretrained()
    assert len(names) > 1000
    custom = set()
    for name in names:
        cfg = timm.models.get_pretrained_cfg(name).to_dict(remove_source=True)
        config = dict(architecture=cfg.pop('architecture'), num_classes=cfg['num_classes'], pretrained_cfg=cfg)
        if cfg['custom_load']:
            custom.add(name)
            assert 'pretrained_cfg.custom_load' in refusal(check_config, config, name)
        else:
            check_config(config, name)
    assert len(custom) < len(names) / 10


def test_the_earlier_layout_is_accepted():
    config = dict(architecture='resnet18', num_features=512, labels=['a', 'b'], num_classes=2, mean=[0.5], std=[0.5])
    check_config(config, 'here')
    assert 'its url leads to other weights' in refusal(check_config, config | dict(url='http://x'), 'here')
    assert 'its labels is a list of text' in refusal(check_config, config | dict(labels=[1]), 'here')


# What is refused


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A configuration as timm saves it."""
    folder = tmp_path_factory.mktemp('model')
    save_for_hf(timm.create_model('coc_tiny', **SMALL), folder, safe_serialization=True)
    return json.loads((folder / 'config.json').read_text())


def _nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


CHANGES = [
    # Code, and what else is imported or built
    ('auto_map', {'AutoModel': 'evil--modeling.Evil'}, 'auto_map asks for code of its own'),
    ('trust_remote_code', True, 'trust_remote_code asks for code of its own'),
    ('nested.trust_remote_code', True, 'nested.trust_remote_code asks'),
    ('pretrained_cfg.custom_load', True, 'pretrained_cfg.custom_load asks'),
    ('model_args._target_', 'os.system', 'model_args._target_ asks'),
    ('architecture', 'os.system', "its architecture, 'os.system', is none"),
    ('architecture', 'hf-hub:evil/coc_tiny', 'is none'),
    ('architecture', '../coc_tiny', 'is none'),
    ('architecture', None, 'is none'),
    ('architecture', ['coc_tiny'], 'is none'),
    # Other weights
    ('pretrained_cfg.url', 'http://localhost/w.pth', 'its url leads to other weights'),
    ('pretrained_cfg.file', '/etc/passwd', 'its file leads to other weights'),
    ('pretrained_cfg.hf_hub_id', 'evil/model', 'its hf_hub_id leads to other weights'),
    ('pretrained_cfg.source', 'url', 'its source leads to other weights'),
    ('pretrained_cfg.state_dict', {'a': 1}, 'its state_dict leads to other weights'),
    ('pretrained_cfg.hf_hub_filename', '../model.safetensors', 'the name of a file beside'),
    ('pretrained_cfg.hf_hub_filename', '/model.safetensors', 'the name of a file beside'),
    ('pretrained_cfg.hf_hub_filename', '.hidden', 'the name of a file beside'),
    ('pretrained_cfg.surprise', 1, "an unknown key, 'surprise'"),
    ('pretrained_cfg', None, 'its pretrained_cfg is an object, not None'),
    ('pretrained_cfg', 'in1k', 'its pretrained_cfg is an object'),
    # Arguments
    ('model_args.checkpoint_path', '/etc/passwd', 'model_args.checkpoint_path is no argument of a model'),
    ('model_args.pretrained', False, 'model_args.pretrained is no argument'),
    ('model_args.pretrained_cfg', 'in1k', 'model_args.pretrained_cfg is no argument'),
    ('model_args.pretrained_cfg_overlay', {'file': '/x'}, 'model_args.pretrained_cfg_overlay is no argument'),
    ('model_args.pretrained_strict', False, 'model_args.pretrained_strict is no argument'),
    ('model_args.pretrained_filter_fn', 'x', 'model_args.pretrained_filter_fn is no argument'),
    ('model_args.variant_args', 1, 'model_args.variant_args is no argument'),
    ('model_args.args_from_weights', 1, 'model_args.args_from_weights is no argument'),
    ('model_args.features_only', True, 'model_args.features_only is no argument'),
    ('model_args.feature_cls', 'hook', 'model_args.feature_cls is no argument'),
    ('model_args.cache_dir', 'x', 'model_args.cache_dir is no argument'),
    ('model_args.device', 'cuda', 'model_args.device is no argument'),
    ('model_args.__class__', 'x', 'model_args.__class__ is no argument'),
    ('model_args.a-b', 1, 'model_args.a-b is no argument'),
    ('model_args.norm_layer', 'torch.nn.LayerNorm', 'model_args.norm_layer is no number, no choice'),
    ('model_args.norm_layer', 'os:system', 'model_args.norm_layer is no number'),
    ('model_args.norm_layer', '/etc/passwd', 'model_args.norm_layer is no number'),
    ('model_args.norm_layer', 'a' * 100, 'model_args.norm_layer is no number'),
    ('model_args.norm_layer', {'a': 1}, 'model_args.norm_layer is no number'),
    ('model_args.dims', [[[8]]], 'model_args.dims is no number'),
    ('model_args.dims', [8] * 1000, 'model_args.dims is no number'),
    ('model_args.dims', [10**9, 8, 8, 8], 'model_args.dims is no number'),
    ('model_args.head_dim', 10**9, 'model_args.head_dim is no number'),
    ('model_args.img_size', 4097, 'model_args.img_size is one or two sides of up to 4096 pixels'),
    ('model_args.img_size', [28672, 28672], 'model_args.img_size is one or two sides'),
    ('model_args.img_size', [64, 64, 64], 'model_args.img_size is one or two sides'),
    ('model_args.img_size', 'large', 'model_args.img_size is one or two sides'),
    ('model_args', [1], 'its model_args are an object'),
    # Where the weights are from
    ('sha256', '', 'its sha256 is 64 hexadecimal digits'),
    ('sha256', ['a'], 'its sha256 is 64 hexadecimal digits'),
    ('sha256', 'g' * 64, 'its sha256 is 64 hexadecimal digits'),
    ('sha256', '0' * 63, 'its sha256 is 64 hexadecimal digits'),
    ('source', 'somewhere', 'its source is an object of short text'),
    ('source', {'file': 1}, 'its source is an object of short text'),
    ('source', {'file': 'a' * 501}, 'its source is an object of short text'),
    ('source', dict.fromkeys(map(str, range(100)), ''), 'its source is an object of short text'),
    # Wrong types and sizes
    ('num_classes', '7', 'its num_classes is a number from 0 to 1,000,000'),
    ('num_classes', 10**9, 'its num_classes'),
    ('num_classes', True, 'its num_classes'),
    ('pretrained_cfg.num_classes', -3, 'its num_classes'),
    ('pretrained_cfg.num_classes', 2.5, 'its num_classes'),
    ('pretrained_cfg.input_size', [3, 224], 'its input_size is channels, height and width'),
    ('pretrained_cfg.input_size', [3, 0, 224], 'its input_size'),
    ('pretrained_cfg.input_size', [3, 10**6, 10**6], 'its input_size'),
    ('pretrained_cfg.input_size', [3, 4097, 224], 'its input_size'),
    ('pretrained_cfg.input_size', 224, 'its input_size'),
    ('pretrained_cfg.test_input_size', ['3', 1, 1], 'its test_input_size'),
    ('pretrained_cfg.mean', 0.5, 'its mean is one number a channel'),
    ('pretrained_cfg.mean', [0.5, 0.5], 'its mean and std have (2, 3) numbers'),
    ('pretrained_cfg.mean', [0.5, 'x', 0.5], 'its mean'),
    ('pretrained_cfg.mean', [0.5] * 1000, 'its mean'),
    ('pretrained_cfg.std', [0.0, 0.5, 0.5], 'its std is one positive number a channel'),
    ('pretrained_cfg.crop_pct', 0, 'its crop_pct'),
    ('pretrained_cfg.crop_pct', '0.9', 'its crop_pct'),
    ('pretrained_cfg.crop_pct', 0.01, 'its crop_pct is a part of the image, from 0.1 to 2'),
    ('pretrained_cfg.test_crop_pct', 2.5, 'its test_crop_pct is a part of the image'),
    ('pretrained_cfg.interpolation', 3, 'its interpolation is text'),
    ('pretrained_cfg.first_conv', 7, 'its first_conv is names of modules'),
    ('pretrained_cfg.classifier', 'a(b)', 'its classifier is names of modules'),
    ('pretrained_cfg.pool_size', ['a', 7], 'its pool_size is a size'),
    ('pretrained_cfg.fixed_input_size', 'no', 'its fixed_input_size is true or false'),
    ('label_names', 'a\x1b[2Jb', 'label_names has control characters'),
    ('label_names', [1, 2], 'its label_names is a list of text'),
    ('label_names', 'ab', 'its label_names is a list of text'),
    ('pretrained_cfg.label_names', {'0': ['a']}, 'its label_names is a list of text'),
    ('label_descriptions', {'a': {}}, 'its label_descriptions is text for each label'),
    ('label_descriptions', ['a'], 'its label_descriptions is text for each label'),
    ('pretrained_cfg.label_offset', 1, 'its label_offset leaves classes out'),
    ('pretrained_cfg.label_offset', -1, 'its label_offset is 0 or 1'),
    ('pretrained_cfg.license', 'mit\x07', 'pretrained_cfg.license has control characters'),
    ('a\x1b[2J', 1, 'a key that is no plain text'),
    ('model_args.' + 'a' * 10_000, [[[1]]], 'model_args.aaaa'),
    ('\u202eabc', {'auto_map': 1}, 'abc.auto_map asks'),
    ('notes', _nested(20), 'notes is nested too deeply'),
]


@pytest.mark.parametrize('path, value, words', CHANGES)
def test_configurations_that_do_more_than_describe_are_refused(path, value, words, whole, tmp_path):
    config = copy.deepcopy(whole)
    *folders, key = path.split('.')
    target = config
    for folder in folders:
        target = target.setdefault(folder, {})
    target[key] = value
    (tmp_path / 'config.json').write_text(json.dumps(config))
    message = refusal(read_config_file, tmp_path / 'config.json')
    assert words in message
    assert str(tmp_path / 'config.json') in message


@pytest.mark.parametrize('content, words', [
    (b'', 'damaged'),
    (b'{"architecture": "coc_tiny"', 'damaged'),
    (b'\xff\xfe', 'damaged'),
    (b'[]', 'a model configuration is an object, this is a list'),
    (b'null', 'this is a NoneType'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'{"a":' * 100_000 + b'1' + b'}' * 100_000, 'nested too deeply'),
    (b'{"architecture": "coc_tiny", "architecture": "coc_small"}', 'a name stands twice'),
    (b'{"architecture": "coc_tiny", "mean": [NaN]}', 'NaN is no number'),
    (b'{"architecture": "coc_tiny", "mean": [1e999]}', 'mean is not a finite number'),
    (b'{"architecture": "coc_tiny", "num_classes": ' + b'9' * 5000 + b'}', 'damaged'),
    (b' ' * (4 * 2**20 + 1), 'takes no more than'),
])  # fmt: skip
def test_files_that_are_no_configuration(content, words, tmp_path):
    (tmp_path / 'config.json').write_bytes(content)
    assert words in refusal(read_config_file, tmp_path / 'config.json')


def test_a_missing_file(tmp_path):
    assert 'No model configuration at' in refusal(read_config_file, tmp_path / 'config.json')
    assert 'No model configuration at' in refusal(read_config_file, tmp_path)


def test_another_architecture_than_expected(whole):
    check_config(whole, 'here', 'coc_tiny')
    assert "its architecture is 'coc_tiny', not coc_small" in refusal(check_config, whole, 'here', 'coc_small')
