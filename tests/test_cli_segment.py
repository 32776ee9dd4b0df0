"""cluster-zoo segment predict: masks, overlays, areas, exit status and errors."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segmentation
from cluster_zoo.cli import main
from cluster_zoo.cli import segment as command
from segmentation.data.classes import pascal_colours
from segmentation.data.files import Folder, read_labels

ROOT = Path(__file__).parents[1]
CLASSES = ['sky', 'road', 'tree']
SIZES = dict(channels=8, output_stride=8)


@pytest.fixture(scope='module')
def model():
    """An untrained segmenter that predicts all classes."""
    torch.manual_seed(0)
    model = segmentation.create_segmenter('fcn', 'test_resnet', 3, **SIZES).eval()
    with torch.no_grad():
        noise = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(1))
        logits = model(torch.nn.functional.interpolate(noise, (40, 48), mode='bicubic'))
        [*model.head.classifier.parameters()][-1].sub_(logits.mean((0, 2, 3)))
    return model


@pytest.fixture(scope='module')
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'last.pth.tar'
    args = dict(head='fcn', backbone='test_resnet', num_classes=3, channels=8, model_kwargs=dict(output_stride=8))
    args |= dict(dataset='folder', test_mode='whole')
    torch.save(dict(state_dict=model.state_dict(), args=args, label_names=CLASSES), path)
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The current folder, with two images in and below photos."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, size in (('a.jpg', (48, 40)), ('deep/er/b.png', (33, 50))):
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(path)
    return tmp_path


@pytest.fixture
def run(checkpoint, capsys):
    """Runs the command and returns its exit status, standard output and standard error."""

    def _run(*words, checkpoint=checkpoint):
        try:
            argv = ['segment', 'predict', '--device', 'cpu', *map(str, words)]
            status = main([*argv, '--checkpoint', str(checkpoint)] if checkpoint else argv)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return _run


def files(folder='.'):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob('*') if path.is_file())


def expected(model, name, **options):
    with Image.open(name) as image:
        return segmentation.predict(model, image, **options)


def check_mask(name, mask):
    with Image.open(name) as image:
        assert image.format == 'PNG' and image.mode == 'P'
        colors = np.asarray(image.convert('RGB'))
    assert np.array_equal(read_labels(Folder(Path()), name), mask)  # as the mask of a dataset
    assert np.array_equal(colors, pascal_colours(3)[mask])


def test_masks_of_a_folder(run, photos, model):
    status, out, err = run('photos')
    assert status == 0 and err == '' and files('masks') == ['a.png', 'deep/er/b.png']
    about, *lines = out.splitlines()
    assert '3 classes' in about and 'the only ones in the file' in about and len(lines) == 2
    for line, (image, name) in zip(lines, (('a.jpg', 'a.png'), ('deep/er/b.png', 'deep/er/b.png')), strict=True):
        mask = expected(model, f'photos/{image}')
        check_mask(f'masks/{name}', mask)
        assert line.startswith(f'photos/{image}: masks/{name}: ')
        shares = dict(re.findall(r'(\w+) (\d+\.\d) %', line))
        assert len(mask.unique()) == 3
        assert shares == {label: f'{100 * (mask == k).float().mean():.1f}' for k, label in enumerate(CLASSES)}


def test_test_options(run, photos, model):
    options = dict(mode='slide', crop=(32, 24), stride=20)
    status, _, err = run('photos/a.jpg', '--window', 32, 24, '--stride', 20, '--scales', 0.5, 1, '--flip', '-b', 3)
    assert status == 0 and err == ''
    check_mask('masks/a.png', expected(model, 'photos/a.jpg', scales=(0.5, 1), flip=True, **options))
    run('photos/a.jpg', '--scale', 60, 40, '--multiple', 8)
    check_mask('masks/a.png', expected(model, 'photos/a.jpg', scale=(60, 40), multiple=8))


def test_windows_replace_those_of_the_checkpoint(run, photos, model, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content['args'] |= dict(test_mode='slide', test_crop=[48], test_stride=[40])
    torch.save(content, tmp_path / 'windows.pth.tar')
    for words, options in (
        ([], dict(mode='slide', crop=48, stride=40)),
        (['--window', 32], dict(mode='slide', crop=32)),
        (['--stride', 24], dict(mode='slide', crop=48, stride=24)),
        (['--mode', 'whole'], dict(mode='whole')),
    ):
        assert run('photos/deep/er/b.png', *words, checkpoint=tmp_path / 'windows.pth.tar')[0] == 0
        check_mask('masks/b.png', expected(model, 'photos/deep/er/b.png', **options))


def test_json(run, photos, model):
    status, out, err = run('photos', '--json')
    assert status == 0 and err == ''
    found = json.loads(out)
    assert found['classes'] == CLASSES and [one['image'] for one in found['images']] == [
        *('photos/a.jpg', 'photos/deep/er/b.png')
    ]
    mask, first = expected(model, 'photos/a.jpg'), found['images'][0]
    assert (first['mask'], first['width'], first['height']) == ('masks/a.png', 48, 40) and 'overlay' not in first
    assert [area['pixels'] for area in first['areas']] == sorted(mask.unique(return_counts=True)[1].tolist())[::-1]
    for area in first['areas']:
        assert area['pixels'] == (mask == area['index']).sum() and area['label'] == CLASSES[area['index']]
        assert area['fraction'] == area['pixels'] / mask.numel()
    status, out, _ = run('photos', '--json', 'areas.json')
    assert status == 0 and len(out.splitlines()) == 3 and json.loads(Path('areas.json').read_text()) == found


def test_overlays(run, photos):
    status, out, _ = run('photos', '--output', 'one/two', '--overlays', 'drawn', '--json')
    assert status == 0 and files('drawn') == files('one/two') == ['a.png', 'deep/er/b.png']
    assert [one['overlay'] for one in json.loads(out)['images']] == ['drawn/a.png', 'drawn/deep/er/b.png']
    with Image.open('photos/a.jpg') as photo, Image.open('drawn/a.png') as drawn:
        assert drawn.width > 2 * photo.width and drawn.height > photo.height
        assert {*map(tuple, pascal_colours(3))} <= {*map(tuple, np.asarray(drawn).reshape(-1, 3))}


def test_unreadable_images(run, photos, model):
    Path('photos/damaged.jpg').write_bytes(Path('photos/a.jpg').read_bytes()[:200])
    status, out, err = run('photos/damaged.jpg', 'photos/a.jpg', 'missing.jpg', '--json')
    assert status == 1 and [line.partition(': ')[0] for line in err.splitlines()] == ['error'] * 2
    assert err.startswith('error: photos/damaged.jpg: ') and 'error: missing.jpg: no such file' in err
    first, second, third = json.loads(out)['images']
    assert first.keys() == third.keys() == {'image', 'error'} and second['mask'] == 'masks/a.png'
    check_mask('masks/a.png', expected(model, 'photos/a.jpg'))
    assert files('masks') == ['a.png']


def test_no_image(run, photos, monkeypatch):
    monkeypatch.setattr(command, 'load_trained', None)
    Path('empty').mkdir()
    status, out, err = run('empty', 'missing.jpg')
    assert status == 2 and out == '' and err.count('\n') == 3 and 'no image to process' in err
    assert not Path('masks').exists()


def test_orientation(run, photos, model):
    with Image.open('photos/a.jpg') as image:
        image.transpose(Image.Transpose.ROTATE_270).save('upright.png')
        exif = image.getexif()
        exif[0x112] = 6
        image.save('rotated.png', exif=exif)
    assert run('rotated.png')[0] == 0
    check_mask('masks/rotated.png', expected(model, 'upright.png'))


def test_standard_input(run, photos, model, monkeypatch):
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(Path('photos/a.jpg').read_bytes())))
    assert run('-', '--overlays', 'drawn')[0] == 0 and files('drawn') == ['stdin.png']
    check_mask('masks/stdin.png', expected(model, 'photos/a.jpg'))


def test_existing_masks_are_replaced_and_no_images(run, photos):
    assert run('.', '--overlays', 'drawn')[0] == 0
    Path('masks/photos/a.png').write_text('an older file')
    before = files('masks')
    status, _, err = run('.', '--overlays', 'drawn')
    assert status == 0 and files('masks') == before and err.startswith('4 images are left out: ')
    with Image.open('masks/photos/a.png') as image:
        assert image.size == (48, 40)
    photograph = Path('photos/deep/er/b.png').read_bytes()
    for words in (['--output', 'photos'], ['--overlays', 'photos']):
        status, _, err = run('photos', *words)
        assert status == 2 and re.fullmatch(r'error: the image .*b\.png would be replaced: .*\n', err)
    assert Path('photos/deep/er/b.png').read_bytes() == photograph
    assert run('photos/a.jpg', '--output', 'photos')[0] == 0 and Path('photos/a.png').is_file()


def test_two_images_of_one_name(run, photos):
    with Image.open('photos/a.jpg') as image:
        image.save('a.png')
    status, _, err = run('photos/a.jpg', 'a.png')
    assert status == 2 and err.count('\n') == 1 and 'the same output a.png' in err
    assert run('photos/a.jpg', 'photos/a.jpg')[0] == 0  # one image twice


def test_files_are_complete_or_not_there(run, photos, monkeypatch):
    def fail(self, path, *args):
        Path(path).write_bytes(b'half of it')
        raise OSError(28, 'No space left on device')

    Path('masks').mkdir()
    Path('masks/a.png').write_text('an older file')
    monkeypatch.setattr(Image.Image, 'save', fail)
    status, _, err = run('photos/a.jpg')
    assert status == 2 and err == 'error: --output masks: [Errno 28] No space left on device\n'
    assert os.listdir('masks') == ['a.png'] and Path('masks/a.png').read_text() == 'an older file'


def test_termination_leaves_no_half_written_file(photos, checkpoint):
    code = (
        'import sys, time\nfrom PIL import Image\nfrom cluster_zoo.cli import main\n'
        'def save(self, path, *args):\n'
        '    open(path, "w").close(); print("writing", flush=True); time.sleep(60)\n'
        'Image.Image.save = save\nsys.exit(main(sys.argv[1:]))'
    )
    argv = ['segment', 'predict', 'photos/a.jpg', '--checkpoint', str(checkpoint), '--device', 'cpu']
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, '-c', code, *argv], stdout=subprocess.PIPE, text=True, env=environment)
    assert any(line == 'writing\n' for line in process.stdout)
    assert len(os.listdir('masks')) == 1
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait(50) == 143 and os.listdir('masks') == []


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--stride', 8], '--stride needs --mode slide'),
        (['--mode', 'slide'], '--mode slide needs --window'),
        (['--window', 8, '--stride', 9], '--stride 9 is above --window 8'),
        (['--window', 0], '--window 0: expected'),
        (['--scales', 0], '--scales must be above 0'),
        (['--scale', 0, 5], '--scale must be at least 1'),
        (['--batch-size', 0], '0 is not a whole number'),
        (['--device', 'abacus'], '--device abacus'),
        (['--json', 'photos/a.jpg'], r'photos/a.jpg does not end in \.json'),
        (['--json', 'no/../photos/a.jpg/b.json'], '--json no'),
        (['--output', 'photos/a.jpg'], '--output photos/a.jpg'),
        (['--overlays', 'masks'], '--overlays masks is the folder of the masks'),
        (['--widnow', 8], 'did you mean --window'),
    ],
)
def test_errors(run, photos, words, message):
    status, out, err = run('photos/a.jpg', *words)
    assert status == 2 and out == '' and re.match(f'error: .*({message})', err), err
    assert Path('photos/a.jpg').stat().st_size > 300 and files('masks') == []


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ([], 'no model given: .*--checkpoint FILE.*--model'),
        (['--model', 'semantic_fpn'], '--model semantic_fpn: There are no weights'),
        (['--model', 'condnet_r50_ade2k'], 'did you mean condnet_r50_ade20k'),
        (['--model', 'condnet_r50_ade20k'], 'condnet_r50_ade20k'),  # no downloads in tests
        (['--checkpoint', 'photos/a.jpg'], 'a.jpg'),
        (['--checkpoint', 'missing.pth'], 'missing.pth'),
    ],
)
def test_errors_of_models(run, photos, words, message):
    status, out, err = run('photos/a.jpg', *words, checkpoint=None)
    assert status == 2 and out == '' and re.match(f'error: .*{message}', err) and err.count('\n') == 1


def test_out_of_memory(run, photos, monkeypatch):
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(command.TrainedSegmenter, 'predict', run_out)
    status, _, err = run('photos/a.jpg')
    assert status == 2 and err.startswith('error: out of memory on cpu: use a smaller --window')


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['segment', 'predict', '--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and len(out.splitlines()) <= 60
    for option in ('--checkpoint', '--model', '--window', '--stride', '--scales', '--flip', '--output', '--overlays'):
        assert option in out
