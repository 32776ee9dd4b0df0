"""segmentation.data.datasets: classes of a folder, and errors of all layouts."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_trees import HEIGHT, LISTINGS, TREES, WIDTH, image_file, mask_file, pack, refused, write_tree
from PIL import Image
from torch.utils.data import DataLoader

from cluster_zoo.errors import DataError
from segmentation.data.datasets import DATASETS, create_dataset

CAMVID_TAR = Path(__file__).parents[2] / 'shared' / 'data' / 'camvid.tar'


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


# Classes of a folder


def test_named_classes(folder):
    dataset = create_dataset('folder', folder, 'train', num_classes=3)
    assert dataset.classes == ('road', 'sky', 'tree')
    message = refused('folder', folder, 'train', num_classes=4)
    assert 'has 3 classes, not 4' in message and 'classes.txt' in message and '--num-classes 4' in message


def test_numbered_classes(tree):
    root = tree('folder')
    assert create_dataset('folder', root, 'train', num_classes=7).classes == tuple('0123456')
    # The highest label of all splits, so that they have the same classes
    (root / 'val/masks/c.png').write_bytes(mask_file([0, 5, 255]))
    assert len(create_dataset('folder', root, 'train').classes) == 6


def test_masks_of_0_and_255_need_a_remap(tree):
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.write_bytes(mask_file([0, 255]))
    message = refused('folder', root, 'train')
    assert 'labels 0 and 255' in message and '--remap 0=0 255=1' in message
    dataset = create_dataset('folder', root, 'train', remap={0: 0, 255: 1})
    assert (dataset.classes, dataset[0][1].unique().tolist()) == (('0', '1'), [0, 1])


@pytest.mark.parametrize('named', [False, True])
def test_masks_of_0_and_255_with_two_classes(tree, named):
    """If 255 was ignored, every pixel with a label would be of class 0."""
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.write_bytes(mask_file([0, 255]))
    options = {} if named else dict(num_classes=2)
    if named:
        (root / 'classes.txt').write_text('ground\ntree\n')
    assert '--remap 0=0 255=1' in refused('folder', root, 'train', check=True, **options)
    create_dataset('folder', root, 'train', remap={0: 0, 255: 1}).check()
    create_dataset('folder', root, 'train', remap={0: 0, 1: 1, 255: 255}).check()  # on purpose
    (root / 'train/masks/a.png').write_bytes(mask_file([0, 1]))
    create_dataset('folder', root, 'train', **options).check()


def test_masks_of_one_label(tree):
    root = tree('folder')
    for label in (0, 255):
        for path in root.glob('*/masks/*.png'):
            path.write_bytes(mask_file([label]))
        message = refused('folder', root, 'train')
        assert f'only the label {label}' in message and '--remap' not in message


def test_gaps_between_the_labels(tree, caplog):
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.write_bytes(mask_file([0, 127, 255]))
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
        path.write_bytes(mask_file([1000, 65535, 7], dtype=np.uint16))
    dataset = create_dataset('folder', root, 'train', remap={1000: 0, 65535: 1, 7: 255})
    assert dataset[0][1].flatten()[:3].tolist() == [0, 1, 255]


@pytest.mark.parametrize('remap', [{0: 3}, {0: -1}, {-1: 0}, {65536: 0}, {0: 256}])
def test_invalid_remap(folder, remap):
    (label, number), *_ = remap.items()
    message = refused('folder', folder, 'train', remap=remap)
    assert f'label {label} cannot be mapped to class {number}' in message and f'--remap {label}={number}' in message


def test_remap_is_only_for_folders(tree):
    assert '--remap is only for --dataset folder' in refused('ade20k', tree('ade20k'), 'train', remap={0: 0})


@pytest.mark.parametrize('text', ['road\nsky\nroad\n', '\n \n'])
def test_invalid_class_names(folder, text):
    (folder / 'classes.txt').write_text(text)
    assert 'classes.txt must contain' in refused('folder', folder, 'train')


def test_class_names_are_not_text(folder):
    (folder / 'classes.txt').write_bytes(b'\xff\xfe\x00')
    assert 'classes.txt' in refused('folder', folder, 'train')


def test_too_many_classes(tree):
    root = tree('folder')
    (root / 'val/masks/c.png').write_bytes(mask_file([0, 400], dtype=np.uint16))
    message = refused('folder', root, 'train')
    assert '401 classes' in message and '--remap' in message
    for count in (256, 0, -1):
        message = refused('folder', root, 'train', num_classes=count)
        assert '1 to 255' in message and f'--num-classes {count}' in message
    assert '--remap' in refused('folder', root, 'train', remap={0: 0, 2: 300})
    assert len(create_dataset('folder', root, 'train', num_classes=255).classes) == 255


def test_unknown_16_bit_labels(folder):
    (folder / 'train/masks/a.png').write_bytes(mask_file([0, 256], dtype=np.uint16))  # 0 in its lower byte
    with pytest.raises(DataError, match=r'a\.png has label 256; .* 0-2, 255: .*classes\.txt'):
        create_dataset('folder', folder, 'train')[0]


# Errors


def test_unknown_dataset(folder):
    message = refused('ade20', folder, 'train')
    assert "'ade20' (did you mean ade20k?)" in message and 'folder, camvid, ' in message and '--dataset' in message


def test_missing_root(tmp_path):
    assert refused('folder', tmp_path / 'nowhere', 'train').endswith('nowhere does not exist')


def test_wrong_root(name, tmp_path):
    for inside in ('music', 'photographs'):
        (tmp_path / inside).mkdir()
    message = refused(name, tmp_path, 'train')
    assert f'is not a dataset of type {name}' in message
    assert message.endswith('found music, photographs')
    assert str(Path(TREES[name][0][0].removesuffix('/ulm'))) in message


def test_another_dataset(tree):
    message = refused('cityscapes', tree('ade20k'), 'train')
    assert 'is not a dataset of type cityscapes' in message and message.endswith('--dataset ade20k')


@pytest.mark.parametrize('name', ['ade20k', 'cityscapes', 'pascal_context_59'])
def test_a_published_dataset_is_not_a_folder(tree, name):
    assert refused('folder', tree(name), 'train').endswith(f'--dataset {name}')


def test_a_folder_is_not_a_published_dataset(tree):
    assert '--dataset folder or camvid' in refused('ade20k', tree('folder'), 'train')


def _moved(root, moves):
    for source, target in moves.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).rename(root / target)
    return refused('folder', root, 'train')


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
    assert 'it has no splits' in refused('folder', tmp_path / 'flowers', 'train')


def test_no_splits(tree, tmp_path):
    root = tree('folder')
    (root / 'train').rename(tmp_path / 'other')
    message = refused('folder', tmp_path / 'other', 'train')
    assert 'no splits' in message and 'train/images and train/masks' in message


@pytest.mark.parametrize('inside', [False, True])
def test_a_split_for_the_dataset(tree, monkeypatch, inside):
    root = tree('folder')
    monkeypatch.chdir(root / 'train')
    message = refused('folder', '.' if inside else root / 'train', 'train')
    assert f'it is one split; give the folder that contains it, {root}' in message


def test_split_without_masks(tree):
    root = tree('folder')
    (root / 'val/masks').rename(root / 'val/labels')
    message = refused('folder', root, 'val')
    assert "no split 'val'" in message and 'no folder val/masks' in message
    assert all(flag in message for flag in ('--train-split', '--val-split', '--split'))


def test_folder_without_validation_split(tree):
    root = tree('folder')
    (root / 'val').rename(root / 'test')
    message = refused('folder', root, 'val')
    assert 'val/images' in message and 'val/masks' in message and message.endswith('test, train')


def test_unknown_split(name, tree):
    root = tree(name)
    message = refused(name, root, 'trian')
    assert "'trian' (did you mean train?)" in message and message.endswith('train, val')
    assert "has no split ''" in refused(name, root, 'train+')


def test_camvid_without_a_test_split(tree):
    message = refused('camvid', tree('camvid'), 'test')
    assert "has no split 'test'" in message and message.endswith('train, val')


def test_empty_split(name, tree):
    root = tree(name)
    images, _, ending, _, _ = TREES[name]
    if name in LISTINGS:
        (root / LISTINGS[name] / 'train.txt').write_text('')
    for stem in 'ab':
        (root / images[0] / f'{stem}{ending}').unlink()
    assert 'has no images of split' in refused(name, root, 'train')


def test_missing_mask(name, tree):
    root = tree(name)
    images, masks, image_ending, mask_ending, _ = TREES[name]
    (root / masks[0] / f'b{mask_ending}').unlink()
    message = refused(name, root, 'train')
    assert message.startswith('1 of 2 images have no mask (')
    assert f'NAME{mask_ending}' in message
    assert message.endswith(f'{images[0]}/b{image_ending}')


def test_all_masks_are_missing(tree):
    root = tree('folder')
    for path in root.glob('*/masks/*.png'):
        path.unlink()
    assert refused('folder', root, 'train').startswith(
        '2 of 2 images have no mask (NAME.png or NAME.tif or NAME.tiff in '
    )


@pytest.mark.parametrize('found', ['b.jpg', 'b_mask.png', 'b.npy'])
def test_masks_of_other_names_and_formats(folder, found):
    (folder / 'train/masks/b.png').rename(folder / 'train/masks' / found)
    message = refused('folder', folder, 'train')
    assert message.startswith('1 of 2 images have no mask (NAME.png or NAME.tif or NAME.tiff in ')
    assert f'found {found}' in message and ('JPEG' in message) == found.endswith('jpg')


def test_many_missing_masks(folder):
    for index in range(9):
        (folder / f'train/images/more_{index}.png').write_bytes(image_file(form='PNG'))
    message = refused('folder', folder, 'train')
    assert message.startswith('9 of 11 images')
    assert message.endswith('more_4.png, and 4 more')


def test_two_images_with_the_same_mask(folder):
    (folder / 'train/images/a.png').write_bytes(image_file(form='PNG'))
    assert 'train/images/a.png would have the same mask' in refused('folder', folder, 'train')


def test_listed_image_is_missing(tree):
    root = tree('pascal_context_59')
    (root / 'ImageSets/SegmentationContext/train.txt').write_text('a\nx\nb\n')
    message = refused('pascal_context_59', root, 'train')
    assert message.startswith('1 of 3 images in ')
    assert message.endswith('are missing: x')
    (root / 'ImageSets/SegmentationContext/val.txt').unlink()
    assert 'val.txt' in refused('pascal_context_59', root, 'val')


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
    root = pack(tmp_path / 'data.tar', folder) if packed else folder
    message = refused('folder', root, 'train', check=True)
    assert message.startswith('1 of 2 images') and f'{root / path} is not ' in message
    assert '0x' not in message  # no addresses of Python objects
    assert create_dataset('folder', root, 'val').check() is None


def test_different_sizes(folder):
    (folder / 'train/masks/a.png').write_bytes(mask_file([0, 1, 2], (WIDTH, HEIGHT)))
    message = refused('folder', folder, 'train', check=True)
    image, mask = folder / 'train/images/a.jpg', folder / 'train/masks/a.png'
    assert f'{image} is 10 x 6 pixels' in message and f'{mask} is 6 x 10' in message


def test_check_lists_all_errors(folder):
    _damage(folder, 'train/images/a.jpg', lambda data: data[:50])
    (folder / 'train/masks/b.png').write_bytes(mask_file([9]))
    message = refused('folder', folder, 'train', check=True)
    assert message.startswith('2 of 2')
    assert message.index('a.jpg is not') < message.index('b.png has label 9')


def test_check_says_once_what_to_do_about_labels(folder):
    for stem, label in dict(a=9, b=7).items():
        (folder / f'train/masks/{stem}.png').write_bytes(mask_file([label]))
    message = refused('folder', folder, 'train', check=True)
    assert 'label 9' in message and 'label 7' in message
    assert message.count('--remap') == 1 and message.endswith('--remap')


def test_check_lists_the_first_of_many_errors(folder):
    for index in range(9):
        (folder / f'train/images/more_{index}.png').write_bytes(b'')
        (folder / f'train/masks/more_{index}.png').write_bytes(mask_file([0]))
    message = refused('folder', folder, 'train', check=True)
    assert message.startswith('9 of 11')
    assert 'more_4.png' in message and 'more_5.png' not in message and 'and 4 more' in message


def test_check_does_not_transform(folder):
    def transform(image, mask):
        raise AssertionError

    create_dataset('folder', folder, 'train', transform).check()


# Tars


def test_tar_in_worker_processes_and_copies(folder, tmp_path):
    dataset = create_dataset('folder', pack(tmp_path / 'data.tar', folder), 'train+val')
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
    assert name in refused(wrong, tree(name), 'train').partition(': choose --dataset ')[2].split(' or ')


def test_messages_name_flags(folder):
    assert '--num-classes 3' in refused('camvid', folder, 'train', num_classes=3)
    assert '--remap is only for --dataset folder' in refused('camvid', folder, 'train', remap={0: 0})


def test_postscript_is_not_an_image(folder):
    """Pillow would start Ghostscript for such a file."""
    path = sorted(folder.glob('train/images/*'))[0]
    path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n')
    dataset = create_dataset('folder', folder, 'train', num_classes=3)
    with pytest.raises(DataError, match='not an image of a known format'):
        dataset[0]
