"""Model folders of segmenters: round trips, a simulated Hub, published systems, training checkpoints, damaged files."""

import json
import shutil

import pytest
import torch
from hub_server import OWNER, HubServer
from huggingface_hub import constants
from safetensors.torch import load_file

from cluster_zoo.errors import CheckpointError, OptionError
from cluster_zoo.weights import cache
from segmentation import create_segmenter, save_pretrained, segmenter_config
from segmentation.data.classes import CAMVID
from segmentation.models.folders import read_segmenter_config
from segmentation.models.importing import import_segmenter

COC = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), head_dim=8, proposals=2)
TINY = dict(head='fcn', backbone='coc_tiny', num_classes=3, channels=8, classifier='cond', **COC)
COLORS = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def _new(**options):
    torch.manual_seed(0)
    return create_segmenter(**TINY | options).eval()


@pytest.fixture(scope='module')
def model():
    return _new(auxiliary=True)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('models') / 'tiny'
    test = dict(mode='slide', crop=[64, 96], stride=[32, 48], scale=[96, 64])
    save_pretrained(model, path, label_names=['a', 'b', '<c>'], colors=COLORS, mean=[0.1] * 3, std=[2] * 3, test=test)
    return path


def _agree(first, second):
    images = torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        return torch.equal(first(images), second.eval()(images))


def test_round_trip(model, folder, tmp_path):
    assert {path.name for path in folder.iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    again = create_segmenter(f'local-dir:{folder}')
    assert _agree(model, again) and again.auxiliary is not None
    config = again.config
    assert config['label_names'] == ['a', 'b', '<c>'] and config['label_colors'] == COLORS
    assert config['pretrained_cfg']['mean'] == [0.1] * 3 and config['test']['crop'] == [64, 96]
    assert again.pretrained_cfg['label_names'] == ['a', 'b', '<c>']
    card = (folder / 'README.md').read_text()
    assert 'pipeline_tag: image-segmentation' in card and '&lt;c&gt;' in card and '<c>' not in card
    again.auxiliary = None  # as for a test
    save_pretrained(again, tmp_path / 'again')
    third = create_segmenter(f'local-dir:{tmp_path}/again')
    assert third.auxiliary is None and _agree(model, third)
    assert third.config['label_names'] == config['label_names'] and third.config['test'] == config['test']


def test_arguments_replace_those_of_the_folder(model, folder):
    untrained = create_segmenter(f'local-dir:{folder}', pretrained=False, num_classes=5, drop_path_rate=0.5)
    assert untrained.num_classes == 5 and untrained.config['label_names'] == [*'01234']
    assert untrained.config['pretrained_cfg']['mean'] == [0.1] * 3 and not _agree(model, untrained.eval())
    with pytest.raises(CheckpointError, match='does not fit'):
        create_segmenter(f'local-dir:{folder}', num_classes=5)
    for options in (dict(backbone='resnet18'), dict(pretrained_backbone=True), dict(checkpoint_path='x')):
        with pytest.raises(OptionError, match='options of a head or a published system'):
            create_segmenter(f'local-dir:{folder}', **options)


@pytest.mark.parametrize('head', ['semantic_fpn_fec_small', 'condnet_r50_ade20k', 'region_proxy_vit_ti16_cityscapes'])
def test_published_systems_know_their_images_and_classes(head):
    with torch.device('meta'):
        config = create_segmenter(head).config
    published = segmenter_config(head)
    assert len(config['label_names']) == len(config['label_colors']) == published.num_classes
    assert config['label_names'][0] == ('road' if 'cityscapes' in head else 'wall')
    assert config['test']['mode'] == published.test_mode and config['segmenter'] == head
    assert config['pretrained_cfg']['input_size'] == [3, published.crop, published.crop]


def test_published_checkpoint_becomes_a_folder(tmp_path):
    """As after a download, but with few classes."""
    model = create_segmenter('semantic_fpn_fec_small').eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'released.pth')
    import_segmenter(tmp_path / 'released.pth', tmp_path / 'fec', head='semantic_fpn_fec_small')
    config = read_segmenter_config(tmp_path / 'fec')
    assert config['model_args']['proposals'] == [10, 10, 5, 5] and config['source']['file'] == 'released.pth'
    assert '35.3 % mIoU on ADE20K, as published' in (tmp_path / 'fec' / 'README.md').read_text()


# Checkpoints of a training


def _training(model, **options):
    names = ('head', 'backbone', 'num_classes', 'channels', 'classifier')
    args = dict(segmenter=None, dataset='folder', auxiliary=True, model_kwargs=COC, mean=None, test_mode=None)
    args |= {key: TINY[key] for key in names} | options
    return dict(arch='fcn_coc_tiny', args=args, state_dict=model.state_dict())


