"""Runs a function in several processes."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch.multiprocessing as mp

TESTS = Path(__file__).parent


def run_processes(work: Callable[..., None], world: int, *args: object, seconds: float = 120) -> None:
    """Calls ``work(rank, world, *args)`` in each of ``world`` processes.

    Raises:
        AssertionError: The processes do not end in time.
        ProcessRaisedException: A process has failed.
    """
    # The server that forks the processes imports these modules once, because the imports take seconds.
    modules = [
        'plain_centroids',
        'timm.task',
        'timm.data',
        'timm.optim',
        'torchvision',
        'cluster_zoo.training.train',
        'segmentation.train',
    ]
    multiprocessing.set_forkserver_preload(modules)
    folders = [str(TESTS), str(TESTS.parent), os.environ.get('PYTHONPATH', '')]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders), OMP_NUM_THREADS='1'):
        group = mp.start_processes(work, (world, *args), world, join=False, start_method='forkserver')
    deadline = time.monotonic() + seconds
    try:
        while not group.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, 'the processes wait for each other'
    finally:
        for process in group.processes:
            process.kill()
