"""segmentation.detection.coco: datasets in COCO's format, and what is wrong with them."""

import copy
import json
import logging
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from cluster_zoo.errors import DataError, OptionError
from segmentation.detection import coco

pytest.importorskip('faster_coco_eval')


def annotation(id, image, category, box, segmentation, **more):
    return dict(id=id, image_id=image, category_id=category, bbox=box, segmentation=segmentation, **more)


def counts(mask):
    """Uncompressed run-length encoding: columns first, lengths of runs that start with zeros."""
    flat = np.asarray(mask, np.uint8).T.flatten()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return dict(size=list(mask.shape), counts=[0, *runs] if flat[0] else runs)


MASK = np.zeros((24, 32), bool)
MASK[4:10, 20:29] = True
MASK[6, 22] = False  # a hole
CONTENT = dict(
    images=[
        dict(id=7, file_name='a.png', width=32, height=24),
        dict(id=3, file_name='b.jpg', width=20, height=30),
        dict(id=5, file_name='c.png', width=16, height=16),
    ],
    categories=[dict(id=9, name='cat'), dict(id=2, name='bird')],
    annotations=[
        annotation(1, 7, 9, [2, 3, 10, 8], [[2, 3, 12, 3, 12, 11, 2, 11]], area=80.0, iscrowd=0),
        annotation(2, 7, 2, [20, 4, 9, 6], counts(MASK), area=53.0),
        annotation(3, 3, 2, [0, 0, 20, 30], [[0, 0, 20, 0, 20, 30, 0, 30]]),
        annotation(4, 7, 2, [0, 12, 32, 12], counts(np.arange(24)[:, None].repeat(32, 1) >= 12), iscrowd=1),
    ],
)


@pytest.fixture
def data(tmp_path):
    """Three images, the last one without objects."""
    root = tmp_path / 'data'
    (root / 'annotations').mkdir(parents=True)
    (root / 'train').mkdir()
    rng = np.random.default_rng(0)
    for record in CONTENT['images']:
        pixels = rng.integers(0, 256, (record['height'], record['width'], 3), np.uint8)
        Image.fromarray(pixels).save(root / 'train' / record['file_name'])
    write(root, CONTENT)
    return root


def write(root, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / 'annotations' / 'instances_train.json').write_text(text)


def test_images_and_targets(data):
    dataset = coco.create_dataset(str(data), 'train')
    assert dataset.classes == ['bird', 'cat'] and len(dataset) == 3  # in the order of the ids
    image, target = dataset[0]
    assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0), Image.open(data / 'train' / 'a.png'))
    assert target['boxes'].tolist() == [[2, 3, 12, 11], [20, 4, 29, 10]] and target['labels'].tolist() == [2, 1]
    assert target['area'].tolist() == [80, 53] and target['iscrowd'].tolist() == [0, 0] and target['image_id'] == 7
    square = np.zeros((24, 32), bool)
    square[3:11, 2:12] = True
    assert target['masks'].dtype == torch.uint8
    assert np.array_equal(target['masks'], [square, MASK])
    assert dataset[1][1]['masks'].all() and dataset[1][1]['area'].tolist() == [600]
    _, empty = dataset[2]
    assert empty['boxes'].shape == (0, 4) and empty['masks'].shape == (0, 16, 16) and empty['labels'].shape == (0,)
    dataset.check()


def test_crowds_are_for_the_evaluation(data, caplog):
    coco.create_dataset(str(data), 'train')
    assert '1 annotations of crowds are left out of the training: annotation 4 of train/a.png' in caplog.text
    caplog.clear()
    _, target = coco.create_dataset(str(data), 'train', crowd=True)[0]
    assert target['iscrowd'].tolist() == [0, 0, 1] and not caplog.text
    assert target['masks'][2].sum() == 12 * 32


def test_a_tar_is_the_same(data, tmp_path):
    with tarfile.open(tmp_path / 'data.tar', 'w') as archive:
        archive.add(data, 'inside')
    folder, tar = (coco.create_dataset(str(path), 'train') for path in (data, tmp_path / 'data.tar'))
    for (image, target), (other_image, other) in zip(folder, tar):
        assert torch.equal(image, other_image)
        assert all(torch.equal(torch.as_tensor(target[name]), torch.as_tensor(other[name])) for name in target)


