"""Train an image classifier: ``train.py`` and ``cluster-zoo train``.

Read this file from the bottom up: `main`, `start` (builds the run), `fit` (epochs), `train_epoch` (batches).

On a CPU, a run that is stopped at any batch and resumed ends with the same bits as an uninterrupted run. For this, each
epoch seeds the random generators from (seed, rank, epoch), and a checkpoint within an epoch has the number of its batch
and the states of the generators.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torchvision
from timm import utils
from timm.data import FastCollateMixup, Mixup, resolve_input_data_config
from timm.models import safe_model_name
from timm.task import evaluation_sample_limit

from ..datasets import class_names, image_names, unreadable_images
from ..errors import OptionError
from ..weights import training_metadata
from . import engine, run_folder
from .divergence import SKIPPED_UPDATES, LossRecord, finite_metrics
from .files import write_summary
from .loaders import build_datasets, build_loaders, build_mixup, check_data_dir, drop_invalid
from .loggers import check_loggers
from .model import build_model
from .optim import build_optimizer, build_scheduler, build_task, shorten_warmup
from .progress import ProgressReport, count_update, log_options
from .resume import gather_states, get_buffers, get_rng_state, seed_all, set_buffers, set_rng_state
from .runtime import build_precision, model_dtype, option_errors, set_up_processes, set_up_runtime
from .saved_options import held_out_images
from .streaming import check_batches
from .train_options import check_train_options, train_parser

__all__ = ['main']

_logger = logging.getLogger(__name__)

_OUTPUT = './output/train'  # parent of the folders of runs


@dataclass
class Progress:
    """Position of a run, and sums over the epoch so far."""

    epoch: int = 0
    batch: int = 0  # the next one
    loss_sum: torch.Tensor | float = 0.0
    samples: int = 0
    num_batches: int = 0  # of the epoch; only in a checkpoint within an epoch, as `rng`
    rng: list[dict[str, Any]] = field(default_factory=list)  # generators, buffers and loss of each process


@dataclass(kw_only=True)
class Run(engine.TrainingRun):
    """A run of epochs."""

    train_loader: Any
    val_loader: Any  # None without validation
    mixup: Mixup | None
    num_epochs: int
    updates_per_epoch: int
    metadata: dict[str, Any]  # input of the model, names of the classes and of held-out images, for checkpoints
    progress: Progress = field(default_factory=Progress)

    def extra_state(self) -> dict[str, Any]:
        state = dict(progress=asdict(self.progress), **self.metadata)
        if plateau := getattr(self.scheduler, 'lr_scheduler', None):  # other schedules depend on the epoch only
            state['plateau'] = {k: v for k, v in plateau.state_dict().items() if isinstance(v, int | float)}
        return state

    def position(self) -> str:
        return f'epoch {self.progress.epoch}, batch {self.progress.batch}'

    def remaining_updates(self) -> int:
        """Returns the number of updates until the end of the run."""
        done = -(-self.progress.batch // self.args.grad_accum_steps)
        return (self.num_epochs - self.progress.epoch) * self.updates_per_epoch - done


def save_recovery(run: Run) -> None:
    """Saves a checkpoint within an epoch. All processes have to call this, because each has its own state."""
    engine.check_finite(run)
    progress = run.progress
    progress.loss_sum = float(progress.loss_sum)
    own = dict(get_rng_state(), buffers=get_buffers(run.task), loss_sum=progress.loss_sum)
    states = gather_states(own, run.stop.group)
    run.gather_learning_states()
    if run.saver is not None:
        progress.num_batches, progress.rng = len(run.train_loader), states
        run.saver.save_recovery(progress.epoch, progress.batch)
        progress.rng, run.learning_states = [], []


def resume(run: Run, path: str) -> None:
    """Restores a run from a checkpoint. A checkpoint of timm's script resumes at its next epoch."""
    checkpoint = engine.load_checkpoint_state(run, path, optimizer=not run.args.no_resume_opt)
    run.progress = Progress(**checkpoint.get('progress', dict(epoch=checkpoint.get('epoch', -1) + 1)))
    if run.progress.batch:
        check_same_batches(run, path, training_metadata(checkpoint)['args'])
    if plateau := getattr(run.scheduler, 'lr_scheduler', None):
        plateau.__dict__.update(checkpoint.get('plateau', {}))


