"""segmentation.data.files: folders and tars, unsafe tars, decoding of masks and images."""

import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from cluster_zoo.errors import DataError
from segmentation.data.files import open_files, read_image, read_labels

FILES = {'train/a.txt': b'one', 'train/deep/er/b.txt': b'', 'train/.hidden': b'?', 'trainer/c.txt': os.urandom(40_000)}


@pytest.fixture
def folder(tmp_path):
    for path, data in FILES.items():
        (tmp_path / 'data' / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'data' / path).write_bytes(data)
    (tmp_path / 'data' / '.cache').mkdir()
    return tmp_path / 'data'


def _tar(folder, compression=''):
    with tarfile.open(folder.parent / 'data.tar', f'w:{compression}') as archive:
        archive.add(folder, '.')
    return folder.parent / 'data.tar'


def _refused(root):
    with pytest.raises(DataError) as error:
        open_files(root)
    assert '\n' not in str(error.value)
    return str(error.value)


# Files


@pytest.mark.parametrize('packed', [False, True])
def test_folder_and_tar(folder, packed):
    files = open_files(_tar(folder) if packed else folder)
    assert files.folders('') == ['train', 'trainer']
    assert files.folders('train') == ['deep']
    assert files.below('train') == ['train/a.txt', 'train/deep/er/b.txt']
    assert files.below('') == ['train/a.txt', 'train/deep/er/b.txt', 'trainer/c.txt']
    assert files.exists('') and files.exists('train/deep') and not files.exists('train/a.txt')
    for path in files.below(''):
        assert files.read(path) == FILES[path]
    with pytest.raises(FileNotFoundError):
        files.read('train/nothing.txt')


def test_tar_without_folder_entries(tmp_path):
    with tarfile.open(tmp_path / 'data.tar', 'w') as archive:
        archive.addfile(tarfile.TarInfo('a/b/c.txt'))
    files = open_files(tmp_path / 'data.tar')
    assert (files.folders(''), files.folders('a'), files.exists('a/b')) == (['a'], ['b'], True)


def test_missing_root(tmp_path):
    assert _refused(tmp_path / 'nowhere').endswith('nowhere does not exist')


@pytest.mark.parametrize('compression', ['gz', 'bz2', 'xz'])
def test_compressed_tar(folder, compression):
    assert 'data.tar is not a complete, uncompressed tar' in _refused(_tar(folder, compression))


@pytest.mark.parametrize('share', [0.3, 0.9])
def test_truncated_tar(folder, share):
    root = _tar(folder)
    end = root.read_bytes().rstrip(b'\0')
    root.write_bytes(end[: int(len(end) * share)])
    assert 'data.tar is not a complete' in _refused(root)


def test_not_a_tar(folder):
    assert 'a.txt is not a complete' in _refused(folder / 'train' / 'a.txt')


@pytest.mark.parametrize(
    ('path', 'kind'),
    [
        ('../outside.png', tarfile.REGTYPE),
        ('train/../../outside.png', tarfile.REGTYPE),
        ('/etc/outside.png', tarfile.REGTYPE),
        ('train/masks/z.png', tarfile.SYMTYPE),
        ('train/masks/z.png', tarfile.LNKTYPE),
        ('train/masks/z.png', tarfile.FIFOTYPE),
    ],
)
def test_unsafe_tars(folder, path, kind):
    root = _tar(folder)
    with tarfile.open(root, 'a') as archive:
        member = tarfile.TarInfo(path)
        member.type, member.linkname = kind, 'train/a.txt'
        archive.addfile(member)
    message = _refused(root)
    assert message.startswith(f'{root} is not safe to read') and path in message


# Masks

LABELS = np.resize(np.array([0, 1, 2, 255], np.uint8), (6, 10))


@pytest.fixture
def saved(tmp_path):
    """Returns a function that saves an image and opens its folder."""

    def save(image, **options):
        image.save(tmp_path / 'x', **options)
        return open_files(tmp_path)

    return save


def _grayscale_png(depth, rows):
    """Encodes a grayscale PNG with 1 to 16 bits per pixel."""
    lines = b''
    for row in rows:
        bits = ''.join(f'{value:0{depth}b}' for value in row)
        bits += '0' * (-len(bits) % 8)
        lines += b'\0' + bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))
    header = struct.pack('>IIBBBBB', len(rows[0]), len(rows), depth, 0, 0, 0, 0)
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(lines)), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize('depth', [1, 2, 4, 8, 16])
def test_grayscale_masks_of_any_depth(tmp_path, depth):
    rows = [[37 * (row + column) % 2**depth for column in range(10)] for row in range(6)]
    (tmp_path / 'x').write_bytes(_grayscale_png(depth, rows))
    assert read_labels(open_files(tmp_path), 'x').tolist() == rows


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_palette_masks(saved, bits):
    labels = LABELS & 2**bits - 1
    image = Image.frombytes('P', (10, 6), labels.tobytes())
    image.putpalette([200, 0, 0, 0, 200, 0] + [7] * 762)
    assert np.array_equal(read_labels(saved(image, format='PNG', bits=bits), 'x'), labels)


