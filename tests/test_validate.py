"""validate.py: metrics against metrics computed here, several models, result files, errors."""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torchvision import datasets, transforms

ROOT = Path(__file__).parents[1]
NAMES = [f'ILSVRC2012_val_{index:08d}.JPEG' for index in range(1, 16)]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """An untrained classifier of three classes."""
    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=3)
    path = tmp_path_factory.mktemp('weights') / 'model.pth'
    torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(lr=1)}, path)
    return path


@pytest.fixture
def run(validate, image_folder, checkpoint, capsys):
    """Runs validate.py in this process; returns its exit status and the result that it prints, or its error."""

    def _run(*flags, model='test_resnet', data=image_folder, weights=checkpoint):
        line = [data, '-m', model, '--device', 'cpu', '-j', 0, '-b', 4, '--num-classes', 3, '--img-size', 32, *flags]
        line += ['--checkpoint', weights] if weights else []
        status = validate.main([str(word) for word in line])
        out, error = capsys.readouterr()
        return status, json.loads(out.partition('--result\n')[2]) if status == 0 else error

    return _run


@pytest.fixture(scope='module')
def outputs(image_folder, checkpoint):
    """Logits and labels of the validation images, by torchvision."""
    model = timm.create_model('test_resnet', num_classes=3).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
    cfg = model.pretrained_cfg
    size = round(32 / cfg['crop_pct'])
    steps = [
        transforms.Resize(size, transforms.InterpolationMode(cfg['interpolation'])),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
        transforms.Normalize(cfg['mean'], cfg['std']),
    ]
    images, labels = zip(*datasets.ImageFolder(image_folder / 'validation', transforms.Compose(steps)))
    with torch.inference_mode():
        return model(torch.stack(images)), torch.tensor(labels)


# Metrics


def test_top1_is_the_one_computed_by_hand(run, outputs):
    logits, labels = outputs
    status, result = run('--use-train-size')
    assert status == 0
    expected = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert 0 < expected < 100
    assert result['top1'] == pytest.approx(expected, abs=1e-3)
    assert result['top1_err'] == pytest.approx(100 - expected, abs=1e-3)
    assert result['top5'] == 100  # there are three classes
    model = timm.create_model('test_resnet', num_classes=3)
    assert result['param_count'] == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    assert result['img_per_sec'] > 0 and (result['images'], result['unreadable']) == (15, 0)
    assert (result['model'], result['img_size'], result['interpolation']) == ('test_resnet', 32, 'bilinear')


@pytest.mark.parametrize('how', ['micro', 'macro', 'weighted'])
def test_averages(run, outputs, how):
    """Compares with the definitions for each class."""
    logits, labels = outputs
    guesses = logits.argmax(1)
    scores = []
    for label in range(3):
        hits = ((guesses == label) & (labels == label)).sum().item()
        made, there = (guesses == label).sum().item(), (labels == label).sum().item()
        precision, recall = hits / made if made else 0, hits / there
        f1 = 2 * precision * recall / (precision + recall) if hits else 0
        scores.append((precision, recall, f1, there))
    result = run('--use-train-size', '--metrics-avg', how)[1]
    if how == 'micro':
        expected = [(guesses == labels).float().mean().item()] * 3
    elif how == 'macro':
        expected = [sum(score[i] for score in scores) / 3 for i in range(3)]
    else:
        expected = [sum(score[i] * score[3] for score in scores) / len(labels) for i in range(3)]
    found = [result[f'{how}_{name}'] for name in ('precision', 'recall', 'f1_score')]
    assert found == pytest.approx([100 * value for value in expected], abs=1e-3)


def test_averages_leave_out_classes_that_do_not_occur(validate):
    confusion = torch.zeros(4, 4, dtype=torch.long)
    confusion[0, 0], confusion[0, 1], confusion[1, 1] = 3, 1, 4
    found = validate.averages(confusion, 'macro')
    assert found == pytest.approx(
        {'macro_precision': 90, 'macro_recall': 87.5, 'macro_f1_score': 100 * (6 / 7 + 8 / 9) / 2}
    )
    confusion[2, 0] = 1  # the score of a class that is never predicted is 0
    assert validate.averages(confusion, 'macro')['macro_recall'] == pytest.approx(175 / 3)


