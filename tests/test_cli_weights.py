"""The commands cluster-zoo list, info, fetch, import and push."""

import json
import os
import re
import socket
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import GUEST, OWNER, HubServer
from huggingface_hub import constants
from parity_cases import recipe
from PIL import Image

from cluster_zoo import cli
from cluster_zoo.cli import weights
from cluster_zoo.weights import cache, metadata
from cluster_zoo.weights.importing import import_checkpoint, install
from segmentation import list_segmenters

NAME, FOLDER = 'coc_tiny.in1k', '155Lfofxr7vpdcUxL8ZvzlrNX4cUlhn3J'  # from the authors' page
BUNDLED = 'coc_tiny_plain.cifar10'
TRAINED_HERE = (BUNDLED, 'fec_small.cifar10')
TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, regions=1)
ARGUMENTS = ['--model-kwargs', *(f'{key}={value}' for key, value in TINY.items()), '--num-classes', '3']
README = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')


@pytest.fixture(autouse=True)
def place(home, tmp_path, monkeypatch):
    """An empty cache, no token, and an empty working directory."""
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'work'


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('the network was asked')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def zoo(capsys):
    """A function that runs the command and returns its output, parsed with --json."""

    def run(*arguments, status=0):
        capsys.readouterr()
        assert cli.main([*map(str, arguments)]) == status
        out, err = capsys.readouterr()
        assert status == 0 or (out == '' and re.fullmatch(r'error: .*\n', err))
        return err if status else json.loads(out) if '--json' in arguments else out

    return run


@pytest.fixture
def refused(zoo):
    """A function that runs the command and returns its error of one line."""
    return partial(zoo, status=2)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A checkpoint of timm's script with weights and averaged weights for three classes."""
    torch.manual_seed(0)
    first, second = (timm.create_model('coc_tiny', num_classes=3, **TINY).state_dict() for _ in range(2))
    path = tmp_path_factory.mktemp('checkpoint') / 'last.pth.tar'
    torch.save(dict(epoch=1, arch='coc_tiny', state_dict=first, state_dict_ema=second), path)
    return path


# --- list and info ----------------------------------------------------------------------------------------------------


def test_list_agrees_with_the_readme(zoo, no_network):
    found = {row.pop('name'): row for row in zoo('list', '--json')}
    assert set(found) == {*metadata.package_tags(), *list_segmenters(), 'semantic_fpn_coc_tiny.camvid'}
    models = re.search(r'^## Models$.*?(?=^## )', README, re.MULTILINE | re.DOTALL).group()
    stated = re.findall(r'^\| `(\w+)` \| ([\d.]+) \| ([\d.]*) ?\|', models, re.MULTILINE)
    assert len(stated) >= 20
    for model, parameters, published in stated:
        rows = [row for name, row in found.items() if name.partition('.')[0] == model and name not in TRAINED_HERE]
        assert [f'{row["parameters"] / 1e6:.2f}' for row in rows] == [parameters]
        assert [row['published_top1'] for row in rows] == [float(published) if published else None]


def test_list_as_text(zoo, home, monkeypatch, published_file):
    with cache.new_folder(home / NAME) as folder:
        install(NAME, published_file, folder, {})
    rows = zoo('list', 'coc_t*', '--json')
    header, *lines = zoo('list', 'coc_t*').splitlines()
    assert header.split() == ['name', 'parameters', 'published', 'measured', 'weights']
    for line, row in zip(lines, rows, strict=True):
        name, millions, _, published, measured, *where = line.split()
        assert (name, float(millions)) == (row['name'], round(row['parameters'] / 1e6, 2))
        assert [published, measured] == [
            f'{row[x]:.1f}' if row[x] else '-' for x in ('published_top1', 'measured_top1')
        ]
        assert ' '.join(where) == row['weights']
    where = {row['name']: row['weights'] for row in rows}
    assert where[NAME] == 'in the cache' and where[BUNDLED] == 'in the package'
    assert where['coc_tiny_plain.in1k'] == "the authors' release" and where['coc_tiny2.untrained'] == 'none released'
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'my-lab')
    assert "my-lab on Hugging Face may have them, the authors' release" in zoo('list', 'coc_small')


