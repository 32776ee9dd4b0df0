"""cluster_zoo.datasets: the bundled sample, splits, checks of labels, unreadable images."""

import hashlib
import io
import json
import tarfile

import pytest
import timm.data
import torch
from PIL import Image, features
from timm.data.dataset import AugMixDataset

from cluster_zoo.datasets import (
    ImageDataset,
    check_dataset,
    class_names,
    create_dataset,
    hold_out,
    image_names,
    unreadable_images,
)
from cluster_zoo.errors import DataError

COLORS = {'blue': (0, 0, 255), 'green': (0, 255, 0), 'red': (255, 0, 0)}
CIFAR10 = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


def _png(color, size=(6, 4)):
    data = io.BytesIO()
    Image.new('RGB', size, color).save(data, 'PNG')
    return data.getvalue()


def _folder(root, count=3, classes=COLORS):
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f'{index}.png').write_bytes(_png(COLORS[name]))
    return root


def _tar(path, members):
    """Members are (name, bytes), or (name, None) for a folder."""
    with tarfile.open(path, 'w') as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data or b''))
    return path


def _color_members(count=2):
    return [(f'{name}/{index}.png', _png(color)) for name, color in COLORS.items() for index in range(count)]


def _message(error):
    assert '\n' not in str(error.value)
    return str(error.value)


# The bundled sample


