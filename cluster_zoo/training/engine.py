"""What the training loops of classification and segmentation share.

A loop has a `TrainingRun`, and the functions here resume it and take optimizer steps. `run_training` is the main
function of both scripts: it handles signals and errors. `run_folder` opens the folder of a run, `progress` reports.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm import utils
from timm.models import clean_state_dict
from timm.task import TrainingTask

from ..errors import CheckpointError, OptionError, RunError, UserError, one_line, print_error
from ..weights import check_architecture, read_checkpoint, training_metadata
from .divergence import LossRecord, has_finite_weights
from .files import CheckpointSaver, newest_checkpoint, unlock
from .loggers import LOGGER_OPTIONS, Loggers
from .parser import Parser
from .resume import gather_states, resume_command
from .runtime import option_errors
from .signals import StopRequest, is_process_error, process_error
from .tasks import CentroidTaskMixin, split_learning_state

__all__ = [
    'TrainingRun',
    'backward',
    'check_finite',
    'launch',
    'load_checkpoint_state',
    'read_resumed',
    'run_options',
    'run_training',
    'set_up_ema',
]

_logger = logging.getLogger(__name__)

# Options that a resumed run may change without a remark; of the data directory, only its form on the command line
_MAY_DIFFER = (
    *('resume', 'output', 'experiment', 'config', 'data', 'data_dir', 'device', 'workers', 'log_interval'),
    *('pin_mem', 'persistent_workers'),
    *('pretrained', 'pretrained_path', 'initial_checkpoint', 'recovery_interval', 'checkpoint_hist'),
    *LOGGER_OPTIONS,
)
_MAX_INITIAL = 0.01  # fraction of the initial weights in an average above which its decay is warmed up


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
    saver: CheckpointSaver | None = None
    stop: StopRequest | None = None
    losses: LossRecord = field(default_factory=LossRecord)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of summary.csv
    saver_state: dict[str, Any] | None = None  # of the checkpoint that the run was resumed from
    loggers: Loggers = field(default_factory=Loggers)
    updates: int = 0  # of this process, since it was started or resumed
    started: float = 0.0  # time of the first of them
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
            state |= dict(arch=self.model_name, args=run_options(self.args), summary=self.rows, **self.extra_state())
            if self.learning_states:
                state['learned'] = self.learning_states
        return state

    def gather_learning_states(self) -> None:
        """Collects the learning states of centroids from all processes for the next checkpoint."""
        if isinstance(self.task, CentroidTaskMixin):
            self.learning_states = gather_states(self.task.learning_state(), self.stop.group)


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options without what depends on the process, for ``args.yaml`` and checkpoints."""
    process = ('given', 'sources', 'resolved', 'distributed', 'world_size', 'rank', 'local_rank')
    once = ('dry_run', 'overwrite')
    return {name: value for name, value in vars(args).items() if name not in (*process, *once)}


def read_resumed(path: str) -> Any:
    """Returns the content of the checkpoint of ``--resume``; raises CheckpointError if the file cannot be read."""
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f'--resume: {error}') from error


def load_checkpoint_state(run: TrainingRun, path: str, optimizer: bool = True) -> dict[str, Any]:
    """Loads the weights, the average, the optimizer and the learning of centroids from a training checkpoint.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The file cannot be read.
        OptionError: It is not a checkpoint of such a run.
    """
    args, task = run.args, run.task
    checkpoint = read_resumed(path)
    saved = training_metadata(checkpoint)['args']
    log_differences(args, saved)
    wanted = {'state_dict', 'optimizer'} if optimizer else {'state_dict'}
    if not isinstance(checkpoint, dict) or not wanted <= checkpoint.keys():
        raise CheckpointError(f"--resume: '{path}' is not a training checkpoint.")
    run.rows, run.saver_state = list(checkpoint.get('summary', ())), checkpoint.get('saver')
    check_architecture(checkpoint.get('arch'), run.model_name, f"--resume: '{path}'")
    for name in ('num_classes', 'opt') if optimizer else ('num_classes',):
        before, now = saved.get(name), getattr(args, name)
        if before is not None and before != now:
            flag = f'--{name.replace("_", "-")}'
            raise OptionError(
                f'--resume {path}: the saved run has {flag} {before}, this run {now}; keep it, or start '
                'from the weights only (--initial-checkpoint, segmentation: --checkpoint)'
            )
    with option_errors(f'--resume {path} does not fit this run', KeyError):  # of the state of another optimizer
        task.load_checkpoint_state(clean_state_dict(checkpoint['state_dict']), checkpoint.get('task_state'))
        if task.has_ema():
            averaged = clean_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
            task.load_checkpoint_state(averaged, checkpoint.get('task_state_ema'), ema=True)
        if optimizer:
            for own, saved in zip(run.optimizer.param_groups, checkpoint['optimizer']['param_groups']):
                if 'fused' in own:  # a choice of this device, which may not be that of the saved run
                    saved['fused'] = own['fused']
            run.optimizer.load_state_dict(checkpoint['optimizer'])
            if run.scaler is not None and run.scaler.state_dict_key in checkpoint:
                run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
        if isinstance(task, CentroidTaskMixin):
            states = split_learning_state(checkpoint.get('learned', []), args.rank, args.world_size)
            task.load_learning_state(states)
    return checkpoint


