"""train.py on a few images: learning, the run folder, stopping and resuming to the same bits, errors."""

import argparse
import csv
import fcntl
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import timm
import torch
import yaml
from checkpoints import assert_same
from PIL import Image

from cluster_zoo.training.signals import StopRequest
from cluster_zoo.weights import load_checkpoint

ROOT = Path(__file__).parents[1]
BASE = ['--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '8']


@pytest.fixture
def run(train, image_folder, tmp_path):
    """Runs train.py in this process and returns its exit status; outputs are in tmp_path/NAME."""

    def _run(name, *flags):
        line = [str(image_folder), *BASE, '--output', tmp_path, '--experiment', name, *flags]
        return train.main(list(map(str, line)))

    return _run


def _summary(folder):
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


def _load(path):
    return torch.load(path, weights_only=True)


# Run folder


def test_run_folder(run, tmp_path, caplog):
    assert run('a', '--epochs', 3, '--lr', 0.05, '--checkpoint-hist', 2, '--model-ema', '--log-interval', 2) == 0
    folder = tmp_path / 'a'
    assert {path.name for path in folder.iterdir()} >= {
        'args.yaml',
        'summary.csv',
        'last.pth.tar',
        'model_best.pth.tar',
    }
    assert len(list(folder.glob('checkpoint-*.pth.tar'))) == 2
    rows = _summary(folder)
    assert [row['epoch'] for row in rows] == ['0', '1', '2']
    assert set(rows[0]) == {'epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'}
    options = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (options['model'], options['lr'], options['recipe']) == ('test_resnet', 0.05, 'timm')
    best = max(rows, key=lambda row: float(row['eval_top1']))
    assert _load(folder / 'model_best.pth.tar')['metric'] == float(best['eval_top1'])
    assert 'Recipe timm' in caplog.text
    lines = [record.message for record in caplog.records if record.message.startswith('Train:')]
    assert len(lines) == 3 * 3  # after 2, 4 and 5 updates
    assert re.fullmatch(
        r'Train: 0 \[   2/5  40%\]  loss \S+ \(mean \S+\)  lr 1.000e-05  \S+ img/s  [\d:]+ left', lines[0]
    )


def test_checkpoint_is_plain_data_in_timms_layout(run, tmp_path):
    assert run('a', '--epochs', 1, '--lr', 0.05, '--model-ema', '--amp', '--amp-dtype', 'float16') == 0
    checkpoint = _load(tmp_path / 'a' / 'last.pth.tar')
    expected = {'epoch', 'arch', 'optimizer', 'version', 'args', 'state_dict', 'state_dict_ema', 'metric', 'amp_scaler'}
    assert expected <= checkpoint.keys()
    assert (checkpoint['epoch'], checkpoint['arch'], checkpoint['args']['lr']) == (0, 'test_resnet', 0.05)
    # timm's loader and this package's read the file, with averaged weights if requested.
    for load in (timm.models.load_checkpoint, load_checkpoint):
        model = timm.create_model('test_resnet', num_classes=3)
        load(model, str(tmp_path / 'a' / 'last.pth.tar'), use_ema=True)
        assert_same(dict(model.state_dict()), dict(checkpoint['state_dict_ema']))


def test_learns(run, tmp_path):
    """Classifies noisy images by color. Random guesses reach 33 %."""
    flags = ['--epochs', 8, '--opt', 'adamw', '--lr', 3e-3, '--warmup-epochs', 0, '--color-jitter', 0]
    assert run('a', *flags) == 0
    assert max(float(row['eval_top1']) for row in _summary(tmp_path / 'a')) > 80


def test_recipe_of_the_paper_trains(run, tmp_path, caplog):
    assert run('a', '--model', 'coc_tiny', '--epochs', 1, '--cooldown-epochs', 1, '--amp') == 0
    assert 'Recipe coc' in caplog.text
    options = yaml.safe_load((tmp_path / 'a' / 'args.yaml').read_text())
    assert (options['opt'], options['mixup'], options['aa']) == ('adamw', 0.8, 'rand-m9-mstd0.5-inc1')
    assert [row['epoch'] for row in _summary(tmp_path / 'a')] == ['0', '1']


def test_validation_interval(run, tmp_path):
    assert run('a', '--epochs', 3, '--val-interval', 2, '--lr', 0.01) == 0
    assert [bool(row['eval_top1']) for row in _summary(tmp_path / 'a')] == [False, True, True]


def test_new_run_in_an_old_folder_starts_a_new_summary(run, tmp_path):
    run('a', '--epochs', 2, '--lr', 0.01)
    run('a', '--epochs', 1, '--lr', 0.01)
    assert [row['epoch'] for row in _summary(tmp_path / 'a')] == ['0']


@pytest.mark.parametrize(
    'flags',
    [
        ['--bce-loss', '--mixup', 0.2, '--mixup-off-epoch', 1, '--model-dtype', 'bfloat16'],
        ['--aug-splits', 2, '--jsd-loss', '--resplit', '--reprob', 0.5, '--split-bn', '--clip-grad', 1],
        [
            '--clip-grad',
            0.01,
            '--clip-mode',
            'agc',
            '--opt',
            'lookahead_adamw',
            '--channels-last',
            '--layer-decay',
            0.5,
        ],
        ['--train-img-sizes', 24, 32, '--train-batch-sizes', 8, 6, '--variable-batch-loss-scale', 'sqrt'],
        ['--train-img-sizes', 24, 32, '--train-size-schedule', 'progressive', '--train-batches-per-epoch', 3],
        ['--no-aug', '--sched', 'plateau', '--save-images', '--eval-metric', 'loss', '--synchronize-step', '--tta', 3],
        ['--sched', 'step', '--sched-on-updates', '--lr-noise', 0.1, 0.9, '--use-multi-epochs-loader', '-j', 1],
        ['--grad-accum-steps', 3, '--drop', 0.1, '--drop-path', 0.1, '--grad-checkpointing', '--fast-norm', '--amp'],
        ['--torchscript', '--model-ema', '--model-ema-force-cpu', '--model-ema-warmup', '--worker-seeding', 'part'],
        ['--opt', 'adahessian', '--opt-eps', 1e-6, '--opt-betas', 0.9, 0.98, '--train-crop-mode', 'rkrc', '--vflip', 1],
    ],
    ids=lambda flags: flags[0].strip('-'),
)
def test_options_work_together(run, tmp_path, flags):
    assert run('a', '--epochs', 2, '--lr', 0.01, '--warmup-epochs', 0, *flags) == 0
    rows = _summary(tmp_path / 'a')
    assert all(float(row['train_loss']) < 20 for row in rows) and len(rows) == 2
    assert ('--save-images' in flags) == bool(list((tmp_path / 'a').glob('train-batch-*.jpg')))


def test_gradient_accumulation_is_a_larger_batch(run, tmp_path):
    """Without augmentation, batch norm and dropout, two batches of four give the update of one batch of eight."""
    flags = ['--model', 'test_vit', '--epochs', 1, '--lr', 0.1, '--no-aug', '--smoothing', 0, '--warmup-epochs', 0]
    assert run('whole', *flags, '-b', 8) == 0
    assert run('parts', *flags, '-b', 4, '--grad-accum-steps', 2) == 0
    whole, parts = (_load(tmp_path / name / 'last.pth.tar')['state_dict'] for name in ('whole', 'parts'))
    assert all(torch.allclose(whole[k], parts[k], atol=1e-4) for k in whole)
    start = timm.create_model('test_vit', num_classes=3).state_dict()
    assert not torch.allclose(whole['head.weight'], start['head.weight'], atol=1e-3)


def test_distillation(run, tmp_path):
    assert run('teacher', '--epochs', 1, '--lr', 0.01) == 0
    model = timm.create_model('test_resnet', num_classes=3)
    load_checkpoint(model, tmp_path / 'teacher' / 'last.pth.tar')
    timm.models.save_for_hf(model, tmp_path / 'hub', model_config=dict(num_classes=3))
    teacher = ['--kd-model-name', f'local-dir:{tmp_path / "hub"}', '--epochs', 1, '--lr', 0.01]
    assert run('logit', *teacher, '--kd-temperature', 2, '--task-loss-weight', 0.3) == 0
    assert run('feature', *teacher, '--kd-distill-type', 'feature', '--model', 'test_vit') == 0
    checkpoint = _load(tmp_path / 'feature' / 'last.pth.tar')
    assert checkpoint['state_dict'].keys() == timm.create_model('test_vit', num_classes=3).state_dict().keys()
    assert checkpoint['task_state']  # the projection from the student to the teacher


# Stopping and resuming


FULL = [
    *(
        '--epochs',
        3,
        '--opt',
        'lookahead_adamw',
        '--lr',
        1e-2,
        '--warmup-epochs',
        1,
        '--warmup-lr',
        1e-3,
        '--drop',
        0.2,
    ),
    *('--aa', 'rand-m9-mstd0.5-inc1', '--mixup', 0.8, '--cutmix', 1, '--reprob', 0.3, '--model-ema', '-b', 6),
    *('--grad-accum-steps', 2, '--clip-grad', 1),
]


def _stop_after(train, monkeypatch, asked):
    """Sends a SIGINT when the run asks for the n-th time whether to stop."""
    count = iter(range(1, 10**6))
    original = StopRequest.requested

    def requested(self):
        if next(count) == asked:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(StopRequest, 'requested', requested)
    return lambda: monkeypatch.setattr(StopRequest, 'requested', original)


def _assert_same_run(a, b):
    first, second = _load(a / 'last.pth.tar'), _load(b / 'last.pth.tar')
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'metric', 'epoch', 'progress'):
        if key in first:
            assert_same(first[key], second[key])
    assert _summary(a) == _summary(b)


