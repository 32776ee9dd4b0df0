"""Segmenters loaded from checkpoints and by name, with their classes, normalization and test protocol."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import segmentation
from cluster_zoo.errors import CheckpointError, OptionError
from segmentation.data.classes import CAMVID, pascal_colours
from segmentation.engine import trained as module
from segmentation.models.published_systems import segmenter_config

ROOT = Path(__file__).parents[1]
SIZES = dict(channels=8, output_stride=8)
OPTIONS = dict(head='fcn', backbone='test_resnet', num_classes=3, channels=8, model_kwargs=dict(output_stride=8))


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint of segmentation/train.py with options, and returns its path and its model."""

    def _save(count=3, extra=None, **options):
        torch.manual_seed(0)
        model = segmentation.create_segmenter('fcn', 'test_resnet', count, **SIZES).eval()
        args = OPTIONS | dict(num_classes=count, dataset='folder', data='/nowhere') | options
        path = tmp_path / 'last.pth.tar'
        torch.save(dict(state_dict=model.state_dict(), args=args) | (extra or {}), path)
        return path, model

    return _save


@pytest.fixture(scope='module')
def image():
    return torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_checkpoint_alone_is_enough(save, image):
    path, model = save(extra=dict(label_names=['sky', 'road', 'tree']), test_mode='whole')
    found = segmentation.load_trained(path)
    assert found.classes.names == ('sky', 'road', 'tree') and not found.model.training
    assert np.array_equal(found.classes.colours, pascal_colours(3))
    assert found.options == dict(mode=None, pad=False) and 'only ones' in found.weights
    assert torch.equal(found.predict(image), segmentation.predict(model, image))


def test_protocol_of_the_checkpoint(save, image):
    path, model = save(
        **dict(test_mode='slide', test_crop=[32, 24], test_stride=[20], test_pad=True, test_scale=[60, 40]),
        **dict(test_multiple=8, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]),
    )
    found = segmentation.load_trained(path)
    options = dict(mode='slide', crop=(32, 24), stride=20, pad=True, scale=[60, 40], multiple=8)
    options |= dict(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    assert found.options == options
    assert torch.equal(found.predict(image, flip=True), segmentation.predict(model, image, flip=True, **options))


def test_a_model_folder_has_classes_and_protocol(save, image, tmp_path):
    _, model = save()
    options = dict(mode='slide', crop=[32, 24], stride=20, pad=True, scale=[60, 40], multiple=8)
    images, colors = dict(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]), [[9, 0, 0], [0, 9, 0], [0, 0, 9]]
    names = ['sky', 'road', 'tree']
    segmentation.save_pretrained(model, tmp_path / 'model', label_names=names, colors=colors, test=options, **images)
    name = f'local-dir:{tmp_path / "model"}'
    found = segmentation.load_trained(name=name)
    assert found.classes.names == tuple(names) and found.classes.colours.tolist() == colors
    options |= dict(crop=(32, 24))
    assert torch.equal(found.predict(image), segmentation.predict(model, image, **options, **images))
    given = SimpleNamespace(given=['test_crop'], test_mode='slide', test_crop=[16], test_stride=[16])
    options = dict(mode='slide', crop=16, stride=16, scale=[60, 40], multiple=8)
    found = segmentation.load_trained(name=name, given=given)
    assert torch.equal(found.predict(image), segmentation.predict(model, image, **options, **images))


@pytest.mark.parametrize('names', [[], ['a', 'b'], ['a', 'b', 3], 'abc', None])
def test_numbers_for_classes_without_names(save, names):
    path, _ = save(extra=dict(label_names=names))
    assert segmentation.load_trained(path).classes.names == ('0', '1', '2')


def test_classes_of_a_dataset(save):
    path, _ = save(11, dataset='camvid')
    assert segmentation.load_trained(path).classes == CAMVID


def test_averaged_weights(save, image):
    path, model = save()
    content = torch.load(path, weights_only=True)
    averaged = {name: value + 1 for name, value in content['state_dict'].items()}
    torch.save(content | dict(state_dict_ema=averaged), path)
    one, other = (segmentation.load_trained(path, use_ema=use_ema) for use_ema in (False, True))
    name, value = next(iter(model.named_parameters()))
    assert torch.equal(one.model.get_parameter(name), value)
    assert torch.equal(other.model.get_parameter(name), value + 1)