def test_real_labels(run, tmp_path, image_folder, outputs):
    """An image may have several correct labels. An image without any is left out."""
    logits, _ = outputs
    for path, name in zip(sorted((image_folder / 'validation').glob('*/*')), NAMES):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name / name)
    files = sorted(tmp_path.glob('*/*.JPEG'))
    order = [NAMES.index(path.name) for path in files]
    real = [[] for _ in NAMES]
    guesses = logits.argmax(1).tolist()
    for position, index in enumerate(order):
        real[index] = [[guesses[position]], [(guesses[position] + 1) % 3], [0, 1, 2], []][position % 4]
    (tmp_path / 'real.json').write_text(json.dumps(real))
    counted = [position % 4 != 1 for position in range(15) if position % 4 != 3]
    status, result = run('--use-train-size', '--real-labels', tmp_path / 'real.json', data=tmp_path)
    assert status == 0, result
    assert result['top1'] == pytest.approx(100 * sum(counted) / len(counted), abs=1e-3)


def test_valid_labels(run, tmp_path, image_folder, outputs):
    """Two of the model's three classes, with the indices of the dataset's folders."""
    logits, labels = outputs
    shutil.copytree(image_folder / 'validation', tmp_path / 'two')
    shutil.rmtree(tmp_path / 'two' / 'blue')  # the first class
    (tmp_path / 'valid.txt').write_text('1\n2\n')
    status, result = run('--use-train-size', '--valid-labels', tmp_path / 'valid.txt', data=tmp_path / 'two')
    assert status == 0, result
    kept = labels > 0
    expected = (logits[kept][:, 1:].argmax(1) == labels[kept] - 1).float().mean().item()
    assert result['top1'] == pytest.approx(100 * expected, abs=1e-3)


@pytest.mark.parametrize(
    'flags',
    [
        ['--amp'],
        ['--model-dtype', 'bfloat16', '--channels-last'],
        ['--torchscript', '--fuser', 'te'],
        ['--torchcompile', 'eager'],
        ['--reparam', '--fast-norm', '--retry'],
        ['--test-pool', '--img-size', 256],
        ['--crop-pct', 1, '--crop-mode', 'squash', '--interpolation', 'bilinear', '--mean', 0.5, '--std', 0.5],
        ['--legacy-jit', '-j', 1],
    ],
    ids=lambda flags: flags[0].strip('-'),
)
def test_ways_of_running(run, flags):
    status, result = run(*flags)
    assert status == 0, result
    assert 0 <= result['top1'] <= 100


def test_averaged_weights_are_used_when_asked_for(run, tmp_path, image_folder):
    for name, count in (('blue', 5), ('green', 3), ('red', 1)):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for index in range(count):
            shutil.copy(image_folder / 'validation' / name / f'{index}.png', tmp_path / 'data' / name)
    state = timm.create_model('test_resnet', num_classes=3).state_dict()
    state['fc.weight'] = torch.zeros_like(state['fc.weight'])
    blue, green = ({**state, 'fc.bias': torch.eye(3)[index]} for index in (0, 1))
    torch.save({'state_dict': blue, 'state_dict_ema': green}, tmp_path / 'both.pth')
    both = dict(data=tmp_path / 'data', weights=tmp_path / 'both.pth')
    assert run(**both)[1]['top1'] == pytest.approx(100 * 5 / 9, abs=1e-3)
    assert run('--use-ema', **both)[1]['top1'] == pytest.approx(100 * 3 / 9, abs=1e-3)


# Several models


