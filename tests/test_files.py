"""cluster_zoo.files: folders with links, pipes and sockets, complete and damaged tars, as datasets of both kinds."""

import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm.data
from PIL import Image

from cluster_zoo.datasets import check_dataset, class_names, create_dataset
from cluster_zoo.errors import DataError
from cluster_zoo.files import replacing
from segmentation.data.files import open_files

ROOT = Path(__file__).parents[1]
IMAGES = ['blue/0.png', 'blue/1.png', 'red/0.png', 'red/1.png']


def _png(color='red'):
    data = io.BytesIO()
    Image.new('RGB', (6, 4), color).save(data, 'PNG')
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes with two images each."""
    for name in ('blue/0.png', 'blue/1.png', 'red/0.png', 'red/1.png'):
        (tmp_path / 'data' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'data' / name).write_bytes(_png())
    return tmp_path / 'data'


CHECK = """
import logging, sys
from cluster_zoo.datasets import check_dataset, class_names, create_dataset
from cluster_zoo.errors import DataError
from segmentation.data.files import open_files
logging.basicConfig(level='INFO', format='%(message)s')
root, label_files = sys.argv[1], sys.argv[2:]
try:
    dataset = create_dataset('', root, 'train', label_files=label_files)
    check_dataset(dataset, len(class_names(dataset)), 'train')
    print('classification:', *sorted(dataset.filenames()))
    print('segmentation:', *open_files(root).below(''))
except DataError as error:
    print('error:', error)
