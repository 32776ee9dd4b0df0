"""The folder of a run: its name, what it contains, and the checkpoint to resume from."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from timm import utils

from ..errors import OptionError
from .engine import TrainingRun, run_options
from .files import CheckpointSaver, lock, newest_checkpoint, start_summary, write_text
from .loggers import LOGGER_FILES, Loggers
from .runtime import in_first_process, option_errors

__all__ = ['check_output_dir', 'checkpoint_to_resume', 'open_output_dir', 'output_dir']

_logger = logging.getLogger(__name__)

# What a run writes to its folder; the first two are results
_RUN_FILES = (
    *('summary.csv', '*.pth.tar', 'summary-*.csv', 'args.yaml', 'train-batch-*.jpg', 'overlays'),
    *LOGGER_FILES,
)


def output_dir(args: argparse.Namespace, parent: str) -> Path:
    """Returns the folder of a run with a name (``--experiment``), or the folder that will contain that of the run."""
    return Path(args.output or parent, args.experiment)


def check_output_dir(args: argparse.Namespace, parent: str) -> None:
    """Checks the folder of a run before anything is built. Call this before processes wait for each other.

    Raises:
        OptionError: A file is in the way, or the folder has another run that is neither resumed nor overwritten.
    """
    folder = output_dir(args, parent)
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise OptionError(f'--output {folder}: {file} is a file, expected a folder')
    resumed = args.resume == 'auto' or (args.resume and Path(args.resume).resolve().parent == folder.resolve())
    if args.resume == 'auto' and args.overwrite:
        raise OptionError('--resume auto and --overwrite exclude each other')
    if args.experiment and not (resumed or args.overwrite) and _files(folder, _RUN_FILES[:2]):
        raise OptionError(
            f'--experiment {args.experiment}: {folder} has a run already. Resume it (--resume auto), replace it '
            '(--overwrite), or choose another name'
        )


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def open_output_dir(run: TrainingRun, name: str, checkpoint: str, **options: Any) -> None:
    """Creates the folder of a run with ``args.yaml`` and the saver of checkpoints. All processes have to call this.

    Args:
        run: The run. Its ``output_dir`` becomes the new folder.
        name: Name of the folder after the time, without ``--experiment``.
        checkpoint: Checkpoint that the run was resumed from; '' for none.
        **options: Arguments of timm's ``CheckpointSaver``.

    Raises:
        OptionError: The folder cannot be written, another run writes to it, or a logger does not start.
    """
    run.output_dir = in_first_process(run.args, lambda: _create(run, name))
    continues = bool(checkpoint) and Path(checkpoint).resolve().parent == run.output_dir.resolve()
    if not continues:
        run.rows = []
    if not utils.is_primary(run.args):
        return
    for path in _files(run.output_dir, _RUN_FILES) if run.args.overwrite and not continues else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(run.output_dir / 'args.yaml', yaml.safe_dump(run_options(run.args), default_flow_style=False))
    run.saver = CheckpointSaver(
        model=None,
        task=run,
        optimizer=run.optimizer,
        amp_scaler=run.scaler,
        checkpoint_dir=str(run.output_dir),
        recovery_dir=str(run.output_dir),
        max_history=run.args.checkpoint_hist,
        **options,
    )
    if continues:
        run.saver.restore(checkpoint, run.saver_state)
    start_summary(run.output_dir / 'summary.csv', run.rows)
    run.loggers = Loggers(run.args, run.output_dir, run_options(run.args), run.rows)


def _create(run: TrainingRun, name: str) -> Path:
    """Creates the folder of a run and locks it until the process ends."""
    with option_errors(f'--output {run.output_dir}'):
        folder = run.output_dir if run.args.experiment else _new_folder(run.output_dir, name)
        folder.mkdir(parents=True, exist_ok=True)
        if not lock(folder):
            raise OptionError(
                f'--experiment {folder.name}: another run writes to {folder}. Wait for its end, or choose another name'
            )
    return folder


def _new_folder(parent: Path, name: str) -> Path:
    """Creates a folder with the time and a name. Two runs that start in the same second get two folders."""
    stem, number = f'{datetime.now():%Y%m%d-%H%M%S}-{name}', 1
    while True:
        folder = parent / (f'{stem}-{number}' if number > 1 else stem)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def checkpoint_to_resume(args: argparse.Namespace, folder: Path) -> str:
    """Returns the path of the checkpoint that ``--resume`` means in the folder of a run; '' for none.

    All processes have to call this.
    """
    if args.resume != 'auto':
        return args.resume
    found = in_first_process(args, lambda: newest_checkpoint(folder))
    if not found:
        _logger.info(f'--resume auto: {folder} has no checkpoint, so the run starts from the beginning.')
    return found
