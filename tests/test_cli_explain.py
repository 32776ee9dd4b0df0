"""cluster-zoo explain: its outputs, the choice of layers and classes, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
from PIL import Image

from cluster_zoo.cli import main
from cluster_zoo.datasets import create_dataset
from cluster_zoo.explain import anchor, cluster_maps, draw_page, explain_image
from cluster_zoo.weights.importing import write_folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = create_dataset('cluster_zoo/cifar10_sample')
    (tmp_path / 'photos').mkdir()
    for index in range(3):
        sample[index * 100][0].save(tmp_path / 'photos' / f'{index}.png')
    return tmp_path / 'photos'


def run(*argv):
    try:
        return main(['explain', *map(str, argv), '--device', 'cpu'])
    except SystemExit as error:
        return error.code


def test_default_page(photos, capsys):
    """One page of the bundled photograph, as the functions of Python draw it."""
    assert run() == 0
    out = capsys.readouterr().out.splitlines()
    assert 'cat.jpg: cat ' in out[0] and out[0].endswith('at 96 x 64 pixels') and out[1:] == ['explain.png']
    model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).eval()
    with Image.open(out[0].partition(':')[0]) as image, Image.open('explain.png') as figure:
        assert figure.tobytes() == draw_page([explain_image(model, image)]).tobytes()


def test_several_images(photos, capsys):
    assert run('photos', '-o', 'figure.png') == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(':')[0] for line in out] == [f'photos/{index}.png' for index in range(3)] + ['figure.png']
    assert 'airplane' in out[0]
    with Image.open('figure.png') as figure:
        assert figure.width == 16 + 6 * 316


def test_all_outputs(photos, capsys):
    options = ('--segments', 3, '--class', 'ship', '--stage', 1, '--head', 2)
    assert run('photos/0.png', '-o', 'a.jpg', '--html', 'a.html', '--gif', 'a.gif', '--json', *options) == 0
    captured = capsys.readouterr()
    assert captured.err.split() == ['a.jpg', 'a.gif', 'a.html']
    data = json.loads(captured.out)
    (image,) = data['images']
    assert data['model'] == 'coc_tiny_plain.cifar10' and image['name'] == 'photos/0.png'
    assert image['contributions'][0]['label'] == 'ship' and list(image['segments']) == ['3']
    model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True)
    with Image.open('photos/0.png') as photo:
        maps = cluster_maps(model, photo)
    for layer, found in zip(image['layers'], maps.maps, strict=True):
        assert np.array_equal(layer['center'], found.center[0].reshape(found.heads, -1))
    with Image.open('a.gif') as film:
        assert film.n_frames == 1 + 14
    page = (photos.parent / 'a.html').read_text(encoding='utf-8')
    assert '"ship"' in page and 'data:image/jpeg;base64,' in page
    assert not (photos.parent / 'explain.png').exists()


def test_centroids(photos, capsys):
    model = timm.create_model('dnc_resnet18_cifar', num_classes=10)
    anchor(model, create_dataset('cluster_zoo/cifar10_sample').subset(range(0, 1000, 20)))
    folder = photos.parent / 'folder'
    folder.mkdir()
    write_folder(model, folder, 'folder', {})
    assert run('photos/0.png', '--model', 'folder', '--html', 'a.html', '-o', 'explain.png') == 0
    with Image.open('explain.png') as figure:
        assert figure.width > 400
    assert 'Nearest training images' in (photos.parent / 'a.html').read_text(encoding='utf-8')
    assert run('photos/0.png', '--model', 'folder', '--gif', 'a.gif') == 2
    assert '--gif is for models with clusters, which local-dir:folder does not have' in capsys.readouterr().err
    assert run('photos/0.png', '--model', 'folder', '--class', '3') == 2
    assert '--class is for models with a linear classifier' in capsys.readouterr().err


def test_one_center(photos, capsys):
    """The first image is among the images that are searched, and has the members of the center."""
    assert run('photos', '--center', 1, 0, 2, 5, '-o', 'center.png') == 0
    *lines, output = capsys.readouterr().out.splitlines()
    similarities = [float(re.search(r'similarity (-?[\d.]+) at', line)[1]) for line in lines]
    assert len(lines) == 3 and similarities == sorted(similarities, reverse=True) and output == 'center.png'
    assert any(line.startswith('photos/0.png: similarity ') for line in lines)
    with Image.open('center.png') as figure:
        assert figure.width > 760 + 3 * 150


def test_unreadable_images_do_not_stop_the_others(photos, capsys):
    (photos / '1.png').write_text('text')
    assert run('photos', 'nothing.png', '--json') == 1
    captured = capsys.readouterr()
    errors = [
        'error: photos/1.png: not an image, or an unsupported format',
        'error: nothing.png: no such file or folder',
    ]
    assert captured.err.splitlines() == errors
    images = json.loads(captured.out)['images']
    assert [one['name'] for one in images] == ['photos/0.png', 'photos/2.png', 'photos/1.png', 'nothing.png']
    assert 'error' in images[2] and 'layers' in images[0]


def test_many_images(photos, capsys):
    for index in range(3, 20):
        shutil.copy(photos / '0.png', photos / f'{index}.png')
    assert run('photos') == 0
    assert '4 further images are left out' in capsys.readouterr().err


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nothing.png'], 'nothing.png: no such file or folder'),
        (['text.png'], 'text.png: not an image'),
        (['narrow.png'], 'narrow.png: too narrow: 1000 x 2 pixels'),
        (['photos', '--model', 'resnet'], 'has no clusters and no centroids'),
        (['photos', '--output', 'missing/figure.png'], 'the folder'),
        (['photos', '--html', 'missing/figure.html'], 'the folder'),
        (['photos', '--class', 'shop'], 'no such class (did you mean ship?)'),
        (['photos', '--class', '10'], 'no such class. Give a name or 0 to 9'),
        (['photos', '--stage', '4'], 'no stage 4: expected -4 to 3'),
        (['photos', '--stage', '3', '--block', '2'], 'no block 2: expected -2 to 1'),
        (['photos', '--head', '4'], 'no head 4: expected -4 to 3'),
        (['photos', '--size', '20'], '--size 20: expected at least 32 pixels'),
        (['photos', '--gif', 'a.gif'], '--gif is for one image'),
        (['photos', '--segments', '3'], '--segments is for one image'),
        (['photos', '--segments', '0'], '0 is not a whole number'),
        (['photos', '--center', '1', '0', '2', '-1'], 'expected stage, block (or pool), head and center'),
        (['photos', '--center', '1', '0', '2', '16'], 'no center 16: expected 0 to 15'),
        (['photos', '--center', '1', 'pool', '0', '3'], 'no cluster pooling into stage 1'),
        (['photos', 'text.png', '--center', '1', '0', '2', '5'], 'text.png: not an image'),
        (['photos', 'nothing.png', '--center', '1', '0', '2', '5'], 'nothing.png: no such file'),
        (['photos', '--center', '1', '0', '2', '5', '--json'], '--center writes a figure'),
    ],
)
def test_errors(photos, capsys, argv, message):
    (photos.parent / 'text.png').write_text('text')
    Image.new('RGB', (1000, 2)).save(photos.parent / 'narrow.png')
    (photos.parent / 'resnet').mkdir()
    write_folder(timm.create_model('test_resnet', num_classes=2), photos.parent / 'resnet', 'resnet', {})
    status, error = run(*argv), capsys.readouterr().err
    assert status == 2 and error.startswith('error: ') and message in error and 'Traceback' not in error
    assert not (photos.parent / 'explain.png').exists()
