"""The self-check of the Triton kernels, with faults that are put into them, and its record. `cluster-zoo env`."""

import functools
import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('triton')
if not torch.cuda.is_available():
    import os

    if 'triton' not in sys.modules:
        os.environ.setdefault('TRITON_INTERPRET', '1')
    elif os.environ.get('TRITON_INTERPRET') != '1':
        pytest.skip('no GPU, and Triton was imported before TRITON_INTERPRET was set', allow_module_level=True)

from cluster_zoo.cli import main
from cluster_zoo.layers import kernels
from cluster_zoo.layers.kernels import gpu, self_check

CPU = torch.device('cpu')
CUDA = torch.device('cuda', 0)


@pytest.fixture
def gpus(home, monkeypatch):
    """Pretends that there are GPUs, whose kernels run in the interpreter. Returns the names of the devices."""
    names = {0: 'GPU A', 1: 'GPU B'}
    properties = SimpleNamespace(name='GPU A', major=9, minor=0, total_memory=80 * 2**30)
    for name, value in dict(
        is_available=lambda: True,
        device_count=lambda: len(names),
        current_device=lambda: 0,
        is_current_stream_capturing=lambda: False,
        get_device_capability=lambda device: (9, 0),
        get_device_name=lambda device: names[
            torch.device('cuda', device).index if isinstance(device, int) else device.index
        ],
        get_device_properties=lambda device: properties,
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(self_check, 'largest_errors', lambda device, dtype: errors_without_faults(dtype))
    monkeypatch.setattr(self_check, '_known', {})
    return names


run = self_check.largest_errors


@functools.cache
def errors_without_faults(dtype):
    return run(CPU, dtype)


def chosen(device=CUDA, dtype=torch.float32):
    return kernels._chosen(SimpleNamespace(device=device, dtype=dtype))


def new_process(monkeypatch):
    monkeypatch.setattr(self_check, '_known', {})


@pytest.mark.parametrize('dtype', self_check.DTYPES)
def test_passes_with_the_kernels(gpus, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        assert chosen(dtype=dtype) == 'gpu'
    found = self_check.verdict(CUDA, dtype)
    assert found.trusted and 'largest error' in found.reason
    assert {'regions', 'masks', 'many centers', 'pooling', 'norms'} <= found.errors.keys()


def test_float64_and_the_environment_variable(gpus, monkeypatch):
    assert chosen(dtype=torch.float64) == 'plain'
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'plain')
    assert chosen() == 'plain'
    assert not self_check._known  # nothing was checked


def _wrong_index(points, *rest):
    index, score = gpu_assign(points, *rest)
    return torch.where(index == 0, index, index - 1), score


def _last_of_equals(points, query, offset, mask):
    index, score = gpu_assign(points, query.flip(2), offset.flip(2), mask if mask is None else mask.flip(1))
    return query.shape[2] - 1 - index, score


def _not_finite(*args):
    sums, totals = gpu_aggregate(*args)
    return sums / 0 * 0, totals


def _raises(*args):
    raise RuntimeError('out of resource: shared memory')


gpu_assign, gpu_dispatch, gpu_aggregate, gpu_norms = gpu.assign, gpu.dispatch, gpu.aggregate, gpu.row_norms
FAULTS = {
    'wrong index': ('assign', _wrong_index, 'equal scores'),
    'last of equal centers': ('assign', _last_of_equals, 'equal scores'),
    'error of 1 %': ('dispatch', lambda *args: 1.01 * gpu_dispatch(*args), 'regions'),
    'no gradient': (
        'dispatch',
        lambda v, i, w, b: gpu_dispatch(v, i, w.detach(), b),
        'not have been used in the graph',
    ),
    'not finite': ('aggregate', _not_finite, 'regions'),
    'wrong norms': ('row_norms', lambda rows: gpu_norms(rows) + 0.1, 'norms'),
    'compiler error': ('aggregate', _raises, 'out of resource'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults(fault, gpus, monkeypatch):
    """One warning with the reason, then the plain functions, also in the next process."""
    operation, function, reason = FAULTS[fault]
    monkeypatch.setattr(gpu, operation, function)
    monkeypatch.setattr(self_check, 'largest_errors', lambda device, dtype: run(CPU, dtype))
    with pytest.warns(RuntimeWarning, match=f'(?s)Triton kernels are not used for torch.float32 on GPU A.*{reason}'):
        assert chosen() == 'plain'
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        assert chosen() == 'plain'
    new_process(monkeypatch)
    monkeypatch.setattr(self_check, 'largest_errors', lambda *args: pytest.fail('checked again'))
    with pytest.warns(RuntimeWarning, match=reason):
        assert chosen() == 'plain'


def test_each_device_and_dtype_has_its_own_verdict(gpus, monkeypatch):
    def only_bfloat16_of_b_fails(device, dtype):
        fails = gpus[device.index] == 'GPU B' and dtype == torch.bfloat16
        return {'regions': float('nan')} if fails else errors_without_faults(dtype)

    monkeypatch.setattr(self_check, 'largest_errors', only_bfloat16_of_b_fails)
    other = torch.device('cuda', 1)
    assert chosen() == 'gpu' and chosen(dtype=torch.bfloat16) == 'gpu' and chosen(other) == 'gpu'
    with pytest.warns(RuntimeWarning, match='bfloat16 on GPU B'):
        assert chosen(other, torch.bfloat16) == 'plain'


@pytest.mark.parametrize('change', ['GPU', 'driver', 'torch', 'triton', 'package', 'kernels'])
def test_what_the_record_depends_on(change, gpus, home, monkeypatch):
    calls = []
    monkeypatch.setattr(self_check, 'largest_errors', lambda *args: calls.append(args) or {'regions': 1e-6})
    for _ in range(2):
        new_process(monkeypatch)
        assert chosen() == 'gpu'
    assert len(calls) == 1
    new_process(monkeypatch)
    match change:
        case 'GPU':
            gpus[0] = 'GPU C'
        case 'driver':
            monkeypatch.setattr(torch._C, '_cuda_getDriverVersion', lambda: 99, raising=False)
        case 'torch':
            monkeypatch.setattr(torch, '__version__', '9.9')
        case 'triton':
            monkeypatch.setattr('triton.__version__', '9.9')
        case 'package':
            monkeypatch.setattr(self_check, '__version__', '9.9')
        case 'kernels':
            monkeypatch.setattr(self_check, '_sources', lambda: 'changed')
    assert chosen() == 'gpu' and len(calls) == 2


@pytest.mark.parametrize('content', ['', '{', '[]', '{"a": 1}', '{"a": {"trusted": true}}'])
def test_damaged_record(content, gpus, home, monkeypatch):
    monkeypatch.setattr(self_check, 'largest_errors', lambda *args: {'regions': 1e-6})
    home.mkdir()
    (home / 'kernels.json').write_text(content)
    assert chosen() == 'gpu'
    assert len(json.loads((home / 'kernels.json').read_text())) == 1
    assert [path.name for path in home.iterdir()] == ['kernels.json']


def test_record_that_cannot_be_written(gpus, home, monkeypatch):
    monkeypatch.setattr(self_check, 'largest_errors', lambda *args: {'regions': 1e-6})
    home.write_text('a file in place of the folder')
    assert chosen() == 'gpu'


def test_out_of_memory_is_not_recorded(gpus, home, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(self_check, 'largest_errors', full)
    with pytest.warns(RuntimeWarning, match='CUDA out of memory'):
        assert chosen() == 'plain'
    assert not (home / 'kernels.json').exists()


def test_old_gpu_and_capture_of_a_graph(gpus, monkeypatch):
    monkeypatch.setattr(self_check, 'largest_errors', lambda *args: pytest.fail('was checked'))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert chosen() == 'plain' and not self_check._known
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        assert chosen() == 'plain'
    assert self_check.verdict(CUDA, torch.float32).reason == 'compute capability 7.5 is below 8.0'


def test_modes_of_the_caller_do_not_matter():
    """Also the caller's random numbers stay the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    expected, state = errors_without_faults(torch.float32), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16), FakeTensorMode():
        assert self_check.largest_errors(CPU, torch.float32) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_fake_tensors_use_the_plain_functions():
    if not torch.cuda.is_available():
        assert chosen() == 'plain'


def test_compiler_takes_the_verdict_as_a_constant():
    def function(x):
        return x + 1 if self_check.is_trusted(CUDA, torch.float32) else x - 1

    x = torch.zeros(3)
    assert torch.equal(torch.compile(function, fullgraph=True, backend='eager')(x), function(x))


def test_env(gpus, home, monkeypatch, capsys):
    fails = {torch.bfloat16: {'regions': 0.5}}
    monkeypatch.setattr(self_check, 'largest_errors', lambda _, dtype: fails.get(dtype) or errors_without_faults(dtype))
    assert main(['env']) == 0
    text = capsys.readouterr().out
    assert 'cuda:0: GPU A, compute capability 9.0, 80 GiB' in text
    assert 'torch.float32: Triton kernels, the self-check passed' in text
    assert "torch.bfloat16: plain functions, the self-check found an error of 5.0e-01 in 'regions'" in text
    assert f'torch {torch.__version__.split("+")[0]}' in text and str(home) in text
    fails.clear()
    assert main(['env']) == 0 and 'plain functions' in capsys.readouterr().out  # as recorded
    assert main(['env', '--check']) == 0 and 'plain functions' not in capsys.readouterr().out


def test_env_without_a_gpu(capsys):
    if not torch.cuda.is_available():
        assert main(['env']) == 0
        assert 'no CUDA device: kernels for CPUs' in capsys.readouterr().out