def test_sample_is_cifar10():
    dataset = create_dataset('cluster_zoo/cifar10_sample')
    assert class_names(dataset) == dict(enumerate(CIFAR10))
    pixels, targets = hashlib.sha256(), []
    for image, target in dataset:
        assert (image.size, image.mode) == ((32, 32), 'RGB')
        pixels.update(image.tobytes())
        targets.append(int(target))
    assert sorted(targets) == [index // 100 for index in range(1000)]
    # SHA-256 of the first 100 images per class of the original test batch, sorted by class
    assert pixels.hexdigest() == '7c38c61aa8c7f1716d28cda247fd6f77a8db4bc051de264382e94804d47bce91'


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_sample_has_one_split_and_needs_no_root(split):
    dataset = create_dataset('cluster_zoo/cifar10_sample', root=None, split=split, is_training=True, batch_size=8)
    assert len(dataset) == 1000
    check_dataset(dataset, 10, split)


def test_sample_through_timm_loader():
    dataset = create_dataset('cluster_zoo/cifar10_sample')
    first = dataset[0][0].getpixel((0, 0))  # opened in this process first: workers must not share its file position
    loader = timm.data.create_loader(
        dataset, (3, 32, 32), 250, mean=(0,) * 3, std=(1,) * 3, crop_pct=1.0, num_workers=2, device=torch.device('cpu')
    )
    images, targets = zip(*loader)
    assert torch.cat(targets).bincount().tolist() == [100] * 10
    assert (images[0][0, :, 0, 0] * 255).round().int().tolist() == list(first)
    assert unreadable_images(dataset) == []


def test_unknown_bundled_dataset():
    with pytest.raises(DataError, match='cluster_zoo/cifar100_sample'):
        create_dataset('cluster_zoo/cifar100_sample')


# Splits


@pytest.mark.parametrize(
    ('folder', 'split'), [('val', 'validation'), ('validation', 'val'), ('training', 'train'), ('test', 'test')]
)
def test_split_folder_and_synonyms(tmp_path, folder, split):
    _folder(tmp_path / folder)
    _folder(tmp_path / 'train' / 'extra', classes=['red']) if folder != 'training' else None
    dataset = create_dataset('', tmp_path, split)
    assert len(dataset) == 9
    assert class_names(dataset) == dict(enumerate(COLORS))


def test_split_archives(tmp_path):
    _tar(tmp_path / 'train.tar', _color_members(4))
    _tar(tmp_path / 'val.tar', _color_members(2))
    assert len(create_dataset('', tmp_path, 'train')) == 12
    assert len(create_dataset('', tmp_path, 'validation')) == 6
    assert len(create_dataset('', tmp_path / 'train.tar', 'validation')) == 12  # no search beside a file


def test_folder_without_splits(tmp_path):
    assert len(create_dataset(None, str(_folder(tmp_path)), 'train')) == 9


def test_same_images_as_timm(tmp_path):
    _folder(tmp_path / 'val')
    ours, theirs = create_dataset('', tmp_path, 'val'), timm.data.create_dataset('', str(tmp_path), 'val')
    assert ours.filenames() == theirs.filenames()
    assert [int(target) for _, target in ours] == [int(target) for _, target in theirs]
    assert ours[4][0].tobytes() == theirs[4][0].tobytes()


def test_reader_options_reach_timm(tmp_path):
    _folder(tmp_path)
    grey, _ = create_dataset('', tmp_path, 'val', input_img_mode='L')[0]
    assert grey.mode == 'L'
    raw, _ = create_dataset('', tmp_path, 'val', load_bytes=True)[0]
    assert raw == _png(COLORS['blue'])


# Other kinds of datasets


def test_hugging_face_dataset(tmp_path):
    pytest.importorskip('datasets', reason='the extra "datasets" is not installed')
    _damage(_folder(tmp_path / 'images' / 'train'))
    dataset = create_dataset(f'hfds/{tmp_path}/images', tmp_path / 'cache', 'train')
    check_dataset(dataset, 3, 'train')
    assert [int(target) for _, target in dataset] == [0, 0, 0, 2, 2, 2, 2, 2, 2]
    assert len(unreadable_images(dataset)) == 3
    with pytest.raises(DataError, match='validation'):
        create_dataset(f'hfds/{tmp_path}/images', tmp_path / 'cache', 'validation')


def test_web_dataset(tmp_path):
    pytest.importorskip('webdataset', reason='the extra "datasets" is not installed')
    _tar(
        tmp_path / 'x-0000.tar', [('0.png', _png(COLORS['red'])), ('0.cls', b'2'), ('1.png', b'gone'), ('1.cls', b'1')]
    )
    split = dict(name='train', num_samples=2, filenames=['x-0000.tar'], shard_lengths=[2])
    (tmp_path / 'info.json').write_text(json.dumps(dict(splits=dict(train=split))))
    dataset = create_dataset('wds/x', tmp_path, 'train')
    check_dataset(dataset, 3, 'train')
    ((image, target),) = dataset
    assert (image.getpixel((0, 0)), target) == (COLORS['red'], 2)
    with pytest.raises(DataError, match='validation not found'):
        create_dataset('wds/x', tmp_path, 'validation')


# Errors of create_dataset


def test_missing_directory(tmp_path):
    with pytest.raises(DataError, match='does not exist') as error:
        create_dataset('', tmp_path / 'nowhere', 'train')
    assert 'nowhere' in _message(error)


@pytest.mark.parametrize('root', [None, ''])
def test_no_directory(root):
    with pytest.raises(DataError, match='data directory'):
        create_dataset('', root, 'train')


def test_missing_split_beside_another(tmp_path):
    _folder(tmp_path / 'train')
    with pytest.raises(DataError, match='no validation split, only train'):
        create_dataset('', tmp_path, 'validation')


def test_folder_without_images(tmp_path):
    (tmp_path / 'cat').mkdir()
    with pytest.raises(DataError, match='0 images') as error:
        create_dataset('', tmp_path, 'train')
    _message(error)


def test_file_that_is_not_an_archive(tmp_path):
    path = tmp_path / 'images.zip'
    path.write_bytes(b'PK')
    with pytest.raises(DataError, match=r'images\.zip'):
        create_dataset('', path, 'train')


@pytest.mark.parametrize('content', [b'', b'not an archive' * 100], ids=['empty file', 'garbage'])
def test_broken_archive(tmp_path, content):
    path = tmp_path / 'images.tar'
    path.write_bytes(content)
    with pytest.raises(DataError, match=r'images\.tar') as error:
        create_dataset('', path, 'train')
    assert 'images.tar' in _message(error)


def test_archive_without_images(tmp_path):
    path = _tar(tmp_path / 'images.tar', [('cat/readme.txt', b'none')])
    with pytest.raises(DataError, match=r'images\.tar'):
        create_dataset('', path, 'train')


def test_missing_torchvision_dataset(tmp_path):
    with pytest.raises(DataError, match='torch/cifar10') as error:
        create_dataset('torch/cifar10', tmp_path, 'train')
    assert 'download' in _message(error)


def test_missing_package_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'datasets'", name='datasets')

    monkeypatch.setattr(timm.data, 'create_dataset', refuse)
    with pytest.raises(DataError, match=r"pip install 'cluster_zoo\[datasets\]'"):
        create_dataset('hfds/somebody/something', tmp_path, 'train')


def test_strict_streamed_dataset_is_refused():
    with pytest.raises(DataError, match='streamed'):
        create_dataset('wds/any', 'anywhere', 'train', strict=True)


# Errors of check_dataset


def test_check_of_valid_datasets(tmp_path):
    for root in (_folder(tmp_path / 'folder'), _tar(tmp_path / 'images.tar', _color_members())):
        check_dataset(create_dataset('', root, 'train'), 3, 'train')


@pytest.mark.parametrize('num_classes', [2, 4])
def test_check_class_count(tmp_path, num_classes):
    dataset = create_dataset('', _folder(tmp_path), 'train')
    with pytest.raises(DataError, match='3 classes') as error:
        check_dataset(dataset, num_classes, 'train')
    assert str(num_classes) in _message(error) and '--num-classes 3' in _message(error)


def test_check_empty_class_folder(tmp_path):
    _folder(tmp_path)
    (tmp_path / 'yellow').mkdir()
    (tmp_path / 'yellow' / 'notes.txt').write_text('soon')
    with pytest.raises(DataError, match=r'no images .* yellow'):
        check_dataset(create_dataset('', tmp_path, 'train'), 3, 'train')


def test_check_ignores_hidden_and_unmapped_folders(tmp_path):
    _folder(tmp_path)
    (tmp_path / '.cache').mkdir()
    dataset = create_dataset('', tmp_path, 'train', class_map={'blue': 0, 'red': 1})
    assert len(dataset) == 6
    check_dataset(dataset, 2, 'train')


def test_check_empty_folder_beside_mapped_classes(tmp_path):
    _folder(tmp_path)
    (tmp_path / 'yellow').mkdir()
    dataset = create_dataset('', tmp_path, 'train', class_map={'blue': 0, 'red': 1})
    with pytest.raises(DataError, match=r'no images .* yellow'):
        check_dataset(dataset, 2, 'train')


def test_check_empty_class_in_archive(tmp_path):
    path = _tar(tmp_path / 'images.tar', [('all', None), ('all/yellow', None)] + [
        (f'all/{name}', data) for name, data in _color_members()
    ])  # fmt: skip
    with pytest.raises(DataError, match='all/yellow'):
        check_dataset(create_dataset('', path, 'train'), 3, 'train')


def test_check_empty_inner_archive(tmp_path):
    inner = {name: _tar(tmp_path / f'{name}.tar', [('0.png', _png(color))]) for name, color in COLORS.items()}
    inner['yellow'] = _tar(tmp_path / 'yellow.tar', [('readme.txt', b'none')])
    path = _tar(tmp_path / 'images.tar', [(f'{name}.tar', file.read_bytes()) for name, file in inner.items()])
    dataset = create_dataset('', path, 'train')
    assert len(dataset) == 3
    with pytest.raises(DataError, match=r'yellow.tar'):
        check_dataset(dataset, 3, 'train')


def test_check_class_map(tmp_path):
    class_map = {'blue': 0, 'green': 5, 'red': 7, 'yellow': 9}
    dataset = create_dataset('', _folder(tmp_path), 'validation', class_map=class_map)
    assert class_names(dataset)[5] == 'green'
    check_dataset(dataset, 10, 'validation')  # a test set may have a subset of the classes
    with pytest.raises(DataError, match='10 classes'):
        check_dataset(dataset, 9, 'validation')
    with pytest.raises(DataError, match='yellow'):
        check_dataset(dataset, 10, 'train')


def test_check_classes_of_both_splits_agree(tmp_path):
    _folder(tmp_path / 'train', classes=['blue', 'green'])
    _folder(tmp_path / 'val', classes=['blue', 'red'])
    train, val = (create_dataset('', tmp_path, split) for split in ('train', 'val'))
    check_dataset(val, 2, 'val')
    with pytest.raises(DataError, match='different classes, only one of them has green, red'):
        check_dataset(val, 2, 'val', like=train)
    three = create_dataset('', _folder(tmp_path / 'more' / 'train'), 'train')
    with pytest.raises(DataError, match='only one of them has red') as error:  # another --num-classes would not help
        check_dataset(train, 3, 'val', like=three)
    assert '--num-classes' not in _message(error)
    check_dataset(train, 2, 'train', like=train)


def test_check_empty_dataset():
    with pytest.raises(DataError, match='no images'):
        check_dataset(torch.utils.data.TensorDataset(torch.zeros(0, 3)), 10, 'train')


def test_check_without_class_names():
    check_dataset(torch.utils.data.TensorDataset(torch.zeros(4, 3)), 10, 'train')


# Unreadable images


def _damage(root):
    """Damages the three images of 'green' in different ways; the other six stay readable."""
    whole = (root / 'green' / '1.png').read_bytes()
    (root / 'green' / '0.png').write_bytes(b'')
    (root / 'green' / '1.png').write_bytes(whole[:-30])
    (root / 'green' / '2.png').write_bytes(b'<html>404</html>')
    return root


def test_unreadable_images_are_replaced_and_counted_once(tmp_path):
    dataset = create_dataset('', _damage(_folder(tmp_path)), 'train')
    for _ in range(2):
        for index in range(len(dataset)):
            image, target = dataset[index]
            assert image.getpixel((0, 0)) == list(COLORS.values())[target]
    assert unreadable_images(dataset) == [f'green/{index}.png' for index in range(3)]


@pytest.mark.parametrize(('context', 'workers'), [('fork', 2), ('spawn', 1)])
def test_unreadable_images_are_counted_across_workers(tmp_path, context, workers):
    dataset = create_dataset('', _damage(_folder(tmp_path)), 'train')
    dataset.transform = _pixel
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=workers, multiprocessing_context=context)
    assert torch.cat([target for _, target in loader]).tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 2]
    assert len(unreadable_images(dataset)) == 3
    assert len(unreadable_images(AugMixDataset(_with_splits(dataset)))) == 3


