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
from datetime import datetime
from pathlib import Path

import pytest
import timm
import torch
import yaml
from checkpoints import assert_same
from PIL import Image

from cluster_zoo.training.optim import shorten_warmup
from cluster_zoo.training.signals import StopRequest
from cluster_zoo.training.train_options import train_parser
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


def _options(caplog):
    """Rows of the logged table of options."""
    rows = [record.message for record in caplog.records if record.funcName == 'log_options']
    return {row[:14].strip(): ' '.join(row[14:].split()) for row in rows}


def _load(path):
    return torch.load(path, weights_only=True)


# Data


@pytest.mark.parametrize('given', ['train', 'flat', 'flat.tar', 'sample', 'no_val'])
def test_same_images_for_training_and_validation_are_refused(train, image_folder, tmp_path, capsys, given):
    shutil.copytree(image_folder / 'train', tmp_path / 'flat')
    shutil.copytree(image_folder / 'train', tmp_path / 'no_val' / 'train')
    shutil.make_archive(str(tmp_path / 'flat'), 'tar', tmp_path / 'flat')
    data = ['--data-dir', tmp_path / given]
    data = dict(train=[image_folder / 'train'], sample=['--dataset', 'cluster_zoo/cifar10_sample']).get(given, data)
    line = [*data, *BASE, '--epochs', 1, '--output', tmp_path / 'out']
    line = list(map(str, line)) + (['--num-classes', '10'] if given == 'sample' else [])
    assert train.main(line) == 2
    error = capsys.readouterr().err
    assert '--val-fraction 0.1' in error and "--val-split ''" in error and error.count('\n') == 1
    if given == 'train':
        assert f'give the folder that contains it, {image_folder}' in error
    if given == 'flat':
        assert str(tmp_path / 'flat' / 'train' / 'CLASS') in error
    assert not (tmp_path / 'out').exists()
    if given != 'sample':
        assert train.main([*line, '--val-fraction', '0.2']) == 0
        assert train.main([*line, '--val-split', '', '--experiment', 'all']) == 0
        assert not (tmp_path / 'out' / 'all' / 'model_best.pth.tar').exists()
        assert _summary(tmp_path / 'out' / 'all')[0]['eval_top1'] == ''