"""


def _check(root, *label_files):
    """Opens a folder in another process, which may hang, and returns what it prints."""
    run = subprocess.run(
        [sys.executable, '-c', CHECK, root, *label_files], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines(), run.stderr


# Folders


@pytest.mark.parametrize(
    'links',
    [
        {'red/loop': '.', 'red/second': '..', 'blue/third': '../red'},
        {'red/to_blue': '../blue', 'blue/to_red': '../red'},
        {'red/out': '../..', 'all': '.'},
    ],
)
def test_links_in_a_circle(folder, links):
    """Every image is found at its own path, and no path contains a folder twice."""
    for link, target in links.items():
        (folder / link).symlink_to(target, target_is_directory=True)
    lines, _ = _check(folder)
    for line in lines:
        kind, *names = line.split()
        assert kind in ('classification:', 'segmentation:') and set(IMAGES) <= set(names)
        for name in names:
            parents = [parent.resolve() for parent in (folder / name).parents]
            assert len(set(parents)) == len(parents)
        if not any(target.startswith('../') and target != '../..' for target in links.values()):
            assert names == IMAGES
    assert len(lines) == 2


def test_circle_of_a_multi_label_dataset(folder):
    (folder / 'red' / 'loop').symlink_to('..', target_is_directory=True)
    (folder / 'blue' / 'loop').symlink_to('..', target_is_directory=True)
    labels = folder.parent / 'labels.csv'
    labels.write_text('file,labels\nblue/0.png,a;b\nred/0.png,a\n')
    lines, log = _check(folder, labels)
    assert lines[0] == 'classification: blue/0.png red/0.png'
    assert '2 files are not used: 2 images without a class' in log


def test_links_to_folders_and_files(folder):
    """As in timm: links to folders, also to one twice, and to files."""
    store = folder.parent / 'store'
    (store / 'deep').mkdir(parents=True)
    for name in ('a.png', 'deep/b.png'):
        (store / name).write_bytes(_png())
    (folder / 'green').symlink_to(store, target_is_directory=True)
    (folder / 'red' / 'more').symlink_to('../../store/deep', target_is_directory=True)
    (folder / 'red' / 'again').symlink_to('more', target_is_directory=True)
    (folder / 'red' / '2.png').symlink_to('../blue/0.png')
    root = folder.parent / 'link'
    root.symlink_to(folder, target_is_directory=True)
    ours, theirs = create_dataset('', root, 'train', strict=True), timm.data.create_dataset('', str(root), 'train')
    assert ours.filenames() == theirs.filenames() and len(ours) == 9
    assert [target for _, target in ours] == [target for _, target in theirs]
    assert class_names(ours) == {index: name for name, index in theirs.reader.class_to_idx.items()}
    assert open_files(root).below('') == sorted(ours.filenames())


@pytest.mark.parametrize('root', ['data', 'data/', '.', 'data/../data'])
def test_same_listing_as_timm(folder, monkeypatch, root):
    monkeypatch.chdir(folder if root == '.' else folder.parent)
    for path in ('red/.hidden.png', 'red/10.PNG', 'red/9.png', 'blue/sub/a.jpeg', 'blue/note.txt'):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(_png())
    for class_map in (None, dict(red=3, sub=1)):
        ours = create_dataset('', root, 'train', class_map=class_map)
        theirs = timm.data.create_dataset('', os.path.normpath(root), 'train', class_map=class_map)
        assert ours.filenames() == theirs.filenames() and len(ours) == (6 if class_map else 8)
        assert [target for _, target in ours.reader.samples] == [target for _, target in theirs.reader.samples]
        assert ours.reader.class_to_idx == theirs.reader.class_to_idx


def test_pipes_and_sockets_are_no_images(folder, caplog, monkeypatch):
    caplog.set_level('INFO')
    os.mkfifo(folder / 'red' / 'pipe.png')
    (folder / 'red' / 'link.png').symlink_to('pipe.png')
    (folder / 'red' / 'device.png').symlink_to('/dev/zero')
    monkeypatch.chdir(folder / 'red')  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind('socket.png')
        dataset = create_dataset('', folder, 'train')
        assert sorted(dataset.filenames()) == IMAGES
        check_dataset(dataset, 2, 'train')
        assert open_files(folder).below('') == IMAGES
    assert f'{folder}: 4 files are not used: 4 pipes, sockets or devices.' in caplog.text


def test_class_of_pipes_is_empty(folder):
    (folder / 'green').mkdir()
    os.mkfifo(folder / 'green' / '0.png')
    with pytest.raises(DataError, match='no images of green'):
        check_dataset(create_dataset('', folder, 'train'), 2, 'train')


def test_pipe_in_a_label_file(folder):
    os.mkfifo(folder / 'pipe.png')
    (folder / 'labels.csv').write_text('file,labels\npipe.png,a\n')
    with pytest.raises(DataError, match=r'1 images .* no files, such as .*pipe\.png'):
        create_dataset('', folder, 'train', label_files=[folder / 'labels.csv'])


def test_pipe_instead_of_an_archive(tmp_path):
    os.mkfifo(tmp_path / 'data.tar')
    for module in ('cluster_zoo.datasets import create_dataset as f', 'segmentation.data.files import open_files as f'):
        call = "f('', 'data.tar')" if 'create' in module else "f('data.tar')"
        script = f'import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom {module}\n{call}'
        run = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert 'DataError: ' in run.stderr and 'neither a folder nor a' in run.stderr.splitlines()[-1]


@pytest.mark.skipif(os.geteuid() == 0, reason='root lists all folders')
def test_folder_that_cannot_be_listed(folder):
    (folder / 'red').chmod(0)
    try:
        with pytest.raises(DataError, match='red cannot be listed: Permission denied'):
            create_dataset('', folder, 'train')
    finally:
        (folder / 'red').chmod(0o755)


# Archives

FORMATS = {'gnu': tarfile.GNU_FORMAT, 'pax': tarfile.PAX_FORMAT, 'ustar': tarfile.USTAR_FORMAT}
NAMES = ['blue/0.png', 'blue/note.txt', 'blue/1.png', 'red/0.png', 'red/1.png', 'red/last.txt']


def _tar(path, members, kind='pax'):
    with tarfile.open(path, 'w', format=FORMATS[kind], encoding='utf-8') as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _images(names=NAMES):
    return {name: _png() if name.endswith('.png') else b'text' for name in names}


def _positions(path):
    """The positions of the headers, and of the end."""
    with tarfile.open(path) as archive:
        return {member.name: member.offset for member in archive}, archive.offset


def _nested(tmp_path, damage=None):
    """A tar of a tar for each class; ``damage`` changes the one of the first class."""
    inner = {}
    for name in ('blue', 'red'):
        path = _tar(tmp_path / f'{name}.tar', _images(['0.png', '1.png', 'note.txt', '2.png']))
        if damage and name == 'blue':
            damage(path)
        inner[path.name] = path.read_bytes()
    return _tar(tmp_path / 'data.tar', inner)


def _errors(root):
    """The messages of both kinds of datasets."""
    messages = []
    for call in (lambda: create_dataset('', root, 'train'), lambda: open_files(root)):
        with pytest.raises(DataError) as error:
            call()
        messages.append(str(error.value))
        assert '\n' not in messages[-1] and str(root) in messages[-1]
    return messages


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('end', ['as written', 'none', 'one block', 'more', 'more with undefined data'])
def test_complete_archives(tmp_path, kind, end):
    names = [
        *NAMES,
        f'{"deep/" * 20}red/{"long" * 20}.png',
        *([f'red/{"x" * 300}.png', 'red/ä.png'] if kind != 'ustar' else []),
    ]
    root = _tar(tmp_path / 'data.tar', _images(names), kind)
    content = root.read_bytes()[: _positions(root)[1]]
    content += {
        'as written': root.read_bytes()[len(content) :],
        'none': b'',
        'one block': bytes(512),
        'more': bytes(2**20),
        'more with undefined data': bytes(1024) + os.urandom(1300),
    }[end]
    root.write_bytes(content)
    dataset = create_dataset('', root, 'train', strict=True)
    assert sorted(dataset.filenames()) == sorted(name for name in names if name.endswith('.png'))
    assert {image.getpixel((0, 0)) for image, _ in dataset} == {(255, 0, 0)}
    assert open_files(root).below('') == sorted(names)
    check_dataset(dataset, 2, 'train')


def test_sparse_file_in_an_archive(tmp_path):
    """GNU tar stores fewer bytes than such a file has, so that its size does not lead to the next header."""
    (tmp_path / 'red').mkdir()
    with open(tmp_path / 'red' / '0.png', 'wb') as file:
        file.write(_png())
        file.truncate(2**20)
    command = ['tar', '--sparse', '-cf', 'data.tar', 'red/0.png']
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip('there is no GNU tar')
    assert len(create_dataset('', tmp_path / 'data.tar', 'train')) == 1


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('index', range(1, len(NAMES)))
@pytest.mark.parametrize('damage', ['changed', 'zeroed', 'cut'])
def test_damaged_header(tmp_path, kind, index, damage):
    root = _tar(tmp_path / 'data.tar', _images(), kind)
    position, content = _positions(root)[0][NAMES[index]], bytearray(root.read_bytes())
    if damage == 'cut':
        del content[position + 100 :]
    elif damage == 'zeroed':
        content[position : position + 512] = bytes(512)
    else:
        content[position + 3] ^= 1
    root.write_bytes(content)
    for message in _errors(root):
        assert f"damaged header after the member '{NAMES[index - 1]}'" in message


@pytest.mark.parametrize('index', range(len(NAMES)))
def test_truncated_archive(tmp_path, index):
    """An archive that ends in the data of a member."""
    root = _tar(tmp_path / 'data.tar', _images())
    root.write_bytes(root.read_bytes()[: _positions(root)[0][NAMES[index]] + 520])
    for message in _errors(root):
        assert f"unexpected end of data after the member '{NAMES[index]}'" in message


def test_concatenated_archives(tmp_path):
    """``tarfile`` and tar read the first one only."""
    root = _tar(tmp_path / 'data.tar', _images())
    root.write_bytes(root.read_bytes() + _tar(tmp_path / 'more.tar', _images()).read_bytes())
    assert all("after the member 'red/last.txt'" in message for message in _errors(root))


def test_archive_of_archives(tmp_path):
    dataset = create_dataset('', _nested(tmp_path), 'train')
    assert len(dataset) == 6 and class_names(dataset) == {0: 'blue', 1: 'red'}
    check_dataset(dataset, 2, 'train')


@pytest.mark.parametrize('name', ['1.png', 'note.txt', '2.png'])
@pytest.mark.parametrize('cut', [False, True])
def test_damage_in_an_inner_archive(tmp_path, name, cut):
    def damage(path):
        position, content = _positions(path)[0][name], bytearray(path.read_bytes())
        if cut:
            del content[position + 520 :]
        else:
            content[position] ^= 1
        path.write_bytes(content)

    root = _nested(tmp_path, damage)
    last = name if cut else {'1.png': '0.png', 'note.txt': '1.png', '2.png': 'note.txt'}[name]
    with pytest.raises(DataError) as error:
        create_dataset('', root, 'train')
    assert f"blue.tar: {'unexpected end of data' if cut else 'damaged header'} after the member '{last}'" in str(
        error.value
    )


def test_damage_between_inner_archives(tmp_path):
    root = _nested(tmp_path)
    content = bytearray(root.read_bytes())
    content[_positions(root)[0]['red.tar']] ^= 1
    root.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged header after the member 'blue\.tar'"):
        create_dataset('', root, 'train')


def test_replaced_files_are_complete(tmp_path):
    path = tmp_path / ('a' * 251 + '.txt')  # the longest name
    for content in ('first', 'second'):
        with replacing(path) as scratch:
            scratch.write_text(content)
            assert not path.exists() or path.read_text() == 'first'
    with pytest.raises(ValueError, match='interrupted'), replacing(path) as scratch:
        scratch.write_text('half')
        raise ValueError('interrupted')
    assert path.read_text() == 'second' and list(tmp_path.iterdir()) == [path]
