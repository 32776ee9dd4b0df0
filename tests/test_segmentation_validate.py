"""segmentation/validate.py and `evaluate` on a few images."""

import argparse
import csv
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from processes import run_processes

from segmentation import create_segmenter, validate
from segmentation.engine.evaluation import evaluate
from segmentation.engine.inference import predict

ROOT = Path(__file__).parents[1]
CLASSES = ('sky', 'road', 'tree', 'car')
# Width and height: two sizes in an order in which no batch of two is complete at once
SIZES = [(40, 33), (36, 48), (40, 33), (36, 48), (40, 33), (40, 33), (36, 48)]
MODEL = dict(head='fcn', backbone='test_resnet', num_classes=4, channels=8, output_stride=8)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Seven noisy images of three classes, with ignored pixels."""
    root = tmp_path_factory.mktemp('streets')
    rng = np.random.default_rng(0)
    for kind in ('images', 'masks'):
        (root / 'val' / kind).mkdir(parents=True)
    for index, (width, height) in enumerate(SIZES):
        mask = rng.choice([0, 1, 2, 255], (height // 3, width // 3), p=[0.3, 0.3, 0.3, 0.1]).astype(np.uint8)
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        pixels = rng.integers(0, 150, (height, width, 3))
        for channel in range(3):
            pixels[..., channel] += 100 * (mask == channel)
        Image.fromarray(pixels.astype(np.uint8)).save(root / 'val' / 'images' / f'{index}.png')
        Image.fromarray(mask).save(root / 'val' / 'masks' / f'{index}.png')
    (root / 'classes.txt').write_text('\n'.join(CLASSES))
    return root


@pytest.fixture(scope='module')
def model():
    """An untrained segmenter that predicts all classes."""
    torch.manual_seed(0)
    model = create_segmenter(**MODEL)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    model.eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 40, 40))
        [*model.head.classifier.parameters()][-1].sub_(logits.mean((0, 2, 3)))
    return model


@pytest.fixture(scope='module')
def checkpoint(model, tmp_path_factory):
    """A checkpoint as segmentation/train.py writes it: weights and options."""
    path = tmp_path_factory.mktemp('weights') / 'last.pth.tar'
    args = dict(dataset='folder', model_kwargs=dict(output_stride=8), lr=0.1, data='/nowhere', test_mode='whole')
    args |= {name: value for name, value in MODEL.items() if name != 'output_stride'}
    torch.save({'state_dict': model.state_dict(), 'args': args}, path)
    return path


@pytest.fixture
def run(data, checkpoint, tmp_path, capsys):
    """Runs the script in this process and returns its results, or its exit status and message."""

    def _run(*flags, data=data, checkpoint=checkpoint):
        results = tmp_path / 'results' / 'one.json'
        line = [data, '--device', 'cpu', '-j', 0, '--results-file', results, *flags]
        line += ['--checkpoint', checkpoint] if checkpoint else []
        status = validate.main([str(word) for word in line if word != ''])
        out, error = capsys.readouterr()
        return (json.loads(results.read_text()), out) if status == 0 else (status, error)

    return _run


def samples(data, resized=None):
    """Normalized images [1, 3, H, W], resized to the sizes that `resized` returns in turn, and masks [H, W]."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    for path in sorted((data / 'val' / 'images').iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
        for size in resized(*pixels.shape[2:]) if resized else ():
            pixels = nn.functional.interpolate(pixels, size, mode='bilinear').round()
        mask = torch.from_numpy(np.array(Image.open(data / 'val' / 'masks' / path.name))).long()
        yield (pixels - mean) / std, mask


def figures(pairs):
    """mIoU, pixel accuracy, mean class accuracy and IoU of each class by their definitions."""
    predictions, labels = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs))
    predictions, labels = predictions[labels != 255], labels[labels != 255]
    iou, acc = {}, []
    for k, name in enumerate(CLASSES):
        both, either = (predictions == k) & (labels == k), (predictions == k) | (labels == k)
        if either.any():
            iou[name] = 100 * both.sum().item() / either.sum().item()
        if (labels == k).any():
            acc.append(100 * both.sum().item() / (labels == k).sum().item())
    mean = [sum(values) / len(values) for values in (iou.values(), acc)]
    return mean[0], 100 * (predictions == labels).double().mean().item(), mean[1], iou


