"""What lets a run be interrupted at any batch: asking it to stop, and random generators that can be put back."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import random_seed


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
