"""cluster-zoo predict: output, exit status and errors."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from cluster_zoo import cli
from cluster_zoo.cli import predict as command
from cluster_zoo.datasets import create_dataset
from cluster_zoo.predict import load_classifier
from cluster_zoo.weights.importing import write_folder

CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """The first image of each class of the bundled sample, in a folder."""
    folder = tmp_path_factory.mktemp('images')
    dataset = create_dataset('cluster_zoo/cifar10_sample')
    for index in range(0, 1000, 100):
        image, target = dataset[index]
        image.save(folder / f'{CLASSES[target]}.png')
    return folder


def test_text(images, capsys):
    assert cli.main(['predict', str(images), '--top', '3', '--device', 'cpu']) == 0
    out, err = capsys.readouterr()
    assert err == ''
    about, out = out.split('\n', 1)
    assert about.startswith('coc_tiny_plain.cifar10: 10 classes of CIFAR-10 only (airplane, ')
    assert 'no --model is given' in about and all(name in about for name in CLASSES)
    found = re.findall(r'^(\S+)\n((?:  .+\n){3})', out, re.MULTILINE)
    assert [name for name, _ in found] == [str(images / f'{name}.png') for name in CLASSES]
    assert ''.join(f'{name}\n{classes}' for name, classes in found) == out
    right = 0
    for name, classes in found:
        percents, labels = zip(*re.findall(r'^ +(\d+\.\d) %  (\w+)$', classes, re.MULTILINE))
        assert sorted(map(float, percents), reverse=True) == list(map(float, percents)) and set(labels) < set(CLASSES)
        right += name.endswith(f'{labels[0]}.png')
    assert right >= 5  # of ten, where 83.7 % are expected


@pytest.mark.parametrize('command', ['predict', 'explain', 'export'])
def test_checkpoint_in_place_of_a_model_folder(images, tmp_path, capsys, command):
    (tmp_path / 'last.pth.tar').write_bytes(b'')
    (tmp_path / 'run').mkdir()
    for name, message in (('last.pth.tar', f'cluster-zoo import {tmp_path}/last.pth.tar --to'), ('run', 'config.json')):
        argv = [str(tmp_path / name)] if command == 'export' else [str(images), '--model', str(tmp_path / name)]
        with pytest.raises(SystemExit) as stop:
            cli.main([command, *argv])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_named_model_is_described_without_its_classes(images, capsys):
    assert cli.main(['predict', str(images / 'cat.png'), '--model', 'coc_tiny_plain.cifar10', '--top', '1']) == 0
    assert capsys.readouterr().out.startswith('coc_tiny_plain.cifar10: 10 classes of CIFAR-10\n')


def test_several_labels(images, tmp_path, capsys):
    """Each label has the sigmoid of its logit as its probability."""
    model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).eval()
    model.multi_label = True
    (tmp_path / 'folder').mkdir()
    write_folder(model, tmp_path / 'folder', 'folder', {}, label_names=CLASSES)
    assert 'an image can have several' in (tmp_path / 'folder' / 'README.md').read_text()
    argv = ['predict', str(images / 'cat.png'), '--model', str(tmp_path / 'folder'), '--top', '10', '--json']
    assert cli.main([*argv, '--device', 'cpu']) == 0
    found = json.loads(capsys.readouterr().out)
    assert 'an image can have several' in found['description']
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with Image.open(images / 'cat.png') as image, torch.inference_mode():
        expected = model(transform(image.convert('RGB')).unsqueeze(0))[0].sigmoid()
    for one in found['images'][0]['classes']:
        assert one['probability'] == pytest.approx(float(expected[one['index']]), abs=1e-5)


def test_json_matches_text(images, capsys):
    assert cli.main(['predict', str(images / 'cat.png'), str(images / 'dog.png'), '--top', '2', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['model'] == 'coc_tiny_plain.cifar10'
    assert [image['image'] for image in found['images']] == [str(images / 'cat.png'), str(images / 'dog.png')]
    assert cli.main(['predict', str(images / 'cat.png'), str(images / 'dog.png'), '--top', '2']) == 0
    printed = re.findall(r'(\d+\.\d) %  (\w+)', capsys.readouterr().out)
    ranked = [one for image in found['images'] for one in image['classes']]
    assert [(f'{100 * one["probability"]:.1f}', one['label']) for one in ranked] == printed
    assert all(CLASSES[one['index']] == one['label'] for one in ranked)
    assert all(image.keys() == {'image', 'classes'} for image in found['images'])


@pytest.mark.parametrize('form', ['text', 'json'])
def test_unreadable_images_are_reported_and_others_classified(form, images, tmp_path, capsys):
    (tmp_path / 'damaged.png').write_bytes((images / 'cat.png').read_bytes()[:100])
    names = [str(tmp_path / 'damaged.png'), str(images / 'cat.png'), str(tmp_path / 'missing.png')]
    assert cli.main(['predict', *names, *['--json'] * (form == 'json')]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f'error: {names[0]}: ') and 'truncated' in lines[0]
    assert lines[1].startswith(f'error: {names[2]}: no such file')
    if form == 'text':
        assert out.splitlines()[1] == names[1] and len(out.splitlines()) == 7
    else:
        found = json.loads(out)
        assert (found['num_classes'], found['trained_on']) == (10, 'CIFAR-10')
        assert 'no --model is given' in found['description']
        first, second, third = found['images']
        assert first.keys() == third.keys() == {'image', 'error'} and len(second['classes']) == 5


def test_unprintable_file_names(images, tmp_path):
    """Names outside the terminal's encoding and control characters are escaped, one line per name."""
    content = (images / 'cat.png').read_bytes()
    for name in (b'lat\xe9.png', 'ü.png'.encode(), b'new\nline.png', b'\x1b[31mred.png', b'dog\n.txt'):
        try:
            with open(os.path.join(os.fsencode(tmp_path), name), 'wb') as file:
                file.write(content)
        except OSError:
            pytest.skip('the file system refuses such names')
    names = [b'\x1b[31mred.png', b'lat\xe9.png', b'new\nline.png', 'ü.png'.encode(), b'no\nsuch\x07.png']
    run = subprocess.run(
        [sys.executable, '-m', 'cluster_zoo', 'predict', *names, '--top', '1', '--device', 'cpu'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONIOENCODING': 'ascii:strict', 'PYTHONPATH': os.pathsep.join(sys.path)},
        capture_output=True,
    )
    assert run.stderr.startswith(b'error: no\\nsuch\\x07.png: no such file') and run.stderr.count(b'\n') == 1
    assert run.returncode == 1
    printed = run.stdout.splitlines()[1:]
    assert printed[::2] == [b'\\x1b[31mred.png', b'lat\\udce9.png', b'new\\nline.png', b'\\xfc.png']
    assert len(printed) == 8 and len(set(printed[1::2])) == 1


def test_unprintable_labels(images, monkeypatch, capsys):
    model = load_classifier('coc_tiny_plain.cifar10')
    model.pretrained_cfg['label_names'] = ['a\nb', *'\x1b\x07\u202e\x9b\r', *'6789']
    monkeypatch.setattr(command, 'load_classifier', lambda name, device: model)
    assert cli.main(['predict', str(images / 'ship.png'), '--top', '10']) == 0
    out = capsys.readouterr().out
    assert r'%  a\nb' in out and r'\u202e' in out and out.replace('\n', '').isprintable() and out.count('\n') == 12


def test_addresses(images, capsys):
    assert cli.main(['predict', 'https://example.org/cat.png', str(images / 'cat.png'), '--top', '1']) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == str(images / 'cat.png') and out.count('\n') == 3
    assert err.startswith('error: https://example.org/cat.png: addresses are not supported')
    assert err.count('\n') == 1


def test_no_images_is_an_error_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, 'load_classifier', None)
    (tmp_path / 'notes.txt').touch()
    assert cli.main(['predict', str(tmp_path), str(tmp_path / 'missing.png'), '--json']) == 2
    out, err = capsys.readouterr()
    assert out == ''
    folder, missing, summary = err.splitlines()
    assert folder.startswith(f'error: {tmp_path}: no image')
    assert missing.startswith(f'error: {tmp_path}/missing.png: no such file')
    assert summary.startswith('error: ') and 'no image to classify' in summary


