"""Self-check of the Triton kernels: they are used where their results are those of the plain functions.

A compiler, a driver or a GPU that the tests have not seen may give wrong results without an error. So before the first
use on a device, small cases run forward and backward and are compared with `clustering` in float64: odd sizes, masks,
several heads, more centers than fit in a tile, and equal scores. The verdict is kept in ``kernels.json`` in the
package's folder (see `cluster_zoo.home`) until the GPU, the driver, PyTorch, Triton or this package changes.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ... import __version__
from ...files import replacing
from ...home import home
from .. import clustering
from ..clustering import HeadWeights, PointSets

__all__ = ['DTYPES', 'Verdict', 'is_trusted', 'largest_errors', 'verdict']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Largest error of a tensor relative to its largest entry
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_TF32_TOLERANCE = 1e-2

# S, N, C, E, M, D
_SHAPES = {
    'regions': (3, 49, 64, 4, 4, 32),
    'masks': (2, 33, 36, 8, 2, 5),
    'many centers': (2, 70, 24, 3, 100, 24),
}


class Verdict(NamedTuple):
    """Result of the self-check of one device and dtype.

    Attributes:
        trusted: Whether the kernels are used.
        reason: Why, in one line.
        errors: Largest error of each case, relative to the largest entry of the result.
        date: When it was checked, YYYY-MM-DD.
    """

    trusted: bool
    reason: str
    errors: dict[str, float]
    date: str


@torch.compiler.assume_constant_result
def is_trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are used on a CUDA device. The first call may take some seconds; it warns of a failure."""
    if not torch.cuda.is_available():  # a fake tensor
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, dtype) not in _known and torch.cuda.is_current_stream_capturing():
        return False  # nothing can be compared while a CUDA graph is recorded
    return _verdict_with_warning(index, dtype).trusted


_known: dict[tuple[int, torch.dtype], Verdict] = {}


def _verdict_with_warning(index: int, dtype: torch.dtype) -> Verdict:
    if (index, dtype) not in _known:
        found = _known[index, dtype] = verdict(torch.device('cuda', index), dtype)
        if not found.trusted and found.errors:
            warnings.warn(
                f'The Triton kernels are not used for {dtype} on {torch.cuda.get_device_name(index)}: {found.reason}. '
                'The plain PyTorch functions are used instead, which are slower. See `cluster-zoo env`.',
                RuntimeWarning,
                stacklevel=2,
            )
    return _known[index, dtype]


def verdict(device: torch.device, dtype: torch.dtype, again: bool = False) -> Verdict:
    """The recorded verdict on a device and dtype, or that of a new check.

    Args:
        device: CUDA device.
        dtype: One of `DTYPES`.
        again: Check even if there is a record.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):  # ROCm devices report 9.0 or higher
        return Verdict(False, f'compute capability {capability[0]}.{capability[1]} is below 8.0', {}, '')
    key = ', '.join([*_identity(device), str(dtype)])
    records = _read()
    if not again and key in records:
        return records[key]
    try:
        errors, failure = largest_errors(device, dtype), ''
    except torch.OutOfMemoryError as error:
        return Verdict(False, f'the self-check failed: {_line(error)}', {'any': float('inf')}, '')  # not recorded
    except Exception as error:  # of Triton's compiler, the driver or the kernels, in any version of them
        errors, failure = {'any': float('inf')}, f'the self-check failed: {type(error).__name__}: {_line(error)}'
    found = _judge(errors, dtype, failure)
    _write({**_read(), key: found})
    return found


def _judge(errors: dict[str, float], dtype: torch.dtype, failure: str) -> Verdict:
    today = date.today().isoformat()
    if failure:
        return Verdict(False, failure, errors, today)
    for name, error in errors.items():
        limit = _TF32_TOLERANCE if name.startswith('TF32') else _TOLERANCES[dtype]
        if not error <= limit:
            return Verdict(False, f'the self-check found an error of {error:.1e} in {name!r}', errors, today)
    return Verdict(True, f'the self-check passed, largest error {max(errors.values()):.1e}', errors, today)


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:200]


def _identity(device: torch.device) -> list[str]:
    """What the verdict depends on."""
    import triton

    driver = getattr(torch._C, '_cuda_getDriverVersion', lambda: 'unknown')()
    versions = (f'torch {torch.__version__}', f'triton {triton.__version__}', f'cluster_zoo {__version__} {_sources()}')
    return [torch.cuda.get_device_name(device), f'driver {driver}', *versions]


@cache
def _sources() -> str:
    """Digest of the kernels, so that a changed checkout is checked again."""
    names = ('gpu.py', 'triton_kernels.py', 'self_check.py')
    return hashlib.sha256(b''.join(Path(__file__).with_name(name).read_bytes() for name in names)).hexdigest()[:8]


# The record -------------------------------------------------------------------------------------------------------


def _read() -> dict[str, Verdict]:
    """All recorded verdicts; none if the file is missing or damaged."""
    try:
        records = json.loads((home() / 'kernels.json').read_text(encoding='utf-8'))
        return {key: Verdict(**value) for key, value in records.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(records: dict[str, Verdict]) -> None:
    """Replaces the file in one step. Where it cannot be written, each process checks again."""
    path = home() / 'kernels.json'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            text = json.dumps({k: v._asdict() for k, v in records.items()}, indent=1) + '\n'
            scratch.write_text(text, encoding='utf-8')
    except OSError:
        return


# The check --------------------------------------------------------------------------------------------------------


def largest_errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Runs the cases, on any device, and returns the largest error of each; infinite for a wrong index."""
    from . import gpu

    with _clean_state(device):
        make = _Tensors(device, dtype)
        errors = {f'equal scores, {M} centers': _index_errors(gpu, make, M) for M in (4, 150)}
        for name, shape in _SHAPES.items():
            errors[name] = _cluster_error(gpu, make, shape, masked=name == 'masks')
        errors['pooling'] = _pooling_error(gpu, make)
        errors['norms'] = _norms_error(gpu, make)
        if dtype == torch.float32:
            with _precision('tf32'):
                errors['TF32'] = _cluster_error(gpu, make, _SHAPES['regions'], masked=False)
    return errors


