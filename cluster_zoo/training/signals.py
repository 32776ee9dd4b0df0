"""SIGINT (Ctrl-C) and SIGTERM as a request to save a checkpoint and stop."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
import torch.distributed as dist

__all__ = ['StopRequest']


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a request to stop after the current update.

    A second SIGINT raises `KeyboardInterrupt`, unless it follows the first within a second: a launcher may pass the
    Ctrl-C of a terminal on to a process that has already received it.

    Attributes:
        signal: Number of the signal that was received, by any process once `requested` was called; 0 for none.
        group: Process group on the CPU, for `requested` and for gathering states; None in a single process.
    """

    def __enter__(self) -> StopRequest:
        self.signal, self.received = 0, 0.0
        # Gloo does not wait for the work that is queued on the device.
        self.group = dist.new_group(backend='gloo') if dist.is_initialized() else None
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT and time.monotonic() - self.received > 1:
            raise KeyboardInterrupt
        self.signal, self.received = number, time.monotonic()

    def requested(self) -> bool:
        """Returns whether to stop. The answer is the same in all processes, and all of them have to call this."""
        if self.group is not None:
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            self.signal = int(flag)
        return self.signal != 0
