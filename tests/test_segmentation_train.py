"""segmentation/train.py on a few images: learning, the run folder, resuming to the same bits, errors."""

import csv
import os
import re
import runpy
import shlex
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import yaml
from checkpoints import assert_same
from PIL import Image
from processes import run_processes

from cluster_zoo.training.signals import StopRequest
from cluster_zoo.weights import load_checkpoint
from segmentation import create_segmenter, load_trained, segmenter_config, train
from segmentation.data.datasets import create_dataset
from segmentation.engine.build import check_data, syncs_batch_norm
from segmentation.engine.train_options import train_parser

ROOT = Path(__file__).parents[1]
MODEL = ['--head', 'fcn', '--backbone', 'test_resnet', '--channels', 8]
BASE = ['--crop', 32, '--scale', 48, 40, '-b', 4, '-j', 0, '--device', 'cpu', '-vb', 4, '--lr', 1e-3]


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Rectangles in two colors on noise. The upper rows have no label."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for split, count in (('train', 10), ('val', 3)):
        for kind in ('images', 'masks'):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((40, 48), np.uint8)
            y, x = rng.integers(4, 22, 2)
            mask[y : y + 18, x : x + 22] = 1 + index % 2
            pixels = rng.integers(0, 100, (40, 48, 3))
            pixels[mask == 1, 0] += 150
            pixels[mask == 2, 1] += 150
            mask[:3] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / 'images' / f'{index}.png')
            Image.fromarray(mask).save(root / split / 'masks' / f'{index}.png')
    (root / 'classes.txt').write_text('ground\nred\ngreen\n')
    return root


@pytest.fixture
def run(data, tmp_path):
    """Runs the script in this process and returns its exit status; outputs are in tmp_path/NAME."""

    def _run(name, *flags, model=MODEL):
        line = [data, '--dataset', 'folder', *model, *BASE, '--output', tmp_path, '--experiment', name, *flags]
        return train.main(list(map(str, line)))

    return _run


def _summary(folder):
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


def _load(path):
    return torch.load(path, weights_only=True)


# ---- Run folder ----


def test_run_folder(run, data, tmp_path, caplog):
    flags = ['--iterations', 5, '--val-interval', 2, '--model-ema', '--log-interval', 2, '--overlays', 2]
    assert run('a', *flags, '--warmup', 2, '--head-lr-scale', 10) == 0
    folder = tmp_path / 'a'
    assert {path.name for path in folder.iterdir()} >= {'args.yaml', 'last.pth.tar', 'model_best.pth.tar', 'overlays'}
    rows = _summary(folder)
    assert [row['iteration'] for row in rows] == ['2', '4', '5']
    assert set(rows[0]) == {'iteration', 'train_loss', 'mIoU', 'aAcc', 'mAcc', 'lr'}
    # Learning rates of iterations 1 (within warm-up), 3 and 4
    expected = [
        1e-3 * (1 - 1 / 5) ** 0.9 * (1e-6 + (1 - 1e-6) / 2),
        1e-3 * (1 - 3 / 5) ** 0.9,
        1e-3 * (1 - 4 / 5) ** 0.9,
    ]
    assert [float(row['lr']) for row in rows] == pytest.approx(expected)
    assert _load(folder / 'model_best.pth.tar')['metric'] == max(float(row['mIoU']) for row in rows)
    with (folder / 'classes.csv').open() as classes, (folder / 'confusion.csv').open() as confusion:
        classes, (_, *counts) = list(csv.DictReader(classes)), list(csv.reader(confusion))
    assert [row['class'] for row in classes] == [row[0] for row in counts] == ['ground', 'red', 'green']
    assert [int(row['pixels']) for row in classes] == [sum(map(int, row[1:])) for row in counts]
    assert sum(int(row['pixels']) for row in classes) == 3 * 37 * 48  # three images without their ignored rows
    ious = [float(row['IoU']) for row in classes if row['IoU']]
    assert np.mean(ious) == pytest.approx(float(rows[-1]['mIoU']), abs=1e-3)
    trained = load_trained(folder / 'last.pth.tar', use_ema=True)
    assert trained.classes.names == ('ground', 'red', 'green')
    assert trained.predict(create_dataset('folder', data, 'val')[0][0]).shape == (40, 48)
    assert [len(list((folder / 'overlays' / n).glob('*.png'))) for n in ('2', '4', '5')] == [2, 2, 2]
    options = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (options['head'], options['backbone'], options['num_classes']) == ('fcn', 'test_resnet', 3)
    lines = [record.message for record in caplog.records if record.message.startswith('Train:')]
    assert [line.split()[1] for line in lines] == ['2/5', '4/5', '5/5']
    assert re.fullmatch(r'Train: 2/5  loss \S+  lr 4.090e-04  \S+ img/s  [\d:]+ left', lines[0])
    tests = [record.message for record in caplog.records if record.message.startswith('EMA after')]
    assert len(tests) == 3 and re.search(r'^ground +\S+ +\S+$', tests[0], re.MULTILINE)


