"""benchmarks/traffic.py: counts of single operations, of models, and the backward pass on fake CUDA tensors."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'traffic.py'
BENCHMARK = runpy.run_path(str(SCRIPT))
Traffic, backward, counts, floor = (BENCHMARK[name] for name in ('Traffic', 'backward', 'counts', 'floor'))


def _count(function, *shapes, dtype=torch.float32, layout=torch.contiguous_format):
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=dtype, device='cuda') for shape in shapes]
        inputs = [x.contiguous(memory_format=layout) if x.ndim == 4 else x for x in inputs]
        with Traffic() as traffic:
            function(*inputs)
    return traffic.launches.total(), traffic.bytes.total()


@pytest.mark.parametrize(
    'function, shapes, expected',
    [
        (torch.add, [(8, 6), (8, 6)], (1, 3 * 48 * 4)),
        (torch.add, [(8, 6), (6,)], (1, (2 * 48 + 6) * 4)),
        (torch.sum, [(8, 6)], (1, (48 + 1) * 4)),
        (lambda x: x.t().unsqueeze(0).expand(5, 6, 8), [(8, 6)], (0, 0)),  # views
        (lambda x: x.expand(5, 8, 6) + 1, [(8, 6)], (1, (48 + 240) * 4)),  # an expanded dimension is read once
        (lambda x: x.half(), [(8, 6)], (1, 48 * 6)),
        (lambda x: x.add_(1), [(8, 6)], (1, 2 * 48 * 4)),
        (torch.mm, [(8, 6), (6, 5)], (1, (48 + 30 + 40) * 4)),
        (lambda a, b: a @ b.t(), [(8, 6), (5, 6)], (1, (48 + 30 + 40) * 4)),
        (lambda a, b: a[:, ::2] @ b, [(8, 6), (3, 5)], (2, (24 + 15 + 40 + 2 * 24) * 4)),  # copies a factor
        (F.linear, [(8, 6), (5, 6), (5,)], (1, (48 + 30 + 5 + 40) * 4)),
        (torch.baddbmm, [(2, 1, 5), (2, 8, 6), (2, 6, 5)], (2, (10 + 96 + 60 + 3 * 80) * 4)),
        (lambda x: torch.empty_like(x), [(8, 6)], (0, 0)),
        (torch.zeros_like, [(8, 6)], (1, 48 * 4)),
    ],
)
def test_operations(function, shapes, expected):
    assert _count(function, *shapes) == expected


def test_group_norm_copies_channels_last():
    x = 2 * 8 * 6 * 6 * 4
    assert _count(lambda x: F.group_norm(x, 1), (2, 8, 6, 6)) == (3, 3 * x)
    norm, shape = (lambda x: F.group_norm(x, 1) + 1), (2, 8, 6, 6)
    assert _count(norm, shape, layout=torch.channels_last) == (3 + 1 + 1, 3 * x + 2 * x + 2 * x)


def test_convolution():
    x, weight, out = 2 * 8 * 36 * 4, 4 * 8 * 4, 2 * 4 * 36 * 4
    conv = lambda x, w, b: F.conv2d(x, w, b)  # noqa: E731
    assert _count(conv, (2, 8, 6, 6), (4, 8, 1, 1), (4,)) == (2, x + weight + 16 + 3 * out)
    assert _count(F.conv2d, (2, 8, 6, 6), (4, 8, 1, 1), layout=torch.channels_last) == (1, x + weight + out)


def test_backward_is_that_of_autograd():
    """With real tensors: the same gradients reach the leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.GELU(), nn.Flatten(), nn.Linear(64, 2))
    x, found = torch.randn(2, 3, 6, 6), {}
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: found.setdefault(name, gradient))
    out = model(x)
    run = backward.__globals__['run']

    def recorded(node, incoming):
        outgoing = run(node, incoming)
        for (following, _), gradient in zip(node.next_functions, outgoing):
            if following is not None and hasattr(following, 'variable'):
                key = next(name for name, p in model.named_parameters() if p is following.variable)
                found[key] = gradient.sum_to_size(following.variable.shape)
        return outgoing

    backward.__globals__['run'] = recorded
    try:
        with torch.no_grad():
            backward(out)
    finally:
        backward.__globals__['run'] = run
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
@pytest.mark.parametrize('kernels', ['plain', 'triton'])
def test_models(name, kernels):
    """The goal: at most 1.8 times the launches of the floor. No operation reads a value from the device."""
    model, args = timm.create_model(name), argparse.Namespace(batch_size=128, img_size=224)
    least = counts(floor(model), 'bfloat16', 'plain', args)
    found = counts(model, 'bfloat16', kernels, args)
    assert found['forward'].launches.total() <= 1.8 * least['forward'].launches.total()
    assert found['step'].bytes.total() > 2 * found['forward'].bytes.total()
    assert 'native_group_norm' not in found['step'].launches  # copies channels_last
    if kernels == 'triton':
        used = [key for key in found['forward'].launches if key.startswith('cluster_zoo::')]
        assert {'cluster_zoo::assign', 'cluster_zoo::aggregate', 'cluster_zoo::dispatch'} <= set(used)


def test_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'traffic.json'
    words = ['--models', 'coc_tiny', '--precisions', 'bfloat16', '--kernels', 'plain', '--batch-size', '2']
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *words, '--img-size', '64', '--operations', '--json', str(path)])
    runpy.run_path(str(SCRIPT), run_name='__main__')
    text = capsys.readouterr().out
    assert text.count('| `coc_tiny` |') == 2 and '| `addmm` |' in text
    assert [entry['pass'] for entry in json.loads(path.read_text())] == ['forward', 'step']


def test_unknown_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), '--models', 'resnet18'])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name='__main__')
    assert "'resnet18' is not one of the registered models" in capsys.readouterr().err