def test_a_published_system(monkeypatch, image):
    """Pretrained weights, which are not here, are those of `create_segmenter`."""
    asked = []

    def create(name, **options):
        asked.append((name, options))
        return segmentation.create_segmenter('fcn', 'test_resnet', 150, **SIZES)

    monkeypatch.setattr(module, 'create_segmenter', create)
    found = segmentation.load_trained(name='condnet_r50_ade20k')
    assert asked == [('condnet_r50_ade20k', dict(pretrained=True))]
    assert found.classes.names[:2] == ('wall', 'building') and len(found.classes.names) == 150
    config = segmenter_config('condnet_r50_ade20k')
    assert found.options['mode'] == ('slide' if config.test_mode == 'slide' else None)
    assert found.options['scale'] == list(config.scale) and found.predict(image).shape == (40, 50)


def test_the_authors_file_of_a_published_system(tmp_path):
    name = 'region_proxy_vit_ti16_ade20k'
    model, config, path = segmentation.create_segmenter(name), segmenter_config(name), tmp_path / 'proxy.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    found = segmentation.load_trained(path, name)
    first, value = next(iter(model.named_parameters()))
    assert torch.equal(found.model.get_parameter(first), value) and found.classes.names[0] == 'wall'
    assert (found.options['mode'], found.options['crop']) == (config.test_mode, config.crop) == ('slide', 512)
    assert (found.options['stride'], found.options['pad']) == (config.test_stride, config.test_pad)
    with pytest.raises(OptionError, match=r'proxy\.pth does not name its model: .*--model'):
        segmentation.load_trained(path)


def test_unknown_names():
    with pytest.raises(OptionError, match=r'^--model condnet_r50_ade20: There is no head .*condnet_r50_ade20k'):
        segmentation.load_trained(name='condnet_r50_ade20')
    with pytest.raises(OptionError, match='name a checkpoint'):
        segmentation.load_trained()
    with pytest.raises(CheckpointError):  # no downloads in tests
        segmentation.load_trained(name='condnet_r50_ade20k')


def test_bad_checkpoints(save, tmp_path):
    with pytest.raises(CheckpointError, match='missing'):
        segmentation.load_trained(tmp_path / 'missing.pth')
    (tmp_path / 'damaged.pth').write_bytes(b'PK\3\4 no zip')
    with pytest.raises(CheckpointError, match='damaged'):
        segmentation.load_trained(tmp_path / 'damaged.pth')
    torch.save(dict(state_dict=torch.nn.Linear(2, 2).state_dict()), tmp_path / 'linear.pth')
    with pytest.raises(CheckpointError, match='of a classifier'):
        segmentation.load_trained(tmp_path / 'linear.pth')
    path, _ = save(head='fnc')
    with pytest.raises(OptionError, match=r'last\.pth\.tar: its options: .*did you mean fcn'):
        segmentation.load_trained(path)


@pytest.mark.parametrize(
    'options',
    [
        dict(test_mode='slide'),
        dict(test_mode='slide', test_crop=['a']),
        dict(test_mode='slide', test_crop=3),
        dict(test_multiple='x'),
        dict(num_classes='3'),
        dict(model_kwargs='abc'),
        dict(segmenter=3),
        dict(head='fcn', num_classes=0),
    ],
)
def test_options_of_untrusted_files(save, options):
    path, _ = save(**options)
    with pytest.raises(OptionError) as error:
        segmentation.load_trained(path)
    assert '\n' not in str(error.value)


def test_bundled_segmenter_on_a_street():
    """A test image of CamVid and its labels. A mask of the most frequent class alone would be right at 28 %."""
    trained = segmentation.load_trained(name='semantic_fpn_coc_tiny.camvid')
    assert trained.classes.names == CAMVID.names and np.array_equal(trained.classes.colours, CAMVID.colours)
    labels = np.asarray(Image.open(ROOT / 'tests' / 'street_labels.png'))
    mask = trained.predict(Image.open(ROOT / 'docs' / 'figures' / 'street.jpg')).numpy()
    labeled = labels < 11
    assert mask.shape == labels.shape and (mask == labels)[labeled].mean() > 0.75
    counts = np.bincount(labels[labeled])
    assert counts.max() / counts.sum() == pytest.approx(0.28, abs=0.005)