def check_same_batches(run: Run, path: str, saved: dict[str, Any]) -> None:
    """Raises `OptionError` if the rest of the epoch in a checkpoint would have other batches than its beginning.

    Args:
        run: The run.
        path: The checkpoint.
        saved: Options of the saved run.
    """
    progress, names = run.progress, ('seed', 'batch_size', 'grad_accum_steps')
    before = dict(batches=progress.num_batches, processes=len(progress.rng)) | {name: saved.get(name) for name in names}
    now = dict(batches=len(run.train_loader), processes=run.args.world_size)
    now |= {name: getattr(run.args, name) for name in names}
    if differ := [f'{name} {before[name]} -> {now[name]}' for name in now if now[name] != before[name]]:
        raise OptionError(
            f'--resume {path} is a checkpoint within an epoch, whose other batches would differ ({", ".join(differ)}). '
            'Keep --batch-size, --grad-accum-steps, --seed and the number of processes, or resume from the end of an '
            'epoch (last.pth.tar)'
        )


# --- training ---------------------------------------------------------------------------------------------------------


def epoch_batches(run: Run) -> Iterator[tuple[int, Any]]:
    """Yields the remaining batches of the epoch with their numbers."""
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
        next(batches)  # advances the generators of the workers
    if progress.rng:
        set_rng_state(progress.rng[args.rank])
    count = progress.batch
    for batch in batches:
        yield count, batch
        count += 1
    check_batches(count, len(loader), args.dataset, args.train_split)


def to_device(run: Run, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves a batch to the device, in the model's dtype and memory format."""
    layout = dict(memory_format=torch.channels_last) if run.args.channels_last else {}
    images = images.to(run.args.device, model_dtype(run.args), non_blocking=True, **layout)
    return images, target.to(run.args.device, non_blocking=True)


def loss_scale(run: Run, batch_size: int) -> float:
    """Returns the weight of a batch if the batch size depends on the image size."""
    power = dict(none=0.0, sqrt=0.5, linear=1.0)[run.args.variable_batch_loss_scale]
    average = getattr(run.train_loader.batch_sampler, 'average_batch_size', batch_size)
    return (batch_size / average) ** power


def train_epoch(run: Run, report: ProgressReport) -> float | None:
    """Trains from the current batch to the end of the epoch.

    Args:
        run: The run.
        report: Shows the progress of the epoch.

    Returns:
        The mean training loss over all processes; None if a stop was requested.
    """
    args, progress, task = run.args, run.progress, run.task
    num_batches, accum = len(run.train_loader), args.grad_accum_steps
    samples_before = progress.samples
    task.train()
    for batch, (images, target) in epoch_batches(run):
        last = batch + 1 == num_batches
        update = last or (batch + 1) % accum == 0
        # The last update of an epoch may have fewer batches.
        accumulated = accum if batch < num_batches - num_batches % accum else num_batches % accum
        images, target = to_device(run, images, target)
        if run.mixup is not None and not isinstance(run.mixup, FastCollateMixup):
            images, target = run.mixup(images, target)
        with nullcontext() if update else task.no_sync():
            with run.autocast():
                loss = task(images, target)['loss']
            scaled = loss * loss_scale(run, len(images)) / accumulated
            engine.backward(run, scaled, update, exclude_head=True)
        progress.batch = batch + 1
        loss_sum = loss.detach() * len(images)
        run.losses.add(loss_sum, run.position(), run.optimizer.param_groups[0]['lr'])
        if run.scaler is not None:  # skips updates without an error
            loss_sum = loss_sum.nan_to_num(0.0, 0.0, 0.0)
        progress.loss_sum = progress.loss_sum + loss_sum
        progress.samples += len(images)
        if not update:
            continue
        updates = batch // accum + 1
        count_update(run, run.remaining_updates())
        task.update_ema(step=progress.epoch * run.updates_per_epoch + updates)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=progress.epoch * run.updates_per_epoch + updates)
        if args.synchronize_step and args.device != 'cpu':
            torch.accelerator.synchronize()
        if report.is_due(updates % args.log_interval == 0 or last):
            show_progress(run, report, loss, progress.samples - samples_before)
            save_images(run, images)
        if updates % args.log_interval == 0 or last:
            engine.check_finite(run)
        if run.stop.requested():
            return None
        if args.recovery_interval and updates % args.recovery_interval == 0 and not last:
            save_recovery(run)
    if hasattr(run.optimizer, 'sync_lookahead'):
        run.optimizer.sync_lookahead()
    loss = torch.as_tensor(progress.loss_sum / progress.samples, device=args.device)
    return utils.reduce_tensor(loss, args.world_size).item() if args.distributed else loss.item()


