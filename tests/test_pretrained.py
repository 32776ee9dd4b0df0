"""cluster_zoo.pretrained: the sources of weights in their order, and the error where none has them.

Sources beyond this machine have tests of their own, with servers on localhost: test_hub.py and test_authors.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from parity_cases import recipe, save_published
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg

from cluster_zoo import authors, pretrained, store, tags
from cluster_zoo.importing import import_checkpoint
from cluster_zoo.pretrained import WeightsNotFoundError
from cluster_zoo.weights import CheckpointError

ROOT = Path(__file__).parents[1]
BUNDLED = 'coc_tiny_plain.cifar10'
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty store; nobody beyond this machine may be asked."""
    for name in ('CLUSTER_ZOO_HUB', 'CLUSTER_ZOO_AUTHORS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home'


@pytest.fixture(scope='module')
def published_file(tmp_path_factory):
    return save_published('coc_tiny', tmp_path_factory.mktemp('published') / 'model_best.pth.tar')


@pytest.fixture(scope='module')
def imported(published_file, tmp_path_factory):
    """A store that has coc_tiny.in1k, with the weights of the parity figures."""
    root = tmp_path_factory.mktemp('store')
    import_checkpoint(published_file, 'coc_tiny.in1k', root=root)
    return root


def _has_the_published_weights(model):
    expected = recipe.state_dict('coc_tiny')
    return torch.equal(model.norm.weight, expected['norm.weight'].float()) and torch.equal(
        model.stages[0].blocks[0].mlp.fc1.weight.flatten(),
        expected['network.0.0.mlp.fc1.weight'].float().flatten(),
    )


# Configurations


def test_published_results_are_tags_with_their_facts():
    names = {'coc_tiny.in1k', 'coc_tiny_plain.in1k', 'coc_small.in1k', 'coc_medium.in1k'}
    assert set(timm.list_pretrained('coc*')) == names | {BUNDLED}
    assert set(timm.list_pretrained('fec*')) == {'fec_small.in1k', 'fec_base.in1k', 'fec_large.in1k'}
    assert not timm.list_pretrained('dnc*')  # their authors published none
    for name in timm.list_pretrained(['coc*', 'fec*']):
        cfg = get_pretrained_cfg(name)
        assert cfg.paper_ids.startswith('arXiv:') and cfg.interpolation == 'bicubic' and cfg.std[0] > 0.2
        assert tags.is_published(name) and len(tags.label_names(cfg.to_dict())) == cfg.num_classes
        if name != BUNDLED:
            assert (cfg.crop_pct, cfg.input_size, cfg.num_classes) == (0.9, (3, 224, 224), 1000)
            assert authors.publication(name) == cfg.url and cfg.origin_url.startswith('https://github.com/')
    # Context Cluster's repository states a licence, FEC's none.
    licences = [get_pretrained_cfg(name).license for name in ('coc_small.in1k', 'fec_small.in1k')]
    assert licences == ['apache-2.0', None]
    assert [tags.facts(f'coc_{size}.in1k').published_top1 for size in ('tiny', 'tiny_plain', 'small', 'medium')] == [
        73.2, 73.8, 78.1, 81.2,
    ]  # fmt: skip


def test_a_name_without_a_tag_stands_for_imagenet():
    assert get_pretrained_cfg('coc_tiny_plain').num_classes == 1000
    assert tags.label_names(get_pretrained_cfg('coc_tiny_plain').to_dict())[0] == 'tench, Tinca tinca'


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


def test_an_address_that_is_named(published_file, home, tmp_path, monkeypatch):
    overlay = dict(url=published_file.as_uri())
    kwargs = dict(pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    assert _has_the_published_weights(timm.create_model('coc_tiny', True, **kwargs))
    cached = tmp_path / 'cache' / published_file.name
    torch.save(dict(state_dict={'a': torch.ones(1)}), cached)
    with pytest.raises(CheckpointError, match='refused: its SHA-256'):
        timm.create_model('coc_tiny', True, **kwargs)
    missing = dict(url=(tmp_path / 'missing.pth').as_uri())
    with pytest.raises(CheckpointError, match='could not be downloaded'):
        timm.create_model('coc_tiny', True, pretrained_cfg_overlay=missing, cache_dir=tmp_path / 'cache')


# 2. The package


def test_bundled_weights_are_compared_with_their_checksum(tmp_path, monkeypatch):
    timm.create_model(BUNDLED, pretrained=True)
    damaged = tmp_path / f'{BUNDLED}.safetensors'
    content = bytearray((pretrained.ASSETS / damaged.name).read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setattr(pretrained, 'ASSETS', tmp_path)
    with pytest.raises(CheckpointError, match='damaged: its SHA-256'):
        timm.create_model(BUNDLED, pretrained=True, pretrained_cfg_overlay=dict(file=str(damaged)))


# 3. The store


@pytest.mark.parametrize('by', ['environment', 'cache_dir'])
def test_the_store(imported, monkeypatch, by):
    kwargs = dict(cache_dir=imported) if by == 'cache_dir' else {}
    if by == 'environment':
        monkeypatch.setenv('CLUSTER_ZOO_HOME', str(imported))
    model = timm.create_model('coc_tiny', pretrained=True, **kwargs)
    assert _has_the_published_weights(model) and pretrained.where('coc_tiny.in1k', imported) == 'store'
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


OWN_TAGS = """
import json, sys, timm, torch
import cluster_zoo
name = 'coc_tiny_plain.birds'
model = timm.create_model(name, pretrained=True).eval()
wide = timm.create_model(name, pretrained=True, proposals=3)
json.dump(dict(
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


@pytest.mark.parametrize('name', ['dnc_resnet18', 'coc_base_dim64', 'resnet18_cifar', 'dnc_coc_tiny'])
def test_models_without_a_publication_say_so(name):
    with torch.device('meta'), pytest.raises(WeightsNotFoundError, match='they have published none') as error:
        timm.create_model(name, pretrained=True)
    assert f'cluster-zoo import FILE --as {name}.TAG' in str(error.value)
    assert 'fetch' not in str(error.value) and pretrained.where(f'{name}.untrained') == 'none'


@pytest.mark.parametrize('organisation', ['../evil', 'a/b', 'https://example.org'])
def test_an_organisation_that_is_none(organisation, monkeypatch):
    monkeypatch.setenv('CLUSTER_ZOO_HUB', organisation)
    with pytest.raises(WeightsNotFoundError, match='is no name of an organisation'):
        timm.create_model('coc_small', pretrained=True)


def test_where(home, monkeypatch):
    assert [pretrained.where(name) for name in (BUNDLED, 'fec_small.in1k')] == ['package', 'authors']
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'my-lab')
    assert pretrained.where('fec_small.in1k') == 'hub'


# Configurations from elsewhere


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (dict(model_args=dict(act_layer='os.system')), 'act_layer'),
        (dict(model_args=dict(checkpoint_path='evil.pth')), 'checkpoint_path'),
        (dict(auto_map=dict(AutoModel='evil.Model')), 'auto_map'),
        (dict(pretrained_cfg=dict(custom_load=True)), 'custom_load'),
        (dict(pretrained_cfg=dict(url='https://example.org/other.pth')), 'url'),
    ],
)
def test_a_folder_whose_configuration_names_code_or_other_files_is_refused(imported, tmp_path, change, named):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'model.safetensors').symlink_to(imported / 'coc_tiny.in1k' / 'model.safetensors')
    config = json.loads((imported / 'coc_tiny.in1k' / 'config.json').read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=named):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_records_that_can_not_be_read_are_an_error(home):
    home.mkdir()
    (home / 'sha256.json').write_text('[')
    with pytest.raises(CheckpointError, match=r'sha256\.json. can not be read'):
        store.recorded('drive:x')
