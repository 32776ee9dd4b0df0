"""What lets a run be interrupted at any batch: asking it to stop, the state that is a process's own, the way back."""

from __future__ import annotations

import random
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, random_seed, unwrap_model


class Stop:
    """Turns SIGINT and SIGTERM into a request to stop after the update at hand. A later SIGINT stops at once."""

    def __enter__(self) -> Stop:
        self.signal, self.since = 0, 0.0
        # Asked after each update, so not over the device's own queue.
        self.group = dist.new_group(backend='gloo') if dist.is_initialized() else None
        self.previous = {n: signal.signal(n, self._request) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        # One Ctrl-C may come twice, from the terminal and from a launcher that passes it on.
        if self.signal and number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
        self.signal, self.since = number, time.monotonic()

    def requested(self) -> bool:
        """Whether to stop. All processes answer alike: the others would wait forever for one that stops alone."""
        if self.group is not None:
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            self.signal = int(flag)
        return self.signal != 0


def seed_epoch(seed: int, rank: int, epoch: int) -> None:
    """Seeds every generator for one epoch of this process; the loader's workers derive their seeds from these."""
    random_seed(int(np.random.SeedSequence([seed, rank, epoch]).generate_state(1)[0]))


def rng_state() -> dict[str, Any]:
    """The generators' states as types that `torch.load(weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state()
    state = dict(torch=torch.get_rng_state(), numpy=(name, keys.tolist(), *rest), python=random.getstate())
    return state | (dict(cuda=torch.cuda.get_rng_state()) if torch.cuda.is_available() else {})


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the generators where :func:`rng_state` found them."""
    torch.set_rng_state(state['torch'])
    np.random.set_state(state['numpy'])
    random.setstate(state['python'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def _modules(task: TrainingTask) -> list[torch.nn.Module]:
    modules = (task.get_trainable_module(), task.get_trainable_module(ema=True))
    return [unwrap_model(module) for module in modules if module is not None]


def buffers(task: TrainingTask) -> list[dict[str, torch.Tensor]]:
    """Buffers of the model and of its average: batch statistics differ between processes until an epoch ends."""
    return [{name: buffer.cpu() for name, buffer in module.named_buffers()} for module in _modules(task)]


def set_buffers(task: TrainingTask, values: list[dict[str, torch.Tensor]]) -> None:
    """Puts the buffers back that :func:`buffers` has read."""
    for module, named in zip(_modules(task), values):
        for name, buffer in module.named_buffers():
            buffer.copy_(named[name])


def gather(state: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The states of all processes, by rank, in the first one; nothing in the others."""
    if group is None:
        return [state]
    states = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object(state, states, dst=0, group=group)
    return states or []


def open_saver(run: Any, output_dir: Path, checkpoint: str, **options: Any) -> CheckpointSaver:
    """timm's saver of checkpoints for a run folder.

    Args:
        run: The state to save: it has ``optimizer``, ``scaler`` and timm's ``get_checkpoint_state``.
        output_dir: The folder.
        checkpoint: Where the run goes on from; if it is of this folder, the saver knows its best and its older ones.
        **options: For the saver.
    """
    saver = CheckpointSaver(
        model=None,
        task=run,
        optimizer=run.optimizer,
        amp_scaler=run.scaler,
        checkpoint_dir=str(output_dir),
        recovery_dir=str(output_dir),
        **options,
    )
    if checkpoint and Path(checkpoint).resolve().parent == output_dir.resolve():
        saver.load_state_dict_from_checkpoint(checkpoint)
    return saver


def newest_checkpoint(output_dir: Path) -> str:
    """The checkpoint of a run folder that was written last; empty if there is none."""
    found = [*output_dir.glob('last.pth.tar'), *output_dir.glob('recovery-*.pth.tar')]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else ''


def resume_command(argv: Sequence[str], output_dir: Path, checkpoint: str, processes: int) -> str:
    """The command line of a run, changed to go on from a checkpoint in the same folder.

    Args:
        argv: Arguments that the run was started with.
        output_dir: Its folder.
        checkpoint: Where to go on from.
        processes: Processes on this machine; 0 for a run without a launcher.
    """
    kept, words = [], iter(argv)
    for word in words:
        if word in ('--resume', '--output', '--experiment'):
            next(words)
        elif not word.startswith(('--resume=', '--output=', '--experiment=', '--local-rank=', '--local_rank=')):
            kept.append(word)
    launcher = ['torchrun', f'--nproc-per-node={processes}'] if processes else [sys.executable]
    place = ['--output', str(output_dir.parent), '--experiment', output_dir.name]
    return shlex.join([*launcher, sys.argv[0], *kept, *place, '--resume', checkpoint])
