#!/usr/bin/env python3
"""Train a segmenter with timm's parts.

    python segmentation/train.py DATA --dataset camvid --head semantic_fpn --backbone coc_tiny --crop 240 240
    torchrun --nproc-per-node=4 segmentation/train.py DATA --segmenter condnet_r50_ade20k --amp

Read from the bottom up: `main`, `start` (puts a run together), `fit` (iterations), `update` (one of them).

A run that is interrupted at any iteration goes on to the same bits on a CPU: which samples an iteration gets, and how
they are augmented, depends on the seed and its number alone, and so do the random generators of each process.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

# Started as a file, its own folder would be searched for modules, whose names are also others'.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import yaml
from timm import utils
from timm.models import clean_state_dict
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cluster_zoo.errors import CheckpointError, DataError, OptionError
from cluster_zoo.training import build
from cluster_zoo.training import resume as interrupt
from cluster_zoo.training.options import available_workers
from cluster_zoo.training.tasks import split_learning_state
from cluster_zoo.weights import read_checkpoint
from segmentation.data.datasets import SegmentationDataset
from segmentation.data.sampling import IterationSampler, SeededDataset
from segmentation.engine import inference
from segmentation.engine.build import build_datasets, build_model, build_optimizer
from segmentation.engine.evaluation import evaluate
from segmentation.engine.metrics import table
from segmentation.engine.options import test_protocol
from segmentation.engine.overlays import OverlayWriter
from segmentation.engine.tasks import SegmentationTask
from segmentation.engine.train_options import train_parser

_logger = logging.getLogger('train')


# --- state ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that the loop works with. `saver` is the first process's alone."""

    args: argparse.Namespace
    task: SegmentationTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    train_data: SegmentationDataset
    val_data: SegmentationDataset
    autocast: Callable[[], Any]
    scaler: utils.NativeScaler | None
    output_dir: Path
    iteration: int = 0
    loss_sum: Tensor | float = 0.0  # of the iterations since the last validation
    losses: int = 0  # how many those are
    learned: list[Any] = field(default_factory=list)  # what centroids remember, each process's own, at a checkpoint
    stop: interrupt.Stop | None = None
    saver: utils.CheckpointSaver | None = None

    @property
    def crops(self) -> int:
        """How many an iteration takes, over all processes."""
        return self.args.batch_size * self.args.grad_accum_steps * self.args.world_size

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable = utils.unwrap_model) -> dict[str, Any]:
        """What timm's saver asks a task for: here the task's state and the run's, as `weights_only` types."""
        state = self.task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        if not ema:
            progress = dict(iteration=self.iteration, loss_sum=float(self.loss_sum), losses=self.losses)
            state |= dict(arch=model_name(self.args), args=options(self.args), learned=self.learned)
            state |= dict(progress=progress, crops=self.crops)
        return state

    def mean_loss(self) -> float:
        """Of the iterations since the last validation, over all processes; all have to ask."""
        mean = torch.as_tensor(self.loss_sum / max(self.losses, 1), device=self.args.device)
        return (utils.reduce_tensor(mean, self.args.world_size) if self.args.distributed else mean).item()


def save(run: Run, metric: float | None = None, recovery: bool = False) -> None:
    """A checkpoint. All processes take part, because each has centroid memories of its own."""
    run.learned = interrupt.gather(run.task.learning_state(), run.stop.group)
    if run.args.distributed:
        # One number, from which all processes go on, now and from the checkpoint
        run.loss_sum = utils.reduce_tensor(torch.as_tensor(run.loss_sum, device=run.args.device), run.args.world_size)
    if run.saver is not None and recovery:
        run.saver.save_recovery(run.iteration)
    elif run.saver is not None:
        run.saver.save_checkpoint(run.iteration, metric)
    run.learned = []


