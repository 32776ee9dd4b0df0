"""cluster_zoo.cli: what the demo prints and draws, conventional options, exit codes and errors."""

import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from cluster_zoo import __version__, cli
from cluster_zoo.cli import demo
from cluster_zoo.data import create_dataset
from cluster_zoo.weights import CheckpointError


@pytest.fixture
def small_model(monkeypatch):
    """A small network with random weights in the place of the bundled one."""
    torch.manual_seed(0)
    model = timm.create_model(
        'coc_tiny', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), mlp_ratios=(2, 2, 2, 2), regions=1, num_classes=10,
        pretrained_cfg_overlay=dict(input_size=(3, 32, 32), crop_pct=1.0),
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: asked.append((name, pretrained)) or model)
    yield model
    assert asked == [('coc_tiny_plain.cifar10', True)]


def test_demo(small_model, tmp_path, capsys):
    picture = tmp_path / 'demo.png'
    assert cli.main(['demo', '--output', str(picture), '--device', 'cpu']) == 0
    out, err = capsys.readouterr()
    assert err == ''

    # The printed accuracy against one that is counted apart, image by image.
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(small_model))
    with torch.inference_mode():
        right = sum(
            int(small_model(transform(image).unsqueeze(0)).argmax()) == target
            for image, target in create_dataset(demo.DEMO_DATASET)
        )
    assert f'top-1 {right / 10:.1f} % of 1000' in out
    assert re.search(r'\d+ images/s', out)
    lines = re.findall(r'^(\w+)/\d{5}\.png +(\w+) +\w+ +\d+\.\d %$', out, re.MULTILINE)
    assert len(lines) == 10 and all(folder == is_name for folder, is_name in lines)
    assert str(picture) in out
    with Image.open(picture) as image:
        assert image.format == 'PNG' and image.width > 10 * 100 and image.height > 4 * 100


@pytest.mark.parametrize('arguments', [['--help'], ['demo', '--help'], ['--version']])
def test_information_goes_to_standard_output(arguments, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    assert status.value.code == 0
    out, err = capsys.readouterr()
    assert err == '' and (__version__ if arguments == ['--version'] else 'usage: cluster-zoo') in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'COMMAND'),
        (['dmeo'], 'dmeo'),
        (['demo', '--output', 'nowhere/at/all.png'], 'there is no folder'),
        (['demo', '--output', 'picture.txt'], r'picture\.txt names no picture format'),
        (['demo', '--device', 'abacus'], 'can not run on abacus'),
    ],
)
def test_wrong_use(arguments, message, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    assert status.value.code == 2
    out, err = capsys.readouterr()
    assert out == '' and re.search(f'error: .*{message}', err)


def test_errors_are_one_message(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise CheckpointError('the weights are damaged')

    monkeypatch.setattr(timm, 'create_model', refuse)
    assert cli.main(['demo']) == 2
    assert capsys.readouterr() == ('', 'error: the weights are damaged\n')


def test_bundled_weights_are_as_good_as_the_readme_says(tmp_path, capsys):
    readme = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
    stated = float(re.search(r'([\d.]+) % of the 1,000\s+bundled images', readme).group(1))
    assert cli.main(['demo', '--output', str(tmp_path / 'demo.png'), '--device', 'cpu']) == 0
    printed = float(re.search(r'top-1 ([\d.]+) % of 1000', capsys.readouterr().out).group(1))
    assert abs(printed - stated) <= 0.3  # another machine may round a few images to the other side
