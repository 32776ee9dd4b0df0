"""cluster_zoo.training.files: checkpoints of a killed process, the newest checkpoint, summary.csv, locks."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hardship import in_a_process_that_is_killed

from cluster_zoo.errors import CheckpointError, RunError
from cluster_zoo.training import files
from cluster_zoo.training.files import CheckpointSaver, newest_checkpoint, start_summary, write_summary

METRICS = [1.0, 3.0, 2.0, None, 4.0, 0.5]  # of the epochs
# Operations on files of a checkpoint; a process may be killed before or after each of them
OPERATIONS = ['replace', 'rename', 'link', 'unlink', 'remove', 'fsync']


class _State:
    """What timm's saver saves."""

    param_groups = ()

    def __init__(self):
        self.epoch = 0

    def state_dict(self):
        return {}

    def get_checkpoint_state(self, ema=False, unwrap_fn=None):
        return {} if ema else dict(state_dict=dict(weight=torch.full((3,), float(self.epoch))))


def _saver(folder, state):
    return CheckpointSaver(
        model=None, task=state, optimizer=state, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=2
    )


def _save_epochs(folder, first=0, saver=None):
    state = saver.task if saver else _State()
    saver = saver or _saver(folder, state)
    for state.epoch in range(first, len(METRICS)):
        if state.epoch == 2:
            saver.save_recovery(2, 5)
        saver.save_checkpoint(state.epoch, METRICS[state.epoch])


def _resume(folder):
    """Continues the run of `_save_epochs` from its newest checkpoint."""
    state, path = _State(), newest_checkpoint(folder)
    saver, first = _saver(folder, state), 0
    if path:
        checkpoint = torch.load(path, weights_only=True)
        saver.restore(path, checkpoint['saver'])
        first = checkpoint['epoch'] + (0 if 'recovery' in path else 1)
    _save_epochs(folder, first, saver)


def _content(folder):
    """Epoch of the weights in each file."""
    loaded = {path.name: torch.load(path, weights_only=True) for path in folder.iterdir()}
    return {
        name: (checkpoint['epoch'], int(checkpoint['state_dict']['weight'][0]), checkpoint.get('metric'))
        for name, checkpoint in loaded.items()
        if not name.startswith('recovery')
    }


def _count(folder):
    """Number of operations of a run."""
    calls = []
    with patch.multiple(os, **{name: _counted(getattr(os, name), calls) for name in OPERATIONS}):
        _save_epochs(folder)
    return len(calls)