def resume(run: Run, path: str) -> None:
    """Puts a run where a checkpoint left it."""
    args = run.args
    checkpoint = read_checkpoint(path)
    with build.option_errors(f'--resume {path} is not of such a run'):
        run.task.load_checkpoint_state(clean_state_dict(checkpoint['state_dict']))
        if run.task.has_ema():
            averaged = clean_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
            run.task.load_checkpoint_state(averaged, ema=True)
        run.optimizer.load_state_dict(checkpoint['optimizer'])
        if run.scaler is not None and run.scaler.state_dict_key in checkpoint:
            run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
        run.task.load_learning_state(split_learning_state(checkpoint['learned'], args.rank, args.world_size))
        for attribute, value in checkpoint['progress'].items():
            setattr(run, attribute, value)
    if (crops := checkpoint.get('crops', run.crops)) != run.crops:
        _logger.warning(
            f'--resume {path}: its iterations took {crops} crops, those of this run take {run.crops} (--batch-size x '
            '--grad-accum-steps x processes), so they come in another order'
        )
    run.scheduler.step_update(run.iteration)


# --- the loop ---------------------------------------------------------------------------------------------------------


def training_batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from the run's iteration on, where and how the model wants them."""
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
        generator=torch.Generator(),  # to draw from, wherever a run starts, instead of the one that dropout draws from
    )
    layout = dict(memory_format=torch.channels_last) if args.channels_last else {}
    for images, labels in loader:
        yield images.to(args.device, non_blocking=True, **layout), labels.to(args.device, non_blocking=True)


