"""cluster_zoo.training.loggers: each row of summary.csv reaches each logger once, also in resumed runs."""

import csv
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import yaml

from cluster_zoo.training.loggers import Loggers

BASE = ['--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '8']


@pytest.fixture
def run(train, image_folder, tmp_path):
    """Runs train.py in this process and returns its exit status; outputs are in tmp_path/NAME."""

    def _run(name, *flags):
        line = [str(image_folder), *BASE, '--output', tmp_path, '--experiment', name, *flags]
        return train.main(list(map(str, line)))

    return _run


class Package:
    """Takes the place of wandb and of trackio, and records the calls."""

    def __init__(self):
        self.starts, self.rows, self.ends, self.broken = [], [], [], False

    def init(self, **options):
        self.starts.append(options)
        return self

    def log(self, row, step, commit=True):
        if self.broken:
            raise ConnectionError('no network\nat all')
        self.rows.append((step, row))

    def finish(self, exit_code=0):
        self.ends.append(exit_code)


@pytest.fixture(params=['wandb', 'trackio'])
def package(request, monkeypatch):
    package = Package()
    package.name = request.param
    monkeypatch.setitem(sys.modules, request.param, package)
    return package


def _summary(folder):
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'trackio'])
def test_missing_package(run, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert run('a', f'--log-{name}') == 2
    error = capsys.readouterr().err
    assert f'error: --log-{name} needs a package' in error and error.endswith(f'pip install {name}\n')
    assert not (tmp_path / 'a').exists()


def test_folder_with_the_name_of_a_package(run, tmp_path, monkeypatch, capsys):
    """wandb writes to a folder of its name, which Python takes for a package."""
    spec = SimpleNamespace(origin=None)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    assert run('a', '--log-wandb') == 2
    assert 'pip install wandb' in capsys.readouterr().err


def test_rows_and_options(run, tmp_path, package):
    flags = ['--wandb-project', 'birds', '--wandb-tags', 'x', 'y', '--val-interval', 2]
    assert run('a', '--epochs', 2, f'--log-{package.name}', *flags) == 0
    (start,) = package.starts
    assert (start['project'], start['config']['model'], start['resume']) == ('birds', 'test_resnet', 'allow')
    if package.name == 'wandb':
        assert (start['name'], start['tags'], start['dir']) == ('a', ['x', 'y'], str(tmp_path / 'a'))
    assert package.ends == [0]
    # The values of summary.csv; epoch 0 is not validated
    expected = [{k: float(v) for k, v in row.items() if v and k != 'epoch'} for row in _summary(tmp_path / 'a')]
    assert [step for step, _ in package.rows] == [0, 1] and [row for _, row in package.rows] == expected
    assert set(package.rows[0][1]) == {'train_loss', 'lr'}


def test_resumed_run_continues_under_its_id(run, tmp_path, package):
    assert run('a', '--epochs', 2, f'--log-{package.name}') == 0
    # From before the last row, as after a crash between the row and the checkpoint
    assert run('a', '--epochs', 3, f'--log-{package.name}', '--resume', tmp_path / 'a' / 'checkpoint-0.pth.tar') == 0
    assert run('b', '--epochs', 1, f'--log-{package.name}') == 0
    assert run('b', '--epochs', 1, f'--log-{package.name}', '--overwrite') == 0
    key = dict(wandb='id', trackio='name')[package.name]
    first, resumed, other, replaced = (start[key] for start in package.starts)
    assert first == resumed and len({first, other, replaced}) == 3 and first.startswith('a-')
    assert [step for step, _ in package.rows] == [0, 1, 2, 0, 0]


def test_row_that_a_killed_run_did_not_log(run, tmp_path, package):
    assert run('a', '--epochs', 2, f'--log-{package.name}') == 0
    state = tmp_path / 'a' / 'loggers.yaml'
    state.write_text(state.read_text().replace('step: 1', 'step: 0'))
    assert run('a', '--epochs', 3, f'--log-{package.name}', '--resume', 'auto') == 0
    assert [step for step, _ in package.rows] == [0, 1, 1, 2] and package.rows[1] == package.rows[2]


def test_resume_id(run, package):
    if package.name == 'trackio':
        pytest.skip('an option of wandb')
    assert run('a', '--epochs', 1, '--log-wandb', '--wandb-resume-id', 'abc') == 0
    assert (package.starts[0]['id'], package.starts[0]['resume']) == ('abc', 'must')


def test_logger_that_fails_does_not_stop_the_run(run, tmp_path, package, caplog):
    package.broken = True
    assert run('a', '--epochs', 3, f'--log-{package.name}') == 0
    warnings = [record.message for record in caplog.records if f'--log-{package.name}' in record.message]
    warnings = [message for message in warnings if not message.startswith('flag ')]
    assert warnings == [
        f'--log-{package.name} is off from here on, summary.csv has all rows: no network at all',
    ]
    assert len(_summary(tmp_path / 'a')) == 3


def test_logger_that_does_not_start(run, package, capsys):
    def init(**options):
        raise RuntimeError('not\nlogged in')

    package.init = init
    assert run('a', '--epochs', 1, f'--log-{package.name}') == 2
    assert f'error: --log-{package.name} does not start: not logged in\n' in capsys.readouterr().err


def test_failed_run_is_marked(tmp_path, package):
    args = SimpleNamespace(
        log_tensorboard=False,
        log_wandb=package.name == 'wandb',
        log_trackio=package.name == 'trackio',
        wandb_project=None,
        wandb_tags=[],
        wandb_resume_id='',
    )
    with pytest.raises(KeyError), Loggers(args, tmp_path, {}):
        raise KeyError
    assert package.ends == [dict(wandb=1, trackio=0)[package.name]]  # Trackio has no such mark


def test_no_logger(run, tmp_path):
    assert run('a', '--epochs', 1) == 0
    assert not list((tmp_path / 'a').glob('*events*')) and not (tmp_path / 'a' / 'loggers.yaml').exists()


# TensorBoard


def _events(folder):
    """The steps and values of each tag, as TensorBoard shows them."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    names = events.Tags()['scalars']
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}, events


def test_tensorboard(run, tmp_path):
    pytest.importorskip('tensorboard')
    assert run('a', '--epochs', 2, '--log-tensorboard') == 0
    assert run('a', '--epochs', 3, '--log-tensorboard', '--resume', tmp_path / 'a' / 'checkpoint-0.pth.tar') == 0
    values, events = _events(tmp_path / 'a')
    rows = _summary(tmp_path / 'a')
    assert set(values) == set(rows[0]) - {'epoch'}
    for name, steps in values.items():
        assert [event.step for event in events.Scalars(name)] == [0, 1, 2]
        assert list(steps.values()) == pytest.approx([float(row[name]) for row in rows], rel=1e-6)
    assert 'options/text_summary' in events.Tags()['tensors']
    assert run('a', '--epochs', 1, '--log-tensorboard', '--overwrite') == 0
    assert set(_events(tmp_path / 'a')[0]['train_loss']) == {0}


def test_segmentation(tmp_path):
    """``segmentation/train.py`` logs each validation with its iteration."""
    pytest.importorskip('tensorboard')
    import numpy as np
    from PIL import Image

    from segmentation import train

    for split in ('train', 'val'):
        for kind in ('images', 'masks'):
            (tmp_path / 'data' / split / kind).mkdir(parents=True)
        for index in range(4):
            mask = np.zeros((40, 48), np.uint8)
            mask[8:30, 8:30] = 1 + index % 2
            Image.fromarray(mask).save(tmp_path / 'data' / split / 'masks' / f'{index}.png')
            Image.fromarray(mask * 90).convert('RGB').save(tmp_path / 'data' / split / 'images' / f'{index}.png')
    (tmp_path / 'data' / 'classes.txt').write_text('ground\nred\ngreen\n')
    line = [tmp_path / 'data', '--head', 'fcn', '--backbone', 'test_resnet', '--channels', 8, '--crop', 32]
    line += ['--scale', 48, 40, '-b', 4, '-j', 0, '--device', 'cpu', '-vb', 4, '--iterations', 4, '--val-interval', 2]
    line += ['--output', tmp_path, '--experiment', 'a', '--log-tensorboard']
    assert train.main(list(map(str, line))) == 0
    values, _ = _events(tmp_path / 'a')
    assert set(values) == {'train_loss', 'mIoU', 'aAcc', 'mAcc', 'lr'}
    assert list(values['mIoU']) == [2, 4]
    assert yaml.safe_load((tmp_path / 'a' / 'loggers.yaml').read_text())['step'] == 4