@contextmanager
def _clean_state(device: torch.device) -> Iterator[None]:
    """Without the modes that a caller may have set: autocast, inference, no_grad, fake tensors, counters."""
    autocast = torch.autocast(device.type, enabled=False)
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), autocast, _precision('ieee'):
        yield


@contextmanager
def _precision(value: str) -> Iterator[None]:
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, value
    try:
        yield
    finally:
        switch.fp32_precision = before


class _Tensors:
    """Makes the same random tensors each time, in float64 and rounded to the dtype of the check."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.generator = device, dtype, torch.Generator('cpu').manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64, device='cpu', generator=self.generator)
        return x.to(self.device, self.dtype)

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, device='cpu', generator=self.generator).to(self.device, self.dtype)

    def mask(self, *shape: int) -> Tensor:
        mask = torch.rand(shape, device='cpu', generator=self.generator) < 0.7
        mask[:, -1] = True
        return mask.to(self.device)


def _error(value: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest entry; infinite if not finite."""
    error = ((value.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return error if error == error else float('inf')


def _gradient_error(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], make: _Tensors
) -> float:
    """Largest error of a function's result and gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = function(*inputs), plain(*exact)
    gradient = make.normal(*out.shape).to(out.dtype)
    pairs = zip(torch.autograd.grad(out, inputs, gradient), torch.autograd.grad(expected, exact, gradient.double()))
    return max(_error(out.detach(), expected.detach()), *(_error(*pair) for pair in pairs))


def _index_errors(gpu, make: _Tensors, M: int) -> float:
    """Integer scores are exact in every dtype, so that the first of equal centers has to be found."""
    points, query = make.integers(2, 70, 20), make.integers(2, 1, M, 20)
    query[:, :, M // 2 :] = query[:, :, : M - M // 2]
    offset, mask = torch.zeros(2, 1, M, device=make.device), make.mask(2, M)
    wrong = 0
    for chosen in (None, mask):
        expected, _ = clustering.assign(points.double(), query.double(), offset.double(), chosen)
        index, _ = gpu.assign(points, query, offset, chosen)
        nearest = gpu.nearest_center(points, query[:, 0], offset.transpose(1, 2), chosen)
        wrong += (index.long() != expected).sum().item() + (nearest != expected[:, 0]).sum().item()
    return float('inf') if wrong else 0.0


def _cluster_error(gpu, make: _Tensors, shape: tuple[int, ...], masked: bool) -> float:
    S, N, C, E, M, D = shape
    shapes = ((S, N, C), (S, M, C), (S, E, M, C), (1,), (E, C, D), (E, 1, D), (E, D, C + 1), (C + 1,))
    inputs = [make.normal(*each) for each in shapes]
    offset, norms = make.normal(S, E, M).float(), make.normal(S, E, N).abs().float() + C**0.5
    masks = (make.mask(S, N), make.mask(S, M)) if masked else (None, None)

    def call(cluster: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(points: Tensor, centers: Tensor, query: Tensor, *rest: Tensor) -> Tensor:
            *weights, offset, norms = rest
            return cluster(PointSets(points, centers, *masks), query, offset, norms, HeadWeights(*weights), not masked)

        return function

    return _gradient_error(call(gpu.cluster), call(clustering.cluster), [*inputs, offset, norms], make)


def _pooling_error(gpu, make: _Tensors) -> float:
    points, centers, mask = make.normal(2, 600, 20), make.normal(2, 150, 20), make.mask(2, 600)
    index = torch.randint(150, (2, 600), device='cpu', generator=make.generator).to(make.device)

    def call(mean: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda points, centers: mean(points, centers, index, mask)

    return _gradient_error(call(gpu.group_mean), call(clustering.group_mean), [points, centers], make)


def _norms_error(gpu, make: _Tensors) -> float:
    inputs = [make.normal(2, 33, 20), make.normal(24, 20), make.normal(24)]

    def call(norms: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: norms(*inputs, 3)

    return _gradient_error(call(gpu.feature_norms), call(clustering.feature_norms), inputs, make)
