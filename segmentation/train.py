#!/usr/bin/env python3
"""Train a segmenter: ``segmentation/train.py`` and ``cluster-zoo segment train``.

    python segmentation/train.py DATA --dataset camvid --head semantic_fpn --backbone coc_tiny --crop 240 240
    torchrun --nproc-per-node=4 segmentation/train.py DATA --segmenter condnet_r50_ade20k --amp

Read this file from the bottom up: `main`, `start` (builds the run), `fit` (iterations), `update` (one iteration).

On a CPU, a run that is stopped at any iteration and resumed ends with the same bits as an uninterrupted run. The
samples of an iteration, their augmentation and the random generators depend on the seed and the iteration only.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

# Python puts the folder of a script on the import path; its modules must not hide others.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == '__main__':  # Ctrl-C during the imports ends the script without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from timm import utils
from torch import Tensor
from torch.utils.data import DataLoader

from cluster_zoo.errors import OptionError
from cluster_zoo.training import engine, run_folder
from cluster_zoo.training.divergence import SKIPPED_UPDATES, LossRecord
from cluster_zoo.training.files import write_summary
from cluster_zoo.training.loggers import check_loggers
from cluster_zoo.training.progress import ProgressReport, count_update, log_options
from cluster_zoo.training.resume import gather_states, seed_all
from cluster_zoo.training.runtime import build_precision, option_errors, set_up_device, set_up_processes
from cluster_zoo.training.signals import keep_workers
from segmentation.data.datasets import SegmentationDataset
from segmentation.data.sampling import IterationSampler, SeededDataset
from segmentation.engine import inference
from segmentation.engine.build import build_datasets, build_loss, build_model, build_optimizer
from segmentation.engine.confusion import write_tables
from segmentation.engine.evaluation import evaluate
from segmentation.engine.losses import PixelLoss
from segmentation.engine.metrics import confusion_matrix_class, table
from segmentation.engine.overlays import OverlayWriter
from segmentation.engine.shared_options import test_protocol
from segmentation.engine.tasks import SegmentationTask
from segmentation.engine.train_options import train_parser

__all__ = ['main']

_logger = logging.getLogger(__name__)

_OUTPUT = './output/segmentation'  # parent of the folders of runs


@dataclass(kw_only=True)
class Run(engine.TrainingRun):
    """A run of iterations."""

    task: SegmentationTask
    train_data: SegmentationDataset
    val_data: SegmentationDataset
    metrics: ClassVar[tuple[str, ...]] = ('mIoU', 'aAcc', 'mAcc')  # in summary.csv; the first one says what is best
    unit: ClassVar[str] = 'crops'  # what a batch consists of
    iteration: int = 0
    loss_sum: Tensor | float = 0.0  # since the last validation, of this process
    loss_sums: list[float] = field(default_factory=list)  # of all processes, for a checkpoint
    num_losses: int = 0  # of iterations in `loss_sum`
    lr: float = 0.0  # of the last iteration

    @property
    def crops(self) -> int:
        """Number of crops per iteration, over all processes."""
        return self.args.batch_size * self.args.grad_accum_steps * self.args.world_size

    def extra_state(self) -> dict[str, Any]:
        names = ('iteration', 'loss_sums', 'num_losses', 'lr')
        progress = {name: getattr(self, name) for name in names}
        return dict(progress=progress, crops=self.crops, label_names=list(self.train_data.classes))

    def base_lr(self) -> float:
        """Returns the learning rate of parameters without a factor."""
        return self.scheduler.rate(self.iteration, self.args.lr)

    def position(self) -> str:
        return f'iteration {self.iteration}'

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Yields the batches from the current iteration on, on the device."""
        return training_batches(self)

    def validate(self) -> dict[str, Any]:
        """Returns the metrics on the validation split; empty if a stop was requested."""
        return validate(self)


def reduced(run: Run, value: Tensor | float) -> Tensor:
    """Returns the mean of a value over all processes."""
    value = torch.as_tensor(value, device=run.args.device)
    return utils.reduce_tensor(value, run.args.world_size) if run.args.distributed else value


