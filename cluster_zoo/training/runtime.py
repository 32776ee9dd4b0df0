"""Device, precision and processes of a run, and errors of options."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm import utils
from timm.layers import set_fast_norm

from ..errors import OptionError, UserError

__all__ = [
    'available_workers',
    'build_precision',
    'check_output_file',
    'in_first_process',
    'model_dtype',
    'option_errors',
    'set_device_defaults',
    'set_up_device',
    'set_up_processes',
    'set_up_runtime',
]


_MAX_WORKERS = 32  # on CUDA; each of them holds two batches


@contextmanager
def option_errors(option: str, *also: type[Exception]) -> Iterator[None]:
    """Raises what timm and PyTorch raise for the value of an option as an `OptionError` that names the option.

    Errors of other types are bugs and pass through.

    Args:
        option: Start of the message, for example ``'--opt adamv'``.
        *also: Further error types that a value can cause, for example ``TypeError`` where a user gives the names of
            arguments.
    """
    try:
        yield
    except UserError:
        raise
    except (AssertionError, OSError, RuntimeError, ValueError, *also) as error:
        raise OptionError(f'{option}: {" ".join(str(error).split()) or type(error).__name__}') from error


def check_output_file(option: str, path: str) -> None:
    """Creates the folder of an output file, and raises `OptionError` unless the file can be written."""
    with option_errors(f'{option} {path}'):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        existed = Path(path).exists()
        with open(path, 'a'):
            pass
        if not existed:
            Path(path).unlink()


def in_first_process(args: argparse.Namespace, work: Callable[[], Any], group: Any = None) -> Any:
    """Calls a function in the first process.

    Returns:
        What it returns, in all processes.

    Raises:
        UserError: The function has raised it. All processes raise it.
    """
    result = [None, None]
    if utils.is_primary(args):
        try:
            result[0] = work()
        except UserError as error:
            result[1] = error
    if args.distributed:
        dist.broadcast_object_list(result, group=group)
    if result[1] is not None:
        raise result[1]
    return result[0]


def available_workers(workers: int) -> int:
    """Returns ``workers``, but at most the number of processors that this process may use."""
    return min(workers, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)


def set_device_defaults(args: argparse.Namespace) -> None:
    """Sets the options that depend on the device, unless a flag or the config file gives them.

    On CUDA these are pinned memory, channels_last, bfloat16 for ``--amp`` where the GPU computes in it, persistent
    workers, and as many workers as this process's share of the processors. Elsewhere it is the number of workers.
    Options that a script does not have are left out. Call this when the device is known.
    """
    if not args.device.startswith('cuda'):
        if 'workers' not in args.given:
            args.workers = available_workers(args.workers)
        return
    share = available_workers(sys.maxsize) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    defaults = dict(
        pin_mem=True,
        channels_last=True,
        persistent_workers=not getattr(args, 'mixup_off_epoch', 0),  # it changes what the workers do
        workers=max(1, min(share, _MAX_WORKERS)),
    )
    if args.amp and torch.cuda.is_bf16_supported(including_emulation=False):
        defaults['amp_dtype'] = 'bfloat16'
    for name, value in defaults.items():
        is_given = args.sources.get(name) in ('flag', 'config') and getattr(args, name) is not None
        if hasattr(args, name) and not is_given:
            setattr(args, name, value)


def set_up_device(args: argparse.Namespace, tf32: bool = False) -> None:
    """Sets ``args.device`` if it is empty, and checks that the device works.

    Args:
        args: The options.
        tf32: Whether products and convolutions in float32 may round their inputs to TF32 on CUDA.
    """
    if not args.device:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        args.device = accelerator.type if accelerator is not None else 'cpu'
    with option_errors(f'--device {args.device}'):
        torch.zeros(1, device=args.device)
    if args.device.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True


def set_up_runtime(args: argparse.Namespace, tf32: bool = False) -> None:
    """Sets up the device and the process-wide options that ``train.py`` and ``validate.py`` share.

    See `set_up_device` for ``tf32``.
    """
    for module in args.device_modules or ():
        with option_errors('--device-modules', ImportError):
            importlib.import_module(module)
    set_up_device(args, tf32)
    if args.fuser:
        with option_errors('--fuser'):
            utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    if args.torchscript and args.torchcompile:
        raise OptionError('--torchscript and --torchcompile exclude each other')
    if args.model_dtype and args.amp:
        raise OptionError('--model-dtype and --amp exclude each other')


def set_up_processes(args: argparse.Namespace) -> None:
    """Joins the process group of a launcher, if there is one, and sets up logging and the defaults of the device.

    Only the first process logs information. Sets ``args.distributed``, ``world_size``, ``rank`` and ``local_rank``.

    Raises:
        OptionError: The launcher would restart the processes so that they do not find each other.
    """
    _check_restarts()
    utils.init_distributed_device(args)
    if args.distributed and args.dist_timeout:
        # torch 2.11 has the second name only
        set_timeout = getattr(dist, 'set_timeout', None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=args.dist_timeout))
    logging.basicConfig(format='%(message)s')
    logging.getLogger().setLevel(logging.INFO if utils.is_primary(args) else logging.ERROR)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # it lists all checkpoints every time
    set_device_defaults(args)


def _check_restarts() -> None:
    """Refuses ``torchrun --max-restarts`` with a store that still has the addresses of the processes before a restart.

    The new processes would wait for them: https://github.com/pytorch/pytorch/issues/135712
    """
    environ = os.environ
    keeps_store = environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    if keeps_store and environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0' and environ.get('WORLD_SIZE') != '1':
        raise OptionError(
            'torchrun --max-restarts: restarted processes would wait for those before. Set the environment variable '
            'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and start torchrun with --standalone or --rdzv-backend=c10d'
        )


def model_dtype(args: argparse.Namespace) -> torch.dtype:
    """Returns the dtype of weights and images."""
    return getattr(torch, args.model_dtype or 'float32')


def build_precision(args: argparse.Namespace) -> tuple[Callable[[], AbstractContextManager], Any]:
    """Returns the autocast context of ``--amp``, and the loss scaler for float16 gradients or None."""
    if not args.amp:
        return nullcontext, None
    kind = torch.device(args.device).type
    dtype = getattr(torch, args.amp_dtype or ('bfloat16' if kind == 'cpu' else 'float16'))
    scaler = utils.NativeScaler(device=kind) if dtype == torch.float16 else None
    return partial(torch.autocast, device_type=kind, dtype=dtype), scaler
