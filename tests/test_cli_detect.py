"""cluster-zoo detect predict: pictures, JSON, exit status and errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_detection_prediction import ARGUMENTS, save

from cluster_zoo.cli import main
from segmentation.detection import create_detector, load_trained

rle = pytest.importorskip('faster_coco_eval.core.mask')


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The current folder, with a checkpoint, and with two images in and below photos."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save('last.pth.tar', create_detector('mask_rcnn', **ARGUMENTS))
    rng = np.random.default_rng(0)
    (tmp_path / 'photos' / 'deep').mkdir(parents=True)
    for name, size in (('a.jpg', (48, 40)), ('deep/b.png', (33, 50))):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(tmp_path / 'photos' / name)
    return tmp_path


def call(*words):
    return main(['detect', 'predict', *map(str, words), '--device', 'cpu'])


def test_pictures_and_json(files, capsys):
    assert call('photos', '--checkpoint', 'last.pth.tar', '--threshold', 0, '--json', 'found.json') == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('last.pth.tar: 2 classes') and lines[1].startswith('photos/a.jpg: objects/a.png: ')
    found = json.loads((files / 'found.json').read_text())
    assert found['classes'] == ['cat', 'bird'] and len(found['images']) == 2
    record = found['images'][1]
    assert record['picture'] == 'objects/deep/b.png' and sum(record['counts'].values()) == len(record['objects']) == 8
    picture, image = (Image.open(files / record[name]) for name in ('picture', 'image'))
    assert picture.size == image.size == (record['width'], record['height']) == (33, 50)
    assert np.asarray(picture).tolist() != np.asarray(image).tolist()
    for one, expected in zip(record['objects'], load_trained('last.pth.tar').predict(image, 0), strict=True):
        assert (one['index'], one['score'], tuple(one['box'])) == (expected.label, expected.score, expected.box)
        assert one['label'] == ['cat', 'bird'][one['index'] - 1]
        mask = rle.decode(one['segmentation'])
        assert np.array_equal(mask, expected.full_mask((50, 33)).numpy()) and one['area'] == mask.sum()


def test_no_objects_and_unreadable_images(files, capsys):
    (files / 'photos' / 'c.png').write_bytes(b'no image')
    assert call('photos', '--checkpoint', 'last.pth.tar', '--threshold', 1, '--json') == 1
    out, err = capsys.readouterr()
    images = json.loads(out)['images']
    assert err.count('\n') == 1 and 'photos/c.png' in err and 'error' in images[1]
    assert images[0]['objects'] == [] and (files / 'objects' / 'a.png').is_file()


@pytest.mark.parametrize(
    'words, message',
    [
        (['photos'], 'no --checkpoint given'),
        (['photos', '--checkpoint', 'last.pth.tar', '--threshold', 2], '--threshold must be from 0 to 1'),
        (['photos', '--checkpoint', 'last.pth.tar', '--min-size', 0], '--min-size must be at least 1'),
        (['photos', '--checkpoint', 'missing.pth'], 'missing.pth'),
        (['photos', '--checkpoint', 'last.pth.tar', '--detector', 'mask_rcn'], 'did you mean mask_rcnn'),
        (['nothing', '--checkpoint', 'last.pth.tar'], 'no image to process'),
        (['photos', '--checkpoint', 'last.pth.tar', '--output', 'photos/a.jpg'], '--output photos/a.jpg'),
    ],
)
def test_errors(files, capsys, words, message):
    assert call(*words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: ') and message in error
