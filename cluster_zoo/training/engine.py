"""What the training loops of classification and segmentation share.

A loop has a `TrainingRun`, and the functions here resume it, open its folder, take optimizer steps and show progress.
`run_training` is the main function of both scripts: it handles signals and errors.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import yaml
from timm import utils
from timm.models import clean_state_dict
from timm.task import TrainingTask
from tqdm import tqdm

from ..errors import CheckpointError, UserError, print_error
from ..weights import read_checkpoint
from .parser import Parser
from .resume import gather_states, newest_checkpoint, resume_command
from .runtime import option_errors
from .signals import StopRequest
from .tasks import CentroidTaskMixin, split_learning_state

__all__ = [
    'ProgressReport',
    'TrainingRun',
    'backward',
    'checkpoint_to_resume',
    'launch',
    'load_checkpoint_state',
    'open_output_dir',
    'output_dir',
    'run_options',
    'run_training',
]

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainingRun:
    """The objects of a training run. Only the first process has a ``saver``."""

    args: argparse.Namespace
    model_name: str
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    autocast: Callable[[], Any]
    scaler: utils.NativeScaler | None
    output_dir: Path
    saver: utils.CheckpointSaver | None = None
    stop: StopRequest | None = None
    learning_states: list[Any] = field(default_factory=list)  # of the centroids in each process, for a checkpoint

    def extra_state(self) -> dict[str, Any]:
        """Returns the entries of a checkpoint for the progress of the run, as ``weights_only`` types."""
        raise NotImplementedError

    def position(self) -> str:
        """Returns where the run is, for the user."""
        raise NotImplementedError

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable = utils.unwrap_model) -> dict[str, Any]:
        """Returns the state of the task and, with the model's own weights, that of the run. timm's saver calls this."""
        state = self.task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        if not ema:
            state |= dict(arch=self.model_name, args=run_options(self.args), **self.extra_state())
            if self.learning_states:
                state['learned'] = self.learning_states
        return state

    def gather_learning_states(self) -> None:
        """Collects the learning states of centroids from all processes for the next checkpoint."""
        if isinstance(self.task, CentroidTaskMixin):
            self.learning_states = gather_states(self.task.learning_state(), self.stop.group)


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options without what depends on the process, for ``args.yaml`` and checkpoints."""
    process = ('given', 'distributed', 'world_size', 'rank', 'local_rank')
    return {name: value for name, value in vars(args).items() if name not in process}


def output_dir(args: argparse.Namespace, parent: str, name: str) -> Path:
    """Returns the folder of a run, the same in all processes: ``--experiment``, or the time and a name."""
    names = [args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{name}']
    if args.distributed:
        dist.broadcast_object_list(names)
    return Path(args.output or parent, *names)


def open_output_dir(run: TrainingRun, checkpoint: str, first: int, **options: Any) -> None:
    """Creates the folder of a run with ``args.yaml`` and the saver of checkpoints.

    Args:
        run: The run.
        checkpoint: Checkpoint that the run was resumed from; '' for none.
        first: Rows of ``summary.csv`` from this epoch or iteration on are removed.
        **options: Arguments of timm's ``CheckpointSaver``.
    """
    run.output_dir.mkdir(parents=True, exist_ok=True)
    (run.output_dir / 'args.yaml').write_text(yaml.safe_dump(run_options(run.args), default_flow_style=False))
    utils.trim_summary(run.output_dir / 'summary.csv', first)
    run.saver = utils.CheckpointSaver(
        model=None,
        task=run,
        optimizer=run.optimizer,
        amp_scaler=run.scaler,
        checkpoint_dir=str(run.output_dir),
        recovery_dir=str(run.output_dir),
        max_history=run.args.checkpoint_hist,
        **options,
    )
    if checkpoint and Path(checkpoint).resolve().parent == run.output_dir.resolve():
        run.saver.load_state_dict_from_checkpoint(checkpoint)  # the best and the older checkpoints of the folder


def checkpoint_to_resume(run: TrainingRun) -> str:
    """Returns the path of the checkpoint that ``--resume`` means; '' for none."""
    return newest_checkpoint(run.output_dir) if run.args.resume == 'auto' else run.args.resume


def load_checkpoint_state(run: TrainingRun, path: str, optimizer: bool = True) -> dict[str, Any]:
    """Loads the weights, the average, the optimizer and the learning of centroids from a training checkpoint.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The file cannot be read.
        OptionError: It is not a checkpoint of such a run.
    """
    args, task = run.args, run.task
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f'--resume: {error}') from error
    wanted = {'state_dict', 'optimizer'} if optimizer else {'state_dict'}
    if not isinstance(checkpoint, dict) or not wanted <= checkpoint.keys():
        raise CheckpointError(f"--resume: '{path}' is not a training checkpoint.")
    with option_errors(f'--resume {path} does not fit this run', KeyError):  # of the state of another optimizer
        task.load_checkpoint_state(clean_state_dict(checkpoint['state_dict']), checkpoint.get('task_state'))
        if task.has_ema():
            averaged = clean_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
            task.load_checkpoint_state(averaged, checkpoint.get('task_state_ema'), ema=True)
        if optimizer:
            run.optimizer.load_state_dict(checkpoint['optimizer'])
            if run.scaler is not None and run.scaler.state_dict_key in checkpoint:
                run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
        if isinstance(task, CentroidTaskMixin):
            states = split_learning_state(checkpoint.get('learned', []), args.rank, args.world_size)
            task.load_learning_state(states)
    return checkpoint