def test_checkpoint_alone_rebuilds_the_model(run, tmp_path):
    flags = ['--classifier', 'dnc', '--sub-centroids', 2, '--auxiliary', '--model-ema']
    assert run('a', '--iterations', 2, *flags, '--centroid-momentum', 0.5, '--dropout', 0) == 0
    checkpoint = _load(tmp_path / 'a' / 'last.pth.tar')
    names = ('head', 'backbone', 'num_classes', 'classifier', 'channels', 'auxiliary', 'sub_centroids')
    args = checkpoint['args']
    model = create_segmenter(**{name: args[name] for name in names}, **args['model_kwargs'] or {})
    load_checkpoint(model, tmp_path / 'a' / 'last.pth.tar', use_ema=True)
    assert_same(dict(model.state_dict()), dict(checkpoint['state_dict_ema']))
    assert checkpoint['epoch'] == 2 and args['centroid_momentum'] == 0.5
    [[learned]] = checkpoint['learned']
    assert learned['memory']['features'].shape[1] == 8
    # Another run starts from the weights that are not averaged
    assert run('b', '--iterations', 1, *flags, '--checkpoint', tmp_path / 'a' / 'last.pth.tar', '--lr', 1e-12) == 0
    first, second = (_load(tmp_path / name / 'last.pth.tar')['state_dict'] for name in ('a', 'b'))
    name = 'backbone.model.layer1.0.conv1.weight'
    torch.testing.assert_close(second[name], first[name])
    assert not torch.equal(second[name], checkpoint['state_dict_ema'][name])


@pytest.mark.parametrize('classifier', ['plain', 'cond', 'dnc'])
def test_learns(run, tmp_path, classifier):
    """Segments red and green rectangles. A constant prediction has a mean IoU of 29."""
    flags = ['--iterations', 40, '--ratio', 0.8, 1.2, '--no-distort', '--dropout', 0, '--lr', 1e-2]
    flags += ['--centroid-momentum', 0.9] if classifier == 'dnc' else []
    model = ['--head', 'semantic_fpn', '--backbone', 'test_resnet', '--channels', 16, '--classifier', classifier]
    model += ['--model-kwargs', 'pyramid_channels=16']
    assert run('a', *flags, model=model) == 0
    assert float(_summary(tmp_path / 'a')[0]['mIoU']) > 40


@pytest.mark.parametrize(
    'flags',
    [
        ['--amp', '--channels-last', '--clip-grad', 1],
        ['--opt', 'momentum', '--schedule', 'cosine_restarts', '--periods', 1, 1, '--restart-weights', 1, 0.5],
        ['--model-ema', '--model-ema-warmup', '--auxiliary', '--classifier', 'cond'],
        ['--loss', 'ce', 'lovasz', '--class-weights', 'balanced', '--auxiliary'],
        ['--layer-decay', 0.9, '--norm-decay', 'none', '--schedule', 'cosine', '--grad-checkpointing'],
        ['--test-mode', 'slide', '--test-crop', 32, '--test-stride', 16, '--test-scale', 60, 50],
    ],
)
def test_options_run(run, flags):
    assert run('a', '--iterations', 2, *flags) == 0


def test_context_cluster_and_region_proxy_run(run):
    assert run('a', '--iterations', 1, model=['--head', 'semantic_fpn', '--backbone', 'coc_tiny', '--channels', 8]) == 0
    vit = ['--head', 'region_proxy', '--backbone', 'vit_tiny_patch16_224', '--early', 0]
    assert run('b', '--iterations', 1, model=[*vit, '--model-kwargs', 'depth=2', 'img_size=32']) == 0


