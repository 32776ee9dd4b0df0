"""Models from a simulated Hugging Face Hub with the real client, and failures."""

import json
import time
from pathlib import Path

import pytest
import timm
import torch
from hardship import read_only
from hub_server import GUEST, OWNER, HubServer
from huggingface_hub import constants
from parity_cases import recipe

from cluster_zoo.errors import CheckpointError
from cluster_zoo.weights import cache
from cluster_zoo.weights.download import hub_folder, organization
from cluster_zoo.weights.importing import find_weights
from cluster_zoo.weights.loading import load_model, open_model_folder

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, num_classes=5)
WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
FULL = 'coc_tiny.in1k'
LOADERS = [timm.create_model, load_model]


def _point(patch, url: str) -> None:
    """Sets the address of the Hub in its client."""
    patch.setattr(constants, 'ENDPOINT', url)
    patch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def settings(server, home, tmp_path, monkeypatch):
    _point(monkeypatch, server.url)
    chosen = dict(HF_HUB_CACHE=str(tmp_path / 'hf'), HF_TOKEN_PATH=str(tmp_path / 'token'), HF_HUB_DISABLE_XET=True)
    for name, value in (chosen | dict(HF_HUB_OFFLINE=False, DOWNLOAD_CHUNK_SIZE=1024)).items():
        monkeypatch.setattr(constants, name, value)
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NO_PROXY', '*')
    sleep = time.sleep
    monkeypatch.setattr(time, 'sleep', lambda seconds: sleep(min(seconds, 0.002)))  # the client waits before it retries
    return monkeypatch


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('coc_tiny', **TINY)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    """The model in timm's hub layout, with the SHA-256 of its weights."""
    return _save(model, tmp_path_factory.mktemp('models') / 'tiny')


def _save(model, path: Path) -> Path:
    timm.models.save_for_hf(model, path, safe_serialization=True)
    config = json.loads((path / CONFIG).read_text())
    config['sha256'] = cache.sha256(path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config))
    return path


@pytest.fixture
def weights(folder):
    return (folder / WEIGHTS).read_bytes()


def _same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def _download(repo_id: str = 'lab/x', **kwargs) -> bytes:
    folder = hub_folder(repo_id, **kwargs)
    open_model_folder(folder)
    return (folder / WEIGHTS).read_bytes()


def _refused(repo_id: str = 'lab/x', **kwargs) -> str:
    """Returns the error of a download, which must have one line."""
    with pytest.raises(CheckpointError) as error:
        _download(repo_id, **kwargs)
    assert '\n' not in str(error.value)
    return str(error.value)


def _files(home: Path) -> list[Path]:
    """Complete and incomplete large files in the client's cache."""
    found = [path for path in (home / 'hf').rglob('blobs/*') if path.is_file()]
    return [path for path in found if len(path.name) != 40]


# Sources of models


@pytest.mark.parametrize('load', LOADERS)
def test_a_repository_is_downloaded_once(server, settings, model, folder, load):
    server.add('lab/x', folder)
    settings.setenv('HF_TOKEN', GUEST)
    assert _same(load('hf-hub:lab/x', pretrained=True), model)
    (stored,) = server.asked('GET', WEIGHTS)
    assert stored.host.startswith('127.0.0.1') and 'authorization' not in stored.headers  # only the Hub gets the token
    asked = [request for request in server.requests if request.path.startswith('/lab/')]
    assert asked and all(request.headers['authorization'] == f'Bearer {GUEST}' for request in asked)
    assert _same(load('hf-hub:lab/x', pretrained=True), model)
    assert len(server.asked('GET', WEIGHTS)) == 1
    settings.setattr(constants, 'HF_HUB_OFFLINE', True)
    settings.setenv('HF_HUB_OFFLINE', '1')
    asked = len(server.requests)
    assert _same(load('hf-hub:lab/x', pretrained=True), model)
    assert load('hf-hub:lab/x', pretrained=True, num_classes=3).num_classes == 3
    assert len(server.requests) == asked


def test_only_the_organization_of_the_user_is_asked(server, settings, folder):
    server.add('cluster_zoo/coc_tiny.in1k', folder)
    server.add('timm/coc_tiny.in1k', folder)
    assert organization() is None
    with pytest.raises(CheckpointError, match='CLUSTER_ZOO_AUTHORS=0'):
        timm.create_model(FULL, pretrained=True)
    assert server.requests == []
    settings.setenv('CLUSTER_ZOO_HUB', ' lab ')
    assert organization() == 'lab'
    for name in ('lab/other', '../lab', 'https://lab', '-lab', 'l ab', '..'):
        settings.setenv('CLUSTER_ZOO_HUB', name)
        with pytest.raises(CheckpointError, match='is no name of an organization'):
            timm.create_model(FULL, pretrained=True)