def update(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """One iteration: gradients of one or several batches, a step, the averages; returns the loss."""
    args, task, optimizer = run.args, run.task, run.optimizer
    interrupt.seed_epoch(args.seed, args.rank, run.iteration)
    total = 0.0
    for step in range(1, args.grad_accum_steps + 1):
        last = step == args.grad_accum_steps
        with nullcontext() if last else task.no_sync():
            with run.autocast():
                loss = task(*next(batches))['loss'] / args.grad_accum_steps
            if run.scaler is not None:
                clipping = dict(clip_grad=args.clip_grad, clip_mode=args.clip_mode)
                run.scaler(loss, optimizer, **clipping, parameters=task.get_clip_parameters(), need_update=last)
            else:
                loss.backward()
        total = total + loss.detach()
    if run.scaler is None:
        if args.clip_grad is not None:
            utils.dispatch_clip_grad(task.get_clip_parameters(), value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()
    optimizer.zero_grad()
    run.iteration += 1
    task.update_ema(step=run.iteration)
    run.scheduler.step_update(run.iteration)
    return total


def validate(run: Run) -> dict[str, Any]:
    """Figures on the validation split, of the averaged weights where there are any."""
    args, task = run.args, run.task
    ema = task.has_ema()
    if args.distributed:
        # As DDP gives the first process's buffers to all in each forward pass
        for averaged in (False, True) if ema else (False,):
            utils.distribute_bn(task.get_trainable_module(ema=averaged), args.world_size, reduce=False)
    overlays = None
    if args.overlays:
        overlays = OverlayWriter(run.val_data, run.output_dir / 'overlays' / str(run.iteration), args.overlays)
    figures = evaluate(
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
    )
    _logger.info(f'{"EMA" if ema else "Test"} after {run.iteration} iterations:\n{table(figures)}')
    return figures


def fit(run: Run) -> int:
    """All iterations.

    Returns:
        0, or the number of the signal that stopped the run.
    """
    args = run.args
    batches, report = training_batches(run), Report(run)
    run.task.train()
    while run.iteration < args.iterations:
        if run.stop.requested():
            report.close()
            save(run, recovery=True)
            return run.stop.signal
        lr = base_lr(run)
        loss = update(run, batches)
        run.loss_sum, run.losses = run.loss_sum + loss, run.losses + 1
        report.update(loss, lr)
        if run.iteration % args.val_interval == 0 or run.iteration == args.iterations:
            report.close()
            figures = validate(run)
            summarise(run, figures, lr)
            run.loss_sum, run.losses = 0.0, 0
            save(run, figures['mIoU'])
            report = Report(run)
        elif args.recovery_interval and run.iteration % args.recovery_interval == 0:
            save(run, recovery=True)
    report.close()
    if run.saver is not None and run.saver.best_metric is not None:
        best = f'mIoU {run.saver.best_metric:.2f} after {run.saver.best_epoch} iterations'
        _logger.info(f'Best {best}: {run.output_dir / "model_best.pth.tar"}')
    return 0


@contextmanager
def advice(args: argparse.Namespace) -> Iterator[None]:
    """Says which option to change, where a device or a model can not do with batches of this size."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OptionError(
            f'out of memory with batches of {args.batch_size} crops: lower --batch-size or --crop, or, if it was in a '
            'validation, --validation-batch-size'
        ) from error
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        raise OptionError(
            'batch-norm of what the model pools to a single point needs more than one crop: raise --batch-size, or '
            'give --sync-bn to several processes'
        ) from error


def base_lr(run: Run) -> float:
    """The learning rate of a layer without a scale of its own."""
    group = run.optimizer.param_groups[0]
    return group['lr'] / group['lr_scale']


def summarise(run: Run, figures: dict[str, Any], lr: float) -> None:
    """Adds a validation to `summary.csv`."""
    loss = run.mean_loss()
    if run.saver is None:
        return
    row = dict(iteration=run.iteration, train_loss=loss, **{k: figures[k] for k in ('mIoU', 'aAcc', 'mAcc')}, lr=lr)
    path = run.output_dir / 'summary.csv'
    new = not path.exists() or path.stat().st_size == 0
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


class Report:
    """Progress of a run: a bar on a terminal, a line every `--log-interval` iterations elsewhere."""

    def __init__(self, run: Run) -> None:
        self.run, self.bar = run, None
        if utils.is_primary(run.args) and sys.stderr.isatty():
            self.bar = tqdm(total=run.args.iterations, initial=run.iteration, mininterval=0, dynamic_ncols=True)
        self.restart()

    def restart(self) -> None:
        """Begins to measure time and loss."""
        self.start, self.first, self.loss_sum = time.monotonic(), self.run.iteration, 0.0

    def update(self, loss: Tensor, lr: float) -> None:
        run, args = self.run, self.run.args
        self.loss_sum = self.loss_sum + loss
        due = run.iteration % args.log_interval == 0 or run.iteration == args.iterations
        if not utils.is_primary(args) or not (
            due or (self.bar is not None and time.time() - self.bar.last_print_t > 0.5)
        ):
            return  # reading the loss waits for the device, so only when it is shown
        done, elapsed = run.iteration - self.first, time.monotonic() - self.start
        mean = float(self.loss_sum) / done
        speed = done * run.crops / elapsed
        if self.bar is not None:
            self.bar.set_postfix_str(f'loss {mean:.3f}, lr {lr:.2e}, {speed:.1f} img/s', refresh=False)
            self.bar.update(run.iteration - self.bar.n)
        else:
            left = tqdm.format_interval(elapsed / done * (args.iterations - run.iteration))
            share = f'{run.iteration:>{len(str(args.iterations))}}/{args.iterations}'
            _logger.info(f'Train: {share}  loss {mean:.4f}  lr {lr:.3e}  {speed:.1f} img/s  {left} left')
        if due:
            self.restart()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# --- putting a run together -------------------------------------------------------------------------------------------


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options alone, as `args.yaml` and checkpoints keep them."""
    process = ('given', 'distributed', 'world_size', 'rank', 'local_rank')
    return {name: value for name, value in vars(args).items() if name not in process}


def model_name(args: argparse.Namespace) -> str:
    """The model, in a word."""
    return args.segmenter or f'{args.head}_{args.backbone}'


def set_up(args: argparse.Namespace) -> None:
    """Device, processes, log and seed."""
    args.device = args.device or build.default_device()
    with build.option_errors(f'--device {args.device}'):
        torch.zeros(1, device=args.device)
    if args.device == 'cpu' and args.sync_bn:
        raise OptionError('--sync-bn: batch-norm is synchronised on GPUs only; leave it out on a CPU')
    if args.device.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    utils.init_distributed_device(args)
    logging.basicConfig(format='%(message)s')
    logging.getLogger().setLevel(logging.INFO if utils.is_primary(args) else logging.ERROR)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # would list all of them each time
    if 'workers' not in args.given:
        args.workers = available_workers(args.workers)
    utils.random_seed(args.seed)  # the same in all processes, whose models begin alike


def start(args: argparse.Namespace) -> Run:
    """Builds every part of a run, and puts it where `--resume` says."""
    set_up(args)
    protocol = test_protocol(args)
    with build.option_errors('test'):
        inference.check(protocol['mode'], protocol.get('crop'), protocol.get('stride'))
    train_data, val_data = build_datasets(args)
    model = build_model(args)
    optimizer, scheduler = build_optimizer(args, model)
    device = torch.device(args.device)
    task = SegmentationTask(model, args.guidance_weight, args.auxiliary_weight, train_data.ignore_index, device)
    autocast, scaler = build.build_precision(args)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    folder = [args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{model_name(args)}']
    if args.distributed:
        dist.broadcast_object_list(folder)  # the clocks of the processes differ
    output_dir = Path(args.output or './output/segmentation', *folder)
    run = Run(args, task, optimizer, scheduler, train_data, val_data, autocast, scaler, output_dir)
    place(run)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(
        f'{model_name(args)}: {parameters / 1e6:.2f} M parameters, {args.num_classes} classes; {len(train_data)} '
        f'training and {len(val_data)} validation images; {args.iterations} iterations of {run.crops} crops on '
        f'{args.world_size} x {args.device}; output in {output_dir}'
    )
    return run


def place(run: Run) -> None:
    """Puts a run where it starts from, into its folder, and on its processes, in the order that timm's task needs."""
    args, task = run.args, run.task
    checkpoint = interrupt.newest_checkpoint(run.output_dir) if args.resume == 'auto' else args.resume
    if checkpoint:
        resume(run, checkpoint)
    if utils.is_primary(args):
        open_output(run, checkpoint)
    if args.torchcompile:
        with build.option_errors(f'--torchcompile {args.torchcompile}'):
            task.compile(backend=args.torchcompile)
            task.compile_ema(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed(None if args.device == 'cpu' else [torch.device(args.device)])


def open_output(run: Run, checkpoint: str) -> None:
    """Makes the run folder, with the options in `args.yaml`, and the saver of checkpoints."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    (run.output_dir / 'args.yaml').write_text(yaml.safe_dump(options(run.args), default_flow_style=False))
    utils.trim_summary(run.output_dir / 'summary.csv', run.iteration + 1)
    run.saver = interrupt.open_saver(run, run.output_dir, checkpoint, max_history=run.args.checkpoint_hist)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script.

    Args:
        argv: Arguments without the script's name; `sys.argv[1:]` when None.

    Returns:
        The exit status: 0, 2 after a mistake of the user's, 128 + the number of the signal that stopped it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    run = None
    try:
        run = start(train_parser().resolve(argv))
        with interrupt.Stop() as run.stop, advice(run.args):
            number = fit(run)
    except (OptionError, DataError, CheckpointError) as error:
        # Before a run stands, all processes make the same mistake.
        if run is not None or os.environ.get('LOCAL_RANK', '0') == '0':
            print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if number and run.saver is not None:
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if run.args.distributed else 0
        command = interrupt.resume_command(argv, run.output_dir, run.saver.curr_recovery_file, processes)
        print(f'\nStopped after {run.iteration} iterations. To go on:\n\n    {command}\n', file=sys.stderr)
    return 128 + number if number else 0


if __name__ == '__main__':
    sys.exit(main())
