#!/usr/bin/env python3
"""Train an image classifier with timm's parts.

    python train.py --data-dir /path/to/imagenet --model coc_tiny -b 128 --amp
    torchrun --nproc-per-node=8 train.py --data-dir /path/to/imagenet --model fec_small -b 128 --amp

Read from the bottom up: `main`, `start` (puts a run together), `fit` (epochs), `train_epoch` (batches).

A run that is interrupted at any batch goes on to the same bits on a CPU. Two things make it so: an epoch starts from
random generators that are seeded by (seed, process, epoch), and a checkpoint from inside an epoch holds the number of
its batch and the states of the generators.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
import yaml
from timm import utils
from timm.data import FastCollateMixup, Mixup, resolve_input_data_config
from timm.models import clean_state_dict, safe_model_name
from timm.task import TrainingTask, evaluation_sample_limit
from tqdm import tqdm

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.data import class_names, unreadable_images
from cluster_zoo.errors import CheckpointError, DataError, OptionError
from cluster_zoo.training import build
from cluster_zoo.training import resume as interrupt
from cluster_zoo.training.options import available_workers
from cluster_zoo.training.tasks import CentroidTaskMixin, split_learning_state
from cluster_zoo.training.train_options import train_parser
from cluster_zoo.weights import read_checkpoint

_logger = logging.getLogger('train')


# --- state ------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run is: the batch to train on next, and what the epoch has added up so far."""

    epoch: int = 0
    batch: int = 0
    loss_sum: torch.Tensor | float = 0.0
    samples: int = 0
    num_batches: int = 0  # of an epoch; set in a checkpoint from inside an epoch, as is the following
    rng: list[dict[str, Any]] = field(default_factory=list)  # generators and what else is a process's own, one each


@dataclass
class Run:
    """Everything that the loop works with. `output_dir` and `saver` are the first process's alone."""

    args: argparse.Namespace
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: Any
    val_loader: Any
    mixup: Mixup | None
    autocast: Callable[[], Any]
    scaler: utils.NativeScaler | None
    num_epochs: int
    updates_per_epoch: int
    usage: dict[str, Any]  # how images are prepared and what the classes are called, for whoever gets the weights
    progress: Progress = field(default_factory=Progress)
    learned: list[Any] = field(default_factory=list)  # what centroids remember, each process's own, at a checkpoint
    stop: interrupt.Stop | None = None
    output_dir: Path | None = None
    saver: utils.CheckpointSaver | None = None

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable = utils.unwrap_model) -> dict[str, Any]:
        """What timm's saver asks a task for: here the task's state and the run's, as `weights_only` types."""
        state = self.task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        if not ema:
            state |= dict(arch=self.args.model, args=options(self.args), progress=asdict(self.progress), **self.usage)
            if self.learned:
                state['learned'] = self.learned
            if plateau := getattr(self.scheduler, 'lr_scheduler', None):
                # The one schedule that depends on more than the epoch.
                state['plateau'] = {k: v for k, v in plateau.state_dict().items() if isinstance(v, int | float)}
        return state


def save_recovery(run: Run) -> None:
    """A checkpoint inside an epoch. All processes take part, because each has a state of its own."""
    progress = run.progress
    progress.loss_sum = float(progress.loss_sum)
    own = dict(interrupt.rng_state(), buffers=interrupt.buffers(run.task), loss_sum=progress.loss_sum)
    states = interrupt.gather(own, run.stop.group)
    gather_learned(run)
    if run.saver is not None:
        progress.num_batches, progress.rng = len(run.train_loader), states
        run.saver.save_recovery(progress.epoch, progress.batch)
        progress.rng, run.learned = [], []


def gather_learned(run: Run) -> None:
    """Fetches what the centroids of each process remember, for the checkpoint that is saved next."""
    if isinstance(run.task, CentroidTaskMixin):
        run.learned = interrupt.gather(run.task.learning_state(), run.stop.group)


