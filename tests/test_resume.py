"""cluster_zoo.training.resume and signals: states of generators, requests to stop, the command that resumes."""

import io
import os
import random
import shlex
import signal
import sys

import numpy as np
import pytest
import torch

from cluster_zoo.training.resume import get_rng_state, resume_command, seed_all, set_rng_state
from cluster_zoo.training.signals import StopRequest


def _draw():
    return torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), torch.randn(1).item()


def test_generators_go_on_where_they_were():
    seed_all(1, 0, 0)
    _draw()  # numpy, Python and torch store a second normal number
    state = get_rng_state()
    expected = _draw()
    _draw()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True))
    assert _draw() == expected


def test_every_epoch_and_process_has_its_own_seed():
    draws = set()
    for seed, rank, epoch in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (0, 1, 0), (0, 0, 1)]:
        seed_all(seed, rank, epoch)
        draws.add(str(_draw()))
    assert len(draws) == 6
    seed_all(1, 0, 1)
    assert str(_draw()) in draws


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signal_is_a_request(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.signal == number
    assert signal.getsignal(number) is before


def test_second_interrupt_stops_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
        stop._time -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_command(tmp_path):
    argv = ['--local-rank=0', 'my data', '--resume', 'a', '--output=b', '-b', '8', '--experiment', 'c']
    folder = tmp_path / 'out put' / 'run'
    words = shlex.split(resume_command(['train.py'], argv, folder, 'x.pth.tar', 2))
    assert words[:6] == ['torchrun', '--nproc-per-node=2', 'train.py', 'my data', '-b', '8']
    assert words[6:] == ['--output', str(folder.parent), '--experiment', 'run', '--resume', 'x.pth.tar']
    installed = shlex.split(resume_command(['-m', 'cluster_zoo', 'train'], argv, folder, 'x.pth.tar', 0))
    assert installed[:5] == [sys.executable, '-m', 'cluster_zoo', 'train', 'my data']
