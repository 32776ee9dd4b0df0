"""train.py and segmentation/train.py under faults: NaN, signals, disks, two runs in a folder, lost processes."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from hardship import full_disk, read_only
from PIL import Image
from processes import run_processes

from cluster_zoo.errors import RunError
from cluster_zoo.training import files
from cluster_zoo.training.divergence import LossRecord, has_finite_weights
from cluster_zoo.training.signals import StopRequest

ROOT = Path(__file__).parents[1]
CLASSIFICATION = ['--model', 'test_resnet', '--num-classes', 3, '--img-size', 32, '-b', 8, '--warmup-epochs', 0]
SEGMENTATION = ['--head', 'fcn', '--backbone', 'test_resnet', '--channels', 8, '--crop', 32, '--scale', 40, 36, '-b', 4]


@pytest.fixture(scope='module')
def masks(image_folder, tmp_path_factory) -> Path:
    """Images and masks: the left half is class 0, the right half class 1."""
    root = tmp_path_factory.mktemp('masks')
    mask = np.repeat([[0] * 18 + [1] * 18], 40, axis=0).astype(np.uint8)
    for split, source in (('train', 'train'), ('val', 'validation')):
        for index, path in enumerate(sorted((image_folder / source / 'red').iterdir())):
            for kind in ('images', 'masks'):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / split / 'images' / f'{index}.png')
            Image.fromarray(mask).save(root / split / 'masks' / f'{index}.png')
    (root / 'classes.txt').write_text('left\nright\n')
    return root


@pytest.fixture(params=['classification', 'segmentation'])
def script(request, image_folder, masks, tmp_path):
    """A script with the options of a short run in tmp_path/NAME."""
    return _script(request.param, image_folder, masks, tmp_path)


def _script(kind, image_folder, masks, output):
    import segmentation.train
    from cluster_zoo.training import train

    class Script:
        is_segmentation = kind == 'segmentation'
        path = 'segmentation/train.py' if is_segmentation else 'train.py'
        main = staticmethod(segmentation.train.main if is_segmentation else train.main)
        # A validation after each of 4 updates
        short = ['--iterations', 8, '--val-interval', 4] if is_segmentation else ['--epochs', 2]
        long = ['--iterations', 9000, '--val-interval', 500] if is_segmentation else ['--epochs', 900]

        @classmethod
        def line(cls, name, *flags):
            base = [masks, *SEGMENTATION] if cls.is_segmentation else [image_folder, *CLASSIFICATION]
            base += ['--device', 'cpu', '-j', 0, '--lr', 0.01, '--output', output, '--experiment', name]
            return list(map(str, [*base, *cls.short, *flags]))

        @classmethod
        def run(cls, name, *flags):
            return cls.main(cls.line(name, *flags))

    return Script


def _summary(folder):
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


def _error(capsys):
    """The error of a run, which is one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    errors = [line for line in lines if line.startswith('error: ')]
    assert len(errors) == 1 and not any('Traceback' in line for line in lines), lines
    return errors[0]


# Losses that are not finite


def test_diverged_run_keeps_the_checkpoints(script, tmp_path, capsys):
    assert script.run('a') == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / 'a').glob('*.pth.tar')}
    more = ['--iterations', 12] if script.is_segmentation else ['--epochs', 4]
    assert script.run('a', '--resume', 'auto', *more, '--lr', 1e30, '--recovery-interval', 2) == 1
    error = _error(capsys)
    where = 'iteration 10' if script.is_segmentation else 'epoch 2, batch 2'
    assert f'at {where}, with a learning rate of ' in error and str(tmp_path / 'a' / 'last.pth.tar') in error
    assert {path.name: path.read_bytes() for path in (tmp_path / 'a').glob('*.pth.tar')} == before
    assert len(_summary(tmp_path / 'a')) == 2


def test_weights_that_diverge_in_the_last_update(script, tmp_path, capsys, monkeypatch):
    """The loss is still finite then."""
    step, steps = torch.optim.SGD.step, []

    def diverge(self, *args):
        step(self, *args)
        steps.append(1)
        if len(steps) == (4 if script.is_segmentation else 5):  # updates before the first checkpoint
            self.param_groups[0]['params'][0].data.fill_(float('inf'))

    monkeypatch.setattr(torch.optim.SGD, 'step', diverge)
    assert script.run('a', '--opt', 'momentum') == 1
    assert 'The last checkpoint before: none' in _error(capsys)
    assert not list((tmp_path / 'a').glob('*.pth.tar'))