def test_patterns(zoo):
    swin, fec = ['dnc_swin_base', 'dnc_swin_small'], ['fec_base', 'fec_large', 'fec_small']
    for pattern, expected in (('fec', [f'dnc_{x}' for x in fec] + fec), ('fec_*', fec), ('*_swin_[bs]*', swin)):
        rows = [row for row in zoo('list', pattern, '--json') if 'published_top1' in row]  # without segmenters
        found = (row['name'].partition('.')[0] for row in rows)
        assert list(dict.fromkeys(found)) == expected


def test_unknown_names(refused, checkpoint, place):
    assert 'did you mean coc_small or' in refused('list', 'coc_smal*l', '--json')
    (place / 'empty').mkdir()
    for arguments, message in (
        (['info', 'coc_smal'], r"cluster_zoo has no 'coc_smal' \(did you mean coc_small"),
        (['info', 'coc_small.in2k'], r'did you mean coc_small\.in1k'),
        (['info', 'resnet18'], "no 'resnet18'.*see cluster-zoo list"),
        (['info', 'empty'], "'empty' is no model folder"),
        (['info', 'local-dir:nowhere'], "'nowhere' is no model folder"),
        (['fetch', 'fec_smal'], 'did you mean fec_small'),
        (['fetch', '../fec_small'], 'see cluster-zoo list'),
        (['push', 'coc_smal', '--to', 'a/b'], 'did you mean coc_small'),
        (['import', checkpoint, '--as', 'coc_tny.in1k'], r'did you mean coc_tiny\.in1k'),
        (['import', checkpoint, '--as', 'coc_tiny.birds'], r'did you mean coc_tiny\.in1k'),
        (['import', checkpoint, '--to', 'x', '--model', 'coc_tny'], 'did you mean coc_tiny'),
    ):
        assert re.search(message, refused(*arguments))


def test_info(zoo, no_network):
    found = zoo('info', 'fec_small', '--json')
    assert (found['name'], found['published_top1'], found['license']) == ('fec_small.in1k', 72.7, 'apache-2.0')
    assert found['weights'] == "the authors' release" and found['sha256'] is None and 'arXiv' not in found['paper']
    assert len(found['label_names']) == 1000 and found['citation'].startswith('@inproceedings')
    found = zoo('info', BUNDLED, '--json')
    cfg = timm.create_model(BUNDLED, pretrained=True).pretrained_cfg
    assert found['label_names'] == list(cfg['label_names']) and found['input_size'] == [3, 64, 64]
    assert found['weights'] == 'in the package' and found['measured'][0]['top1'] > 80
    lines = dict(line.split(maxsplit=1) for line in zoo('info', 'coc_medium').splitlines())
    assert lines['parameters'] == '29.29 M' and lines['classes'].startswith('1000: tench, goldfish, ')
    assert lines['made_from'] == '-' and 'drive.google.com' in lines['url'] and lines['license'] == 'apache-2.0'


def test_info_of_folders_of_timm(zoo, refused, place):
    model = timm.create_model('resnet18', num_classes=3)
    timm.models.save_for_hf(model, place / 'timm', model_args=dict(num_classes=3), safe_serialization=True)
    assert zoo('info', 'timm', '--json')['classes'] == 3
    config = json.loads((place / 'timm' / 'config.json').read_text())
    earlier = dict(config.pop('pretrained_cfg'), architecture='resnet18', num_classes=3)
    (place / 'timm' / 'config.json').write_text(json.dumps(earlier))
    assert zoo('info', 'local-dir:timm', '--json')['classes'] == 3
    (place / 'timm' / 'config.json').write_text(
        json.dumps(dict(config, pretrained_cfg={}, model_args=dict(base_width=60000)))
    )
    assert 'describes' in refused('info', 'timm')


# --- fetch ------------------------------------------------------------------------------------------------------------


