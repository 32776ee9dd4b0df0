"""The authors' publication: the real gdown, and a Google Drive on this machine that can fail."""

import json
import os
import random
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
from drive_server import PERMISSION_DENIED, QUOTA_EXCEEDED, DriveServer
from hardship import ctrl_c, full_disk, read_only
from parity_cases import recipe, save_published
from processes import run_processes

import cluster_zoo
from cluster_zoo import authors, importing, store
from cluster_zoo.weights import CheckpointError

NAME = 'coc_tiny.in1k'
FOLDER = '155Lfofxr7vpdcUxL8ZvzlrNX4cUlhn3J'  # as the authors' page has it
FILE, NOTES = 'F' * 33, 'N' * 33
PIECE = 512 * 1024  # gdown keeps what it receives in such pieces


@contextmanager
def client(environment: dict[str, str], home: Path):
    """The environment of a user whose way to Google leads to the server, with a home of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment | dict(CLUSTER_ZOO_HOME=str(home / 'store'), HOME=str(home))).items():
            patch.setenv(name, value)
        for name in ('CLUSTER_ZOO_HUB', 'CLUSTER_ZOO_AUTHORS'):
            patch.delenv(name, raising=False)
        sleep = time.sleep
        patch.setattr(time, 'sleep', lambda seconds: sleep(min(seconds, 0.002)))  # gdown waits before it retries
        yield patch


@pytest.fixture
def server(tmp_path):
    with DriveServer(tmp_path) as server:
        server.add_folder(FOLDER, 'coc_tiny')
        server.add_file(NOTES, 'args.yaml', b'model: coc_tiny', FOLDER)
        yield server


@pytest.fixture(autouse=True)
def settings(server, tmp_path):
    with client(server.environment, tmp_path) as patch:
        yield patch


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> bytes:
    """What the authors' script saved, in half precision to be smaller."""
    path = save_published('coc_tiny', tmp_path_factory.mktemp('published') / 'model_best.pth.tar')
    published = torch.load(path, weights_only=False)
    published['state_dict'] = {name: value.half() for name, value in published['state_dict'].items()}
    torch.save(published, path)
    return path.read_bytes()


@pytest.fixture
def content(settings) -> bytes:
    """Stands for a checkpoint where only its way here is tested: importing puts it into the store as it is."""

    def put(path, name, replace, source, root):
        with store.new_folder(name, root, replace) as folder:
            (folder / store.WEIGHTS).write_bytes(path.read_bytes())
            cfg = dict(architecture='coc_tiny', pretrained_cfg={}, sha256=store.sha256(folder / store.WEIGHTS))
            (folder / store.CONFIG).write_text(json.dumps(cfg | dict(source=source)))

    settings.setattr(importing, 'import_checkpoint', put)
    return random.Random(0).randbytes(3 * PIECE)


def _stored(root: Path | None = None) -> bytes:
    return (store.folder(NAME, root) / store.WEIGHTS).read_bytes()


def _refused(name: str = NAME, **kwargs) -> str:
    """The one clear message with which a download fails. The store has no entry then."""
    with pytest.raises(CheckpointError) as error:
        authors.fetch(name, progress=False, **kwargs)
    text = str(error.value)
    assert '\n' not in text
    assert not store.entries()
    return text


def _downloads(home: Path) -> list[str]:
    return sorted(path.name for path in (home / 'store/downloads').iterdir())


# What is published, and when it is asked for


def test_the_published_folders():
    folders = dict(
        coc_tiny='155Lfofxr7vpdcUxL8ZvzlrNX4cUlhn3J',
        coc_tiny_plain='1HSZlO_XMkw6mM90Cqo3tVFxEUX8PvWCg',
        coc_small='19zbCOS33We7HOjL575Di5wyuLbnDebdE',
        coc_medium='1H3Fs3SVE0LFHuP6iP9nTg2_ZMrkfk9S8',
        fec_small='1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A',
        fec_base='1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A',
        fec_large='1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A',
    )
    for name, folder in folders.items():
        assert authors.publication(f'{name}.in1k') == f'https://drive.google.com/drive/folders/{folder}'
    for name in ('coc_tiny_plain.cifar10', 'coc_tiny2.untrained', 'resnet18.a1_in1k', 'dnc_resnet50.untrained'):
        assert authors.publication(name) is None
    assert 'published no weights' in _refused('coc_tiny_plain.cifar10')


def test_nothing_is_downloaded_without_leave(server, settings, content):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    for value in ('', '0', 'no'):
        settings.setenv('CLUSTER_ZOO_AUTHORS', value)
        with pytest.raises(CheckpointError, match=f'cluster-zoo fetch {NAME}') as error:
            timm.create_model(NAME, pretrained=True)
        assert 'CLUSTER_ZOO_AUTHORS=1' in str(error.value)
    assert server.requests == []


