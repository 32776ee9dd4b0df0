"""Signals as a request to save a checkpoint and stop, and processes that do not answer."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from ..errors import RunError, one_line

__all__ = ['StopRequest', 'is_process_error', 'keep_workers', 'process_error']

# Ctrl-C; Slurm, Docker and launchers; the end of a terminal; Slurm's --signal
_SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]
_training: dict[int, torch.Tensor] = {}  # by process
_ANSWER = 10  # seconds in which a process has to answer when others have waited too long


class StopRequest:
    """Context manager that turns signals into a request to stop after the current update.

    The signals are SIGINT, SIGTERM, SIGHUP and SIGUSR1. The end of ``torchrun`` is a SIGHUP, so that its processes do
    not train on without it. A second SIGINT raises `KeyboardInterrupt`, unless it follows the first within a second: a
    launcher may pass the Ctrl-C of a terminal on to a process that has already received it.

    Args:
        timeout: Seconds after which a process that does not answer is an error; None for PyTorch's default.

    Attributes:
        signal: Number of the signal that all processes have agreed on in `requested`; 0 for none.
        group: Process group on the CPU, for `requested` and for gathering states; None in a single process.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timedelta(seconds=timeout) if timeout else None

    def __enter__(self) -> StopRequest:
        self.signal, self._received, self._time = 0, 0, 0.0
        self._parent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        self.group = self._check = None
        if dist.is_initialized():
            # Gloo does not wait for the work that is queued on the device. A group is not usable after an error in it.
            self.group, self._check = (dist.new_group(backend='gloo', timeout=self.timeout) for _ in range(2))
            # If the first process ended now, as that of a finished run, the others could not connect any more.
            dist.barrier(self.group)
        self.previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        _is_training().fill_(True)
        return self

    def __exit__(self, *_: Any) -> None:
        _is_training().fill_(False)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self._received and number == signal.SIGINT and time.monotonic() - self._time > 1:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._time = number, time.monotonic()

    @property
    def received(self) -> int:
        """Number of the signal that this process has received; 0 for none."""
        if self._parent is not None and not self._received and os.getppid() != self._parent:
            self._received = signal.SIGHUP
        return self._received

    def requested(self) -> bool:
        """Returns whether to stop. The answer is the same in all processes, and all of them have to call this."""
        self.signal = self.received
        if self.group is not None:
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            self.signal = int(flag)
        return self.signal != 0

    def explain(self, error: Exception) -> RunError:
        """Returns an error that names the processes that do not answer, after a `is_process_error`."""
        missing = ''
        if self._check is not None:
            try:
                dist.monitored_barrier(self._check, timeout=timedelta(seconds=_ANSWER), wait_all_ranks=True)
            except Exception as barrier:
                ranks = re.search(r'Ranks? ([\d, ]+) failed to pass|recv from rank (\d+)', str(barrier))
                missing = f' (rank {(ranks[1] or ranks[2]).strip()})' if ranks else ''
        return process_error(error, missing)


def process_error(error: Exception, which: str = '') -> RunError:
    """Returns an error in place of one of the communication, which may not occur in all processes."""
    reason = re.sub(r'^\[\S+\] ', '', str(error))
    return RunError(
        f'another process of the run{which} has ended or does not answer: {one_line(reason)}. Start the run '
        'again with --resume auto and, if it only takes long, a higher --dist-timeout'
    )


def is_process_error(error: Exception) -> bool:
    """Returns whether an error is that of the communication with another process."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and 'gloo' in str(error))


def _is_training() -> torch.Tensor:
    """Returns, in memory that data loading processes share, whether a `StopRequest` is active in this process."""
    process = os.getpid()
    if process not in _training:  # a copy in a forked process would be that of the parent and of its other children
        _training[process] = torch.zeros((), dtype=torch.bool).share_memory_()
    return _training[process]


def stay_in_training(training: torch.Tensor, start: Callable[[int], None] | None, worker: int) -> None:
    """Starts a data loading process, which ignores the signals of `StopRequest` during training.

    Args:
        training: In shared memory: whether a training runs. After it, signals end the process.
        start: Function to call, a ``worker_init_fn``.
        worker: Index of the process.
    """

    def receive(number: int, frame: Any) -> None:
        if not training:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in _SIGNALS:
        signal.signal(number, receive)
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if start is not None:
        start(worker)


def keep_workers(loader: DataLoader) -> None:
    """Makes the processes of a loader ignore the signals of `StopRequest` during training.

    A scheduler sends a signal to all processes of a job, and without its workers a run could not finish the update.
    """
    loader.worker_init_fn = partial(stay_in_training, _is_training(), loader.worker_init_fn)
    if loader.num_workers and multiprocessing.get_start_method() == 'fork':
        loader.multiprocessing_context = _WorkerContext()


if hasattr(multiprocessing.context, 'ForkContext'):

    class _Worker(multiprocessing.context.ForkProcess):
        """Process whose signals wait for `stay_in_training`, because SIGTERM ends a new worker of PyTorch."""

        def run(self) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            super().run()

    class _WorkerContext(multiprocessing.context.ForkContext):
        Process = _Worker
