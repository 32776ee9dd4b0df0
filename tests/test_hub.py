"""Models from the Hugging Face Hub and to it: the real client, and a server on this machine that can fail."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from hardship import ctrl_c, full_disk, read_only
from hub_server import GUEST, OWNER, HubServer
from huggingface_hub import constants
from processes import run_processes

import cluster_zoo
from cluster_zoo import hub, store
from cluster_zoo.sources import WeightsNotFoundError
from cluster_zoo.weights import CheckpointError

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, num_classes=5)
WEIGHTS = 'model.safetensors'


@contextmanager
def client(url: str, home: Path):
    """The Hub's client of this process, as if it had been started with this address and in this home."""
    with pytest.MonkeyPatch.context() as patch:
        settings = dict(
            ENDPOINT=url,
            HUGGINGFACE_CO_URL_TEMPLATE=url + '/{repo_id}/resolve/{revision}/{filename}',
            HF_HUB_CACHE=str(home / 'hf'),
            HF_TOKEN_PATH=str(home / 'token'),
            HF_HUB_DISABLE_XET=True,
            HF_HUB_OFFLINE=False,
            DOWNLOAD_CHUNK_SIZE=1024,  # what is received is kept in such pieces
        )
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setenv('CLUSTER_ZOO_HOME', str(home / 'store'))
        for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'CLUSTER_ZOO_HUB', 'CLUSTER_ZOO_AUTHORS'):
            patch.delenv(name, raising=False)
        patch.setenv('NO_PROXY', '*')
        sleep = time.sleep
        patch.setattr(time, 'sleep', lambda seconds: sleep(min(seconds, 0.002)))  # the client waits before it retries
        yield patch


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def settings(server, tmp_path):
    with client(server.url, tmp_path) as patch:
        yield patch


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('coc_tiny', **TINY)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    """The model in timm's hub layout, with the SHA-256 of its weights."""
    path = tmp_path_factory.mktemp('models') / 'tiny'
    timm.models.save_for_hf(model, path, safe_serialization=True)
    config = json.loads((path / 'config.json').read_text())
    config['sha256'] = _digest((path / WEIGHTS).read_bytes())
    (path / 'config.json').write_text(json.dumps(config))
    (path / 'README.md').write_text('---\nlicense: apache-2.0\n---\nA model.\n')
    return path


@pytest.fixture
def weights(folder):
    return (folder / WEIGHTS).read_bytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def _refused(repo_id: str = 'org/tiny', **kwargs) -> str:
    """The one clear message with which a download fails."""
    with pytest.raises(CheckpointError) as error:
        hub.download(repo_id, **kwargs)
    text = str(error.value)
    assert '\n' not in text and repo_id in text
    return text


def _cached(home: Path) -> list[Path]:
    """Large files in Hugging Face's cache, whatever their state."""
    return [
        path
        for path in (home / 'hf').rglob('*')
        if path.is_file() and path.parent.name == 'blobs' and len(path.name) != 40
    ]


# Where models come from


def test_a_repository_loads_by_its_address_and_then_from_the_cache(server, settings, model, folder):
    server.add('org/tiny', folder)
    settings.setenv('HF_TOKEN', GUEST)
    assert _same(timm.create_model('hf-hub:org/tiny', pretrained=True), model)
    (stored,) = server.asked('GET', WEIGHTS)
    assert stored.host.startswith('127.0.0.1') and 'authorization' not in stored.headers  # the token is the Hub's alone
    asked = [request for request in server.requests if request.path.startswith('/org/')]
    assert asked and all(request.headers['authorization'] == f'Bearer {GUEST}' for request in asked)

    assert _same(timm.create_model('hf-hub:org/tiny', pretrained=True), model)
    assert len(server.asked('GET', WEIGHTS)) == 1
    settings.setattr(constants, 'HF_HUB_OFFLINE', True)
    asked = len(server.requests)
    assert _same(timm.create_model('hf-hub:org/tiny', pretrained=True), model)
    assert len(server.requests) == asked