def test_weights_from_the_organization_of_the_user(server, settings, imported):
    settings.setenv('CLUSTER_ZOO_HUB', 'lab')
    with pytest.raises(CheckpointError, match=r'lab/coc_tiny\.in1k on the Hugging Face Hub.*CLUSTER_ZOO_AUTHORS=0'):
        timm.create_model('coc_tiny', pretrained=True)
    server.add(f'lab/{FULL}', imported / FULL, private=True)
    settings.setenv('HF_TOKEN', OWNER)
    weight = recipe.state_dict('coc_tiny')['norm.weight'].float()
    for kwargs in ({}, dict(num_classes=10, in_chans=1)):
        assert torch.equal(timm.create_model('coc_tiny', pretrained=True, **kwargs).norm.weight, weight)
    assert len(server.asked('GET', WEIGHTS)) == 1


def test_changed_weights_are_refused_unless_forced(server, settings, folder, tmp_path, capfd):
    settings.setenv('CLUSTER_ZOO_HUB', 'lab')
    settings.delenv('CLUSTER_ZOO_AUTHORS')  # the authors must not be asked instead
    server.add(f'lab/{FULL}', folder)
    assert find_weights(FULL, None) == find_weights(FULL, None)
    server.add(f'lab/{FULL}', _save(timm.create_model('coc_tiny', **TINY), tmp_path / 'other'))
    with pytest.raises(CheckpointError, match=r'hub:lab/coc_tiny\.in1k has changed: its SHA-256 was') as error:
        timm.create_model(FULL, pretrained=True)
    assert '\n' not in str(error.value) and '--force' in str(error.value)
    with read_only(cache.home()):
        server.add('lab/coc_small.in1k', folder)
        with pytest.raises(CheckpointError, match='CLUSTER_ZOO_HOME'):
            find_weights('coc_small.in1k', None)
    assert find_weights(FULL, None, force=True) == find_weights(FULL, None)  # accepted
    assert f'hub:lab/{FULL} has changed' in capfd.readouterr().err


def test_a_repository_of_another_architecture_is_refused(server, settings, folder):
    settings.setenv('CLUSTER_ZOO_HUB', 'lab')
    server.add('lab/coc_tiny_plain.in1k', folder)  # with weights of fitting shapes
    with pytest.raises(CheckpointError, match='its architecture is coc_tiny, not coc_tiny_plain'):
        timm.create_model('coc_tiny_plain.in1k', pretrained=True, **TINY)


def test_a_new_commit_is_downloaded(server, folder, model, tmp_path):
    first = server.add('lab/x', folder)
    assert _same(timm.create_model('hf-hub:lab/x', pretrained=True), model)
    newer = timm.create_model('coc_tiny', **TINY)
    server.add('lab/x', _save(newer, tmp_path / 'newer'))
    assert _same(timm.create_model('hf-hub:lab/x', pretrained=True), newer)
    for load in LOADERS:
        assert _same(load(f'hf-hub:lab/x@{first}', pretrained=True), model)


# Failures

FAILED = dict(
    dropped=dict(drop_after=100, times=None),
    busy=dict(status=429, headers={'Retry-After': '1'}, times=None),
    garbage=dict(garbage=True),
    missing=dict(status=404),
    error=dict(status=500),
    forbidden=dict(status=403),
)


@pytest.mark.parametrize('fault', FAILED)
def test_a_failed_download_raises_one_line_and_the_next_call_succeeds(server, folder, weights, tmp_path, fault):
    server.add('lab/x', folder)
    server.fail(WEIGHTS, method='GET', **FAILED[fault])
    message, left = _refused(), _files(tmp_path)
    server.heal()
    assert len(left) == (fault == 'garbage')
    for path in left:
        assert f"'{path}' is damaged" in message and 'Remove it' in message
        path.unlink()
    assert _download() == weights


@pytest.mark.parametrize('status', [429, 500, 503])
@pytest.mark.parametrize('name', [CONFIG, WEIGHTS])
def test_an_unavailable_hub(server, folder, weights, status, name):
    server.add('lab/x', folder)
    server.fail(name, method='HEAD', status=status, headers={'Retry-After': '1'}, times=None)
    assert 'lab/x on the Hugging Face Hub' in _refused()
    assert not server.asked('HEAD', 'pytorch_model.bin')  # which is only for repositories without safetensors
    server.heal()
    assert _download() == weights
    server.fail('', status=status, times=None)
    assert _download() == weights  # from the cache


