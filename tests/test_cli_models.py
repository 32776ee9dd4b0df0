"""cluster-zoo list and info: complete, true, and without asking the network."""

import hashlib
import json
import re
import socket
from pathlib import Path

import pytest
import timm

from cluster_zoo import cli
from cluster_zoo.cli.models import describe

README = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
MODELS = re.search(r'^## Models$.*?(?=^## )', README, re.MULTILINE | re.DOTALL).group()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('the network was asked')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


def listed(capsys, *arguments):
    assert cli.main(['list', *arguments, '--json']) == 0
    out, err = capsys.readouterr()
    assert err == ''
    return {row.pop('name'): row for row in json.loads(out)}


def test_list_has_every_model_and_what_the_readme_says_of_it(capsys):
    found = listed(capsys)
    registered = [
        name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith('cluster')
    ]
    assert {name.partition('.')[0] for name in found} == set(registered)
    stated = re.findall(r'^\| `(\w+)` \| ([\d.]+) \| ([\d.]*) ?\|', MODELS, re.MULTILINE)
    assert len(stated) >= 20
    for model, parameters, published in stated:
        rows = [row for name, row in found.items() if name.partition('.')[0] == model and not name.endswith('cifar10')]
        assert [f'{row["parameters"] / 1e6:.2f}' for row in rows] == [parameters]
        assert [row['published_top1'] for row in rows] == [float(published) if published else None]


def test_list_says_where_weights_are(capsys, monkeypatch):
    found = listed(capsys, 'coc_tiny')
    assert found['coc_tiny_plain.cifar10']['weights'] == 'package'
    assert found['coc_tiny.in1k']['weights'] == 'authors'
    assert found['coc_tiny2.untrained']['weights'] == 'none'
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'my-lab')
    found = listed(capsys, 'coc_tiny')
    assert found['coc_tiny_plain.cifar10']['weights'] == 'package' and found['coc_tiny.in1k']['weights'] == 'hub'
    assert cli.main(['list', 'coc_tiny.in1k']) == 0
    assert 'my-lab on Hugging Face' in capsys.readouterr().out


def test_text_says_the_same_as_json(capsys):
    found = listed(capsys, 'coc_t')
    assert cli.main(['list', 'coc_t']) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ['name', 'parameters', 'published', 'measured', 'weights']
    assert [line.split()[0] for line in lines] == list(found)
    for line, row in zip(lines, found.values()):
        _, millions, _, published, measured, *_ = line.split()
        assert float(millions) == round(row['parameters'] / 1e6, 2)
        for shown, value in ((published, row['published_top1']), (measured, row['measured_top1'])):
            assert shown == '-' if value is None else float(shown) == round(value, 1)


@pytest.mark.parametrize(
    ('pattern', 'expected'),
    [
        ('fec', ['dnc_fec_base', 'dnc_fec_large', 'dnc_fec_small', 'fec_base', 'fec_large', 'fec_small']),
        ('fec_*', ['fec_base', 'fec_large', 'fec_small']),
        ('coc_tiny*.cifar10', ['coc_tiny_plain']),
        ('*_swin_[bs]*', ['dnc_swin_base', 'dnc_swin_small']),
    ],
)
def test_filter(pattern, expected, capsys):
    assert [name.partition('.')[0] for name in listed(capsys, pattern)] == expected


def test_nothing_is_like_the_filter(capsys):
    assert cli.main(['list', 'coc_smal*l', '--json']) == 2
    assert capsys.readouterr() == (
        '',
        "error: no name matches 'coc_smal*l' (did you mean coc_small or dnc_coc_small or fec_small?)\n",
    )


def test_the_bundled_weights(capsys):
    assert cli.main(['info', 'coc_tiny_plain.cifar10', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    cfg = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).pretrained_cfg
    assert found['label_names'] == list(cfg['label_names'])
    assert found['images'] == {key: json.loads(json.dumps(cfg[key])) for key in found['images']}
    assert found['images']['input_size'] == [3, 64, 64]
    path = Path(found['weights']['path'])
    assert path.is_file() and found['weights']['where'] == 'package'
    assert found['weights']['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found['measured'][0]['value'] > 80 and found['measured'][0]['command'].startswith('python validate.py')


def test_a_published_tag(capsys):
    assert cli.main(['info', 'coc_small', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['name'] == 'coc_small.in1k' and found['published_top1'] == 78.1
    assert found['license'] == 'apache-2.0' and 'arXiv:2303.01494' in found['paper']
    assert len(found['label_names']) == 1000 and found['label_names'][0].startswith('tench')
    assert found['weights'] == {
        'where': 'authors',
        'path': None,
        'sha256': None,
        'made_from': None,
        'sources': ['https://drive.google.com/drive/folders/19zbCOS33We7HOjL575Di5wyuLbnDebdE'],
    }


def test_info_as_text(capsys, monkeypatch):
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'my-lab')
    assert cli.main(['info', 'coc_medium']) == 0
    out = capsys.readouterr().out
    lines = dict(re.split(r' {2,}', line, maxsplit=1) for line in out.splitlines() if '  ' in line)
    assert lines['model'] == 'coc_medium.in1k' and lines['parameters'] == '29.29 M'
    assert lines['classes'].startswith('1000: tench, goldfish, ')
    assert lines['image size'] == '3 x 224 x 224' and lines['crop'].startswith('90 %')
    assert lines['file'] == '-' and lines['licence'] == 'apache-2.0'
    assert re.search(r'published top-1  ?81\.2 % on ImageNet-1k, as the authors state', out)
    assert re.findall(r'^could come from +(\S+)$', out, re.MULTILINE) == [
        'hf-hub:my-lab/coc_medium.in1k',
        'https://drive.google.com/drive/folders/1H3Fs3SVE0LFHuP6iP9nTg2_ZMrkfk9S8',
    ]


def test_every_name_has_its_facts():
    for name in timm.list_models('fec*', include_tags=True):
        found = json.loads(json.dumps(describe(name)))
        assert found['name'] == name and found['weights']['where'] == 'authors'
        assert 'arXiv:2403.17409' in found['paper'] and found['citation'].startswith('@inproceedings')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('coc_smal', r"this package has no 'coc_smal' \(did you mean coc_small"),
        ('coc_small.in2k', r'did you mean coc_small\.in1k'),
        ('resnet18', "this package has no 'resnet18'"),
        ('../coc_small', 'see cluster-zoo list'),
    ],
)
def test_unknown_names(name, message, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(['info', name])
    out, err = capsys.readouterr()
    assert status.value.code == 2 and out == '' and re.search(f'^error: argument NAME: .*{message}', err)
