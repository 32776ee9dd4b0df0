"""examples/slurm.sh with stand-ins for Slurm's commands: on a signal the job is saved, requeued and resumed.

The training is real, in two processes of torchrun.
"""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'examples' / 'slurm.sh'
EPOCHS = 12
COMMANDS = {
    'srun': 'echo $$ > step.pid; [ "$1" = --kill-on-bad-exit=0 ] && shift; exec "$@"',
    'scancel': '[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat step.pid)"',
    'scontrol': 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> scontrol.log; fi',
}


@pytest.fixture
def job(image_folder, tmp_path):
    """Starts the script as Slurm does, in a session of its own, and kills what is left of it at the end."""
    for name, code in COMMANDS.items():
        (tmp_path / 'bin').mkdir(exist_ok=True)
        (tmp_path / 'bin' / name).write_text(f'#!/bin/bash\n{code}\n')
        (tmp_path / 'bin' / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    path = [tmp_path / 'bin', Path(sys.executable).parent, os.environ['PATH']]
    environment = dict(
        os.environ,
        PATH=os.pathsep.join(map(str, path)),
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS='1',
        SLURM_JOB_ID='7',
        SLURM_JOB_NODELIST='node',
        SLURM_NNODES='1',
        PROCESSES_PER_NODE='2',
        RENDEZVOUS_PORT=str(port),
    )
    line = [image_folder, '--model', 'test_resnet', '--num-classes', 3, '--img-size', 32, '--device', 'cpu', '-j', 0]
    line += ['-b', 8, '--epochs', EPOCHS, '--output', tmp_path, '--experiment', 'a']
    started = []

    def _job():
        output = (tmp_path / 'slurm.out').open('a')  # --open-mode=append
        command = ['bash', str(SCRIPT), *map(str, line)]
        started.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        )
        return started[-1]

    yield _job
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _epochs(folder):
    path = folder / 'a' / 'summary.csv'
    if not path.exists():
        return []
    with path.open() as file:
        return [int(row['epoch']) for row in csv.DictReader(file)]


def test_signal_saves_a_checkpoint_and_requeues(job, tmp_path):
    first = job()
    deadline = time.monotonic() + 120
    while not _epochs(tmp_path) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    log = tmp_path / 'slurm.out'
    assert first.poll() is None and _epochs(tmp_path), log.read_text()[-3000:]
    first.send_signal(signal.SIGUSR1)  # to the script alone: --signal=B:USR1
    assert first.wait(60) != 0
    assert (tmp_path / 'scontrol.log').read_text() == 'requeue 7\n'
    assert list((tmp_path / 'a').glob('recovery-*.pth.tar')), log.read_text()[-3000:]
    assert len(_epochs(tmp_path)) < EPOCHS
    second = job()
    assert second.wait(120) == 0, log.read_text()[-3000:]
    assert 'Resumed from' in log.read_text() and _epochs(tmp_path) == list(range(EPOCHS))
    assert (tmp_path / 'scontrol.log').read_text() == 'requeue 7\n'  # not again


def test_failed_training_is_not_requeued(job, tmp_path):
    (tmp_path / 'a').write_text('a file in the way of the run folder')
    assert job().wait(120) != 0
    assert 'is a file, expected a folder' in (tmp_path / 'slurm.out').read_text()
    assert not (tmp_path / 'scontrol.log').exists()


def test_shellcheck():
    shellcheck = shutil.which(
        'shellcheck', path=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    )
    if shellcheck is None:
        pytest.skip('shellcheck is not installed')
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