def test_accumulated_batches_are_the_samples_of_a_larger_one(run, tmp_path, monkeypatch):
    seen, steps = [], []
    forward, step = train.SegmentationTask.forward, torch.optim.AdamW.step
    monkeypatch.setattr(
        train.SegmentationTask,
        'forward',
        lambda self, images, labels: seen.append(images) or forward(self, images, labels),
    )
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self, *args: steps.append(1) or step(self, *args))
    assert run('once', '--iterations', 3, '-b', 4) == 0
    assert run('twice', '--iterations', 3, '-b', 2, '--grad-accum-steps', 2) == 0
    assert [len(images) for images in seen] == [4] * 3 + [2] * 6 and len(steps) == 6
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    assert float(_summary(tmp_path / 'twice')[0]['train_loss']) == pytest.approx(1.1, abs=0.5)  # a mean, not a sum


# ---- Stopping and resuming ----

FULL = ['--iterations', 5, '--val-interval', 3, '--classifier', 'dnc', '--model-ema', '--warmup', 2]


def _stop_when_asked(monkeypatch, number):
    """Sends a SIGTERM when the run asks whether to stop for the n-th time, counted from 0."""
    original, asked = StopRequest.requested, iter(range(10**6))

    def requested(self):
        if next(asked) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(StopRequest, 'requested', requested)
    return lambda: monkeypatch.setattr(StopRequest, 'requested', original)


def _assert_same_run(a, b):
    first, second = _load(a / 'last.pth.tar'), _load(b / 'last.pth.tar')
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'metric', 'epoch', 'progress', 'learned'):
        assert_same(first[key], second[key])
    assert _summary(a) == _summary(b)


@pytest.mark.parametrize(
    ('asked', 'iteration', 'flags'),
    # A run asks before each of 3 iterations, in the validation, before 2 iterations, in the validation
    [
        (0, 0, []),
        (2, 2, ['-j', 1]),
        (3, 3, ['--model-ema']),  # within the validation
        (4, 3, ['--grad-accum-steps', 2, '-b', 2]),  # after the validation
        (5, 4, ['--amp', '--classifier', 'cond', '--auxiliary']),
        (6, 5, ['-j', 1]),  # within the last validation
    ],
)
def test_resumed_run_ends_in_the_same_bits(run, tmp_path, monkeypatch, capsys, asked, iteration, flags):
    assert run('whole', *FULL, *flags) == 0
    undo = _stop_when_asked(monkeypatch, asked)
    assert run('cut', *FULL, *flags) == 128 + signal.SIGTERM
    undo()
    message = capsys.readouterr().err
    assert f'Stopped at iteration {iteration}.' in message
    command = next(line for line in message.splitlines() if '--resume' in line)
    torch.manual_seed(0)  # another process has other states of the generators
    assert train.main(shlex.split(command)[2:]) == 0
    _assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_resume_auto(run, tmp_path, monkeypatch):
    flags = [*FULL, '--resume', 'auto', '--recovery-interval', 1]
    undo = _stop_when_asked(monkeypatch, 2)
    assert run('a', *flags) == 128 + signal.SIGTERM
    undo()
    assert run('a', *flags) == 0
    assert run('b', *FULL) == 0
    _assert_same_run(tmp_path / 'b', tmp_path / 'a')
    assert run('a', *flags) == 0  # the run is finished
    assert len(_summary(tmp_path / 'a')) == 2


def test_resume_keeps_the_best(run, tmp_path):
    assert run('a', '--iterations', 2) == 0
    best = _load(tmp_path / 'a' / 'model_best.pth.tar')
    checkpoint = tmp_path / 'a' / 'last.pth.tar'
    saved = _load(checkpoint)
    saved['saver'] |= dict(best_metric=99.0, pending=(None, None))
    torch.save(saved, checkpoint)
    assert run('a', '--iterations', 3, '--resume', checkpoint) == 0
    assert _load(tmp_path / 'a' / 'model_best.pth.tar')['metric'] == best['metric']
    assert [row['iteration'] for row in _summary(tmp_path / 'a')] == ['2', '3']


def test_resume_says_that_other_batches_are_other_samples(run, tmp_path, caplog):
    assert run('a', '--iterations', 1, '-b', 4) == 0
    resume = ['--iterations', 2, '--resume', tmp_path / 'a' / 'last.pth.tar']
    assert run('b', *resume, '-b', 2, '--grad-accum-steps', 2) == 0
    assert 'order of the samples' not in caplog.text
    assert run('c', *resume, '-b', 2) == 0
    [warning] = [record.message for record in caplog.records if 'order of the samples' in record.message]
    assert '4 crops' in warning and 'has 2' in warning


