"""train.py on models with centroids: learning, and resuming to the same bits with the feature memory."""

import csv
import os
import shlex
import signal
import socket
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import assert_same
from processes import run_processes

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.training import train
from cluster_zoo.training.signals import StopRequest
from cluster_zoo.training.tasks import split_learning_state
from cluster_zoo.weights import load_checkpoint

ROOT = Path(__file__).parents[1]
MODEL = ['--model', 'dnc_resnet18', '--model-kwargs', 'channels=(8,8,8,8)', 'layers=(1,1,1,1)']
SMALL = ['--img-size', '32', '--num-classes', '3', '--device', 'cpu', '-j', '0', '-b', '8']
BASE = [*MODEL, *SMALL, '--lr', '0.01', '--warmup-epochs', '0']
MEMORY = [
    '--centroid-memory',
    '150',
    '--centroid-momentum',
    '0.9',
]  # half full after two epochs of 40 images


@pytest.fixture
def run(train, image_folder, tmp_path):
    """Runs train.py in this process and returns its exit status; outputs are in tmp_path/NAME."""

    def _run(name, *flags):
        line = [image_folder, *BASE, '--output', tmp_path, '--experiment', name, *flags]
        return train.main(list(map(str, line)))

    return _run


def last(folder: Path) -> dict:
    return torch.load(folder / 'last.pth.tar', weights_only=True)


def assert_same_run(a: Path, b: Path) -> None:
    first, second = last(a), last(b)
    assert {'state_dict', 'optimizer', 'learned'} <= first.keys()
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'metric', 'epoch', 'learned'):
        if key in first:
            assert_same(first[key], second[key])
    summaries = [list(csv.DictReader((folder / 'summary.csv').open())) for folder in (a, b)]
    assert summaries[0] == summaries[1]


# ---- Training ----


def test_learns_with_no_special_flags(run, tmp_path):
    """Classifies noisy images by color. Random guesses reach 33 %."""
    assert run('a', '--recipe', 'timm', '--epochs', 12, '--opt', 'adamw', '--lr', 3e-3, '--no-aug') == 0
    rows = list(csv.DictReader((tmp_path / 'a' / 'summary.csv').open()))
    assert max(float(row['eval_top1']) for row in rows) > 70


@pytest.mark.parametrize(
    'flags',
    [
        [],
        ['--mixup', 0.8, '--cutmix', 1, '--model-ema'],
        ['--amp', '--sub-centroids', 2, '--centroid-momentum', 0.9, '--centroid-temperature', 0.1],
        ['--model-dtype', 'bfloat16', '--centroid-memory', 20, '--centroid-every', 3, '--centroid-dtype', 'float16'],
        ['--centroid-contrast', 0.1, '--grad-accum-steps', 2, '--bce-loss', '--model-ema', '--amp'],
        ['--torchcompile', 'eager', '--model-ema', '--centroid-contrast', 0.1],
        ['--recipe', 'dnc_resnet', '--channels-last'],
        ['--recipe', 'dnc_swin', '--drop-path', 0.1],
        ['--recipe', 'dnc_cifar'],
        ['--aug-splits', 2, '--jsd-loss', '--resplit', '--reprob', 0.5],
    ],
    ids=lambda flags: ' '.join(map(str, flags[:2])),
)
def test_options_work_together(run, tmp_path, flags):
    torch.compiler.reset()
    assert run('a', '-b', 8, '--epochs', 1, '--cooldown-epochs', 0, *flags) == 0
    checkpoint = last(tmp_path / 'a')
    [row] = csv.DictReader((tmp_path / 'a' / 'summary.csv').open())
    assert float(row['train_loss']) < 20
    prototypes = checkpoint['state_dict']['fc.prototypes']
    k = 2 if '--sub-centroids' in flags else 4
    assert prototypes.shape == (3, k, prototypes.shape[-1]) and prototypes.isfinite().all()
    model = timm.create_model(
        'dnc_resnet18', num_classes=3, sub_centroids=k, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1)
    )
    load_checkpoint(model, tmp_path / 'a' / 'last.pth.tar')
    if '--model-ema' in flags:
        assert torch.equal(checkpoint['state_dict_ema']['fc.prototypes'], prototypes)
    [[state]] = checkpoint['learned']
    assert (state['memory']['labels'] >= 0).any()
    if '--centroid-dtype' in flags:
        assert state['memory']['features'].shape[0] == 20 and state['memory']['features'].dtype == torch.float16