@torch.no_grad()
def expected(data, model, *resized, **protocol):
    """Metrics of the mean probabilities over several sizes."""
    pairs = []
    for views in zip(*(samples(data, each) for each in resized or (None,)), strict=True):
        mask = views[0][1]
        mean = sum(predict(model, image, size=mask.shape, **protocol) for image, _ in views) / len(views)
        pairs.append((mean.argmax(1)[0], mask))
    return figures(pairs)


def check(found, wanted, within=0.05):
    # Rounding decides for pixels with two almost equal probabilities.
    assert (found['mIoU'], found['aAcc'], found['mAcc']) == pytest.approx(wanted[:3], abs=within)
    assert {k: v for k, v in found['IoU'].items() if v is not None} == pytest.approx(wanted[3], abs=within)


def test_a_checkpoint_alone_is_enough(run, data, model):
    found, out = run()
    wanted = expected(data, model)
    check(found, wanted)
    assert set(wanted[3]) == set(CLASSES) and 5 < wanted[0] < 95  # the car is predicted but does not occur
    assert found['Acc']['car'] is None
    assert found['images'] == 7 and found['images_per_second'] > 0
    assert found['parameters'] == round(sum(p.numel() for p in model.parameters()) / 1e6, 4)
    options = found['options']
    assert (options['head'], options['dataset'], options['data']) == ('fcn', 'folder', str(data))
    assert f'mIoU {found["mIoU"]:.2f}' in out and all(name in out for name in CLASSES)