def _pixel(image):
    return torch.tensor(image.getpixel((0, 0)))


def _with_splits(dataset):
    dataset.transform = (None, None, None)
    return dataset


@pytest.mark.parametrize('workers', [0, 1])
def test_strict_names_the_file(tmp_path, workers):
    dataset = create_dataset('', _damage(_folder(tmp_path)), 'train', strict=True)
    dataset.transform = _pixel
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=workers)
    with pytest.raises(DataError, match=r'^green/0\.png') as error:
        list(loader)
    _message(error)


def test_all_images_unreadable(tmp_path):
    _folder(tmp_path, count=4)
    for path in tmp_path.rglob('*.png'):
        path.write_bytes(b'gone')
    with pytest.raises(DataError, match='10 images'):
        create_dataset('', tmp_path, 'train')[0]


def test_deleted_file_is_unreadable(tmp_path):
    dataset = create_dataset('', _folder(tmp_path), 'train')
    (tmp_path / 'blue' / '1.png').unlink()
    dataset[1]
    assert unreadable_images(dataset) == ['blue/1.png']


def test_errors_of_the_transform_are_raised(tmp_path):
    dataset = create_dataset('', _folder(tmp_path), 'train')
    assert isinstance(dataset, ImageDataset)
    dataset.transform = lambda image: image.rotate('sideways')
    with pytest.raises(TypeError):
        dataset[0]
    assert unreadable_images(dataset) == []