def test_a_linear_model_takes_the_recipe_of_its_twin(run, tmp_path):
    """The recipe of a DNC model trains its linear baseline too; the options of centroids have no effect."""
    assert run('a', '--model', 'resnet18', '--recipe', 'dnc_cifar', '-b', 8, '--epochs', 1) == 0
    assert 'learned' not in last(tmp_path / 'a')


# ---- Stopping and resuming ----


FULL = ['--recipe', 'timm', '--epochs', 3, *MEMORY, '--mixup', 0.5]


def stop_after(train, monkeypatch, asked: int):
    """Sends a SIGINT when the run asks for the n-th time whether to stop."""
    count, original = iter(range(1, 10**6)), StopRequest.requested

    def requested(self):
        if next(count) == asked:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(StopRequest, 'requested', requested)
    return lambda: monkeypatch.setattr(StopRequest, 'requested', original)


@pytest.mark.parametrize(
    ('asked', 'flags'),
    [
        (3, ['--model-ema']),  # within the first epoch
        (17, ['--centroid-every', 3]),  # within the second epoch
        (17, ['--model-dtype', 'bfloat16']),
        (3, ['--grad-accum-steps', 2, '--centroid-contrast', 0.1, '--centroid-dtype', 'bfloat16']),
    ],
)
def test_resumed_run_ends_in_the_same_bits(run, train, tmp_path, monkeypatch, capsys, asked, flags):
    assert run('whole', *FULL, *flags) == 0
    undo = stop_after(train, monkeypatch, asked)
    assert run('cut', *FULL, *flags) == 128 + signal.SIGINT
    undo()
    command = next(line for line in capsys.readouterr().err.splitlines() if '--resume' in line)
    torch.manual_seed(0)  # another process has other states of the generators
    assert train.main(shlex.split(command)[2:]) == 0
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_resume_at_the_end_of_an_epoch(run, tmp_path):
    """The memory is half full at the checkpoint and full before the end."""
    assert run('whole', *FULL, '--epochs', 5, '--centroid-every', 2) == 0
    checkpoint = tmp_path / 'whole' / 'checkpoint-1.pth.tar'
    [[state]] = torch.load(checkpoint, weights_only=True)['learned']
    assert len(state['memory']['labels']) == 80 and state['batches'] == 10
    assert run('again', *FULL, '--epochs', 5, '--centroid-every', 2, '--resume', checkpoint) == 0
    first, second = last(tmp_path / 'whole'), last(tmp_path / 'again')
    for key in ('state_dict', 'learned'):
        assert_same(first[key], second[key])
    assert len(first['learned'][0][0]['memory']['labels']) == 150


def test_a_checkpoint_without_a_memory_starts_one(run, tmp_path):
    assert run('a', *FULL, '--epochs', 1) == 0
    checkpoint = last(tmp_path / 'a')
    del checkpoint['learned']
    torch.save(checkpoint, tmp_path / 'other.pth.tar')
    assert run('b', *FULL, '--epochs', 2, '--resume', tmp_path / 'other.pth.tar') == 0
    assert len(last(tmp_path / 'b')['learned'][0][0]['memory']['labels']) == 40


# ---- Several processes ----


def train_in_process(rank: int, world: int, port: int, line: list[str]) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    assert train.main(line) == 0


def two_processes(image_folder, output, name, *flags):
    line = [image_folder, *BASE, '--output', output, '--experiment', name, '-b', 4, *flags]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    run_processes(train_in_process, 2, port, list(map(str, line)))


