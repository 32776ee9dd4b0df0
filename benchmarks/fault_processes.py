"""The processes of a training run for `faults.py`: forked, watched, and killed at a time or at a file operation."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

SIGNALS = dict(term=signal.SIGTERM, group=signal.SIGTERM, usr1=signal.SIGUSR1, hup=signal.SIGHUP)
PATIENCE = 5.0  # seconds that a process has to end when another one was killed


class Processes:
    """Context manager that runs training processes in a process group of their own.

    Attributes:
        statuses: Exit statuses by rank of the processes that have ended; negative numbers for signals.

    Args:
        main: Main function of a training script.
        argv: Its arguments.
        processes: Number of processes.
        folder: Folder for the log and for the numbers of updates. The run folder is ``run`` therein.
        timeout: Seconds after which waiting raises TimeoutError.
        watch: Arguments of `watch_files` in the first process; None to not watch.
    """

    def __init__(
        self,
        main: Callable[[Sequence[str]], int],
        argv: Sequence[str],
        processes: int,
        folder: Path,
        timeout: float,
        watch: dict[str, Any] | None = None,
    ) -> None:
        self.main, self.argv, self.world, self.folder, self.timeout = main, argv, processes, folder, timeout
        self.watch = watch
        self.pids: list[int] = []
        self.statuses: dict[int, int] = {}

    def __enter__(self) -> Processes:
        for path in (*self.folder.glob('updates-*'), *self.folder.glob('operations')):
            path.unlink()
        self.log_file = self.folder / f'log-{len(list(self.folder.glob("log-*")))}'
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self.deadline = time.monotonic() + self.timeout
        for rank in range(self.world):
            pid = os.fork()
            if pid == 0:
                self.run_process(rank, port)
            self.pids.append(pid)
            os.setpgid(pid, self.pids[0])
        return self

    def __exit__(self, *_: Any) -> None:
        self.signal_group(signal.SIGKILL)
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                os.waitpid(pid, 0)

    def run_process(self, rank: int, port: int) -> None:
        """Trains in this process and ends it."""
        status = 1
        try:
            for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
                signal.signal(number, handler)
            log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if self.world > 1:
                world = str(self.world)
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
                os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            updates = os.open(self.folder / f'updates-{rank}', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            register_optimizer_step_post_hook(lambda *_: os.write(updates, b'.'))
            if rank == 0 and self.watch is not None:
                watch_files(self.folder, **self.watch)
            sys.argv = ['train.py']
            status = self.main(self.argv)
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def updates(self) -> int:
        """Returns the number of updates so far in the first process."""
        path = self.folder / 'updates-0'
        return path.stat().st_size if path.exists() else 0

    def operations(self) -> list[str]:
        """Returns the operations on files so far, if they are watched."""
        path = self.folder / 'operations'
        return path.read_text().splitlines() if path.exists() else []

    def log(self) -> str:
        return self.log_file.read_text(errors='replace')

    def wait(self, condition: Callable[[], bool] = lambda: False) -> bool:
        """Waits for a condition or the end of all processes. Returns whether the condition is true."""
        while True:
            for rank, pid in enumerate(self.pids):
                if rank not in self.statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    self.statuses[rank] = os.waitstatus_to_exitcode(ended[1])
            if condition():
                return True
            if len(self.statuses) == len(self.pids):
                return False
            if time.monotonic() > self.deadline:
                raise TimeoutError(f'hang after {self.updates()} updates, exit status {self.statuses}')
            time.sleep(0.003)

    def wait_as_launcher(self) -> None:
        """Waits for the end. If a process fails, the others are ended, as by torchrun."""
        if not self.wait(lambda: any(self.statuses.values())):
            return
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        if self.wait(lambda: time.monotonic() > end or len(self.statuses) == len(self.pids)):
            self.signal_group(signal.SIGKILL)
            self.wait()

    def members(self) -> list[int]:
        """Returns the processes of the group: those that train, and the workers of their loaders."""
        found = []
        for path in Path('/proc').glob('[0-9]*/stat'):
            try:
                state, _, group = path.read_text().rpartition(')')[2].split()[:3]
            except OSError:  # it has ended
                continue
            if int(group) == self.pids[0] and state != 'Z':
                found.append(int(path.parent.name))
        return sorted(found)

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pids[0], number)

    def strike(self, kind: str, rng: random.Random) -> str:
        """Sends the signal of a kind of fault. Returns what it was, for the user; '' if all processes have ended."""
        number, updates = SIGNALS.get(kind, signal.SIGKILL), self.updates()
        name = signal.Signals(number).name
        if kind == 'group' or (kind == 'kill' and rng.random() < 0.5):
            self.signal_group(number)
            return f'{name} to all processes after {updates} updates'
        pids = self.members() if kind == 'kill' else self.pids
        if not pids:
            return ''
        pid = rng.choice(pids)
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return ''
        process = f'process {self.pids.index(pid)}' if pid in self.pids else 'a worker'
        return f'{name} to {process} after {updates} updates'


def watch_files(folder: Path, fatal: int | None = None, torn: bool = False, links: bool = True) -> None:
    """Writes the operations on files of the run folder to a file, and kills this process at one of them.

    Args:
        folder: Folder of the trial.
        fatal: Number of the operation at which to kill, from 1; None for none.
        torn: Whether to kill within the operation, when the file is half written, where that is possible.
        links: Whether hard links work.
    """
    prefix, count, save = f'{folder / "run"}/', 0, torch.save
    record = os.open(folder / 'operations', os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def operation(name: str, path: Any, tear: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        if fatal and count >= fatal:  # `tear` opens the file
            return
        count += 1
        os.write(record, f'{name} {Path(path).name}\n'.encode())
        if count == fatal:
            if torn:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in ('os.rename', 'os.link', 'os.remove') and str(args[0]).startswith(prefix):
            if event == 'os.link' and not links:
                raise OSError(errno.EPERM, 'no hard links')
            operation(event, args[0])
        elif event == 'open' and str(args[0]).startswith(prefix) and args[2] & (os.O_WRONLY | os.O_RDWR):
            truncates = args[2] & os.O_TRUNC
            operation('open', args[0], lambda: truncates and open(args[0], 'w').close())

    def watched_save(content: Any, file: Any, *args: Any, **options: Any) -> None:
        path = str(getattr(file, 'name', file))

        def tear() -> None:
            save(content, file, *args, **options)
            os.truncate(path, os.path.getsize(path) // 2)

        if path.startswith(prefix):
            operation('torch.save', path, tear)
        save(content, file, *args, **options)

    torch.save = watched_save
    sys.addaudithook(audit)