def test_standard_input(images, monkeypatch, capsys):
    content = (images / 'ship.png').read_bytes()
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(content)))
    assert cli.main(['predict', '-', '--json']) == 0
    piped = json.loads(capsys.readouterr().out)['images']
    assert cli.main(['predict', str(images / 'ship.png'), '--json']) == 0
    named = json.loads(capsys.readouterr().out)['images']
    assert piped[0]['image'] == '-' and piped[0]['classes'] == named[0]['classes']


def test_classes_without_names(images, monkeypatch, capsys):
    model = load_classifier('coc_tiny_plain.cifar10')
    del model.pretrained_cfg['label_names']
    monkeypatch.setattr(command, 'load_classifier', lambda name, device: model)
    assert cli.main(['predict', str(images / 'ship.png'), '--top', '10']) == 0
    printed = re.findall(r'%  class (\d)$', capsys.readouterr().out, re.MULTILINE)
    assert sorted(printed) == list('0123456789')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--model', 'coc_smal'], 'did you mean coc_small'),
        (['--model', 'coc_small.in2k'], r'coc_small\.in1k'),
        (['--model', 'timm/resnet18'], 'hf-hub:timm/resnet18'),
        (['--model', 'ftp:resnet18'], 'ftp'),
        (['--top', '0'], '0'),
        (['--batch-size', 'many'], 'many'),
        (['--device', 'abacus'], 'abacus'),
    ],
)
def test_invalid_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(['predict', 'cat.png', *arguments])
    out, err = capsys.readouterr()
    assert status.value.code == 2 and out == '' and re.search(f'^error: argument {arguments[0]}: .*{message}', err)


def test_weights_that_are_not_available(images, capsys):
    assert cli.main(['predict', str(images / 'cat.png'), '--model', 'coc_small.in1k']) == 2
    out, err = capsys.readouterr()
    assert out == '' and 'coc_small.in1k' in err
    assert 'CLUSTER_ZOO_AUTHORS=0' in err and 'cluster-zoo import FILE --as coc_small.in1k' in err


def test_folder_that_is_not_a_model(images, tmp_path, capsys):
    assert cli.main(['predict', str(images / 'cat.png'), '--model', f'local-dir:{tmp_path}']) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('error: ') and str(tmp_path) in err and 'config.json' in err


def test_out_of_memory(images, monkeypatch, capsys):
    def run_out(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(command, 'classify', run_out)
    assert cli.main(['predict', str(images / 'cat.png')]) == 2
    assert '--batch-size' in capsys.readouterr().err