@torch.no_grad()
def test_tables_and_picture_of_the_classes(run, data, model, tmp_path):
    found, _ = run('--results-dir', tmp_path / 'new' / 'tables')
    predictions, labels = [], []
    for image, mask in samples(data):
        predictions.append(predict(model, image, size=mask.shape).argmax(1).flatten())
        labels.append(mask.flatten())
    predictions, labels = torch.cat(predictions), torch.cat(labels)
    counts = [[((labels == i) & (predictions == j)).sum().item() for j in range(4)] for i in range(4)]
    with (tmp_path / 'new' / 'tables' / 'confusion.csv').open() as file:
        (corner, *header), *rows = csv.reader(file)
    assert corner == '' and (*header,) == CLASSES == tuple(row[0] for row in rows)
    assert np.abs(np.array([row[1:] for row in rows], int) - counts).max() <= 2  # rounding of equal probabilities
    with (tmp_path / 'new' / 'tables' / 'classes.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == [*CLASSES]
    assert [int(row['pixels']) for row in rows] == np.sum(counts, 1).tolist()
    for row in rows:
        for column, metric in (('IoU', 'IoU'), ('accuracy', 'Acc')):
            assert row[column] == ('' if found[metric][row['class']] is None else str(found[metric][row['class']]))
    with Image.open(tmp_path / 'new' / 'tables' / 'confusion.png') as picture:
        assert min(picture.size) > 300


def test_results_that_cannot_be_written(run, tmp_path):
    (tmp_path / 'file').touch()
    status, error = run('--results-dir', tmp_path / 'file')
    assert status == 2 and error.startswith(f'error: --results-dir {tmp_path}/file: ') and error.count('\n') == 1


@pytest.mark.parametrize('batch_size', [1, 2, 16])
def test_batches_do_not_matter(run, data, model, batch_size):
    check(run('-b', batch_size)[0], expected(data, model))


def test_loader_processes_do_not_matter(run, data, model):
    check(run('-j', 2)[0], expected(data, model))


def test_windows_scales_and_flip(run, data, model):
    """Scales are factors of --scale: 0.75 times 60 x 40 is 45 x 30, rounded up to 48 x 32."""
    found, _ = run(
        *('--mode', 'slide', '--crop', 32, '--stride', 20, 24, '--flip', '-b', 3),
        *('--scale', 60, 40, '--multiple', 8, '--scales', 0.75, 1, 1.5),
    )

    def at(ratio):
        def resized(*size):
            factor = ratio * min(60 / max(size), 40 / min(size))
            first = [round(side * factor) for side in size]
            return [first, [8 * math.ceil(side / 8) for side in first]]

        return resized

    sizes = [at(ratio) for ratio in (0.75, 1, 1.5)]
    assert [size(36, 48)[1] for size in sizes] == [[32, 40], [40, 56], [64, 80]]
    wanted = expected(data, model, *sizes, mode='slide', crop=32, stride=(20, 24), flip=True)
    check(found, wanted, within=0.2)  # see the next comment on uint8
    assert abs(wanted[1] - expected(data, model, sizes[1])[1]) > 0.5
    assert found['options']['test_stride'] == [20, 24]


def test_windows_can_be_padded(run, data, model, checkpoint, tmp_path):
    found, _ = run('--mode', 'slide', '--crop', 44, '--pad')
    wanted = expected(data, model, mode='slide', crop=44, pad=True)
    check(found, wanted)
    small = expected(data, model, mode='slide', crop=44)
    assert abs(wanted[1] - small[1]) > 0.2
    saved = torch.load(checkpoint, weights_only=True)
    saved['args'] |= dict(test_mode='slide', test_crop=[44], test_stride=[44], test_pad=True)
    path = tmp_path / 'padded.pth.tar'
    torch.save(saved, path)
    check(run(checkpoint=path)[0], wanted)
    check(run('--no-pad', checkpoint=path)[0], small)


def test_images_are_resized_and_masks_are_not(run, data, model):
    """40 x 33 and 36 x 48 fit into 64 x 50 as 61 x 50 and 48 x 64; a second resize makes 64 x 56 of the first."""
    found, _ = run('--scale', 64, 50, '--multiple', 8)
    wanted = expected(data, model, lambda *size: {(33, 40): [(50, 61), (56, 64)], (48, 36): [(64, 48)]}[size])
    check(found, wanted, within=0.2)  # resizing uint8 rounds the weights, so some pixels differ by one
    assert abs(wanted[1] - expected(data, model)[1]) > 1


@torch.no_grad()
def test_labels_can_stand_for_other_classes(run, data, model):
    found, _ = run('--remap', '0=1', '1=0', '2=255')
    pairs = []
    for image, mask in samples(data):
        mask = torch.where(mask < 2, 1 - mask, 255)
        pairs.append((predict(model, image, size=mask.shape).argmax(1)[0], mask))
    check(found, figures(pairs))
    for wrong in ('0=sky', 'sky=0'):
        status, error = run('--remap', wrong)
        assert status == 2 and 'expected LABEL=CLASS, both numbers' in error


def test_flags_win_over_the_checkpoint(run, data, model, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved['args'] |= dict(test_mode='slide', test_crop=[24], test_stride=[24])
    path = tmp_path / 'windows.pth.tar'
    torch.save(saved | dict(args=argparse.Namespace(**saved['args'])), path)
    check(run(checkpoint=path)[0], expected(data, model, mode='slide', crop=24))
    check(run('--stride', 12, checkpoint=path)[0], expected(data, model, mode='slide', crop=24, stride=12))
    check(run('--mode', 'whole', checkpoint=path)[0], expected(data, model))


def test_weights_alone_need_a_model(run, data, model, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), path)
    status, error = run(checkpoint=path)
    assert status == 2 and all(
        flag in error for flag in (str(path), '--segmenter', '--head', '--backbone', '--dataset')
    )
    flags = ['--head', 'fcn', '--backbone', 'test_resnet', '--channels', 8, '--model-kwargs', 'output_stride=8']
    check(run(*flags, checkpoint=path)[0], expected(data, model))


def test_weights_in_use_are_printed(run, checkpoint, tmp_path):
    _, out = run()
    assert str(checkpoint) in out and 'the only ones in the file' in out and '--use-ema' not in out
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | dict(state_dict_ema=saved['state_dict']), tmp_path / 'both.pth.tar')
    _, out = run(checkpoint=tmp_path / 'both.pth.tar')
    assert 'of the last update (the file also has weights averaged over the updates: --use-ema)' in out
    _, out = run('--use-ema', checkpoint=tmp_path / 'both.pth.tar')
    assert 'without --use-ema' in out