# What is used


@pytest.mark.parametrize('suffix', ['.webp', '.tif', '.bmp', '.gif', '.JPG', '.ppm', '.avif'])
@pytest.mark.parametrize('archive', [False, True])
def test_all_image_formats(tmp_path, suffix, archive):
    if suffix == '.avif' and not features.check('avif'):
        pytest.skip('this Pillow has no AVIF')
    before = timm.data.readers.img_extensions.get_img_extensions()
    for name in COLORS:
        (tmp_path / 'data' / name).mkdir(parents=True)
        for index in range(2):
            Image.new('RGB', (16, 16), COLORS[name]).save(tmp_path / 'data' / name / f'{index}{suffix}')
    root = tmp_path / 'data'
    if archive:
        members = [(str(p.relative_to(root)), p.read_bytes()) for p in sorted(root.rglob('*')) if p.is_file()]
        root = _tar(tmp_path / 'data.tar', members)
    dataset = create_dataset('', root, 'train', strict=True)
    check_dataset(dataset, 3, 'train')
    assert [target for _, target in dataset] == [0, 0, 1, 1, 2, 2]
    assert timm.data.readers.img_extensions.get_img_extensions() == before  # timm is as it was


@pytest.mark.parametrize('archive', [False, True])
def test_unused_files_are_one_line(tmp_path, caplog, archive):
    caplog.set_level('INFO')
    root = _folder(tmp_path / 'data')
    for name in ('red/a.txt', 'red/b.txt', 'blue/c.heic', 'README', '.hidden'):
        (root / name).write_bytes(b'?')
    if archive:
        members = [(str(p.relative_to(root)), p.read_bytes()) for p in sorted(root.rglob('*')) if p.is_file()]
        root = _tar(tmp_path / 'data.tar', members)
    check_dataset(create_dataset('', root, 'train'), 3, 'train')
    [line] = [record.message for record in caplog.records if 'not used' in record.message]
    assert line.startswith(f'{root}: 4 files are not used: 2 .txt, ')
    assert {'2 .txt', '1 .heic', '1 without extension'} <= set(line.partition('used: ')[2].rstrip('.').split(', '))
    caplog.clear()
    check_dataset(create_dataset('', root, 'train', class_map=dict(blue=0, red=1)), 2, 'val')
    assert '3 images without a class' in caplog.text


