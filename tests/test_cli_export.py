"""The command cluster-zoo export: output and errors."""

import importlib.util
import json
import os
import re
import signal
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch

from cluster_zoo import cli

pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit.*is deprecated')  # the test's own calls


def _agree(model, run, shape):
    with torch.inference_mode():
        images = torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(run(images), model(images), rtol=0, atol=1e-4)


def test_command_with_the_bundled_weights(tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['export', 'coc_tiny_plain.cifar10', '--to', 'torchscript']) == 0
    out, err = capsys.readouterr()
    assert err == '' and not recwarn.list
    assert out.startswith('coc_tiny_plain.cifar10: 5.25 M parameters\ncoc_tiny_plain.cifar10.pt: 2')
    assert 'images: any from 64 px, in batches of any size' in out
    assert 'largest difference of a logit: ' in out and 'random' not in out
    model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).eval()
    _agree(model, torch.jit.load('coc_tiny_plain.cifar10.pt'), (2, 64, 64))


def test_random_weights_need_an_option(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(tmp_path / 'home'))
    command = ['export', 'dnc_resnet18_cifar', '--to', 'torchscript', '--output', str(tmp_path / 'model.pt')]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('error: ') and 'Traceback' not in err
    assert not (tmp_path / 'model.pt').exists()

    assert cli.main([*command, '--untrained', '--num-classes', '3', '--json']) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown['path'] == str(tmp_path / 'model.pt') and shown['name'] == 'dnc_resnet18_cifar'
    assert shown['sizes'] == dict(fixed=None, multiple=1, smallest=32)
    assert shown['format'] == 'torchscript' and shown['opset'] is None
    assert shown['difference'] <= 1e-4 and len(shown['checked']) == 4


def test_command_with_a_checkpoint(tmp_path, capsys):
    model = timm.create_model('dnc_resnet18_cifar', num_classes=3).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    command = ['export', 'dnc_resnet18_cifar', '--checkpoint', str(tmp_path / 'last.pth.tar'), '--to', 'torchscript']
    command += ['--output', str(tmp_path / 'model.pt'), '--img-size', '40', '48']
    assert cli.main(command) == 2 and 'does not fit' in capsys.readouterr().err
    assert cli.main([*command, '--num-classes', '3']) == 0
    assert 'images: 40 x 48 px, in batches' in capsys.readouterr().out
    assert cli.main([*command, '--num-classes', '3', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['sizes'] == dict(fixed=[40, 48], multiple=None, smallest=None)
    _agree(model, torch.jit.load(tmp_path / 'model.pt'), (1, 40, 48))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['no_such_model'], 'no_such_model'),
        (['coc_tiny', '--to', 'tflite'], 'tflite'),
        (['coc_tiny', '--untrained', '--checkpoint', 'x'], 'not allowed with'),
        (['coc_tiny', '--num-classes', '3'], '--num-classes needs --checkpoint'),
        (['coc_tiny', '--img-size', '1', '2', '3'], '--img-size takes'),
    ],
)
def test_invalid_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(['export', *arguments])
    assert status.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--output', 'nowhere/model.onnx'], 'There is no folder'),
        (['--output', '.'], 'is a folder'),
        (['--output', 'model.pt2'], 'has the suffix of another format'),
        (['--img-size', '31'], 'at least 32 px'),
        (['--opset', '17'], 'got 17'),
        (['--to', 'torchscript', '--checkpoint', 'nothing.pth'], 'nothing.pth'),
    ],
)
def test_invalid_requests_raise_one_line_before_the_model_is_built(options, message, tmp_path, monkeypatch, capsys):
    if '--opset' in options:
        pytest.importorskip('onnxruntime')
    if '--checkpoint' not in options:
        monkeypatch.setattr(timm, 'create_model', None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(['export', 'coc_tiny', *options]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('error: ') and message in err and err.count('\n') == 1


def test_a_missing_package_raises_before_the_model_is_built(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find(name))
    monkeypatch.setattr(timm, 'create_model', None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(['export', 'coc_tiny']) == 2
    assert "pip install 'cluster_zoo[onnx]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['local-dir:damaged'], r"'damaged/model\.safetensors' is truncated, damaged or .*"),
        (['no_json'], r"'no_json/config\.json' is damaged or not a model configuration .*"),
        (['local-dir:nowhere'], r"'nowhere' is no model folder: .*"),
        (['hf-hub:my-lab/nothing'], 'my-lab/nothing on the Hugging Face Hub .*'),
        (['coc_tiny', '--untrained', '--num-classes', str(10**15)], r"'coc_tiny' cannot be loaded: .*"),
    ],
)
def test_models_that_cannot_be_loaded(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    model = timm.create_model('resnet18', num_classes=3)
    timm.models.save_for_hf(model, 'damaged', safe_serialization=True)
    os.truncate('damaged/model.safetensors', 5000)
    Path('no_json').mkdir()
    Path('no_json/config.json').write_text('{')
    assert cli.main(['export', *arguments, '--to', 'torchscript', '--output', 'model.pt']) == 2
    out, err = capsys.readouterr()
    assert out == '' and re.fullmatch(f'error: {message}\n', err) and not Path('model.pt').exists()


def test_an_untrained_model_of_a_small_size(tmp_path, capsys):
    """The file is for the input size of the model, and the output names --img-size and the raised layer scales."""
    model = timm.create_model('coc_tiny', num_classes=3, depths=(1, 1, 1, 1))
    model.pretrained_cfg['input_size'] = (3, 32, 32)
    timm.models.save_for_hf(model, tmp_path / 'model', model_args=dict(depths=(1, 1, 1, 1)), safe_serialization=True)
    command = ['export', f'local-dir:{tmp_path}/model', '--to', 'torchscript', '--output', str(tmp_path / 'model.pt')]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert 'images: 32 x 32 px only' in out and '--img-size' in out
    assert '8 small layer scales raised' in out


def test_a_terminated_export_leaves_no_files(tmp_path, monkeypatch, capsys):
    def stop(scripted, path, **kwargs):
        Path(path).write_bytes(b'half')
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.jit, 'save', stop)
    command = ['export', 'coc_tiny', '--untrained', '--to', 'torchscript', '--output', str(tmp_path / 'model.pt')]
    with pytest.raises(SystemExit) as status:
        cli.main(command)
    assert status.value.code == 143 and list(tmp_path.iterdir()) == []