def test_folder_of_checkpoints(run, tmp_path, checkpoint):
    shutil.copy(checkpoint, tmp_path / 'epoch-2.pth')
    shutil.copy(checkpoint, tmp_path / 'epoch-10.pth.tar')
    status, results = run('--results-file', tmp_path / 'r.csv', weights=tmp_path)
    assert status == 0
    assert [Path(result['checkpoint']).name for result in results] == ['epoch-2.pth', 'epoch-10.pth.tar']
    with (tmp_path / 'r.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row['top1']) for row in rows] == [result['top1'] for result in results]


def test_models_that_do_not_fit_are_left_out(run, capsys):
    status, results = run(model='test_vit, test_resnet')
    assert status == 0 and [result['model'] for result in results] == ['test_resnet']


def test_patterns_mean_models_with_weights(validate):
    parse = validate.validate_parser().resolve
    found = [name for name, _ in validate.select(parse(['-m', 'test_r*,resnet18']))]
    assert found == ['test_resnet.r160_in1k', 'resnet18']
    found = validate.select(parse(['-m', 'coc_small*', '--checkpoint', 'x.pth']))
    assert found == [('coc_small', 'x.pth')]
    everything = [name for name, _ in validate.select(parse(['-m', 'all']))]
    assert len(everything) > 500 and not any('in21k' in name for name in everything if name.endswith('in21k'))


def test_file_of_models(validate, tmp_path):
    (tmp_path / 'names.txt').write_text('resnet18\n\nresnet34\n')
    args = validate.validate_parser().resolve(['-m', str(tmp_path / 'names.txt')])
    assert validate.select(args) == [('resnet18', ''), ('resnet34', '')]


def test_result_files(run, tmp_path):
    for name, flags in (('r.json', []), ('r.txt', ['--results-format', 'json'])):
        result = run('--results-file', tmp_path / name, *flags)[1]
        assert json.loads((tmp_path / name).read_text()) == [result]
    result = run('--results-file', tmp_path / 'r.txt')[1]
    with (tmp_path / 'r.txt').open() as file:
        [row] = csv.DictReader(file)
    assert {name: str(value) for name, value in result.items()} == row


def test_smaller_batches_when_memory_runs_out(validate, monkeypatch):
    tried = []

    def measure(args):
        tried.append(args.batch_size)
        if args.batch_size > 3:
            raise torch.OutOfMemoryError('no')
        return {'top1': 1.0}

    monkeypatch.setattr(validate, 'measure', measure)
    args = argparse.Namespace(batch_size=8, device='cpu', model='a')
    assert validate.measure_retrying(args) == {'top1': 1.0}
    assert tried == sorted(tried, reverse=True) and tried[0] == 8 and tried[-1] <= 3


# Errors


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (dict(model='test_resnett'), 'did you mean test_resnet'),
        (dict(model='no_such_*'), 'no_such_*'),
        (dict(model=str(ROOT / 'docs')), f'use --model local-dir:{ROOT / "docs"}'),
        (dict(model='cspresnet50d', weights=None), 'No pretrained weights'),
        (dict(data='/no/such/folder'), '/no/such/folder does not exist'),
        (dict(weights='none.pth'), 'none.pth'),
        (dict(model='test_vit'), 'does not fit'),
        (dict(weights=ROOT / 'tests'), 'no .pth.tar'),
    ],
    ids=str,
)
def test_errors_are_one_line(run, flags, message):
    status, error = run(**flags)
    assert status == 2 and error.startswith('error: ') and error.count('\n') == 1 and message in error


def test_data_with_other_classes_than_the_model(run, image_folder, tmp_path):
    shutil.copytree(image_folder / 'train', tmp_path / 'train')
    shutil.rmtree(tmp_path / 'train' / 'blue')
    status, error = run('--split', 'train', data=tmp_path)
    assert status == 2 and 'The dataset has 2 classes' in error and '--class-map' in error
    assert '--num-classes' not in error


def test_weights_that_are_nowhere(run):
    status, error = run(model='coc_small', weights=None)
    assert status == 2 and error.startswith('error: No pretrained weights for coc_small.in1k')
    assert 'cluster-zoo import FILE --as coc_small.in1k' in error


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--valid-labels', 'none.txt'], '--valid-labels'),
        (['--real-labels', 'none.json'], '--real-labels'),
        (['--num-gpu', 2], '--num-gpu'),
        (['--split', 'test'], 'test'),
        (['--torchcompile', 'no_backend'], '--torchcompile'),
        (['--device', 'cdua'], '--device'),
    ],
    ids=lambda value: str(value),
)
def test_options_that_can_not_be_met(run, flags, message):
    status, error = run(*flags)
    assert status == 2 and error.startswith('error: ') and error.count('\n') == 1 and message in error