def test_boxes_alone_need_no_masks(data):
    content = copy.deepcopy(CONTENT)
    for entry in content['annotations']:
        del entry['segmentation']
    write(data, content)
    _, target = coco.create_dataset(str(data), 'train', masks=False)[0]
    assert 'masks' not in target and len(target['boxes']) == 2
    with pytest.raises(DataError, match=r'no valid segmentation \(detectors of boxes alone need none\)'):
        coco.create_dataset(str(data), 'train')


def test_transforms_move_boxes_and_masks(data):
    plain = coco.create_dataset(str(data), 'train')[0]
    image, target = coco.create_dataset(str(data), 'train', coco.train_transform(flip=1.0))[0]
    assert type(image) is torch.Tensor and type(target['boxes']) is torch.Tensor
    torch.testing.assert_close(image, plain[0].flip(-1).as_subclass(torch.Tensor) / 255)
    assert target['boxes'].tolist() == [[20, 3, 30, 11], [3, 4, 12, 10]]
    assert torch.equal(target['masks'], plain[1]['masks'].flip(-1).as_subclass(torch.Tensor))
    assert target['masks'].dtype == torch.uint8 and target['boxes'].dtype == torch.float32


def changed(**changes):
    """The annotations with another first one."""
    content = copy.deepcopy(CONTENT)
    content['annotations'][0] |= changes
    return content


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(bbox=[2, 3, 0, 8]), '1 boxes have no area and are left out: annotation 1 of train/a.png'),
        (dict(bbox=[2, 3, 10, -8]), 'boxes have no area'),
        (dict(bbox=[40, 3, 10, 8]), '1 boxes are outside of their image and are left out: annotation 1'),
        (dict(segmentation=[]), '1 masks are empty and are left out: annotation 1'),
        (dict(segmentation=[[1, 2, 3, 4]]), 'masks are empty'),
        (dict(segmentation=dict(size=[24, 32], counts=[24 * 32])), 'masks are empty'),
        (dict(segmentation=dict(size=[24, 32], counts='')), 'masks are empty'),
    ],
)
def test_objects_that_cannot_be_learned_are_left_out(data, caplog, changes, message):
    write(data, changed(**changes))
    dataset = coco.create_dataset(str(data), 'train')
    assert message in caplog.text
    assert dataset[0][1]['labels'].tolist() == [1]


def test_boxes_are_cut_at_the_borders(data, caplog):
    write(data, changed(bbox=[-5, 3, 17, 50]))
    dataset = coco.create_dataset(str(data), 'train')
    assert '1 boxes reach out of their image and are cut: annotation 1 of train/a.png' in caplog.text
    assert dataset[0][1]['boxes'][0].tolist() == [0, 3, 12, 24]
    caplog.clear()
    write(data, changed(bbox=[-0.5, 3, 17, 5]))
    assert coco.create_dataset(str(data), 'train')[0][1]['boxes'][0].tolist() == [0, 3, 16.5, 8]
    assert 'reach out' not in caplog.text


def test_a_mask_between_the_pixels_is_left_out(data):
    write(data, changed(segmentation=[[2.1, 3.1, 2.2, 3.1, 2.2, 3.2]]))
    assert coco.create_dataset(str(data), 'train')[0][1]['labels'].tolist() == [1]


@pytest.mark.parametrize(
    'content, message',
    [
        (changed(category_id=8), '1 annotations have an unknown category: annotation 1 of train/a.png: 8'),
        (changed(image_id=8), '1 annotations are of an image that is not listed: annotation 1 of image 8'),
        (changed(segmentation=dict(size=[32, 24], counts=[768])), '1 masks do not have the size of their image'),
        (changed(segmentation=dict(size=[24, 32], counts=[5, 2])), 'masks do not have the size'),
        (changed(bbox=[1, 2, 3]), "an entry of 'annotations' has no valid bbox"),
        (changed(bbox=[1, 2, 3, float('nan')]), 'no valid bbox'),
        (changed(category_id='cat'), 'no valid category_id'),
        ({**CONTENT, 'images': [*CONTENT['images'], CONTENT['images'][0]]}, '1 images have the id of another one'),
        ({**CONTENT, 'images': [dict(id=1, file_name='x.png', width=0, height=3)]}, 'no valid width'),
        ({**CONTENT, 'images': []}, 'has no images'),
        ({**CONTENT, 'annotations': []}, 'no usable annotations'),
        ({**CONTENT, 'categories': [dict(id=2, name='cat'), dict(id=9, name='cat')]}, 'distinct ids and names'),
        (dict(images=[]), "no list 'categories'"),
        ([], "no list 'images'"),
        ('{', 'is not a JSON file'),
    ],
)
def test_wrong_annotations(data, content, message):
    write(data, content)
    with pytest.raises(DataError) as found:
        coco.create_dataset(str(data), 'train')
    assert message in str(found.value) and 'instances_train.json' in str(found.value)


