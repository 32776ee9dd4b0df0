"""cluster_zoo.label_files: CSV files of images with several labels, read with the csv module, as datasets."""

import pytest
import torch
from PIL import Image

from cluster_zoo.datasets import check_dataset, class_counts, class_names, create_dataset, hold_out
from cluster_zoo.errors import DataError
from cluster_zoo.label_files import read_label_files

ROWS = {
    'train/a.png': 'sea;sand',
    'train/b.png': 'sea',
    'train/sub/c.png': '',
    'train/d.png': ' sky ; sea ',
    'val/e.png': 'sand',
}


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate([*ROWS, 'train/unlabeled.png']):
        path = tmp_path / 'data' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (40 * index, 0, 0)).save(path)
    return tmp_path / 'data'


def _csv(path, rows, header='file,labels'):
    path.write_text('\n'.join([header, *(f'{name},{labels}' for name, labels in rows.items())]))
    return path


def test_targets(folder, tmp_path):
    """Targets have a 1 for each label, in alphabetical order; images are those of the split, in natural order."""
    files = [_csv(tmp_path / 'labels.csv', ROWS)]
    train = create_dataset('', folder, 'train', label_files=files)
    assert class_names(train) == {0: 'sand', 1: 'sea', 2: 'sky'}
    assert train.filenames() == ['a.png', 'b.png', 'd.png', 'sub/c.png']
    targets = torch.stack([target for _, target in train])
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert train[2][0].getpixel((0, 0)) == (120, 0, 0)
    counts, total = class_counts(train, 3)
    assert counts.tolist() == [1, 3, 1] and total == 4
    val = create_dataset('', folder, 'validation', label_files=files)
    assert [target.tolist() for _, target in val] == [[1, 0, 0]]
    check_dataset(val, 3, 'validation', like=train)


def test_several_files_are_one(folder, tmp_path):
    names = list(ROWS)
    parts = [names[:2], names[2:]]
    files = [_csv(tmp_path / f'{i}.csv', {name: ROWS[name] for name in part}) for i, part in enumerate(parts)]
    assert len(create_dataset('', folder, 'train', label_files=files)) == 4


def test_class_map(folder, tmp_path):
    files = [_csv(tmp_path / 'labels.csv', ROWS)]
    known = dict(sky=0, snow=1, sea=2, sand=3)
    dataset = create_dataset('', folder, 'val', label_files=files, class_map=known)
    assert dataset[0][1].tolist() == [0, 0, 0, 1]
    with pytest.raises(DataError, match="1 labels are not among the classes, such as 'sand'"):
        create_dataset('', folder, 'val', label_files=files, class_map=dict(sky=0, sea=1))


def test_images_without_a_row_are_counted(folder, tmp_path, caplog):
    caplog.set_level('INFO')
    files = [_csv(tmp_path / 'labels.csv', ROWS)]
    check_dataset(create_dataset('', folder, 'train', label_files=files), 3, 'train')
    assert '1 files are not used: 1 images without a class' in caplog.text


def test_unreadable_image_has_targets_below_0(folder, tmp_path):
    (folder / 'val' / 'e.png').write_bytes(b'')
    files = [_csv(tmp_path / 'labels.csv', ROWS)]
    [(image, target)] = create_dataset('', folder, 'val', label_files=files, replace_unreadable=False)
    assert target.tolist() == [-1, -1, -1] and image.getextrema() == ((0, 0),) * 3


def test_hold_out_keeps_combinations_of_labels_in_both_parts(tmp_path):
    rows = {f'{index}.png': ('a;b', 'a', '')[index % 3] for index in range(30)}
    for name in rows:
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    dataset = create_dataset('', tmp_path, label_files=[_csv(tmp_path / 'labels.csv', rows)])
    for part, count in zip(hold_out(dataset, 0.2, 0), (8, 2)):
        targets = [tuple(target.tolist()) for _, target in part.reader.samples]
        assert {target: targets.count(target) for target in targets} == {(1, 1): count, (1, 0): count, (0, 0): count}


@pytest.mark.parametrize(
    'text, message',
    [
        ('train/a.png,sea\n', "must start with the line 'file,labels'"),
        ('file,labels\ntrain/a.png\n', 'line 2: expected a file and its labels'),
        ('file,labels\ntrain/a.png,sea,sky\n', 'line 2: .* with ; between labels'),
        ('file,labels\ntrain/a.png,sea\n./train/a.png,sky\n', 'line 3: train/a.png has labels already'),
        ('file,labels\ntrain/a.png,\n', 'no file has a label'),
        ('file,labels\ntrain/a.png,sea\ntrain/x.png,sea\n', '1 images do not exist or are no files, such as'),
        ('file,labels\na.png,sea\n', 'names must be relative to'),
        ('file,labels\n../a.png,sea\n', 'names must be relative to'),
        ('', "must start with the line 'file,labels'"),
    ],
)
def test_errors(folder, tmp_path, text, message):
    (tmp_path / 'labels.csv').write_text(text)
    with pytest.raises(DataError, match=message) as error:
        create_dataset('', folder, 'train', label_files=[tmp_path / 'labels.csv'])
    assert '\n' not in str(error.value)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / 'labels.csv').write_bytes(b'\xff\xfe\x00')
    for path in (tmp_path / 'labels.csv', tmp_path / 'missing.csv', tmp_path):
        with pytest.raises(DataError, match='cannot be read'):
            read_label_files([path])


def test_an_archive_has_no_label_files(tmp_path):
    with pytest.raises(DataError, match='is not a folder of images'):
        create_dataset('cluster_zoo/cifar10_sample', label_files=['labels.csv'])
