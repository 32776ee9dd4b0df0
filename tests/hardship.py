"""What makes writing fail, for real: no permission, no space, a process that is killed."""

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
    """Nothing can be made or removed below ``path``, not even by root, who gives up that power in this thread."""
    folders = [path, *(p for p in path.rglob('*') if p.is_dir() and not p.is_symlink())]
    modes = [folder.stat().st_mode for folder in folders]
    for folder in folders:
        folder.chmod(0o500)
    try:
        with _mere_user():
            yield
    finally:
        for folder, mode in zip(folders, modes):
            folder.chmod(mode)


@contextmanager
def ctrl_c() -> Iterator[None]:
    """SIGINT is an interrupt, also in a process that was started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _mere_user() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != 'linux':
        pytest.skip('root can write everywhere')
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, held) == 0
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~_OVERRIDE_PERMISSIONS
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_a_process_that_is_killed(work: Callable[[], None]) -> None:
    """Calls ``work`` in a copy of this process, which is then killed without a chance to tidy up."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), 'it failed by itself'
