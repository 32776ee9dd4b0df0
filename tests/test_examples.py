"""examples/*.py run on tiny settings."""

import runpy
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

from cluster_zoo.cli.arguments import PHOTO
from cluster_zoo.datasets import create_dataset

EXAMPLES = Path(__file__).parents[1] / 'examples'


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name, *argv):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, argv)])
        runpy.run_path(str(EXAMPLES / name), run_name='__main__')
        return capsys.readouterr().out

    return run


def test_all_are_tested():
    names = {path.stem for path in EXAMPLES.glob('*.py')}
    assert names == {name.removeprefix('test_') for name in globals() if name.startswith('test_')} - {'all_are_tested'}


def test_classify(run):
    out = run('classify.py', PHOTO, 'missing.jpg')
    assert 'cat.jpg: cat ' in out and 'missing.jpg: no such file or folder' in out


def test_finetune(run):
    sample = create_dataset('cluster_zoo/cifar10_sample')
    for index in range(0, 400, 50):
        folder = Path('photographs', f'class {index // 200}')
        folder.mkdir(parents=True, exist_ok=True)
        sample[index][0].save(folder / f'{index}.png')
    out = run('finetune.py', 'photographs', '--epochs', 1, '--output', 'tuned')
    assert 'epoch 0: loss ' in out and 'tuned: 2 classes, class 0, class 1' in out
    model = timm.create_model('local-dir:tuned', pretrained=True)
    assert model.num_classes == 2 and list(model.pretrained_cfg['label_names']) == ['class 0', 'class 1']


def test_explain(run):
    out = run('explain.py', PHOTO, 'explained.png')
    assert out.startswith('cat: probability ') and 'without them' in out
    with Image.open(PHOTO) as photo, Image.open('explained.png') as sheet:
        assert sheet.size == (5 * photo.width, photo.height)


def test_segment(run):
    for kind in ('images', 'masks'):
        Path('streets/train', kind).mkdir(parents=True)
    for index in range(4):
        noise = Image.effect_noise((96, 64), 50)
        noise.convert('RGB').save(f'streets/train/images/{index}.jpg')
        noise.point(lambda value: value // 86).save(f'streets/train/masks/{index}.png')
    out = run('segment.py', 'streets', PHOTO, 'segmented.png', '--steps', 2, '--crop', 64)
    assert 'step 2: loss ' in out
    with Image.open('segmented.png') as overlay:
        assert overlay.width > 900
