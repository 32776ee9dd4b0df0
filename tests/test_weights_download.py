"""Downloads from a simulated Google Drive with gdown, failures, the cache and several processes."""

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import filelock
import gdown  # noqa: F401  before processes are forked
import pytest
import timm
import torch
from drive_server import PERMISSION_DENIED, QUOTA_EXCEEDED, DriveServer
from hardship import full_disk, in_a_process_that_is_killed, read_only
from parity_cases import recipe

import cluster_zoo
from cluster_zoo.errors import CheckpointError
from cluster_zoo.weights import cache, metadata
from cluster_zoo.weights.download import fetch
from cluster_zoo.weights.loading import load_model
from segmentation.models import segmenter

NAME = 'coc_tiny.in1k'
FOLDER, DNC = '155Lfofxr7vpdcUxL8ZvzlrNX4cUlhn3J', '1zCT10t09mXw-8iLqDvkmxR46lOD5dsv4'  # of coc_tiny and of all dnc_*
URL = 'https://drive.google.com/drive/folders/'
FILE, NOTES = 'F' * 33, 'N' * 33
PIECE = 512 * 1024  # gdown writes a download in chunks of this size


@pytest.fixture
def server(tmp_path):
    with DriveServer(tmp_path) as server:
        server.add_folder(FOLDER, 'coc_tiny')
        server.add_file(NOTES, 'args.yaml', b'model: coc_tiny', FOLDER)
        yield server


@pytest.fixture(autouse=True)
def settings(server, home, tmp_path, monkeypatch):
    """Environment variables with which gdown connects to the server instead of Google."""
    for name, value in (server.environment | dict(HOME=str(tmp_path), OMP_NUM_THREADS='1')).items():
        monkeypatch.setenv(name, value)
    for name in ('CLUSTER_ZOO_AUTHORS', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, 'sleep', lambda seconds: sleep(min(seconds, 0.05)))  # gdown waits before it retries
    return monkeypatch


@pytest.fixture(scope='module')
def checkpoint(published_file) -> bytes:
    return published_file.read_bytes()


@pytest.fixture(scope='module')
def content() -> bytes:
    """Random bytes in place of a checkpoint, for tests of the download."""
    return random.Random(0).randbytes(3 * PIECE)


def _install(path, folder, source):
    (folder / cache.WEIGHTS).write_bytes(path.read_bytes())
    config = dict(architecture='coc_tiny', pretrained_cfg={}, sha256=cache.sha256(path), source=source)
    (folder / 'config.json').write_text(json.dumps(config))


def _fetch(name=NAME, folder=FOLDER, **options) -> bytes:
    return (fetch(name, URL + folder, _install, **options) / cache.WEIGHTS).read_bytes()


def _refused(*args, **options) -> str:
    """Returns the error of a download, which must have one line and leave nothing in the cache."""
    with pytest.raises(CheckpointError) as error:
        _fetch(*args, **options)
    text = str(error.value)
    assert '\n' not in text and not [path for path in cache.home().glob('*') if '.in1k' in path.name]
    return text


def _source(name=NAME) -> dict:
    return json.loads((cache.entry(name) / 'config.json').read_text())['source']


def _records() -> dict[str, str]:
    path = cache.home() / 'sha256.json'
    return json.loads(path.read_text()) if path.exists() else {}


def _downloads() -> list[str]:
    return sorted(path.name for path in (cache.home() / 'downloads').iterdir())


# When weights are downloaded, and what is printed


