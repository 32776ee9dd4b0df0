"""What makes a resumed run equal to an uninterrupted one: random generators, buffers, the command."""

from __future__ import annotations

import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import random_seed, unwrap_model

__all__ = [
    'gather_states',
    'get_buffers',
    'get_rng_state',
    'resume_command',
    'seed_all',
    'set_buffers',
    'set_rng_state',
]


def seed_all(*numbers: int) -> None:
    """Seeds all generators of this process from numbers such as (seed, rank, epoch)."""
    random_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def get_rng_state() -> dict[str, Any]:
    """Returns the states of all generators, as types that ``torch.load(weights_only=True)`` reads."""
    name, keys, *rest = np.random.get_state()
    state = dict(torch=torch.get_rng_state(), numpy=(name, keys.tolist(), *rest), python=random.getstate())
    return state | (dict(cuda=torch.cuda.get_rng_state()) if torch.cuda.is_available() else {})


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores the states from `get_rng_state`."""
    torch.set_rng_state(state['torch'])
    np.random.set_state(state['numpy'])
    random.setstate(state['python'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def _modules(task: TrainingTask) -> list[torch.nn.Module]:
    modules = (task.get_trainable_module(), task.get_trainable_module(ema=True))
    return [unwrap_model(module) for module in modules if module is not None]


def get_buffers(task: TrainingTask) -> list[dict[str, torch.Tensor]]:
    """Returns the buffers of the model and of its average. Within an epoch, batch statistics differ by process."""
    return [{name: buffer.cpu() for name, buffer in module.named_buffers()} for module in _modules(task)]


def set_buffers(task: TrainingTask, values: list[dict[str, torch.Tensor]]) -> None:
    """Restores the buffers from `get_buffers`."""
    for module, named in zip(_modules(task), values):
        for name, buffer in module.named_buffers():
            buffer.copy_(named[name])


def gather_states(state: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Returns the states of all processes, by rank, in the first process; an empty list in the others."""
    if group is None:
        return [state]
    states = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object(state, states, dst=0, group=group)
    return states or []


def resume_command(program: Sequence[str], argv: Sequence[str], output_dir: Path, checkpoint: str, nproc: int) -> str:
    """Returns the command line that resumes a run in its folder.

    Args:
        program: What the interpreter or torchrun is started with: a script, or ``-m`` and a module.
        argv: Arguments of the run.
        output_dir: Folder of the run.
        checkpoint: Checkpoint to resume from.
        nproc: Number of processes on this machine; 0 for a run without a launcher.
    """
    kept, words = [], iter(argv)
    for word in words:
        if word in ('--resume', '--output', '--experiment'):
            next(words)
        elif word == '--overwrite':
            continue
        elif not word.startswith(('--resume=', '--output=', '--experiment=', '--local-rank=', '--local_rank=')):
            kept.append(word)
    launcher = ['torchrun', f'--nproc-per-node={nproc}'] if nproc else [sys.executable]
    folder = ['--output', str(output_dir.parent), '--experiment', output_dir.name]
    return shlex.join([*launcher, *program, *kept, *folder, '--resume', checkpoint])
