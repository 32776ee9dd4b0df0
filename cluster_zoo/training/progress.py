"""What a run reports: its options, its progress and the time that is left."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import textwrap
import time
from typing import Any, ClassVar

from timm import utils
from tqdm import tqdm

from .engine import TrainingRun, run_options

__all__ = ['ProgressReport', 'count_update', 'log_options']

_logger = logging.getLogger(__name__)

_TIMED_UPDATES = 10
# Beginnings of the names of options that do nothing unless another option is set
_SUBOPTIONS = dict(kd_='kd_model_name', lr_noise_='lr_noise', model_ema_='model_ema', train_size_='train_img_sizes')


def log_options(args: argparse.Namespace, default: str) -> None:
    """Logs all options that are on as a table: where the values come from, and the values as on a command line.

    Args:
        args: Options from `Parser.resolve`. Values that have changed since then are listed as computed.
        default: Name of the source of the other values.
    """
    options = run_options(args)
    rows: dict[str, list[str]] = {}
    for name, value in sorted(options.items(), key=lambda item: (item[0] != 'data', item[0])):
        is_computed = name in args.resolved and value != args.resolved[name]
        source = 'computed' if is_computed else args.sources.get(name, default)
        main = next((option for prefix, option in _SUBOPTIONS.items() if name.startswith(prefix)), name)
        is_off = not (value and options.get(main)) if source == default else value is None
        if not (is_off or name == 'recipe'):
            rows.setdefault(source, []).append(_flag(name, value))
    order = {'flag': 0, 'config': 1, 'computed': 3, default: 4}
    for source in sorted(rows, key=lambda source: order.get(source, 2)):
        # An option stays on one line with its values
        words = '  '.join(rows[source]).replace('  --', '\n--').replace(' ', '\0').replace('\n', '  ')
        lines = textwrap.wrap(words, 100, break_on_hyphens=False, break_long_words=False)
        _logger.info(f'{source:14}' + f'\n{"":14}'.join(lines).replace('\0', ' '))


def _flag(name: str, value: Any) -> str:
    """Returns an option as on a command line."""
    if isinstance(value, bool):
        return f'--{"" if value else "no-"}{name.replace("_", "-")}'
    if isinstance(value, dict):
        value = [f'{key}={item}' for key, item in value.items()]
    words = list(map(str, value if isinstance(value, list | tuple) else [value]))
    return shlex.join(words if name == 'data' else [f'--{name.replace("_", "-")}', *words])


def count_update(run: TrainingRun, remaining: int) -> None:
    """Counts an update, and logs the expected time of the run after the first ones.

    Args:
        run: The run.
        remaining: Number of updates until the end of the run.
    """
    run.updates += 1
    if run.updates == 1:  # may have compiled the model
        run.started = time.monotonic()
    elif run.updates == 1 + _TIMED_UPDATES and remaining > _TIMED_UPDATES:
        seconds = (time.monotonic() - run.started) / _TIMED_UPDATES * remaining
        left = tqdm.format_interval(seconds)
        _logger.info(f'Expected time: {left} for the remaining {remaining:,} updates, without validation.')


class ProgressReport:
    """A progress bar on a terminal, log lines elsewhere. Only the first process reports.

    Args:
        args: Options of the run.
        total: Number of steps of the bar.
        step: Current step.
        title: Text before the bar.
    """

    REFRESH: ClassVar = 0.5  # seconds between updates of the bar

    def __init__(self, args: argparse.Namespace, total: int, step: int = 0, title: str | None = None) -> None:
        self.args, self.bar = args, None
        if utils.is_primary(args) and sys.stderr.isatty():
            self.bar = tqdm(desc=title, total=total, initial=step, mininterval=0, dynamic_ncols=True)
        self.restart(step)

    def restart(self, step: int) -> None:
        """Starts a new measurement of time."""
        self.start, self.first = time.monotonic(), step

    def is_due(self, interval_reached: bool) -> bool:
        """Returns whether to call `show`. To read the loss in between would wait for the device every time."""
        stale = self.bar is not None and time.time() - self.bar.last_print_t > self.REFRESH
        return utils.is_primary(self.args) and (interval_reached or stale)

    def show(self, step: int, remaining: int, images: int, lr: float, mean_loss: float, line: str) -> None:
        """Updates the bar or logs a line.

        Args:
            step: Steps that are done.
            remaining: Steps to the end of the run, for the time that is left.
            images: Images since the last restart, in all processes.
            lr: Learning rate.
            mean_loss: Loss for the bar.
            line: Step and losses for the log line.
        """
        elapsed = time.monotonic() - self.start
        speed = images / elapsed
        left = tqdm.format_interval(elapsed / (step - self.first) * remaining)
        if self.bar is not None:
            text = f'loss {mean_loss:.3f}, lr {lr:.2e}, {speed:.0f} img/s, run {left} left'
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            _logger.info(f'Train: {line}  lr {lr:.3e}  {speed:.1f} img/s  {left} left')

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