def test_fetch_of_available_weights(zoo, refused, home, no_network, published_file):
    assert Path(zoo('fetch', BUNDLED, '--json')['file']).is_file()
    with cache.new_folder(home / NAME) as folder:
        install(NAME, published_file, folder, {})
    found = zoo('fetch', 'coc_tiny', '--json')
    assert found == dict(folder=str(home / NAME), sha256=cache.sha256(home / NAME / 'model.safetensors'))
    assert f"timm.create_model('{NAME}', pretrained=True)" in zoo('fetch', NAME)
    with cache.new_folder(home / 'semantic_fpn_fec_small') as folder:
        (folder / 'model.safetensors').touch()
        (folder / 'config.json').write_text('{"segmenter": "semantic_fpn_fec_small"}')
    assert "create_segmenter('semantic_fpn_fec_small', pretrained=True)" in zoo('fetch', 'semantic_fpn_fec_small')
    assert 'CLUSTER_ZOO_AUTHORS=0' in refused('fetch', 'coc_small')
    assert 'published none' in refused('fetch', 'coc_tiny2')
    assert 'not from the authors' in refused('fetch', NAME, '--pin')


def test_options_of_fetch(zoo, home, monkeypatch):
    def fetch(name, url, **options):
        assert (name, options) == (NAME, dict(member='a/best.pth', force=True)) and FOLDER in url
        return home / name

    monkeypatch.setattr(weights, 'find_weights', fetch)
    (home / NAME).mkdir(parents=True)
    (home / NAME / 'config.json').write_text('{"source": {"drive_id": "FILE_ID", "sha256": "0123"}}')
    printed = zoo('fetch', 'coc_tiny', '--file', 'a/best.pth', '--force', '--pin')
    assert printed == f"    '{NAME}': ('FILE_ID', '0123'),\n"


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('options', 'key'), [([], 'state_dict'), (['--use-ema'], 'state_dict_ema')])
def test_import_info_predict_and_export_of_a_checkpoint(options, key, checkpoint, zoo, place, no_network):
    (place / 'labels.txt').write_text('\ufeffrobin\nwren\ngreat tit\n', encoding='utf-8')
    options += ['--label-names', 'labels.txt', '--img-size', '64', *ARGUMENTS]
    found = zoo('import', checkpoint, '--to', 'birds', '--json', *options)
    assert found['classes'] == 3 and found['input_size'] == [3, 64, 64] and found['architecture'] == 'coc_tiny'
    assert found['sha256'] == cache.sha256('birds/model.safetensors')
    assert sorted(os.listdir()) == ['birds', 'labels.txt']
    expected = torch.load(checkpoint, weights_only=True)[key]
    model = timm.create_model('local-dir:birds', pretrained=True).eval()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())

    info = zoo('info', 'birds', '--json')
    assert info['label_names'] == ['robin', 'wren', 'great tit'] and info['weights'] == 'in this folder'
    taken, other = ('averaged', 'of the last update') if 'ema' in key else ('of the last update', 'averaged')
    weights = info['made_from']['weights']
    assert weights.startswith(taken) and f'(the file also has weights {other}' in weights
    assert info['made_from']['sha256'] == cache.sha256(checkpoint) and info['sha256'] == found['sha256']
    assert info['published_top1'] is None and info['parameters'] == sum(x.numel() for x in model.parameters())
    assert 'birds' not in zoo('list') and 'classes         3: robin, wren, great tit' in zoo('info', 'local-dir:birds/')

    Image.new('RGB', (90, 70), 'green').save('image.png')
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode(), Image.open('image.png') as image:
        probabilities = model(transform(image).unsqueeze(0)).softmax(-1)[0].tolist()
    for name in ('birds', 'local-dir:birds'):
        (classified,) = zoo('predict', 'image.png', '--model', name, '--json')['images']
        for one in classified['classes']:
            assert one['label'] == info['label_names'][one['index']]
            assert one['probability'] == pytest.approx(probabilities[one['index']], abs=1e-5)
    exported = zoo('export', 'birds/', '--to', 'torchscript', '--json')
    assert exported['path'] == 'birds.pt' and exported['difference'] <= 1e-4