def test_images_outside_of_class_folders(tmp_path):
    _folder(tmp_path)
    for index in range(2):
        (tmp_path / f'{index}.png').write_bytes(_png('white'))
    with pytest.raises(DataError, match='has 2 images outside of class folders') as error:
        check_dataset(create_dataset('', tmp_path, 'train'), 4, 'train')
    assert f'{tmp_path}/CLASS' in _message(error)


@pytest.mark.parametrize('folder', ['.cache', 'red/.ipynb_checkpoints'])
def test_images_in_hidden_folders(tmp_path, folder):
    _folder(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / '0.png').write_bytes(_png('white'))
    with pytest.raises(DataError, match='hidden folders') as error:
        check_dataset(create_dataset('', tmp_path, 'train'), 4, 'train')
    assert folder.rpartition('/')[2] in _message(error)


def test_postscript_is_not_an_image(tmp_path):
    """Pillow would start Ghostscript for such a file."""
    _folder(tmp_path)
    (tmp_path / 'blue' / '1.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n')
    with pytest.raises(DataError, match=r'blue/1\.png is not a readable image'):
        create_dataset('', tmp_path, 'train', strict=True)[1]


def test_evaluation_does_not_replace_unreadable_images(tmp_path):
    dataset = create_dataset('', _damage(_folder(tmp_path)), 'train', replace_unreadable=False)
    samples = list(dataset)
    replaced = list(create_dataset('', tmp_path, 'train'))
    marked = [index for index, (_, target) in enumerate(samples) if target == -1]
    assert [dataset.filename(index) for index in marked] == unreadable_images(dataset)
    assert all(samples[i][0].tobytes() == replaced[i][0].tobytes() for i in range(9) if i not in marked)