def save(run: Run, metric: float | None = None, recovery: bool = False) -> None:
    """Saves a checkpoint. All processes have to call this, because each has centroid memories of its own."""
    engine.check_finite(run)
    run.gather_learning_states()
    run.loss_sums = gather_states(float(run.loss_sum), run.stop.group)
    if run.saver is not None and recovery:
        run.saver.save_recovery(run.iteration)
    elif run.saver is not None:
        run.saver.save_checkpoint(run.iteration, None if metric is None or math.isnan(metric) else metric)
    run.learning_states = []


def resume(run: Run, path: str) -> None:
    """Restores a run from a checkpoint."""
    checkpoint = engine.load_checkpoint_state(run, path)
    if 'progress' not in checkpoint:
        raise OptionError(f'--resume {path} is not a checkpoint of this script')
    progress = checkpoint['progress']
    run.iteration, run.num_losses, run.lr = progress['iteration'], progress['num_losses'], progress['lr']
    sums = progress['loss_sums']
    run.loss_sum = sums[run.args.rank] if len(sums) == run.args.world_size else sum(sums) / len(sums)
    if (crops := checkpoint.get('crops', run.crops)) != run.crops:
        _logger.warning(
            f'--resume {path}: the saved run has {crops} crops per iteration, this run has {run.crops} (--batch-size x '
            '--grad-accum-steps x processes), so the order of the samples differs'
        )
    run.scheduler.step_update(run.iteration)


# --- training ---------------------------------------------------------------------------------------------------------


def training_loader(run: Run, **options: Any) -> DataLoader:
    """Returns the loader of the batches from the current iteration on. ``options`` are those of PyTorch's loader."""
    args = run.args
    sampler = IterationSampler(
        len(run.train_data),
        args.seed,
        run.iteration,
        args.iterations,
        args.batch_size * args.grad_accum_steps,
        args.rank,
        args.world_size,
    )
    loader = DataLoader(
        SeededDataset(run.train_data),
        args.batch_size,
        sampler=sampler,
        num_workers=args.workers,
        pin_memory=torch.device(args.device).type == 'cuda',
        generator=torch.Generator(),  # without it, starting the loader would advance the global generator
        **options,
    )
    keep_workers(loader)
    return loader


def training_batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches from the current iteration on, on the device."""
    args = run.args
    layout = dict(memory_format=torch.channels_last) if args.channels_last else {}
    for images, labels in training_loader(run):
        yield images.to(args.device, non_blocking=True, **layout), labels.to(args.device, non_blocking=True)


def update(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Runs one iteration: the gradients of one or several batches, a step, the average. Returns the loss."""
    args, task = run.args, run.task
    seed_all(args.seed, args.rank, run.iteration)
    total = 0.0
    for step in range(1, args.grad_accum_steps + 1):
        last = step == args.grad_accum_steps
        with nullcontext() if last else task.no_sync():
            with run.autocast():
                loss = task(*next(batches))['loss'] / args.grad_accum_steps
            engine.backward(run, loss, update=last)
        total = total + loss.detach()
    run.iteration += 1
    run.losses.add(total, run.position(), run.lr)
    count_update(run, args.iterations - run.iteration)
    task.update_ema(step=run.iteration)
    run.scheduler.step_update(run.iteration)
    return total


def validate(run: Run) -> dict[str, Any]:
    """Evaluates on the validation split, the averaged weights if there are any.

    Returns:
        The metrics; empty if a stop was requested.
    """
    args, task = run.args, run.task
    ema = task.has_ema()
    if args.distributed:
        # DDP broadcasts the buffers of the first process in each forward pass, and so does this.
        for averaged in (False, True) if ema else (False,):
            utils.distribute_bn(task.get_trainable_module(ema=averaged), args.world_size, reduce=False)
    overlays = None
    if args.overlays:
        overlays = OverlayWriter(run.val_data, run.output_dir / 'overlays' / str(run.iteration), args.overlays)
    metrics = evaluate(
        task.get_eval_model(ema=ema),
        run.val_data,
        args.device,
        run.autocast,
        test_protocol(args),
        args.validation_batch_size,
        args.workers,
        args.rank,
        args.world_size,
        overlays,
        run.stop,
    )
    if metrics:
        _logger.info(f'{"EMA" if ema else "Test"} after {run.iteration} iterations:\n{table(metrics)}')
    return metrics


