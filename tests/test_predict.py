"""cluster_zoo.predict: finding images, reading them, and classification."""

import io
import os
import re
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cluster_zoo import images
from cluster_zoo.datasets import create_dataset
from cluster_zoo.errors import CheckpointError, ImageError, OptionError
from cluster_zoo.predict import Classified, classify, find_images, load_classifier, read_image

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


@pytest.fixture(scope='module')
def photo() -> Image.Image:
    """24 x 16 pixels with a gradient, so that resizing and rotation change the pixels."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(0, 240, 10), np.arange(0, 240, 15)[:, None]
    return Image.fromarray(pixels)


def saved(image: Image.Image, format: str = 'PNG', **options) -> bytes:
    image.save(stream := io.BytesIO(), format, **options)
    return stream.getvalue()


def pixels_of(image: Image.Image) -> list[tuple[int, int, int]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def read(tmp_path: Path, content: bytes) -> Image.Image:
    (tmp_path / 'image').write_bytes(content)
    return read_image(str(tmp_path / 'image'))


# --- finding images ---------------------------------------------------------------------------------------------------


def test_folders_are_searched_in_order_without_hidden_files(tmp_path):
    for name in ('b.PNG', 'a/2.jpg', 'a/10.webp', 'a/.hidden.png', '.git/c.png', 'notes.txt', 'drawing.eps', 'a.jpeg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'a' / 'loop').symlink_to(tmp_path)
    found = find_images([tmp_path, '-', tmp_path / 'notes.txt'])
    assert found == [
        *(str(tmp_path / name) for name in ('a/10.webp', 'a/2.jpg', 'a.jpeg', 'b.PNG')),
        '-',
        str(tmp_path / 'notes.txt'),  # a named file is listed whatever its extension
    ]


def test_sources_without_images_give_errors(tmp_path):
    (tmp_path / 'empty').mkdir()
    first, second = find_images([tmp_path / 'missing.png', tmp_path / 'empty'])
    assert first.image == str(tmp_path / 'missing.png') and 'no such file' in first.error
    assert second.image == str(tmp_path / 'empty') and 'no image' in second.error


@pytest.mark.parametrize('address', ['http://example.org/cat.png', 'HTTPS://example.org/cat.png', 'file:///cat.png'])
def test_addresses(address):
    [found] = find_images([address])
    assert found.image == address and 'download' in found.error


# --- reading images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'PPM', 'TGA', 'PCX'])
def test_formats_without_loss(format, photo, tmp_path):
    assert read(tmp_path, saved(photo, format)).tobytes() == photo.tobytes()


@pytest.mark.parametrize('format', ['JPEG', 'WEBP'])
def test_formats_with_loss(format, photo, tmp_path):
    found = np.asarray(read(tmp_path, saved(photo, format, quality=95)), float)
    assert abs(found - np.asarray(photo, float)).mean() < 6


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation, photo, tmp_path):
    # The pixels as stored in the file, from the EXIF standard's definition of row 0 and column 0
    stored = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation](np.asarray(photo))  # fmt: skip
    exif = Image.Exif()
    exif[0x112] = orientation
    content = saved(Image.fromarray(np.ascontiguousarray(stored)), exif=exif.tobytes())
    assert read(tmp_path, content).tobytes() == photo.tobytes()


def test_damaged_metadata_are_ignored(photo, tmp_path):
    exif = b'Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03'
    assert read(tmp_path, saved(photo, 'JPEG', exif=exif)).size == photo.size


def test_transparent_pixels_are_blended_with_white(tmp_path):
    image = Image.new('RGBA', (3, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (255, 0, 0, 128))
    expected = [RED, WHITE, (255, 127, 127)]
    assert pixels_of(read(tmp_path, saved(image))) == expected
    gray = read(tmp_path, saved(image.convert('LA')))
    assert gray.getpixel((1, 0)) == WHITE and gray.getpixel((0, 0)) == (76, 76, 76)


def test_palette_with_a_transparent_color(tmp_path):
    image = Image.new('P', (2, 1))
    image.putpalette([*RED, *BLACK])
    image.putpixel((1, 0), 1)
    assert pixels_of(read(tmp_path, saved(image))) == [RED, BLACK]
    assert pixels_of(read(tmp_path, saved(image, transparency=1))) == [RED, WHITE]


def test_cmyk_is_not_inverted(tmp_path):
    image = Image.new('CMYK', (16, 16), (0, 255, 255, 0))
    for format in ('JPEG', 'TIFF'):
        assert np.allclose(read(tmp_path, saved(image, format)).getpixel((8, 8)), RED, atol=12)


@pytest.mark.parametrize('mode', ['I;16', 'I'])
def test_16_bit_gray_is_scaled(mode, tmp_path):
    values = np.array([[0, 255, 32768, 65535]], np.uint16)
    image = Image.fromarray(values) if mode == 'I;16' else Image.fromarray(values.astype(np.int32))
    found = read(tmp_path, saved(image, 'TIFF'))
    assert [pixel[0] for pixel in pixels_of(found)] == [0, 1, 128, 255]


def test_floats_outside_0_to_1(tmp_path):
    image = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert [pixel[0] for pixel in pixels_of(read(tmp_path, saved(image, 'TIFF')))] == [0, 128, 255]
    for wrong in (300.0, -1.0, float('nan')):
        with pytest.raises(ImageError, match='expected 0 to 1'):
            read(tmp_path, saved(Image.fromarray(np.array([[0, wrong]], np.float32)), 'TIFF'))


@pytest.mark.parametrize('format', ['GIF', 'PNG', 'WEBP', 'TIFF'])
def test_first_frame(format, tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in (RED, BLACK, WHITE)]
    content = saved(
        frames[0], format, save_all=True, append_images=frames[1:], **dict(lossless=True) if format == 'WEBP' else {}
    )
    assert read(tmp_path, content).getpixel((4, 4)) == RED


def huge_png(width: int, height: int) -> bytes:
    """A valid file of a few kilobytes whose black pixels would fill the memory."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    pack, rows = zlib.compressobj(9), bytearray()
    for _ in range(16):  # enough rows for a decoder to run for a long time
        rows += pack.compress(bytes(1 + width // 8))
    header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', bytes(rows) + pack.flush()) + chunk(b'IEND', b'')
    )


def test_decompression_bombs_are_refused(tmp_path):
    with pytest.raises(ImageError, match='exceeds limit'):
        read(tmp_path, huge_png(100_000, 100_000))


def test_postscript_is_refused(tmp_path):
    """Pillow would run PostScript with Ghostscript."""
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n'
    with Image.open(io.BytesIO(eps)) as opened:
        assert opened.format == 'EPS'
    with pytest.raises(ImageError, match='format'):
        read(tmp_path, eps)


@pytest.mark.parametrize('content', [b'', b'hello', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'\xff\xd8\xff\xe0', bytes(500)])
def test_files_that_are_not_images(content, tmp_path):
    with pytest.raises(ImageError):
        read(tmp_path, content)


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF'])
def test_damaged_files_raise_only_image_errors(format, photo, tmp_path):
    content, random = saved(photo, format), np.random.default_rng(0)
    with pytest.raises(ImageError):
        read(tmp_path, content[: len(content) // 2])
    for _ in range(60):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[random.integers(0, len(damaged), 5)] = random.integers(0, 256, 5)
        try:
            assert read(tmp_path, damaged.tobytes()).mode == 'RGB'
        except ImageError as error:
            assert str(error)


@pytest.mark.skipif(os.name != 'posix', reason='named pipes')
def test_named_pipe(photo, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    writer = threading.Thread(target=(tmp_path / 'pipe').write_bytes, args=(saved(photo),))
    writer.start()
    assert find_images([tmp_path / 'pipe']) == [str(tmp_path / 'pipe')]
    assert read_image(str(tmp_path / 'pipe')).tobytes() == photo.tobytes()
    writer.join()


# --- standard input ---------------------------------------------------------------------------------------------------


class Terminal(io.BytesIO):
    def isatty(self):
        return True


def test_standard_input(photo, monkeypatch):
    def read_from(stream):
        monkeypatch.setattr('sys.stdin', io.TextIOWrapper(stream))
        return read_image('-')

    assert read_from(io.BytesIO(saved(photo))).tobytes() == photo.tobytes()
    with pytest.raises(ImageError, match='standard input is empty'):
        read_from(io.BytesIO())
    with pytest.raises(ImageError, match='is a terminal'):
        read_from(Terminal(b'x'))
    monkeypatch.setattr(images, 'MAX_BYTES', 100)
    with pytest.raises(ImageError, match='more than'):
        read_from(io.BytesIO(bytes(101)))


# --- classification ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model(
        'coc_tiny', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), mlp_ratios=(2, 2, 2, 2), regions=1, num_classes=7,
        pretrained_cfg_overlay=dict(input_size=(3, 32, 32), crop_pct=0.9, label_names=tuple('ABCDEFG'), num_classes=7),
    ).eval()  # fmt: skip


def test_batches_match_single_images(model, tmp_path):
    images, random = [], np.random.default_rng(0)
    for index in range(5):
        images.append(str(tmp_path / f'{index}.png'))
        Image.fromarray(random.integers(0, 256, (50, 40, 3), np.uint8)).save(images[-1])
    Path(images[2]).write_bytes(b'damaged')
    found = list(classify(model, [*images, Classified('gone', error='no such file')], top=3, batch_size=2))
    assert [result.image for result in found] == [*images, 'gone']
    assert [bool(result.error) for result in found] == [False, False, True, False, False, True]

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    for result in found:
        if result.error:
            assert result.classes == ()
            continue
        with torch.inference_mode(), Image.open(result.image) as image:
            logits = model(transform(image).unsqueeze(0))[0].double()
        probabilities = (logits.exp() / logits.exp().sum()).numpy()
        order = np.argsort(-probabilities)[:3]
        assert [ranked.index for ranked in result.classes] == order.tolist()
        assert [ranked.label for ranked in result.classes] == ['ABCDEFG'[index] for index in order]
        assert np.allclose([ranked.probability for ranked in result.classes], probabilities[order], atol=1e-5)


def test_evaluation_size_differs_from_training_size(photo, tmp_path, image_folder, validate):
    """The input is the same as that of validate.py."""
    overlay = dict(input_size=(3, 32, 32), crop_pct=0.5, test_input_size=(3, 48, 48), test_crop_pct=1.0)
    model = timm.create_model('resnet18', num_classes=3, pretrained_cfg_overlay=overlay).eval()
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    photo.save(tmp_path / 'image.png')
    [result] = classify(model, [str(tmp_path / 'image.png')])
    args = validate.validate_parser().resolve([])
    config = validate.resolve_input_data_config(model, vars(args), use_test_size=not args.use_train_size)
    assert result.error is None and seen[0].shape == (1, 3, 48, 48)
    assert torch.equal(seen[0][0], timm.data.create_transform(**config)(photo.convert('RGB')))


def test_pil_images(model, photo, tmp_path):
    photo.save(tmp_path / 'image.png')
    named, opened = classify(model, [str(tmp_path / 'image.png'), photo.convert('RGB')])
    assert named.classes == opened.classes and isinstance(opened.image, Image.Image)


def test_top_is_larger_than_the_number_of_classes(model, photo, tmp_path):
    photo.save(tmp_path / 'image.png')
    [result] = classify(model, [str(tmp_path / 'image.png')], top=100)
    assert sorted(ranked.index for ranked in result.classes) == list(range(7))
    assert sum(ranked.probability for ranked in result.classes) == pytest.approx(1)


def test_narrow_images_are_refused(model, tmp_path):
    """Resized to the model's height, the image of one row would have three billion pixels."""
    Image.new('1', (3_000_000, 1)).save(tmp_path / 'line.png')
    Image.new('1', (100, 1)).save(tmp_path / 'narrow.png')
    line, narrow = classify(model, [str(tmp_path / 'line.png'), str(tmp_path / 'narrow.png')])
    assert '3000000 x 1' in line.error
    assert narrow.error is None


def test_models_with_other_input_channels(photo, tmp_path):
    photo.save(tmp_path / 'image.png')

    def resnet(channels):
        overlay = dict(input_size=(channels, 32, 32), mean=(0.5,) * channels, std=(0.5,) * channels)
        return timm.create_model('resnet18', in_chans=channels, num_classes=3, pretrained_cfg_overlay=overlay).eval()

    [result] = classify(resnet(1), [str(tmp_path / 'image.png')])
    assert len(result.classes) == 3 and result.classes[0].label is None
    with pytest.raises(OptionError, match='4 channels'):
        next(classify(resnet(4), [str(tmp_path / 'image.png')]))


def test_bundled_model_on_bundled_images(tmp_path):
    dataset = create_dataset('cluster_zoo/cifar10_sample')
    names = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    for index in range(0, 1000, 25):
        image, target = dataset[index]
        image.save(tmp_path / f'{index:03}_{names[target]}.png')
    results = list(classify(load_classifier('coc_tiny_plain.cifar10'), find_images([tmp_path]), top=1))
    right = sum(result.classes[0].label in result.image for result in results)
    assert (
        len(results) == 40 and right >= 27
    )  # 83.7 % expected; below 27 of 40 is more than 2.7 standard deviations away


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('no_such_model', 'no_such_model'),
        ('resnet18.nothing', 'nothing'),
        ('local-dir:nowhere', 'nowhere'),
        ('a/b', 'a/b'),
    ],
)
def test_models_that_are_not_available(name, message):
    with pytest.raises(CheckpointError, match=message):
        load_classifier(name)


@pytest.mark.parametrize('config', ['{}', 'hello', '{"architecture": "resnet18", "pretrained_cfg": {}}', '[]'])
def test_damaged_model_folders(config, tmp_path):
    (tmp_path / 'config.json').write_text(config)
    (tmp_path / 'model.safetensors').write_bytes(b'damaged')
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_classifier(f'local-dir:{tmp_path}')


def test_model_without_classes(monkeypatch):
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: torch.nn.Identity())
    monkeypatch.setattr(torch.nn.Identity, 'num_classes', 0, raising=False)
    with pytest.raises(OptionError, match='no classes'):
        load_classifier('features')
