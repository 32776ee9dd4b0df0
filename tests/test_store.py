"""The local store: entries that are complete or absent, whatever happens while they are written."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import filelock
import pytest
import timm
import torch
from hardship import full_disk, in_a_process_that_is_killed, read_only
from safetensors.torch import save_file

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo import store
from cluster_zoo.weights import CheckpointError

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, num_classes=5)
NAME = 'coc_tiny.mine'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(tmp_path / 'store'))
    return tmp_path / 'store'


def _fill(path: Path, weights: bytes = b'weights') -> None:
    (path / store.WEIGHTS).write_bytes(weights)
    cfg = dict(input_size=[3, 224, 224], num_classes=5)
    config = dict(architecture='coc_tiny', num_classes=5, pretrained_cfg=cfg, sha256=store.sha256(path / store.WEIGHTS))
    (path / store.CONFIG).write_text(json.dumps(config))


def _add(name: str = NAME, weights: bytes = b'weights') -> Path:
    with store.new_folder(name) as path:
        _fill(path, weights)
    return store.folder(name)


def _files(home: Path) -> set[str]:
    """What a user sees in the store."""
    return {path.name for path in home.iterdir() if path.name != '.locks'}


def _message(error) -> str:
    text = str(error.value)
    assert '\n' not in text
    return text


# Where it is, and what it is called


def test_where_the_store_is(monkeypatch, tmp_path):
    assert store.home() == tmp_path / 'store'
    monkeypatch.setenv('CLUSTER_ZOO_HOME', '~/zoo')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert store.home() == tmp_path / 'zoo'
    monkeypatch.delenv('CLUSTER_ZOO_HOME')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    assert store.home() == tmp_path / 'torch/hub/cluster_zoo'
    monkeypatch.setenv('CLUSTER_ZOO_HOME', 'zoo')
    monkeypatch.chdir(tmp_path)
    assert store.home() == tmp_path / 'zoo'  # and stays there if the process goes elsewhere
    assert not any(tmp_path.iterdir())  # asking makes nothing


def test_a_name_is_an_architecture_and_a_tag(tmp_path):
    assert store.folder('coc_small.in1k') == tmp_path / 'store/coc_small.in1k'
    assert store.folder('fec_base.my-2_tag', tmp_path) == tmp_path / 'fec_base.my-2_tag'
    for name in ('', 'coc_small', '.in1k', 'coc_small.', '../x.y', 'x.y/..', 'a/b.c', '..', 'x.y\n', 'x..y', '/x.y'):
        with pytest.raises(ValueError, match='no name for weights'):
            store.folder(name)


def test_entries_are_the_complete_folders(home):
    assert store.entries() == {}
    _add('coc_tiny.b')
    _add('coc_tiny.a')
    for other in ('downloads', '.new-coc_tiny.a-x', 'coc_tiny.empty'):
        (home / other).mkdir()
    (home / 'coc_tiny.file').write_text('')
    assert list(store.entries()) == ['coc_tiny.a', 'coc_tiny.b']
    assert store.entries(home / 'coc_tiny.file') == {}


# Writing


def test_an_entry_appears_when_it_is_complete(home):
    with store.new_folder(NAME) as path:
        _fill(path)
        assert store.entries() == {} and not store.folder(NAME).exists()
    assert store.verified_weights(store.folder(NAME)).read_bytes() == b'weights'
    assert _files(home) == {NAME}


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, OSError(errno.ENOSPC, 'No space left on device')])
def test_a_failure_leaves_the_store_as_it_was(home, error):
    for before in (set(), {NAME}):
        with (
            pytest.raises((ValueError, KeyboardInterrupt, OSError, CheckpointError)),
            store.new_folder(NAME, None, True) as path,
        ):
            (path / store.WEIGHTS).write_bytes(b'half')
            raise error
        assert _files(home) == before
        if not before:
            _add()
    assert store.verified_weights(store.folder(NAME)).read_bytes() == b'weights'


def test_an_entry_is_replaced_only_where_asked(home):
    _add()
    with pytest.raises(CheckpointError, match='--force') as error, store.new_folder(NAME):
        raise AssertionError('it was entered')
    assert str(home / NAME) in _message(error)
    with store.new_folder(NAME, replace=True) as path:
        _fill(path, b'newer')
        assert store.verified_weights(store.folder(NAME)).read_bytes() == b'weights'  # until the new one is complete
    assert store.verified_weights(store.folder(NAME)).read_bytes() == b'newer'
    assert _files(home) == {NAME}


def test_the_old_entry_comes_back_where_the_new_one_can_not_take_its_place(home, monkeypatch):
    _add()
    rename, calls = Path.rename, []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, 'Input/output error')
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', second_fails)
    with pytest.raises((OSError, CheckpointError)), store.new_folder(NAME, replace=True) as path:
        _fill(path, b'newer')
    assert store.verified_weights(store.folder(NAME)).read_bytes() == b'weights'
    assert _files(home) == {NAME}


def test_what_a_killed_process_left_is_never_an_entry_and_is_tidied(home):
    def half():
        with store.new_folder(NAME) as path:
            (path / store.WEIGHTS).write_bytes(b'half')
            os.kill(os.getpid(), signal.SIGKILL)

    in_a_process_that_is_killed(half)
    assert _files(home) and store.entries() == {}
    _add()
    assert _files(home) == {NAME}
    assert store.verified_weights(store.folder(NAME)).read_bytes() == b'weights'


def test_one_process_at_a_time_writes_an_entry(home):
    here, there = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with store.lock(NAME):
            os.write(here[1], b'locked')
            os.read(there[0], 1)  # until the parent has looked
        os._exit(0)
    try:
        assert os.read(here[0], 6) == b'locked'
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(home / f'.locks/{NAME}.lock').acquire(timeout=0)
        with store.lock('coc_tiny.other'):
            pass
    finally:
        os.write(there[1], b'x')
    assert os.waitpid(child, 0)[1] == 0
    with store.lock(NAME), store.lock(NAME):  # taken twice by one process
        pass
    for end in (*here, *there):
        os.close(end)


def test_full_disk(home):
    model = timm.create_model('coc_tiny', **TINY)
    with full_disk(10_000), pytest.raises(CheckpointError) as error, store.new_folder(NAME) as path:
        save_file(model.state_dict(), path / store.WEIGHTS)
    assert 'large' in _message(error) and str(home) in _message(error)
    with full_disk(10), pytest.raises(CheckpointError, match='large'):
        store.record('x', 'abc')
    assert _files(home) == set()
    _add()


def test_a_store_that_can_not_be_written_to_can_be_read(home):
    _add()
    store.record('x', 'abc')
    with read_only(home):
        assert store.verified_weights(store.entries()[NAME]).read_bytes() == b'weights'
        assert store.recorded('x') == 'abc'
        for write in (lambda: _add('coc_tiny.new'), lambda: store.record('y', 'abc')):
            with pytest.raises(CheckpointError, match='CLUSTER_ZOO_HOME') as error:
                write()
            assert str(home) in _message(error)
    assert _files(home) == {NAME, 'sha256.json'}


def test_a_store_below_a_file(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(tmp_path / 'file/store'))
    assert store.entries() == {}
    with pytest.raises(CheckpointError, match='CLUSTER_ZOO_HOME') as error:
        _add()
    _message(error)


def test_an_entry_may_be_written_while_another_is_whose_name_goes_on():
    with store.new_folder('coc_tiny.a-b') as longer:
        _fill(longer)
        _add('coc_tiny.a')
        assert (longer / store.WEIGHTS).is_file()
    assert list(store.entries()) == ['coc_tiny.a', 'coc_tiny.a-b']


def _killed_while_replacing(renames: int) -> None:
    """A process that replaces the entry is killed after so many renames, of which there are two."""

    def replace():
        rename, done = Path.rename, []

        def rename_or_die(self, target):
            if len(done) == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(rename(self, target))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, 'rename', rename_or_die)
            patch.setattr(shutil, 'rmtree', lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
            with store.new_folder(NAME, replace=True) as path:
                _fill(path, b'newer')

    in_a_process_that_is_killed(replace)


@pytest.mark.parametrize('renames, weights', [(0, b'weights'), (1, b'weights'), (2, b'newer')])
def test_a_process_that_is_killed_while_it_replaces_an_entry_loses_none(home, renames, weights):
    _add()
    _killed_while_replacing(renames)
    assert store.verified_weights(store.folder(NAME)).read_bytes() == weights
    assert list(store.entries()) == [NAME]
    assert store.verified_weights(store.entries()[NAME]).read_bytes() == weights
    with pytest.raises(CheckpointError, match=r'has .* already'), store.new_folder(NAME):
        raise AssertionError('it was entered')
    assert _files(home) == {NAME}  # put back, and tidied
    assert store.verified_weights(home / NAME).read_bytes() == weights
    with store.new_folder(NAME, replace=True) as path:
        _fill(path, b'newest')
    assert _files(home) == {NAME} and store.verified_weights(home / NAME).read_bytes() == b'newest'


def test_what_a_killed_process_left_can_be_read_where_nothing_can_be_written(home):
    _add()
    _killed_while_replacing(1)
    assert not (home / NAME).exists()
    with read_only(home):
        assert store.verified_weights(store.folder(NAME)).read_bytes() == b'weights'
        assert list(store.entries()) == [NAME]


@pytest.mark.parametrize('kind', ['file', 'link to a folder', 'dangling link'])
def test_what_somebody_has_put_in_the_place_of_an_entry(home, tmp_path, kind):
    home.mkdir()
    (tmp_path / 'elsewhere').mkdir()
    _fill(tmp_path / 'elsewhere', b'another')
    if kind == 'file':
        (home / NAME).write_text('')
    else:
        (home / NAME).symlink_to(tmp_path / ('elsewhere' if kind == 'link to a folder' else 'nowhere'))
    with pytest.raises(CheckpointError, match=r'has .* already.*--force') as error, store.new_folder(NAME):
        raise AssertionError('it was entered')
    assert str(home / NAME) in _message(error)
    with store.new_folder(NAME, replace=True) as path:
        _fill(path)
    assert store.verified_weights(home / NAME).read_bytes() == b'weights' and not (home / NAME).is_symlink()
    assert (tmp_path / 'elsewhere' / store.WEIGHTS).read_bytes() == b'another'
    assert _files(home) == {NAME}


def test_nothing_is_written_where_a_lock_leads(home, tmp_path):
    (home / '.locks').mkdir(parents=True)
    (tmp_path / 'victim').write_text('keep')
    (home / f'.locks/{NAME}.lock').symlink_to(tmp_path / 'victim')
    before = (tmp_path / 'victim').stat().st_mtime_ns
    with pytest.raises(CheckpointError, match='is a link') as error:
        _add()
    assert f'{NAME}.lock' in _message(error)
    assert (tmp_path / 'victim').read_text() == 'keep' and (tmp_path / 'victim').stat().st_mtime_ns == before


# Reading


def test_weights_are_compared_with_what_was_written():
    weights = _add() / store.WEIGHTS
    weights.write_bytes(b'Weights')
    with pytest.raises(CheckpointError, match='damaged') as error:
        store.verified_weights(weights.parent)
    assert str(weights) in _message(error)
    assert 'cluster-zoo import FILE --as coc_tiny.mine --force' in _message(error)
    weights.unlink()
    with pytest.raises(CheckpointError, match='holds no model'):
        store.verified_weights(weights.parent)


def test_damaged_weights_of_the_authors_can_be_fetched(tmp_path):
    path = _add('coc_tiny.in1k')
    (path / store.WEIGHTS).write_bytes(b'Weights')
    with pytest.raises(CheckpointError, match=r'cluster-zoo fetch coc_tiny\.in1k'):
        store.verified_weights(path)
    path.rename(tmp_path / 'coc_tiny.in1k')  # a folder of the user's own
    with pytest.raises(CheckpointError, match='damaged') as error:
        store.verified_weights(tmp_path / 'coc_tiny.in1k')
    assert 'cluster-zoo' not in _message(error)


@pytest.mark.parametrize('text', [None, '', '{', '[]', '"config"', '\x00\xff'])
def test_a_damaged_configuration(text):
    path = _add()
    (path / store.CONFIG).unlink() if text is None else (path / store.CONFIG).write_text(text, encoding='latin-1')
    with pytest.raises(CheckpointError) as error:
        store.verified_weights(path)
    assert store.CONFIG in _message(error)


# What sources held when they were first used


def test_records(home):
    assert store.recorded('drive:1') is None and not home.exists()
    store.record('drive:1', 'a')
    store.record('drive:2', 'b')
    store.record('drive:1', 'c')
    assert [store.recorded(f'drive:{i}') for i in (1, 2, 3)] == ['c', 'b', None]
    assert _files(home) == {'sha256.json'}


@pytest.mark.parametrize('text', ['', '{', '[1]', '\x00'])
def test_damaged_records_are_neither_trusted_nor_overwritten(home, text):
    home.mkdir()
    (home / 'sha256.json').write_text(text)
    for use in (lambda: store.recorded('x'), lambda: store.record('x', 'a')):
        with pytest.raises(CheckpointError, match='sha256') as error:
            use()
        _message(error)
    assert (home / 'sha256.json').read_text() == text


def test_records_of_several_processes_are_all_kept():
    children = []
    for process in range(3):
        if not (child := os.fork()):
            try:
                for i in range(5):
                    store.record(f'{process}/{i}', str(i))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert all(store.recorded(f'{process}/{i}') == str(i) for process in range(3) for i in range(5))


def test_a_killed_process_leaves_records_whole(home):
    store.record('x', 'a')

    def half():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, 'fsync', lambda _: os.kill(os.getpid(), signal.SIGKILL))
            store.record('y', 'b')

    in_a_process_that_is_killed(half)
    assert store.recorded('x') == 'a' and store.recorded('y') is None
    store.record('y', 'b')
    assert store.recorded('y') == 'b'


def test_the_first_use_of_a_source(tmp_path):
    (tmp_path / 'w').write_bytes(b'first')
    store.check_first_use('url:x', tmp_path / 'w')
    store.check_first_use('url:x', tmp_path / 'w')
    first = store.recorded('url:x')
    (tmp_path / 'w').write_bytes(b'second')
    with pytest.raises(CheckpointError, match='url:x was first used') as error:
        store.check_first_use('url:x', tmp_path / 'w')
    assert first in _message(error) and store.recorded('url:x') == first
    store.check_first_use('url:y', tmp_path / 'w')


# As timm's names


def test_own_tags_become_timm_names(caplog):
    from timm.models import generate_default_cfgs

    cfgs = generate_default_cfgs({'coc_tiny.in1k': dict(num_classes=1000), 'fec_small.in1k': dict(num_classes=1000)})
    _add('coc_tiny.mine')
    _add('coc_tiny.in1k')
    (_add('coc_tiny.broken') / store.CONFIG).write_text('{')
    _add('unknown_model.mine')
    store.add_stored_tags(cfgs)
    assert list(cfgs['coc_tiny'].cfgs) == ['in1k', 'mine'] and cfgs['coc_tiny'].default.num_classes == 1000
    assert cfgs['coc_tiny'].cfgs['mine'].num_classes == 5
    assert cfgs['coc_tiny'].cfgs['mine'].file == str(store.folder('coc_tiny.mine') / store.WEIGHTS)
    assert cfgs['coc_tiny'].cfgs['in1k'].file is None  # what the package says of its own tags stands
    assert list(cfgs['fec_small'].cfgs) == ['in1k']
    assert 'coc_tiny.broken' in caplog.text and len(caplog.records) == 1


def test_weights_from_a_read_only_store_load(home):
    model = timm.create_model('coc_tiny', **TINY)
    with store.new_folder(NAME) as path:
        save_file(model.state_dict(), path / store.WEIGHTS)
        config = dict(
            architecture='coc_tiny', num_classes=5, model_args={k: v for k, v in TINY.items() if k != 'num_classes'}
        )
        config |= dict(pretrained_cfg=dict(num_classes=5), sha256=store.sha256(path / store.WEIGHTS))
        (path / store.CONFIG).write_text(json.dumps(config))
    with read_only(home):
        again = timm.create_model(f'local-dir:{store.folder(NAME)}', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