def fit(run: Run) -> int:
    """Trains all iterations.

    Returns:
        0, or the number of the signal that stopped the run.
    """
    batches = run.batches()
    run.task.train()
    with batch_size_errors(run):
        while run.num_losses or run.iteration < run.args.iterations:
            if not is_validation_due(run):
                with closing(Report(run)) as report:
                    train_until_validation(run, batches, report)
            metrics = {} if run.stop.signal else run.validate()
            if not metrics:
                save(run, recovery=True)
                return run.stop.signal
            finish_validation(run, metrics)
    if run.saver is not None and run.saver.best_metric is not None:
        best = f'{run.metrics[0]} {run.saver.best_metric:.2f} after {run.saver.best_epoch} iterations'
        _logger.info(f'Best {best}: {run.output_dir / "model_best.pth.tar"}')
    return 0


def is_validation_due(run: Run) -> bool:
    """Returns whether the next step is a validation. A run can be resumed here, because a validation can be stopped."""
    args = run.args
    return run.num_losses > 0 and (run.iteration % args.val_interval == 0 or run.iteration >= args.iterations)


def train_until_validation(run: Run, batches: Iterator[tuple[Tensor, Tensor]], report: Report) -> None:
    """Trains until a validation is due or a stop is requested."""
    args = run.args
    while not run.stop.requested():
        run.lr = run.base_lr()
        loss = update(run, batches)
        run.loss_sum, run.num_losses = run.loss_sum + finite(run, loss), run.num_losses + 1
        report.update(loss, run.lr)
        if run.iteration % args.log_interval == 0:
            engine.check_finite(run)
        if is_validation_due(run):
            break
        if args.recovery_interval and run.iteration % args.recovery_interval == 0:
            save(run, recovery=True)


def finite(run: Run, loss: Tensor) -> Tensor:
    """Returns the loss, or 0 in place of one that the loss scaler has skipped."""
    return loss if run.scaler is None else loss.nan_to_num(0.0, 0.0, 0.0)


def finish_validation(run: Run, metrics: dict[str, Any]) -> None:
    """Saves a checkpoint, then a row of ``summary.csv``, and CSVs by class. All processes have to call this."""
    loss = reduced(run, run.loss_sum / max(run.num_losses, 1)).item()
    means = {name: metrics[name] for name in run.metrics}
    run.rows.append(dict(iteration=run.iteration, train_loss=loss, **means, lr=run.lr))
    run.loss_sum, run.num_losses = 0.0, 0
    save(run, metrics[run.metrics[0]])
    if run.saver is not None:
        write_summary(run.output_dir / 'summary.csv', run.rows)
        if 'confusion' in metrics:
            write_tables(run.output_dir, metrics)
        run.loggers.log(run.rows[-1])