def test_a_split_may_be_named_twice(run, capsys):
    """To validate on the training images is a test of a setup, if the user asks for it."""
    assert run('a', '--epochs', 1, '--val-split', 'train') == 0


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--val-fraction', '1'], '--val-fraction'),
        (['--val-fraction', '0.1', '--val-split', 'val'], 'exclude'),
        (['--val-split', '', '--sched', 'plateau'], 'plateau'),
        (['--eval-metric', 'map'], '--multi-label'),
        (['--multi-label', 'no.csv'], 'no.csv'),
    ],
)
def test_validation_options_that_do_not_fit(run, capsys, flags, message):
    assert run('a', '--epochs', 1, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def label_file(image_folder, tmp_path):
    """Two labels for each red and green image, none for the blue ones."""
    rows = ['file,labels']
    for path in sorted(image_folder.rglob('*.png')):
        labels = {'red': 'red;warm', 'green': 'green;cold', 'blue': ''}[path.parent.name]
        rows.append(f'{path.relative_to(image_folder)},{labels}')
    (tmp_path / 'labels.csv').write_text('\n'.join(rows))
    return tmp_path / 'labels.csv'


@pytest.mark.parametrize('flags', [['--mixup', 0.2], ['--class-weights', 'balanced']])
def test_multi_label(run, tmp_path, label_file, flags, capsys):
    line = ['--multi-label', label_file, '--num-classes', 4, '--epochs', 12, '--lr', 0.2, '--warmup-epochs', 1]
    assert run('a', *line, *flags) == 0
    rows = _summary(tmp_path / 'a')
    assert set(rows[0]) >= {'eval_map', 'eval_loss', 'eval_macro_f1'} and float(rows[-1]['eval_map']) > 90
    checkpoint = _load(tmp_path / 'a' / 'last.pth.tar')
    assert checkpoint['label_names'] == ['cold', 'green', 'red', 'warm']
    assert run('b', *line[:2], '--num-classes', 3) == 2
    assert '--num-classes 4' in capsys.readouterr().err
    assert run('b', *line, '--model', 'dnc_resnet18_cifar') == 2
    assert 'nearest-centroid' in capsys.readouterr().err


# Short runs


@pytest.mark.parametrize(
    'model, flags, expected',
    [
        ('coc_tiny', ['--epochs', 300], (5, 10)),
        ('coc_tiny', ['--epochs', 30], (5, 10)),
        ('coc_tiny', ['--epochs', 20], (2, 2)),
        ('coc_tiny', ['--epochs', 3], (0, 0)),
        ('coc_tiny', ['--epochs', 3, '--warmup-epochs', 2], (2, 0)),
        ('resnet18', ['--epochs', 10], (5, 0)),
        ('resnet18', ['--epochs', 9], (0, 0)),
    ],
)
def test_warm_up_and_cool_down_of_a_short_run(model, flags, expected):
    args = train_parser().resolve(['--model', model, *map(str, flags)])
    shorten_warmup(args)
    assert (args.warmup_epochs, args.cooldown_epochs) == expected


def test_a_warm_up_that_the_user_sets_is_kept(caplog):
    args = train_parser().resolve(['--model', 'resnet18', '--epochs', '3', '--warmup-epochs', '5'])
    shorten_warmup(args)
    assert args.warmup_epochs == 5 and '--warmup-epochs 5 is not shorter' in caplog.text


def test_a_short_warm_up_is_logged(caplog):
    caplog.set_level('INFO')
    shorten_warmup(train_parser().resolve(['--model', 'coc_tiny', '--epochs', '20']))
    assert '20 epochs are too few for 5 epochs of warm-up and 10 of cool-down: the run has 2 and 2' in caplog.text


def test_average_of_few_updates(run, tmp_path, caplog):
    """Without warm-up of its decay, an average of 9 updates is the initial model."""
    flags = ['--epochs', 3, '--lr', 0.01, '-b', 14, '--model-ema', '--warmup-epochs', 0]
    assert run('a', *flags) == 0
    assert 'initial weights would make up 100 %' in caplog.text
    assert run('b', *flags, '--no-model-ema-warmup') == 0
    assert run('c', *flags, '--model-ema-decay', 0.5) == 0  # short enough for 9 updates
    distances = []
    for name in 'abc':
        checkpoint = _load(tmp_path / name / 'last.pth.tar')
        plain, averaged = checkpoint['state_dict'], checkpoint['state_dict_ema']
        distances.append(max(float((plain[key] - averaged[key]).abs().max()) for key in plain if 'conv' in key))
    assert distances[0] < distances[1] / 2 and distances[2] < distances[1] / 2
    used = [_load(tmp_path / name / 'last.pth.tar')['args']['model_ema_warmup'] for name in 'abc']
    assert used == [True, False, False]


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
    assert 'the eval columns of summary.csv and the best checkpoint are those of the averaged weights' in caplog.text
    assert '--lr 0.05' in _options(caplog)['flag'] and '--hflip 0.5' in _options(caplog)['timm default']
    lines = [record.message for record in caplog.records if record.message.startswith('Train:')]
    assert len(lines) == 3 * 3  # after 2, 4 and 5 updates
    assert re.fullmatch(
        r'Train: 0 \[   2/5  40%\]  loss \S+ \(mean \S+\)  lr 5.000e-02  \S+ img/s  [\d:]+ left', lines[0]
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
    assert '--aa rand-m9-mstd0.5-inc1' in _options(caplog)['recipe coc']
    options = yaml.safe_load((tmp_path / 'a' / 'args.yaml').read_text())
    assert (options['opt'], options['mixup'], options['aa']) == ('adamw', 0.8, 'rand-m9-mstd0.5-inc1')
    assert [row['epoch'] for row in _summary(tmp_path / 'a')] == ['0', '1']


def test_validation_interval(run, tmp_path):
    assert run('a', '--epochs', 3, '--val-interval', 2, '--lr', 0.01) == 0
    assert [bool(row['eval_top1']) for row in _summary(tmp_path / 'a')] == [False, True, True]


def test_used_folder_needs_overwrite(run, tmp_path, capsys):
    """A second run of the same name is refused, and replaces all files of the first with --overwrite."""
    run('a', '--epochs', 2, '--lr', 0.01)
    (tmp_path / 'a' / 'notes.txt').write_text('of the user')
    before = {path: path.read_bytes() for path in (tmp_path / 'a').iterdir()}
    assert run('a', '--epochs', 1, '--lr', 0.01) == 2
    error = capsys.readouterr().err
    assert '--overwrite' in error and '--resume auto' in error
    assert {path: path.read_bytes() for path in (tmp_path / 'a').iterdir()} == before
    assert run('b', '--epochs', 1, '--lr', 0.01) == 0
    assert run('a', '--resume', tmp_path / 'b' / 'last.pth.tar', '--epochs', 2) == 2  # of another folder
    assert run('a', '--epochs', 1, '--lr', 0.01, '--overwrite', '--resume', 'auto') == 2
    assert run('a', '--epochs', 1, '--lr', 0.01, '--overwrite') == 0
    assert [row['epoch'] for row in _summary(tmp_path / 'a')] == ['0']
    assert sorted(path.name for path in (tmp_path / 'a').glob('checkpoint-*')) == ['checkpoint-0.pth.tar']
    assert (tmp_path / 'a' / 'notes.txt').exists()


def test_folder_of_a_run_that_failed_at_the_start_is_not_used(run, tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'args.yaml').write_text('')
    assert run('a', '--epochs', 1, '--lr', 0.01) == 0


def test_unnamed_runs_of_the_same_second_get_two_folders(train, image_folder, tmp_path, monkeypatch):
    import cluster_zoo.training.run_folder

    class Clock(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(cluster_zoo.training.run_folder, 'datetime', Clock)
    for _ in range(2):
        assert train.main(list(map(str, [image_folder, *BASE, '--output', tmp_path, '--epochs', 1]))) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ['20260102-030405-test_resnet-32', '20260102-030405-test_resnet-32-2']
    assert all((tmp_path / name / 'last.pth.tar').is_file() for name in names)


def test_output_is_a_file(run, tmp_path, capsys):
    (tmp_path / 'a').write_text('')
    assert run('a', '--epochs', 1) == 2
    assert f'{tmp_path / "a"} is a file' in capsys.readouterr().err


def test_expected_time(run, caplog):
    assert run('a', '--epochs', 3, '-b', 4) == 0
    [line] = [record.message for record in caplog.records if record.message.startswith('Expected time')]
    assert 'for the remaining 19 updates' in line  # of 30, after 11


def test_dry_run_writes_nothing(run, tmp_path, caplog):
    assert run('a', '--epochs', 3, '--dry-run', '-b', 16) == 0
    assert not (tmp_path / 'a').exists()
    assert '42 training and 15 validation images' in caplog.text
    assert 'Each epoch skips 10 training images, chosen at random' in caplog.text
    assert '3 epochs of 2 updates with 16 images' in caplog.text


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
    path = tmp_path / 'timm.pth.tar'
    assert run('b', '--epochs', 2, '--lr', 0.01, '--resume', path) == 0
    assert [row['epoch'] for row in _summary(tmp_path / 'b')] == ['1']
    assert run('c', '--epochs', 5, '--warmup-epochs', 5, '--lr', 0.01, '--resume', path, '--start-epoch', 4) == 0
    [row] = _summary(tmp_path / 'c')
    assert row['epoch'] == '4' and float(row['lr']) == pytest.approx(1e-5 + 4 / 5 * (0.01 - 1e-5))  # still warming up


def test_resume_says_what_it_does(run, tmp_path, caplog, capsys):
    line = ['--epochs', 1, '--lr', 0.01, '--resume', 'auto']
    assert run('a', *line) == 0
    assert 'has no checkpoint, so the run starts from the beginning' in caplog.text
    caplog.clear()
    summary = (tmp_path / 'a' / 'summary.csv').read_bytes()
    assert run('a', *line) == 0
    assert f'Resumed from {tmp_path / "a" / "last.pth.tar"}' in caplog.text
    assert 'The run is finished: all 1 epochs' in caplog.text
    assert (tmp_path / 'a' / 'summary.csv').read_bytes() == summary
    caplog.clear()
    assert run('a', *line, '--epochs', 2, '--crop-pct', 0.8) == 0
    assert 'Resumed at epoch 1, batch 0: 5 updates remain' in caplog.text
    assert '--crop-pct None -> 0.8' in caplog.text and '--epochs 1 -> 2' in caplog.text
    assert run('a', *line, '--epochs', 3, '--model', 'test_resnet.r160_in1k') == 0  # the same architecture
    assert run('a', *line, '--epochs', 4, '--model', 'test_vit') == 2
    assert 'which is not test_vit' in capsys.readouterr().err


def test_resume_holds_out_the_same_images(train, image_folder, tmp_path, caplog):
    shutil.copytree(image_folder / 'train', tmp_path / 'data')
    line = [tmp_path / 'data', *BASE, '--output', tmp_path, '--experiment', 'a', '--resume', 'auto']
    line = [*map(str, line), '--val-fraction', '0.3', '--epochs']
    assert train.main([*line, '1']) == 0
    held = _load(tmp_path / 'a' / 'last.pth.tar')['held_out']
    assert '30 training and 12 validation images' in caplog.text and len(held.split('\0')) == 12
    shutil.copy(tmp_path / 'data' / 'red' / '1.png', tmp_path / 'data' / 'red' / '0-new.png')
    (tmp_path / 'data' / held.split('\0')[0]).unlink()
    assert train.main([*line, '2', '--val-fraction', '0.5', '--seed', '7']) == 0
    assert '31 training and 11 validation images' in caplog.text and 'lacks 1 of the 12' in caplog.text
    assert '--val-fraction 0.3 -> 0.5' in caplog.text and '--seed 42 -> 7' in caplog.text
    assert 'new images are trained on' in caplog.text and _load(tmp_path / 'a' / 'last.pth.tar')['held_out'] == held


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
    assert done.stderr.count('recipe ') == 1  # the other process logs nothing
    assert '2 x cpu' in done.stderr
    checkpoint = _load(tmp_path / 'a' / 'last.pth.tar')
    assert checkpoint['args']['lr'] == 1e-3 and checkpoint['args']['mixup'] == 0.8
    assert not any(name.startswith('module.') for name in checkpoint['state_dict'])


# Errors


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
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
        (['--epochs', 0], '--epochs must be at least 1'),
        (['--data-dir', '/tmp'], 'DIR /'),
        (['--model', '/tmp'], 'use --model local-dir:/tmp'),
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


def test_data_directory(train, run, image_folder, tmp_path, capsys, caplog):
    line = [*BASE, '--output', str(tmp_path), '--experiment', 'a', '--epochs', '1']
    assert train.main(['--data-dir', '/no/such/folder', *line]) == 2
    assert '/no/such/folder does not exist' in capsys.readouterr().err
    assert run('a', '--epochs', 1, '--data-dir', f'{image_folder}/') == 0  # the same twice
    shutil.copytree(image_folder, tmp_path / 'other')
    assert train.main(['--config', str(tmp_path / 'a' / 'args.yaml'), str(tmp_path / 'other'), '--resume', 'auto']) == 0
    assert f'data directory {image_folder} -> {tmp_path / "other"}' in caplog.text
    caplog.clear()
    assert train.main(['--data-dir', str(image_folder), *line, '--resume', 'auto']) == 0  # another form of the same
    assert 'Options that differ' not in caplog.text


def test_val_fraction_beside_a_validation_split(run, train, image_folder, caplog):
    assert run('a', '--dry-run', '--val-fraction', 0.2) == 0
    assert f'{image_folder / "validation"} is not used' in caplog.text
    caplog.clear()
    assert train.main([f'{image_folder}/train', *BASE, '--dry-run', '--val-fraction', '0.2']) == 0
    assert 'is not used' not in caplog.text


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
    assert 'batch_size 8 -> 4). Keep --batch-size' in capsys.readouterr().err
    for flag in (['--seed', 7], ['--grad-accum-steps', 2]):
        assert run('a', '--epochs', 1, '--lr', 0.01, '--resume', 'auto', *flag) == 2
        assert f'{flag[0].strip("-").replace("-", "_")} ' in capsys.readouterr().err


def test_unreadable_validation_image_does_not_count(train, tmp_path, caplog, image_folder):
    """The metrics are those of the other images, for any batch size."""
    shutil.copytree(image_folder, tmp_path / 'data')
    shutil.copytree(image_folder, tmp_path / 'fewer')
    (tmp_path / 'data' / 'validation' / 'red' / '3.png').write_bytes(b'no image')
    (tmp_path / 'fewer' / 'validation' / 'red' / '3.png').unlink()
    rows = []
    for name, batch in (('data', 4), ('data', 1), ('fewer', 4)):
        line = [tmp_path / name, *BASE, '--epochs', 1, '--lr', 0.01, '-vb', batch, '--output', tmp_path / 'out']
        assert train.main([*map(str, line), '--experiment', f'{name}{batch}']) == 0
        rows.append(_summary(tmp_path / 'out' / f'{name}{batch}')[0])
    assert {row['eval_top1'] for row in rows} == {rows[0]['eval_top1']}
    assert float(rows[0]['eval_loss']) == pytest.approx(float(rows[2]['eval_loss']), abs=1e-6)
    assert '1 unreadable images so far' in caplog.text


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
