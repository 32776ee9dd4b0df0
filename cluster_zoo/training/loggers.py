"""Loggers of a training run beside ``summary.csv``: TensorBoard, Weights & Biases and Trackio, by their packages."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError, one_line
from .files import write_text

__all__ = ['LOGGER_FILES', 'LOGGER_OPTIONS', 'Loggers', 'check_loggers']

_logger = logging.getLogger(__name__)

LOGGER_OPTIONS = ('log_tensorboard', 'log_wandb', 'log_trackio', 'wandb_project', 'wandb_tags', 'wandb_resume_id')
_STATE = 'loggers.yaml'  # the id of the run for wandb and Trackio, and the last step that they have
LOGGER_FILES = (_STATE, 'events.out.tfevents.*', 'wandb')  # in the folder of a run


def check_loggers(args: argparse.Namespace) -> None:
    """Raises `OptionError` if the package of a logger is not installed."""
    for option in _OPEN:
        package = option.removeprefix('log_')
        if not getattr(args, option) or package in sys.modules:
            continue
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name, such as the output of wandb, has no origin
            raise OptionError(f'--log-{package} needs a package that is not installed: pip install {package}')


class Loggers:
    """Context manager that sends the rows of ``summary.csv`` to the loggers of a run; made by its first process only.

    The first column of a row is its step: the epoch or the iteration. TensorBoard forgets the rows of steps that a
    resumed run does again. The others, which cannot, get each step once, under an id that the folder of the run keeps.
    A logger that fails is turned off with a warning.

    Args:
        args: The options; None for no logger.
        folder: Folder of the run.
        config: Options of the run, for the loggers.
        rows: The rows before a resumed run, which are logged if they have not been.

    Raises:
        OptionError: A logger does not start.
    """

    def __init__(
        self,
        args: argparse.Namespace | None = None,
        folder: Path = Path(),
        config: Mapping[str, Any] | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.file, self.active = folder / _STATE, {}
        chosen = [option for option in _OPEN if args is not None and getattr(args, option)]
        if not chosen:
            return
        self.state = dict(id=f'{folder.name[:50]}-{uuid.uuid4().hex[:8]}', step=-1)
        if self.file.exists():
            self.state |= yaml.safe_load(self.file.read_text())
        write_text(self.file, yaml.safe_dump(self.state))
        first = _step(rows[-1]) + 1 if rows else 0
        for option in chosen:
            try:
                self.active[option] = _OPEN[option](args, folder, dict(config), first, self.state['id'])
            except Exception as error:  # whatever a package raises for a missing login, server or permission
                raise OptionError(f'{_flag(option)} does not start: {one_line(error)}') from error
        for row in rows:
            if _step(row) > self.state['step']:
                self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs a row of ``summary.csv``, without its values that are None."""
        step = _step(row)
        values = {name: value for name, value in list(row.items())[1:] if value is not None}
        for option in list(self.active):
            if option == 'log_tensorboard' or step > self.state['step']:
                self._try(option, self.active[option][0], values, step)
        if self.active and step > self.state['step']:
            self.state['step'] = step
            write_text(self.file, yaml.safe_dump(self.state))

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        for option in list(self.active):
            self._try(option, self.active.pop(option)[1], error is not None)

    def _try(self, option: str, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # such as that of a network
            self.active.pop(option, None)
            _logger.warning(f'{_flag(option)} is off from here on, summary.csv has all rows: {one_line(error)}')


def _step(row: Mapping[str, Any]) -> int:
    return next(iter(row.values()))


def _flag(option: str) -> str:
    return f'--{option.replace("_", "-")}'


# Each function opens a logger and returns two functions: the first logs a row with its step, the second closes the
# logger and gets whether the run failed.


def _open_tensorboard(args: argparse.Namespace, folder: Path, config: dict, first: int, run_id: str) -> tuple:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first)
    writer.add_text('options', '\n'.join(f'    {line}' for line in yaml.safe_dump(config).splitlines()), first)

    def log(row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, lambda failed: writer.close()


def _open_wandb(args: argparse.Namespace, folder: Path, config: dict, first: int, run_id: str) -> tuple:
    import wandb

    run = wandb.init(
        project=args.wandb_project,
        name=folder.name,
        id=args.wandb_resume_id or run_id,
        resume='must' if args.wandb_resume_id else 'allow',
        tags=args.wandb_tags,
        config=config,
        dir=str(folder),
    )
    # Without commit a row is kept until the next one, and lost if the process is killed before
    return partial(run.log, commit=True), lambda failed: run.finish(exit_code=int(failed))


def _open_trackio(args: argparse.Namespace, folder: Path, config: dict, first: int, run_id: str) -> tuple:
    import trackio

    trackio.init(project=args.wandb_project or 'cluster_zoo', name=run_id, config=config, resume='allow')
    return trackio.log, lambda failed: trackio.finish()


_OPEN = dict(log_tensorboard=_open_tensorboard, log_wandb=_open_wandb, log_trackio=_open_trackio)
