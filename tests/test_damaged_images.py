"""Damaged and odd image files in classification datasets, compared with NumPy and timm."""

import io
import logging

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image, PngImagePlugin, features

from cluster_zoo.datasets import check_dataset, create_dataset, unreadable_images
from cluster_zoo.errors import DataError

GRAY = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)


def _encode(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Returns a function that writes the second of three images, or leaves it out, and returns the data folder."""

    def write(content=None, name='1.jpg'):
        (tmp_path / 'red').mkdir(exist_ok=True)
        for other in ('0.png', '2.png'):
            (tmp_path / 'red' / other).write_bytes(_encode(Image.new('RGB', (6, 4), 'red'), 'PNG'))
        if content is not None:
            (tmp_path / 'red' / name).write_bytes(content)
        return tmp_path

    return write


def _expect_unreadable(root, name='red/1.jpg', reason=''):
    """Checks that the second image is replaced in training, left out of validation, and an error with ``strict``."""
    train = create_dataset('', root, 'train')
    assert [image.getpixel((0, 0)) for image, _ in train] == [(255, 0, 0)] * 3
    val = create_dataset('', root, 'val', replace_unreadable=False)
    assert [target for _, target in val] == [0, -1, 0]
    assert unreadable_images(train) == unreadable_images(val) == [name]
    with pytest.raises(DataError, match=rf'^{name} is not a readable image \(.*{reason}') as error:
        create_dataset('', root, 'train', strict=True)[1]
    assert '\n' not in str(error.value) and '0x' not in str(error.value)


# Decoders


@pytest.mark.parametrize('error', [RuntimeError, MemoryError, KeyError, IndexError, ZeroDivisionError, TypeError])
def test_any_error_of_a_decoder(folder, monkeypatch, error):
    decode = PngImagePlugin.PngImageFile.load

    def load(image):
        if image.width == 5:
            raise error('codec')
        return decode(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', load)
    _expect_unreadable(folder(_encode(Image.new('RGB', (5, 4)), 'PNG')), reason='codec')


def test_interrupts_pass(folder, monkeypatch):
    def load(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', load)
    with pytest.raises(KeyboardInterrupt):
        create_dataset('', folder(), 'train')[0]


def test_avif_with_another_name(folder):
    if not features.check('avif'):
        pytest.skip('this Pillow has no AVIF')
    content = _encode(Image.new('RGB', (16, 16), 'blue'), 'AVIF', quality=100)
    image, _ = create_dataset('', folder(content), 'train', strict=True)[1]
    assert np.abs(np.asarray(image).astype(int) - (0, 0, 255)).max() <= 3
    begin = content.index(b'mdat') + 4
    _expect_unreadable(folder(content[:begin] + bytes(len(content) - begin)))  # a RuntimeError of Pillow


@pytest.mark.parametrize('kind', ['DDS', 'EPS'])
def test_other_formats(folder, kind):
    _expect_unreadable(folder(_encode(Image.new('RGB', (16, 16)), kind)), reason='unsupported format')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'QOI'])
@pytest.mark.parametrize('share', [0, 0.5])
def test_truncated(folder, kind, share):
    content = _encode(Image.effect_noise((24, 20), 80).convert('RGB'), kind)
    _expect_unreadable(folder(content[: int(len(content) * share)]))


def test_decompression_bomb(folder, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    _expect_unreadable(folder(_encode(Image.new('RGB', (20, 20)), 'PNG')), reason='exceeds limit')


def test_broken_link(folder):
    root = folder()
    (root / 'red' / '1.jpg').symlink_to('nowhere.jpg')
    _expect_unreadable(root)


def test_link_to_itself(folder):
    root = folder()
    (root / 'red' / '1.jpg').symlink_to('1.jpg')
    _expect_unreadable(root)


def test_folder_with_the_name_of_an_image(folder):
    root = folder()
    (root / 'red' / '1.jpg').mkdir()
    assert create_dataset('', root, 'train').filenames() == ['red/0.png', 'red/2.png']
    (root / 'blue' / '1.jpg').mkdir(parents=True)  # is no image of the class
    with pytest.raises(DataError, match='no images of blue'):
        check_dataset(create_dataset('', root, 'train'), 1, 'train')


# Pixels


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize(('kind', 'dtype'), [('PNG', '<u2'), ('TIFF', '<u2'), ('TIFF', '>u2'), ('TIFF', '<i4')])
def test_16_bits_are_scaled(folder, mode, kind, dtype):
    content = _encode(Image.fromarray(GRAY.astype(dtype)), kind)
    image, _ = create_dataset('', folder(content), 'train', strict=True, input_img_mode=mode)[1]
    assert image.mode == mode
    expected = (GRAY / 257).round()  # 65535 = 255 * 257
    assert all(np.array_equal(channel, expected) for channel in image.split())


def test_floats_are_scaled(folder):
    pixels = (GRAY / 65535).astype(np.float32)
    image, _ = create_dataset('', folder(_encode(Image.fromarray(pixels), 'TIFF')), 'train', strict=True)[1]
    assert np.abs(np.asarray(image)[..., 0] - pixels * 255).max() <= 0.51
    _expect_unreadable(folder(_encode(Image.fromarray(pixels + 1), 'TIFF')), reason='expected 0 to 1')


def test_modes_with_more_bits_are_kept(folder):
    root = folder(_encode(Image.fromarray(GRAY), 'PNG'))
    for mode in ('F', None):
        image, _ = create_dataset('', root, 'train', input_img_mode=mode)[1]
        assert np.array_equal(np.asarray(image), GRAY)


def test_first_of_several_frames(folder):
    frames = [Image.fromarray(GRAY), Image.fromarray(GRAY[::-1].copy())]
    content = _encode(frames[0], 'TIFF', save_all=True, append_images=frames[1:])
    image, _ = create_dataset('', folder(content), 'train', strict=True)[1]
    assert np.array_equal(np.asarray(image)[..., 0], (GRAY / 257).round())


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'LA', 'RGBA', 'CMYK', '1'])
def test_8_bits_as_in_timm(folder, mode):
    noise = Image.effect_noise((24, 20), 80).convert('RGB')
    noise.putalpha(Image.effect_noise((24, 20), 80))
    root = folder(_encode(noise.convert(mode), 'TIFF'))
    ours, theirs = create_dataset('', root, 'train')[1], timm.data.create_dataset('', str(root), 'train')[1]
    assert ours[0].mode == 'RGB' and ours[0].tobytes() == theirs[0].tobytes()


def test_orientation_is_ignored_as_in_timm(folder):
    exif = Image.Exif()
    exif[0x112] = 6  # rotated by 90 degrees
    root = folder(_encode(Image.new('RGB', (24, 10)), 'JPEG', exif=exif))
    ours, theirs = create_dataset('', root, 'train')[1], timm.data.create_dataset('', str(root), 'train')[1]
    assert ours[0].size == theirs[0].size == (24, 10)


@pytest.mark.parametrize('size', [(201, 2), (1, 101)])
def test_narrow_images(folder, size):
    _expect_unreadable(folder(_encode(Image.new('RGB', size), 'JPEG')), reason='too narrow: {} x {}'.format(*size))


@pytest.mark.parametrize('size', [(200, 2), (1, 100)])
def test_images_at_the_limit(folder, size, caplog):
    caplog.set_level(logging.WARNING)
    image, _ = create_dataset('', folder(_encode(Image.new('RGB', size), 'JPEG')), 'train')[1]
    assert image.size == size and not caplog.text


def test_bytes_are_not_decoded(folder):
    content = _encode(Image.new('RGB', (201, 2)), 'JPEG')
    assert create_dataset('', folder(content), 'train', load_bytes=True)[1][0] == content


def test_multi_label(tmp_path):
    Image.new('RGB', (6, 4), 'red').save(tmp_path / '0.png')
    Image.new('RGB', (201, 2)).save(tmp_path / '1.png')
    (tmp_path / 'labels.csv').write_text('file,labels\n0.png,a;b\n1.png,a\n')
    dataset = create_dataset('', tmp_path, 'val', label_files=[tmp_path / 'labels.csv'], replace_unreadable=False)
    assert torch.equal(torch.stack([target for _, target in dataset]), torch.tensor([[1.0, 1], [-1, -1]]))
