"""Training and validation of detectors on a few images: the run folder, resuming to the same bits, errors."""

import csv
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_same
from PIL import Image
from processes import run_processes

from cluster_zoo.training.signals import StopRequest
from segmentation.detection import create_detector, train, validate
from segmentation.detection.published_systems import CONFIGS

pytest.importorskip('faster_coco_eval')

FEW = [
    'rpn_post_nms_top_n_train=20',
    'rpn_post_nms_top_n_test=20',
    'box_batch_size_per_image=8',
    'box_detections_per_img=5',
]
MODEL = ['--detector', 'faster_rcnn', '--backbone', 'test_resnet', '--min-size', 48, '--max-size', 64]
BASE = [
    '-b',
    2,
    '-j',
    0,
    '--device',
    'cpu',
    '--lr',
    1e-3,
    '--iterations',
    4,
    '--val-interval',
    2,
    '--model-kwargs',
    *FEW,
]


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Bright rectangles of two categories on noise."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir()
    for split, count in (('train', 5), ('val', 2)):
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            x, y, channel = *rng.integers(4, 20, 2).tolist(), index % 2
            pixels = rng.integers(0, 100, (40, 48, 3))
            pixels[y : y + 16, x : x + 20, channel] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / f'{index}.png')
            images.append(dict(id=index, file_name=f'{index}.png', width=48, height=40))
            polygon = [x, y, x + 20, y, x + 20, y + 16, x, y + 16]
            box = dict(bbox=[x, y, 20, 16], segmentation=[polygon], area=320, iscrowd=0)
            annotations.append(dict(id=index, image_id=index, category_id=channel + 1, **box))
        categories = [dict(id=1, name='red'), dict(id=2, name='green')]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return root


def call(script, *words):
    return script.main(list(map(str, words)))


@pytest.fixture
def run(data, tmp_path):
    def run(name, *more):
        return call(train, data, *MODEL, *BASE, *more, '--output', tmp_path, '--experiment', name)

    return run


def load(path):
    return torch.load(path, weights_only=True)


def test_run_and_validation_of_its_checkpoint(run, data, tmp_path, capsys):
    assert run('a', '--no-check-data') == 0
    with open(tmp_path / 'a' / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['iteration'] for row in rows] == ['2', '4'] and set(rows[0]) >= {'train_loss', 'box_AP', 'box_AP50'}
    assert all(float(row['train_loss']) > 0 for row in rows)
    checkpoint = tmp_path / 'a' / 'last.pth.tar'
    assert (
        call(
            validate,
            data,
            '--checkpoint',
            checkpoint,
            '-j',
            0,
            '--device',
            'cpu',
            '--results-file',
            tmp_path / 'results.json',
        )
        == 0
    )
    found = json.loads((tmp_path / 'results.json').read_text())
    assert found['box_AP'] == pytest.approx(float(rows[-1]['box_AP']), abs=1e-3) and found['images'] == 2
    assert set(found['box_AP_by_class']) == {'red', 'green'}
    assert 'box_AP50' in capsys.readouterr().out


def test_masks_ema_and_amp(data, tmp_path):
    words = ['--detector', 'mask_rcnn', *MODEL[2:], *BASE, '--amp', '--model-ema', '--grad-accum-steps', 2]
    assert call(train, data, *words, '--output', tmp_path, '--experiment', 'm', '--iterations', 2) == 0
    with open(tmp_path / 'm' / 'summary.csv', newline='') as file:
        (row,) = csv.DictReader(file)
    assert {'mask_AP', 'mask_AP50', 'box_AP'} <= set(row)
    assert 'state_dict_ema' in load(tmp_path / 'm' / 'last.pth.tar')


def test_resumed_run_ends_in_the_same_bits(run, tmp_path, monkeypatch):
    assert run('whole') == 0
    asked = iter([False, False, False])  # stops before the fourth iteration
    monkeypatch.setattr(StopRequest, 'requested', lambda self: self.signal or stop(self))

    def stop(self):
        if next(asked, True):
            self.signal = 15
        return self.signal

    assert run('parts') == 128 + 15
    monkeypatch.undo()
    assert run('parts', '--resume', 'auto') == 0
    whole, parts = (load(tmp_path / name / 'last.pth.tar') for name in ('whole', 'parts'))
    for name in ('state_dict', 'optimizer', 'progress', 'summary'):
        assert_same(whole[name], parts[name])