@pytest.mark.parametrize(
    ('asked', 'flags'),
    # Requests per epoch: after each of 4 updates and of 2 x 3 validation batches, and at its end, 11 in all
    [
        (2, ['-j', 1]),  # within the first epoch, before any other checkpoint
        (13, ['-j', 0]),
        (4, ['-j', 1, '--sched-on-updates']),  # all batches done, not validated
        (9, ['-j', 0, '--sched-on-updates']),  # within the validation
        (11, ['-j', 1]),  # after the validation, before its checkpoint
        (24, ['-j', 0, '--sched', 'plateau', '--patience-epochs', 0]),
    ],
)
def test_resumed_run_ends_in_the_same_bits(run, train, tmp_path, monkeypatch, capsys, asked, flags):
    assert run('whole', *FULL, *flags) == 0
    undo = _stop_after(train, monkeypatch, asked)
    assert run('cut', *FULL, *flags) == 128 + signal.SIGINT
    undo()
    message = capsys.readouterr().err
    command = next(line for line in message.splitlines() if '--resume' in line)
    words = shlex.split(command)
    torch.manual_seed(0)  # another process has other states of the generators
    assert train.main(words[2:]) == 0
    _assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_resume_at_the_end_of_an_epoch(run, tmp_path):
    flags = [*FULL, '--recovery-interval', 2]
    assert run('whole', *flags) == 0
    checkpoint = tmp_path / 'whole' / 'checkpoint-0.pth.tar'
    assert run('again', *flags, '--resume', checkpoint) == 0
    first, second = (_load(tmp_path / name / 'last.pth.tar') for name in ('whole', 'again'))
    assert_same(first['state_dict'], second['state_dict'])
    assert [row['epoch'] for row in _summary(tmp_path / 'again')] == ['1', '2']
    # A recovery checkpoint gives the same result.
    recovery = max((tmp_path / 'whole').glob('recovery-*'), key=lambda path: path.stat().st_mtime)
    assert run('third', *flags, '--resume', recovery) == 0
    assert_same(first['state_dict'], _load(tmp_path / 'third' / 'last.pth.tar')['state_dict'])


