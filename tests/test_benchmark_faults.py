"""benchmarks/faults.py: what the comparison of run folders finds, and a trial of each kind."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EVERY_KIND = {'kill', 'save', 'term', 'group', 'usr1', 'hup'}


@pytest.fixture(scope='module')
def run_folders():
    spec = importlib.util.spec_from_file_location('run_folders', ROOT / 'benchmarks' / 'run_folders.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_checkpoint(path: Path, epoch: int, metric: float, **entries: object) -> None:
    weights, averaged = (dict(weight=torch.full((3,), float(epoch))) for _ in range(2))
    state = dict(state_dict=weights, state_dict_ema=averaged, epoch=epoch, metric=metric, optimizer=dict(lr=[0.1]))
    torch.save(dict(state, progress=dict(epoch=epoch + 1), **entries), path)


@pytest.fixture
def folders(tmp_path):
    """Two equal folders of a run whose second and third epoch are equally good."""
    whole = tmp_path / 'whole'
    whole.mkdir()
    with (whole / 'summary.csv').open('w', newline='') as file:
        csv.writer(file).writerows([('epoch', 'eval_top1'), (0, 50.0), (1, 60.0), (2, 60.0)])
    for name, epoch, metric in (('last', 2, 60.0), ('model_best', 1, 60.0), ('checkpoint-0', 0, 50.0)):
        write_checkpoint(whole / f'{name}.pth.tar', epoch, metric)
    shutil.copy(whole / 'model_best.pth.tar', whole / 'checkpoint-1.pth.tar')
    return whole, Path(shutil.copytree(whole, tmp_path / 'cut'))


def test_equal_folders(run_folders, folders):
    assert run_folders.differences(*folders) == [] == list(run_folders.damages(folders[0]))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ('injure', 'expected'),
    [
        (
            lambda cut: shutil.copy(cut / 'checkpoint-0.pth.tar', cut / 'model_best.pth.tar'),
            'model_best.pth.tar is not the best row',
        ),
        (
            lambda cut: write_checkpoint(cut / 'model_best.pth.tar', 2, 60.0),
            'model_best.pth.tar is not the best row',  # the first of equals is
        ),
        (lambda cut: (cut / 'model_best.pth.tar').unlink(), 'model_best.pth.tar is missing'),
        (lambda cut: write_checkpoint(cut / 'last.pth.tar', 2, 61.0), 'last.pth.tar has another metric'),
        (lambda cut: write_checkpoint(cut / 'last.pth.tar', 2, 60.0, learned=[1]), 'last.pth.tar has another learned'),
        (lambda cut: (cut / 'last.pth.tar').unlink(), 'last.pth.tar is missing'),
        (lambda cut: truncate(cut / 'checkpoint-0.pth.tar'), 'checkpoint-0.pth.tar is unreadable'),
        (
            lambda cut: (cut / 'summary.csv').write_text('epoch,eval_top1\n0,50.0\n2,60.0\n'),
            'summary.csv has rows 0 2, expected 0 1 2',
        ),
        (lambda cut: (cut / 'recovery_tmp.pth.tar').touch(), 'recovery_tmp.pth.tar is left'),
        (lambda cut: (cut / 'tmp.pth.tar').touch(), 'tmp.pth.tar is left'),
    ],
)
def test_comparison_finds(run_folders, folders, injure, expected):
    whole, cut = folders
    injure(cut)
    assert any(reason.startswith(expected) for reason in run_folders.differences(cut, whole))


def test_comparison_finds_a_changed_weight(run_folders, folders):
    whole, cut = folders
    checkpoint = torch.load(cut / 'last.pth.tar', weights_only=True)
    checkpoint['state_dict']['weight'][1] += 1e-6
    torch.save(checkpoint, cut / 'last.pth.tar')
    assert run_folders.differences(cut, whole) == ['last.pth.tar has another state_dict']


def test_damages_of_a_run_in_progress(run_folders, folders):
    folder = folders[1]
    truncate(folder / 'model_best.pth.tar')
    (folder / 'last.pth.tar').unlink()
    expected = ['model_best.pth.tar is unreadable after the fault', 'no last.pth.tar after the fault']
    assert list(run_folders.damages(folder)) == expected


def test_a_trial_of_each_kind(tmp_path):
    path = tmp_path / 'trials.json'
    command = [sys.executable, ROOT / 'benchmarks' / 'faults.py', '--kills', 1, '--tasks', 'classification']
    command += ['--processes', 1, '--jobs', 2, '--json', path]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert path.exists(), run.stderr
    trials = json.loads(path.read_text())['trials']
    assert {trial['kind'] for trial in trials} == EVERY_KIND and all(trial['faults'] for trial in trials)
    failed = [trial for trial in trials if trial['reasons']]
    assert run.returncode == bool(failed)
    assert not [trial for trial in failed if trial['kind'] == 'term']
    assert run.stdout.count('classification, 1 processes, ') == len(failed)
    assert f'all {"":29}6 {6 - len(failed):>9}'.split() == next(
        line.split()[:3] for line in run.stdout.splitlines() if line.split()[:2] == ['all', '6']
    )