@pytest.mark.parametrize('flags', [(), ('--head', 'fcn', '--backbone', 'test_resnet')])
@pytest.mark.parametrize('kind', ['run', 'state dict'])
def test_checkpoint_of_a_classifier(run, tmp_path, flags, kind):
    weights = timm.create_model('test_resnet', num_classes=10).state_dict()
    options = dict(model='test_resnet', num_classes=10, dataset='')
    saved = dict(state_dict=weights, arch='test_resnet', args=options) if kind == 'run' else weights
    torch.save(saved, tmp_path / 'classifier.pth')
    status, error = run(*flags, checkpoint=tmp_path / 'classifier.pth')
    assert status == 2 and error.count('\n') == 1
    assert 'classifier.pth' in error and 'of a classifier' in error and '--pretrained-backbone' in error


def test_the_auxiliary_head_is_not_measured(run, data, tmp_path):
    model = create_segmenter(**MODEL, auxiliary=True).eval()
    path = tmp_path / 'auxiliary.pth.tar'
    args = dict(MODEL, auxiliary=True, model_kwargs=dict(output_stride=8))
    torch.save({'state_dict': model.state_dict(), 'args': args}, path)
    found, _ = run(checkpoint=path)
    used = [p for name, p in model.named_parameters() if not name.startswith('auxiliary')]
    assert found['parameters'] == round(sum(p.numel() for p in used) / 1e6, 4)
    check(found, expected(data, model))


def test_overlays(run, tmp_path):
    run('--overlays', tmp_path / 'drawn', '--num-overlays', 2)
    drawn = sorted((tmp_path / 'drawn').iterdir())
    assert [path.name for path in drawn] == ['0001-1.png', '0005-5.png']
    assert all(Image.open(path).width > 3 * 36 for path in drawn)


@pytest.fixture
def evaluations(monkeypatch):
    """Fails the test if the data is read or the model evaluated."""

    def read(*args, **kwargs):
        raise AssertionError('too late')

    monkeypatch.setattr(validate, 'create_dataset', read)
    monkeypatch.setattr(validate, 'evaluate', read)


@pytest.mark.parametrize('flag', ['--results-file', '--overlays'])
def test_outputs_are_checked_first(run, evaluations, tmp_path, flag):
    (tmp_path / 'file').write_text('')
    wrong = (tmp_path, '/proc/one.json') if flag == '--results-file' else (tmp_path / 'file', '/proc')  # not writable
    for path in (tmp_path / 'file' / 'more', *wrong):
        status, error = run(flag, path)
        assert status == 2 and error.startswith(f'error: {flag} {path}') and error.count('\n') == 1


def test_outputs_may_exist(run, tmp_path):
    (tmp_path / 'drawn').mkdir()
    (tmp_path / 'old.json').write_text('{}')
    found, _ = run('--overlays', tmp_path / 'drawn', '--num-overlays', 1)
    assert [path.name for path in (tmp_path / 'drawn').iterdir()] == ['0003-3.png']
    run('--results-file', tmp_path / 'old.json')
    assert json.loads((tmp_path / 'old.json').read_text())['mIoU'] == found['mIoU']


def test_mixed_precision(run, data, model):
    found, _ = run('--amp')
    assert found['aAcc'] == pytest.approx(expected(data, model)[1], abs=3)


def _validate(rank, world, port, argv):
    where = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), **where)
    assert validate.main(argv) == 0