# ---- Several processes ----


def _in_a_process(rank: int, world: int, line: list[str], folder: str) -> None:
    """Runs with the environment of torchrun: a whole one, one from its middle on, one that saves less often."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='localhost')
    runs = dict(a=[], b=['--resume', f'{folder}/a/recovery-4-0.pth.tar'], c=['--recovery-interval', '0'])
    for name, flags in runs.items():
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = Path(folder, f'port-{name}')
            if rank == 0:
                port.with_suffix('.new').write_text(str(free.getsockname()[1]))
                port.with_suffix('.new').rename(port)
        while not port.exists():
            time.sleep(0.01)
        os.environ['MASTER_PORT'] = port.read_text()
        assert train.main([*line, '--experiment', name, *flags]) == 0
    os.environ['MASTER_PORT'] = '0'
    assert train.main([*line, '--sync-bn']) == 2  # without a GPU, before the process group is created


def test_two_processes_resume_to_the_same_bits(data, tmp_path):
    line = [data, '--dataset', 'folder', *MODEL, *BASE, '--output', tmp_path, *FULL, '-b', 2, '--recovery-interval', 2]
    run_processes(_in_a_process, 2, list(map(str, line)), str(tmp_path))
    first, second = (_load(tmp_path / name / 'last.pth.tar') for name in ('a', 'b'))
    assert len(first['learned']) == 2  # each process has its own memory
    assert not torch.equal(*(learned['memory']['features'] for [learned] in first['learned']))
    assert not any(name.startswith('module.') for name in first['state_dict'])
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'learned', 'progress'):
        assert_same(first[key], second[key])
    assert _summary(tmp_path / 'a')[1:] == _summary(tmp_path / 'b')
    assert _summary(tmp_path / 'a') == _summary(tmp_path / 'c')


def test_processes_wait_for_the_data_check(data, tmp_path, monkeypatch):
    """The check may take longer than the 10 minutes that NCCL waits."""
    waits = []

    def broadcast(objects, group=None):
        waits.append(dist.get_backend(group) == 'gloo' and group._get_backend(torch.device('cpu')).options._timeout)

    args = train_parser().resolve([str(data)])
    args.distributed, args.rank = True, 0
    monkeypatch.setattr(dist, 'broadcast_object_list', broadcast)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        check_data(args, create_dataset('folder', data, 'val'))
    finally:
        dist.destroy_process_group()
    assert len(waits) == 1 and waits[0] >= timedelta(hours=12)


@pytest.mark.parametrize(
    ('segmenter', 'device', 'distributed', 'flags', 'expected'),
    [
        ('condnet_r50_ade20k', 'cuda:1', True, [], True),
        ('condnet_r50_ade20k', 'cuda:1', True, ['--no-sync-bn'], False),
        ('condnet_r50_ade20k', 'cuda', False, [], False),
        ('condnet_r50_ade20k', 'cpu', True, [], False),
        (None, 'cuda:1', True, [], False),
        (None, 'cuda:1', True, ['--sync-bn'], True),
    ],
)
def test_published_systems_synchronize_batch_norm(segmenter, device, distributed, flags, expected):
    args = train_parser().resolve(['data', *(['--segmenter', segmenter] if segmenter else []), *flags])
    args.device, args.distributed = device, distributed
    assert syncs_batch_norm(args) is expected


# ---- Options ----


def test_published_system_gives_the_defaults(monkeypatch):
    config = segmenter_config('condnet_r101_pascal_context_59')
    args = train_parser().resolve(['data', '--segmenter', config.name, '--lr', '0.5'])
    assert (args.lr, args.head_lr_scale, args.weight_decay, args.norm_decay) == (0.5, 10.0, 1e-4, 'all')
    assert (args.opt, args.crop, args.scale, args.iterations) == ('momentum', [480], [520, 520], 80_000)
    assert (args.dataset, args.test_mode, args.test_crop) == ('pascal_context_59', 'slide', [480])
    assert (args.guidance_weight, args.auxiliary_weight, args.batch_size) == (0.2, 0.4, 16)
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert train_parser().resolve(['data', '--segmenter', config.name]).batch_size == 4
    args = train_parser().resolve(['data', '--segmenter', 'region_proxy_vit_l16_ade20k'])
    assert args.periods == [20_000, 40_000, 100_000] and args.restart_weights == [1.0, 0.5, 0.25]


def test_options_file_is_a_run_again(run, tmp_path):
    assert run('a', *FULL, '--no-distort') == 0
    assert train.main(['--config', str(tmp_path / 'a' / 'args.yaml'), '--experiment', 'b']) == 0
    _assert_same_run(tmp_path / 'a', tmp_path / 'b')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--backbone', 'test_resnett'], 'test_resnet'),
        (['--head', 'fcm'], 'fcn'),
        (['--classifier', 'condd'], 'cond'),
        (['--segmenter', 'condnet_r50_ade'], 'condnet_r50_ade20k'),
        (['--dropout', 2], '--dropout'),
        (['--model-kwargs', 'foo=1'], '--model-kwargs'),
        (['--opt', 'adamv'], 'did you mean adam'),
        (['--schedule', 'cosine_restarts', '--periods', 3, 4], '--schedule cosine_restarts: Periods'),
        (['--periods', 3, 4], '--periods'),
        (['--warmup', 5], '--warmup 5'),
        (['--iterations', 0], '--iterations must be at least 1'),
        (['--crop', 3, 4, 5], '--crop takes a side'),
        (['--ratio', 2, 0.5], '--ratio takes the lower bound first'),
        (['--max-category', 2], '--max-category must be above 0, at most 1'),
        (['--flip', 2], '--flip must be 0 to 1'),
        (['--test-mode', 'slide'], '--test-mode slide needs --test-crop'),
        (['--test-crop', 32], '--test-crop needs --test-mode slide'),
        (['--test-mode', 'slide', '--test-crop', 32, '--test-stride', 40], '--test-stride 40'),
        (['--test-mode', 'slide', '--test-crop', 1, 2, 3], '--test-crop 1 2 3'),
        (['--test-mode', 'slide', '--test-crop', 0], '--test-crop 0'),
        (['--test-scale', 0, 4], '--test-scale must be at least 1'),
        (['--train-split', 'trian'], '--train-split'),
        (['--num-classes', 5], '3 classes, not 5'),
        (['--num-classes', 5], '--num-classes 5'),
        (['--dataset', 'camvidd'], 'camvid'),
        (['--resume', 'none.pth.tar'], "No checkpoint at 'none.pth.tar'"),
        (['--resume', 'auto', '--experiment', ''], '--resume auto needs --experiment'),
        (['--checkpoint', 'none.pth.tar'], 'none.pth.tar'),
        (['--pretrained-backbone', 'none.pth.tar'], 'none.pth.tar'),
        (['--config', 'none.yaml'], 'none.yaml'),
        (['--centroid-momentum', 0.5], '--centroid-momentum'),
        (['--sub-centroids', 2], 'centroids'),
        (['--sync-bn'], '--sync-bn'),
        (['--device', 'gpu'], '--device gpu'),
        (['-vb', 0], '--validation-batch-size must be at least 1'),
        (['--test-multiple', 0], '--test-multiple must be at least 1'),
        (['--overlays', -1], '--overlays must be at least 0'),
        (['--recovery-interval', -1], '--recovery-interval must be at least 0'),
        (['--guidance-weight', -0.1], '--guidance-weight must be at least 0'),
        (['--auxiliary-weight', 'nan'], '--auxiliary-weight must be at least 0'),
        (['--weight-decay', -0.1], '--weight-decay must be at least 0'),
        (['--warmup-ratio', -0.1], '--warmup-ratio must be at least 0'),
        (['--warmup', -1], '--warmup must be at least 0'),
        (['--head-lr-scale', 0], '--head-lr-scale must be above 0'),
        (['--clip-grad', 0], '--clip-grad must be above 0'),
        (['--lr', 'nan'], '--lr must be above 0'),
        (['--std', 1, 0, 1], '--std must be above 0'),
        (['--layer-decay', 0], '--layer-decay must be above 0, at most 1'),
        (['--layer-decay', 1.1], '--layer-decay must be above 0, at most 1'),
        (['--model-ema-decay', 1], '--model-ema-decay must be at least 0, below 1'),
        (['--seed', -1], '--seed must be at least 0, below 2**32'),
        (['--seed', 2**32], '--seed must be at least 0, below 2**32'),
    ],
)
def test_errors_are_one_line(run, capsys, flags, message):
    assert run('a', '--iterations', 5, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error


def test_published_dataset_only_with_its_system():
    assert train_parser().resolve(['data']).dataset == 'folder'
    system = ['data', '--segmenter', 'region_proxy_vit_l16_cityscapes']
    assert train_parser().resolve(system).dataset == 'cityscapes'
    assert train_parser().resolve([*system, '--dataset', 'folder']).dataset == 'folder'
    assert '(default: that of the model, else folder)' in ' '.join(train_parser().format_help().split())


@pytest.mark.parametrize(
    ('splits', 'count'), [(['train+val', 'val'], 3), (['train', 'train'], 10), (['train', 'val'], 0)]
)
def test_images_of_both_splits_are_counted(run, caplog, splits, count):
    assert run('a', '--dry-run', '--train-split', splits[0], '--val-split', splits[1]) == 0
    found = [record.message for record in caplog.records if 'validation images are also' in record.message]
    assert len(found) == bool(count) and all(f'{count} of {count}' in line and '--val-split' in line for line in found)


def test_no_data_and_no_model(data, capsys):
    assert train.main([]) == 2
    assert 'no data given' in capsys.readouterr().err
    assert train.main([str(data), '--device', 'cpu']) == 2
    assert '--head and --backbone' in capsys.readouterr().err


def test_checkpoint_of_a_classifier(run, tmp_path, capsys):
    torch.save(dict(state_dict=timm.create_model('test_resnet').state_dict(), arch='test_resnet'), tmp_path / 'c.pth')
    assert run('a', '--checkpoint', tmp_path / 'c.pth') == 2
    error = capsys.readouterr().err
    assert 'c.pth' in error and '--pretrained-backbone' in error and error.count('\n') == 1


def test_damaged_data_is_found_before_training(run, data, tmp_path, capsys):
    copy = tmp_path / 'data'
    for file in data.rglob('*.*'):
        (copy / file.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(data)).write_bytes(file.read_bytes())
    mask = np.zeros((40, 48), np.uint8)
    mask[0, 0] = 9
    Image.fromarray(mask).save(copy / 'val' / 'masks' / '1.png')
    line = [copy, '--dataset', 'folder', *MODEL, *BASE, '--output', tmp_path, '--iterations', 2]
    assert train.main(list(map(str, line))) == 2
    error = capsys.readouterr().err
    assert '1.png' in error and 'label 9' in error
    assert [path.name for path in tmp_path.iterdir()] == ['data']  # no run folder


def test_resume_of_another_model(run, tmp_path, capsys):
    assert run('a', '--iterations', 1) == 0
    assert run('b', '--iterations', 2, '--channels', 16, '--resume', tmp_path / 'a' / 'last.pth.tar') == 2
    assert '--resume' in capsys.readouterr().err
    (tmp_path / 'c.pth.tar').write_text('nothing')
    assert run('b', '--resume', tmp_path / 'c.pth.tar') == run('b', '--checkpoint', tmp_path / 'c.pth.tar') == 2
    resumed, started = capsys.readouterr().err.splitlines()
    assert resumed.startswith('error: --resume: ') and 'c.pth.tar' in resumed and 'c.pth.tar' in started


@pytest.mark.parametrize('head', ['deeplabv3plus', 'upernet'])
def test_one_crop_is_too_few_for_batch_norm_of_a_point(run, capsys, head):
    model = ['--head', head, *MODEL[2:]]
    assert run('a', '--iterations', 1, '-b', 1, model=model) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: batch norm') and 'raise --batch-size' in error and error.count('\n') == 1
    assert run('a', '--iterations', 1, '-b', 2, model=model) == 0


def test_a_devices_memory_is_too_small(run, monkeypatch, capsys):
    def update(run, batches):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(train, 'update', update)
    assert run('a', '--iterations', 1, '-b', 3) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: out of memory with batches of 3 crops: lower --batch-size or --crop')


@pytest.mark.parametrize('start', ['file', 'module'])
def test_starts_as_a_file_and_as_a_module(start, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--help-all'])
    # The first entry is the folder of the script, or the current folder for a module
    monkeypatch.setattr(sys, 'path', [str(ROOT / 'segmentation' if start == 'file' else ROOT), *sys.path])
    monkeypatch.delitem(sys.modules, 'segmentation.train')
    with pytest.raises(SystemExit) as end:
        if start == 'file':
            runpy.run_path(str(ROOT / 'segmentation' / 'train.py'), run_name='__main__')
        else:
            runpy.run_module('segmentation.train', run_name='__main__')
    assert end.value.code == 0 and '--layer-decay' in capsys.readouterr().out
    assert sys.path[0] == str(ROOT)  # not the folder of the script, whose modules could hide others