def test_loss_scaler_explains_some_losses(script, tmp_path, capsys, monkeypatch):
    """The scaler of float16 skips an update whose loss is infinite."""
    from timm.task import ClassificationTask

    from segmentation.engine.tasks import SegmentationTask

    task, calls, infinite = SegmentationTask if script.is_segmentation else ClassificationTask, [], {3}
    forward = task.forward

    def broken(self, images, target):
        result = forward(self, images, target)
        calls.append(1)
        return result | dict(loss=result['loss'] * float('inf')) if len(calls) in infinite else result

    monkeypatch.setattr(task, 'forward', broken)
    flags = ['--amp', '--amp-dtype', 'float16', '--opt', 'adamw']
    assert script.run('a', *flags) == 0
    assert all(0 < float(row['train_loss']) < 20 for row in _summary(tmp_path / 'a'))
    calls.clear()
    assert script.run('b', '--amp', '--opt', 'adamw') == 1  # bfloat16 has no scaler
    calls.clear()
    infinite |= set(range(3, 100))
    longer = ['--iterations', 40, '--val-interval', 40] if script.is_segmentation else ['--epochs', 9]
    assert script.run('c', *flags, *longer, '--log-interval', 1) == 1
    assert len(calls) == 2 + 21


def test_loss_record_counts_losses_in_a_row():
    record = LossRecord(allowed=2)
    for number, loss in enumerate([1, np.nan, np.inf, 2, np.nan, np.nan]):
        record.add(torch.tensor(loss), f'step {number}', 0.1)
    assert record.failure() is None
    record.add(torch.tensor(-np.inf), 'step 6', 0.2)
    assert record.failure() == ('step 6', 0.2) and record.failure() is None


def test_finite_weights():
    model = torch.nn.BatchNorm1d(2)
    assert has_finite_weights(model)
    model.running_mean[0] = float('inf')  # as in an attention mask
    assert has_finite_weights(model)
    model.running_mean[0] = float('nan')
    assert not has_finite_weights(model)
    model.running_mean[0] = 0
    with torch.no_grad():
        model.weight[1] = -float('inf')
    assert not has_finite_weights(model)


def test_metrics_of_logits_that_are_not_finite(train, validate, image_folder, tmp_path, capsys, monkeypatch):
    """The largest of NaN logits is class 0, which would be a top-1 of 33 %."""
    script = _script('classification', image_folder, None, tmp_path)
    assert script.run('a', '--epochs', 1) == 0
    checkpoint = torch.load(tmp_path / 'a' / 'last.pth.tar', weights_only=True)
    checkpoint['state_dict']['fc.bias'][:] = torch.finfo(torch.float32).max
    checkpoint['state_dict']['fc.weight'].mul_(1e38)  # finite weights, logits that are not
    torch.save(checkpoint, tmp_path / 'overflow.pth.tar')
    line = [image_folder, '--checkpoint', tmp_path / 'overflow.pth.tar', '--device', 'cpu', '-j', 0]
    assert validate.main(list(map(str, line))) == 0
    assert 'top-1 nan %' in capsys.readouterr().out
    # In training: an epoch whose metrics are NaN is never the best
    monkeypatch.setattr(train, 'finite_metrics', lambda metrics: dict.fromkeys(metrics, float('nan')))
    assert script.run('b', '--epochs', 1) == 0
    assert _summary(tmp_path / 'b')[0]['eval_top1'] == 'nan'
    assert not (tmp_path / 'b' / 'model_best.pth.tar').exists() and (tmp_path / 'b' / 'last.pth.tar').exists()


# Disks


@pytest.mark.parametrize('fault', ['full', 'read-only', 'removed', 'summary'])
def test_output_folder_that_fails(script, tmp_path, capsys, monkeypatch, fault):
    """After the first validation. The run ends with one line, and the checkpoints before stay as they were."""
    module, folder, entered = sys.modules[script.main.__module__], tmp_path / 'a', ExitStack()
    write = files.write_summary

    def refuse(path, text):
        raise RunError(f"'{path}' cannot be written")

    def fail(path, rows):
        if len(rows) == 2 and fault == 'summary':
            monkeypatch.setattr(files, 'write_text', refuse)
        write(path, rows)
        if len(rows) == 1 and fault == 'removed':
            folder.rename(tmp_path / 'gone')
        elif len(rows) == 1 and fault != 'summary':
            entered.enter_context(full_disk(4096) if fault == 'full' else read_only(folder))

    monkeypatch.setattr(module, 'write_summary', fail)
    with entered:
        status = script.run('a')
    assert status == 1
    error = _error(capsys)
    assert 'cannot be written' in error
    if fault == 'removed':
        folder = tmp_path / 'gone'
    rows = 2 if fault == 'summary' else 1  # the checkpoint comes first, and it has the row
    checkpoint = torch.load(folder / 'last.pth.tar', weights_only=True)
    assert len(checkpoint['summary']) == rows and len(_summary(folder)) == 1
    assert not list(folder.glob('*tmp*')) and not list(folder.glob('.*.part'))
    monkeypatch.undo()
    folder.rename(tmp_path / 'a')
    assert script.run('a', '--resume', 'auto') == 0
    assert script.run('b') == 0
    assert _summary(tmp_path / 'a') == _summary(tmp_path / 'b')


