"""benchmarks/clustering.py: the compared networks, the check, the measurements, and errors of options."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'clustering.py'
BENCHMARK = runpy.run_path(str(SCRIPT))


def _run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
def test_the_floor_is_the_network_without_its_clustering(name):
    model = timm.create_model(name)
    floor = BENCHMARK['floor'](model)
    block, without = model.stages[1].blocks[0], floor.stages[1].blocks[0]
    x = torch.randn(2, 64, 8, 8)
    mixer = block.token_mixer
    torch.testing.assert_close(without.token_mixer(x), mixer.proj(mixer.v(x) + mixer.f(x)))
    if name == 'fec_small':
        pool, without = model.stages[1].downsample, floor.stages[1].downsample
        x = torch.randn(2, 32, 16, 16)
        expected = pool.skip(x) + pool.norm(torch.nn.functional.avg_pool2d(pool.v(x), 2))
        torch.testing.assert_close(without(x), expected)
    assert set(dict(floor.named_parameters())) == {n for n, _ in model.named_parameters() if 'sim_' not in n}


def test_difference_from_the_formulas_is_detected(monkeypatch):
    assert BENCHMARK['disagreement']('coc_tiny', 64) < 1e-12
    create = BENCHMARK['disagreement'].__globals__['create']

    def other(name):
        model = create(name)
        stem = model.stem.proj
        model.stem.register_forward_hook(lambda module, inputs, output: output + 1e-6 * stem.weight.sum())
        return model

    monkeypatch.setitem(BENCHMARK['disagreement'].__globals__, 'create', other)
    assert BENCHMARK['disagreement']('coc_tiny', 64) > 1e-9


def test_figures(tmp_path):
    run = _run(
        *('--models', 'coc_tiny', '--img-size', '64', '--batch-size', '2', '--threads', '1'),
        *('--rounds', '3', '--formulas', '--json', str(tmp_path / 'figures.json')),
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / 'figures.json').read_text())['figures']['coc_tiny']
    assert set(figures) == {'check', 'forward', 'train', 'memory'}
    for kind in ('forward', 'train'):
        row = figures[kind]
        assert row['model ms'] > 0 and row['floor ms'] > 0 and row['formulas ms'] > 0
        assert f'| `coc_tiny` | {kind} | {row["model ms"]:.0f} ms | {row["floor ms"]:.0f} ms |' in run.stdout
    assert figures['memory']['model / floor'] == figures['memory']['model MB'] / figures['memory']['floor MB']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--models', 'coc_tinny'), "'coc_tinny'"),
        (('--models', 'resnet18'), "'resnet18'"),
        (('--device', 'cuda'), '--device cuda'),
    ],
)
def test_invalid_options(arguments, message):
    if 'cuda' in arguments and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    run = _run(*arguments)
    assert run.returncode == 2 and message in run.stderr and 'Traceback' not in run.stderr