def resume(run: Run, path: str) -> None:
    """Puts a run where a checkpoint left it; one of timm's script resumes at the epoch after it."""
    args = run.args
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f'--resume: {error}') from error
    with build.option_errors(f'--resume {path} is not of such a run'):
        run.task.load_checkpoint_state(clean_state_dict(checkpoint['state_dict']), checkpoint.get('task_state'))
        if run.task.has_ema():
            averaged = clean_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
            run.task.load_checkpoint_state(averaged, checkpoint.get('task_state_ema'), ema=True)
        if not args.no_resume_opt:
            run.optimizer.load_state_dict(checkpoint['optimizer'])
            if run.scaler is not None and run.scaler.state_dict_key in checkpoint:
                run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
        if isinstance(run.task, CentroidTaskMixin):
            run.task.load_learning_state(
                split_learning_state(checkpoint.get('learned', []), args.rank, args.world_size)
            )
        run.progress = Progress(**checkpoint.get('progress', dict(epoch=checkpoint.get('epoch', -1) + 1)))
    progress = run.progress
    if progress.batch and (progress.num_batches, len(progress.rng)) != (len(run.train_loader), args.world_size):
        raise OptionError(
            f'--resume {path} was taken inside an epoch of {progress.num_batches} batches on {len(progress.rng)} '
            f'processes; now there are {len(run.train_loader)} on {args.world_size}. Keep the batch size and the '
            'number of processes, or resume from the end of an epoch (last.pth.tar)'
        )
    if plateau := getattr(run.scheduler, 'lr_scheduler', None):
        plateau.__dict__.update(checkpoint.get('plateau', {}))


# --- the loop ---------------------------------------------------------------------------------------------------------


def epoch_batches(run: Run) -> Iterator[tuple[int, Any]]:
    """Batches of the epoch with their numbers, from the one that the progress points at."""
    args, progress, loader = run.args, run.progress, run.train_loader
    if progress.batch == len(loader):
        return
    for holder in (loader.dataset, loader.sampler, loader.batch_sampler):
        if hasattr(holder, 'set_epoch'):
            holder.set_epoch(progress.epoch)
    if run.mixup is not None:
        run.mixup.mixup_enabled = not args.mixup_off_epoch or progress.epoch < args.mixup_off_epoch
    batches = iter(loader)
    for _ in range(progress.batch):
        next(batches)  # drawn and dropped, so that the workers' generators advance as they did
    if progress.rng:
        interrupt.set_rng_state(progress.rng[args.rank])
    yield from enumerate(batches, start=progress.batch)