def test_an_earlier_summary_is_kept(script, tmp_path, caplog):
    assert script.run('a') == 0
    for path in (tmp_path / 'a').glob('*.pth.tar'):
        path.unlink()
    before = (tmp_path / 'a' / 'summary.csv').read_bytes()
    assert script.run('a', '--resume', 'auto', '--lr', 0.02) == 0
    assert (tmp_path / 'a' / 'summary-1.csv').read_bytes() == before and 'other rows' in caplog.text
    assert len(_summary(tmp_path / 'a')) == 2


# Two runs, other options


def test_second_run_in_a_folder_is_refused(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, '_LOCK_WAIT', 0)
    (tmp_path / 'a').mkdir()
    with FileLock(tmp_path / 'a' / '.lock'):
        assert script.run('a') == 2
        assert 'another run writes to' in _error(capsys)
        assert [path.name for path in (tmp_path / 'a').iterdir()] == ['.lock']
    assert script.run('a') == 0


def test_resume_compares_the_runs(script, tmp_path, capsys, caplog):
    assert script.run('a') == 0
    assert script.run('a', '--resume', 'auto', '--opt', 'lamb') == 2
    assert 'lamb' in _error(capsys)
    assert script.run('a', '--resume', 'auto', '--seed', 7, '--grad-accum-steps', 2) == 0
    assert '--seed 42 -> 7' in caplog.text and '--grad-accum-steps 1 -> 2' in caplog.text
    if not script.is_segmentation:
        checkpoint = torch.load(tmp_path / 'a' / 'last.pth.tar', weights_only=True)
        checkpoint['args']['num_classes'] = 5
        torch.save(checkpoint, tmp_path / 'other.pth.tar')
        assert script.run('b', '--resume', tmp_path / 'other.pth.tar') == 2
        assert '--num-classes 5, this run 3' in _error(capsys)


# Signals


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signal_to_all_processes_of_a_run(script, tmp_path, number):
    """As a scheduler sends it, to the data loading processes too."""
    line = [sys.executable, script.path, *script.line('a', '-j', 2, '--log-interval', 1, *script.long)]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for text in process.stderr:
        if text.startswith('Train: '):
            os.killpg(process.pid, number)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + number, rest
    assert 'Traceback' not in rest and 'Resume with' in rest
    [checkpoint] = (tmp_path / 'a').glob('recovery-*.pth.tar')
    assert torch.load(checkpoint, weights_only=True)['progress']


def test_signal_to_a_loading_process_that_starts():
    """PyTorch lets SIGTERM end such a process before it calls ``worker_init_fn``."""
    code = """
import os, signal
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from cluster_zoo.training.signals import StopRequest, keep_workers

set_handlers = signal_handling._set_worker_signal_handlers
signal_handling._set_worker_signal_handlers = lambda: (set_handlers(), os.kill(os.getpid(), signal.SIGTERM))
loader = DataLoader(range(4), num_workers=2)
keep_workers(loader)
with StopRequest() as stop:
    assert len(list(loader)) == 4 and not stop.received
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_end_of_a_forked_run_does_not_concern_the_loading_processes_of_another():
    code = """
import os, signal
from torch.utils.data import DataLoader
from cluster_zoo.training.signals import StopRequest, keep_workers

loader = DataLoader(range(8), num_workers=1)
keep_workers(loader)
with StopRequest():
    batches = iter(loader)
    next(batches)
    if (child := os.fork()) == 0:
        with StopRequest():
            pass
        os._exit(0)
    os.waitpid(child, 0)
    [worker] = batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 7
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=120)


def test_signal_during_the_agreement_is_not_lost(tmp_path, monkeypatch):
    reduce = dist.all_reduce

    def interrupted(flag, **options):
        reduce(flag, **options)
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(int(flag))

    calls = []
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    monkeypatch.setattr(dist, 'all_reduce', interrupted)
    try:
        with StopRequest() as stop:
            assert not stop.requested()  # as the other processes have answered
            assert stop.requested() and stop.signal == signal.SIGTERM
    finally:
        dist.destroy_process_group()
    assert calls == [0, signal.SIGTERM]