def test_import_of_a_downloaded_file(published_file, zoo, refused, home):
    found = zoo('import', published_file, '--as', 'coc_tiny', '--json')
    assert found['folder'] == str(home / NAME) and found['source']['sha256'] == cache.sha256(published_file)
    model = timm.create_model(NAME, pretrained=True)
    assert torch.equal(model.head.fc.weight, recipe.state_dict('coc_tiny')['head.weight'].float())
    assert 'in the cache already' in refused('import', published_file, '--as', NAME)
    zoo('import', published_file, '--as', NAME, '--force')
    assert 'of coc_tiny, which is not fec_small' in refused('import', published_file, '--as', 'fec_small')
    assert 'part of the package' in refused('import', published_file, '--as', BUNDLED)
    for options in (['--use-ema'], ['--num-classes', '3'], ['--model', 'coc_tiny'], ['--img-size', '64']):
        assert 'no further options' in refused('import', published_file, '--as', 'coc_small', *options)
    assert 'No checkpoint at' in refused('import', 'nowhere.pth', '--as', 'coc_small')
    assert sorted(path.name for path in home.iterdir()) == ['.locks', NAME]


def test_existing_files_are_replaced_only_with_force(checkpoint, zoo, refused, place):
    command = ['import', checkpoint, *ARGUMENTS, '--to']
    for name in ('empty', 'full', 'linked'):
        (place / name).mkdir()
    (place / 'full' / 'thesis.txt').write_text('mine')
    (place / 'file').write_text('mine')
    zoo(*command, 'empty')
    (place / 'link').symlink_to('linked')
    zoo(*command, 'link')
    assert (place / 'linked' / 'config.json').is_file() and (place / 'link').is_symlink()
    before = (place / 'empty' / 'README.md').read_bytes()
    assert '--force' in refused(*command, 'empty')
    for name, options in (('full', []), ('full', ['--force']), ('file', []), ('file', ['--force']), ('.', ['--force'])):
        assert f"'{name}' " in refused(*command, name, *options)
    assert 'cannot be written' in refused(*command, 'file/birds')
    assert 'does not fit' in refused('import', checkpoint, '--to', 'empty', '--force')
    assert (place / 'empty' / 'README.md').read_bytes() == before
    zoo(*command, 'empty', '--force', '--use-ema')
    assert (place / 'empty' / 'README.md').read_bytes() != before
    assert (
        sorted(os.listdir()) == ['empty', 'file', 'full', 'link', 'linked'] and (place / 'file').read_text() == 'mine'
    )


@pytest.mark.parametrize('options, message', [
    ([], 'one of the arguments --to --as is required'),
    (['--to', 'x', '--as', NAME], 'not allowed with'),
    (['--to', 'x', '--model-kwargs', 'depths'], "'depths' .*name=value"),
    (['--to', 'x', '--label-names', 'nowhere.txt'], r'nowhere\.txt cannot be read'),
    (['--to', 'x', '--label-names', 'gaps.txt'], r'gaps\.txt .* line 2'),
    (['--to', 'x', '--num-classes', '-3'], 'not a whole number'),
])  # fmt: skip
def test_invalid_options_of_import(options, message, checkpoint, place, capsys):
    (place / 'gaps.txt').write_text('robin\n \nwren\n')
    with pytest.raises(SystemExit) as status:
        cli.main(['import', str(checkpoint), *options])
    out, err = capsys.readouterr()
    assert status.value.code == 2 and out == '' and re.search(f'^error: .*{message}', err)


# --- push -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hf'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, 'endpoint', server.url)
        template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setenv('NO_PROXY', '*')
        monkeypatch.setenv('HF_TOKEN', OWNER)
        yield server


