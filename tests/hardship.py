"""Real causes of failed writes: missing permissions, a full disk, a killed process."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_CAPABILITIES_VERSION = 0x20080522
_OVERRIDE_PERMISSIONS = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Makes ``path`` and its folders read-only, also for root, which drops its capabilities in this thread."""
    folders = [path, *(p for p in path.rglob('*') if p.is_dir() and not p.is_symlink())]
    modes = [folder.stat().st_mode for folder in folders]
    for folder in folders:
        folder.chmod(0o500)
    try:
        with _without_capabilities():
            yield
    finally:
        for folder, mode in zip(folders, modes):
            folder.chmod(mode)


@contextmanager
def _without_capabilities() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != 'linux':
        pytest.skip('root can write to any folder')
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    capabilities = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, capabilities) == 0
    reduced = (ctypes.c_uint32 * 6)(*capabilities)
    reduced[0] &= ~_OVERRIDE_PERMISSIONS
    assert libc.capset(header, reduced) == 0
    try:
        yield
    finally:
        assert libc.capset(header, capabilities) == 0


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Limits the size of files to ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_a_process_that_is_killed(work: Callable[[], None]) -> None:
    """Calls ``work`` in a forked process, which is then killed without any cleanup."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), 'the process failed before it was killed'
