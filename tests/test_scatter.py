"""benchmarks/scatter.py: the operations of torch and, if installed, of torch-scatter give the same sums."""

import runpy
from pathlib import Path

import pytest
import torch

from cluster_zoo.layers.clustering import group_mean

BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / 'benchmarks' / 'scatter.py'))


def test_all_implementations_agree_forward_and_backward():
    times = BENCHMARK['measure'](channels=5, points=30, centers=7, device=torch.device('cpu'), rounds=1)
    assert list(times) == list(BENCHMARK['WAYS'])


def test_torch_scatter_is_compared_if_installed():
    pytest.importorskip('torch_scatter', reason='the extra "scatter" is not installed', exc_type=ImportError)
    assert {'torch-scatter sum', 'torch-scatter csr'} <= set(BENCHMARK['WAYS'])


@pytest.mark.parametrize('name', BENCHMARK['WAYS'])
def test_group_mean(name):
    torch.manual_seed(0)
    v, center_v = torch.randn(2, 5, 30, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    index = torch.randint(7, (2, 30))
    total, count = (BENCHMARK['WAYS'][name](x, index, 7) for x in (v, torch.ones_like(v)))
    mean = group_mean(v.transpose(1, 2), center_v.transpose(1, 2), index).transpose(1, 2)
    torch.testing.assert_close(mean, (total + center_v) / (count + 1), rtol=1e-12, atol=1e-12)