@contextmanager
def batch_size_errors(run: Run) -> Iterator[None]:
    """Turns errors that depend on the batch size into an `OptionError` that names the option to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = '--crop' if run.unit == 'crops' else '--min-size'
        raise OptionError(
            f'out of memory with batches of {run.args.batch_size} {run.unit}: lower --batch-size or {size} or, in '
            'validation, --validation-batch-size'
        ) from error
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        raise OptionError(
            'batch norm after global pooling needs more than one crop per batch: raise --batch-size, or use --sync-bn '
            'with several processes'
        ) from error


class Report(ProgressReport):
    """Progress of a run, with the mean loss since the last log line."""

    def __init__(self, run: Run) -> None:
        self.run = run
        super().__init__(run.args, run.args.iterations, run.iteration)

    def restart(self, step: int) -> None:
        super().restart(step)
        self.loss_sum = 0.0

    def update(self, loss: Tensor, lr: float) -> None:
        """Shows an iteration if it is due."""
        run, total = self.run, self.run.args.iterations
        self.loss_sum = self.loss_sum + loss
        logged = run.iteration % run.args.log_interval == 0 or run.iteration == total
        if self.is_due(logged):
            done = run.iteration - self.first
            mean = float(self.loss_sum) / done
            line = f'{run.iteration:>{len(str(total))}}/{total}  loss {mean:.4f}'
            self.show(run.iteration, total - run.iteration, done * run.crops, lr, mean, line)
        if logged:
            self.restart(run.iteration)


# --- building the run -------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> Run:
    """Builds all parts of a run and restores it from ``--resume``."""
    confusion_matrix_class()  # before the training, which needs torchmetrics only to validate
    PixelLoss(args.loss)  # before the data is read, for the error without its library
    check_loggers(args)
    run_folder.check_output_dir(args, _OUTPUT)
    set_up_device(args, tf32=True)
    if args.device == 'cpu' and args.sync_bn:
        raise OptionError('--sync-bn: PyTorch synchronizes batch norm on GPUs only; leave it out on a CPU')
    set_up_processes(args)
    utils.random_seed(args.seed)  # the same in all processes, so that their models start equal
    protocol = test_protocol(args)
    with option_errors('test'):
        inference.check(protocol['mode'], protocol.get('crop'), protocol.get('stride'))
    train_data, val_data = build_datasets(args)
    model = build_model(args)
    optimizer, scheduler = build_optimizer(args, model)
    device = torch.device(args.device)
    criterion = build_loss(args, train_data)
    weights = args.guidance_weight, args.auxiliary_weight
    task = SegmentationTask(model, *weights, train_data.ignore_index, device, criterion=criterion)
    parts = dict(task=task, optimizer=optimizer, scheduler=scheduler, train_data=train_data, val_data=val_data)
    return open_run(Run, args, args.segmenter or f'{args.head}_{args.backbone}', _OUTPUT, **parts)


def open_run(kind: type[Run], args: argparse.Namespace, name: str, parent: str, **parts: Any) -> Run:
    """Builds a run from its parts, restores it from ``--resume``, opens its folder and logs what it will do.

    Args:
        kind: `Run` or a subclass.
        args: The options.
        name: Name of the model.
        parent: Default parent of the folder.
        **parts: Task, optimizer, scheduler and data.
    """
    autocast, scaler = build_precision(args)
    engine.set_up_ema(args, parts['task'], args.iterations)
    run = kind(
        args=args,
        model_name=name,
        autocast=autocast,
        scaler=scaler,
        losses=LossRecord(SKIPPED_UPDATES if scaler is not None else 0),
        output_dir=run_folder.output_dir(args, parent),
        **parts,
    )
    checkpoint = run_folder.checkpoint_to_resume(args, run.output_dir)
    if checkpoint:
        resume(run, checkpoint)
        _logger.info(f'Resumed from {checkpoint}')
    if not args.dry_run:
        run_folder.open_output_dir(run, name, checkpoint)
    engine.launch(run)
    log_run(run)
    return run


def log_run(run: Run) -> None:
    """Logs what the run will do: its options, images and iterations."""
    args = run.args
    log_options(args, default='default')
    parameters = sum(parameter.numel() for parameter in run.task.get_trainable_module().parameters())
    where = 'no output (--dry-run)' if args.dry_run else f'output in {run.output_dir}'
    _logger.info(
        f'{run.model_name}: {parameters / 1e6:.2f} M parameters, {args.num_classes} classes; {len(run.train_data):,} '
        f'training and {len(run.val_data):,} validation images; {args.iterations:,} iterations of {run.crops} '
        f'{run.unit} on {args.world_size} x {args.device}; {where}'
    )
    if run.iteration >= args.iterations:
        _logger.info(f'The run is finished: all {args.iterations} iterations are done. To train longer: --iterations.')
    elif run.iteration:
        _logger.info(f'Resumed at {run.position()}')


def main(argv: Sequence[str] | None = None, prog: str = 'segmentation/train.py') -> int:
    """Runs the script and returns its exit status, see `run_training`."""
    return engine.run_training(train_parser(prog), start, fit, argv)


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