def to_device(run: Run, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch where and how the model wants it."""
    layout = dict(memory_format=torch.channels_last) if run.args.channels_last else {}
    images = images.to(run.args.device, build.model_dtype(run.args), non_blocking=True, **layout)
    return images, target.to(run.args.device, non_blocking=True)


def backward(run: Run, loss: torch.Tensor, update: bool) -> None:
    """Adds to the gradients and, on an update, applies them."""
    args, task, optimizer = run.args, run.task, run.optimizer
    create_graph = getattr(optimizer, 'is_second_order', False)
    clipped = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
    if run.scaler is not None:
        clipping = dict(clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=clipped)
        run.scaler(loss, optimizer, create_graph=create_graph, need_update=update, **clipping)
    else:
        loss.backward(create_graph=create_graph)
        if update:
            if args.clip_grad is not None:
                utils.dispatch_clip_grad(clipped, value=args.clip_grad, mode=args.clip_mode)
            optimizer.step()
    if update:
        optimizer.zero_grad()


def loss_scale(run: Run, batch_size: int) -> float:
    """Weight of a batch when the batch size goes with the image size."""
    power = dict(none=0.0, sqrt=0.5, linear=1.0)[run.args.variable_batch_loss_scale]
    average = getattr(run.train_loader.batch_sampler, 'average_batch_size', batch_size)
    return (batch_size / average) ** power


def train_epoch(run: Run) -> float | None:
    """Trains from `run.progress` to the end of the epoch.

    Returns:
        The mean training loss of all processes; None when asked to stop on the way.
    """
    args, progress, task = run.args, run.progress, run.task
    num_batches, accum = len(run.train_loader), args.grad_accum_steps
    report = Report(run)
    task.train()
    for batch, (images, target) in epoch_batches(run):
        last = batch + 1 == num_batches
        update = last or (batch + 1) % accum == 0
        # What is left over at the end of an epoch makes one smaller update.
        accumulated = accum if batch < num_batches - num_batches % accum else num_batches % accum
        images, target = to_device(run, images, target)
        if run.mixup is not None and not isinstance(run.mixup, FastCollateMixup):
            images, target = run.mixup(images, target)
        with nullcontext() if update else task.no_sync():
            with run.autocast():
                loss = task(images, target)['loss']
            backward(run, loss * loss_scale(run, len(images)) / accumulated, update)
        progress.batch = batch + 1
        progress.loss_sum = progress.loss_sum + loss.detach() * len(images)
        progress.samples += len(images)
        if not update:
            continue
        updates = batch // accum + 1
        task.update_ema(step=progress.epoch * run.updates_per_epoch + updates)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=progress.epoch * run.updates_per_epoch + updates)
        if args.synchronize_step and args.device != 'cpu':
            torch.accelerator.synchronize()
        report.update(loss, updates, images)
        if run.stop.requested():
            report.close()
            return None
        if args.recovery_interval and updates % args.recovery_interval == 0 and not last:
            save_recovery(run)
    report.close()
    if hasattr(run.optimizer, 'sync_lookahead'):
        run.optimizer.sync_lookahead()
    loss = torch.as_tensor(progress.loss_sum / progress.samples, device=args.device)
    return utils.reduce_tensor(loss, args.world_size).item() if args.distributed else loss.item()


@torch.inference_mode()
def validate(run: Run, ema: bool = False) -> dict[str, float]:
    """Loss, top-1 and top-5 on the validation split, over all processes."""
    args = run.args
    model = run.task.get_eval_model(ema=ema)
    model.eval()
    limit = evaluation_sample_limit(run.val_loader)
    evaluator = run.task.create_evaluator(max_samples=limit)
    for images, target in run.val_loader:
        images, target = to_device(run, images, target)
        with run.autocast():
            output = model(images)
        output = output[0] if isinstance(output, tuple | list) else output
        if args.tta > 1:
            output = output.unfold(0, args.tta, args.tta).mean(dim=2)
            target = target[:: args.tta][: len(output)]
        evaluator.update(output, target)
        # Only processes that have a sampler in common are sure to have as many batches, and so to ask as often.
        if (not args.distributed or limit is not None) and run.stop.requested():
            break
    metrics = evaluator.compute(distributed=args.distributed)
    if utils.is_primary(args) and not run.stop.signal:
        figures = f'top-1 {metrics["top1"]:.2f}  top-5 {metrics["top5"]:.2f}  loss {metrics["loss"]:.4f}'
        _logger.info(f'{"EMA:  " if ema else "Test: "}{run.progress.epoch}  {figures}')
    return metrics


def evaluate(run: Run) -> dict[str, float] | None:
    """Metrics after an epoch, of the averaged weights where there are any; None where `--val-interval` skips it."""
    args, epoch = run.args, run.progress.epoch
    if args.distributed and args.dist_bn:
        for ema in (False, True) if run.task.has_ema() else (False,):
            utils.distribute_bn(run.task.get_trainable_module(ema=ema), args.world_size, args.dist_bn == 'reduce')
    if (epoch + 1) % args.val_interval and epoch + 1 < run.num_epochs:
        return None
    metrics = validate(run)
    if run.task.has_ema() and not args.model_ema_force_cpu:
        metrics = validate(run, ema=True)
    return metrics


def fit(run: Run) -> int:
    """All epochs.

    Returns:
        0, or the number of the signal that stopped the run.
    """
    args, skipped = run.args, 0
    if run.progress.rng:
        own = run.progress.rng[args.rank]
        run.progress.loss_sum = own.get('loss_sum', run.progress.loss_sum)
        interrupt.set_buffers(run.task, own.get('buffers', []))
    while run.progress.epoch < run.num_epochs:
        epoch = run.progress.epoch
        interrupt.seed_epoch(args.seed, args.rank, epoch)
        loss = train_epoch(run)
        metrics = evaluate(run) if loss is not None else None
        if run.stop.requested():
            save_recovery(run)
            return run.stop.signal
        metric = metrics[args.eval_metric] if metrics else None
        rates = [group['lr'] for group in run.optimizer.param_groups]
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)
        gather_learned(run)
        run.progress = Progress(epoch + 1)  # a checkpoint from here on is one of the next epoch's start
        if run.saver is None:
            continue
        metrics = metrics or dict.fromkeys(('loss', 'top1', 'top5'))
        summary = run.output_dir / 'summary.csv'
        utils.update_summary(epoch, OrderedDict(loss=loss), metrics, summary, lr=sum(rates) / len(rates))
        run.saver.save_checkpoint(epoch, metric)
        run.learned = []
        unreadable = {*unreadable_images(run.train_loader.dataset), *unreadable_images(run.val_loader.dataset)}
        if len(unreadable) > skipped:
            skipped = len(unreadable)
            _logger.warning(f'{skipped} unreadable images so far, replaced by others.')
    if run.saver is not None and run.saver.best_metric is not None:
        best = f'{args.eval_metric} {run.saver.best_metric:.3f} after epoch {run.saver.best_epoch}'
        _logger.info(f'Best {best}: {run.output_dir / "model_best.pth.tar"}')
    return 0


class Report:
    """Progress of an epoch: a bar on a terminal, a line every `--log-interval` updates elsewhere."""

    def __init__(self, run: Run) -> None:
        progress = run.progress
        self.run, self.total = run, len(run.train_loader)
        self.shown = utils.is_primary(run.args)
        self.start, self.samples_before, self.batches_before = time.monotonic(), progress.samples, progress.batch
        self.bar = None
        if self.shown and sys.stderr.isatty():
            title = f'Epoch {progress.epoch}/{run.num_epochs}'
            self.bar = tqdm(desc=title, total=self.total, initial=progress.batch, mininterval=0, dynamic_ncols=True)

    def update(self, loss: torch.Tensor, updates: int, images: torch.Tensor) -> None:
        args, progress = self.run.args, self.run.progress
        due = updates % args.log_interval == 0 or progress.batch == self.total
        if not self.shown or not (due or (self.bar is not None and time.time() - self.bar.last_print_t > 0.5)):
            return  # reading the loss waits for the device, so only when it is shown
        elapsed = time.monotonic() - self.start
        mean = float(progress.loss_sum / progress.samples)
        lr = self.run.optimizer.param_groups[0]['lr']
        speed = (progress.samples - self.samples_before) * args.world_size / elapsed
        if self.bar is not None:
            self.bar.set_postfix_str(f'loss {mean:.3f}, lr {lr:.2e}, {speed:.0f} img/s', refresh=False)
            self.bar.update(progress.batch - self.bar.n)
        else:
            batches_left = (self.run.num_epochs - progress.epoch) * self.total - progress.batch
            left = elapsed / (progress.batch - self.batches_before) * batches_left
            where = f'{progress.epoch} [{progress.batch:>4d}/{self.total} {100 * progress.batch / self.total:>3.0f}%]'
            figures = f'loss {loss.item():.4f} (mean {mean:.4f})  lr {lr:.3e}  {speed:.1f} img/s'
            _logger.info(f'Train: {where}  {figures}  {tqdm.format_interval(left)} left')
        if due and args.save_images and self.run.output_dir:
            path = self.run.output_dir / f'train-batch-{progress.batch - 1}.jpg'
            torchvision.utils.save_image(images, path, padding=0, normalize=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# --- putting a run together -------------------------------------------------------------------------------------------


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options alone, as `args.yaml` and checkpoints keep them."""
    process = ('given', 'distributed', 'world_size', 'rank')
    return {name: value for name, value in vars(args).items() if name not in process}


def set_up(args: argparse.Namespace) -> None:
    """Device, processes, log and seed."""
    build.check_training_options(args)
    build.setup_runtime(args)
    utils.init_distributed_device(args)
    logging.basicConfig(format='%(message)s')
    logging.getLogger().setLevel(logging.INFO if utils.is_primary(args) else logging.ERROR)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # would list all of them each epoch
    _logger.info(f'Recipe {args.recipe}; set on the command line: {", ".join(args.given) or "nothing"}.')
    if 'workers' not in args.given:
        args.workers = available_workers(args.workers)
    utils.random_seed(args.seed, args.rank)


def start(args: argparse.Namespace) -> Run:
    """Builds every part of a run, and puts it where `--resume` says."""
    set_up(args)
    model = build.build_model(args)
    with build.option_errors('image size'):
        data_config = resolve_input_data_config(model, vars(args))
    datasets = build.build_datasets(args, data_config)
    mixup = build.build_mixup(args)
    train_loader, val_loader = build.build_loaders(args, datasets, data_config, mixup)
    task = build.build_task(args, model)
    optimizer = build.build_optimizer(args, task)
    updates_per_epoch = -(-len(train_loader) // args.grad_accum_steps)
    scheduler, num_epochs = build.build_scheduler(args, optimizer, updates_per_epoch)
    autocast, scaler = build.build_precision(args)
    if args.model_ema:
        device = torch.device('cpu') if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
    run = Run(
        args=args,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        val_loader=val_loader,
        mixup=mixup,
        autocast=autocast,
        scaler=scaler,
        num_epochs=num_epochs,
        updates_per_epoch=updates_per_epoch,
        usage=dict(data_config=data_config, label_names=list(class_names(datasets[0]).values())),
    )
    image_size = data_config['input_size'][-1]
    folder = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}-{image_size}'
    output_dir = Path(args.output or './output/train', folder)
    place(run, output_dir)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(
        f'{args.model}: {parameters / 1e6:.2f} M parameters, {args.num_classes} classes; {len(datasets[0])} training '
        f'and {len(datasets[1])} validation images of {data_config["input_size"]}; {num_epochs} epochs of '
        f'{updates_per_epoch} updates on {args.world_size} x {args.device}; output in {output_dir}'
    )
    return run


def place(run: Run, output_dir: Path) -> None:
    """Puts a run where it starts from, into its folder, and on its processes, in the order that timm's task needs."""
    args, task = run.args, run.task
    checkpoint = interrupt.newest_checkpoint(output_dir) if args.resume == 'auto' else args.resume
    if checkpoint:
        resume(run, checkpoint)
    if args.start_epoch is not None:
        run.progress = Progress(args.start_epoch)
    updates = run.progress.epoch * run.updates_per_epoch - (-run.progress.batch // args.grad_accum_steps)
    if run.scheduler is not None and updates > 0 and args.sched != 'plateau':
        run.scheduler.step(run.progress.epoch)
        run.scheduler.step_update(updates)
    if utils.is_primary(args):
        open_output(run, output_dir, checkpoint)
    if args.torchcompile:
        with build.option_errors(f'--torchcompile {args.torchcompile}'):
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        device_ids = None if args.device == 'cpu' else [torch.device(args.device)]
        task.prepare_distributed(device_ids=device_ids, **dict(broadcast_buffers=False) if args.no_ddp_bb else {})


def open_output(run: Run, output_dir: Path, checkpoint: str) -> None:
    """Makes the run folder, with the options in `args.yaml`, and the saver of checkpoints."""
    args = run.args
    output_dir.mkdir(parents=True, exist_ok=True)
    run.output_dir = output_dir
    (output_dir / 'args.yaml').write_text(yaml.safe_dump(options(args), default_flow_style=False))
    utils.trim_summary(output_dir / 'summary.csv', run.progress.epoch)
    ranking = dict(decreasing=args.eval_metric == 'loss', max_history=args.checkpoint_hist)
    run.saver = interrupt.open_saver(run, output_dir, checkpoint, **ranking)


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
        args = train_parser().resolve(argv)
        run = start(args)
        with interrupt.Stop() as run.stop:
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
        where = f'epoch {run.progress.epoch}, batch {run.progress.batch}'
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if args.distributed else 0
        command = interrupt.resume_command(argv, run.output_dir, run.saver.curr_recovery_file, processes)
        print(f'\nStopped at {where}. To go on:\n\n    {command}\n', file=sys.stderr)
    return 128 + number if number else 0


if __name__ == '__main__':
    sys.exit(main())