def test_every_kind_of_fault_has_a_line(data):
    (data / 'train' / 'b.jpg').unlink()
    write(data, changed(category_id=8))
    with pytest.raises(DataError) as found:
        coco.create_dataset(str(data), 'train')
    assert str(found.value).splitlines()[1:] == [
        '1 image files are missing: train/b.jpg',
        '1 annotations have an unknown category: annotation 1 of train/a.png: 8',
    ]


def test_split_that_does_not_exist(data, tmp_path):
    with pytest.raises(DataError, match=r"no split 'trian': expected annotations/instances_trian.json .*mean train"):
        coco.create_dataset(str(data), 'trian')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match='found none'):
        coco.create_dataset(str(tmp_path / 'empty'), 'train')


def test_damaged_images_are_found_before_training(data):
    (data / 'train' / 'b.jpg').write_bytes((data / 'train' / 'b.jpg').read_bytes()[:200])
    Image.new('RGB', (5, 6)).save(data / 'train' / 'c.png')
    with pytest.raises(DataError, match=r'2 of 3 images cannot be used: .*b\.jpg.*c\.png is 5 x 6 pixels, in the ann'):
        coco.create_dataset(str(data), 'train').check()


def test_no_library_for_coco(data, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(coco, 'import_module', missing)
    with pytest.raises(OptionError, match=r'pip install .cluster_zoo\[detection\]'):
        coco.create_dataset(str(data), 'train')


def test_pycocotools_reads_the_same_masks(data, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    pytest.importorskip('pycocotools')
    expected = coco.create_dataset(str(data), 'train')[0][1]['masks']
    real = coco.import_module

    def only_pycocotools(name):
        if name.startswith('faster'):
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(coco, 'import_module', only_pycocotools)
    assert coco.coco_backend()[0] == 'pycocotools'
    assert torch.equal(coco.create_dataset(str(data), 'train')[0][1]['masks'], expected)


def test_crops(data):
    whole, whole_target = coco.create_dataset(str(data), 'train')[0]
    dataset = coco.create_dataset(str(data), 'train', coco.train_transform(0.0, coco.RandomCrop(24, [32, 48], 128)))
    flips = coco.create_dataset(str(data), 'train', coco.train_transform(1.0, coco.RandomCrop(24, [32, 48], 128)))
    torch.manual_seed(0)
    sides, counts = set(), set()
    for seed in range(30):
        torch.manual_seed(seed)
        image, target = dataset[0]
        side = image.shape[-1]
        assert image.shape == (3, side, side) and image.dtype == torch.float32
        places = [
            (top, left)
            for top in range(24 - side + 1)
            for left in range(32 - side + 1)
            if torch.allclose(whole[:, top : top + side, left : left + side] / 255, image)
        ]
        ((top, left),) = places
        offset = torch.tensor([left, top, left, top])
        boxes = (whole_target['boxes'] - offset).clamp(0, side)
        inside = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
        assert torch.equal(target['boxes'], boxes[inside])
        assert torch.equal(target['labels'], whole_target['labels'][inside])
        assert torch.equal(target['masks'], whole_target['masks'][inside, top : top + side, left : left + side])
        assert len(target['area']) == len(target['iscrowd']) == inside.sum()
        sides.add(side)
        counts.add(len(boxes[inside]))
        torch.manual_seed(seed)
        flipped, other = flips[0]
        assert torch.equal(flipped, image.flip(-1)) and torch.equal(other['masks'], target['masks'].flip(-1))
        assert torch.equal(other['boxes'][:, 0], image.shape[-1] - target['boxes'][:, 2])
    pickle.loads(pickle.dumps(dataset))[0]  # as for workers that are not forked
    assert sides == {18, 12} and counts == {0, 1, 2}  # 24 pixels after resizing 24 to 32 or 48