def test_checkpoint_of_a_training(model, tmp_path):
    extra = dict(mean=(0.2, 0.3, 0.4), test_scale=[96, 64], test_crop=[512])
    torch.save(_training(model, **extra) | dict(label_names=['x', 'y', 'z']), tmp_path / 'last.pth.tar')
    import_segmenter(tmp_path / 'last.pth.tar', tmp_path / 'out')
    again = create_segmenter(f'local-dir:{tmp_path}/out')
    assert again.auxiliary is None and _agree(model, again)
    config = again.config
    assert config['pretrained_cfg']['mean'] == [0.2, 0.3, 0.4] and config['label_names'] == ['x', 'y', 'z']
    assert config['test'] == dict(mode='whole', scale=[96, 64])
    import_segmenter(tmp_path / 'last.pth.tar', tmp_path / 'out', label_names=['u', 'v', 'w'])
    assert read_segmenter_config(tmp_path / 'out')['label_names'] == ['u', 'v', 'w']
    with pytest.raises(OptionError, match='2 label names for 3 classes'):
        import_segmenter(tmp_path / 'last.pth.tar', tmp_path / 'out', label_names=['u', 'v'])


def test_the_dataset_names_the_classes(tmp_path):
    model = _new(num_classes=11)
    torch.save(_training(model, dataset='camvid', num_classes=11), tmp_path / 'last.pth.tar')
    import_segmenter(tmp_path / 'last.pth.tar', tmp_path / 'out')
    config = read_segmenter_config(tmp_path / 'out')
    assert config['label_names'] == list(CAMVID.names) and config['label_colors'] == CAMVID.colours.tolist()


@pytest.mark.parametrize('options, message', [
    (dict(head='upernat'), 'no head .upernat'),
    (dict(head=None), 'does not name its model'),
    (dict(backbone=None), 'does not name the backbone'),
    (dict(backbone='hf-hub:me/x'), 'expected a name'),
    (dict(model_kwargs=dict(checkpoint_path='/etc/passwd')), 'model_args.checkpoint_path'),
    (dict(model_kwargs=dict(dims=(65_537,) * 4)), 'expected at most 65536'),
    (dict(mean='os.system'), 'its mean'),
    (dict(channels=9), 'does not fit'),
])  # fmt: skip
def test_hostile_and_incomplete_checkpoints(model, options, message, tmp_path):
    torch.save(_training(model, **options), tmp_path / 'last.pth.tar')
    with pytest.raises((CheckpointError, OptionError), match=message) as error:
        import_segmenter(tmp_path / 'last.pth.tar', tmp_path / 'out')
    assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


def test_weights_of_a_classifier_and_nan(model, tmp_path):
    torch.save(dict(weight=torch.ones(2)), tmp_path / 'classifier.pth')
    with pytest.raises(CheckpointError, match='of a classifier'):
        import_segmenter(tmp_path / 'classifier.pth', tmp_path / 'out', head='fcn')
    broken = _training(model)
    broken['state_dict'] = {
        name: x * torch.nan if x.is_floating_point() else x for name, x in model.state_dict().items()
    }
    torch.save(broken, tmp_path / 'broken.pth')
    with pytest.raises(CheckpointError, match='NaN or infinity'):
        import_segmenter(tmp_path / 'broken.pth', tmp_path / 'out')


# Damaged and hostile folders