def test_two_processes_give_the_metrics_of_one(run, data, checkpoint, tmp_path):
    """With seven images in two processes, none is counted twice."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    results, drawn = tmp_path / 'two.json', tmp_path / 'drawn'
    argv = [data, '--checkpoint', checkpoint, '--device', 'cpu', '-j', 0, '-b', 1, '--results-file', results]
    argv += ['--overlays', drawn, '--num-overlays', 7]
    run_processes(_validate, 2, port, [str(word) for word in argv])
    found, wanted = json.loads(results.read_text()), run('-b', 1)[0]
    for name in ('mIoU', 'aAcc', 'mAcc', 'IoU', 'Acc', 'images'):
        assert found[name] == wanted[name]
    assert len(list(drawn.iterdir())) == 7


@pytest.mark.parametrize(
    ('flags', 'changes', 'message'),
    [
        ((), dict(checkpoint='/nowhere.pth'), "No checkpoint at '/nowhere.pth'"),
        ((), dict(checkpoint=''), 'no --checkpoint'),
        ((), dict(data=''), 'no data'),
        ((), dict(data='/nowhere'), '/nowhere does not exist'),
        (('--dataset', 'camvit'), {}, "'camvit' (did you mean camvid?)"),
        (('--split', 'text'), {}, "'text'"),
        (('--head', 'semantic_fnp', '--backbone', 'test_resnet'), {}, 'did you mean semantic_fpn'),
        (('--head', 'fcn', '--backbone', 'test_resnet', '--channels', 9), {}, 'does not fit'),
        (('--segmenter', 'semantic_fpn_coc_smal_25'), {}, 'semantic_fpn_coc_small_25'),
        (('--num-classes', 3), {}, '4 classes, not 3'),
        (('--num-classes', 3), {}, '--num-classes 3'),
        (('--mode', 'slide'), {}, '--mode slide needs --crop'),
        (('--crop', 32), {}, '--crop needs --mode slide'),
        (('--pad',), {}, '--pad needs --mode slide'),
        (('--mode', 'slide', '--crop', 1, 2, 3), {}, '--crop 1 2 3: expected one number'),
        (('--mode', 'slide', '--crop', 16, '--stride', 17), {}, '--stride 17'),
        (('--mode', 'slide', '--crop', 16, '--stride', 0), {}, '--stride 0'),
        (('--scales', 0), {}, '--scales must be above 0'),
        (('--scale', 0, 4), {}, '--scale must be at least 1'),
        (('--multiple', 0), {}, '--multiple must be at least 1'),
        (('--std', 0, 1, 1), {}, '--std must be above 0'),
        (('-b', 0), {}, '--batch-size must be at least 1'),
        (('--device', 'abacus'), {}, '--device abacus'),
    ],
)
def test_errors_are_one_line(run, flags, changes, message):
    status, error = run(*flags, **changes)
    assert status == 2
    assert message in error
    assert error.startswith('error: ') and error.count('\n') == 1


def test_a_model_of_other_classes(run, tmp_path):
    """A dataset with a fixed number of classes and a model with four."""
    for kind in ('images', 'masks'):
        (tmp_path / 'val' / kind).mkdir(parents=True)
        Image.new('RGB' if kind == 'images' else 'L', (8, 8)).save(tmp_path / 'val' / kind / '0.png')
    (tmp_path / 'classes.txt').write_text('sky\nroad\n')
    status, error = run(data=tmp_path)
    assert status == 2 and error.count('\n') == 1
    assert '2 classes' in error and '4' in error


@pytest.mark.parametrize('workers', [0, 1])
def test_a_broken_image_is_named(run, data, tmp_path, workers):
    for kind in ('images', 'masks'):
        (tmp_path / 'val' / kind).mkdir(parents=True)
    (tmp_path / 'classes.txt').write_text('\n'.join(CLASSES))
    (tmp_path / 'val' / 'images' / 'torn.png').write_bytes((data / 'val' / 'images' / '0.png').read_bytes()[:300])
    Image.new('L', (40, 33)).save(tmp_path / 'val' / 'masks' / 'torn.png')
    status, error = run('-j', workers, data=tmp_path)
    assert status == 2 and 'torn.png' in error and error.count('\n') == 1


def test_started_as_a_file_from_elsewhere(tmp_path, data):
    """The folder of the script has modules with common names, which must not hide others."""
    command = [sys.executable, ROOT / 'segmentation' / 'validate.py', data, '--checkpoint', 'missing.pth']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith("error: No checkpoint at 'missing.pth'")


# --- evaluate ---------------------------------------------------------------------------------------------------------


class Squares(torch.utils.data.Dataset):
    """Images with given sizes that contain their own labels."""

    classes, ignore_index = ('a', 'b', 'c'), 255

    def __init__(self, sides):
        self.sides = sides

    def __len__(self):
        return len(self.sides)

    def __getitem__(self, index):
        mask = torch.randint(0, 3, (self.sides[index],) * 2, generator=torch.Generator().manual_seed(index))
        return nn.functional.one_hot(mask, 3).permute(2, 0, 1).float(), mask


class Echo(nn.Module):
    """Predicts the labels that the image contains, and records the batches."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        assert not self.training
        self.batches.append((len(x), x.shape[-1]))
        return x