def set_up_ema(args: argparse.Namespace, task: TrainingTask, updates: int, device: torch.device | None = None) -> None:
    """Keeps an average of the weights, for ``--model-ema``. Sets ``args.model_ema_warmup`` if it is None.

    Without warm-up of the decay, the average of a short run is close to the initial weights.

    Args:
        args: Options of the run.
        task: The task.
        updates: Updates in the run.
        device: Device of the average; None for that of the model.
    """
    if not args.model_ema:
        return
    initial = args.model_ema_decay**updates
    if args.model_ema_warmup is None:
        args.model_ema_warmup = initial > _MAX_INITIAL
        if args.model_ema_warmup:
            _logger.info(
                f'--model-ema: the decay is warmed up, because with {args.model_ema_decay:g} from the start the '
                f'initial weights would make up {100 * initial:.0f} % of the average after {updates} updates '
                '(--no-model-ema-warmup turns this off).'
            )
    task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)


def log_differences(args: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Logs the options of a resumed run that are not those of the saved one."""
    now = run_options(args)
    differ = [name for name in now if name in saved and saved[name] != now[name] and name not in _MAY_DIFFER]
    changes = [f'--{name.replace("_", "-")} {saved[name]} -> {now[name]}' for name in differ]
    before, after = (os.path.normpath(str(x.get('data_dir') or x.get('data') or '')) for x in (saved, now))
    if 'data' in saved and before != after:
        changes.insert(0, f'data directory {before} -> {after}')
    if changes:
        _logger.warning(f'Options that differ from those of the saved run: {one_line(", ".join(changes))}')


def launch(run: TrainingRun, mode: str | None = None, **ddp_options: Any) -> None:
    """Compiles the task (``--torchcompile``) and wraps it for several processes. Weights must be loaded before."""
    args, task = run.args, run.task
    if args.torchcompile:
        with option_errors(f'--torchcompile {args.torchcompile}'):
            task.compile(backend=args.torchcompile, mode=mode)
            task.compile_ema(backend=args.torchcompile, mode=mode)
    if args.distributed:
        device_ids = None if args.device == 'cpu' else [torch.device(args.device)]
        if args.device.startswith('cuda'):
            ddp_options['gradient_as_bucket_view'] = True  # the gradients are not copied after the reduction
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


def check_finite(run: TrainingRun) -> None:
    """Checks the losses since the last call, and the weights. Call this before a checkpoint, in all processes.

    Raises:
        RunError: A loss or a weight is NaN or infinite. All processes raise it.
    """
    failure = run.losses.failure()
    if failure is None and not has_finite_weights(run.task.get_trainable_module()):
        failure = run.position(), run.optimizer.param_groups[0]['lr']
    failures = [failure]
    if run.stop.group is not None:
        failures *= run.args.world_size
        dist.all_gather_object(failures, failure, group=run.stop.group)
    if failure := next(filter(None, failures), None):
        last = newest_checkpoint(run.output_dir) or 'none'
        error = RunError(
            f'the loss or the weights are not finite at {failure[0]}, with a learning rate of {failure[1]:.3g}: lower '
            f'--lr, or clip the gradients (--clip-grad 1). The last checkpoint before: {last}'
        )
        error.in_all_processes = True
        raise error


def run_training(
    parser: Parser,
    start: Callable[[argparse.Namespace], TrainingRun],
    fit: Callable[[TrainingRun], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Main function of a training script: parses the options, builds the run and trains.

    On SIGINT, SIGTERM, SIGHUP or SIGUSR1 the run saves a checkpoint, and the command that resumes it is printed.

    Args:
        parser: Parser of the options.
        start: Builds the run.
        fit: Trains. It returns 0, or the number of the signal that stopped the run.
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, 2 for an error of the user, 1 if the run cannot go on, 128 + the number of the signal that
        stopped the run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    run = None
    try:
        run = start(parser.resolve(argv))
        if run.args.dry_run:
            return 0
        with StopRequest(run.args.dist_timeout) as run.stop, run.loggers:
            number = _fit(run, fit)
    except UserError as error:
        # Until the run is built, all processes raise the same error.
        shared = run is None or getattr(error, 'in_all_processes', False)
        if not shared or os.environ.get('LOCAL_RANK', '0') == '0':
            print_error(error)
        return error.status
    except RuntimeError as error:
        if not is_process_error(error):
            raise
        print_error(process_error(error))
        return RunError.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        unlock()
        if dist.is_initialized():
            dist.destroy_process_group()
    if number and run.saver is not None:
        nproc = int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if run.args.distributed else 0
        module = ['-m', 'cluster_zoo', *parser.prog.split()[1:]]  # of `cluster-zoo train`
        program = module if parser.prog.startswith('cluster-zoo ') else [sys.argv[0]]
        command = resume_command(program, argv, run.output_dir, run.saver.curr_recovery_file, nproc)
        print(f'\nStopped at {run.position()}. Resume with:\n\n    {command}\n', file=sys.stderr)
    return 128 + number if number else 0


def _fit(run: TrainingRun, fit: Callable[[TrainingRun], int]) -> int:
    """Calls ``fit``, and raises `RunError` if another process is gone."""
    try:
        return fit(run)
    except UserError:
        raise
    except RuntimeError as error:
        if 'DataLoader worker' in str(error):
            raise RunError(
                f'a data loading process has ended: {one_line(error)}. Often it needs less memory with fewer '
                '--workers. Start the run again with --resume auto'
            ) from error
        if is_process_error(error):
            raise run.stop.explain(error) from error
        raise