@pytest.mark.parametrize('dtype', ['>u1', '<u2', '>u2', '<i4', '<u4'])  # Pillow swaps compressed '>i4'
@pytest.mark.parametrize('compression', [None, 'zlib'])
def test_tiff_masks(tmp_path, dtype, compression):
    labels = LABELS.astype(dtype) + (300 if np.dtype(dtype).itemsize > 1 else 0)
    tifffile.imwrite(tmp_path / 'x', labels, compression=compression, byteorder=dtype[0])
    assert read_labels(open_files(tmp_path), 'x').tolist() == labels.tolist()


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_tiff_masks_of_few_bits(tmp_path, bits):
    rows = [[(row + 3 * column) % 2**bits for column in range(16)] for row in range(6)]
    packed = np.array([int(''.join(f'{v:0{bits}b}' for v in row), 2) for row in rows], object)
    data = b''.join(int(value).to_bytes(2 * bits, 'big') for value in packed)
    # Width, height, bits, no compression, black is 0, offset, rows per strip, bytes of the strip
    entries = [(256, 16), (257, 6), (258, bits), (259, 1), (262, 1), (273, 110), (278, 6), (279, len(data))]
    directory = struct.pack('<H', 8) + b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in entries)
    (tmp_path / 'x').write_bytes(b'II*\0' + struct.pack('<I', 8) + directory + bytes(4) + data)
    assert read_labels(open_files(tmp_path), 'x').tolist() == rows


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (np.array([[0, 70_000]], np.int32), 'x has labels 0 to 70000: labels are 0 to 65535'),
        (np.array([[-1, 3]], np.int32), 'x has labels -1 to 3'),
        (np.zeros((1, 2), np.float32), r'x has fractions \(F\)'),
        (np.zeros((2, 4, 5), np.uint8), 'x has 2 pages'),
    ],
)
def test_invalid_tiff_masks(tmp_path, labels, message):
    tifffile.imwrite(tmp_path / 'x', labels, photometric='minisblack')
    with pytest.raises(DataError, match=message) as error:
        read_labels(open_files(tmp_path), 'x')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_color_masks(saved, mode):
    files = saved(Image.new(mode, (10, 6)), format='PNG')
    with pytest.raises(DataError, match=rf'x .*\({mode}\).* class'):
        read_labels(files, 'x')


# Images


@pytest.mark.parametrize('mode', ['L', 'CMYK', 'RGB'])
def test_images_become_rgb(saved, mode):
    color = dict(L=90, CMYK=(0, 0, 0, 165), RGB=(90, 90, 90))[mode]
    image = read_image(saved(Image.new(mode, (10, 6), color), format='JPEG', quality=100), 'x')
    assert (image.mode, image.size) == ('RGB', (10, 6))
    assert np.abs(np.asarray(image).astype(int) - 90).max() <= 1


@pytest.mark.parametrize('mode, kind', [('I;16', 'PNG'), ('I;16B', 'TIFF'), ('F', 'TIFF')])
def test_images_with_more_bits(saved, mode, kind):
    files = saved(Image.new(mode, (10, 6)), format=kind)
    with pytest.raises(DataError, match='x has more than 8 bits'):
        read_image(files, 'x')


def test_formats_that_run_programs_are_not_read(saved):
    files = saved(Image.new('RGB', (10, 6)), format='EPS')
    with pytest.raises(DataError, match='x is not an image of a known format'):
        read_image(files, 'x')


def test_exif_orientation_is_not_applied(saved):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert read_image(saved(Image.new('RGB', (10, 6)), format='JPEG', exif=exif), 'x').size == (10, 6)


def test_not_an_image(tmp_path):
    (tmp_path / 'x').write_bytes(b'<html>Not found</html>')
    data = io.BytesIO()
    Image.fromarray(LABELS).save(data, 'PNG')
    (tmp_path / 'y').write_bytes(data.getvalue()[:-20])
    for path, reason in (('x', 'is not an image of a known format'), ('y', 'is not a readable image')):
        with pytest.raises(DataError, match=f'{path} {reason}') as error:
            read_labels(open_files(tmp_path), path)
        assert '0x' not in str(error.value)  # no addresses of Python objects