@pytest.mark.parametrize('path, value, message', [
    ('head', 'no_head', 'no head'),
    ('head', '../x', 'expected a name'),
    ('backbone', 'hf-hub:evil/x', 'expected a name'),
    ('backbone', 'no_model', 'unknown to timm'),
    ('num_classes', 0, 'num_classes is 0'),
    ('num_classes', True, 'label_names must be a list'),
    ('num_classes', 4, 'label_names must be a list with one item'),
    ('label_colors', [[0, 0, 256]] * 3, 'from 0 to 255'),
    ('label_names', ['a', 'b', 3], 'must be strings'),
    ('model_args', {'checkpoint_path': '/etc/passwd'}, 'checkpoint_path'),
    ('model_args', {'pretrained_backbone': '/etc/passwd'}, 'pretrained_backbone'),
    ('model_args', {'channels': 70_000}, 'at most 65536'),
    ('model_args', {'no_option': 1}, 'describes no model that can be built'),
    ('model_args', [], 'model_args must be an object'),
    ('backbone', None, 'None., is unknown'),
    ('pretrained_cfg', {'url': 'https://example.org/x'}, 'another location'),
    ('pretrained_cfg', {'std': [0, 0, 0]}, 'positive'),
    ('pretrained_cfg', None, 'no configuration of a segmenter'),
    ('test', {'mode': 'code'}, 'another mode'),
    ('test', {'mode': 'slide'}, 'no crop'),
    ('test', {'scale': [0, 1]}, 'test.scale'),
    ('test', {'__class__': 1}, 'its test is'),
    ('auto_map', 'x', 'unknown key'),
    ('sha256', '0', '64 hexadecimal'),
    ('sha256', '0' * 64, 'damaged or was changed'),
])  # fmt: skip
def test_configurations_are_refused(folder, path, value, message, tmp_path):
    shutil.copytree(folder, tmp_path / 'bad')
    config = json.loads((folder / 'config.json').read_text()) | {path: value}
    (tmp_path / 'bad' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        create_segmenter(f'local-dir:{tmp_path}/bad')
    assert '\n' not in str(error.value)


def test_damaged_files(folder, tmp_path):
    bad = tmp_path / 'bad'
    for text in ('', '{', '[]', '"x"', '{"head": 1}'):
        shutil.copytree(folder, bad, dirs_exist_ok=True)
        (bad / 'config.json').write_text(text)
        with pytest.raises(CheckpointError, match=r'config\.json') as error:
            create_segmenter(f'local-dir:{bad}')
        assert '\n' not in str(error.value)
    config = json.loads((folder / 'config.json').read_text())
    del config['sha256']
    (bad / 'config.json').write_text(json.dumps(config))
    (bad / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r'model\.safetensors. is truncated, damaged'):
        create_segmenter(f'local-dir:{bad}')
    (bad / 'model.safetensors').unlink()
    with pytest.raises(CheckpointError, match='contains no weights'):
        create_segmenter(f'local-dir:{bad}')
    with pytest.raises(CheckpointError, match='is no model folder'):
        create_segmenter(f'local-dir:{tmp_path}/nowhere')
    for name in ('local-dir:', 'https://example.org/x', 'ftp:x'):
        with pytest.raises(OptionError, match='expected local-dir:FOLDER or hf-hub:ORG/NAME'):
            create_segmenter(name)


def test_what_cannot_be_saved(model, folder, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('x')
    with pytest.raises(CheckpointError, match='no model folder and cannot be replaced'):
        save_pretrained(model, tmp_path / 'mine')
    assert (tmp_path / 'mine' / 'thesis.txt').exists()
    for options, message in (
        (dict(label_names=['a']), 'label_names must be a list'),
        (dict(colors=[[0, 0]] * 3), 'three numbers'),
        (dict(std=[-1, 1, 1]), 'a positive one'),
        (dict(test=dict(mode='slide')), 'no crop'),
    ):
        with pytest.raises(OptionError, match=message):
            save_pretrained(model, tmp_path / 'new', **options)
    with pytest.raises(OptionError, match='only models of create_segmenter'):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


# The Hub


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        chosen = dict(HF_HUB_CACHE=str(tmp_path / 'hf'), HF_TOKEN_PATH=str(tmp_path / 'token'), HF_HUB_OFFLINE=False)
        for name, value in (chosen | dict(HF_HUB_DISABLE_XET=True)).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', OWNER)
        monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
        monkeypatch.setenv('NO_PROXY', '*')
        yield server


def test_a_repository(server, model, folder, tmp_path):
    server.add('lab/streets', folder, private=True)
    assert _agree(model, create_segmenter('hf-hub:lab/streets', cache_dir=tmp_path / 'cache'))
    with pytest.raises(CheckpointError, match='lab/nothing on the Hugging Face Hub is not available'):
        create_segmenter('hf-hub:lab/nothing')
    config = json.loads((folder / 'config.json').read_text()) | dict(backbone='hf-hub:evil/x')
    server.add(
        'lab/evil',
        dict(
            {'config.json': json.dumps(config).encode()},
            **{'model.safetensors': (folder / 'model.safetensors').read_bytes()},
        ),
    )
    with pytest.raises(CheckpointError, match='expected a name'):
        create_segmenter('hf-hub:lab/evil')
    assert not server.asked('HEAD', 'evil/x') and not server.asked('GET', 'evil/x')
    assert load_file(folder / 'model.safetensors').keys() == model.state_dict().keys()
    assert cache.sha256(folder / 'model.safetensors') == config['sha256']


def test_weights_of_the_organization_of_the_user(server, home, monkeypatch, tmp_path):
    name = 'region_proxy_vit_ti16_cityscapes'
    model = create_segmenter(name)
    save_pretrained(model, tmp_path / 'out')
    server.add(f'lab/{name}', tmp_path / 'out')
    server.add('lab/region_proxy_vit_s16_cityscapes', tmp_path / 'out')
    with pytest.raises(CheckpointError, match='CLUSTER_ZOO_AUTHORS=0'):
        create_segmenter(name, pretrained=True)
    assert server.requests == []
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'lab')
    assert _agree(model.eval(), create_segmenter(name, pretrained=True))
    with pytest.raises(CheckpointError, match='does not describe region_proxy_vit_s16_cityscapes'):
        create_segmenter('region_proxy_vit_s16_cityscapes', pretrained=True)
