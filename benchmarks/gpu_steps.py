"""The steps of benchmarks/gpu.py: the cases of each, and the functions that measure a case.

The steps that train are in gpu_training.py.
"""

import argparse
import functools
import gc
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'benchmarks')]

import throughput  # noqa: E402
from clustering import create, floor  # noqa: E402
from gpu_training import centroid_cases, cifar10_cases  # noqa: E402
from measuring import Classifier, event_seconds, nvidia_smi, peak_bytes  # noqa: E402
from transcription import Transcription  # noqa: E402
from worker import Case  # noqa: E402

from cluster_zoo.datasets import create_dataset  # noqa: E402
from cluster_zoo.explain.maps import find_layers  # noqa: E402
from cluster_zoo.layers import clustering  # noqa: E402

MODELS = ['coc_tiny', 'coc_small', 'fec_small']
TRAINED = ['coc_tiny_plain.cifar10', 'fec_small.cifar10']
PEERS = ['resnet50', 'convnext_tiny', 'poolformer_s12', 'swin_tiny_patch4_window7_224']
TESTS = [f'tests/test_{name}.py' for name in ('kernels_gpu', 'self_check', 'products', 'channels_last', 'kernels')]
BATCH = dict(inference=256, training=128)
PRECISIONS = ['float32', 'TF32', 'bfloat16']
NETWORKS = dict(model=lambda model: model, floor=floor, formulas=Transcription)
KERNELS_IN_PROFILE = 25


def is_ours(name: str) -> bool:
    return name.startswith(('coc_', 'fec_'))


@contextmanager
def runtime(kernels: str, tf32: bool = True) -> Iterator[None]:
    """Selects the implementation of clustering and the precision of float32. cuDNN searches, as in ``train.py``."""
    cudnn, convolutions, products = torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = cudnn.benchmark, convolutions.fp32_precision, products.fp32_precision
    precision = 'tf32' if tf32 else 'ieee'
    try:
        cudnn.benchmark, convolutions.fp32_precision, products.fp32_precision = True, precision, precision
        with patch.dict(os.environ, CLUSTER_ZOO_KERNELS=kernels):
            yield
    finally:
        cudnn.benchmark, convolutions.fp32_precision, products.fp32_precision = before


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernel_cases(args: argparse.Namespace) -> list[Case]:
    """One case for each test of the kernels.

    Raises:
        RuntimeError: pytest cannot collect the tests.
    """
    command = [sys.executable, '-m', 'pytest', '-o', 'addopts=', '--rootdir', str(ROOT), '--collect-only', '-q']
    run = subprocess.run([*command, *(args.tests or TESTS)], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f'pytest cannot collect {" ".join(args.tests or TESTS)}:\n{run.stdout}{run.stderr}')
    return [Case(kernel_test, dict(test=line)) for line in run.stdout.splitlines() if '::' in line]


def kernel_test(args: argparse.Namespace, test: str) -> dict[str, Any]:
    """Runs a test and returns its outcome.

    Raises:
        RuntimeError: It failed. The message is that of pytest.
    """
    reports = []

    class Plugin:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            reports.append(report)

    options = ['-o', 'addopts=', '-q', '-p', 'no:cacheprovider', '--rootdir', str(ROOT)]
    # Plugins of other packages are not needed, and take longer than most tests
    fast = patch.dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')
    with fast, open(os.devnull, 'w') as silent, redirect_stdout(silent):
        pytest.main([*options, str(ROOT / test)], plugins=[Plugin()])
    failed = [report.longreprtext for report in reports if report.failed]
    if failed or not reports:
        raise RuntimeError('\n'.join(failed) or 'the test did not run')
    return dict(outcome='skipped' if any(report.skipped for report in reports) else 'passed')


# --- parity -----------------------------------------------------------------------------------------------------------


def parity_cases(args: argparse.Namespace) -> list[Case]:
    models = [name for name in args.models or MODELS + TRAINED if is_ours(name)]
    cases = []
    for name, precision, kernels in itertools.product(models, PRECISIONS, args.kernels):
        trained = '.' in name
        images = args.batch_size or (256 if trained else 16)
        size = timm.get_pretrained_cfg(name).input_size[-1] if trained else args.img_size
        cases.append(Case(parity, dict(model=name, precision=precision, kernels=kernels, images=images, size=size)))
    return cases


