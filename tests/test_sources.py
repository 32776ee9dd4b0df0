"""cluster_zoo.sources: where weights come from, in which order, and the error where none has them.

Sources beyond this machine have tests of their own, with servers on localhost: test_hub.py and test_authors.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from parity_cases import recipe, save_published
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg

from cluster_zoo import sources, store
from cluster_zoo.importing import import_checkpoint
from cluster_zoo.sources import WeightsNotFoundError
from cluster_zoo.weights import CheckpointError

ROOT = Path(__file__).parents[1]
BUNDLED = 'coc_tiny_plain.cifar10'
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.usefixtures('home')


def _has_the_published_weights(model):
    expected = recipe.state_dict('coc_tiny')
    return torch.equal(model.norm.weight, expected['norm.weight'].float()) and torch.equal(
        model.stages[0].blocks[0].mlp.fc1.weight.flatten(),
        expected['network.0.0.mlp.fc1.weight'].float().flatten(),
    )


# 1. What the caller names


def test_explicit_sources(published_file, imported, home):
    overlays = (
        dict(file=str(published_file)),
        dict(state_dict=recipe.state_dict('coc_tiny')),
        dict(file=str(imported / 'coc_tiny.in1k' / 'model.safetensors')),
    )
    for overlay in overlays:
        assert _has_the_published_weights(timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay))
    assert _has_the_published_weights(timm.create_model('coc_tiny', checkpoint_path=published_file))
    assert _has_the_published_weights(timm.create_model(f'local-dir:{imported / "coc_tiny.in1k"}', pretrained=True))
    assert not home.exists()  # reading leaves nothing behind


def test_an_explicit_source_is_the_only_one_asked(imported, home, monkeypatch):
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(imported))
    with pytest.raises(CheckpointError, match='No checkpoint at'):
        timm.create_model('coc_tiny', True, pretrained_cfg_overlay=dict(file='/no/such/file.pth'))


def test_an_address_that_is_named(published_file, home, tmp_path):
    """Two files of one name, a damaged one in the cache, another one at the address, a page that is no checkpoint."""
    for folder, value in (('a', 1.0), ('b', 2.0)):
        state_dict = recipe.state_dict('coc_tiny')
        state_dict['norm.weight'] = torch.full_like(state_dict['norm.weight'], value)
        (tmp_path / folder).mkdir()
        torch.save(state_dict, tmp_path / folder / 'model.pth')

    def load(folder):
        overlay = dict(url=(tmp_path / folder / 'model.pth').as_uri())
        kwargs = dict(pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
        return timm.create_model('coc_tiny', True, **kwargs).norm.weight[0].item()

    assert [load('a'), load('b'), load('a')] == [1, 2, 1]
    for path in (tmp_path / 'cache').iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert [load('a'), load('b')] == [1, 2]  # downloaded again
    for path in (tmp_path / 'cache').iterdir():
        path.unlink()
    genuine = (tmp_path / 'a' / 'model.pth').read_bytes()
    (tmp_path / 'a' / 'model.pth').write_bytes((tmp_path / 'b' / 'model.pth').read_bytes())
    with pytest.raises(CheckpointError, match='refused: its SHA-256'):
        load('a')
    (tmp_path / 'a' / 'model.pth').write_text('<html>')
    with pytest.raises(CheckpointError, match='not a checkpoint'):
        load('a')
    (tmp_path / 'a' / 'model.pth').write_bytes(genuine)
    assert load('a') == 1
    with pytest.raises(CheckpointError, match='could not be downloaded'):
        load('missing')


def test_what_is_no_checkpoint_leaves_no_trace(tmp_path, home):
    (tmp_path / 'model.pth').write_text('<html>')
    overlay = dict(url=(tmp_path / 'model.pth').as_uri())
    kwargs = dict(pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    with pytest.raises(CheckpointError, match='not a checkpoint'):
        timm.create_model('coc_tiny', True, **kwargs)
    save_published('coc_tiny', tmp_path / 'model.pth')
    assert _has_the_published_weights(timm.create_model('coc_tiny', True, **kwargs))


def test_a_file_comes_before_the_hub_and_the_folder(published_file, imported, tmp_path):
    other = load_file(imported / 'coc_tiny.in1k' / 'model.safetensors')
    other['norm.weight'] += 1
    save_file(other, tmp_path / 'other.safetensors')
    for overlay in (dict(file=str(tmp_path / 'other.safetensors')), dict(state_dict=dict(other))):
        model = timm.create_model(f'local-dir:{imported / "coc_tiny.in1k"}', True, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.norm.weight, other['norm.weight'])


@pytest.mark.parametrize('pretrained', [False, True])
def test_what_lies_in_the_current_folder_is_nobodys_configuration(pretrained, published_file, tmp_path, monkeypatch):
    overlay = dict(file=str(published_file)) if pretrained else {}
    for config in ({}, dict(architecture='coc_tiny', model_args=dict(weighted_mean=False), pretrained_cfg={})):
        (tmp_path / 'config.json').write_text(json.dumps(config))
        (published_file.parent / 'config.json').write_text(json.dumps(config))
        monkeypatch.chdir(tmp_path)
        model = timm.create_model('coc_tiny', pretrained, pretrained_cfg_overlay=overlay)
        assert model.stages[0].blocks[0].token_mixer.weighted_mean
    (published_file.parent / 'config.json').unlink()


# 2. The package


def test_a_file_of_the_package_for_another_name(home):
    overlay = dict(file=get_pretrained_cfg(BUNDLED).file)
    model = timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay, num_classes=10)
    assert model.num_classes == 10


def test_bundled_weights_are_compared_with_their_checksum(tmp_path, monkeypatch):
    timm.create_model(BUNDLED, pretrained=True)
    damaged = tmp_path / f'{BUNDLED}.safetensors'
    content = bytearray((sources.ASSETS / damaged.name).read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setattr(sources, 'ASSETS', tmp_path)
    with pytest.raises(CheckpointError, match='damaged: its SHA-256'):
        timm.create_model(BUNDLED, pretrained=True, pretrained_cfg_overlay=dict(file=str(damaged)))


# 3. The store


@pytest.mark.parametrize('by', ['environment', 'cache_dir'])
def test_the_store(imported, monkeypatch, by):
    kwargs = dict(cache_dir=imported) if by == 'cache_dir' else {}
    if by == 'environment':
        monkeypatch.setenv('CLUSTER_ZOO_HOME', str(imported))
    model = timm.create_model('coc_tiny', pretrained=True, **kwargs)
    assert _has_the_published_weights(model) and sources.where('coc_tiny.in1k', imported) == 'store'
    adapted = timm.create_model('coc_tiny.in1k', pretrained=True, num_classes=10, in_chans=1, **kwargs)
    assert adapted(IMAGES[:, :1]).shape == (2, 10)
    image = recipe.state_dict('coc_tiny')['patch_embed.proj.weight'][:, :3].sum(1, keepdim=True).float()
    torch.testing.assert_close(adapted.stem.proj.weight, image)
    features = timm.create_model('coc_tiny', pretrained=True, features_only=True, **kwargs)
    assert [x.shape[1] for x in features(IMAGES)] == [32, 64, 196, 320]


def test_a_damaged_entry_is_never_loaded(imported, home):
    folder = home / 'coc_tiny.in1k'
    folder.mkdir(parents=True)
    for path in (imported / 'coc_tiny.in1k').iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert _has_the_published_weights(timm.create_model('coc_tiny', pretrained=True))
    weights = load_file(folder / 'model.safetensors')
    weights['norm.weight'] += 1  # fits and is finite
    save_file(weights, folder / 'model.safetensors')
    with pytest.raises(WeightsNotFoundError, match=r'local store: .*damaged: its SHA-256'):
        timm.create_model('coc_tiny', pretrained=True)
    with pytest.raises(CheckpointError, match='damaged: its SHA-256'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(WeightsNotFoundError, match=r'holds no model\.safetensors'):
        timm.create_model('coc_tiny', pretrained=True)


@pytest.mark.parametrize('by', ['store', 'local-dir'])
def test_weights_of_another_architecture_are_refused_though_their_shapes_fit(imported, home, by):
    shutil.copytree(imported / 'coc_tiny.in1k', home / 'coc_tiny_plain.in1k')
    with pytest.raises(CheckpointError, match="its architecture is 'coc_tiny', not coc_tiny_plain"):
        if by == 'store':
            timm.create_model('coc_tiny_plain', pretrained=True)
        config = json.loads((home / 'coc_tiny_plain.in1k' / 'config.json').read_text())
        cfg = dict(config['pretrained_cfg'], source='local-dir', file=str(home / 'coc_tiny_plain.in1k'))
        timm.create_model('coc_tiny_plain', pretrained=True, pretrained_cfg=cfg)


def test_weights_and_arguments_belong_together_while_others_replace_them(published_file, home, monkeypatch):
    """Two versions, told apart by a weight and by an argument; the entry is replaced between any two reads."""
    for name, value in (('coc_tiny.a', True), ('coc_tiny.b', False)):
        folder = import_checkpoint(published_file, name, model_args=dict(weighted_mean=value))
        weights = load_file(folder / 'model.safetensors')
        weights['norm.bias'] = torch.full_like(weights['norm.bias'], float(value))
        save_file(weights, folder / 'model.safetensors')
        config = json.loads((folder / 'config.json').read_text())
        config['sha256'] = store.sha256(folder / 'model.safetensors')
        (folder / 'config.json').write_text(json.dumps(config))
    shutil.copytree(home / 'coc_tiny.a', home / 'coc_tiny.in1k')
    pending = []

    def replaced_before(function):
        def call(*args, **kwargs):
            if pending:
                version = pending.pop(0)
                with store.new_folder('coc_tiny.in1k', replace=True) as folder:
                    shutil.copytree(home / version, folder, dirs_exist_ok=True)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(sources, '_weights_file', replaced_before(sources._weights_file))
    monkeypatch.setattr(sources, 'load_state_dict', replaced_before(sources.load_state_dict))
    monkeypatch.setattr(store, 'read_config', replaced_before(store.read_config))
    for versions in ('b', 'ba', 'bab', 'abab'):
        pending[:] = [f'coc_tiny.{version}' for version in versions]
        model = timm.create_model('coc_tiny', pretrained=True)
        assert not pending and model.stages[0].blocks[0].token_mixer.weighted_mean == bool(model.norm.bias[0])
    pending[:] = ['coc_tiny.a', 'coc_tiny.b'] * 10
    with pytest.raises(CheckpointError, match='again and again'):
        timm.create_model('coc_tiny', pretrained=True)


OWN_TAGS = """
import json, os, sys, timm, torch
import cluster_zoo
name = 'coc_tiny_plain.birds'
model = timm.create_model(name, pretrained=True).eval()
wide = timm.create_model(name, pretrained=True, proposals=3)
os.environ['CLUSTER_ZOO_HOME'] = 'elsewhere'  # the tags are where they were when timm heard of them
moved = timm.create_model(name, pretrained=True)
json.dump(dict(
    moved=moved._model_args,
    untrained=timm.create_model(name)._model_args,
    listed=timm.list_pretrained('coc_tiny_plain*'),
    default=timm.create_model('coc_tiny_plain').num_classes,
    classes=model.num_classes,
    labels=model.pretrained_cfg['label_names'],
    arguments=model._model_args,
    proposals=[stage.blocks[0].token_mixer.proposals for stage in (model.stages[0], wide.stages[0])],
    logits=model(torch.full((1, 3, 64, 64), 0.5)).tolist(),
), sys.stdout)
"""


def test_own_tags_of_the_store_are_known_to_timm_by_name(home, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('coc_tiny_plain', num_classes=3, proposals=(5, 5, 2, 2)).eval()
    torch.save(model.state_dict(), tmp_path / 'birds.pth')
    labels = ['crow', 'heron', 'wren']
    kwargs = dict(model_args=dict(num_classes=3, proposals=(5, 5, 2, 2)), label_names=labels)
    import_checkpoint(tmp_path / 'birds.pth', 'coc_tiny_plain.birds', **kwargs)
    (home / 'coc_small.broken').mkdir()
    (home / 'coc_small.broken' / 'config.json').write_text('{')
    run = subprocess.run([sys.executable, '-c', OWN_TAGS], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'coc_small.broken of the local store is left out' in run.stderr
    found = json.loads(run.stdout)
    assert 'coc_tiny_plain.birds' in found['listed']
    assert (found['default'], found['classes'], found['labels']) == (1000, 3, labels)
    # The arguments of the weights, which shapes do not tell, come with them; the caller's win.
    assert found['proposals'][1] == 3 and found['arguments']['proposals'] == [5, 5, 2, 2]
    assert found['moved'] == found['untrained'] == found['arguments']
    expected = model(torch.full((1, 3, 64, 64), 0.5))
    torch.testing.assert_close(torch.tensor(found['logits']), expected, rtol=0, atol=0)


# None of them


def test_where_none_has_them_one_error_says_all(home):
    with pytest.raises(WeightsNotFoundError) as error:
        timm.create_model('coc_small', pretrained=True)
    text = str(error.value)
    for part in (
        'coc_small.in1k',
        'the package: ',
        f"the local store: there is no '{home / 'coc_small.in1k'}'",
        'Hugging Face: not asked, CLUSTER_ZOO_HUB names no organisation',
        'the authors: https://drive.google.com/drive/folders/19zbCOS33We7HOjL575Di5wyuLbnDebdE was not asked',
        'cluster-zoo fetch coc_small.in1k',
        'cluster-zoo import FILE --as coc_small.in1k',
    ):
        assert part in text
    assert isinstance(error.value, RuntimeError)  # what timm raises
    assert not home.exists()


def test_the_command_fills_the_folder_that_was_looked_at(tmp_path):
    with pytest.raises(WeightsNotFoundError, match=f'CLUSTER_ZOO_HOME={tmp_path} cluster-zoo fetch coc_small'):
        timm.create_model('coc_small', pretrained=True, cache_dir=tmp_path)


@pytest.mark.parametrize('name', ['dnc_resnet18', 'coc_base_dim64', 'resnet18_cifar', 'dnc_coc_tiny'])
def test_models_without_a_publication_say_so(name):
    with torch.device('meta'), pytest.raises(WeightsNotFoundError, match='they have published none') as error:
        timm.create_model(name, pretrained=True)
    assert f'cluster-zoo import FILE --as {name}.TAG' in str(error.value)
    assert 'fetch' not in str(error.value) and sources.where(f'{name}.untrained') == 'none'


@pytest.mark.parametrize('organisation', ['../evil', 'a/b', 'https://example.org'])
def test_an_organisation_that_is_none(organisation, monkeypatch):
    monkeypatch.setenv('CLUSTER_ZOO_HUB', organisation)
    with pytest.raises(WeightsNotFoundError, match='is no name of an organisation'):
        timm.create_model('coc_small', pretrained=True)


def test_where(home, monkeypatch):
    assert [sources.where(name) for name in (BUNDLED, 'fec_small.in1k')] == ['package', 'authors']
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'my-lab')
    assert sources.where('fec_small.in1k') == 'hub'


def test_records_that_can_not_be_read_are_an_error(home):
    home.mkdir()
    (home / 'sha256.json').write_text('[')
    with pytest.raises(CheckpointError, match=r'sha256\.json. can not be read'):
        store.recorded('drive:x')
