"""cluster_zoo.importing: what becomes of a checkpoint file, and what is refused before the store changes."""

import json
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from parity_cases import recipe, save_published
from safetensors.torch import load_file
from torch import Tensor

from cluster_zoo import importing, store, tags
from cluster_zoo.importing import import_checkpoint
from cluster_zoo.weights import CheckpointError

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, regions=1)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home'


def _tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('coc_tiny', **{**TINY, 'num_classes': 5, **kwargs}).eval()


def _loaded(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def _same(a, b, size=64):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    return torch.equal(a(images), b(images))


@pytest.mark.parametrize('case', ['coc_tiny', 'fec_small'])
def test_a_published_file(case, tmp_path, home):
    path = save_published(case, tmp_path / 'model_best.pth.tar')
    folder = import_checkpoint(path, f'{case}.in1k')
    assert folder == home / f'{case}.in1k'
    assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert sorted(path.name for path in home.iterdir()) == ['.locks', f'{case}.in1k']  # no scratch is left

    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == case and config['num_classes'] == 1000
    assert config['sha256'] == store.sha256(folder / 'model.safetensors')
    assert config['source'] == dict(file='model_best.pth.tar', sha256=store.sha256(path))
    assert 'num_classes' not in config['model_args']  # transformers' wrapper would pass it twice
    assert tags.label_names(_loaded(folder).pretrained_cfg)[0] == 'tench, Tinca tinca'
    assert config['pretrained_cfg']['crop_pct'] == 0.9 and 'url' not in config['pretrained_cfg']
    assert config['pretrained_cfg']['tag'] == 'in1k'

    weights, expected = load_file(folder / 'model.safetensors'), recipe.state_dict(case)
    torch.testing.assert_close(weights['head.fc.weight'], expected['head.weight'].float(), rtol=0, atol=0)
    assert case in (folder / 'README.md').read_text()


def _of_the_first_publication(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes that the authors' files had before June 2023."""
    old = {}
    for name, value in state_dict.items():
        for new_name, old_name in (('f', 'fc1'), ('v', 'fc_v'), ('proj', 'fc2')):
            name = name.replace(f'.token_mixer.{new_name}.', f'.token_mixer.{old_name}.')
        if '.mlp.fc' in name and name.endswith('.weight'):
            value = value[..., None, None]
        old[name] = value
    return old


def test_weights_of_the_first_publication_keep_their_formula(tmp_path):
    torch.save(dict(state_dict=_of_the_first_publication(recipe.state_dict('coc_tiny'))), tmp_path / 'old.pth')
    folder = import_checkpoint(tmp_path / 'old.pth', 'coc_tiny.in1k')
    assert json.loads((folder / 'config.json').read_text())['model_args']['weighted_mean'] is False
    model = _loaded(folder)
    expected = timm.create_model('coc_tiny', weighted_mean=False, checkpoint_path=tmp_path / 'old.pth').eval()
    assert _same(model, expected)
    expected = timm.create_model('coc_tiny', checkpoint_path=tmp_path / 'old.pth').eval()
    assert not _same(model, expected)


def test_a_checkpoint_of_the_training_script_says_how_its_model_is_built(tmp_path):
    averaged, model = _tiny(), _tiny()
    torch.nn.init.normal_(averaged.head.fc.weight)
    options = dict(
        model='coc_tiny', model_kwargs=TINY, num_classes=5, gp=None, in_chans=None, img_size=48, mean=(0.1, 0.2, 0.3),
        std=None, interpolation='', crop_pct=1.0, lr=0.1,
    )  # fmt: skip
    state = dict(state_dict=model.state_dict(), state_dict_ema=averaged.state_dict(), epoch=3, arch='coc_tiny')
    for kind, args in (('timm', Namespace(**options)), ('ours', options)):
        torch.save(state | dict(args=args), tmp_path / 'last.pth.tar')
        folder = import_checkpoint(tmp_path / 'last.pth.tar', f'coc_tiny.{kind}')
        loaded = _loaded(folder)
        assert _same(loaded, averaged) and not _same(loaded, model)
        data = timm.data.resolve_model_data_config(loaded)
        assert (data['input_size'], tuple(data['mean']), data['crop_pct']) == ((3, 48, 48), (0.1, 0.2, 0.3), 1.0)
        assert 'label_names' not in loaded.pretrained_cfg
        config = json.loads((folder / 'config.json').read_text())
        assert config['pretrained_cfg'].get('license') is None and 'origin_url' not in config['pretrained_cfg']
    assert _same(_loaded(import_checkpoint(tmp_path / 'last.pth.tar', 'coc_tiny.raw', use_ema=False)), model)


def test_a_run_of_this_package_needs_no_options(train, tmp_path):
    arguments = ['--dataset', 'cluster_zoo/cifar10_sample', '--model', 'coc_tiny', '--num-classes', '10', '-b', '500']
    arguments += ['--img-size', '32', '--crop-pct', '1', '--epochs', '1', '--cooldown-epochs', '0', '--workers', '0']
    arguments += ['--output', str(tmp_path), '--experiment', 'run', '--val-num-samples', '10']
    arguments += ['--model-kwargs', *(f'{key}={value}'.replace(' ', '') for key, value in TINY.items())]
    train.main(arguments)
    folder = import_checkpoint(tmp_path / 'run' / 'last.pth.tar', 'coc_tiny.cifar')
    loaded = _loaded(folder)
    assert loaded.pretrained_cfg['label_names'][:2] == ['airplane', 'automobile'] and loaded.num_classes == 10
    data = timm.data.resolve_model_data_config(loaded)
    assert (data['input_size'], data['crop_pct']) == ((3, 32, 32), 1.0)
    assert len(loaded.stages[0].blocks) == 1
    folder = import_checkpoint(tmp_path / 'run' / 'last.pth.tar', 'coc_tiny.large', data_config=dict(img_size=96))
    assert timm.data.resolve_model_data_config(_loaded(folder))['input_size'] == (3, 96, 96)


@pytest.mark.parametrize(
    ('saved', 'message'),
    [
        (dict(args=dict(model_kwargs=dict(checkpoint_path='/etc/hostname'))), 'checkpoint_path'),
        (dict(args=dict(model_kwargs=dict(dims=[2000, 2000, 2000, 30000]))), 'describes a model of'),
        (dict(args=dict(num_classes=10**9)), 'num_classes'),
        (dict(data_config=dict(input_size=(3, 100000, 100000))), 'input_size'),
        (dict(data_config=dict(input_size='x', mean='abc')), 'input_size'),
        (dict(label_names=['a\x1b[31m', 'b']), 'control characters'),
        (dict(label_names=7), 'label_names'),
    ],
)
def test_what_a_file_says_of_its_model_is_not_to_be_trusted(saved, message, tmp_path, home):
    torch.save(dict(state_dict=_tiny().state_dict(), **saved), tmp_path / 'evil.pth')
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(tmp_path / 'evil.pth', 'coc_tiny.mine')
    assert 'evil.pth' in str(error.value) and not (home / 'coc_tiny.mine').exists()


def test_arguments_and_labels_that_are_given(tmp_path):
    model = timm.create_model('dnc_resnet18_cifar', num_classes=3, sub_centroids=2).eval()
    torch.save(model.state_dict(), tmp_path / 'c.pth')
    kwargs = dict(model_args=dict(num_classes=3, sub_centroids=2), label_names=['a', 'b', 'c: "d"'])
    kwargs |= dict(data_config=dict(img_size=40, mean=(0.5, 0.5, 0.5)))
    loaded = _loaded(import_checkpoint(tmp_path / 'c.pth', 'dnc_resnet18_cifar.mine', **kwargs))
    data = timm.data.resolve_model_data_config(loaded)
    assert (data['input_size'], tuple(data['mean'])) == ((3, 40, 40), (0.5, 0.5, 0.5))
    assert _same(loaded, model, 32) and tuple(loaded.pretrained_cfg['label_names']) == ('a', 'b', 'c: "d"')


def test_an_archive_as_a_browser_downloads_it(tmp_path):
    torch.save(_tiny().state_dict(), tmp_path / 'model_best.pth.tar')
    with zipfile.ZipFile(tmp_path / 'coc_tiny-001.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / 'model_best.pth.tar', 'coc_tiny/model_best.pth.tar')
        archive.writestr('coc_tiny/args.yaml', 'lr: 0.1')
    folder = import_checkpoint(tmp_path / 'coc_tiny-001.zip', 'coc_tiny.mine', model_args=dict(TINY, num_classes=5))
    assert _same(_loaded(folder), _tiny())
    assert json.loads((folder / 'config.json').read_text())['source']['file'] == 'coc_tiny-001.zip'


def _snapshot(home):
    return {str(path): path.read_bytes() for path in home.rglob('*') if path.is_file()}


def test_what_is_refused_changes_nothing(tmp_path, home):
    args = dict(TINY, num_classes=5)
    torch.save(_tiny().state_dict(), good := tmp_path / 'good.pth')
    import_checkpoint(good, 'coc_tiny.mine', model_args=args)
    before = _snapshot(home)
    (tmp_path / 'cut.pth').write_bytes(good.read_bytes()[:-100])
    broken = _tiny().state_dict()
    broken['norm.weight'] = broken['norm.weight'] * 1e38  # finite weights, and logits that are not
    torch.save({name: value * (1e38 if 'head' in name else 1) for name, value in broken.items()}, tmp_path / 'inf.pth')
    for file, name, kwargs, words in (
        ('good.pth', 'coc_tiny.mine', {}, 'has coc_tiny.mine already'),
        ('good.pth', 'coc_tiny', {}, 'no name for weights'),
        ('good.pth', 'coc_tiny.../../x', {}, 'no name for weights'),
        ('good.pth', 'resnet18.mine', {}, 'no model of this package'),
        ('good.pth', 'coc_huge.mine', {}, 'no model of this package'),
        ('good.pth', 'coc_tiny.untrained', {}, 'take another tag'),
        ('good.pth', 'coc_tiny_plain.cifar10', {}, 'part of the package'),
        ('good.pth', 'coc_tiny.in1k', {}, 'does not fit'),
        ('good.pth', 'coc_tiny.in1k', dict(model_args=args), 'known for 1000 classes .* for 5 classes can not'),
        ('good.pth', 'coc_tiny.b', dict(model_args=dict(args, colour=3)), 'no model that can be built'),
        ('good.pth', 'coc_tiny.b', dict(model_args=args, label_names=['a']), '1 label names for 5'),
        ('missing.pth', 'coc_tiny.b', {}, 'No checkpoint at'),
        ('cut.pth', 'coc_tiny.b', {}, 'damaged'),
        ('inf.pth', 'coc_tiny.b', dict(model_args=args), 'NaN or infinity'),
    ):
        with pytest.raises(CheckpointError, match=words):
            import_checkpoint(tmp_path / file, name, **kwargs)
        assert _snapshot(home) == before


@pytest.mark.parametrize('kwargs, words', [
    (dict(model_args=dict(num_classes=7)), '7 classes'),
    (dict(model_args=dict(in_chans=1)), '1 channels'),
    (dict(data_config=dict(img_size=64)), 'images prepared in another way'),
    (dict(data_config=dict(crop_pct=0.5)), 'images prepared in another way'),
    (dict(label_names=[f'class {i}' for i in range(1000)]), 'other label names'),
])  # fmt: skip
def test_a_published_tag_stays_what_it_is_known_as(tmp_path, home, kwargs, words):
    """What its folder says of images and classes would not reach those who load it by its name."""
    path = save_published('coc_tiny', tmp_path / 'model_best.pth.tar')
    with pytest.raises(CheckpointError, match=rf'coc_tiny\.in1k is known for .* {words} .*coc_tiny\.mine'):
        import_checkpoint(path, 'coc_tiny.in1k', **kwargs)
    assert not store.entries()


def test_what_is_said_of_a_published_tag_may_be_what_is_known(tmp_path):
    path = save_published('coc_tiny', tmp_path / 'model_best.pth.tar')
    known = timm.create_model('coc_tiny.in1k').pretrained_cfg
    kwargs = dict(model_args=dict(num_classes=1000), data_config=dict(img_size=224, crop_pct=0.9))
    import_checkpoint(path, 'coc_tiny.in1k', label_names=tags.label_names(known), **kwargs)
    assert store.verified_weights(store.folder('coc_tiny.in1k')).is_file()


def test_a_published_tag_is_checked_as_users_load_it(tmp_path, home, monkeypatch):
    path = save_published('coc_tiny', tmp_path / 'model_best.pth.tar')
    create, names = timm.create_model, []

    def create_model(model_name, **kwargs):
        model = create(model_name, **kwargs)
        names.append(model_name)
        if kwargs.get('cache_dir'):
            torch.nn.init.normal_(model.head.fc.weight)
        return model

    monkeypatch.setattr(timm, 'create_model', create_model)
    with pytest.raises(CheckpointError, match='other results'):
        import_checkpoint(path, 'coc_tiny.in1k')
    assert names[-1] == 'coc_tiny.in1k' and not store.entries()


def _says(path, **saved):
    torch.save(dict(state_dict=_tiny().state_dict(), **saved), path)
    return path


@pytest.mark.parametrize('saved', [
    dict(arch='coc_tiny_plain'),
    dict(arch='coc_tiny_plain.cifar10'),
    dict(args=Namespace(model='coc_tiny_plain')),
    dict(args=dict(model='coc_tiny_plain'), arch='coc_tiny'),
    dict(arch='dnc_coc_tiny'),
])  # fmt: skip
def test_weights_of_another_model_are_refused_though_they_fit(tmp_path, saved):
    args = dict(TINY, num_classes=5)
    path = _says(tmp_path / 'c.pth', **saved)
    for replace in (False, True):  # which is no question of replacing
        with pytest.raises(CheckpointError, match='another model than coc_tiny') as error:
            import_checkpoint(path, 'coc_tiny.mine', model_args=args, replace=replace)
        assert '\n' not in str(error.value)
        with pytest.raises(CheckpointError, match='another model than coc_tiny'):
            import_checkpoint(path, 'coc_tiny.in1k', replace=replace)
    assert not store.entries()


@pytest.mark.parametrize('saved', [
    dict(arch='ContextCluster-Ti'),
    dict(arch='resnet50', args=Namespace(model='hf-hub:org/coc_tiny_plain')),
    dict(arch=['coc_tiny_plain'], args=dict(model=None)),
    dict(arch='coc_tiny.in1k', args=Namespace(model='coc_tiny')),
])  # fmt: skip
def test_names_of_other_libraries_are_no_reason_to_refuse(tmp_path, saved):
    path = _says(tmp_path / 'c.pth', **saved)
    folder = import_checkpoint(path, 'coc_tiny.mine', model_args=dict(TINY, num_classes=5))
    assert _same(_loaded(folder), _tiny())


def test_replacing(tmp_path, home, monkeypatch):
    args = dict(TINY, num_classes=5)
    torch.save(_tiny().state_dict(), tmp_path / 'a.pth')
    other = _tiny()
    torch.nn.init.normal_(other.head.fc.weight)
    torch.save(other.state_dict(), tmp_path / 'b.pth')
    folder = import_checkpoint(tmp_path / 'a.pth', 'coc_tiny.mine', model_args=args)
    import_checkpoint(tmp_path / 'b.pth', 'coc_tiny.mine', model_args=args, replace=True)
    assert _same(_loaded(folder), other)

    def fails(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(importing, 'write_folder', fails)
    before = _snapshot(home)
    with pytest.raises(CheckpointError, match='No space left'):
        import_checkpoint(tmp_path / 'a.pth', 'coc_tiny.mine', model_args=args, replace=True)
    assert _snapshot(home) == before


def test_results_that_change_in_conversion_are_refused(tmp_path, home, monkeypatch):
    torch.save(_tiny().state_dict(), tmp_path / 'a.pth')
    write = importing.write_folder

    def writes_something_else(model, *args):
        torch.nn.init.normal_(model.head.fc.weight)
        write(model, *args)

    monkeypatch.setattr(importing, 'write_folder', writes_something_else)
    with pytest.raises(CheckpointError, match='other results'):
        import_checkpoint(tmp_path / 'a.pth', 'coc_tiny.mine', model_args=dict(TINY, num_classes=5))
    assert not (home / 'coc_tiny.mine').exists()


def test_numpy_scalars_among_training_metrics_are_no_obstacle(tmp_path):
    torch.save(dict(state_dict=_tiny().state_dict(), metric=np.float64(73.2)), tmp_path / 'c.pth')
    import_checkpoint(tmp_path / 'c.pth', 'coc_tiny.mine', model_args=dict(TINY, num_classes=5))