# Several processes


def _torchrun(script, line, *flags, **environment):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    flags = flags or [f'--master-port={port}']
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', *flags, script.path, *line]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **environment}
    options = dict(cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen(command, **options)


def _children(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('fault', ['launcher killed', 'signal to one', 'process killed', 'process hangs'])
def test_processes_of_a_launcher(image_folder, masks, tmp_path, fault):
    script = _script('classification', image_folder, masks, tmp_path)
    flags = ['-b', 4, '--log-interval', 1, '--dist-timeout', 3, *script.long]
    process = _torchrun(script, script.line('a', *flags))
    for text in process.stderr:
        if text.startswith('Train: '):
            break
    ranks = _children(process.pid)
    assert len(ranks) == 2
    if fault == 'launcher killed':
        process.kill()
    elif fault == 'signal to one':
        os.kill(ranks[1], signal.SIGUSR1)
    elif fault == 'process killed':
        os.kill(ranks[1], signal.SIGKILL)
    else:
        os.kill(ranks[1], signal.SIGSTOP)
    rest = ''
    for text in process.stderr:  # to the end of all processes that write to it
        rest += text
        if text.startswith('error: ') and fault == 'process hangs':
            os.kill(ranks[1], signal.SIGKILL)  # torchrun would do this after half a minute
    process.stderr.close()
    process.wait()
    saved = list((tmp_path / 'a').glob('recovery-*.pth.tar'))
    errors = [line for line in rest.splitlines() if line.startswith('error: ')]
    if fault in ('launcher killed', 'signal to one'):
        assert len(saved) == 1 and 'Resume with' in rest and not errors
    else:
        assert len(errors) == 1 and 'does not answer' in errors[0] and '--resume auto' in errors[0]
        assert fault == 'process killed' or '(rank 1)' in errors[0]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_torchrun_restarts_a_run(image_folder, masks, tmp_path):
    script = _script('classification', image_folder, masks, tmp_path)
    line = script.line('a', '-b', 4, '--log-interval', 1, '--epochs', 4, '--resume', 'auto', '--recovery-interval', 1)
    restarts = ('--standalone', '--max-restarts=1')
    process, log = _torchrun(script, line, *restarts, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1'), ''
    for text in process.stderr:
        log += text
        if text.startswith('Train: 1') and 'Resumed at' not in log:
            os.kill(_children(process.pid)[1], signal.SIGKILL)
    process.stderr.close()
    assert process.wait() == 0, log
    assert log.count('Resumed at epoch 1') == 1 and [row['epoch'] for row in _summary(tmp_path / 'a')] == list('0123')


def test_restarts_that_would_hang(image_folder, tmp_path, monkeypatch, capsys):
    script = _script('classification', image_folder, None, tmp_path)
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'True')
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert script.run('a') == 2
    assert 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1' in _error(capsys) and not (tmp_path / 'a').exists()


def _join(rank, world, folder):
    """Sets the environment of torchrun. The processes agree on a free port by a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='localhost')
    port = Path(folder, 'port')
    if rank == 0:
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port.with_suffix('.new').write_text(str(free.getsockname()[1]))
        port.with_suffix('.new').rename(port)
    while not port.exists():
        time.sleep(0.01)
    os.environ['MASTER_PORT'] = port.read_text()


def _diverge(rank, world, line, folder):
    """Only the second process has a loss that is not finite."""
    from timm.task import ClassificationTask

    from cluster_zoo.training import train

    _join(rank, world, folder)
    forward = ClassificationTask.forward

    def broken(self, images, target):
        result = forward(self, images, target)
        return result | dict(loss=result['loss'].detach() * float('nan') + 0 * result['loss']) if rank else result

    ClassificationTask.forward = broken
    assert train.main(line) == 1


def test_all_processes_stop_if_one_diverges(image_folder, tmp_path):
    script = _script('classification', image_folder, None, tmp_path)
    run_processes(_diverge, 2, script.line('a', '-b', 4), str(tmp_path))
    assert not list((tmp_path / 'a').glob('*.pth.tar'))


def _enter_late(rank, world, folder):
    """A run without updates, in which the first process is faster."""
    _join(rank, world, folder)
    dist.init_process_group('gloo')
    new_group = dist.new_group
    if rank == 1:
        dist.new_group = lambda *args, **options: (time.sleep(0.5), new_group(*args, **options))[1]
    with StopRequest():
        pass
    dist.destroy_process_group()


def test_finished_run_waits_for_its_processes(tmp_path):
    """The first process has the store, by which the others connect."""
    run_processes(_enter_late, 2, str(tmp_path))