def show_progress(run: Run, report: ProgressReport, loss: torch.Tensor, samples: int) -> None:
    """Shows the progress of an epoch; ``samples`` are the images of this process since its start."""
    progress, total = run.progress, len(run.train_loader)
    mean = float(progress.loss_sum / progress.samples)
    step = f'{progress.epoch} [{progress.batch:>4d}/{total} {100 * progress.batch / total:>3.0f}%]'
    report.show(
        step=progress.batch,
        remaining=(run.num_epochs - progress.epoch) * total - progress.batch,
        images=samples * run.args.world_size,
        lr=run.optimizer.param_groups[0]['lr'],
        mean_loss=mean,
        line=f'{step}  loss {loss.item():.4f} (mean {mean:.4f})',
    )


def save_images(run: Run, images: torch.Tensor) -> None:
    """Saves the images of a batch for ``--save-images``."""
    if run.args.save_images and run.saver is not None:
        path = run.output_dir / f'train-batch-{run.progress.batch - 1}.jpg'
        torchvision.utils.save_image(images, path, padding=0, normalize=True)


# --- validation -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def validate(run: Run, ema: bool = False) -> dict[str, float]:
    """Computes loss and accuracy (with several labels, mAP and F1) on the validation split, over all processes.

    Returns:
        The metrics, NaN if an output is not finite; empty if a stop was requested.
    """
    args = run.args
    model = run.task.get_eval_model(ema=ema)
    model.eval()
    limit = evaluation_sample_limit(run.val_loader)
    evaluator, seen = run.task.create_evaluator(), 0
    for images, target in run.val_loader:
        images, target = to_device(run, images, target)
        with run.autocast():
            output = model(images)
        output = output[0] if isinstance(output, tuple | list) else output
        if args.tta > 1:
            output = output.unfold(0, args.tta, args.tta).mean(dim=2)
            target = target[:: args.tta][: len(output)]
        remaining = None if limit is None else max(0, limit - seen)
        seen += len(output)
        evaluator.update(*drop_invalid(output, target, run.val_loader.dataset, remaining))
        # All processes have to ask equally often. Only with a common sampler do they have as many batches.
        if (not args.distributed or limit is not None) and run.stop.requested():
            return {}
    metrics = finite_metrics(evaluator.compute(distributed=args.distributed))
    if utils.is_primary(args):
        names = dict(top1='top-1', top5='top-5', map='mAP')
        percent = [f'{names.get(name, name)} {value:.2f}' for name, value in metrics.items() if name != 'loss']
        values = '  '.join([*percent, f'loss {metrics["loss"]:.4f}'])
        _logger.info(f'{"EMA:  " if ema else "Test: "}{run.progress.epoch}  {values}')
    return metrics


def _validates_average(run: Run) -> bool:
    return run.task.has_ema() and not run.args.model_ema_force_cpu


def evaluate(run: Run) -> dict[str, float] | None:
    """Validates after an epoch, the averaged weights if there are any. Returns None if ``--val-interval`` skips it.

    The metrics are empty if a stop was requested.
    """
    args, epoch = run.args, run.progress.epoch
    if args.distributed and args.dist_bn:
        for ema in (False, True) if run.task.has_ema() else (False,):
            utils.distribute_bn(run.task.get_trainable_module(ema=ema), args.world_size, args.dist_bn == 'reduce')
    if run.val_loader is None or ((epoch + 1) % args.val_interval and epoch + 1 < run.num_epochs):
        return None
    metrics = validate(run)
    if metrics and _validates_average(run):
        metrics = validate(run, ema=True)
    return metrics


# --- epochs -----------------------------------------------------------------------------------------------------------