def example(name: str, images: int, size: int) -> tuple[nn.Module, Tensor]:
    """Returns a model and images of ``size`` pixels: for bundled weights those of the bundled sample, else random."""
    torch.manual_seed(0)
    if '.' not in name:
        return create(name).eval(), torch.randn(images, 3, size, size)
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    sample = create_dataset('cluster_zoo/cifar10_sample')
    chosen = range(0, len(sample), len(sample) // images)[:images]  # of all classes
    return model, torch.stack([transform(sample[index][0]) for index in chosen])


@contextmanager
def recorded_assignments() -> Iterator[list[Tensor]]:
    """Records the index that each layer computes in a forward pass, int [S, E, N] or [S, N]."""
    found = []

    def recording(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            found.append((result[0] if isinstance(result, tuple) else result).flatten().cpu())
            return result

        return call

    modules = [(clustering, 'assign'), (clustering, 'nearest_center')]
    if os.environ['CLUSTER_ZOO_KERNELS'] == 'triton':
        from cluster_zoo.layers.kernels import gpu  # imports Triton, which may not be installed

        modules = [(gpu, 'assign')]
    with ExitStack() as stack:
        for module, name in modules:
            stack.enter_context(patch.object(module, name, recording(getattr(module, name))))
        yield found


def outputs(model: nn.Module, images: Tensor, amp: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns logits and a gradient of the first weight, both float64, and the assignments of all layers."""
    with recorded_assignments() as found, torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits = model(images)
    if len(found) != len(find_layers(model)):
        raise RuntimeError(f'{len(found)} assignments were recorded, of {len(find_layers(model))} layers')
    (gradient,) = torch.autograd.grad(logits.double().square().sum(), model.stem.proj.weight)
    return logits.detach().double().cpu(), gradient.double().cpu(), found


@functools.cache
def exact(name: str, images: int, size: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`outputs` in float64 on the CPU."""
    model, batch = example(name, images, size)
    with runtime('plain'):
        return outputs(model.double(), batch.double(), amp=False)


def parity(
    args: argparse.Namespace, model: str, precision: str, kernels: str, images: int, size: int
) -> dict[str, float]:
    """Returns relative errors, and how many assignments and predictions differ, from float64 on the CPU."""
    network, batch = example(model, images, size)
    network = network.to(args.device, memory_format=torch.channels_last)
    batch = batch.to(args.device).contiguous(memory_format=torch.channels_last)
    with runtime(kernels, tf32=precision == 'TF32'):
        logits, gradient, joined = outputs(network, batch, amp=precision == 'bfloat16')
    expected_logits, expected_gradient, expected = exact(model, images, size)
    differ = [(index != other).sum().item() for index, other in zip(joined, expected)]
    points = [len(index) for index in expected]
    return dict(
        logits=((logits - expected_logits).norm() / expected_logits.norm()).item(),
        gradient=((gradient - expected_gradient).norm() / expected_gradient.norm()).item(),
        points=sum(points),
        flips=sum(differ),
        worst_layer=max(count / total for count, total in zip(differ, points)),
        changed_top1=(logits.argmax(1) != expected_logits.argmax(1)).sum().item(),
    )


# --- throughput and profile -------------------------------------------------------------------------------------------


def throughput_cases(args: argparse.Namespace) -> list[Case]:
    """This package's models come before others."""
    models = sorted(args.models or MODELS + PEERS, key=lambda name: not is_ours(name))
    cases = []
    for execution, name, mode in itertools.product(args.executions, models, BATCH):
        networks = [('model', kernels) for kernels in args.kernels] if is_ours(name) else [('model', '-')]
        if is_ours(name):
            networks += [('floor', '-')] + [('formulas', '-')] * (execution == 'eager')
        for network, kernels in networks:
            settings = dict(model=name, network=network, kernels=kernels, execution=execution, mode=mode)
            size = dict(batch=args.batch_size or BATCH[mode], size=args.img_size)
            cases.append(Case(speed, settings | size))
    return cases


def candidate(
    args: argparse.Namespace, name: str, batch: int, size: int, network: str = 'model', execution: str = 'eager'
) -> Classifier:
    """Creates a network and a batch, in channels_last and bfloat16 autocast."""
    gc.collect()
    torch.compiler.reset()  # frees compiled models, and no model counts as a recompilation of another
    if args.device != 'cpu':
        torch.cuda.empty_cache()
    options = dict(device=args.device, batch_size=batch, channels_last=True, amp=True, compile=execution == 'compiled')
    return throughput.candidate(name, size, argparse.Namespace(**options), NETWORKS[network])


def speed(
    args: argparse.Namespace, model: str, network: str, kernels: str, execution: str, mode: str, batch: int, size: int
) -> dict[str, Any]:
    """Returns the median time of a step, the peak of the allocated memory, and the GPU's clock in these steps."""
    with runtime('auto' if kernels == '-' else kernels):
        step = partial(candidate(args, model, batch, size, network, execution).step, mode)
        for _ in range(3):
            step()
        times = event_seconds(step, args.device, args.timed_steps, args.repeats)
        for _ in range(args.timed_steps if args.device != 'cpu' else 0):  # queued, so that the GPU is busy
            step()
        clock = nvidia_smi('clocks.sm')['clocks.sm']
        memory = peak_bytes(step, args.device) / 1e6 if args.device != 'cpu' else None
    median = statistics.median(times)
    return dict(seconds=median, spread=max(times) / min(times) - 1, memory_mb=memory, sm_mhz=clock)


def profile_cases(args: argparse.Namespace) -> list[Case]:
    models = [name for name in args.models or ['coc_small', 'fec_small'] if is_ours(name)]
    size = dict(batch=args.batch_size or BATCH['training'], size=args.img_size)
    return [
        Case(profile_step, dict(model=name, kernels=kernels) | size)
        for name, kernels in itertools.product(models, args.kernels)
    ]


def profile_step(args: argparse.Namespace, model: str, kernels: str, batch: int, size: int) -> dict[str, Any]:
    """Returns the kernels of a training step by their time (of a CPU: the operators), and the time of the step."""
    on_gpu = args.device != 'cpu'
    with runtime(kernels):
        step = partial(candidate(args, model, batch, size).step, 'training')
        for _ in range(3):
            step()
        seconds = statistics.median(event_seconds(step, args.device, args.timed_steps, args.repeats))
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
            step()
            if on_gpu:
                torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind and not event.is_user_annotation]
    rows = [(e.key, e.count, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events]
    rows.sort(key=lambda row: -row[2])
    return dict(
        step_ms=1e3 * seconds,
        kernel_ms=sum(time for _, _, time in rows) / 1e3,
        launches=sum(count for _, count, _ in rows),
        kernels_top=[dict(name=name, calls=count, ms=time / 1e3) for name, count, time in rows[:KERNELS_IN_PROFILE]],
    )


STEPS: dict[str, Callable[[argparse.Namespace], list[Case]]] = dict(
    kernels=kernel_cases,
    parity=parity_cases,
    throughput=throughput_cases,
    profile=profile_cases,
    cifar10=cifar10_cases,
    centroids=centroid_cases,
)