@pytest.mark.parametrize('batch', [1, 4, 15])
def test_unreadable_image(run, image_folder, tmp_path, outputs, batch):
    """The accuracy is that of the other images."""
    shutil.copytree(image_folder / 'validation', tmp_path / 'data')
    (tmp_path / 'data' / 'red' / '1.png').write_bytes(b'')
    result = run('--use-train-size', '-b', batch, data=tmp_path / 'data')[1]
    logits, labels = outputs
    kept = [index for index in range(15) if index != 11]  # blue, green, red with five images each
    expected = 100 * (logits.argmax(1) == labels)[kept].float().mean().item()
    assert (result['images'], result['unreadable']) == (14, 1) and result['top1'] == pytest.approx(expected, abs=1e-3)
    means = run('--use-train-size', '-b', batch, '--metrics-avg', 'micro', data=tmp_path / 'data')[1]
    assert means['micro_recall'] == pytest.approx(expected, abs=1e-3)
    status, error = run('--strict', data=tmp_path / 'data')
    assert status == 2 and 'red/1.png' in error


def test_published_command(tmp_path, image_folder):
    """The command of the papers in its own process, with a checkpoint in the format of timm 0.6."""
    model = timm.create_model('coc_tiny', num_classes=3)
    state = {f'module.{name}': value for name, value in model.state_dict().items()}
    torch.save({'state_dict': state, 'args': argparse.Namespace(), 'epoch': 3}, tmp_path / 'coc_tiny.pth.tar')
    command = [image_folder, '--model', 'coc_tiny', '-b', 128, '--checkpoint', tmp_path / 'coc_tiny.pth.tar']
    small = ['--num-classes', 3, '--img-size', 32, '-j', 0]
    done = subprocess.run(
        [sys.executable, 'validate.py', *map(str, command), *map(str, small)],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(
        r'coc_tiny: top-1 \S+ %  top-5 100.00 %  15 images  5.25 M parameters  \S+ images/s\n--result\n', done.stdout
    )


# Checkpoints of train.py

ODD = [
    '--crop-pct',
    0.7,
    '--mean',
    0.2,
    0.3,
    0.4,
    '--std',
    0.5,
    0.2,
    0.3,
    '--interpolation',
    'bilinear',
    '--img-size',
    40,
]


@pytest.fixture(scope='module')
def trained(train, image_folder, tmp_path_factory):
    """Trains a few updates; returns the folder of the run and the accuracies in percent that it wrote."""

    def _trained(*flags, data=image_folder):
        parent = tmp_path_factory.mktemp('runs')
        line = [data, '--model', 'test_resnet', '--num-classes', 3, '-j', 0, '-b', 14, '--epochs', 2, '--lr', 0.05]
        line += ['--device', 'cpu', '--output', parent, '--experiment', 'a', *flags]
        assert train.main(list(map(str, line))) == 0
        with (parent / 'a' / 'summary.csv').open() as file:
            return parent / 'a', {k: float(v) for k, v in list(csv.DictReader(file))[-1].items() if 'eval' in k}

    return _trained


def _validate(validate, capsys, *flags):
    status = validate.main(list(map(str, [*flags, '--device', 'cpu', '-j', 0])))
    out, error = capsys.readouterr()
    return dict(json.loads(out.partition('--result\n')[2]), line=out.partition('\n')[0]) if status == 0 else error


@pytest.mark.parametrize(
    'flags, ema',
    [
        (ODD, False),
        ([*ODD, '--model-ema', '--model-ema-decay', 0.6], True),
        (['--img-size', 32, '--bn-eps', 0.5, '--gp', 'max'], False),
        (['--model', 'dnc_resnet18_cifar', '--sub-centroids', 2, '--warmup-epochs', 1], False),
        (['--in-chans', 1, '--input-size', 1, 32, 48, '--model-kwargs', 'stem_width=16'], False),
    ],
)
def test_a_checkpoint_of_train_py_needs_no_flags(trained, validate, image_folder, capsys, flags, ema):
    """The accuracy and the loss are those that the training logged."""
    folder, logged = trained(*flags)
    line = [image_folder, '--checkpoint', folder / 'last.pth.tar', *['--use-ema'] * ema]
    result = _validate(validate, capsys, *line)
    assert result['top1'] == pytest.approx(logged['eval_top1'], abs=1e-3)


def test_flags_win_over_the_checkpoint(trained, validate, image_folder, capsys):
    folder, _ = trained(*ODD)
    line = [image_folder, '--checkpoint', folder / 'last.pth.tar']
    result = _validate(validate, capsys, *line)
    assert (result['img_size'], result['crop_pct'], result['interpolation']) == (40, 0.7, 'bilinear')
    result = _validate(validate, capsys, *line, '--img-size', 64, '--crop-pct', 1)
    assert (result['img_size'], result['crop_pct'], result['interpolation']) == (64, 1.0, 'bilinear')


def test_held_out_images_of_a_checkpoint(trained, validate, image_folder, capsys):
    folder, logged = trained('--val-fraction', 0.3, '--seed', 5, '--img-size', 32, data=image_folder / 'train')
    result = _validate(validate, capsys, image_folder / 'train', '--checkpoint', folder / 'last.pth.tar')
    assert result['top1'] == pytest.approx(logged['eval_top1'], abs=1e-3)


def test_held_out_images_of_a_folder_that_has_changed(trained, validate, image_folder, tmp_path, capsys, caplog):
    """The checkpoint names them, so new images and removed ones change nothing else."""
    data = tmp_path / 'data'
    shutil.copytree(image_folder / 'train', data / 'train')
    folder, logged = trained('--val-fraction', 0.3, '--seed', 5, '--img-size', 32, data=data)
    checkpoint = folder / 'last.pth.tar'
    for name in ('red', 'green', 'blue'):
        for path in (data / 'train' / name).glob('1*.png'):
            shutil.copy(path, path.with_name(f'new-{path.name}'))
    for flags in ([], ['--val-fraction', 0.3]):
        result = _validate(validate, capsys, data, '--checkpoint', checkpoint, *flags)
        assert result['top1'] == pytest.approx(logged['eval_top1'], abs=1e-3) and result['images'] == 12
        assert '12 held-out images' in result['line']
    held = torch.load(checkpoint, weights_only=True)['held_out'].split('\0')
    assert len(held) == 12 and 'lacks' not in caplog.text
    for name in held[:2]:
        (data / 'train' / name).unlink()
    assert _validate(validate, capsys, data, '--checkpoint', checkpoint)['images'] == 10
    assert 'lacks 2 of the 12 held-out images' in caplog.text
    shutil.rmtree(data / 'train' / 'blue')
    for name in held[2:]:
        (data / 'train' / name).unlink(missing_ok=True)
    error = _validate(validate, capsys, data, '--checkpoint', checkpoint)
    assert 'none of the 12 held-out images' in error and error.count('\n') == 1
    result = _validate(validate, capsys, data, '--checkpoint', checkpoint, '--split', 'train')  # has two of the classes
    assert result['images'] > 12 and 'held-out' not in result['line']


def test_multi_label_checkpoint(trained, validate, image_folder, tmp_path, capsys):
    rows = [f'{path.relative_to(image_folder)},{path.parent.name};x' for path in image_folder.rglob('*.png')]
    (tmp_path / 'labels.csv').write_text('\n'.join(['file,labels', *rows]))
    flags = ['--multi-label', tmp_path / 'labels.csv', '--num-classes', 4, '--img-size', 32]
    folder, logged = trained(*flags)
    line = [image_folder, '--checkpoint', folder / 'last.pth.tar']
    for given in ([], flags[:2]):
        result = _validate(validate, capsys, *line, *given)
        assert result['map'] == pytest.approx(logged['eval_map'], abs=1e-3) and 'top1' not in result
    only = [row for row in rows if 'blue' in row]  # the classes are numbered as in training
    (tmp_path / 'blue.csv').write_text('\n'.join(['file,labels', *only]))
    assert 'map' in _validate(validate, capsys, *line, '--multi-label', tmp_path / 'blue.csv')


def test_classes_are_those_of_the_checkpoint(trained, validate, image_folder, tmp_path, capsys):
    """A split with some of the classes, or others, is not numbered from 0 again."""
    folder, _ = trained('--img-size', 32, '--lr', 0.2)
    model = timm.create_model('test_resnet', num_classes=3)
    shutil.copytree(image_folder / 'validation', tmp_path / 'some')
    shutil.rmtree(tmp_path / 'some' / 'blue')
    line = ['--checkpoint', folder / 'last.pth.tar']
    whole = _validate(validate, capsys, image_folder, *line, '--metrics-avg', 'micro')
    some = _validate(validate, capsys, tmp_path / 'some', *line)
    for name in ('blue', 'green', 'red'):
        one = tmp_path / f'only {name}'
        shutil.copytree(image_folder / 'validation' / name, one / name)
    parts = [_validate(validate, capsys, tmp_path / f'only {n}', *line)['top1'] for n in ('blue', 'green', 'red')]
    assert sum(parts) / 3 == pytest.approx(whole['top1'], abs=1e-3)
    assert sum(parts[1:]) / 2 == pytest.approx(some['top1'], abs=1e-3)
    (tmp_path / 'some' / 'green').rename(tmp_path / 'some' / 'violet')
    assert "no class 'violet'" in _validate(validate, capsys, tmp_path / 'some', *line)
    assert model.num_classes == 3


def test_checkpoints_that_need_flags(trained, validate, image_folder, tmp_path, capsys):
    folder, _ = trained('--img-size', 32)
    saved = torch.load(folder / 'last.pth.tar', weights_only=True)
    torch.save(saved['state_dict'], tmp_path / 'bare.pth')
    error = _validate(validate, capsys, image_folder, '--checkpoint', tmp_path / 'bare.pth')
    assert all(flag in error for flag in ('does not name its model', '--model', '--num-classes', '--img-size'))
    assert 'no model given' in _validate(validate, capsys, image_folder)
    torch.save(saved | dict(arch='coc_tiny'), tmp_path / 'coc.pth')
    error = _validate(validate, capsys, image_folder, '--checkpoint', tmp_path / 'coc.pth', '--model', 'fec_small')
    assert 'its weights are of coc_tiny, which is not fec_small' in error


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(args=dict(model_kwargs=dict(pretrained_cfg_overlay='x'))), 'pretrained_cfg_overlay'),
        (dict(args=dict(model_kwargs=dict(checkpoint_path='/etc/passwd'))), 'checkpoint_path'),
        (dict(args=dict(num_classes=10**9)), 'num_classes'),
        (dict(args=dict(bn_eps='1')), 'bn_eps'),
        (dict(args=dict(multi_label=[1])), 'multi_label'),
        (dict(args=dict(val_fraction=[0.5])), 'val_fraction'),
        (dict(held_out=['red/1.png']), 'held_out'),
        (dict(data_config=dict(input_size=[3, 10**9, 10**9])), 'input_size'),
        (dict(data_config=dict(std=[0, 0, 0])), 'std'),
    ],
)
def test_options_of_a_hostile_checkpoint_are_refused(
    trained, validate, image_folder, tmp_path, capsys, change, message
):
    folder, _ = trained('--img-size', 32)
    saved = torch.load(folder / 'last.pth.tar', weights_only=True)
    change = {key: saved[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    torch.save(saved | change, tmp_path / 'hostile.pth')
    error = _validate(validate, capsys, image_folder, '--checkpoint', tmp_path / 'hostile.pth')
    assert 'was refused' in error and message in error and error.count('\n') == 1


@pytest.mark.parametrize('file', ['missing/results.csv', 'folder', 'file/results.csv'])
def test_results_file_is_checked_first(run, tmp_path, file, monkeypatch):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').write_text('')
    status, result = run('--results-file', tmp_path / file)
    if file == 'missing/results.csv':  # the folder is created
        assert status == 0 and (tmp_path / file).is_file()
    else:
        assert status == 2 and '--results-file' in result
    assert status == 0 or 'top-1' not in result


def test_data_is_checked_before_a_model_is_downloaded(validate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validate, 'measure', lambda args: pytest.fail('the model was built'))
    assert 'does not exist' in _validate(validate, capsys, tmp_path / 'nowhere', '--model', 'resnet18')