def _counted(function, calls):
    def call(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return call


def _killed_at(number, after):
    """Patches `os` so that the process is killed before or after an operation."""
    calls = []

    def patched(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if len(calls) == number and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    return patch.multiple(os, **{name: patched(getattr(os, name)) for name in OPERATIONS})


@pytest.mark.parametrize('links', [True, False], ids=['links', 'no links'])
def test_a_run_that_is_killed_while_saving_ends_with_the_same_files(tmp_path, links):
    """At each operation on a file. Without hard links the files are copied."""

    def no_link(*_):
        raise OSError('no hard links')

    with patch('os.link', os.link if links else no_link):
        whole = tmp_path / 'whole'
        whole.mkdir()
        points = _count(whole)
        assert points > 30
        for number in range(1, points + 1):
            for after in (False, True):
                folder = tmp_path / f'{number}-{after}'
                folder.mkdir()

                def work(folder=folder, number=number, after=after):
                    with _killed_at(number, after):
                        _save_epochs(folder)

                in_a_process_that_is_killed(work)
                _content(folder)  # no file is incomplete
                _resume(folder)
                assert _content(folder) == _content(whole), (number, after)
    assert _content(whole)['model_best.pth.tar'] == (4, 4, 4.0)
    assert sorted(_content(whole)) == [
        'checkpoint-1.pth.tar',
        'checkpoint-4.pth.tar',
        'last.pth.tar',
        'model_best.pth.tar',
    ]


def test_last_exists_at_any_time(tmp_path, monkeypatch):
    _save_epochs(tmp_path)
    seen = []
    for name in OPERATIONS:
        function = getattr(os, name)

        def watched(*args, function=function, **kwargs):
            seen.append((tmp_path / 'last.pth.tar').exists())
            return function(*args, **kwargs)

        monkeypatch.setattr(os, name, watched)
    _save_epochs(tmp_path)
    assert all(seen) and len(seen) > 20


# Names, in order of progress; `last` gets this epoch
@pytest.mark.parametrize(
    ('names', 'last', 'expected'),
    [
        (['recovery-1-20', 'recovery-2-3'], 1, 'recovery-2-3'),
        (['recovery-1-20', 'recovery-2-3', 'checkpoint-2'], 2, 'last'),
        (['recovery-2-9', 'recovery-2-10'], 1, 'recovery-2-10'),
        (['checkpoint-9', 'checkpoint-10', 'recovery-3-1'], None, 'checkpoint-10'),
        (['checkpoint-0'], None, 'checkpoint-0'),
        (['model_best', 'tmp', 'recovery_tmp'], None, ''),
    ],
)
def test_newest_checkpoint_by_progress(tmp_path, names, last, expected):
    names = [*names, *(['last'] if last is not None else [])]
    for age, name in enumerate(reversed(names)):  # the time of a copied file says nothing
        path = tmp_path / f'{name}.pth.tar'
        torch.save(dict(epoch=last if name == 'last' else 0), path)
        os.utime(path, (age, age))
    assert newest_checkpoint(tmp_path) == (str(tmp_path / f'{expected}.pth.tar') if expected else '')


@pytest.mark.parametrize('damage', [lambda content: content[: len(content) // 2], lambda content: b'', bytes.upper])
def test_a_damaged_newest_checkpoint_is_replaced_by_the_one_before(tmp_path, caplog, damage):
    _save_epochs(tmp_path)
    for name, before in (('last', 'checkpoint-4'), ('checkpoint-4', 'recovery-2-5')):
        path = tmp_path / f'{name}.pth.tar'
        content = damage(path.read_bytes())
        path.unlink()  # the others are links
        path.write_bytes(content)
        assert newest_checkpoint(tmp_path) == str(tmp_path / f'{before}.pth.tar')
        assert f'{path} is damaged' in caplog.text
    for path in tmp_path.iterdir():
        path.write_bytes(b'')
    with pytest.raises(CheckpointError, match='has no other checkpoint'):
        newest_checkpoint(tmp_path)


def test_recovery_checkpoints_of_other_interruptions_are_removed(tmp_path):
    _save_epochs(tmp_path)
    for name in ('recovery-0-3', 'recovery-7-1', 'recovery_tmp', 'tmp'):
        shutil.copy(tmp_path / 'last.pth.tar', tmp_path / f'{name}.pth.tar')
    path = tmp_path / 'recovery-2-5.pth.tar'
    _saver(tmp_path, _State()).restore(str(path), torch.load(path, weights_only=True)['saver'])
    assert [file.name for file in tmp_path.glob('*recovery*')] == [path.name] and not list(tmp_path.glob('*tmp*'))


def test_errors_of_the_disk_keep_the_files(tmp_path):
    _save_epochs(tmp_path)
    before = _content(tmp_path)
    saver = _saver(tmp_path, _State())
    with patch('os.fsync', side_effect=OSError(28, 'No space left on device')):
        with pytest.raises(RunError, match=r'last|tmp.*No space left on device'):
            saver.save_checkpoint(9, 9.0)
        with pytest.raises(RunError, match='No space left'):
            write_summary(tmp_path / 'summary.csv', [dict(epoch=0)])
    assert _content(tmp_path) == before
    shutil.rmtree(tmp_path)
    with pytest.raises(RunError, match='does not exist'):
        saver.save_checkpoint(9, 9.0)


def _rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_summary_is_a_function_of_its_rows(tmp_path, caplog):
    path, rows = tmp_path / 'summary.csv', [dict(epoch=0, loss=0.1), dict(epoch=1, loss=0.2, top1=None)]
    start_summary(path, [])
    assert not path.exists()
    write_summary(path, rows[:1])
    start_summary(path, rows)  # the process was killed before it wrote the second row
    assert _rows(path) == [dict(epoch='0', loss='0.1', top1=''), dict(epoch='1', loss='0.2', top1='')]
    assert 'other rows' in caplog.text  # another header
    start_summary(path, rows)
    assert len(list(tmp_path.iterdir())) == 2
    start_summary(path, [])  # a new run
    assert not path.exists() and [len(_rows(tmp_path / f'summary-{i}.csv')) for i in (1, 2)] == [1, 2]
    path.write_bytes(b'\x00\xff damaged')
    start_summary(path, rows)
    assert len(_rows(path)) == 2 and (tmp_path / 'summary-3.csv').read_bytes() == b'\x00\xff damaged'


def test_lock_ends_with_its_process(tmp_path, monkeypatch):
    """Data loading processes of a killed run do not hold its lock."""
    script = (
        'import os, sys, time; from pathlib import Path; from cluster_zoo.training.files import lock\n'
        'assert lock(Path(sys.argv[1]))\n'
        'if os.fork() == 0: time.sleep(20); os._exit(0)\n'
        'print("locked", flush=True); time.sleep(60)'
    )
    command = [sys.executable, '-c', script, str(tmp_path)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, start_new_session=True) as process:
        assert process.stdout.readline() == b'locked\n'
        monkeypatch.setattr(files, '_LOCK_WAIT', 0)
        assert not files.lock(tmp_path)
        process.kill()
        process.wait()
        assert files.lock(tmp_path)
        os.killpg(process.pid, signal.SIGKILL)
    files.unlock()
    assert files.lock(tmp_path)
    files.unlock()