def test_two_processes_resume_to_the_same_bits(image_folder, run, tmp_path):
    flags = ['--recipe', 'timm', *MEMORY, '--recovery-interval', 3, '--centroid-every', 2, '--epochs', 2]
    two_processes(image_folder, tmp_path, 'whole', *flags)
    states = last(tmp_path / 'whole')['learned']
    assert len(states) == 2
    assert [len(state['memory']['labels']) for [state] in states] == [40, 40]  # of 75 each
    assert not torch.equal(states[0][0]['memory']['labels'], states[1][0]['memory']['labels'])
    recovery = max((tmp_path / 'whole').glob('recovery-*'), key=lambda path: path.stat().st_mtime)
    assert torch.load(recovery, weights_only=True)['progress']['batch'] == 3
    two_processes(image_folder, tmp_path, 'middle', *flags, '--resume', recovery)
    assert_same(states, last(tmp_path / 'middle')['learned'])
    assert_same(last(tmp_path / 'whole')['state_dict'], last(tmp_path / 'middle')['state_dict'])
    two_processes(image_folder, tmp_path, 'end', *flags, '--resume', tmp_path / 'whole' / 'checkpoint-0.pth.tar')
    assert_same(states, last(tmp_path / 'end')['learned'])
    assert_same(last(tmp_path / 'whole')['state_dict'], last(tmp_path / 'end')['state_dict'])
    # One process continues with the memories of both.
    assert run('one', *flags, '--epochs', 3, '--resume', tmp_path / 'whole' / 'last.pth.tar') == 0
    [[state]] = last(tmp_path / 'one')['learned']
    assert len(state['memory']['labels']) == 80 + 40 and state['batches'] == states[0][0]['batches'] + 5


def test_more_processes_than_before_use_the_memory_in_the_same_batches(train):
    """A process without a saved memory continues the count of batches."""
    learned = [[dict(batches=7, memory='first', exact=None)], [dict(batches=7, memory='second', exact=None)]]
    shares = [split_learning_state(learned, rank, 3) for rank in range(3)]
    assert [[head['memory'] for [head] in share] for share in shares] == [['first'], ['second'], [None]]
    assert [head['batches'] for share in shares for [head] in share] == [7, 7, 7]
    assert [[head['memory'] for [head] in split_learning_state(learned, 0, 1)]] == [['first', 'second']]
    assert split_learning_state([], 0, 1) == []


# ---- Errors ----


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--model', 'resnet18', '--centroid-momentum', 0.9], '--centroid-momentum: resnet18 has no centroids'),
        (['--model', 'resnet18', '--sub-centroids', 2], 'sub_centroids'),
        (
            ['--centroid-momentum', 1.5],
            'error: --centroid-momentum: Centroid learning needs momentum of 0 to 1',
        ),
        (
            ['--centroid-temperature', 0],
            'error: --centroid-temperature: Centroid learning needs temperature of',
        ),
        (['--centroid-memory', 0], 'error: --centroid-memory: Centroid learning needs memory of at least 1'),
        (['--centroid-every', 0], 'error: --centroid-every: Centroid learning needs every of at least 1'),
        (['--centroid-contrast', -1], 'error: --centroid-contrast: Centroid learning needs contrast of at least 0'),
        (['--sub-centroids', 0], 'sub_centroids of at least 1'),
        (['--torchscript'], '--torchscript'),
    ],
)
def test_errors_are_one_line(run, capsys, flags, message):
    assert run('a', '--epochs', 1, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error


def test_a_memory_of_another_model(run, tmp_path, capsys):
    assert run('a', '--epochs', 1) == 0
    checkpoint = last(tmp_path / 'a')
    checkpoint['learned'][0][0]['memory']['features'] = torch.zeros(40, 3)
    torch.save(checkpoint, tmp_path / 'other.pth.tar')
    assert run('b', '--epochs', 2, '--resume', tmp_path / 'other.pth.tar') == 2
    error = capsys.readouterr().err
    assert error.startswith('error: --resume') and error.count('\n') == 1 and '[N, 8]' in error