def test_the_first_call_downloads_and_the_second_uses_the_cache(server, checkpoint, tmp_path):
    """In a new process, configured by environment variables only."""
    code = (
        'import os, timm, torch, cluster_zoo\n'
        'for _ in range(2):\n'
        '    model = timm.create_model("coc_tiny", pretrained=True)\n'
        '    print(model.norm.weight[0].item())\n'
        '    os.environ.update(HF_HUB_OFFLINE="1", HTTPS_PROXY="http://127.0.0.1:9")\n'
    )
    server.add_file(FILE, 'model_best.pth.tar', checkpoint, FOLDER)
    run = partial(subprocess.run, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = run([sys.executable, '-c', code], cwd=Path(cluster_zoo.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(recipe.state_dict('coc_tiny')['norm.weight'][0].float().item())] * 2
    assert server.sent(FILE) == [''] and server.sent(NOTES) == []
    (line,) = done.stderr.splitlines()
    assert all(part in line for part in ('coc_tiny.in1k', 'model_best.pth.tar', URL + FOLDER, 'no SHA-256 is pinned'))
    assert dict(url=URL + FOLDER, file='model_best.pth.tar', drive_id=FILE).items() <= _source().items()
    assert _records() == {f'drive:{FILE}': _source()['sha256']}
    assert _downloads() == [] and not (tmp_path / '.cache/gdown').exists()


@pytest.mark.parametrize('name, value', [('CLUSTER_ZOO_AUTHORS', '0'), ('HF_HUB_OFFLINE', '1')])
def test_settings_that_forbid_downloads(server, settings, content, name, value):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    settings.setenv(name, value)
    with pytest.raises(CheckpointError, match=f'{name}.* forbids.*cluster-zoo import FILE --as coc_tiny.in1k') as error:
        timm.create_model(NAME, pretrained=True)
    assert '\n' not in str(error.value) and server.requests == [] and not cache.home().exists()


@pytest.mark.parametrize('network', ['unroutable', 'refused', 'no such name', 'mute'])
def test_a_missing_network_raises_one_line_within_ten_seconds(settings, network):
    with socket.create_server(('127.0.0.1', 0)) as mute:
        port = mute.getsockname()[1]
        if network == 'refused':
            mute.close()
        hosts = {'unroutable': '192.0.2.1:9', 'no such name': 'proxy.invalid:9'}
        for variable in ('HTTPS_PROXY', 'https_proxy'):
            settings.setenv(variable, f'http://{hosts.get(network, f"127.0.0.1:{port}")}')
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=r'drive\.google\.com cannot be reached') as error:
            timm.create_model(NAME, pretrained=True)
        assert time.monotonic() - began < 10 and '\n' not in str(error.value)


def test_names_without_a_release():
    with torch.device('meta'), pytest.raises(CheckpointError, match='authors have published none'):
        timm.create_model('coc_base_dim64', pretrained=True)
    with pytest.raises(CheckpointError, match='condnet_swin_base_ade20k'):
        segmenter.create_segmenter('condnet_swin_base_ade20k', pretrained=True)


# Which file is downloaded


def _tree(server, root, paths) -> dict[str, str]:
    """Adds files with these paths, which are their content too, to a folder. Returns their ids."""
    folders, ids = {'': server.add_folder(root, 'release')}, {}
    for i, path in enumerate(paths):
        above = ''
        for part in path.split('/')[:-1]:
            parent, above = folders[above], f'{above}/{part}'
            if above not in folders:
                folders[above] = server.add_folder(f'folder{len(folders)}'.ljust(33, '-'), part, parent)
        file_id = f'file{i:03}'.ljust(33, '-')
        ids[path] = server.add_file(file_id, path.rpartition('/')[2], path.encode(), folders[above])
    return ids


SHARED = [f'{kind}FEC-{size}/{file}' for kind, file in (
    ('', 'last.pth.tar'), ('', 'model_best.pth.tar'), ('', 'log.txt'),
    ('detection/', 'mask_rcnn_best.pth'), ('segmentation/', 'fpn_best.pth'),
) for size in ('Small', 'Base', 'Large')]  # fmt: skip
CENTROIDS = [
    *(f'ImageNet/resnet{depth}/{file}.pth' for depth in (18, 50, 101) for file in ('epoch_100', 'latest', 'best')),
    *(f'cifar10/resnet{depth}/best.pth' for depth in (18, 50, 101)),
    *(f'ImageNet/swin_{size}/best.pth' for size in ('tiny', 'small', 'base')),
    *('ImageNet/mobilenetv2/best.pth', 'segmentation/fcn_resnet50_ade20k_best.pth', 'cifar100/mobilenetv2/best.pth'),
]


@pytest.mark.parametrize('name, paths, chosen', [
    (NAME, ['coc_tiny/last.pth.tar', 'coc_tiny_plain/model_best.pth.tar'], 'coc_tiny/last.pth.tar'),
    (NAME, ['CoC-Tiny/last.pth.tar', 'CoC-Tiny-Plain/model_best.pth.tar', 'coc_small.pth'], 'CoC-Tiny/last.pth.tar'),
    (NAME, ['last.pth.tar', 'coc_tiny_plain/model_best.pth.tar'], 'last.pth.tar'),
    (NAME, ['last.pth.tar', 'model_best.pth.tar', 'summary.csv'], 'model_best.pth.tar'),
    (NAME, ['checkpoint-1.pth.tar', 'last.pth.tar', 'checkpoint-2.pth.tar'], 'last.pth.tar'),
    (NAME, ['coc_tiny.pth', 'scanobjectnn_best.pth', 'semantic_fpn_best.pth', 'mask_rcnn_best.pth'], 'coc_tiny.pth'),
    (NAME, ['coc_tiny_plain/model_best.pth.tar'], None),
    (NAME, ['coc_tiny_plain/model_best.pth.tar', 'fec_small/tiny_best.pth'], None),
    (NAME, ['Plain/model_best.pth.tar'], None),
    (NAME, ['a.pth', 'b.pth'], None),
    (NAME, ['README.md'], None),
    ('fec_small.in1k', ['Base/model_best.pth.tar'], None),
    *((f'fec_{size}.in1k', SHARED, f'FEC-{size.title()}/model_best.pth.tar') for size in ('small', 'base', 'large')),
    ('semantic_fpn_fec_small', SHARED, 'segmentation/FEC-Small/fpn_best.pth'),
    ('semantic_fpn_coc_small_4', ['fpn_coc_small_4_latest.pth', 'mask_rcnn_4.pth'], 'fpn_coc_small_4_latest.pth'),
    ('semantic_fpn_coc_small_4', ['latest.pth', 'mask_rcnn_coco.pth'], 'latest.pth'),
    *((f'dnc_resnet{depth}.in1k', CENTROIDS, f'ImageNet/resnet{depth}/best.pth') for depth in (18, 50, 101)),
    *((f'dnc_swin_{size}.in1k', CENTROIDS, f'ImageNet/swin_{size}/best.pth') for size in ('tiny', 'small', 'base')),
    ('dnc_mobilenetv2_100.in1k', CENTROIDS, 'ImageNet/mobilenetv2/best.pth'),
    ('dnc_resnet18_cifar.cifar10', CENTROIDS, 'cifar10/resnet18/best.pth'),
    ('dnc_resnet50.in1k', ['cifar10/resnet50.pth', 'mobilenetv2.pth', 'resnet101.pth'], None),
    ('dnc_swin_tiny.in1k', ['Swin-T.pth', 'Swin-S.pth', 'Swin-B.pth'], None),
])  # fmt: skip
def test_the_file_of_another_model_is_never_downloaded(server, name, paths, chosen):
    ids = _tree(server, FOLDER, paths)
    if chosen is None:
        message = _refused(name)
        assert all(path in message for path in paths) and f"cluster-zoo fetch {name} --file 'PATH'" in message
        assert [server.sent(file_id) for file_id in ids.values()] == [[]] * len(ids)
    else:
        assert _fetch(name) == chosen.encode()


def test_a_file_can_be_selected(server):
    _tree(server, FOLDER, ['a/b.pth', 'c.pth'])
    assert 'a/b.pth' in _refused(member='b.pth')
    assert _fetch(member='a/b.pth') == b'a/b.pth' and _source()['file'] == 'a/b.pth'
    assert _fetch(member='c.pth', force=True) == b'c.pth'


def test_names_on_the_server_do_not_influence_local_paths(server, content, tmp_path):
    server.add_file(FILE, '../../../escaped.pth', content, FOLDER)
    assert _fetch() == content
    assert not [path for path in (tmp_path, *tmp_path.parents) for path in path.glob('*escaped*')]
    for name in ('../x.y', 'x.y/..', 'a/b.c', '..', 'x.y\n', '', '/x.y'):
        with pytest.raises(CheckpointError, match='no name of weights'):
            cache.entry(name)


# Failures

_HTML = {'Content-Type': 'text/html'}
FAILED = dict(
    dropped_each_time=dict(drop_after=100, times=None),
    longer=dict(lie=100, times=None),
    missing=dict(status=404, headers=_HTML, body=b'Not found', times=None),
    busy=dict(status=429, headers=_HTML | {'Retry-After': '1'}, body=b'Too many requests', times=None),
    error=dict(status=500, headers=_HTML, body=b'Error', times=None),
    quota=QUOTA_EXCEEDED,
    denied=PERMISSION_DENIED,
)


@pytest.mark.parametrize('of', [FILE, FOLDER])
@pytest.mark.parametrize('fault', FAILED)
def test_a_failed_download_raises_one_line_and_the_next_call_succeeds(server, content, fault, of):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    server.fail(of, **FAILED[fault])
    message = _refused()
    assert 'Google Drive' in message or URL + FOLDER in message
    if of == FILE:
        assert {'quota': 'Too many users', 'denied': 'permission'}.get(fault, '') in message
    server.heal()
    assert _fetch() == content


def test_an_interrupted_download_is_resumed(server, content):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    server.fail(FILE, drop_after=PIECE + 100)
    server.fail(FILE, status=503, headers=_HTML, times=None)  # for the retries
    _refused()
    assert len(_downloads()) == 1
    server.heal()
    assert _fetch() == content and _downloads() == []
    assert server.sent(FILE)[-1] == f'bytes={PIECE}-'


class _Runs:
    def __reduce__(self):
        return os.mkdir, ('pwned',)


@pytest.mark.parametrize('damage', ['garbage', 'one byte', 'cut', 'page', 'pickle', 'another model'])
def test_a_damaged_or_malicious_checkpoint_is_refused(server, checkpoint, settings, tmp_path, damage):
    settings.chdir(tmp_path)
    content = bytearray(checkpoint)
    if damage == 'garbage':
        content = bytes(byte ^ 0x55 for byte in checkpoint[: 1 << 20])
    elif damage == 'one byte':  # in a weight; only the CRC detects it
        content[len(content) // 2] ^= 0x10
    elif damage == 'cut':
        content = checkpoint[:-1000]
    elif damage == 'page':
        content = b'<!DOCTYPE html><html><title>Sign in</title></html>'
    else:
        other = dict(state_dict={}, x=_Runs()) if damage == 'pickle' else dict(state_dict=dict(a=torch.ones(2)))
        torch.save(other, tmp_path / 'other.pth')
        content = (tmp_path / 'other.pth').read_bytes()
    server.add_file(FILE, 'model_best.pth.tar', bytes(content), FOLDER)
    with pytest.raises(CheckpointError) as error:
        timm.create_model(NAME, pretrained=True)
    assert '\n' not in str(error.value) and 'args.yaml' not in str(error.value)
    assert _records() == {} and _downloads() == [] and cache.cached(NAME) is None
    assert not (tmp_path / 'pwned').exists()


# SHA-256


def test_a_changed_file_is_refused_unless_forced(server, content, capfd):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    _fetch()
    first = _records()[f'drive:{FILE}']
    server.add_file(FILE, 'model_best.pth.tar', content[::-1], FOLDER)
    cache.entry(NAME).rename(cache.home() / 'moved')
    message = _refused()
    assert first in message and '--force' in message and _downloads() == []
    capfd.readouterr()
    assert _fetch(force=True) == content[::-1]
    now = _records()[f'drive:{FILE}']
    assert f'its SHA-256 was {first} at the first use and is {now} now' in capfd.readouterr().err and now != first


def test_pinned_files(server, content, settings, tmp_path, capfd):
    (tmp_path / 'f').write_bytes(content)
    server.add_file('P' * 33, 'anything', content)  # in no folder
    settings.setitem(metadata.PINS, NAME, ('P' * 33, 'f' * 64))
    message = _refused()
    assert 'f' * 64 in message and cache.sha256(tmp_path / 'f') in message and '--force' in message
    assert _fetch(force=True) == content and 'f' * 64 in capfd.readouterr().err
    settings.setitem(metadata.PINS, NAME, ('P' * 33, cache.sha256(tmp_path / 'f')))
    assert _fetch(force=True) == content and 'its SHA-256 is pinned' in capfd.readouterr().err
    assert not [request for request in server.requests if 'folder' in request.path]


@pytest.mark.parametrize('text', ['', '{', '[1]', '\x00'])
def test_damaged_records_are_refused_and_kept(home, text):
    home.mkdir()
    (home / 'sha256.json').write_text(text)
    with pytest.raises(CheckpointError, match=r'sha256\.json. is damaged'):
        cache.check_digest('x', 'a')
    assert (home / 'sha256.json').read_text() == text


# The cache


def test_full_disk(server, content):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)

    def install(path, folder, source):
        with full_disk(PIECE):
            _install(path, folder, source)

    for size in (0, PIECE + 100):  # for the lease, for the download
        with full_disk(size):
            assert 'CLUSTER_ZOO_HOME' in _refused()
    with pytest.raises(CheckpointError, match='CLUSTER_ZOO_HOME'):
        fetch(NAME, URL + FOLDER, install)
    assert cache.cached(NAME) is None and not [*cache.home().glob('.new*')]
    assert _fetch() == content


def test_a_read_only_cache(server, content, home):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    home.mkdir()
    with read_only(home):
        assert 'CLUSTER_ZOO_HOME' in _refused() and server.requests == []
        with pytest.raises(CheckpointError, match='CLUSTER_ZOO_HOME'):
            cache.check_digest('x', 'a')
    _fetch()
    with read_only(home):
        assert _fetch() == content  # from the cache


@pytest.mark.parametrize('renames, weights', [(0, b'old'), (1, b'old'), (2, b'new')])
def test_killing_a_process_that_replaces_a_folder_loses_no_weights(home, settings, renames, weights):
    def write(content):
        with cache.new_folder(home / NAME) as folder:
            (folder / 'x').write_bytes(content)
            _install(folder / 'x', folder, {})

    def replace():
        rename, done = Path.rename, []

        def rename_or_die(self, target):
            if len(done) == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(rename(self, target))

        settings.setattr(Path, 'rename', rename_or_die)
        settings.setattr(cache.shutil, 'rmtree', lambda *_, **__: len(done) == 2 and os.kill(os.getpid(), 9))
        write(b'new')

    write(b'old')
    in_a_process_that_is_killed(replace)
    assert cache.verified_weights(cache.cached(NAME)).read_bytes() == weights
    assert _fetch() == weights
    write(b'newest')
    assert cache.verified_weights(cache.cached(NAME)).read_bytes() == b'newest'
    assert [path.name for path in home.iterdir() if path.name != '.locks'] == [NAME]


def test_a_damaged_entry_is_refused_and_others_still_load(imported, home):
    for name in (NAME, 'coc_tiny.other'):
        (home / name).mkdir(parents=True)
        for path in (imported / NAME).iterdir():
            (home / name / path.name).write_bytes(path.read_bytes())
    weights, config = home / NAME / cache.WEIGHTS, home / NAME / 'config.json'
    content = weights.read_bytes()
    for file, damaged in ((weights, content[:-1] + b'!'), (weights, b''), (config, b'{'), (config, b'[]')):
        whole = file.read_bytes()
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            timm.create_model('coc_tiny', pretrained=True)
        assert str(home / NAME) in str(error.value) and '\n' not in str(error.value)
        with pytest.raises(CheckpointError):
            cache.verified_weights(home / NAME)
        file.write_bytes(whole)
        assert load_model(f'local-dir:{home / "coc_tiny.other"}').num_classes == 1000
    weight = recipe.state_dict('coc_tiny')['norm.weight'].float()
    for kwargs in ({}, dict(num_classes=10, in_chans=1, cache_dir=imported)):
        assert torch.equal(timm.create_model('coc_tiny', pretrained=True, **kwargs).norm.weight, weight)


def test_the_import_does_not_read_the_cache(home, tmp_path):
    (home / NAME).mkdir(parents=True)
    (home / NAME / 'config.json').write_text('{')
    code = (
        'import sys\n'
        'def audit(event, args):\n'
        f'    if any({str(home)!r} in str(arg) for arg in args):\n'
        '        raise SystemExit(f"{event}{args}")\n'
        'sys.addaudithook(audit)\n'
        'import timm, cluster_zoo\n'
        'timm.create_model("coc_tiny", depths=(1, 1, 1, 1))\n'
        'assert "coc_tiny.in1k" in timm.list_pretrained()\n'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(cluster_zoo.__file__).parents[1], capture_output=True)
    assert done.returncode == 0, done.stderr


# Several processes


class _Process:
    """A fork of this process that downloads, and its standard error."""

    def __init__(self, log: Path):
        self.log, self.pid, code = log, os.fork(), 1
        if self.pid == 0:
            try:
                sys.stderr = log.open('w', buffering=1)
                _fetch()
                code = 0
            except CheckpointError as error:
                print(f'refused: {error}', file=sys.stderr)
                code = 3
            finally:
                os._exit(code)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ''

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def _eight_at_once(server, content, tmp_path, **fault) -> list[_Process]:
    """Starts eight processes; the server responds when seven of them wait."""
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    event = threading.Event()
    server.fail(FILE, until=event, **fault)
    processes = [_Process(tmp_path / '0.log')]
    _until(lambda: server.sent(FILE))
    processes += [_Process(tmp_path / f'{i}.log') for i in range(1, 8)]
    _until(lambda: all('waiting for another process' in process.said for process in processes[1:]))
    event.set()
    return processes


def test_one_of_eight_processes_downloads(server, content, settings, tmp_path):
    """On a file system without locks."""

    def flock(*_):
        raise OSError('this file system has no locks')

    for function in ('flock', 'lockf', 'fcntl'):
        settings.setattr(fcntl, function, flock)
    processes = _eight_at_once(server, content, tmp_path)
    assert [process.end() for process in processes] == [0] * 8
    assert server.sent(FILE) == [''] and _fetch() == content
    assert 'downloading coc_tiny.in1k' in processes[0].said
    assert [process.said.count('\n') for process in processes] == [1] * 8


def test_waiting_processes_raise_the_error_of_the_first_one(server, content, tmp_path):
    processes = _eight_at_once(server, content, tmp_path, status=404, headers=_HTML)
    began = time.monotonic()
    assert [process.end() for process in processes] == [3] * 8
    assert time.monotonic() - began < 3 and server.sent(FILE) == ['']
    (line,) = {process.said.splitlines()[-1] for process in processes}
    assert 'cannot be downloaded' in line
    assert _fetch() == content


@pytest.mark.parametrize('how', [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_or_killed_process_does_not_block_others(server, content, settings, tmp_path, how):
    settings.setattr(filelock, 'SoftFileLease', partial(filelock.SoftFileLease, lease_duration=1.5))  # not 30
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    server.fail(FILE, until=threading.Event())
    first = _Process(tmp_path / '1.log')
    _until(lambda: server.sent(FILE))
    os.kill(first.pid, how)
    try:
        began = time.monotonic()
        second = _Process(tmp_path / '2.log')
        assert second.end() == 0 and time.monotonic() - began < 8
        assert 'downloading' in second.said
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.end()
    assert _fetch() == content


# Complete downloads


def test_a_release_of_nearest_centroids(server, tmp_path):
    """With the names of mmclassification."""
    torch.manual_seed(0)
    model = timm.create_model('dnc_resnet18').half()
    names = {name: f'head.{name[3:]}' if name.startswith('fc.') else f'backbone.{name}' for name in model.state_dict()}
    state_dict = {names[name]: value for name, value in model.state_dict().items()}
    torch.save(dict(meta=dict(mmcls_version='0.18.0', epoch=100), state_dict=state_dict), tmp_path / 'latest.pth')
    ids = _tree(server, DNC, ['ImageNet/resnet18/latest.pth', 'ImageNet/resnet50/latest.pth', 'cifar10/resnet18.pth'])
    file_id = ids['ImageNet/resnet18/latest.pth']
    server.files[file_id] = ('latest.pth', (tmp_path / 'latest.pth').read_bytes(), server.files[file_id][2])
    loaded = timm.create_model('dnc_resnet18', pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].to(value.dtype), value)
    assert timm.create_model('dnc_resnet18', pretrained=True, num_classes=3).num_classes == 3
    assert len(server.sent(file_id)) == 1


def test_a_release_of_a_segmenter(server, settings, tmp_path):
    name = 'region_proxy_vit_ti16_ade20k'
    model = segmenter.create_segmenter(name)
    torch.save(dict(meta={}, state_dict=model.half().state_dict()), tmp_path / 'model.pth')
    file_id = '1sq3g3JcQ2NSJch-MvlvvnHFFeN-MU_DE'
    server.add_file(file_id, 'model.pth', (tmp_path / 'model.pth').read_bytes())
    for _ in range(2):
        loaded = segmenter.create_segmenter(name, pretrained=True)
        assert all(torch.equal(x.half(), model.state_dict()[key]) for key, x in loaded.state_dict().items())
        settings.setenv('CLUSTER_ZOO_AUTHORS', '0')
    assert server.sent(file_id) == ['']
    (cache.entry(name) / cache.WEIGHTS).write_bytes(b'')
    with pytest.raises(CheckpointError, match=r'model\.safetensors. is damaged'):
        segmenter.create_segmenter(name, pretrained=True)