def test_resume_auto(run, train, tmp_path, monkeypatch):
    flags = ['--epochs', 2, '--lr', 0.01, '--resume', 'auto']
    undo = _stop_after(train, monkeypatch, 3)
    assert run('a', *flags) == 130
    undo()
    assert run('a', *flags) == 0
    assert run('b', '--epochs', 2, '--lr', 0.01) == 0
    _assert_same_run(tmp_path / 'b', tmp_path / 'a')
    assert run('a', *flags) == 0  # the run is finished
    assert len(_summary(tmp_path / 'a')) == 2


def test_resume_keeps_the_best_checkpoints(run, tmp_path):
    flags = ['--lr', 0.01, '--checkpoint-hist', 1]
    assert run('a', '--epochs', 1, *flags) == 0
    best = _load(tmp_path / 'a' / 'model_best.pth.tar')
    assert run('a', '--epochs', 2, '--lr', 0, '--warmup-epochs', 0, *flags[2:], '--resume', 'auto') == 0
    # With a learning rate of 0 the second epoch is not better.
    assert _load(tmp_path / 'a' / 'model_best.pth.tar')['epoch'] == best['epoch'] == 0


def test_resume_a_checkpoint_of_timms_script(run, tmp_path):
    """timm's checkpoints are written after an epoch and have the options as a namespace."""
    assert run('a', '--epochs', 1, '--lr', 0.01) == 0
    checkpoint = _load(tmp_path / 'a' / 'last.pth.tar')
    checkpoint = {k: v for k, v in checkpoint.items() if k not in ('progress', 'args')}
    torch.save({**checkpoint, 'args': argparse.Namespace(lr=0.01)}, tmp_path / 'timm.pth.tar')
    assert run('b', '--epochs', 2, '--lr', 0.01, '--resume', tmp_path / 'timm.pth.tar') == 0
    assert [row['epoch'] for row in _summary(tmp_path / 'b')] == ['1']
    assert run('c', '--epochs', 5, '--lr', 0.01, '--resume', tmp_path / 'timm.pth.tar', '--start-epoch', 4) == 0
    [row] = _summary(tmp_path / 'c')
    assert row['epoch'] == '4' and float(row['lr']) == pytest.approx(1e-5 + 4 / 5 * (0.01 - 1e-5))  # still warming up