def _in_a_process(rank: int, world: int, script: str, line: list[str], folder: str) -> None:
    """A run with the environment of torchrun."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='localhost')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = Path(folder, 'port')
        if rank == 0:
            port.with_suffix('.new').write_text(str(free.getsockname()[1]))
            port.with_suffix('.new').rename(port)
    while not port.exists():
        time.sleep(0.01)
    os.environ['MASTER_PORT'] = port.read_text()
    assert dict(train=train, validate=validate)[script].main(line) == 0


def test_two_processes(data, tmp_path):
    line = [data, *MODEL, *BASE, '--iterations', 2, '--output', tmp_path, '--experiment', 'two']
    run_processes(_in_a_process, 2, 'train', list(map(str, line)), str(tmp_path), seconds=280)
    checkpoint = load(tmp_path / 'two' / 'last.pth.tar')
    assert checkpoint['progress']['iteration'] == 2 and checkpoint['crops'] == 4
    assert not any(name.startswith('module.') for name in checkpoint['state_dict'])
    assert len(checkpoint['summary']) == 1 and checkpoint['summary'][0]['box_AP'] >= 0
    (tmp_path / 'port').unlink()
    line = [data, '--checkpoint', tmp_path / 'two' / 'last.pth.tar', '--results-file', tmp_path / 'r.json']
    line = list(map(str, [*line, '-j', 0, '--device', 'cpu']))
    run_processes(_in_a_process, 2, 'validate', line, str(tmp_path), seconds=280)
    found = json.loads((tmp_path / 'r.json').read_text())
    assert found['images'] == 2
    assert found['box_AP'] == pytest.approx(checkpoint['summary'][0]['box_AP'], abs=1e-3)


def test_start_from_other_classes(run, data, tmp_path, caplog):
    torch.manual_seed(0)
    other = create_detector('faster_rcnn', 'test_resnet', 5)
    torch.save(other.state_dict(), tmp_path / 'five.pth')
    words = ['--checkpoint', tmp_path / 'five.pth', '--crop', 32, '--min-size', 48, 40, '--iterations', 1]
    assert run('new', '--lr', 1e-12, *words) == 0
    assert '5.pth' not in caplog.text and 'another number of classes: 4 entries' in caplog.text
    state = load(tmp_path / 'new' / 'last.pth.tar')['state_dict']
    assert state['roi_heads.box_predictor.cls_score.weight'].shape[0] == 3
    torch.testing.assert_close(state['roi_heads.box_head.fc6.weight'], other.roi_heads.box_head.fc6.weight.data)


def test_schedule():
    model = torch.nn.Linear(2, 2)
    args = train.train_parser('train').resolve(['DATA', '--iterations', '120', '--warmup', '10', '--device', 'cpu'])
    optimizer, schedule = train.build_optimizer(args, model)
    rates = []
    for step in range(120):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates[0] == pytest.approx(2e-7) and rates[10] == pytest.approx(2e-4)
    assert rates[79] == pytest.approx(2e-4) and rates[80] == pytest.approx(2e-5)
    assert rates[109] == pytest.approx(2e-5) and rates[110] == pytest.approx(2e-6)
    assert optimizer.param_groups[0]['weight_decay'] == 1e-4


def test_defaults_are_those_of_the_published_detectors():
    args = train.train_parser('train').resolve(['DATA', '--iterations', '90000', '--device', 'cpu'])
    train.build_optimizer(args, torch.nn.Linear(2, 2))
    for config in CONFIGS.values():
        assert (args.epochs, args.opt, args.lr, args.weight_decay) == (
            12,
            config.optimizer,
            config.lr,
            config.weight_decay,
        )
        assert (args.warmup, args.flip) == (config.warmup, config.flip)
        assert args.steps == [step / config.epochs for step in config.steps]


@pytest.mark.parametrize(
    'words, message',
    [
        (['--epochs', 0], '--epochs must be at least 1'),
        (['--lr', 0], '--lr must be above 0'),
        (['--flip', 2], 'training data'),
        (['--min-size', 64, 0], '--min-size must be at least 1'),
        (['--crop', 50], '--crop 50 is larger than the resized images'),
        (['--train-split', 'trian'], "no split 'trian'"),
        (['--detector', 'mask_rcn'], 'did you mean mask_rcnn'),
        (['--backbone', 'coc_tyni'], 'did you mean coc_tiny'),
        (['--num-classes', 5], '--num-classes 5: the dataset has 2 categories'),
        (['--warmup', 4], '--warmup shorter than the run'),
        (['--steps', 8], '--steps must be above 0 and below 1'),
        (['--opt', 'adamv'], 'adamv'),
    ],
)
def test_errors_are_one_line(run, capsys, words, message):
    assert run('x', *words, '--dry-run') == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: ') and message in error


def test_errors_of_the_validation(data, tmp_path, capsys):
    assert call(validate, data, '--device', 'cpu') == 2
    assert 'no --checkpoint given' in capsys.readouterr().err
    torch.save({'backbone.fpn.x': torch.ones(1)}, tmp_path / 'x.pth')
    assert call(validate, data, '--device', 'cpu', '--checkpoint', tmp_path / 'x.pth') == 2
    assert 'does not name its model' in capsys.readouterr().err
    words = ['--checkpoint', tmp_path / 'x.pth', '--results-file', tmp_path]
    assert call(validate, data, '--device', 'cpu', *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: --results-file {tmp_path}') and error.count('\n') == 1