def test_images_of_equal_size_go_together():
    model = Echo()
    found = evaluate(model, Squares([8, 6, 8, 6, 6, 8, 8]), 'cpu', batch_size=2)
    assert (found['mIoU'], found['aAcc'], found['mAcc'], found['images']) == (100, 100, 100, 7)
    assert model.batches == [(2, 8), (2, 6), (2, 8), (1, 6)]
    assert model.training  # as it was before


def test_few_images_wait_for_others_of_their_size():
    model, seen = Echo(), []
    evaluate(model, Squares([*range(2, 18), 3, 9]), 'cpu', batch_size=4, overlays=lambda i, _: seen.append(i))
    assert sum(count for count, _ in model.batches) == 18
    assert sorted(seen) == list(range(18))
    # The limit of waiting images is 16: from then on, each further image completes a batch.
    assert model.batches[0] == (1, 2) and (2, 9) in model.batches


class Views(Squares):
    """An image, and a contradicting one of twice the size with another contrast."""

    def __init__(self, sides, contrast):
        super().__init__(sides)
        self.contrast = contrast

    def __getitem__(self, index):
        image, mask = super().__getitem__(index)
        double = image.roll(1, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return (image, self.contrast * double), mask


@pytest.mark.parametrize('workers', [0, 1])
def test_sizes_of_an_image_are_averaged(workers):
    model = Echo()
    found = evaluate(model, Views([8, 6, 8], 0.9), 'cpu', batch_size=2, workers=workers)
    assert (found['aAcc'], found['images']) == (100, 3)
    assert model.batches == [(2, 8), (2, 16), (1, 6), (1, 12)]
    assert evaluate(model, Views([8], 1.1), 'cpu')['aAcc'] == 0


@pytest.mark.parametrize('tuning', [True, False])
def test_only_windows_choose_kernels_by_trial(monkeypatch, tuning):
    seen = []

    class Model(Echo):
        def forward(self, x):
            seen.append(torch.backends.cudnn.benchmark)
            return x

    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', tuning)
    for protocol in (None, dict(mode='whole'), dict(mode='slide', crop=4)):
        evaluate(Model(), Squares([4]), 'cpu', protocol=protocol)
        assert torch.backends.cudnn.benchmark == tuning
    assert seen == [False, False, tuning]


def test_an_error_leaves_things_as_they_were(monkeypatch):
    class Broken(Echo):
        def forward(self, x):
            raise RuntimeError('broken')

    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    model = Broken()
    with pytest.raises(RuntimeError, match='broken'):
        evaluate(model, Squares([4]), 'cpu')
    assert model.training and torch.backends.cudnn.benchmark