def fit(run: Run) -> int:
    """Trains all epochs.

    Returns:
        0, or the number of the signal that stopped the run.

    Raises:
        RunError: A loss or a weight is not finite, or the folder of the run cannot be written.
    """
    args, unreadable = run.args, set()
    if run.progress.rng:
        own = run.progress.rng[args.rank]
        run.progress.loss_sum = own.get('loss_sum', run.progress.loss_sum)
        set_buffers(run.task, own.get('buffers', []))
    while run.progress.epoch < run.num_epochs:
        epoch = run.progress.epoch
        seed_all(args.seed, args.rank, epoch)
        title = f'Epoch {epoch}/{run.num_epochs}'
        with closing(ProgressReport(args, len(run.train_loader), run.progress.batch, title)) as report:
            loss = train_epoch(run, report)
        metrics = evaluate(run) if loss is not None else None
        if run.stop.requested():
            save_recovery(run)
            return run.stop.signal
        metric = metrics[args.eval_metric] if metrics else None
        rates = [group['lr'] for group in run.optimizer.param_groups]
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)
        run.gather_learning_states()
        skipped = gather_states(skipped_images(run), run.stop.group)
        run.progress = Progress(epoch + 1)  # checkpoints after an epoch are those of the start of the next one
        if run.saver is None:
            continue
        metrics = metrics or dict.fromkeys(run.task.create_evaluator().metric_names)
        evaluated = {f'eval_{name}': value for name, value in metrics.items()}
        run.rows.append(dict(epoch=epoch, train_loss=loss, **evaluated, lr=sum(rates) / len(rates)))
        run.saver.save_checkpoint(epoch, None if metric is None or math.isnan(metric) else metric)
        write_summary(run.output_dir / 'summary.csv', run.rows)
        run.loggers.log(run.rows[-1])
        run.learning_states = []
        if set().union(*skipped) > unreadable:
            unreadable = set().union(*skipped)
            _logger.warning(
                f'{len(unreadable)} unreadable images so far: replaced by others in training, left out of validation.'
            )
    if run.saver is not None and run.saver.best_metric is not None:
        best = f'{args.eval_metric} {run.saver.best_metric:.3f} after epoch {run.saver.best_epoch}'
        weights = ', of the averaged weights (--use-ema selects them)' if _validates_average(run) else ''
        _logger.info(f'Best {best}{weights}: {run.output_dir / "model_best.pth.tar"}')
    elif run.saver is not None:
        _logger.info(f'Not validated, or with outputs that are not finite: {run.output_dir / "last.pth.tar"}')
    return 0


def skipped_images(run: Run) -> list[str]:
    """Returns the names of the images that this process could not read."""
    loaders = [loader for loader in (run.train_loader, run.val_loader) if loader is not None]
    return [name for loader in loaders for name in unreadable_images(loader.dataset)]