def test_no_organisation_is_asked_that_the_user_did_not_name(server, settings, folder):
    server.add('cluster_zoo/coc_tiny.in1k', folder)
    server.add('timm/coc_tiny.in1k', folder)
    assert hub.organisation() is None
    with pytest.raises(CheckpointError, match='CLUSTER_ZOO_HUB'):
        timm.create_model('coc_tiny.in1k', pretrained=True)
    assert server.requests == []
    settings.setenv('CLUSTER_ZOO_HUB', ' org ')
    assert hub.organisation() == 'org'
    for name in ('org/other', '../org', 'https://org', '-org', 'o rg', '..'):
        settings.setenv('CLUSTER_ZOO_HUB', name)
        with pytest.raises(CheckpointError, match='no name of an organisation'):
            hub.organisation()


def test_in_a_fresh_process_as_users_set_it(server, folder, tmp_path):
    """Nothing is patched here: environment variables, the client's own constants, a model of full size by its name."""
    code = (
        'import timm, torch, cluster_zoo\n'
        'model = timm.create_model("coc_tiny.in1k", pretrained=True)\n'
        'print(float(model.head.fc.weight.double().sum()), len(model.norm.weight))\n'
        'model = timm.create_model("coc_tiny.in1k", pretrained=True, num_classes=10, in_chans=1)\n'
        'print(model.head.fc.weight.shape[0], model.stem.proj.weight.shape[1])\n'
        'print(timm.create_model("hf-hub:org/tiny", pretrained=True).num_classes)\n'
    )
    model = timm.create_model('coc_tiny')
    timm.models.save_for_hf(model.half(), tmp_path / 'full', safe_serialization=True)
    server.add('org/coc_tiny.in1k', tmp_path / 'full', private=True)
    server.add('org/tiny', folder)
    unset = ('HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HF_TOKEN_PATH', 'TRANSFORMERS_OFFLINE')
    environment = {name: value for name, value in os.environ.items() if name not in unset} | dict(
        HF_ENDPOINT=server.url,
        HF_TOKEN=OWNER,
        HF_HOME=str(tmp_path / 'hf_home'),
        HOME=str(tmp_path),
        CLUSTER_ZOO_HUB='org',
        OMP_NUM_THREADS='1',
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=environment,
        cwd=Path(cluster_zoo.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    total = float(model.head.fc.weight.detach().double().sum())
    assert done.stdout.split() == [str(total), '320', '10', '1', '5']
    assert len(server.asked('GET', WEIGHTS)) == 2  # one for each repository


# Downloads that go wrong

RECOVERED = dict(
    dropped=dict(drop_after=10_000),
    longer=dict(lie=100),
    busy=dict(status=429, headers={'Retry-After': '1'}),
    garbage=dict(garbage=True),
)
FAILED = dict(
    dropped_each_time=dict(drop_after=100, times=None),
    busy_each_time=dict(status=429, headers={'Retry-After': '1'}, times=None),
    garbage_each_time=dict(garbage=True, times=None),
    reset=dict(drop_after=10_000, reset=True),
    shorter=dict(lie=-100),
    missing=dict(status=404),
    error=dict(status=500),
    forbidden=dict(status=403),
)


@pytest.mark.parametrize('fault', RECOVERED)
def test_what_the_client_gets_over(server, folder, weights, tmp_path, fault):
    server.add('org/tiny', folder)
    server.fail(WEIGHTS, method='GET', **RECOVERED[fault])
    assert hub.download('org/tiny').read_bytes() == weights
    first, second = server.asked('GET', WEIGHTS)
    assert 'range' not in first.headers
    if fault == 'dropped':  # it goes on from where it was
        assert second.headers['range'] == 'bytes=9216-'
    assert [path.name for path in _cached(tmp_path)] == [_digest(weights)]


@pytest.mark.parametrize('fault', FAILED)
def test_what_ends_a_download_is_one_message_and_the_next_try_succeeds(server, folder, weights, tmp_path, fault):
    server.add('org/tiny', folder)
    server.fail(WEIGHTS, method='GET', **FAILED[fault])
    message = _refused()
    if fault == 'garbage_each_time':
        assert _digest(weights) in message
    else:
        assert not _cached(tmp_path)  # nothing that a later load could take for the weights
    server.heal()
    assert hub.download('org/tiny').read_bytes() == weights


@pytest.mark.parametrize('status', [429, 500, 503])
@pytest.mark.parametrize('name', ['config.json', WEIGHTS])
def test_a_hub_that_is_down(server, folder, weights, status, name):
    server.add('org/tiny', folder)
    server.fail(name, method='HEAD', status=status, headers={'Retry-After': '1'}, times=None)
    assert name in _refused()
    assert not server.asked('HEAD', 'pytorch_model.bin')  # other weights are no answer to trouble with these
    server.heal()
    server.fail(name, method='HEAD', status=status, headers={'Retry-After': '1'})
    assert hub.download('org/tiny').read_bytes() == weights
    server.fail('', status=status, times=None)
    assert hub.download('org/tiny').read_bytes() == weights  # of the cache


def test_nobody_answers(server, settings, folder, weights):
    server.add('org/tiny', folder)
    with HubServer() as gone:
        pass
    settings.setattr(constants, 'ENDPOINT', gone.url)
    settings.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', gone.url + '/{repo_id}/resolve/{revision}/{filename}')
    _refused()


def test_an_interrupted_download_leaves_nothing_to_load(server, folder, weights, tmp_path):
    server.add('org/tiny', folder)
    never = threading.Event()
    server.fail(WEIGHTS, method='GET', drop_after=10_000, until=never)

    def interrupt():
        while not server.asked('GET', WEIGHTS):
            never.wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with ctrl_c(), pytest.raises(KeyboardInterrupt):
        thread.start()
        hub.download('org/tiny')
        thread.join()
    never.set()
    assert not _cached(tmp_path)
    assert hub.download('org/tiny').read_bytes() == weights


def test_full_disk(server, folder, weights, tmp_path):
    server.add('org/tiny', folder)
    with full_disk(len(weights) // 2):
        assert 'large' in _refused() or 'space' in _refused()
    assert not _cached(tmp_path)
    assert hub.download('org/tiny').read_bytes() == weights


def test_a_store_without_room_for_a_record_is_no_obstacle(server, folder, weights, tmp_path):
    server.add('org/tiny', folder)
    hub.download('org/tiny')
    (tmp_path / 'store/sha256.json').unlink()
    with full_disk(0):
        assert hub.download('org/tiny').read_bytes() == weights


def test_folders_that_can_only_be_read(server, folder, weights, tmp_path):
    server.add('org/tiny', folder)
    for path in (tmp_path / 'store', tmp_path / 'hf'):
        path.mkdir()
    with read_only(tmp_path / 'store'):
        assert hub.download('org/tiny').read_bytes() == weights
    with read_only(tmp_path / 'hf'):
        assert hub.download('org/tiny').read_bytes() == weights
        server.add('org/other', folder)
        assert str(tmp_path / 'hf') in _refused('org/other')


def _download_at_once(rank, world, url, home):
    with client(url, Path(home)):
        Path(home, str(rank)).write_bytes(hub.download('org/tiny').read_bytes())


def test_two_processes_download_once(server, folder, weights, tmp_path):
    server.add('org/tiny', folder)
    both = threading.Event()
    server.fail(WEIGHTS, method='GET', until=both)

    def when_both_have_asked():
        while len(server.asked('HEAD', WEIGHTS)) < 2 and not both.wait(0.01):
            pass
        both.set()

    thread = threading.Thread(target=when_both_have_asked)
    thread.start()
    try:
        run_processes(_download_at_once, 2, server.url, str(tmp_path))
    finally:
        both.set()
        thread.join()
    assert len(server.asked('GET', WEIGHTS)) == 1
    assert [(tmp_path / str(rank)).read_bytes() for rank in range(2)] == [weights] * 2


# What is not there, or not for everybody


def test_what_is_not_there(server, settings, folder, weights):
    server.add('org/tiny', folder)
    server.add('org/empty', {'README.md': b''})
    server.add('org/weightless', {'config.json': (folder / 'config.json').read_bytes()})
    server.add('org/unconfigured', {WEIGHTS: weights})
    assert 'main2' in _refused(revision='main2') or 'Revision' in _refused(revision='main2')
    assert 'config.json' in _refused('org/empty') and 'config.json' in _refused('org/unconfigured')
    assert WEIGHTS in _refused('org/weightless')
    for token in ('', OWNER):
        settings.setenv('HF_TOKEN', token)
        assert 'not found' in _refused('org/nothing').lower()


def test_private_and_gated_repositories(server, settings, folder, weights, model):
    server.add('org/private', folder, private=True)
    server.add('org/gated', folder, gated=True)
    for token in ('', GUEST, 'hf_wrong'):
        settings.setenv('HF_TOKEN', token)
        for name in ('org/private', 'org/gated'):
            _refused(name)
    assert not server.asked('GET', WEIGHTS)
    settings.setenv('HF_TOKEN', GUEST)
    assert 'gated' in _refused('org/gated')
    settings.setenv('HF_TOKEN', OWNER)
    for name in ('org/private', 'org/gated'):
        assert hub.download(name).read_bytes() == weights
    assert _same(timm.create_model('hf-hub:org/private', pretrained=True), model)


def test_offline(server, settings, folder, weights):
    server.add('org/tiny', folder)
    settings.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'config.json' in _refused()
    settings.setattr(constants, 'HF_HUB_OFFLINE', False)
    path = hub.download('org/tiny')
    settings.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert hub.download('org/tiny').read_bytes() == weights
    path.resolve().write_bytes(weights[:-1])
    message = _refused()
    assert 'damaged' in message and 'offline' in message


# Files that are not what they should be


@pytest.mark.parametrize('damage', [lambda w: w[:-1], lambda w: w[:1000], lambda w: w[:-1] + b'!', lambda w: b''])
def test_a_damaged_file_of_the_cache_is_downloaded_again(server, folder, weights, damage):
    server.add('org/tiny', folder)
    hub.download('org/tiny').resolve().write_bytes(damage(weights))
    assert hub.download('org/tiny').read_bytes() == weights
    assert len(server.asked('GET', WEIGHTS)) == 2
    hub.download('org/tiny')
    assert len(server.asked('GET', WEIGHTS)) == 2


def test_weights_that_are_not_those_of_the_configuration(server, folder, weights):
    server.add('org/tiny', {'config.json': (folder / 'config.json').read_bytes(), WEIGHTS: weights[:-1] + b'!'})
    message = _refused()
    assert _digest(weights) in message and 'refused' in message


def test_weights_of_a_commit_that_change_are_refused(server, folder, weights, tmp_path):
    config = json.loads((folder / 'config.json').read_text())
    del config['sha256']
    files = {'config.json': json.dumps(config).encode(), WEIGHTS: weights}
    commit = server.add('org/tiny', files)
    hub.download('org/tiny')
    server.repositories['org/tiny'].commits[commit][WEIGHTS] = weights[:-1] + b'!'  # the Hub states its new SHA-256
    message = _refused(cache_dir=tmp_path / 'another')
    assert _digest(weights) in message
    assert hub.download('org/tiny').read_bytes() == weights


def test_configuration_and_weights_are_of_one_commit(server, folder, weights):
    """Whatever is pushed between the two requests."""
    server.add('org/tiny', folder)
    pushed = threading.Event()
    server.fail('config.json', method='GET', until=pushed)

    def push():
        while not server.asked('GET', 'config.json') and not pushed.wait(0.01):
            pass
        server.add('org/tiny', {'config.json': b'{}', WEIGHTS: weights[:-1] + b'!'})
        pushed.set()

    thread = threading.Thread(target=push)
    thread.start()
    assert hub.download('org/tiny').read_bytes() == weights
    thread.join()


def test_a_new_commit_is_taken(server, folder, model):
    server.add('org/tiny', folder)
    assert _same(timm.create_model('hf-hub:org/tiny', pretrained=True), model)
    newer = timm.create_model('coc_tiny', **TINY)
    timm.models.save_for_hf(newer, folder.parent / 'newer', safe_serialization=True)
    server.add('org/tiny', folder.parent / 'newer')
    assert _same(timm.create_model('hf-hub:org/tiny', pretrained=True), newer)


def test_weights_and_arguments_are_of_one_commit(server, settings, folder):
    """timm asks for the configuration, this package for the weights; another version is pushed in between."""
    server.add('org/tiny', folder)
    newer = timm.create_model('coc_tiny', weighted_mean=False, **TINY)
    timm.models.save_for_hf(newer, folder.parent / 'by other means', safe_serialization=True)
    download = hub.download

    def pushed_before(*args, **kwargs):
        server.add('org/tiny', folder.parent / 'by other means')
        return download(*args, **kwargs)

    settings.setattr(hub, 'download', pushed_before)
    with pytest.raises(CheckpointError, match='org/tiny has changed while it was loaded'):
        timm.create_model('hf-hub:org/tiny', pretrained=True)
    settings.setattr(hub, 'download', download)
    assert _same(timm.create_model('hf-hub:org/tiny', pretrained=True), newer)


def test_a_tag_keeps_the_weights_first_used(server, settings, folder, model):
    settings.setenv('CLUSTER_ZOO_HUB', 'org')
    server.add('org/coc_tiny.in1k', folder)
    assert _same(timm.create_model('coc_tiny', pretrained=True, **TINY), model)
    newer = timm.create_model('coc_tiny', **TINY)
    timm.models.save_for_hf(newer, folder.parent / 'other', safe_serialization=True)
    server.add('org/coc_tiny.in1k', folder.parent / 'other')
    with pytest.raises(WeightsNotFoundError, match=r'refused: .* was .* when hub:org/coc_tiny\.in1k was first used'):
        timm.create_model('coc_tiny', pretrained=True, **TINY)
    records = store.home() / 'sha256.json'  # as the message says
    records.write_text(json.dumps({k: v for k, v in json.loads(records.read_text()).items() if '@' in k}))
    assert _same(timm.create_model('coc_tiny', pretrained=True, **TINY), newer)


def test_the_weights_file_may_be_named(server, folder, weights):
    """It is told from the usual one in everything: the SHA-256 of the configuration is not its own."""
    config, other = (folder / 'config.json').read_bytes(), weights[:-1] + b'!'
    server.add('org/tiny', {'config.json': config, WEIGHTS: weights, 'ema.safetensors': other})
    assert hub.download('org/tiny', filename='ema.safetensors').read_bytes() == other
    assert not server.asked('GET', WEIGHTS)
    assert hub.download('org/tiny', filename=WEIGHTS).read_bytes() == weights
    message = _refused(filename='missing.safetensors')
    assert 'no missing.safetensors' in message and 'pytorch_model.bin' not in message
    asked = len(server.requests)
    for name in ('../ema.safetensors', '/ema.safetensors', 'a/b.bin', '', '..', '.hidden', 'a\\b', 'a\n'):
        assert 'no name of a file' in _refused(filename=name)
    assert len(server.requests) == asked


def test_a_repository_of_another_architecture_is_no_source(server, settings, folder):
    settings.setenv('CLUSTER_ZOO_HUB', 'org')
    server.add('org/tiny', folder)
    server.add('org/coc_tiny_plain.in1k', folder)  # whose weights would fit
    assert "'coc_tiny', not coc_tiny_plain" in _refused('org/coc_tiny_plain.in1k', architecture='coc_tiny_plain')
    with pytest.raises(CheckpointError, match="'coc_tiny', not coc_tiny_plain"):
        hub.fetch('coc_tiny_plain.in1k')
    assert not server.asked('GET', WEIGHTS)
    assert hub.download('org/tiny', architecture='coc_tiny').is_file()


class _Runs:
    def __reduce__(self):
        return os.mkdir, ('pwned',)


def test_a_pickle_is_opened_safely_or_not_at_all(server, settings, folder, model, tmp_path):
    settings.chdir(tmp_path)
    config = json.loads((folder / 'config.json').read_text())
    del config['sha256']
    for name, content in (('plain', model.state_dict()), ('evil', dict(model.state_dict(), x=_Runs()))):
        torch.save(content, tmp_path / 'w.bin')
        files = {'config.json': json.dumps(config).encode(), 'pytorch_model.bin': (tmp_path / 'w.bin').read_bytes()}
        server.add(f'org/{name}', files)
    assert _same(timm.create_model('hf-hub:org/plain', pretrained=True), model)
    with pytest.raises(CheckpointError, match='refused'):
        timm.create_model('hf-hub:org/evil', pretrained=True)
    assert not (tmp_path / 'pwned').exists()


# Pushing


def test_a_folder_is_pushed_and_loads_back(server, settings, folder, weights, model):
    settings.setenv('HF_TOKEN', OWNER)
    (folder / 'notes.txt').write_text('not for others')
    url = hub.push(folder, 'org/new', private=True, message='First weights')
    (folder / 'notes.txt').unlink()
    repository = server.repositories['org/new']
    assert url == f'{server.url}/org/new/commit/{repository.head}' and repository.private
    assert set(repository.commits[repository.head]) == {'.gitattributes', 'config.json', 'README.md', WEIGHTS}
    assert repository.commits[repository.head][WEIGHTS] == weights
    assert _same(timm.create_model('hf-hub:org/new', pretrained=True), model)
    assert hub.push(folder, 'org/new') == url  # there is nothing new


@pytest.mark.parametrize('token', ['', GUEST, 'hf_wrong'])
def test_who_may_not_push(server, settings, folder, token):
    settings.setenv('HF_TOKEN', token)
    with pytest.raises(CheckpointError, match='HF_TOKEN') as error:
        hub.push(folder, 'org/new')
    assert '\n' not in str(error.value)
    assert not server.repositories


@pytest.mark.parametrize('name', ['create', 'preupload/main', 'batch', 'commit/main'])
def test_a_push_that_fails_changes_nothing_and_can_be_repeated(server, settings, folder, weights, name):
    settings.setenv('HF_TOKEN', OWNER)
    server.add('org/tiny', {'config.json': b'{}'})
    before = server.repositories['org/tiny'].head
    server.fail(name, status=500, times=None)
    with pytest.raises(CheckpointError, match='org/tiny') as error:
        hub.push(folder, 'org/tiny')
    assert '\n' not in str(error.value) and 'logged in' not in str(error.value)
    assert server.repositories['org/tiny'].head == before or name == 'commit/main'  # of which only the answer is lost
    server.heal()
    hub.push(folder, 'org/tiny')
    assert hub.download('org/tiny').read_bytes() == weights


def test_a_damaged_folder_is_not_pushed(server, settings, folder, tmp_path):
    settings.setenv('HF_TOKEN', OWNER)
    (tmp_path / 'm').mkdir()
    for path in folder.iterdir():
        (tmp_path / 'm' / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'm' / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match='damaged'):
        hub.push(tmp_path / 'm', 'org/new')
    with pytest.raises(CheckpointError, match='config'):
        hub.push(tmp_path / 'nothing', 'org/new')
    assert server.requests == []