def test_in_a_fresh_process_with_leave(server, checkpoint, tmp_path):
    """Nothing is patched here: environment variables, a checkpoint like the published ones, a second use offline."""
    code = (
        'import timm, torch, cluster_zoo\n'
        'for _ in range(2):\n'
        '    model = timm.create_model("coc_tiny.in1k", pretrained=True)\n'
        '    print(float(model.head.fc.weight.detach().double().sum()))\n'
    )
    server.add_file(FILE, 'model_best.pth.tar', checkpoint, FOLDER)
    environment = {**os.environ, 'CLUSTER_ZOO_AUTHORS': '1', 'OMP_NUM_THREADS': '1', 'HF_HOME': str(tmp_path / 'hf')}
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=environment,
        cwd=Path(cluster_zoo.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    total = float(recipe.state_dict('coc_tiny')['head.weight'].half().double().sum())
    assert done.stdout.split() == [str(total)] * 2
    assert server.sent(FILE) == [''] and server.sent(NOTES) == []
    source = store.read_config(store.folder(NAME))['source']
    assert source['url'].endswith(FOLDER) and source['file'] == 'model_best.pth.tar'
    assert source['sha256'] == store.recorded(f'drive:{FILE}')
    assert _downloads(tmp_path) == [] and not (tmp_path / '.cache/gdown').exists()


def test_what_is_in_the_store_is_not_downloaded_again(server, content):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    assert authors.fetch(NAME, progress=False) == store.folder(NAME)
    asked = len(server.requests)
    authors.fetch(NAME, progress=False)
    assert len(server.requests) == asked
    (store.folder(NAME) / store.WEIGHTS).write_bytes(content[:-1])  # unless it is damaged
    authors.fetch(NAME, progress=False)
    assert _stored() == content and server.sent(FILE) == ['', '']
    authors.fetch(NAME, progress=False, force=True)
    assert server.sent(FILE) == [''] * 3


# Which file it is


def test_the_file_is_told_by_its_path(server, content):
    folder = server.add_folder('1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A', 'FEC')
    ids = {}
    for size in ('small', 'base', 'large'):
        inside = server.add_folder(size.ljust(33, '-'), f'FEC-{size.title()}', folder)
        ids[size] = server.add_file(size.ljust(33, '0'), 'model_best.pth.tar', content[:1000] + size.encode(), inside)
        server.add_file(size.ljust(33, '1'), 'last.pth.tar', b'last', inside)
        server.add_file(size.ljust(33, '2'), 'mask_rcnn_coco.pth', b'coco', inside)
    for size in ('base', 'large', 'small'):
        path = authors.fetch(f'fec_{size}.in1k', progress=False)
        assert (path / store.WEIGHTS).read_bytes() == content[:1000] + size.encode()
    path = authors.fetch('fec_base.in1k', 'FEC-Base/last.pth.tar', force=True, progress=False)
    assert (path / store.WEIGHTS).read_bytes() == b'last'
    assert server.sent(ids['small']) == ['']


def test_a_file_that_can_not_be_told_is_not_guessed(server):
    assert 'args.yaml' in _refused()
    server.add_file(FILE, 'a.pth', b'a', FOLDER)
    server.add_file('G' * 33, 'b.pth', b'b', FOLDER)
    message = _refused()
    assert 'a.pth' in message and 'b.pth' in message and f'cluster-zoo fetch {NAME}' in message
    assert 'c.pth' in _refused(member='c.pth')
    assert server.sent(FILE) == []


@pytest.mark.parametrize('paths, chosen', [
    (['coc_tiny/last.pth.tar', 'coc_tiny_plain/model_best.pth.tar'], 'coc_tiny/last.pth.tar'),
    (['CoC-Tiny/last.pth.tar', 'CoC-Tiny-Plain/model_best.pth.tar', 'coc_small.pth'], 'CoC-Tiny/last.pth.tar'),
    (['last.pth.tar', 'coc_tiny_plain/model_best.pth.tar'], 'last.pth.tar'),
    (['coc_tiny_plain/model_best.pth.tar'], None),
    (['coc_tiny_plain/model_best.pth.tar', 'fec_small/tiny_best.pth'], None),
])  # fmt: skip
def test_the_file_of_another_model_is_never_taken(server, content, paths, chosen):
    folders = {}
    for i, path in enumerate(paths):
        *above, file = path.split('/')
        for name in above:
            folders.setdefault(name, server.add_folder(f'{i}'.ljust(33, '-'), name, FOLDER))
        body = content[:1000] + path.encode()
        server.add_file(f'{i}'.ljust(33, '0'), file, body, folders[above[0]] if above else FOLDER)
    if chosen is None:
        assert paths[0] in _refused()
        assert [server.sent(f'{i}'.ljust(33, '0')) for i in range(len(paths))] == [[]] * len(paths)
    else:
        authors.fetch(NAME, progress=False)
        assert _stored() == content[:1000] + chosen.encode()


def test_names_on_the_server_name_no_paths_here(server, content, tmp_path):
    server.add_file(FILE, '../../../escaped.pth', content, FOLDER)
    authors.fetch(NAME, progress=False)
    assert _stored() == content
    assert not [path for path in (tmp_path, *tmp_path.parents) for path in path.glob('*escaped*')]


# Downloads that go wrong

RECOVERED = dict(
    dropped=dict(drop_after=2 * PIECE),
    reset=dict(drop_after=2 * PIECE, reset=True),
)
_HTML = {'Content-Type': 'text/html'}
FAILED = dict(
    dropped_each_time=dict(drop_after=100, times=None),
    longer=dict(lie=100),  # all of it is there, and gdown waits for more
    missing=dict(status=404, headers=_HTML, body=b'Not found'),
    busy=dict(status=429, headers=_HTML | {'Retry-After': '1'}, body=b'Too many requests'),
    error=dict(status=500, headers=_HTML, body=b'Error'),
    quota=QUOTA_EXCEEDED,
    denied=PERMISSION_DENIED,
)


@pytest.mark.parametrize('fault', RECOVERED)
def test_what_the_client_gets_over(server, content, tmp_path, fault):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    server.fail(FILE, **RECOVERED[fault])
    authors.fetch(NAME, progress=False)
    assert _stored() == content
    if fault == 'dropped':  # it goes on from where it was
        assert server.sent(FILE)[1].startswith('bytes=') and server.sent(FILE)[1] != 'bytes=0-'
    assert _downloads(tmp_path) == []


@pytest.mark.parametrize('fault', FAILED)
def test_what_ends_a_download_is_one_message_and_the_next_try_succeeds(server, content, fault):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    server.fail(FILE, **FAILED[fault])
    message = _refused()
    assert 'drive.google.com' in message
    assert {'quota': 'Too many users', 'denied': 'permission'}.get(fault, '') in message
    server.heal()
    authors.fetch(NAME, progress=False)
    assert _stored() == content


@pytest.mark.parametrize(
    'fault',
    [
        PERMISSION_DENIED,
        dict(status=404),
        dict(status=429),
        dict(status=500),
        dict(drop_after=50),
        dict(reset=True, drop_after=0),
    ],
)
def test_a_folder_that_can_not_be_listed(server, content, fault):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    server.fail(FOLDER, **fault)
    assert FOLDER in _refused()
    server.heal()
    authors.fetch(NAME, progress=False)
    assert _stored() == content


def test_a_download_goes_on_where_the_last_one_ended(server, content, tmp_path):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    server.fail(FILE, drop_after=PIECE + 100)
    server.fail(FILE, status=503, headers=_HTML, times=None)  # and nobody answers when it tries again
    _refused()
    assert len(_downloads(tmp_path)) == 1
    server.heal()
    authors.fetch(NAME, progress=False)
    assert server.sent(FILE)[-1] == f'bytes={PIECE}-'
    assert _stored() == content and _downloads(tmp_path) == []


def test_an_interrupted_download_leaves_nothing_to_load(server, content):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    never = threading.Event()
    server.fail(FILE, drop_after=PIECE + 100, until=never)

    def interrupt():
        while not server.sent(FILE):
            never.wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with ctrl_c(), pytest.raises(KeyboardInterrupt):
        thread.start()
        authors.fetch(NAME, progress=False)
        thread.join()
    never.set()
    assert not store.entries()
    authors.fetch(NAME, progress=False)
    assert _stored() == content


def test_the_folder_is_where_it_belongs_after_a_process_was_killed(server, content):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    folder = authors.fetch(NAME, progress=False)
    folder.rename(folder.with_name(f'.old-{NAME}'))  # as between the two renames of a replacement
    assert authors.fetch(NAME, force=True, progress=False) == folder and folder.is_dir()


def test_full_disk(server, content):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    with full_disk(PIECE + 100):
        message = _refused()
    assert 'large' in message or 'space' in message
    authors.fetch(NAME, progress=False)
    assert _stored() == content


def test_a_store_that_can_only_be_read(server, content, tmp_path):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    (tmp_path / 'store').mkdir()
    with read_only(tmp_path / 'store'):
        assert 'CLUSTER_ZOO_HOME' in _refused()
    assert server.requests == []
    authors.fetch(NAME, progress=False)
    with read_only(tmp_path / 'store'):
        assert authors.fetch(NAME, progress=False) == store.folder(NAME)  # it is there


def _fetch_at_once(rank, world, environment, home):
    with client(environment, Path(home)) as patch:

        def put(path, name, replace, source, root):
            with store.new_folder(name, root, replace) as folder:
                (folder / store.WEIGHTS).write_bytes(path.read_bytes())
                digest = store.sha256(folder / store.WEIGHTS)
                (folder / store.CONFIG).write_text(
                    json.dumps(dict(architecture='coc_tiny', pretrained_cfg={}, sha256=digest))
                )

        patch.setattr(importing, 'import_checkpoint', put)
        Path(home, f'asks-{rank}').touch()
        assert authors.fetch(NAME, progress=False).is_dir()


def test_two_processes_download_once(server, content, tmp_path):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    both = threading.Event()
    server.fail(FILE, until=both)

    def when_both_ask():
        while len([*tmp_path.glob('asks-*')]) < 2 and not both.wait(0.01):
            pass
        both.set()

    thread = threading.Thread(target=when_both_ask)
    thread.start()
    try:
        run_processes(_fetch_at_once, 2, server.environment, str(tmp_path))
    finally:
        both.set()
        thread.join()
    assert server.sent(FILE) == ['']
    assert _stored() == content


# Files that are not what they should be


def test_a_file_that_has_changed_is_refused_until_it_is_accepted(server, content, tmp_path):
    server.add_file(FILE, 'model_best.pth.tar', content, FOLDER)
    authors.fetch(NAME, progress=False)
    first = store.recorded(f'drive:{FILE}')
    server.add_file(FILE, 'model_best.pth.tar', content[::-1], FOLDER)
    (store.folder(NAME) / store.WEIGHTS).unlink()
    (store.folder(NAME) / store.CONFIG).unlink()
    message = _refused()
    assert first in message and '--force' in message
    assert _downloads(tmp_path) == []
    authors.fetch(NAME, progress=False, force=True)
    assert _stored() == content[::-1] and store.recorded(f'drive:{FILE}') != first


def test_a_file_is_not_mended_with_pieces_of_another(server, checkpoint, tmp_path):
    """It is replaced between the two halves of a download, and no SHA-256 of it is known."""
    path = tmp_path / 'model_best.pth.tar'
    path.write_bytes(checkpoint)
    newer = torch.load(path, weights_only=False)
    for value in newer['state_dict'].values():
        value += 0.25
    torch.save(newer, path)
    assert path.stat().st_size == len(checkpoint)
    server.add_file(FILE, 'model_best.pth.tar', checkpoint, FOLDER)
    server.fail(FILE, drop_after=len(checkpoint) // 2)
    server.fail(FILE, status=503, headers=_HTML, times=None)
    _refused()
    server.heal()
    date = 'Wed, 15 Nov 2023 22:13:20 GMT'
    server.add_file(FILE, 'model_best.pth.tar', path.read_bytes(), FOLDER, date)
    assert 'damaged' in _refused()
    assert server.sent(FILE)[-1].startswith('bytes=')  # as gdown does, whatever the date says
    model = timm.create_model(f'local-dir:{authors.fetch(NAME, progress=False)}', pretrained=True)
    torch.testing.assert_close(model.norm.weight.half(), newer['state_dict']['module.norm.weight'])


@pytest.mark.parametrize('damage', ['garbage', 'one byte', 'cut', 'page', 'pickle'])
def test_a_damaged_or_malicious_checkpoint_is_refused(server, checkpoint, settings, tmp_path, damage):
    settings.chdir(tmp_path)
    content = bytearray(checkpoint)
    if damage == 'garbage':
        content = bytes(byte ^ 0x55 for byte in checkpoint[: 1 << 20])
    elif damage == 'one byte':  # of a weight, which any number could be
        content[len(content) // 2] ^= 0x10
    elif damage == 'cut':
        content = checkpoint[:-1000]
    elif damage == 'page':
        content = b'<!DOCTYPE html><html><title>Sign in</title></html>'
    else:
        torch.save(dict(state_dict={}, x=_Runs()), tmp_path / 'evil.pth')
        content = (tmp_path / 'evil.pth').read_bytes()
    server.add_file(FILE, 'model_best.pth.tar', bytes(content), FOLDER)
    _refused()
    assert store.recorded(f'drive:{FILE}') is None and _downloads(tmp_path) == []
    assert not (tmp_path / 'pwned').exists()


class _Runs:
    def __reduce__(self):
        return os.mkdir, ('pwned',)


def test_who_lacks_gdown_is_told_which_extra_brings_it(settings):
    settings.setitem(sys.modules, 'gdown', None)
    assert 'cluster_zoo[authors]' in _refused()
