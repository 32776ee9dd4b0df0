"""segmentation.data.layouts: the files, labels and classes of every dataset."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_trees import (
    COUNTS,
    HEIGHT,
    TREES,
    WIDTH,
    image_file,
    mask_file,
    message_of,
    pack,
    refused,
    write_tree,
)
from PIL import Image

from cluster_zoo.errors import DataError
from segmentation.data.datasets import DATASETS, create_dataset


@pytest.fixture(params=[name for name in DATASETS if name != 'loveda'])  # has two folders for each split
def name(request):
    return request.param


@pytest.fixture
def tree(tmp_path):
    """Returns a function that writes the tree of a layout."""

    def make(name):
        write_tree(tmp_path / 'data', name)
        return tmp_path / 'data'

    return make


@pytest.fixture
def folder(tree):
    """Writes a tree of type folder with three named classes."""
    root = tree('folder')
    (root / 'classes.txt').write_text('road\nsky\n\ntree\n')
    return root


# Layouts


def _verify(name, root, train, val):
    _, _, image_ending, _, labels = TREES[name]
    dataset = create_dataset(name, root, 'train')
    assert len(dataset) == 2
    assert [dataset.name(index) for index in range(2)] == [f'{train}/{stem}{image_ending}' for stem in 'ab']
    assert len(dataset.classes) == len(dataset.colours) == COUNTS[name]
    for index, (image, mask) in enumerate(dataset):
        assert (image.dtype, mask.dtype) == (torch.uint8, torch.int64)
        decoded = np.asarray(Image.open(io.BytesIO(image_file(index, 'JPEG' if 'jpg' in image_ending else 'PNG'))))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decoded)
        assert np.array_equal(mask.numpy(), np.resize(list(labels.values()), (HEIGHT, WIDTH)))
    dataset.check()
    both = create_dataset(name, root, 'train+val')
    assert [Path(both.name(index)).name[0] for index in range(3)] == ['a', 'b', 'c']
    assert both.name(2) == f'{val}/c{image_ending}'


def test_layouts(name, tree):
    _verify(name, tree(name), *TREES[name][0])


def test_layouts_in_a_tar(name, tree, tmp_path):
    _verify(name, pack(tmp_path / 'data.tar', tree(name)), *TREES[name][0])


def test_root_may_be_the_parent_folder(name, tree, tmp_path):
    tree(name)
    _verify(name, tmp_path, *(f'data/{folder}' for folder in TREES[name][0]))


def test_tar_may_have_a_top_folder(name, tree, tmp_path):
    archive = pack(tmp_path / 'data.tar', tree(name), 'on_top')
    _verify(name, archive, *(f'on_top/{folder}' for folder in TREES[name][0]))


def test_hidden_folders_are_ignored(tree, tmp_path):
    tree('camvid')
    (tmp_path / '.cache').mkdir()
    archive = pack(tmp_path / 'data.tar', tmp_path / 'data', 'on_top')
    with tarfile.open(archive, 'a') as more:
        more.add(tmp_path / '.cache', '.cache')
    assert create_dataset('camvid', tmp_path, 'val').name(0) == 'data/val/images/c.jpg'
    assert create_dataset('camvid', archive, 'val').name(0) == 'on_top/val/images/c.jpg'


def test_dataset_is_found_by_its_folder_name(tmp_path):
    write_tree(tmp_path / 'VOCdevkit' / 'VOC2010', 'pascal_context_59')
    (tmp_path / 'VOCdevkit' / 'VOC2012').mkdir()
    _verify('pascal_context_59', tmp_path, *['VOCdevkit/VOC2010/JPEGImages'] * 2)
    _verify('pascal_context_59', tmp_path / 'VOCdevkit', *['VOC2010/JPEGImages'] * 2)


def test_splits_by_own_names(tree):
    root = tree('ade20k')
    assert len(create_dataset('ade20k', root, 'training')) == 2
    assert len(create_dataset('ade20k', root, 'validation')) == 1


def test_unknown_labels(name, tree):
    root = tree(name)
    _, masks, _, ending, labels = TREES[name]
    beyond = max(label for label in labels if label != 255) + 1
    (root / masks[0] / f'b{ending}').write_bytes(mask_file([*labels, beyond, 200]))
    options = dict(num_classes=3) if name == 'folder' else {}
    dataset = create_dataset(name, root, 'train', **options)
    dataset[0]
    with pytest.raises(DataError) as error:
        dataset[1]
    unknown = f'{beyond}, 200'
    message = message_of(error)
    assert message.startswith(f'{root / masks[0] / f"b{ending}"} has label {unknown};')
    known = '91-181' if name == 'coco_stuff' else f'0-{beyond - 1}'
    assert f' {known}, 255: ' in message
    assert ('--num-classes' if name == 'folder' else '--dataset') in message


def test_cityscapes_prefers_train_ids(tree):
    root = tree('cityscapes')
    (root / 'gtFine/train/ulm/b_gtFine_labelTrainIds.png').write_bytes(mask_file([0, 18, 255]))
    (root / 'gtFine/train/ulm/b_gtFine_color.png').write_bytes(image_file(form='PNG'))
    dataset = create_dataset('cityscapes', root, 'train')
    assert dataset[0][1].unique().tolist() == [0, 18, 255]
    assert dataset[1][1].flatten()[:3].tolist() == [0, 18, 255]


def test_coco_stuff_prefers_train_ids(tree):
    root = tree('coco_stuff')
    (root / 'annotations/train2017/b_labelTrainIds.png').write_bytes(mask_file([0, 11, 170, 255]))
    dataset = create_dataset('coco_stuff', root, 'train')
    assert dataset[0][1].unique().tolist() == [0, 10, 11, 80, 170, 255]
    assert dataset[1][1].unique().tolist() == [0, 11, 170, 255]


def test_loveda(tmp_path):
    for part in ('Train/Urban', 'Train/Rural', 'Val/Urban', 'Val/Rural'):
        for kind, data in (('images_png', image_file(form='PNG')), ('masks_png', mask_file([0, 1, 7]))):
            (tmp_path / 'LoveDA' / part / kind).mkdir(parents=True)
            (tmp_path / 'LoveDA' / part / kind / f'{len(part)}.png').write_bytes(data)
    for split in ('train', 'val'):
        dataset = create_dataset('loveda', tmp_path, split)
        folders = [f'LoveDA/{split.capitalize()}/{part}/images_png' for part in ('Urban', 'Rural')]
        assert [str(Path(dataset.name(index)).parent) for index in range(len(dataset))] == folders
        assert dataset[1][1].unique().tolist() == [0, 6, 255]
    assert dataset.classes[6] == 'agricultural' and dataset.colours[6].tolist() == [255, 195, 128]
    (tmp_path / 'LoveDA/Val/Rural/masks_png').rename(tmp_path / 'moved')
    message = refused('loveda', tmp_path, 'val')
    assert 'no folder LoveDA/Val/Rural/masks_png' in message


@pytest.mark.parametrize('suffix', ['.tif', '.TIFF'])
def test_tiff_masks(folder, suffix):
    labels = np.resize(np.array([0, 1, 2, 255], np.uint16), (HEIGHT, WIDTH))
    (folder / 'train/masks/b.png').unlink()
    Image.fromarray(labels).save(folder / f'train/masks/b{suffix}', 'TIFF')
    (folder / 'classes.txt').unlink()
    dataset = create_dataset('folder', folder, 'train')
    assert np.array_equal(dataset[1][1].numpy(), labels)
    assert len(dataset.classes) == 3
    Image.fromarray(labels.astype(np.float32)).save(folder / f'train/masks/b{suffix}', 'TIFF')
    message = refused('folder', folder, 'train', num_classes=3, check=True)
    assert f'b{suffix} has fractions (F)' in message


def test_hidden_files_are_ignored(folder, caplog):
    for path in ('train/images/.DS_Store', 'train/images/._a.jpg', 'train/masks/._a.png'):
        (folder / path).write_bytes(b'?')
    assert len(create_dataset('folder', folder, 'train')) == 2
    assert not caplog.records


@pytest.mark.parametrize('packed', [False, True])
def test_files_that_are_left_out_are_counted(folder, tmp_path, caplog, packed):
    for path in ('images/a.heic', 'images/notes.txt', 'masks/x/y.png', 'masks/z.PNG', 'masks/colors.txt'):
        (folder / 'train' / path).parent.mkdir(exist_ok=True)
        (folder / 'train' / path).write_bytes(b'?')
    root = pack(tmp_path / 'data.tar', folder) if packed else folder
    assert len(create_dataset('folder', root, 'train+val')) == 3
    images, masks = (record.getMessage() for record in caplog.records)
    assert str(root / 'train/images') in images and '2 files' in images and 'not used: a.heic, notes.txt' in images
    assert str(root / 'train/masks') in masks and '2 masks' in masks and 'not used: x/y.png, z.PNG' in masks
    assert '\n' not in images + masks


@pytest.mark.parametrize('name', ['cityscapes', 'pascal_context_59'])
def test_files_of_other_purposes_are_not_mentioned(tree, name, caplog):
    """Cityscapes has more files per image; VOC has the images and masks of all splits in the same folders."""
    root = tree(name)
    if name == 'cityscapes':
        for ending in ('color.png', 'instanceIds.png', 'labelTrainIds.png', 'polygons.json'):
            (root / f'gtFine/train/ulm/a_gtFine_{ending}').write_bytes(mask_file([0]))
    assert len(create_dataset(name, root, 'train')) == 2
    assert not caplog.records


def test_every_format_of_images(folder, caplog):
    pixels = Image.open(io.BytesIO(image_file(form='PNG')))
    for index, suffix in enumerate(('.webp', '.bmp', '.tif', '.TIFF', '.gif', '.JPG', '.Png', '.jp2', '.ppm', '.avif')):
        if suffix.lower() in Image.registered_extensions():
            pixels.save(folder / f'train/images/more_{index}{suffix}')
            (folder / f'train/masks/more_{index}.png').write_bytes(mask_file([1]))
    dataset = create_dataset('folder', folder, 'train')
    assert len(dataset) >= 2 + 8
    dataset.check()
    assert not caplog.records


def test_suffix_of_masks_in_capitals(tree):
    root = tree('folder')
    (root / 'train/masks/b.png').rename(root / 'train/masks/b.PNG')
    (root / 'val/masks/c.png').write_bytes(mask_file([0, 4]))
    (root / 'val/masks/c.png').rename(root / 'val/masks/c.PNG')
    dataset = create_dataset('folder', root, 'train')
    assert (len(dataset), len(dataset.classes)) == (2, 5)
    dataset.check()


def test_linked_folders(folder, tmp_path):
    for kind in ('images', 'masks'):
        (folder / 'val' / kind).rename(tmp_path / kind)
        (folder / 'train' / kind / 'more').symlink_to(tmp_path / kind)
    assert create_dataset('folder', folder, 'train').name(2) == 'train/images/more/c.jpg'


def test_folder_without_permission(folder, monkeypatch):
    (folder / 'train/images/more').mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('more'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    message = refused('folder', folder, 'train')
    assert 'train/images/more' in message and 'Permission denied' in message


def test_transform_gets_image_and_mask(folder):
    dataset = create_dataset('folder', folder, 'train', lambda image, mask: (image.shape, mask.shape))
    assert dataset[0] == ((3, HEIGHT, WIDTH), (HEIGHT, WIDTH))