def test_push_and_load_back(hub, zoo, place, checkpoint, home, published_file, monkeypatch):
    import_checkpoint(checkpoint, place / 'birds', model_args=dict(TINY, num_classes=3))
    (place / 'birds' / 'notes.txt').write_text('private')
    import_checkpoint(published_file, home / NAME)
    for name, repo_id in (('birds', 'my-lab/birds'), (BUNDLED, f'my-lab/{BUNDLED}'), ('coc_tiny', f'my-lab/{NAME}')):
        address = zoo('push', name, '--to', repo_id, '--private', '--message', 'A first model', '--json')['address']
        repository = hub.repositories[repo_id]
        files = repository.commits[repository.head]
        assert address.startswith(hub.url) and repository.private
        assert set(files) - {'.gitattributes'} == {'model.safetensors', 'config.json', 'README.md'}
        own = timm.create_model('local-dir:birds' if name == 'birds' else name, pretrained=True).state_dict()
        loaded = timm.create_model(f'hf-hub:{repo_id}', pretrained=True).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in loaded.items())
    assert json.loads(files['config.json'])['architecture'] == 'coc_tiny'
    bundled = hub.repositories[f'my-lab/{BUNDLED}']
    files = bundled.commits[bundled.head]
    assert json.loads(files['config.json'])['label_names'][0] == 'airplane' and b'83.70 %' in files['README.md']
    (home / NAME).rename(home / 'elsewhere')
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'my-lab')
    assert 'hf' in Path(zoo('fetch', NAME, '--json')['folder']).parts


def test_refused_uploads(hub, refused, place, checkpoint, monkeypatch):
    import_checkpoint(checkpoint, place / 'birds', model_args=dict(TINY, num_classes=3))
    for repo_id in ('a/b/c', 'my-lab/x y', 'my-lab/x..y', 'https://huggingface.co/my-lab/x', 'my-lab/' + 'x' * 100):
        assert f'{repo_id} failed: ' in refused('push', 'birds', '--to', repo_id)
    assert 'cluster-zoo fetch coc_small.in1k' in refused('push', 'coc_small', '--to', 'my-lab/x')
    for token in (GUEST, None):
        monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
        assert 'Log in first' in refused('push', 'birds', '--to', 'my-lab/x')
    (place / 'birds' / 'model.safetensors').write_bytes(b'damaged')
    assert 'is damaged or was changed' in refused('push', 'birds', '--to', 'my-lab/x')
    assert not hub.repositories


def test_push_to_a_folder(zoo, refused, place, checkpoint, no_network):
    import_checkpoint(checkpoint, place / 'birds', model_args=dict(TINY, num_classes=3))
    (place / 'birds' / 'notes.txt').write_text('private')
    (place / 'birds' / 'README.md').unlink()  # as in a folder of timm's `save_for_hf`
    (place / 'here').mkdir()
    for target in ('./new/birds', place / 'absolute', 'here'):
        assert zoo('push', 'birds', '--to', target, '--json') == dict(folder=str(Path(target)))
        assert {path.name for path in Path(target).iterdir()} == {'model.safetensors', 'config.json'}
        assert timm.create_model(f'local-dir:{target}', pretrained=True).num_classes == 3
    assert 'exists already' in refused('push', 'birds', '--to', './new/birds')
    zoo('push', BUNDLED, '--to', './new/birds', '--force')
    assert timm.create_model('local-dir:new/birds', pretrained=True).num_classes == 10
    assert (place / 'new/birds/README.md').is_file()
    for force in ([], ['--force']):
        assert 'exists already' in refused('push', BUNDLED, '--to', './new', *force)  # not a model folder
    assert 'cannot be replaced' in refused('push', 'birds', '--to', '.')
    (place / 'file').touch()
    assert 'cannot be replaced' in refused('push', 'birds', '--to', './file')
    assert 'cannot be written' in refused('push', 'birds', '--to', './file/birds')


@pytest.mark.parametrize(('umask', 'mode'), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_of_model_folders(umask, mode, zoo, place, checkpoint):
    before = os.umask(umask)
    try:
        zoo('import', checkpoint, '--to', 'birds', *ARGUMENTS)
        zoo('push', 'birds', '--to', './copy')
        zoo('push', BUNDLED, '--to', './bundled')
    finally:
        os.umask(before)
    for folder in (place / 'birds', place / 'copy', place / 'bundled'):
        assert folder.stat().st_mode & 0o777 == mode | 0o111 & ~umask
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}