def test_no_connection_to_the_hub(server, settings, folder, weights):
    server.add('lab/x', folder)
    assert _download() == weights
    with HubServer() as gone:
        pass
    _point(settings, gone.url)
    began = time.monotonic()
    assert _download() == weights
    assert 'localhost cannot be reached' in _refused('lab/y')
    assert time.monotonic() - began < 10


# Missing and private repositories


def test_missing_repositories_and_files(server, settings, folder, weights):
    server.add('lab/x', folder)
    server.add('lab/empty', {'README.md': b''})
    server.add('lab/weightless', {CONFIG: (folder / CONFIG).read_bytes()})
    server.add('lab/unconfigured', {WEIGHTS: weights})
    assert 'main2' in _refused('lab/x@main2') or 'Revision' in _refused('lab/x@main2')
    assert CONFIG in _refused('lab/empty') and CONFIG in _refused('lab/unconfigured')
    assert 'pytorch_model.bin' in _refused('lab/weightless')
    for token in ('', OWNER):
        settings.setenv('HF_TOKEN', token)
        assert 'lab/nothing on the Hugging Face Hub' in _refused('lab/nothing')


def test_private_and_gated_repositories(server, settings, folder, weights):
    server.add('lab/private', folder, private=True)
    server.add('lab/gated', folder, gated=True)
    for token in ('', GUEST, 'hf_wrong'):
        settings.setenv('HF_TOKEN', token)
        for name in ('lab/private', 'lab/gated'):
            assert name in _refused(name)
    assert not server.asked('GET', WEIGHTS)
    settings.setenv('HF_TOKEN', GUEST)
    assert 'gated' in _refused('lab/gated')
    settings.setenv('HF_TOKEN', OWNER)
    for name in ('lab/private', 'lab/gated'):
        assert _download(name) == weights


def test_offline(server, settings, folder, weights):
    server.add('lab/x', folder)
    server.add(f'lab/{FULL}', folder)
    settings.setenv('CLUSTER_ZOO_HUB', 'lab')
    settings.setenv('HF_HUB_OFFLINE', '1')  # read at each call
    assert 'lab/x' in _refused()
    with pytest.raises(CheckpointError, match='HF_HUB_OFFLINE') as error:
        timm.create_model(FULL, pretrained=True)
    assert '\n' not in str(error.value) and server.requests == []
    settings.delenv('HF_HUB_OFFLINE')
    assert _download() == weights
    asked = len(server.requests)
    settings.setenv('HF_HUB_OFFLINE', '1')
    assert _download() == weights and len(server.requests) == asked


# Invalid files


@pytest.mark.parametrize('load', LOADERS)
def test_weights_with_another_sha256_are_refused(server, folder, weights, load):
    server.add('lab/x', {CONFIG: (folder / CONFIG).read_bytes(), WEIGHTS: weights[:-1] + b'!'})
    with pytest.raises(
        CheckpointError, match=f'its SHA-256 is .*, and {cache.sha256(folder / WEIGHTS)} in config.json'
    ):
        load('hf-hub:lab/x', pretrained=True)


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('where, key, value', [
    ('pretrained_cfg', 'file', '/etc/passwd'),
    ('pretrained_cfg', 'url', 'https://example.org/w.pth'),
    ('pretrained_cfg', 'hf_hub_filename', 'other.bin'),
    ('pretrained_cfg', 'custom_load', True),
    ('model_args', 'checkpoint_path', '/etc/passwd'),
    ('model_args', 'dims', 'os.system'),
])  # fmt: skip
def test_a_configuration_with_a_location_is_refused(server, folder, weights, load, where, key, value):
    config = json.loads((folder / CONFIG).read_text())
    config[where][key] = value
    server.add('lab/x', {CONFIG: json.dumps(config).encode(), WEIGHTS: weights})
    with pytest.raises(CheckpointError, match=f'refused.*{key}'):
        load('hf-hub:lab/x', pretrained=True)


@pytest.mark.parametrize('text', [b'', b'{', b'[]', b'"x"', b'{"architecture": "os"}'])
def test_invalid_configurations_are_refused(server, settings, weights, text):
    settings.setenv('CLUSTER_ZOO_HUB', 'lab')
    server.add(f'lab/{FULL}', {CONFIG: text, WEIGHTS: weights})
    for load, name in ((load_model, f'hf-hub:lab/{FULL}'), (timm.create_model, FULL)):
        with pytest.raises(CheckpointError) as error:
            load(name, pretrained=True)
        assert '\n' not in str(error.value) and 'config' in str(error.value)
