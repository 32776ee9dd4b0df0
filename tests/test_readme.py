"""What README.md says: its examples run, its table is true."""

import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import cluster_zoo

README = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
TABLE = README.split('\n## Models\n')[1].split('\n## ')[0]
MODELS = [
    name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith('cluster_zoo.')
]


def test_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(photograph=Image.new('RGB', (70, 50)))
    examples = [block for block in re.findall(r'```python\n(.*?)```', README, re.DOTALL) if '/path/to' not in block]
    assert len(examples) >= 2
    for example in examples:
        exec(compile(example, 'README.md', 'exec'), names)
    assert names['logits'].shape == (2, 10)
    with Image.open(tmp_path / 'clusters.png') as picture:
        assert picture.size == (70, 50)


def test_every_model_is_in_the_table():
    assert sorted(re.findall(r'^\| `(\w+)` \| \d', TABLE, re.MULTILINE)) == sorted(MODELS)


@pytest.mark.parametrize('name', MODELS)
def test_parameters_in_the_table(name):
    stated = re.search(rf'^\| `{name}` \| ([\d.]+) \|', TABLE, re.MULTILINE).group(1)
    with torch.device('meta'):
        model = timm.create_model(name)
    assert f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}' == stated


def test_version_in_the_changelog():
    changelog = (Path(__file__).parents[1] / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(r'^## \[(.+?)\]', changelog, re.MULTILINE).group(1) == cluster_zoo.__version__
