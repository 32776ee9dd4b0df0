"""The files of a run, which are complete at any time: a process that is killed leaves the old or the new content."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from timm import utils

from ..errors import CheckpointError, RunError, one_line
from ..files import PART, replace, replacing, sync
from ..weights import read_checkpoint

__all__ = [
    'CheckpointSaver',
    'lock',
    'newest_checkpoint',
    'start_summary',
    'unlock',
    'write_csv',
    'write_summary',
    'write_text',
]

_logger = logging.getLogger(__name__)

_NUMBERS = re.compile(r'(checkpoint|recovery)-(\d+)(?:-(\d+))?\.pth\.tar')
_WHOLE = float('inf')  # number of batches of an epoch that is finished


_LOCK_WAIT = 10  # seconds in which the loading processes of a killed run end, which may hold its lock
_locks: list[FileLock] = []


def lock(folder: Path) -> bool:
    """Locks the folder of a run for this process, until `unlock` or the end of the process.

    Returns:
        Whether no other process has locked it.
    """
    try:
        _locks.append(FileLock(folder / '.lock', timeout=_LOCK_WAIT))
        _locks[-1].acquire()
    except Timeout:
        return False
    except NotImplementedError:
        _logger.warning(f'{folder} is on a file system without locks: do not start a second run in it.')
    return True


def unlock() -> None:
    """Releases the locks of this process."""
    while _locks:
        _locks.pop().release()


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Raises `RunError` if a file cannot be written, for example because the disk is full."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # of torch.save
        reason = getattr(error, 'strerror', None) or one_line(error)
        raise RunError(
            f"'{path}' cannot be written ({reason}). All files that were complete before are unchanged: free disk "
            'space or make the folder writable, then resume the run'
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a text file; raises `RunError` if it cannot be written."""
    with writing(path), replacing(path) as scratch:
        scratch.write_text(text, newline='')


class CheckpointSaver(utils.CheckpointSaver):
    """timm's saver, with files that are complete at any time.

    A new ``last.pth.tar`` gets its name first, then ``checkpoint-N.pth.tar`` and ``model_best.pth.tar``. If the process
    is killed in between, `restore` does the rest.
    """

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        with writing(save_path):
            try:
                super()._save(save_path, epoch, metric)
                sync(save_path)
            except (OSError, RuntimeError):
                with suppress(OSError):
                    os.unlink(save_path)
                raise

    def _replace(self, src: str, dst: str) -> None:
        with writing(dst):
            replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        new = os.path.join(self.checkpoint_dir, f'copy_tmp{self.extension}')
        with writing(dst):
            with suppress(FileNotFoundError):
                os.unlink(new)
            try:
                os.link(src, new)
            except (OSError, NotImplementedError):
                try:
                    shutil.copy2(src, new)
                    sync(new)
                except OSError:
                    with suppress(OSError):
                        os.unlink(new)
                    raise
            replace(new, dst)
            with suppress(FileNotFoundError):  # os.replace does nothing if both names are links of the same file
                os.unlink(new)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> None:
        """Saves ``last``, and keeps it as ``checkpoint-N`` and as the best one if its metric is good enough."""
        new = os.path.join(self.checkpoint_dir, f'tmp{self.extension}')
        self._save(new, epoch, metric)
        self._replace(new, self._last)
        self._keep(epoch, metric)

    @property
    def _last(self) -> str:
        return os.path.join(self.checkpoint_dir, f'last{self.extension}')

    def _keep(self, epoch: int, metric: float | None) -> None:
        """Ranks ``last`` among the kept checkpoints, with timm's rules."""
        path, files = self._checkpoint_path(epoch), self.checkpoint_files
        is_full = len(files) >= self.max_history
        if is_full and files[-1][1] is not None and not (metric is not None and self.cmp(metric, files[-1][1])):
            return
        if is_full:
            self._cleanup_checkpoints(1)
        self._duplicate(self._last, path)
        self._track_checkpoint(path, epoch, metric)

    def restore(self, path: str, state: dict[str, Any] | None) -> None:
        """Continues with the checkpoints of a folder, as if the run had not been interrupted.

        Does what a killed process did not finish, and removes files of other interruptions: incomplete ones, and
        recovery checkpoints other than the one that the run is resumed from.

        Args:
            path: The checkpoint in this folder that the run is resumed from.
            state: State of the saver in this checkpoint; None if it has none.
        """
        folder = Path(self.checkpoint_dir)
        for file in (*folder.glob('*tmp.pth.tar'), *folder.glob(PART), *folder.glob('recovery-*.pth.tar')):
            if file.resolve() != Path(path).resolve():
                file.unlink(missing_ok=True)
        if Path(path).name.startswith(self.recovery_prefix):
            self.curr_recovery_file = str(folder / Path(path).name)
        if state is None:
            return
        self.load_state_dict(state)
        epoch, metric = state.get('pending', (None, None))
        tracked = [file for file, _ in self.checkpoint_files]
        is_last = Path(path).name == Path(self._last).name
        if is_last and epoch is not None and self._checkpoint_path(epoch) not in tracked:
            self._keep(epoch, metric)
        if self.best_epoch is not None and os.path.exists(best := self._checkpoint_path(self.best_epoch)):
            self._duplicate(best, str(folder / f'model_best{self.extension}'))


def newest_checkpoint(folder: Path) -> str:
    """Returns the path of the checkpoint of a run with the most progress; '' if there is none.

    A damaged file is left out with a warning.

    Raises:
        CheckpointError: All checkpoints are damaged.
    """
    last, found, damaged = folder / 'last.pth.tar', [], {}
    for path in folder.glob('*.pth.tar'):
        if numbers := _NUMBERS.fullmatch(path.name):
            kind, number, batch = numbers.groups()
            found.append((int(number), _WHOLE if kind == 'checkpoint' else int(batch or 0), path))
        elif path == last:
            try:
                found.append((int(read_checkpoint(last)['epoch']), _WHOLE, last))
            except (CheckpointError, LookupError, TypeError, ValueError) as error:
                damaged[last] = error
    # Of equal progress, `last` before the link to it
    for *_, path in sorted(found, key=lambda item: (*item[:2], item[2] == last), reverse=True):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            damaged[path] = error
            continue
        for file, error in damaged.items():
            _logger.warning(f'--resume auto: {file} is damaged, so {path} is used ({one_line(error)})')
        return str(path)
    if damaged:
        raise CheckpointError(
            f'--resume auto: {next(iter(damaged))} is damaged, and {folder} has no other checkpoint: choose another '
            '--experiment, or replace the run with --overwrite'
        )
    return ''


def write_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``summary.csv``, a row for each validation; raises `RunError` if the file cannot be written.

    The rows are also part of each checkpoint, and the file is always written from them as a whole. So no row is lost or
    doubled if a process is killed or the disk is full.
    """
    if rows:
        write_csv(path, rows)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces a CSV file, with a column for each key; raises `RunError` if it cannot be written."""
    write_text(path, _csv(rows))


def start_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``summary.csv`` at the start of a run. A file with other rows is renamed first."""
    with writing(path):
        old = path.read_bytes() if path.exists() else b''
        if not _csv(rows).encode().startswith(old):
            number = next(i for i in itertools.count(1) if not path.with_name(f'summary-{i}.csv').exists())
            kept = path.rename(path.with_name(f'summary-{number}.csv'))
            _logger.warning(f'{path} has other rows than this run had so far: it was renamed to {kept.name}.')
    write_summary(path, rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(file, list(columns))
    if columns:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