def test_resume_without_the_optimizer(run, tmp_path):
    assert run('a', '--epochs', 1, '--lr', 0.01) == 0
    flags = ['--epochs', 2, '--lr', 0.01, '--opt', 'adamw', '--resume', tmp_path / 'a' / 'last.pth.tar']
    assert run('b', *flags) == 2
    assert run('b', *flags, '--no-resume-opt') == 0


def test_stopped_process_prints_the_command_that_resumes(image_folder, tmp_path):
    flags = [*map(str, FULL), '--epochs', '40', '--warmup-epochs', '2', '-j', '1', '--log-interval', '1']
    command = [sys.executable, 'train.py', str(image_folder), *BASE, '--output', str(tmp_path), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith('Train: 1'):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGTERM, rest
    assert 'Traceback' not in rest
    [folder] = tmp_path.iterdir()
    line = next(line for line in rest.splitlines() if '--resume' in line)
    assert f'--experiment {folder.name}' in line
    done = subprocess.run(f'{line} --epochs 2', shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row['epoch'] for row in _summary(folder)] == ['0', '1']


# Terminal and several processes


def test_bar_on_a_terminal(image_folder, tmp_path):
    flags = ['--epochs', '1', '--lr', '0.01', '--output', str(tmp_path)]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 160, 0, 0))
    process = subprocess.Popen(
        [sys.executable, 'train.py', str(image_folder), *BASE, *flags], cwd=ROOT, stderr=follower
    )
    os.close(follower)
    shown = b''
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:  # raised by Linux when the other side is closed
            break
        if not block:
            break
        shown += block
    os.close(leader)
    assert process.wait() == 0, shown.decode()
    assert re.search(rb'Epoch 0/1: 100%.*5/5 \[\d\d:\d\d<\d\d:\d\d.*loss \d+\.\d+, lr \d\S+, \d+ img/s', shown), shown
    assert b'Train:' not in shown


