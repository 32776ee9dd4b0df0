#!/usr/bin/env python3
"""Train an image classifier with timm's parts.

    python train.py --data-dir /path/to/imagenet --model coc_tiny -b 128 --amp
    torchrun --nproc-per-node=8 train.py --data-dir /path/to/imagenet --model fec_small -b 128 --amp

Read from the bottom up: `main` -> `run` (build everything) -> `fit` (epochs) -> `train_epoch` (batches).

A run can be interrupted at any batch and resumed to the same bits on a CPU. Two things make this so: every epoch starts
from random generators that are seeded by (seed, process, epoch), and a checkpoint taken inside an epoch holds the batch
it was taken at and the generators' states.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import shlex
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torchvision
import yaml
from timm import utils
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, Mixup, auto_augment, create_loader, resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import clean_state_dict, create_model, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
    evaluation_sample_limit,
)
from tqdm import tqdm

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.data import DataError, check_dataset, create_dataset
from cluster_zoo.options import OptionError, available_workers, check_model_name, default_device, train_parser
from cluster_zoo.weights import CheckpointError, load_checkpoint

_logger = logging.getLogger('train')


@dataclass
class Progress:
    """Where a run is: the next batch to train on, and what the epoch has added up so far."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    samples: int = 0
    num_batches: int = 0
    rng: list[dict[str, Any]] = field(default_factory=list)  # inside an epoch, one a process


@dataclass
class Run:
    """Everything that the loop works with."""

    args: Any
    device: torch.device
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: utils.NativeScaler | None
    train_loader: Any
    val_loader: Any
    mixup: Mixup | None
    autocast: Callable[[], Any]
    num_epochs: int
    updates_per_epoch: int
    progress: Progress
    stop: Stop
    output_dir: Path | None = None
    saver: utils.CheckpointSaver | None = None

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable = utils.unwrap_model) -> dict[str, Any]:
        """What `CheckpointSaver` stores: the task's state, and beside the model's that of the run, as plain data."""
        state = self.task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        if not ema:
            state |= dict(arch=self.args.model, args=plain(self.args), progress=asdict(self.progress))
            if plateau := getattr(self.scheduler, 'lr_scheduler', None):
                state['plateau'] = {k: v for k, v in plateau.state_dict().items() if isinstance(v, (int, float))}
        return state