# --- building the run -------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> Run:
    """Builds all parts of a run and restores it from ``--resume``."""
    check_train_options(args)
    check_loggers(args)
    run_folder.check_output_dir(args, _OUTPUT)
    check_data_dir(args)
    set_up_runtime(args, tf32=True)
    set_up_processes(args)
    utils.random_seed(args.seed, args.rank)
    model = build_model(args)
    with option_errors('image size'):
        data_config = resolve_input_data_config(model, vars(args))
    output_dir = run_folder.output_dir(args, _OUTPUT)
    checkpoint, held_out = run_folder.checkpoint_to_resume(args, output_dir), []
    if checkpoint and args.val_fraction:
        held_out = held_out_images(training_metadata(engine.read_resumed(checkpoint)), f"'{checkpoint}'")
    if held_out:
        _logger.info(f'--val-fraction: the held-out images are those of {checkpoint}, new images are trained on.')
    datasets = build_datasets(args, data_config, held_out)
    if args.val_fraction:
        held_out = held_out or image_names(datasets[1])
    metadata = dict(label_names=list(class_names(datasets[0]).values()), held_out='\0'.join(held_out))
    mixup = build_mixup(args)
    train_loader, val_loader = build_loaders(args, datasets, data_config, mixup)
    task = build_task(args, model, datasets[0])
    optimizer = build_optimizer(args, task)
    shorten_warmup(args)
    updates_per_epoch = -(-len(train_loader) // args.grad_accum_steps)
    scheduler, num_epochs = build_scheduler(args, optimizer, updates_per_epoch)
    autocast, scaler = build_precision(args)
    ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
    engine.set_up_ema(args, task, num_epochs * updates_per_epoch, ema_device)
    run = Run(
        args=args,
        model_name=args.model if ':' not in args.model else model.pretrained_cfg['architecture'],
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        autocast=autocast,
        scaler=scaler,
        losses=LossRecord(SKIPPED_UPDATES if scaler is not None else 0),
        output_dir=output_dir,
        train_loader=train_loader,
        val_loader=val_loader,
        mixup=mixup,
        num_epochs=num_epochs,
        updates_per_epoch=updates_per_epoch,
        metadata=dict(data_config=data_config, **metadata),
    )
    restore(run, checkpoint)
    log_run(run, datasets)
    return run


def log_run(run: Run, datasets: tuple[Any, Any]) -> None:
    """Logs what the run will do: its options, images and updates."""
    args, loader, (train, val) = run.args, run.train_loader, datasets
    log_options(args, default='timm default')
    parameters = sum(parameter.numel() for parameter in run.task.get_trainable_module().parameters())
    _logger.info(f'{args.model}: {parameters / 1e6:.2f} M parameters, {args.num_classes} classes')
    size = ' x '.join(map(str, run.metadata['data_config']['input_size']))
    validation = 'no validation images' if val is None else f'{len(val):,} validation images'
    _logger.info(f'{len(train):,} training and {validation} of {size}')
    batch = args.batch_size * args.world_size
    is_sampled = args.train_img_sizes or args.aug_repeats or args.train_batches_per_epoch or args.epoch_repeats
    if not is_sampled and (left_out := len(train) - len(loader) * batch) > 0:
        advice = '; a lower --batch-size skips fewer' if left_out > len(train) / 20 else ''
        _logger.info(
            f'Each epoch skips {left_out:,} training images, chosen at random, because they do not fill a batch of '
            f'{batch}{advice}'
        )
    if val is not None and _validates_average(run):
        _logger.info(
            '--model-ema: the eval columns of summary.csv and the best checkpoint are those of the averaged weights'
        )
    where = 'no output (--dry-run)' if args.dry_run else f'output in {run.output_dir}'
    _logger.info(
        f'{run.num_epochs} epochs of {run.updates_per_epoch:,} updates with {batch * args.grad_accum_steps} images on '
        f'{args.world_size} x {args.device}; {where}'
    )
    if run.progress.epoch >= run.num_epochs:
        _logger.info(f'The run is finished: all {run.num_epochs} epochs are done. To train longer, raise --epochs.')
    elif args.resume and run.remaining_updates() < run.num_epochs * run.updates_per_epoch:
        _logger.info(f'Resumed at {run.position()}: {run.remaining_updates():,} updates remain')


def restore(run: Run, checkpoint: str) -> None:
    """Sets the position of a run, opens its folder and distributes it, in the order that timm's task requires."""
    args = run.args
    if checkpoint:
        resume(run, checkpoint)
        _logger.info(f'Resumed from {checkpoint}')
    if args.start_epoch is not None:
        run.progress = Progress(args.start_epoch)
        run.rows = [row for row in run.rows if row['epoch'] < args.start_epoch]
    updates = run.progress.epoch * run.updates_per_epoch - (-run.progress.batch // args.grad_accum_steps)
    if run.scheduler is not None and updates > 0 and args.sched != 'plateau':
        run.scheduler.step(run.progress.epoch)
        run.scheduler.step_update(updates)
    if not args.dry_run:
        name = f'{safe_model_name(args.model)}-{run.metadata["data_config"]["input_size"][-1]}'
        decreasing = args.eval_metric == 'loss'
        run_folder.open_output_dir(run, name, checkpoint, decreasing=decreasing)
    engine.launch(run, args.torchcompile_mode, **dict(broadcast_buffers=False) if args.no_ddp_bb else {})


def main(argv: Sequence[str] | None = None, prog: str = 'train.py') -> int:
    """Runs the script and returns its exit status, see `run_training`."""
    return engine.run_training(train_parser(prog), start, fit, argv)
