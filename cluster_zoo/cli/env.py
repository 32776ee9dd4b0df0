"""``cluster-zoo env``: what a report of a problem needs."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import __version__
from ..home import home
from ..layers.kernels.self_check import DTYPES, verdict
from .parser import COMMANDS, Commands

_PACKAGES = ('torch', 'torchvision', 'timm', 'triton', 'huggingface_hub', 'safetensors', 'einops', 'torch-scatter')
_PACKAGES += ('torchmetrics', 'onnxruntime', 'gradio')


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        'env',
        help=COMMANDS['env'].help,
        description='Print versions, devices, and for each GPU and dtype whether the Triton kernels are used and why. '
        'A GPU on which they have not run is checked, which takes some seconds.',
    )
    parser.add_argument('--check', action='store_true', help='check the kernels again, whatever is recorded')
    parser.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> None:
    print(f'cluster_zoo {__version__} in {Path(__file__).parents[1]}')
    print(f'Python {platform.python_version()}, {platform.platform()}')
    for name in _PACKAGES:
        print(f'{name} {_version(name)}')
    print(f'CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, ROCm {torch.version.hip}')
    print(f'folder of weights and checks: {home()}')
    for name, value in sorted(os.environ.items()):
        if name.startswith('CLUSTER_ZOO_'):
            print(f'{name}={value}')
    print(
        f'CPU: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads'
    )
    if not torch.cuda.is_available():
        print('no CUDA device: kernels for CPUs')
    for index in range(torch.cuda.device_count()):
        _print_device(torch.device('cuda', index), args.check)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return 'is not installed'


def _print_device(device: torch.device, again: bool) -> None:
    properties = torch.cuda.get_device_properties(device)
    capability, memory = f'{properties.major}.{properties.minor}', properties.total_memory / 2**30
    print(f'{device}: {properties.name}, compute capability {capability}, {memory:.0f} GiB')
    choice = os.environ.get('CLUSTER_ZOO_KERNELS', 'auto')
    for dtype in DTYPES:
        if find_spec('triton') is None:
            print(f'  {dtype}: plain functions, Triton is not installed')
            continue
        found = verdict(device, dtype, again)
        used = choice if choice != 'auto' else 'triton' if found.trusted else 'plain'
        why = found.reason if choice == 'auto' else f'CLUSTER_ZOO_KERNELS is set; {found.reason}'
        print(f'  {dtype}: {"Triton kernels" if used == "triton" else "plain functions"}, {why}')
        if found.errors:
            print(
                f'    checked {found.date}: ' + ', '.join(f'{name} {error:.1e}' for name, error in found.errors.items())
            )
