"""The cases of benchmarks/gpu.py, and a process that runs them with a time limit and survives their errors."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A function and its settings, which are also its name.

    Attributes:
        function: Called with the options of gpu.py and the settings. It returns a dictionary of JSON values. With
            ``unfinished`` in it, the case is not done.
        settings: Keyword arguments.
        needs: Seconds. With less time left, the case is not started.
    """

    function: Callable[..., dict[str, Any]]
    settings: dict[str, Any]
    needs: float = 0

    @property
    def name(self) -> str:
        return ' '.join(f'{key}={value}' for key, value in self.settings.items())


class CaseError(Exception):
    """A function failed in a `Worker`. The message is the traceback."""


class Worker:
    """A process that calls functions one after the other.

    It is replaced if it crashes, exceeds a time limit, or if an error leaves its GPU unusable.
    """

    def __init__(self) -> None:
        self.process: Any = None

    def call(self, function: Callable, *args: Any, timeout: float, **kwargs: Any) -> Any:
        """Returns the result of a function.

        Raises:
            CaseError: The function raised an error, or the process crashed.
            TimeoutError: The function did not return within ``timeout`` seconds.
        """
        if self.process is None:
            context = multiprocessing.get_context('spawn')
            self.connection, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
        usable = False
        try:
            self.connection.send((function, args, kwargs))
            if not self.connection.poll(max(timeout, 0)):
                raise TimeoutError(f'{function.__name__} did not return within {timeout:.0f} s')
            value, error, usable = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(10)
            raise CaseError(f'The process ended with exit code {self.process.exitcode}') from None
        finally:
            if not usable:
                self.close()
        if error:
            raise CaseError(error)
        return value

    def close(self) -> None:
        """Ends the process and the processes that it started."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except OSError:  # it has not started, or it has ended
                self.process.kill()
            self.process.join()
            self.process = None


def _serve(connection: Any) -> None:
    os.setsid()
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*args, **kwargs), None, True))
        except (Exception, SystemExit):
            connection.send((None, traceback.format_exc(), _gpu_is_usable()))


def _gpu_is_usable() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:  # for example after an illegal memory access
        return False
    return True
