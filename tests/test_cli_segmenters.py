"""Segmenters in the commands cluster-zoo list, info, fetch, import, push and export."""

import json
import re

import huggingface_hub
import pytest
import torch
from hub_server import OWNER, HubServer
from huggingface_hub import constants

from cluster_zoo import cli
from cluster_zoo.weights import cache
from segmentation import create_segmenter, list_segmenters, save_pretrained

NAME = 'region_proxy_vit_ti16_cityscapes'
TINY = dict(head='fcn', backbone='resnet10t', num_classes=11, channels=8)
BUNDLED = 'semantic_fpn_coc_tiny.camvid'


@pytest.fixture(autouse=True)
def place(home, tmp_path, monkeypatch):
    """An empty cache and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def zoo(capsys):
    """A function that runs the command and returns its output, parsed with --json."""

    def run(*arguments, status=0):
        capsys.readouterr()
        assert cli.main([*map(str, arguments)]) == status
        out, err = capsys.readouterr()
        assert status == 0 or re.fullmatch(r'error: .*\n', err)
        return err if status else json.loads(out) if '--json' in arguments else out

    return run


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_segmenter(**TINY).eval()


@pytest.fixture(scope='module')
def checkpoint(model, tmp_path_factory):
    """As ``segmentation/train.py`` writes it."""
    path = tmp_path_factory.mktemp('run') / 'last.pth.tar'
    args = dict(TINY, segmenter=None, auxiliary=False, dataset='camvid', test_mode='whole', test_scale=[480, 360])
    torch.save(dict(arch='fcn_resnet10t', args=args, state_dict=model.state_dict()), path)
    return path


def _same(first, second):
    return all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


def test_list(zoo):
    rows = {row['name']: row for row in zoo('list', 'region_proxy', '--json')}
    assert set(rows) == set(list_segmenters('region_proxy*'))
    assert rows[NAME]['published_miou'] == 76.5 and rows[NAME]['weights'] == "the authors' release"
    title, header, row = zoo('list', NAME).splitlines()
    assert title == 'segmenters, published mIoU' and header.split()[1:] == ['parameters', 'published', 'weights']
    assert row.split()[:4] == [NAME, '6.00', 'M', '76.5']
    assert 'did you mean region_proxy_' in zoo('list', 'region_proxy_vit_ti16_citiscapes', status=2)


def test_info_and_fetch_of_a_published_system(zoo):
    shown = zoo('info', NAME)
    assert re.search(r'^published_miou +76\.5$', shown, re.MULTILINE) and 'classes         19: road, sidewalk' in shown
    assert re.search(r'^weights +the authors. release$', shown, re.MULTILINE)
    assert 'CLUSTER_ZOO_AUTHORS=0 forbids' in zoo('fetch', NAME, status=2)
    model = create_segmenter(NAME)
    torch.save(dict(state_dict=model.state_dict()), 'released.pth')
    zoo('import', 'released.pth', '--as', NAME)
    assert 'is in the cache already' in zoo('import', 'released.pth', '--as', NAME, status=2)
    assert zoo('fetch', NAME, '--json')['folder'] == str(cache.entry(NAME))
    info = zoo('info', NAME, '--json')
    assert info['weights'] == 'in the cache' and info['made_from']['file'] == 'released.pth'
    assert _same(model, create_segmenter(NAME, pretrained=True))
    zoo('push', NAME, '--to', './copy')
    assert _same(model, create_segmenter('local-dir:copy')) and zoo('info', 'copy', '--json')['name'] == NAME


def test_import_of_a_training(zoo, model, checkpoint):
    shown = zoo('import', checkpoint, '--to', 'streets')
    assert "create_segmenter('local-dir:streets')" in shown and 'backbone     resnet10t' in shown
    assert _same(model, create_segmenter('local-dir:streets'))
    info = zoo('info', 'streets/', '--json')
    assert info['name'] == 'fcn_resnet10t' and info['label_names'][0] == 'sky' and info['weights'] == 'in this folder'
    assert info['test'] == dict(mode='whole', scale=[480, 360])
    assert 'exists already' in zoo('import', checkpoint, '--to', 'streets', status=2)
    torch.save(model.state_dict(), 'plain.pth')
    options = '--model', 'fcn', '--num-classes', 11, '--model-kwargs', 'backbone=resnet10t', 'channels=8', '--force'
    zoo('import', 'plain.pth', '--to', 'streets', *options)
    assert _same(model, create_segmenter('local-dir:streets'))
    assert '--img-size' in zoo('import', checkpoint, '--to', 'streets', '--force', '--img-size', 64, status=2)


@pytest.mark.parametrize('source', ['checkpoint', 'folder'])
def test_export(source, zoo, model, checkpoint):
    save_pretrained(model, 'folder')
    name = checkpoint if source == 'checkpoint' else source
    command = 'export', name, '--to', 'pt2', '--img-size', 64, 80, '--output', 'model.pt2'
    assert 'images: 64 x 80 px, in batches of any size' in zoo(*command)
    images = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        expected = model(images)
    program = torch.export.load('model.pt2', extra_files=(extra := {'cluster_zoo.json': ''})).module()
    torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-4)
    named = json.loads(json.loads(extra['cluster_zoo.json'])['label_names'])[0]
    assert named == ('sky' if source == 'checkpoint' else '0')


def test_what_cannot_be_exported(zoo, model, checkpoint):
    save_pretrained(model, 'folder')
    assert 'only as onnx or pt2' in zoo('export', 'folder', '--to', 'torchscript', status=2)
    assert '--untrained are for the name of a model' in zoo('export', 'folder', '--untrained', '--to', 'pt2', status=2)
    assert 'only as onnx' in zoo('export', NAME, '--untrained', '--to', 'pt2', status=2)
    assert "No checkpoint at 'nothing.pth.tar'" in zoo('export', 'nothing.pth.tar', '--to', 'pt2', status=2)
    assert 'does not fit' in zoo('export', NAME, '--checkpoint', checkpoint, '--to', 'pt2', status=2)


def test_push(zoo, model, place, monkeypatch):
    save_pretrained(model, 'streets')
    with HubServer() as server:
        template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
        chosen = dict(ENDPOINT=server.url, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_DISABLE_XET=True)
        chosen |= dict(HF_HUB_CACHE=str(place / 'hf'), HF_TOKEN_PATH=str(place / 'token'), HF_HUB_OFFLINE=False)
        for name, value in chosen.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, 'endpoint', server.url)
        monkeypatch.setenv('HF_TOKEN', OWNER)
        monkeypatch.setenv('NO_PROXY', '*')
        assert "create_segmenter('hf-hub:my-lab/streets')" in zoo('push', 'streets', '--to', 'my-lab/streets')
        repository = server.repositories['my-lab/streets']
        assert {'model.safetensors', 'config.json', 'README.md'} < set(repository.commits[repository.head])
        assert _same(model, create_segmenter('hf-hub:my-lab/streets'))
    (place / 'streets' / 'model.safetensors').write_bytes(b'damaged')
    assert 'is damaged or was changed' in zoo('push', 'streets', '--to', 'my-lab/streets', status=2)


def test_bundled_segmenter(zoo):
    (row,) = zoo('list', BUNDLED, '--json')
    assert row['weights'] == 'in the package' and row['published_miou'] is None and row['parameters'] == 6_326_467
    info = zoo('info', BUNDLED, '--json')
    assert info['weights'] == 'in the package' and info['data'] is None and info['label_names'][3] == 'road'
    assert "create_segmenter('semantic_fpn_coc_tiny.camvid', pretrained=True)" in zoo('fetch', BUNDLED)
    zoo('push', BUNDLED, '--to', './copy')
    assert _same(create_segmenter(BUNDLED, pretrained=True), create_segmenter('local-dir:copy'))
    assert 'did you mean semantic_fpn_coc_tiny.camvid' in zoo('list', 'semantic_fpn_coc_tiny.camvd', status=2)
