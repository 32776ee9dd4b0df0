"""cluster-zoo explain: the figure, the classes, images and models that it refuses."""

import pytest
import timm
import torch
from PIL import Image

from cluster_zoo.cli import main
from cluster_zoo.datasets import create_dataset
from cluster_zoo.explain import anchor, draw_clusters
from cluster_zoo.explain.clusters import cluster_map
from cluster_zoo.weights.importing import write_folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = create_dataset('cluster_zoo/cifar10_sample')
    (tmp_path / 'photos').mkdir()
    for index in range(3):
        sample[index * 100][0].save(tmp_path / 'photos' / f'{index}.png')
    return tmp_path / 'photos'


def test_clusters(photos, capsys):
    """Each column has the image and its clusters, as `cluster_map` computes them."""
    assert main(['explain', 'photos', '--output', 'figure.png', '--device', 'cpu']) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(':')[0] for line in out] == [f'photos/{index}.png' for index in range(3)] + ['figure.png']
    assert 'airplane' in out[0]
    with Image.open('figure.png') as figure:
        assert figure.size == (8 + 3 * 136, 32 + 4 * 136)
        panel = figure.crop((8 + 136, 32 + 136, 8 + 136 + 128, 32 + 136 + 128))
    model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    with Image.open(photos / '1.png') as image:
        inputs = timm.data.create_transform(**config)(image.convert('RGB'))
        pixels = timm.data.create_transform(**config | dict(mean=(0,) * 3, std=(1,) * 3))(image.convert('RGB'))
    pixels = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    expected = draw_clusters(pixels, cluster_map(model, inputs.unsqueeze(0), stage=0)[0])
    expected = expected.resize((128, 128), Image.Resampling.NEAREST)
    difference = torch.tensor(list(panel.getdata())).sub(torch.tensor(list(expected.getdata()))).abs()
    assert difference.max() <= 1  # the normalization is undone in float32


def test_centroids(photos, capsys):
    model = timm.create_model('dnc_resnet18_cifar', num_classes=10)
    anchor(model, create_dataset('cluster_zoo/cifar10_sample').subset(range(0, 1000, 20)))
    folder = photos.parent / 'folder'
    folder.mkdir()
    write_folder(model, folder, 'folder', {})
    assert main(['explain', 'photos', '--model', 'folder', '--device', 'cpu']) == 0
    assert 'explain.png: centroids of the first image' in capsys.readouterr().out
    with Image.open('explain.png') as figure:
        assert figure.width > 400


def test_many_images(photos, capsys):
    for index in range(3, 20):
        (photos / f'{index}.png').write_bytes((photos / '0.png').read_bytes())
    assert main(['explain', 'photos', '--device', 'cpu']) == 0
    assert 'without 4 further images' in capsys.readouterr().out


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nothing.png'], 'nothing.png: no such file or folder'),
        (['text.png'], 'text.png: not an image'),
        (['photos', '--model', 'resnet'], 'has no clusters and no centroids'),
        (['photos', '--output', 'missing/figure.png'], 'the folder'),
    ],
)
def test_errors(photos, capsys, argv, message):
    (photos.parent / 'text.png').write_text('text')
    (photos.parent / 'resnet').mkdir()
    write_folder(timm.create_model('test_resnet', num_classes=2), photos.parent / 'resnet', 'resnet', {})
    try:
        status = main(['explain', *argv, '--device', 'cpu'])
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith('error: ') and message in error and 'Traceback' not in error
    assert not (photos.parent / 'explain.png').exists()