def test_evaluation_of_a_missing_disk(tmp_path):
    _folder(tmp_path, count=5)
    dataset = create_dataset('', tmp_path, 'train', replace_unreadable=False)
    for path in tmp_path.rglob('*.png'):
        path.unlink()
    with pytest.raises(DataError, match='10 images in a row'):
        list(dataset)


# Hold-out


@pytest.mark.parametrize('archive', [False, True])
def test_hold_out(tmp_path, archive):
    root = tmp_path / 'data'
    for name, count in (('blue', 20), ('green', 7), ('red', 2)):
        _folder(root, count, [name])
    if archive:
        members = [(str(p.relative_to(root)), p.read_bytes()) for p in sorted(root.rglob('*')) if p.is_file()]
        root = _tar(tmp_path / 'data.tar', members)
    dataset = create_dataset('', root, 'train')
    train, held = hold_out(dataset, 0.1, seed=3)
    assert sorted([*train.filenames(), *held.filenames()]) == sorted(dataset.filenames())
    labels = [[int(target) for _, target in part] for part in (train, held)]
    assert [labels[0].count(i) for i in range(3)] == [18, 6, 1]
    assert [labels[1].count(i) for i in range(3)] == [2, 1, 1]
    images = {name: image.tobytes() for name, (image, _) in zip(dataset.filenames(), dataset)}
    assert all(images[name] == image.tobytes() for name, (image, _) in zip(held.filenames(), held))
    again = hold_out(create_dataset('', root, 'train'), 0.1, seed=3)[1]
    other = [hold_out(dataset, 0.1, seed=seed)[1].filenames() for seed in range(5)]
    assert again.filenames() == held.filenames() and len(set(map(tuple, other))) > 1
    for part in (train, held):
        check_dataset(part, 3, 'train')
    assert len(dataset) == 29 and not held.replace_unreadable and train.replace_unreadable


@pytest.mark.parametrize('archive', [False, True])
def test_hold_out_by_name(tmp_path, archive, caplog):
    """Images of inner archives have the same names in all classes."""
    root = _folder(tmp_path / 'data', 4)
    if archive:
        inner = {name: [(f'{index}.png', _png(color)) for index in range(4)] for name, color in COLORS.items()}
        files = [(f'{name}.tar', _tar(tmp_path / 'inner.tar', members).read_bytes()) for name, members in inner.items()]
        root = _tar(tmp_path / 'data.tar', files)
    dataset = create_dataset('', root, 'train')
    names = image_names(dataset)
    assert len(set(names)) == 12 and len(set(dataset.filenames())) == (4 if archive else 12)
    held = hold_out(dataset, 0.25, seed=3)[1]
    rest, again = hold_out(dataset, 0.9, seed=4, names=image_names(held))
    assert image_names(again) == image_names(held) and {*image_names(rest), *image_names(again)} == set(names)
    assert not again.replace_unreadable and 'lacks' not in caplog.text
    hold_out(dataset, 0.9, seed=4, names=['none.png', 'neither.png', names[0]])
    assert 'lacks 2 of the 3 held-out images' in caplog.text
    with pytest.raises(DataError, match=r'none of the 1 held-out images .* --split'):
        hold_out(dataset, 0.9, seed=4, names=['none.png'])


def test_hold_out_of_single_images_and_of_other_datasets(tmp_path, caplog):
    with pytest.raises(DataError, match=r'No class .* has two images'):
        hold_out(create_dataset('', _folder(tmp_path, count=1), 'train'), 0.5, 0)
    with pytest.raises(DataError, match=r'a folder or a \.tar only'):
        hold_out(torch.utils.data.TensorDataset(torch.zeros(4)), 0.5, 0)
    _folder(tmp_path / 'more', 2, ['red'])
    _folder(tmp_path / 'more', 1, ['blue', 'green'])
    hold_out(create_dataset('', tmp_path / 'more', 'train'), 0.5, 0)
    assert caplog.text.count('single image') == 1 and '2 classes' in caplog.text