class Stop:
    """Turns SIGINT and SIGTERM into a request to stop after the current update. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.group = dist.new_group(backend='gloo') if dist.is_initialized() else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def requested(self) -> bool:
        """Whether to stop; processes agree, because one that stops alone leaves the others waiting for it."""
        if self.group is not None:
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            self.signal = int(flag)
        return self.signal != 0


# --- random state -------------------------------------------------------------------------------------------------------


def seed_epoch(seed: int, rank: int, epoch: int) -> None:
    """Seeds every generator for one epoch of one process; loader workers derive their seeds from these."""
    utils.random_seed(int(np.random.SeedSequence([seed, rank, epoch]).generate_state(1)[0]))


def rng_state() -> dict[str, Any]:
    """The generators of this process as types that `torch.load(weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state()
    state = dict(torch=torch.get_rng_state(), numpy=(name, keys.tolist(), *rest), python=random.getstate())
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state['torch'])
    np.random.set_state(state['numpy'])
    random.setstate(state['python'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


# --- building -----------------------------------------------------------------------------------------------------------


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, for a Pillow that refuses to keep no bits at all: RandAugment at magnitude 10 asks for that."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda value: 0)


auto_augment.NAME_TO_OP |= dict.fromkeys(('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'), posterize)


def plain(args: Any) -> dict[str, Any]:
    """The options as YAML and checkpoints store them."""
    return {k: v for k, v in vars(args).items() if k not in _STATE_OF_ARGS}


_STATE_OF_ARGS = ('given', 'argv', 'distributed', 'world_size', 'rank')


def setup_device(args: Any) -> torch.device:
    for module in args.device_modules or ():
        importlib.import_module(module)
    args.device = args.device or default_device()
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    try:
        device = utils.init_distributed_device(args)
    except (AssertionError, RuntimeError) as e:
        raise OptionError(f'--device {args.device}: {e}') from None
    utils.random_seed(args.seed, args.rank)
    if args.fuser:
        utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    return device


def model_dtype(args: Any) -> torch.dtype:
    if args.model_dtype and args.amp:
        raise OptionError('--model-dtype and --amp exclude each other')
    return getattr(torch, args.model_dtype or 'float32')


def build_model(args: Any, device: torch.device) -> torch.nn.Module:
    check_model_name(args.model)
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else 3)
    drop_path = args.drop_path if args.drop_path is not None else args.drop_connect
    overlay = {}
    if args.pretrained_path:
        # The checkpoint's own head decides, so that it can be replaced by one of --num-classes.
        overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))
    model = create_model(
        args.model,
        pretrained=args.pretrained or bool(args.pretrained_path),
        in_chans=in_chans,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        scriptable=args.torchscript,
        **overlay,
        **args.model_kwargs,
    )
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    with torch.no_grad():
        if args.head_init_scale is not None:
            model.get_classifier().weight.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            torch.nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    momentum, eps = (0.01, 1e-3) if args.bn_tf else (None, None)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = args.bn_momentum or momentum or module.momentum
            module.eps = args.bn_eps or eps or module.eps
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=model_dtype(args))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and args.distributed:
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        model = torch.jit.script(model)
    return model


def build_task(args: Any, model: torch.nn.Module, device: torch.device, mixup_active: bool) -> TrainingTask:
    """The model together with its loss, or with a teacher."""
    loss_type = 'jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce'
    criterion = dict(
        loss_type=loss_type,
        smoothing=args.smoothing,
        soft_targets=mixup_active,
        bce_target_thresh=args.bce_target_thresh if args.bce_loss else None,
        bce_sum=args.bce_sum and args.bce_loss,
        pos_weight=args.bce_pos_weight if args.bce_loss else None,
        jsd_splits=args.aug_splits,
    )
    common = dict(criterion_kwargs=criterion, device=device, dtype=model_dtype(args), verbose=utils.is_primary(args))
    if args.kd_model_name is None:
        return ClassificationTask(model, **common)
    check_model_name(args.kd_model_name)
    common |= dict(
        teacher_model=args.kd_model_name,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    if args.kd_distill_type == 'logit':
        return LogitDistillationTask(model, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(
            model, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common
        )
    return FeatureDistillationTask(
        model,
        student_feature_dim=args.kd_student_feature_dim,
        teacher_feature_dim=args.kd_teacher_feature_dim,
        **common,
    )


def resolve_lr(args: Any) -> None:
    """Sets `args.lr` from the base learning rate and the number of images an update."""
    if args.lr is not None:
        return
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    args.lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
    if utils.is_primary(args):
        _logger.info(
            f'Learning rate {args.lr:.3g}: {args.lr_base:g} at {args.lr_base_size} images an update, {scale} scaling.'
        )


def build_datasets(args: Any, data_config: dict[str, Any]) -> tuple[Any, Any]:
    common = dict(
        root=args.data_dir or args.data,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L'),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        strict=args.strict,
    )
    train = create_dataset(
        args.dataset,
        split=args.train_split,
        is_training=True,
        repeats=args.epoch_repeats,
        num_samples=args.train_num_samples,
        **common,
    )
    val = create_dataset(args.dataset, split=args.val_split, num_samples=args.val_num_samples, **common)
    check_dataset(train, args.num_classes, args.train_split)
    check_dataset(val, args.num_classes, args.val_split, like=train)
    return train, val


def build_loaders(
        args: Any,
        datasets: tuple[Any, Any],
        data_config: dict[str, Any],
        device: torch.device,
        num_epochs: int,
) -> tuple[Any, Any, Mixup | None]:
    """Loaders of both splits, and the mixup that the loop applies where the loader's collate function does not."""
    train, val = datasets
    # On a CPU the prefetcher would normalise in the process that computes; without it the workers do.
    prefetcher = not args.no_prefetcher and device.type != 'cpu'
    common = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        device=device,
        use_prefetcher=prefetcher,
        img_dtype=model_dtype(args),
        # New workers each epoch: the state of their generators would otherwise depend on where the run started.
        persistent_workers=False,
    )
    mixup = collate_fn = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        mixup_args = dict(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
        if prefetcher:
            collate_fn = FastCollateMixup(**mixup_args)
        else:
            mixup = Mixup(**mixup_args)
    if args.aug_splits > 1:
        train = AugMixDataset(train, num_splits=args.aug_splits)
    sizes = {}
    if args.train_img_sizes:
        sizes = dict(
            input_size_choices=args.train_img_sizes,
            batch_size_choices=args.train_batch_sizes,
            batch_choice_weights=args.train_size_probs,
            batch_choice_seed=args.seed,
            batch_choice_schedule=args.train_size_schedule,
            batch_schedule_epochs=num_epochs,
            batch_schedule_spread=args.train_size_schedule_spread,
            batch_schedule_random_mix=args.train_size_random_mix,
            num_batches=args.train_batches_per_epoch,
        )
    train_loader = create_loader(
        train,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.0,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits if args.aug_splits > 1 else 0,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        collate_fn=collate_fn,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        **sizes,
        **common,
    )
    val_loader = create_loader(
        val,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **common,
    )
    if len(train_loader) == 0:
        raise DataError(
            f'the {args.train_split} split has {len(train)} images, less than one batch of {args.batch_size} '
            f'for each of {args.world_size} processes: lower --batch-size'
        )
    return train_loader, val_loader, mixup


# --- the loop -----------------------------------------------------------------------------------------------------------


def train_epoch(run: Run) -> float | None:
    """Trains from `run.progress` to the end of its epoch.

    Returns:
        The mean training loss; None if the run was asked to stop on the way, `run.progress` then says where.
    """
    args, progress, task, optimizer = run.args, run.progress, run.task, run.optimizer
    accum = args.grad_accum_steps
    num_batches = len(run.train_loader)
    second_order = getattr(optimizer, 'is_second_order', False)
    bar = Bar(run, num_batches)
    task.train()
    for batch, (images, target) in epoch_batches(run):
        last = batch + 1 == num_batches
        update_now = last or (batch + 1) % accum == 0
        # The batches left over at the end of an epoch make one smaller update.
        in_update = accum if batch < num_batches - num_batches % accum else num_batches % accum
        if isinstance(run.train_loader, torch.utils.data.DataLoader):
            images = images.to(run.device, model_dtype(args), non_blocking=True)
            target = target.to(run.device, non_blocking=True)
            if run.mixup is not None:
                images, target = run.mixup(images, target)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if update_now else task.no_sync():
            with run.autocast():
                loss = task(images, target)['loss']
            scaled = loss / in_update
            if run.scaler is not None:
                run.scaler(
                    scaled,
                    optimizer,
                    clip_grad=args.clip_grad,
                    clip_mode=args.clip_mode,
                    parameters=task.get_clip_parameters(exclude_head='agc' in args.clip_mode),
                    create_graph=second_order,
                    need_update=update_now,
                )
            else:
                scaled.backward(create_graph=second_order)
                if update_now:
                    if args.clip_grad is not None:
                        utils.dispatch_clip_grad(
                            task.get_clip_parameters(exclude_head='agc' in args.clip_mode),
                            value=args.clip_grad,
                            mode=args.clip_mode,
                        )
                    optimizer.step()
        progress.loss_sum = progress.loss_sum + loss.detach() * len(images)
        progress.samples += len(images)
        progress.batch = batch + 1
        if not update_now:
            continue
        optimizer.zero_grad()
        updates = progress.epoch * run.updates_per_epoch + batch // accum + 1
        task.update_ema(step=updates)
        if args.synchronize_step and run.device.type == 'cuda':
            torch.cuda.synchronize()
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=updates, metric=None)
        bar.update(loss, images, last)
        if args.save_images and run.output_dir and (last or batch % args.log_interval == 0):
            path = run.output_dir / f'train-batch-{batch}.jpg'
            torchvision.utils.save_image(images, path, padding=0, normalize=True)
        if run.stop.requested():
            bar.close()
            return None
        if args.recovery_interval and (batch + 1) % args.recovery_interval == 0 and not last:
            save_recovery(run)
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    bar.close()
    loss = torch.as_tensor(progress.loss_sum / max(progress.samples, 1))
    return utils.reduce_tensor(loss, args.world_size).item() if args.distributed else loss.item()


def epoch_batches(run: Run) -> Iterator[tuple[int, Any]]:
    """Batches of the current epoch with their number, from the one that the progress points at."""
    args, progress, loader = run.args, run.progress, run.train_loader
    if progress.batch >= len(loader):
        return
    for holder in (loader.dataset, loader.sampler, loader.batch_sampler):
        if hasattr(holder, 'set_epoch'):
            holder.set_epoch(progress.epoch)
    mixing = not args.mixup_off_epoch or progress.epoch < args.mixup_off_epoch
    for holder in (loader, run.mixup):
        if hasattr(holder, 'mixup_enabled'):
            holder.mixup_enabled = mixing
    batches = iter(loader)
    for _ in range(progress.batch):
        next(batches)  # drawn and dropped, so that the workers' generators advance as they did
    if progress.rng:
        set_rng_state(progress.rng[run.args.rank])
        progress.rng = []
    yield from enumerate(batches, start=progress.batch)


@torch.inference_mode()
def validate(run: Run, ema: bool = False) -> dict[str, float]:
    """Loss, top-1 and top-5 on the validation split, over all processes."""
    args = run.args
    model = run.task.get_eval_model(ema=ema)
    model.eval()
    evaluator = run.task.create_evaluator(max_samples=evaluation_sample_limit(run.val_loader))
    for images, target in run.val_loader:
        images = images.to(run.device, model_dtype(args))
        target = target.to(run.device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with run.autocast():
            output = model(images)
            output = output[0] if isinstance(output, (tuple, list)) else output
        if args.tta > 1:
            output = output.unfold(0, args.tta, args.tta).mean(dim=2)
            target = target[:: args.tta]
        evaluator.update(output, target)
        if run.stop.signal and not args.distributed:
            break  # the epoch is validated again when the run is resumed
    return evaluator.compute(distributed=args.distributed)


class Bar:
    """Progress of an epoch: a bar on a terminal, a line every `--log-interval` batches elsewhere."""

    def __init__(self, run: Run, total: int) -> None:
        self.run, self.total = run, total
        self.shown = utils.is_primary(run.args)
        self.start, self.first = time.monotonic(), run.progress.samples
        self.batches_before = run.progress.batch
        self.tqdm = None
        if self.shown and sys.stderr.isatty():
            description = f'epoch {run.progress.epoch}'
            self.tqdm = tqdm(desc=description, total=total, initial=run.progress.batch, dynamic_ncols=True, leave=False)

    def update(self, loss: torch.Tensor, images: torch.Tensor, last: bool) -> None:
        progress = self.run.progress
        done = progress.batch
        if not self.shown or not (self.tqdm or last or done % self.run.args.log_interval == 0):
            return
        mean = float(progress.loss_sum / progress.samples)
        lr = self.run.optimizer.param_groups[0]['lr']
        elapsed = time.monotonic() - self.start
        rate = (progress.samples - self.first) * self.run.args.world_size / elapsed
        if self.tqdm is not None:
            self.tqdm.set_postfix_str(f'loss {mean:.3f}, lr {lr:.2e}, {rate:.0f} img/s', refresh=False)
            self.tqdm.update(done - self.tqdm.n)
            return
        epochs_left = self.run.num_epochs - progress.epoch - done / self.total
        left = elapsed / (done - self.batches_before) * self.total * epochs_left
        _logger.info(
            f'Train: {progress.epoch} [{done:>4d}/{self.total} ({100 * done / self.total:>3.0f}%)]  '
            f'Loss: {loss.item():.4g} ({mean:.4g})  LR: {lr:.3e}  {rate:.1f} img/s  left: {hours(left)}'
        )

    def close(self) -> None:
        if self.tqdm is not None:
            self.tqdm.close()


def hours(seconds: float) -> str:
    return f'{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}'


def save_recovery(run: Run) -> None:
    """A checkpoint inside an epoch, at the batch of `run.progress`. All processes take part: each has its generators."""
    states = [rng_state()]
    if run.args.distributed:
        states = [None] * run.args.world_size
        dist.all_gather_object(states, rng_state(), group=run.stop.group)
    if run.saver is not None:
        run.progress.loss_sum = float(run.progress.loss_sum)
        run.progress.num_batches = len(run.train_loader)
        run.progress.rng = states
        run.saver.save_recovery(run.progress.epoch, run.progress.batch)
        run.progress.rng = []


def fit(run: Run) -> int:
    """All epochs. Returns 0, or the number of the signal that stopped the run."""
    args = run.args
    primary = utils.is_primary(args)
    while run.progress.epoch < run.num_epochs:
        epoch = run.progress.epoch
        seed_epoch(args.seed, args.rank, epoch)
        lr = run.optimizer.param_groups[0]['lr']
        loss = train_epoch(run)
        if loss is None:
            return interrupted(run)
        if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
            for ema in (False, True) if args.model_ema else (False,):
                utils.distribute_bn(run.task.get_trainable_module(ema=ema), args.world_size, args.dist_bn == 'reduce')
        metrics = None
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == run.num_epochs:
            metrics = validate(run)
            if primary:
                _logger.info(f'Val: {epoch}  {figures(metrics)}')
            if args.model_ema and not args.model_ema_force_cpu:
                metrics = validate(run, ema=True)
                if primary:
                    _logger.info(f'Val (EMA): {epoch}  {figures(metrics)}')
        if run.stop.requested():
            return interrupted(run)
        metric = metrics[args.eval_metric] if metrics else None
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)
        # From here on the run stands at the start of the next epoch, and so does its checkpoint.
        run.progress = Progress(epoch=epoch + 1)
        if run.saver is not None:
            utils.update_summary(
                epoch,
                OrderedDict(loss=loss),
                metrics or dict.fromkeys(('loss', 'top1', 'top5')),
                filename=run.output_dir / 'summary.csv',
                lr=lr,
            )
            run.saver.save_checkpoint(epoch, metric)
    if primary and run.saver.best_metric is not None:
        _logger.info(
            f'Best {args.eval_metric}: {run.saver.best_metric:.3f} (epoch {run.saver.best_epoch}), '
            f'{run.output_dir / "model_best.pth.tar"}'
        )
    return 0


def figures(metrics: dict[str, float]) -> str:
    return f'top-1 {metrics["top1"]:.2f}  top-5 {metrics["top5"]:.2f}  loss {metrics["loss"]:.4f}'


def interrupted(run: Run) -> int:
    """Saves where the run is and says how to go on."""
    save_recovery(run)
    if run.saver is not None:
        message = f'Stopped in epoch {run.progress.epoch}, after batch {run.progress.batch}. To go on:'
        print(f'\n{message}\n\n    {resume_command(run)}\n', file=sys.stderr, flush=True)
    return run.stop.signal


def resume_command(run: Run) -> str:
    """The command line of this run, with the checkpoint to start from."""
    words = iter(run.args.argv)
    kept = []
    for word in words:
        if word in ('--resume', '--output', '--experiment'):
            next(words, None)
        elif not word.startswith(('--resume=', '--output=', '--experiment=')):
            kept.append(word)
    launcher = ['torchrun', f'--nproc-per-node={run.args.world_size}'] if run.args.distributed else [sys.executable]
    output = ['--output', str(run.output_dir.parent), '--experiment', run.output_dir.name]
    output += ['--resume', run.saver.curr_recovery_file]
    return shlex.join([*launcher, sys.argv[0], *kept, *output])


# --- putting a run together ---------------------------------------------------------------------------------------------


def resume(run: Run, path: str) -> None:
    """Puts a run where the checkpoint left it."""
    try:
        with torch.serialization.safe_globals([type(run.args)]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        run.task.load_checkpoint_state(clean_state_dict(checkpoint['state_dict']), checkpoint.get('task_state'))
        if run.task.has_ema():
            ema = checkpoint.get('state_dict_ema') or checkpoint['state_dict']
            run.task.load_checkpoint_state(clean_state_dict(ema), checkpoint.get('task_state_ema'), ema=True)
        if not run.args.no_resume_opt:
            run.optimizer.load_state_dict(checkpoint['optimizer'])
            if run.scaler is not None and run.scaler.state_dict_key in checkpoint:
                run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
    except Exception as e:
        raise CheckpointError(f'--resume {path}: not a checkpoint of this run ({e})') from None
    run.progress = Progress(**checkpoint.get('progress', dict(epoch=checkpoint.get('epoch', -1) + 1)))
    same = run.progress.num_batches == len(run.train_loader) and len(run.progress.rng) == run.args.world_size
    if run.progress.batch and not same:
        raise OptionError(
            f'--resume {path} was taken inside an epoch of {run.progress.num_batches} batches on {len(run.progress.rng)} '
            f'processes, now there are {len(run.train_loader)} on {run.args.world_size}: keep the batch size and the '
            'number of processes, or resume from a checkpoint of a whole epoch (last.pth.tar)'
        )
    if plateau := getattr(run.scheduler, 'lr_scheduler', None):
        plateau.__dict__.update(checkpoint.get('plateau', {}))
    elif run.scheduler is not None:
        run.scheduler.step(run.progress.epoch)
        run.scheduler.step_update(run.progress.epoch * run.updates_per_epoch + run.progress.batch // run.args.grad_accum_steps)


def check_options(args: Any) -> None:
    """Combinations that would fail later, or not do what they say."""
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixing and args.batch_size % 2:
        raise OptionError(f'mixup and cutmix mix pairs of images: --batch-size {args.batch_size} must be even')
    if args.aug_splits == 1 or args.aug_splits < 0:
        raise OptionError('--aug-splits must be 0 or at least 2')
    if args.jsd_loss and args.aug_splits < 2:
        raise OptionError('--jsd-loss compares augmentation splits: set --aug-splits to 2 or more')
    if args.split_bn and not (args.aug_splits > 1 or args.resplit):
        raise OptionError('--split-bn needs --aug-splits or --resplit')
    if args.grad_accum_steps < 1 or args.batch_size < 1:
        raise OptionError('--batch-size and --grad-accum-steps must be at least 1')


def start(args: Any) -> Run:
    """Builds every part of a run from its options."""
    check_options(args)
    device = setup_device(args)
    primary = utils.is_primary(args)
    if primary:
        logging.basicConfig(level=logging.INFO, format='%(message)s')
        how = 'chosen' if 'recipe' in args.given else 'by model name'
        _logger.info(f'Recipe {args.recipe} ({how}); set by you: {", ".join(args.given) or "nothing"}.')
    if 'workers' not in args.given:
        args.workers = available_workers(args.workers)
    resolve_lr(args)
    model = build_model(args, device)
    data_config = resolve_data_config(vars(args), model=model, verbose=primary)
    datasets = build_datasets(args, data_config)
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    task = build_task(args, model, device, mixing)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    # Epochs depend on the schedule (cool-down, warm-up prefix), an epoch's updates on the loader, the loader on epochs.
    _, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args) | dict(step_on_epochs=True))
    train_loader, val_loader, mixup = build_loaders(args, datasets, data_config, device, num_epochs)
    updates_per_epoch = -(-len(train_loader) // args.grad_accum_steps)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
    )
    autocast, scaler = precision(args, device)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
    run = Run(args, device, task, optimizer, scheduler, scaler, train_loader, val_loader, mixup, autocast, num_epochs,
              updates_per_epoch, Progress(args.start_epoch or 0), Stop())
    set_output(run, data_config)
    if args.resume:
        resume(run, args.resume)
    if primary:
        utils.trim_summary(run.output_dir / 'summary.csv', run.progress.epoch)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(
            device_ids=[device] if device.type == 'cuda' else None,
            broadcast_buffers=not args.no_ddp_bb,
        )
    if primary:
        _logger.info(
            f'{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {len(datasets[0])} training '
            f'and {len(datasets[1])} validation images; {num_epochs} epochs of {updates_per_epoch} updates on '
            f'{args.world_size} x {device.type}; output in {run.output_dir}'
        )
    return run


def precision(args: Any, device: torch.device) -> tuple[Callable[[], Any], utils.NativeScaler | None]:
    """The autocast context, and the loss scaler that half precision needs."""
    if not args.amp:
        return nullcontext, None
    dtype = getattr(torch, args.amp_dtype or ('bfloat16' if device.type == 'cpu' else 'float16'))
    scaler = utils.NativeScaler(device=device.type) if dtype == torch.float16 else None
    return partial(torch.autocast, device_type=device.type, dtype=dtype), scaler


def set_output(run: Run, data_config: dict[str, Any]) -> None:
    """The run folder of the primary process: options, summary, checkpoints."""
    args = run.args
    if not utils.is_primary(args):
        return
    stamp = datetime.now().strftime('%Y%m%d-%H%M%S')
    name = args.experiment or f'{stamp}-{safe_model_name(args.model)}-{data_config["input_size"][-1]}'
    run.output_dir = Path(utils.get_outdir(args.output or './output/train', name))
    (run.output_dir / 'args.yaml').write_text(yaml.safe_dump(plain(args), default_flow_style=False))
    run.saver = utils.CheckpointSaver(
        model=None,
        optimizer=run.optimizer,
        task=run,
        amp_scaler=run.scaler,
        checkpoint_dir=str(run.output_dir),
        recovery_dir=str(run.output_dir),
        decreasing=args.eval_metric == 'loss',
        max_history=args.checkpoint_hist,
    )
    if args.resume and Path(args.resume).parent.resolve() == run.output_dir.resolve():
        run.saver.load_state_dict_from_checkpoint(args.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script.

    Returns:
        The exit status: 0, 2 after a mistake of the user's, 128 + the signal that stopped it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = train_parser().resolve(argv)
        args.argv = argv
        number = fit(start(args))
    except (OptionError, DataError, CheckpointError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 128 + number if number else 0


if __name__ == '__main__':
    sys.exit(main())