@pytest.fixture(scope='module')
def imagenet_folder(tmp_path_factory):
    """An image in each of 1,000 classes."""
    root = tmp_path_factory.mktemp('imagenet')
    for split in ('train', 'val'):
        for index in range(1000):
            folder = root / split / f'n{index:04d}'
            folder.mkdir(parents=True)
            Image.new('RGB', (8, 8), (index % 256, index // 4 % 256, 0)).save(folder / '0.png')
    return root


@pytest.mark.parametrize(
    ('launcher', 'model'),
    [
        (['torch.distributed.launch', '--nproc_per_node=2'], 'coc_tiny'),
        (['torch.distributed.run', '--nproc-per-node=2'], 'fec_small'),
    ],
)
def test_published_command_in_two_processes(imagenet_folder, tmp_path, launcher, model):
    """The command of the papers with smaller sizes. Some weights of FEC get no gradient."""
    port = ['--master_port', '29533' if model == 'coc_tiny' else '29534']
    published = [
        'train.py',
        '--data_dir',
        imagenet_folder,
        '--model',
        model,
        '-b',
        128,
        '--lr',
        1e-3,
        '--drop-path',
        0.1,
        '--amp',
    ]
    small = ['--img-size', 32, '--epochs', 1, '--cooldown-epochs', 0, '-j', 0, '--device', 'cpu']
    command = [sys.executable, '-m', launcher[0], *launcher[1:], *port, *published, *small]
    command += ['--output', tmp_path, '--experiment', 'a']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count('Recipe') == 1  # the other process logs nothing
    assert '2 x cpu' in done.stderr
    checkpoint = _load(tmp_path / 'a' / 'last.pth.tar')
    assert checkpoint['args']['lr'] == 1e-3 and checkpoint['args']['mixup'] == 0.8
    assert not any(name.startswith('module.') for name in checkpoint['state_dict'])


# Errors


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--data-dir', '/no/such/folder'], '/no/such/folder does not exist'),
        (['--num-classes', 5], '3 classes'),
        (['--model', 'coc_tny'], 'coc_tiny'),
        (['--opt', 'adamv'], 'did you mean adam'),
        (['--sched', 'cosin'], '--sched cosin'),
        (['--aa', 'rend-m9'], 'training data'),
        (['--resume', 'none.pth.tar'], "error: --resume: No checkpoint at 'none.pth.tar'"),
        (['--initial-checkpoint', 'none.pth.tar'], 'none.pth.tar'),
        (['--config', 'none.yaml'], 'none.yaml'),
        (['--kd-model-name', 'coc_tny'], '--kd-model-name'),
        (['-b', 64], 'lower --batch-size'),
        (['-b', 3, '--mixup', 1], 'must be even'),
        (['--train-split', 'test'], 'test'),
        (['--dataset', 'torch/none'], 'torch/none'),
    ],
)
def test_errors_are_one_line(run, capsys, tmp_path, flags, message):
    assert run('a', *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error
    assert not (tmp_path / 'a' / 'summary.csv').exists()


def test_checkpoint_of_another_run_is_refused(run, tmp_path, capsys):
    assert run('a', '--epochs', 1, '--lr', 0.01) == 0
    last = tmp_path / 'a' / 'last.pth.tar'
    assert run('b', '--model', 'test_vit', '--resume', last) == 2
    (tmp_path / 'cut.pth.tar').write_bytes(last.read_bytes()[:20000])
    assert run('b', '--resume', tmp_path / 'cut.pth.tar') == 2
    torch.save({'state_dict': torch.nn.Linear(1, 1)}, tmp_path / 'module.pth.tar')
    assert run('b', '--resume', tmp_path / 'module.pth.tar') == 2
    error = capsys.readouterr().err
    assert error.count('error: --resume') == 3 and 'Traceback' not in error


def test_checkpoint_inside_an_epoch_needs_the_same_batches(run, train, tmp_path, monkeypatch, capsys):
    undo = _stop_after(train, monkeypatch, 2)
    assert run('a', '--epochs', 1, '--lr', 0.01) == 130
    undo()
    assert run('a', '--epochs', 1, '--lr', 0.01, '--resume', 'auto', '-b', 4) == 2
    assert 'Keep the batch size' in capsys.readouterr().err


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_image(train, tmp_path, caplog, capsys, image_folder, workers):
    shutil.copytree(image_folder, tmp_path / 'data')
    (tmp_path / 'data' / 'train' / 'red' / '3.png').write_bytes(b'no image')
    line = ['--data-dir', tmp_path / 'data', *BASE, '-j', workers, '--epochs', 2, '--lr', 0.01, '-b', 6]
    line += ['--output', tmp_path / 'out']
    assert train.main(list(map(str, line))) == 0
    assert '1 unreadable images so far' in caplog.text
    assert train.main([*map(str, line), '--strict']) == 2
    assert 'error: red/3.png is not a readable image' in capsys.readouterr().err


def test_loss_scale_of_scheduled_sizes(train):
    class Stub:
        def __init__(self, **attributes):
            self.__dict__.update(attributes)

    loader = Stub(batch_sampler=Stub(average_batch_size=4.0))
    for kind, expected in (('none', 1), ('sqrt', 2), ('linear', 4)):
        assert train.loss_scale(Stub(args=Stub(variable_batch_loss_scale=kind), train_loader=loader), 16) == expected
    plain = Stub(args=Stub(variable_batch_loss_scale='linear'), train_loader=Stub(batch_sampler=None))
    assert train.loss_scale(plain, 16) == 1
