"""segmentation.data.datasets: all layouts as small trees, and their errors."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cluster_zoo.errors import DataError
from segmentation.data.datasets import DATASETS, create_dataset

CAMVID_TAR = Path(__file__).parents[2] / 'shared' / 'data' / 'camvid.tar'
HEIGHT, WIDTH = 6, 10

# Folders of images and of masks of two splits, suffixes of images and masks, and class of each label in the masks
TREES = {
    'folder': (('train/images', 'val/images'), ('train/masks', 'val/masks'), '.jpg', '.png', {0: 0, 2: 2, 255: 255}),
    'camvid': (('train/images', 'val/images'), ('train/masks', 'val/masks'), '.jpg', '.png', {0: 0, 10: 10, 11: 255}),
    'ade20k': (
        ('images/training', 'images/validation'),
        ('annotations/training', 'annotations/validation'),
        '.jpg',
        '.png',
        {0: 255, 1: 0, 150: 149},
    ),
    'cityscapes': (
        ('leftImg8bit/train/ulm', 'leftImg8bit/val/bonn'),
        ('gtFine/train/ulm', 'gtFine/val/bonn'),
        '_leftImg8bit.png',
        '_gtFine_labelIds.png',
        {0: 255, 7: 0, 16: 255, 33: 18},
    ),
    'pascal_context_59': (
        ('JPEGImages', 'JPEGImages'),
        ('SegmentationClassContext', 'SegmentationClassContext'),
        '.jpg',
        '.png',
        {0: 255, 1: 0, 59: 58},
    ),
    'pascal_voc': (
        ('JPEGImages', 'JPEGImages'),
        ('SegmentationClass', 'SegmentationClass'),
        '.jpg',
        '.png',
        {0: 0, 20: 20, 255: 255},
    ),
    'coco_stuff': (
        ('images/train2017', 'images/val2017'),
        ('annotations/train2017', 'annotations/val2017'),
        '.jpg',
        '.png',
        {0: 0, 10: 10, 12: 11, 91: 80, 181: 170, 255: 255},
    ),
}
LISTINGS = {'pascal_context_59': 'ImageSets/SegmentationContext', 'pascal_voc': 'ImageSets/Segmentation'}
COUNTS = {'folder': 3, 'camvid': 11, 'ade20k': 150, 'cityscapes': 19, 'pascal_context_59': 59}
COUNTS |= {'pascal_voc': 21, 'coco_stuff': 171}


def _encoded(array, form, **options):
    data = io.BytesIO()
    Image.fromarray(array).save(data, form, **options)
    return data.getvalue()


def _image(seed=0, form='JPEG', size=(HEIGHT, WIDTH)):
    return _encoded(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8), form)


def _mask(labels, size=(HEIGHT, WIDTH), dtype=np.uint8):
    """Encodes a mask that repeats the labels along the rows."""
    return _encoded(np.resize(np.array(labels, dtype), size), 'PNG')


def _write(root, name):
    """Writes two training images and one validation image with their masks."""
    images, masks, image_ending, mask_ending, labels = TREES[name]
    written = {}
    for split, stems in enumerate((('a', 'b'), ('c',))):
        for seed, stem in enumerate(stems):
            written[f'{images[split]}/{stem}{image_ending}'] = _image(seed, 'JPEG' if 'jpg' in image_ending else 'PNG')
            written[f'{masks[split]}/{stem}{mask_ending}'] = _mask(list(labels))
    if name in LISTINGS:
        written[f'{LISTINGS[name]}/train.txt'] = b'a\nb\n'
        written[f'{LISTINGS[name]}/val.txt'] = b'c\n'
    for path, data in written.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return written


def _tar(path, root, prefix=''):
    with tarfile.open(path, 'w') as archive:
        archive.add(root, prefix or '.')
    return path


@pytest.fixture(params=[name for name in DATASETS if name != 'loveda'])  # has two folders for each split
def name(request):
    return request.param


@pytest.fixture
def tree(tmp_path):
    """Returns a function that writes the tree of a layout."""

    def make(name):
        _write(tmp_path / 'data', name)
        return tmp_path / 'data'

    return make


@pytest.fixture
def folder(tree):
    """Writes a tree of type folder with three named classes."""
    root = tree('folder')
    (root / 'classes.txt').write_text('road\nsky\n\ntree\n')
    return root


def _message(error):
    assert '\n' not in str(error.value)
    return str(error.value)


def _refused(*args, check=False, **kwargs):
    with pytest.raises(DataError) as error:
        dataset = create_dataset(*args, **kwargs)
        if check:
            dataset.check(2)
    return _message(error)


# Layouts


def _verify(name, root, train, val):
    _, _, image_ending, _, labels = TREES[name]
    dataset = create_dataset(name, root, 'train')
    assert len(dataset) == 2
    assert [dataset.name(index) for index in range(2)] == [f'{train}/{stem}{image_ending}' for stem in 'ab']
    assert len(dataset.classes) == len(dataset.colours) == COUNTS[name]
    for index, (image, mask) in enumerate(dataset):
        assert (image.dtype, mask.dtype) == (torch.uint8, torch.int64)
        decoded = np.asarray(Image.open(io.BytesIO(_image(index, 'JPEG' if 'jpg' in image_ending else 'PNG'))))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decoded)
        assert np.array_equal(mask.numpy(), np.resize(list(labels.values()), (HEIGHT, WIDTH)))
    dataset.check()
    both = create_dataset(name, root, 'train+val')
    assert [Path(both.name(index)).name[0] for index in range(3)] == ['a', 'b', 'c']
    assert both.name(2) == f'{val}/c{image_ending}'


def test_layouts(name, tree):
    _verify(name, tree(name), *TREES[name][0])


def test_layouts_in_a_tar(name, tree, tmp_path):
    _verify(name, _tar(tmp_path / 'data.tar', tree(name)), *TREES[name][0])


def test_root_may_be_the_parent_folder(name, tree, tmp_path):
    tree(name)
    _verify(name, tmp_path, *(f'data/{folder}' for folder in TREES[name][0]))


def test_tar_may_have_a_top_folder(name, tree, tmp_path):
    archive = _tar(tmp_path / 'data.tar', tree(name), 'on_top')
    _verify(name, archive, *(f'on_top/{folder}' for folder in TREES[name][0]))


def test_hidden_folders_are_ignored(tree, tmp_path):
    tree('camvid')
    (tmp_path / '.cache').mkdir()
    archive = _tar(tmp_path / 'data.tar', tmp_path / 'data', 'on_top')
    with tarfile.open(archive, 'a') as more:
        more.add(tmp_path / '.cache', '.cache')
    assert create_dataset('camvid', tmp_path, 'val').name(0) == 'data/val/images/c.jpg'
    assert create_dataset('camvid', archive, 'val').name(0) == 'on_top/val/images/c.jpg'


def test_dataset_is_found_by_its_folder_name(tmp_path):
    _write(tmp_path / 'VOCdevkit' / 'VOC2010', 'pascal_context_59')
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
    (root / masks[0] / f'b{ending}').write_bytes(_mask([*labels, beyond, 200]))
    options = dict(num_classes=3) if name == 'folder' else {}
    dataset = create_dataset(name, root, 'train', **options)
    dataset[0]
    with pytest.raises(DataError) as error:
        dataset[1]
    unknown = f'{beyond}, 200'
    message = _message(error)
    assert message.startswith(f'{root / masks[0] / f"b{ending}"} has label {unknown};')
    known = '91-181' if name == 'coco_stuff' else f'0-{beyond - 1}'
    assert f' {known}, 255: ' in message
    assert ('--num-classes' if name == 'folder' else '--dataset') in message


def test_cityscapes_prefers_train_ids(tree):
    root = tree('cityscapes')
    (root / 'gtFine/train/ulm/b_gtFine_labelTrainIds.png').write_bytes(_mask([0, 18, 255]))
    (root / 'gtFine/train/ulm/b_gtFine_color.png').write_bytes(_image(form='PNG'))
    dataset = create_dataset('cityscapes', root, 'train')
    assert dataset[0][1].unique().tolist() == [0, 18, 255]
    assert dataset[1][1].flatten()[:3].tolist() == [0, 18, 255]


def test_coco_stuff_prefers_train_ids(tree):
    root = tree('coco_stuff')
    (root / 'annotations/train2017/b_labelTrainIds.png').write_bytes(_mask([0, 11, 170, 255]))
    dataset = create_dataset('coco_stuff', root, 'train')
    assert dataset[0][1].unique().tolist() == [0, 10, 11, 80, 170, 255]
    assert dataset[1][1].unique().tolist() == [0, 11, 170, 255]


def test_loveda(tmp_path):
    for part in ('Train/Urban', 'Train/Rural', 'Val/Urban', 'Val/Rural'):
        for kind, data in (('images_png', _image(form='PNG')), ('masks_png', _mask([0, 1, 7]))):
            (tmp_path / 'LoveDA' / part / kind).mkdir(parents=True)
            (tmp_path / 'LoveDA' / part / kind / f'{len(part)}.png').write_bytes(data)
    for split in ('train', 'val'):
        dataset = create_dataset('loveda', tmp_path, split)
        folders = [f'LoveDA/{split.capitalize()}/{part}/images_png' for part in ('Urban', 'Rural')]
        assert [str(Path(dataset.name(index)).parent) for index in range(len(dataset))] == folders
        assert dataset[1][1].unique().tolist() == [0, 6, 255]
    assert dataset.classes[6] == 'agricultural' and dataset.colours[6].tolist() == [255, 195, 128]
    (tmp_path / 'LoveDA/Val/Rural/masks_png').rename(tmp_path / 'moved')
    message = _refused('loveda', tmp_path, 'val')
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
    message = _refused('folder', folder, 'train', num_classes=3, check=True)
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
    root = _tar(tmp_path / 'data.tar', folder) if packed else folder
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
            (root / f'gtFine/train/ulm/a_gtFine_{ending}').write_bytes(_mask([0]))
    assert len(create_dataset(name, root, 'train')) == 2
    assert not caplog.records


def test_every_format_of_images(folder, caplog):
    pixels = Image.open(io.BytesIO(_image(form='PNG')))
    for index, suffix in enumerate(('.webp', '.bmp', '.tif', '.TIFF', '.gif', '.JPG', '.Png', '.jp2', '.ppm', '.avif')):
        if suffix.lower() in Image.registered_extensions():
            pixels.save(folder / f'train/images/more_{index}{suffix}')
            (folder / f'train/masks/more_{index}.png').write_bytes(_mask([1]))
    dataset = create_dataset('folder', folder, 'train')
    assert len(dataset) >= 2 + 8
    dataset.check()
    assert not caplog.records


def test_suffix_of_masks_in_capitals(tree):
    root = tree('folder')
    (root / 'train/masks/b.png').rename(root / 'train/masks/b.PNG')
    (root / 'val/masks/c.png').write_bytes(_mask([0, 4]))
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
    message = _refused('folder', folder, 'train')
    assert 'train/images/more' in message and 'Permission denied' in message


def test_transform_gets_image_and_mask(folder):
    dataset = create_dataset('folder', folder, 'train', lambda image, mask: (image.shape, mask.shape))
    assert dataset[0] == ((3, HEIGHT, WIDTH), (HEIGHT, WIDTH))


# Classes of a folder


def test_named_classes(folder):
    dataset = create_dataset('folder', folder, 'train', num_classes=3)
    assert dataset.classes == ('road', 'sky', 'tree')
    message = _refused('folder', folder, 'train', num_classes=4)
    assert 'has 3 classes, not 4' in message and 'classes.txt' in message and '--num-classes 4' in message


def test_numbered_classes(tree):
    root = tree('folder')
    assert create_dataset('folder', root, 'train', num_classes=7).classes == tuple('0123456')
    # The highest label of all splits, so that they have the same classes
    (root / 'val/masks/c.png').write_bytes(_mask([0, 5, 255]))
    assert len(create_dataset('folder', root, 'train').classes) == 6


def test_masks_of_0_and_255_need_a_remap(tree):
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.write_bytes(_mask([0, 255]))
    message = _refused('folder', root, 'train')
    assert 'labels 0 and 255' in message and '--remap 0=0 255=1' in message
    dataset = create_dataset('folder', root, 'train', remap={0: 0, 255: 1})
    assert (dataset.classes, dataset[0][1].unique().tolist()) == (('0', '1'), [0, 1])


@pytest.mark.parametrize('named', [False, True])
def test_masks_of_0_and_255_with_two_classes(tree, named):
    """If 255 was ignored, every pixel with a label would be of class 0."""
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.write_bytes(_mask([0, 255]))
    options = {} if named else dict(num_classes=2)
    if named:
        (root / 'classes.txt').write_text('ground\ntree\n')
    assert '--remap 0=0 255=1' in _refused('folder', root, 'train', check=True, **options)
    create_dataset('folder', root, 'train', remap={0: 0, 255: 1}).check()
    create_dataset('folder', root, 'train', remap={0: 0, 1: 1, 255: 255}).check()  # on purpose
    (root / 'train/masks/a.png').write_bytes(_mask([0, 1]))
    create_dataset('folder', root, 'train', **options).check()


def test_masks_of_one_label(tree):
    root = tree('folder')
    for label in (0, 255):
        for path in root.glob('*/masks/*.png'):
            path.write_bytes(_mask([label]))
        message = _refused('folder', root, 'train')
        assert f'only the label {label}' in message and '--remap' not in message


def test_gaps_between_the_labels(tree, caplog):
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.write_bytes(_mask([0, 127, 255]))
    assert len(create_dataset('folder', root, 'train').classes) == 128
    [record] = caplog.records
    assert '128 classes' in record.getMessage() and '126' in record.getMessage()
    assert '--remap 0=0 127=1' in record.getMessage()
    create_dataset('folder', root, 'train', num_classes=128)
    assert len(caplog.records) == 1


def test_remap(folder):
    dataset = create_dataset('folder', folder, 'train', remap={0: 2, 2: 255, 1: 1})
    assert dataset[0][1].flatten()[:3].tolist() == [2, 255, 255]
    dataset = create_dataset('folder', folder, 'train', remap={0: 1})
    with pytest.raises(DataError, match=r'label 2; .* 0, 255: .*--remap.* 2=255'):
        dataset[0]


def test_remap_of_16_bit_labels(tree):
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.write_bytes(_mask([1000, 65535, 7], dtype=np.uint16))
    dataset = create_dataset('folder', root, 'train', remap={1000: 0, 65535: 1, 7: 255})
    assert dataset[0][1].flatten()[:3].tolist() == [0, 1, 255]


@pytest.mark.parametrize('remap', [{0: 3}, {0: -1}, {-1: 0}, {65536: 0}, {0: 256}])
def test_invalid_remap(folder, remap):
    (label, number), *_ = remap.items()
    message = _refused('folder', folder, 'train', remap=remap)
    assert f'label {label} cannot be mapped to class {number}' in message and f'--remap {label}={number}' in message


def test_remap_is_only_for_folders(tree):
    assert '--remap is only for --dataset folder' in _refused('ade20k', tree('ade20k'), 'train', remap={0: 0})


@pytest.mark.parametrize('text', ['road\nsky\nroad\n', '\n \n'])
def test_invalid_class_names(folder, text):
    (folder / 'classes.txt').write_text(text)
    assert 'classes.txt must contain' in _refused('folder', folder, 'train')


def test_class_names_are_not_text(folder):
    (folder / 'classes.txt').write_bytes(b'\xff\xfe\x00')
    assert 'classes.txt' in _refused('folder', folder, 'train')


def test_too_many_classes(tree):
    root = tree('folder')
    (root / 'val/masks/c.png').write_bytes(_mask([0, 400], dtype=np.uint16))
    message = _refused('folder', root, 'train')
    assert '401 classes' in message and '--remap' in message
    for count in (256, 0, -1):
        message = _refused('folder', root, 'train', num_classes=count)
        assert '1 to 255' in message and f'--num-classes {count}' in message
    assert '--remap' in _refused('folder', root, 'train', remap={0: 0, 2: 300})
    assert len(create_dataset('folder', root, 'train', num_classes=255).classes) == 255


def test_unknown_16_bit_labels(folder):
    (folder / 'train/masks/a.png').write_bytes(_mask([0, 256], dtype=np.uint16))  # 0 in its lower byte
    with pytest.raises(DataError, match=r'a\.png has label 256; .* 0-2, 255: .*classes\.txt'):
        create_dataset('folder', folder, 'train')[0]


# Errors


def test_unknown_dataset(folder):
    message = _refused('ade20', folder, 'train')
    assert "'ade20' (did you mean ade20k?)" in message and 'folder, camvid, ' in message and '--dataset' in message


def test_missing_root(tmp_path):
    assert _refused('folder', tmp_path / 'nowhere', 'train').endswith('nowhere does not exist')


def test_wrong_root(name, tmp_path):
    for inside in ('music', 'photographs'):
        (tmp_path / inside).mkdir()
    message = _refused(name, tmp_path, 'train')
    assert f'is not a dataset of type {name}' in message
    assert message.endswith('found music, photographs')
    assert str(Path(TREES[name][0][0].removesuffix('/ulm'))) in message


def test_another_dataset(tree):
    message = _refused('cityscapes', tree('ade20k'), 'train')
    assert 'is not a dataset of type cityscapes' in message and message.endswith('--dataset ade20k')


@pytest.mark.parametrize('name', ['ade20k', 'cityscapes', 'pascal_context_59'])
def test_a_published_dataset_is_not_a_folder(tree, name):
    assert _refused('folder', tree(name), 'train').endswith(f'--dataset {name}')


def test_a_folder_is_not_a_published_dataset(tree):
    assert '--dataset folder or camvid' in _refused('ade20k', tree('folder'), 'train')


def _moved(root, moves):
    for source, target in moves.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).rename(root / target)
    return _refused('folder', root, 'train')


def test_folders_of_other_names(tree):
    moves = {f'{split}/masks': f'{split}/labels' for split in ('train', 'val')}
    message = _moved(tree('folder'), moves)
    assert 'train/images and train/masks' in message and 'val' in message.partition('found')[0]
    assert message.endswith('found train/images, train/labels, val/images, val/labels')


def test_folders_of_kinds_and_then_of_splits(tree):
    moves = {f'{split}/{kind}': f'{kind}/{split}' for split in ('train', 'val') for kind in ('images', 'masks')}
    message = _moved(tree('folder'), moves)
    assert message.endswith('found images/train, images/val, masks/train, masks/val, train, and 1 more')


def test_no_splits_beside_other_datasets(tree, tmp_path):
    for name in ('flowers', 'streets'):
        for kind in ('images', 'masks'):
            (tmp_path / name / kind).mkdir(parents=True)
    assert 'it has no splits' in _refused('folder', tmp_path / 'flowers', 'train')


def test_no_splits(tree, tmp_path):
    root = tree('folder')
    (root / 'train').rename(tmp_path / 'other')
    message = _refused('folder', tmp_path / 'other', 'train')
    assert 'no splits' in message and 'train/images and train/masks' in message


@pytest.mark.parametrize('inside', [False, True])
def test_a_split_for_the_dataset(tree, monkeypatch, inside):
    root = tree('folder')
    monkeypatch.chdir(root / 'train')
    message = _refused('folder', '.' if inside else root / 'train', 'train')
    assert f'it is one split; give the folder that contains it, {root}' in message


def test_split_without_masks(tree):
    root = tree('folder')
    (root / 'val/masks').rename(root / 'val/labels')
    message = _refused('folder', root, 'val')
    assert "no split 'val'" in message and 'no folder val/masks' in message
    assert all(flag in message for flag in ('--train-split', '--val-split', '--split'))


def test_folder_without_validation_split(tree):
    root = tree('folder')
    (root / 'val').rename(root / 'test')
    message = _refused('folder', root, 'val')
    assert 'val/images' in message and 'val/masks' in message and message.endswith('test, train')


def test_unknown_split(name, tree):
    root = tree(name)
    message = _refused(name, root, 'trian')
    assert "'trian' (did you mean train?)" in message and message.endswith('train, val')
    assert "has no split ''" in _refused(name, root, 'train+')


def test_camvid_without_a_test_split(tree):
    message = _refused('camvid', tree('camvid'), 'test')
    assert "has no split 'test'" in message and message.endswith('train, val')


def test_empty_split(name, tree):
    root = tree(name)
    images, _, ending, _, _ = TREES[name]
    if name in LISTINGS:
        (root / LISTINGS[name] / 'train.txt').write_text('')
    for stem in 'ab':
        (root / images[0] / f'{stem}{ending}').unlink()
    assert 'has no images of split' in _refused(name, root, 'train')


def test_missing_mask(name, tree):
    root = tree(name)
    images, masks, image_ending, mask_ending, _ = TREES[name]
    (root / masks[0] / f'b{mask_ending}').unlink()
    message = _refused(name, root, 'train')
    assert message.startswith('1 of 2 images have no mask (')
    assert f'NAME{mask_ending}' in message
    assert message.endswith(f'{images[0]}/b{image_ending}')


def test_all_masks_are_missing(tree):
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.unlink()
    assert _refused('folder', root, 'train').startswith(
        '2 of 2 images have no mask (NAME.png or NAME.tif or NAME.tiff in '
    )


@pytest.mark.parametrize('found', ['b.jpg', 'b_mask.png', 'b.npy'])
def test_masks_of_other_names_and_formats(folder, found):
    (folder / 'train/masks/b.png').rename(folder / 'train/masks' / found)
    message = _refused('folder', folder, 'train')
    assert message.startswith('1 of 2 images have no mask (NAME.png or NAME.tif or NAME.tiff in ')
    assert f'found {found}' in message and ('JPEG' in message) == found.endswith('jpg')


def test_many_missing_masks(folder):
    for index in range(9):
        (folder / f'train/images/more_{index}.png').write_bytes(_image(form='PNG'))
    message = _refused('folder', folder, 'train')
    assert message.startswith('9 of 11 images')
    assert message.endswith('more_4.png, and 4 more')


def test_two_images_with_the_same_mask(folder):
    (folder / 'train/images/a.png').write_bytes(_image(form='PNG'))
    assert 'train/images/a.png would have the same mask' in _refused('folder', folder, 'train')


def test_listed_image_is_missing(tree):
    root = tree('pascal_context_59')
    (root / 'ImageSets/SegmentationContext/train.txt').write_text('a\nx\nb\n')
    message = _refused('pascal_context_59', root, 'train')
    assert message.startswith('1 of 3 images in ')
    assert message.endswith('are missing: x')
    (root / 'ImageSets/SegmentationContext/val.txt').unlink()
    assert 'val.txt' in _refused('pascal_context_59', root, 'val')


def _damage(root, path, change):
    data = (root / path).read_bytes()
    (root / path).write_bytes(change(data))


def _flipped(data):
    middle = data.index(b'IDAT') + 8
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


DAMAGE = {
    'cut PNG': ('train/masks/b.png', lambda data: data[:-25]),
    'flipped PNG': ('train/masks/b.png', _flipped),
    'empty PNG': ('train/masks/b.png', lambda data: b''),
    'text for a PNG': ('train/masks/b.png', lambda data: b'not found' * 20),
    'cut JPEG': ('train/images/b.jpg', lambda data: data[: -len(data) // 4]),
    'header of a JPEG': ('train/images/b.jpg', lambda data: data[:30]),
    'empty JPEG': ('train/images/b.jpg', lambda data: b''),
}


@pytest.mark.parametrize('kind', DAMAGE)
@pytest.mark.parametrize('packed', [False, True])
def test_damaged_files(folder, tmp_path, kind, packed):
    path, change = DAMAGE[kind]
    _damage(folder, path, change)
    root = _tar(tmp_path / 'data.tar', folder) if packed else folder
    message = _refused('folder', root, 'train', check=True)
    assert message.startswith('1 of 2 images') and f'{root / path} is not ' in message
    assert '0x' not in message  # no addresses of Python objects
    assert create_dataset('folder', root, 'val').check() is None


def test_different_sizes(folder):
    (folder / 'train/masks/a.png').write_bytes(_mask([0, 1, 2], (WIDTH, HEIGHT)))
    message = _refused('folder', folder, 'train', check=True)
    image, mask = folder / 'train/images/a.jpg', folder / 'train/masks/a.png'
    assert f'{image} is 10 x 6 pixels' in message and f'{mask} is 6 x 10' in message


def test_check_lists_all_errors(folder):
    _damage(folder, 'train/images/a.jpg', lambda data: data[:50])
    (folder / 'train/masks/b.png').write_bytes(_mask([9]))
    message = _refused('folder', folder, 'train', check=True)
    assert message.startswith('2 of 2')
    assert message.index('a.jpg is not') < message.index('b.png has label 9')


def test_check_says_once_what_to_do_about_labels(folder):
    for stem, label in dict(a=9, b=7).items():
        (folder / f'train/masks/{stem}.png').write_bytes(_mask([label]))
    message = _refused('folder', folder, 'train', check=True)
    assert 'label 9' in message and 'label 7' in message
    assert message.count('--remap') == 1 and message.endswith('--remap')


def test_check_lists_the_first_of_many_errors(folder):
    for index in range(9):
        (folder / f'train/images/more_{index}.png').write_bytes(b'')
        (folder / f'train/masks/more_{index}.png').write_bytes(_mask([0]))
    message = _refused('folder', folder, 'train', check=True)
    assert message.startswith('9 of 11')
    assert 'more_4.png' in message and 'more_5.png' not in message and 'and 4 more' in message


def test_check_does_not_transform(folder):
    def transform(image, mask):
        raise AssertionError

    create_dataset('folder', folder, 'train', transform).check()


# Tars


def test_tar_in_worker_processes_and_copies(folder, tmp_path):
    dataset = create_dataset('folder', _tar(tmp_path / 'data.tar', folder), 'train+val')
    expected = [dataset[index] for index in range(3)]
    copy = pickle.loads(pickle.dumps(dataset))
    for loaded in (DataLoader(dataset, batch_size=None, num_workers=2), copy):
        for (image, mask), (expected_image, expected_mask) in zip(loaded, expected, strict=True):
            assert torch.equal(image, expected_image)
            assert torch.equal(mask, expected_mask)


# CamVid


@pytest.mark.skipif(not CAMVID_TAR.is_file(), reason=f'CamVid is not at {CAMVID_TAR}')
def test_camvid():
    for split, count in (('train', 367), ('val', 101), ('test', 233), ('train+val', 468)):
        assert len(create_dataset('camvid', CAMVID_TAR, split)) == count
    dataset = create_dataset('camvid', CAMVID_TAR, 'val')
    rows = {}
    for index in range(0, 101, 20):
        image, mask = dataset[index]
        assert image.shape == (3, 360, 480)
        assert mask.shape == (360, 480)
        for number in mask.unique().tolist():
            rows.setdefault(number, []).append(float((mask == number).nonzero()[:, 0].float().mean()))
    heights = {dataset.classes[number]: sum(found) / len(found) for number, found in rows.items() if number != 255}
    # The mean height of each class in a street scene
    assert heights['sky'] < heights['building'] < heights['car'] < heights['pavement'] < heights['road']
    assert dataset.name(0).startswith('camvid/val/images/')


# First mistakes


@pytest.mark.parametrize('suffix', ['.webp', '.bmp', '.tif', '.JPG', '.gif'])
def test_images_of_all_formats(folder, suffix):
    for path in sorted(folder.glob('train/images/*')):
        with Image.open(path) as image:
            image.convert('RGB').save(path.with_suffix(suffix))
        path.unlink()
    dataset = create_dataset('folder', folder, 'train', num_classes=3)
    assert len(dataset) == 2 and dataset.name(0).endswith(suffix)
    dataset.check()


@pytest.mark.parametrize(('name', 'wrong'), [('ade20k', 'folder'), ('folder', 'ade20k'), ('cityscapes', 'camvid')])
def test_the_layout_of_another_dataset(name, wrong, tree):
    assert name in _refused(wrong, tree(name), 'train').partition(': choose --dataset ')[2].split(' or ')


def test_messages_name_flags(folder):
    assert '--num-classes 3' in _refused('camvid', folder, 'train', num_classes=3)
    assert '--remap is only for --dataset folder' in _refused('camvid', folder, 'train', remap={0: 0})


def test_postscript_is_not_an_image(folder):
    """Pillow would start Ghostscript for such a file."""
    path = sorted(folder.glob('train/images/*'))[0]
    path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n')
    dataset = create_dataset('folder', folder, 'train', num_classes=3)
    with pytest.raises(DataError, match='not an image of a known format'):
        dataset[0]