def launch(run: TrainingRun, mode: str | None = None, **ddp_options: Any) -> None:
    """Compiles the task (``--torchcompile``) and wraps it for several processes. Weights must be loaded before."""
    args, task = run.args, run.task
    if args.torchcompile:
        with option_errors(f'--torchcompile {args.torchcompile}'):
            task.compile(backend=args.torchcompile, mode=mode)
            task.compile_ema(backend=args.torchcompile, mode=mode)
    if args.distributed:
        device_ids = None if args.device == 'cpu' else [torch.device(args.device)]
        task.prepare_distributed(device_ids=device_ids, **ddp_options)


def backward(run: TrainingRun, loss: torch.Tensor, update: bool, exclude_head: bool = False) -> None:
    """Adds the gradients of a loss and, if ``update``, clips them, takes an optimizer step and clears them.

    Args:
        run: The run.
        loss: Loss of a batch, divided by the number of batches of the update.
        update: Whether this is the last batch of the update.
        exclude_head: Whether adaptive gradient clipping leaves out the last layer.
    """
    args, optimizer = run.args, run.optimizer
    create_graph = getattr(optimizer, 'is_second_order', False)
    parameters = run.task.get_clip_parameters(exclude_head=exclude_head and 'agc' in args.clip_mode)
    clipping = dict(clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters)
    if run.scaler is not None:
        run.scaler(loss, optimizer, create_graph=create_graph, need_update=update, **clipping)
    else:
        loss.backward(create_graph=create_graph)
        if update:
            if args.clip_grad is not None:
                utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
            optimizer.step()
    if update:
        optimizer.zero_grad()


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
        if self.bar is not None:
            self.bar.set_postfix_str(f'loss {mean_loss:.3f}, lr {lr:.2e}, {speed:.0f} img/s', refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            left = tqdm.format_interval(elapsed / (step - self.first) * remaining)
            _logger.info(f'Train: {line}  lr {lr:.3e}  {speed:.1f} img/s  {left} left')

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def run_training(
    parser: Parser,
    start: Callable[[argparse.Namespace], TrainingRun],
    fit: Callable[[TrainingRun], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Main function of a training script: parses the options, builds the run and trains.

    On SIGINT or SIGTERM the run saves a checkpoint, and the command that resumes it is printed.

    Args:
        parser: Parser of the options.
        start: Builds the run.
        fit: Trains. It returns 0, or the number of the signal that stopped the run.
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, 2 for an error of the user, 128 + the number of the signal that stopped the run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    run = None
    try:
        run = start(parser.resolve(argv))
        with StopRequest() as run.stop:
            number = fit(run)
    except UserError as error:
        # Until the run is built, all processes raise the same error.
        if run is not None or os.environ.get('LOCAL_RANK', '0') == '0':
            print_error(error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if number and run.saver is not None:
        nproc = int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if run.args.distributed else 0
        module = ['-m', 'cluster_zoo', *parser.prog.split()[1:]]  # of `cluster-zoo train`
        program = module if parser.prog.startswith('cluster-zoo ') else [sys.argv[0]]
        command = resume_command(program, argv, run.output_dir, run.saver.curr_recovery_file, nproc)
        print(f'\nStopped at {run.position()}. Resume with:\n\n    {command}\n', file=sys.stderr)
    return 128 + number if number else 0
