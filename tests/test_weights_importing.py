"""Import of checkpoint files to model folders, model cards, and models from folders and from the cache."""

import json
import os
import re
import shutil
import zipfile
from argparse import Namespace
from itertools import chain

import numpy as np
import pytest
import timm
import torch
import yaml
from hardship import full_disk, read_only
from huggingface_hub import ModelCard
from parity_cases import recipe, save_released
from safetensors.torch import load_file, save_file

from cluster_zoo.errors import CheckpointError
from cluster_zoo.weights import cache, importing, metadata
from cluster_zoo.weights.card import model_card
from cluster_zoo.weights.importing import import_checkpoint, install

pytestmark = pytest.mark.usefixtures('home')
TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, regions=1)
ARGUMENTS = dict(TINY, num_classes=5)
BUNDLED = 'coc_tiny_plain.cifar10'


def _tiny(seed=0, name='coc_tiny', **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**ARGUMENTS, **kwargs}).eval()


def _saved(path, content=None, **more):
    torch.save(dict(state_dict=_tiny().state_dict(), **more) if content is None else content, path)
    return path


def _loaded(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def _same(a, b, size=64):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return torch.equal(a(images), b(images))


def _config(folder):
    return json.loads((folder / 'config.json').read_text(encoding='utf-8'))


def _snapshot(root):
    """All files and folders in a folder, with their content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in root.rglob('*')}


# --- conversion of a checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', ['coc_tiny', 'fec_small'])
def test_an_authors_file(case, tmp_path):
    path = save_released(case, tmp_path / 'model_best.pth.tar')
    import_checkpoint(path, folder := tmp_path / 'a' / 'coc_small.in1k')  # the name of the folder has no effect
    assert {x.name for x in folder.iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    assert [x.name for x in folder.parent.iterdir()] == [folder.name]
    config = _config(folder)
    assert config['architecture'] == case and config['num_classes'] == 1000
    assert config['sha256'] == cache.sha256(folder / 'model.safetensors')
    assert config['source'] == dict(
        file='model_best.pth.tar', sha256=cache.sha256(path), weights='the only ones in the file'
    )
    assert 'num_classes' not in config['model_args']  # transformers' wrapper would pass it twice
    assert not {'url', 'tag', 'license', 'label_names'} & config['pretrained_cfg'].keys()
    head = load_file(folder / 'model.safetensors')['head.fc.weight']
    assert torch.equal(head, recipe.state_dict(case)['head.weight'].float())
    assert _same(_loaded(folder), timm.create_model(case, checkpoint_path=path).eval())
    card = (folder / 'README.md').read_text(encoding='utf-8')
    assert 'No results are known' in card and config['source']['sha256'] in card and config['sha256'] in card


def test_weights_from_before_june_2023_keep_their_arguments(tmp_path, home, caplog):
    old = {}
    for name, value in recipe.state_dict('coc_tiny').items():
        for new, former in (('f', 'fc1'), ('v', 'fc_v'), ('proj', 'fc2')):
            name = name.replace(f'.token_mixer.{new}.', f'.token_mixer.{former}.')
        old[name] = value[..., None, None] if '.mlp.fc' in name and name.endswith('.weight') else value
    path = _saved(tmp_path / 'old.pth', dict(state_dict=old))
    import_checkpoint(path, tmp_path / 'old', 'coc_tiny')
    assert _config(tmp_path / 'old')['model_args']['weighted_mean'] is False
    (home / 'coc_tiny.in1k').mkdir(parents=True)
    install('coc_tiny.in1k', path, home / 'coc_tiny.in1k', {})
    expected = [timm.create_model('coc_tiny', weighted_mean=x, checkpoint_path=path).eval() for x in (False, True)]
    assert caplog.text.count('trained with weighted_mean=False') == 1  # for the second model
    for model in (_loaded(tmp_path / 'old'), timm.create_model('coc_tiny.in1k', pretrained=True).eval()):
        assert [_same(model, other) for other in expected] == [True, False]


def test_the_options_of_a_training_script_build_the_model(tmp_path):
    model, averaged = _tiny(), _tiny(1)
    options = dict(
        model='coc_tiny', model_kwargs=TINY, num_classes=5, gp=None, in_chans=None, img_size=48, mean=(0.1, 0.2, 0.3),
        std=None, interpolation='', crop_pct=1.0, lr=0.1,
    )  # fmt: skip
    both = dict(state_dict=model.state_dict(), state_dict_ema=averaged.state_dict(), epoch=3, arch='coc_tiny')
    only = {key: value for key, value in both.items() if key != 'state_dict'}
    nested = dict(model=dict(model_ema=averaged.state_dict()), metric=np.float64(73.2))
    for state, args, use_ema, expected in (
        (both, Namespace(**options), False, model), (both, options, True, averaged), (only, options, False, averaged),
        (nested, options, False, averaged),
    ):  # fmt: skip
        _saved(tmp_path / 'last.pth.tar', state | dict(args=args))
        import_checkpoint(tmp_path / 'last.pth.tar', folder := tmp_path / 'folder', use_ema=use_ema)
        loaded = _loaded(folder)
        assert _same(loaded, expected) and not _same(loaded, averaged if expected is model else model)
        taken, other = ('of the last update', 'averaged over the updates')[:: 1 if expected is model else -1]
        flag = '--use-ema' if expected is model else 'without --use-ema'
        both_of = f'{taken} (the file also has weights {other}: {flag})'
        taken = both_of if state is both else f'{taken}, the only ones in the file'
        assert _config(folder)['source']['weights'] == taken
        assert f'- weights: {taken}\n' in (folder / 'README.md').read_text(encoding='utf-8')
        data = timm.data.resolve_model_data_config(loaded)
        assert (data['input_size'], tuple(data['mean']), data['crop_pct']) == ((3, 48, 48), (0.1, 0.2, 0.3), 1.0)


def test_a_checkpoint_of_train_py_needs_no_options(train, tmp_path):
    arguments = ['--dataset', 'cluster_zoo/cifar10_sample', '--model', 'coc_tiny', '--num-classes', '10', '-b', '500']
    arguments += ['--img-size', '32', '--crop-pct', '1', '--epochs', '1', '--cooldown-epochs', '0', '--workers', '0']
    arguments += ['--output', str(tmp_path), '--experiment', 'run', '--val-fraction', '0.1']
    arguments += ['--model-kwargs', *(f'{key}={value}'.replace(' ', '') for key, value in TINY.items())]
    train.main(arguments)
    path = tmp_path / 'run' / 'last.pth.tar'
    for size, kwargs in ((32, {}), (96, dict(data_config=dict(img_size=96)))):
        import_checkpoint(path, tmp_path / 'folder', **kwargs)
        loaded = _loaded(tmp_path / 'folder')
        assert loaded.pretrained_cfg['label_names'][:2] == ['airplane', 'automobile'] and loaded.num_classes == 10
        data = timm.data.resolve_model_data_config(loaded)
        assert (data['input_size'], data['crop_pct']) == ((3, size, size), 1.0) and len(loaded.stages[0].blocks) == 1


@pytest.mark.parametrize('name, kwargs', [
    ('dnc_resnet18_cifar', dict(num_classes=3, sub_centroids=2)),
    ('resnet18', dict(num_classes=3, in_chans=1)),  # of timm
])  # fmt: skip
def test_a_state_dict_with_options(name, kwargs, tmp_path):
    model = timm.create_model(name, **kwargs).eval()
    path = _saved(tmp_path / 'bare.pth', model.state_dict())
    labels = ['a', 'b', 'c: "d"']
    data = dict(img_size=40, mean=(0.5,) * kwargs.get('in_chans', 3))
    import_checkpoint(path, tmp_path / 'x', name, model_args=kwargs, data_config=data, label_names=labels)
    loaded = _loaded(tmp_path / 'x')
    found = timm.data.resolve_model_data_config(loaded)
    assert (found['input_size'], found['mean'][0]) == ((kwargs.get('in_chans', 3), 40, 40), 0.5)
    assert loaded.pretrained_cfg['label_names'] == labels
    for own, expected in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize('kind, suffix', [('zip', 'zip'), ('tar', 'tar'), ('gztar', 'tar.gz')])
def test_an_archive_from_a_browser(kind, suffix, tmp_path):
    (tmp_path / 'a' / 'coc_tiny').mkdir(parents=True)
    _saved(tmp_path / 'a' / 'coc_tiny' / 'model_best.pth.tar')
    (tmp_path / 'a' / 'coc_tiny' / 'args.yaml').write_text('lr: 0.1')
    packed = tmp_path / f'coc_tiny-001.{suffix}'
    shutil.make_archive(tmp_path / 'coc_tiny-001', kind, tmp_path / 'a')
    import_checkpoint(packed, tmp_path / 'x', 'coc_tiny', model_args=ARGUMENTS)
    assert _same(_loaded(tmp_path / 'x'), _tiny())
    source = dict(file=packed.name, sha256=cache.sha256(packed), weights='the only ones in the file')
    assert _config(tmp_path / 'x')['source'] == source


# --- refused files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('saved, message', [
    (dict(args=dict(model_kwargs=dict(checkpoint_path='/etc/hostname'))), 'checkpoint_path'),
    (dict(args=dict(model_kwargs=dict(act_layer='os.system'))), 'act_layer'),
    (dict(args=dict(model_kwargs={3: 4})), r'model_args\.3'),
    (dict(args=dict(model_kwargs=dict(dims=[2000, 2000, 2000, 30000]))), 'describes a model of'),
    (dict(args=dict(num_classes=10**9)), 'num_classes'),
    (dict(args=dict(num_classes=torch.ones(3))), 'num_classes'),
    (
            dict(args=dict(num_classes=5, model_kwargs=TINY), data_config=dict(input_size=(1, 64, 64))),
            'does not accept such images',
        ),
    (dict(args=dict(num_classes=5, model_kwargs=TINY, mean=(0.1, 0.2))), 'mean'),
    (dict(args=dict(img_size=10**6)), 'input_size|have a side'),
    (dict(data_config=dict(input_size=(3, 100000, 100000))), 'input_size|have a side'),
    (dict(data_config=dict(input_size='x', mean='abc')), 'input_size|have a side'),
    (dict(label_names=['a\x1b[31m', 'b']), 'label_names'),
    (dict(label_names=7), 'label_names'),
    (dict(arch='coc_tiny_plain'), 'its weights are of coc_tiny_plain, which is not coc_tiny'),
    (dict(args=Namespace(model='fec_small.in1k')), 'its weights are of fec_small'),
])  # fmt: skip
def test_invalid_options_in_a_file_are_refused(saved, message, tmp_path):
    before = _snapshot(_saved(tmp_path / 'evil.pth', **saved).parent)
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(tmp_path / 'evil.pth', tmp_path / 'a' / 'folder', 'coc_tiny')
    assert '\n' not in str(error.value) and _snapshot(tmp_path) == before


@pytest.mark.parametrize('saved', [
    dict(arch='ContextCluster-Ti'),
    dict(arch='resnet50', args=Namespace(model='hf-hub:org/coc_tiny_plain')),
    dict(arch=['coc_tiny_plain'], args=dict(model=None, mean=torch.ones(3)), label_names=['one of another number']),
    dict(arch='coc_tiny.in1k', args=Namespace(model='coc_tiny')),
])  # fmt: skip
def test_options_of_other_libraries_are_ignored(tmp_path, saved):
    import_checkpoint(_saved(tmp_path / 'c.pth', **saved), tmp_path / 'x', 'coc_tiny', model_args=ARGUMENTS)
    assert _same(_loaded(tmp_path / 'x'), _tiny()) and 'label_names' not in _config(tmp_path / 'x')


def test_refused_files_change_nothing(tmp_path):
    good = _saved(tmp_path / 'good.pth')
    (tmp_path / 'cut.pth').write_bytes(good.read_bytes()[:-100])
    weights = _tiny().state_dict()
    _saved(tmp_path / 'nan.pth', weights | {'norm.weight': weights['norm.weight'] * torch.nan})
    _saved(tmp_path / 'inf.pth', {k: v * (1e38 if k[:4] in ('norm', 'head') else 1) for k, v in weights.items()})
    with zipfile.ZipFile(tmp_path / 'cut.zip', 'w') as archive:
        archive.write(tmp_path / 'cut.pth', 'cut.pth')
    import_checkpoint(good, tmp_path / 'there', 'coc_tiny', model_args=ARGUMENTS)
    before = _snapshot(tmp_path)
    for file, kwargs, words in (
        ('good.pth', dict(model_name=None), 'does not name its architecture: give --model NAME, such as coc'),
        ('good.pth', dict(model_name='coc_tny'), 'no model .coc_tny.: .*did you mean coc_tiny or'),
        ('good.pth', dict(model_name='hf-hub:a/b'), 'no model'),
        ('good.pth', dict(model_args={}), 'does not fit'),
        ('good.pth', dict(model_args=dict(ARGUMENTS, colour=3)), 'no model that can be built'),
        ('good.pth', dict(label_names=['a']), '1 label names for 5'),
        ('missing.pth', {}, 'No checkpoint at'),
        ('', {}, 'is a folder'),
        ('cut.pth', {}, r'cut\.pth.* damaged'),
        ('cut.zip', {}, r'^\S+cut\.zip.* damaged'),
        ('nan.pth', {}, 'NaN or infinity'),
        ('inf.pth', {}, 'gives NaN or infinity'),
    ):
        for target in ('there', 'new/folder'):
            with pytest.raises(CheckpointError, match=words) as error:
                options = dict(model_name='coc_tiny', model_args=ARGUMENTS) | kwargs
                import_checkpoint(tmp_path / file, tmp_path / target, **options)
            assert '\n' not in str(error.value) and _snapshot(tmp_path) == before
    for trouble, words in ((read_only(tmp_path), 'Permission denied'), (full_disk(4096), 'File too large')):
        with trouble, pytest.raises(CheckpointError, match=rf"there' cannot be written \(.*{words}.*\)\.$"):
            import_checkpoint(good, tmp_path / 'there', 'coc_tiny', model_args=ARGUMENTS)
        assert _snapshot(tmp_path) == before
    with pytest.raises(CheckpointError, match='it is a file'):
        import_checkpoint(good, tmp_path / 'cut.pth', 'coc_tiny', model_args=ARGUMENTS)
    assert _snapshot(tmp_path) == before


def test_changed_results_after_conversion_are_refused(tmp_path, monkeypatch):
    write = importing.write_folder

    def writes_something_else(model, *args, **kwargs):
        torch.nn.init.normal_(model.head.fc.weight)
        write(model, *args, **kwargs)

    monkeypatch.setattr(importing, 'write_folder', writes_something_else)
    with pytest.raises(CheckpointError, match='other results'):
        import_checkpoint(_saved(tmp_path / 'a.pth'), tmp_path / 'x', 'coc_tiny', model_args=ARGUMENTS)
    assert not (tmp_path / 'x').exists()


def test_installed_weights_are_found_by_name(published_file, home, monkeypatch):
    built = []
    cls = type(timm.create_model('coc_tiny', **TINY))
    init = cls.__init__

    def counted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        built.append(self.stem.proj.weight.device.type)

    monkeypatch.setattr(cls, '__init__', counted)
    with cache.new_folder(home / 'coc_tiny.in1k') as folder:
        install('coc_tiny.in1k', published_file, folder, dict(file='by hand'))
    assert built.count('cpu') <= 2
    config = _config(home / 'coc_tiny.in1k')
    assert config['pretrained_cfg']['tag'] == 'in1k' and config['label_names'][0] == 'tench, Tinca tinca'
    assert config['source'] == dict(file='by hand', weights='the only ones in the file')
    for name in ('coc_tiny', 'coc_tiny.in1k'):
        loaded = timm.create_model(name, pretrained=True).eval()
        assert _same(loaded, timm.create_model('coc_tiny', checkpoint_path=published_file).eval())
    card = (home / 'coc_tiny.in1k' / 'README.md').read_text(encoding='utf-8')
    assert '73.2 % top-1 on ImageNet-1k, as published' in card and "create_model('coc_tiny.in1k'" in card
    with pytest.raises(CheckpointError, match='its weights are of coc_tiny, which is not coc_small'):
        install('coc_small.in1k', published_file, home, {})


# --- models from weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('how', ['file', 'state_dict', 'other classes', 'no classes'])
def test_centroids_are_part_of_the_weights(how, tmp_path):
    kwargs = dict(num_classes=10, sub_centroids=2)
    weights = timm.create_model('dnc_resnet18_cifar', **kwargs).state_dict()
    path = _saved(tmp_path / 'c.pth', weights)
    source = dict(state_dict=dict(weights)) if how == 'state_dict' else dict(file=str(path))
    overlay = dict(source, num_classes=1000)  # as in the configurations for ImageNet
    if how in ('other classes', 'no classes'):
        kwargs['num_classes'] = 7 if how == 'other classes' else 0
        overlay['num_classes'] = 10
    model = timm.create_model('dnc_resnet18_cifar', True, pretrained_cfg_overlay=overlay, **kwargs)
    assert torch.equal(model.conv1.weight, weights['conv1.weight'])
    if how in ('file', 'state_dict'):
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_the_configuration_does_not_keep_the_weights(published_file):
    overlay = dict(file=str(published_file))
    model = timm.create_model(
        'coc_tiny', True, pretrained_cfg_overlay=overlay, features_only=True, feature_cls='getter'
    )
    assert 'state_dict' not in model.model.pretrained_cfg and 'state_dict' not in model.pretrained_cfg


@pytest.mark.parametrize('name', ['coc_tiny', 'dnc_resnet18_cifar'])
def test_load_state_dict_keeps_extra_state(name):
    class Extra(torch.nn.Linear):
        get_extra_state = lambda self: dict(note='text')  # noqa: E731
        set_extra_state = lambda self, state: vars(self).update(state)  # noqa: E731

    model = timm.create_model(name, num_classes=3)
    model.extra = Extra(2, 2)
    model.load_state_dict(model.state_dict())
    assert model.extra.note == 'text'


@pytest.fixture
def foreign(tmp_path):
    """A function that changes a model folder and returns a function that loads it."""
    import_checkpoint(_saved(tmp_path / 'c.pth'), folder := tmp_path / 'foreign', 'coc_tiny', model_args=ARGUMENTS)

    def change(weights=None, **changes):
        config = {key: value for key, value in _config(folder).items() if key != 'sha256'}
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(config.get(key), dict) else value
        (folder / 'config.json').write_text(json.dumps(config))
        if weights:
            tensors = load_file(folder / 'model.safetensors')
            save_file({k: v for k, v in tensors.items() if weights(k)}, folder / 'model.safetensors')
        return lambda pretrained=True, **kwargs: timm.create_model(f'local-dir:{folder}', pretrained, **kwargs)

    return change


@pytest.mark.parametrize('pretrained', [False, True])
@pytest.mark.parametrize('change, named', [
    (dict(model_args=dict(act_layer='os.system')), 'act_layer'),
    (dict(pretrained_cfg=dict(url='https://example.org/other.pth')), 'url'),
    (dict(model_args=dict(dims=[2000, 2000, 2000, 30000])), 'describes a model of'),
    (dict(model_args=dict(colour=3)), 'no model that can be built'),
])  # fmt: skip
def test_a_folder_is_checked_before_the_model_is_built(foreign, pretrained, change, named):
    with pytest.raises(CheckpointError, match=named) as error:
        foreign(**change)(pretrained)
    assert 'foreign' in str(error.value)


def test_a_folder_cannot_choose_the_adapted_layers(foreign):
    for layers in (['head.fc', 'stages'], 'norm'):
        cfg = dict(classifier=layers, first_conv='stages.1.downsample')
        model = foreign(pretrained_cfg=cfg)(num_classes=7, in_chans=1)
        assert torch.equal(model.norm.weight, _tiny().norm.weight)
    with pytest.raises(CheckpointError, match='missing'):
        foreign(weights=lambda name: not name.startswith('norm'))(num_classes=7)


# --- tags and cards ---------------------------------------------------------------------------------------------------


def test_metadata_of_the_tags():
    names = [f'coc_{name}' for name in ('tiny', 'tiny_plain', 'small', 'medium')] + [
        'fec_small',
        'fec_base',
        'fec_large',
    ]
    assert set(timm.list_pretrained(['coc*', 'fec*'])) == {
        BUNDLED,
        'fec_small.cifar10',
        *(f'{name}.in1k' for name in names),
    }
    for name in names:
        cfg = timm.models.get_pretrained_cfg(name)
        assert cfg.tag == 'in1k' and cfg.paper_ids.startswith('arXiv:') and cfg.license == 'apache-2.0'
        assert cfg.origin_url and cfg.url and (cfg.interpolation, cfg.crop_pct) == ('bicubic', 0.9)
        assert (cfg.input_size, cfg.num_classes) == ((3, 224, 224), 1000)
        assert metadata.label_names(cfg.to_dict())[0] == 'tench, Tinca tinca'
    for name in metadata.package_tags():
        assert metadata.is_ours(name) and metadata.release(name)


@pytest.mark.parametrize('cfg, expected', [
    (dict(label_names=['a', 'b'], num_classes=2), ['a', 'b']),
    (dict(label_names={'0': 'a', '1': 'b'}, num_classes=2), ['a', 'b']),
    (dict(label_names=['n1', 'n2'], label_descriptions=dict(n1='one'), num_classes=2), ['one', 'n2']),
    (dict(label_names=['a', 'b'], num_classes=3), None),
    (dict(tag='a1_in1k', num_classes=10), None),
    (dict(num_classes=1000), None),
])  # fmt: skip
def test_label_names(cfg, expected):
    assert metadata.label_names(cfg) == expected


def _front_matter(card):
    """Parses the YAML and compares it with the result of the Hub's client."""
    by_hand = yaml.safe_load(card.split('---\n')[1])
    assert card.startswith('---\n') and ModelCard(card).data.to_dict() == by_hand
    return by_hand


def test_model_card():
    release = timm.create_model(BUNDLED, pretrained=True).pretrained_cfg
    config = dict(architecture='coc_tiny_plain', num_classes=10, pretrained_cfg=release, sha256='0' * 64, source={})
    card = model_card(config, BUNDLED)
    assert _front_matter(card)['datasets'] == ['cifar10'] and _front_matter(card)['library_name'] == 'timm'
    assert '83.70 % top-1' in card and 'measured with cluster_zoo by `python validate.py' in card
    assert 'as published' not in card and 'airplane, automobile' in card and 'Image as Set of Points' in card
    own = dict(config, pretrained_cfg=dict(license='for: friends'), num_classes=0, source=dict(file='a.pth'))
    card = model_card(own, 'mine')
    found = _front_matter(card)
    assert (found['license'], found['license_name']) == ('other', 'for: friends') and 'datasets' not in found
    assert found['pipeline_tag'] == 'image-feature-extraction' and '- file: a.pth\n' in card
    assert 'No results are known' in card and 'local-dir:FOLDER' in card


def test_external_text_adds_no_markup_to_a_card():
    hostile = (
        'x"\'\n---\nlicense: mit\n---\n# Injected\n\n<script>alert(1)</script> | `` [a](b) ``` : {y}\u202e *z* _q_'
    )
    cfg = dict(license=hostile, paper_name=hostile, paper_ids=hostile, interpolation=hostile)
    config = dict(architecture='coc_tiny', num_classes=2, label_names=[hostile, '_b_'], pretrained_cfg=cfg)
    card = model_card(dict(config, source={'file': hostile, 'sha256': '1' * 64}, sha256='0' * 64), hostile)
    found = _front_matter(card)
    assert set(found) == {'license', 'license_name', 'library_name', 'pipeline_tag', 'tags'} and '1' * 64 in card
    assert found['license'] == 'other' and '\u202e' not in card and card.count('\n---\n') == 1
    markdown = pytest.importorskip('markdown_it', reason='markdown-it-py renders the card')
    page = markdown.MarkdownIt('gfm-like', {'linkify': False}).render(card.split('---\n', 2)[2])
    assert not re.search('<script|href|<em>|<strong>|<table', page)
    assert page.count('<h1>') == 1 and page.count('<h2>') == 4 and page.count('<li>') == 3


@pytest.mark.parametrize('mask, modes', [(0o022, {0o755, 0o644}), (0o027, {0o750, 0o640})])
def test_permissions_of_a_folder_follow_the_umask(mask, modes, tmp_path):
    path, previous = _saved(tmp_path / 'c.pth'), os.umask(mask)
    try:
        import_checkpoint(path, folder := tmp_path / 'x', 'coc_tiny', model_args=ARGUMENTS)
    finally:
        os.umask(previous)
    assert {file.stat().st_mode & 0o777 for file in chain([folder], folder.iterdir())} == modes
