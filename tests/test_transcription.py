"""Whole models against the transcription of their formulas; determinism; memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from transcription import Transcription

import cluster_zoo  # noqa: F401  registers the models


def _model(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(('gamma', 'sim_alpha', 'sim_beta')):
            torch.nn.init.uniform_(parameter, 0.2, 2.0)  # branches large enough for errors to be visible
    return model


@pytest.mark.parametrize('name', ['coc_tiny', 'coc_tiny2', 'coc_tiny_plain', 'coc_small', 'fec_small', 'fec_base'])
def test_logits_and_every_gradient(name):
    model = _model(name, depths=(1, 1, 2, 1)).double()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    results = []
    for network in (model, Transcription(model)):
        logits = network(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
        results.append((logits, *gradients))
    names = ['logits', *(parameter_name for parameter_name, _ in model.named_parameters())]
    for what, value, expected in zip(names, *results):
        if expected is None:  # the features of cluster pooling
            assert '.downsample.f.' in what and (value == 0).all()
        else:
            assert (value - expected).norm() <= 1e-9 * expected.norm(), what


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
def test_training_steps_are_deterministic(name):
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            model = _model(name, drop_path_rate=0.2)
            images = torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(1))
            torch.manual_seed(2)
            logits = model(images)
            logits.square().sum().backward()
            runs.append([logits, *(parameter.grad for parameter in model.parameters())])
        assert all(torch.equal(first, second) for first, second in zip(*runs))
    finally:
        torch.use_deterministic_algorithms(False)


GROWTH = """
import sys, timm, torch, cluster_zoo
from pathlib import Path

def megabytes(field):
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

model, size = timm.create_model(sys.argv[1]).eval(), int(sys.argv[2])
with torch.inference_mode():
    model(torch.randn(1, 3, 64, 64))
    images, before = torch.randn(1, 3, size, size), megabytes('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')
    assert model(images).isfinite().all()
print(megabytes('VmHWM') - before)
"""


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='peak memory is read from /proc')
@pytest.mark.parametrize('name', ['coc_tiny_plain', 'fec_small'])
def test_memory_is_proportional_to_the_number_of_points(name):
    """1024 x 1024 pixels, 65,536 points: one matrix of FEC's similarities would be 4 GB."""
    command = [sys.executable, '-c', GROWTH, name, '1024']
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1000
