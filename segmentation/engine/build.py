"""The parts of a training run, each built from the options: data, model, optimizer and schedule.

What timm or PyTorch refuse becomes an :class:`~cluster_zoo.training.options.OptionError` that names the option.
"""

from __future__ import annotations

import argparse
from datetime import timedelta

import torch
import torch.distributed as dist
from timm import utils
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler.scheduler import Scheduler

from cluster_zoo.errors import DataError, OptionError, nearest
from cluster_zoo.layers.nearest_centroid import centroid_heads
from cluster_zoo.training.build import option_errors, set_centroid_learning

from ..data.datasets import SegmentationDataset, create_dataset
from ..data.transforms import eval_transform, train_transform
from ..models.segmenter import Segmenter, create_segmenter
from .optim import create_schedule, parameter_groups
from .options import label_remap, model_options


def build_datasets(args: argparse.Namespace) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation split. Sets ``args.num_classes``."""
    normalisation = {name: getattr(args, name) for name in ('mean', 'std') if getattr(args, name) is not None}
    with option_errors('training data'):
        transform = train_transform(
            tuple(args.crop) if len(args.crop) == 2 else args.crop[0],
            tuple(args.scale),
            tuple(args.ratio),
            args.max_category,
            args.flip,
            not args.no_distort,
            **normalisation,
        )
    common = dict(num_classes=args.num_classes, remap=label_remap(args), workers=max(args.workers, 1))
    train = create_dataset(args.dataset, args.data, args.train_split, transform, **common)
    with option_errors('validation data'):
        transform = eval_transform(args.test_scale, args.test_multiple, **normalisation)
    val = create_dataset(args.dataset, args.data, args.val_split, transform, **common)
    args.num_classes = len(train.classes)
    if not args.no_check_data:
        check_data(args, train, val)
    return train, val


def check_data(args: argparse.Namespace, *datasets: SegmentationDataset) -> None:
    """Opens every image and mask, in the first process, and fails in all of them."""
    # Slow storage may take longer than the device's own queue lets the other processes wait.
    group = dist.new_group(backend='gloo', timeout=timedelta(days=1)) if args.distributed else None
    fault = [None]
    if utils.is_primary(args):
        try:
            for dataset in datasets:
                dataset.check(max(args.workers, 1))
        except DataError as error:
            fault = [str(error)]
    if args.distributed:
        dist.broadcast_object_list(fault, group=group)
    if fault[0] is not None:
        raise DataError(fault[0])


def build_model(args: argparse.Namespace) -> Segmenter:
    """The segmenter to train, with the weights that it starts from, on the device."""
    arguments = model_options(args)
    with option_errors('model'):
        pretrained = True if args.pretrained_backbone == 'timm' else args.pretrained_backbone or False
        model = create_segmenter(pretrained_backbone=pretrained, checkpoint_path=args.checkpoint, **arguments)
    typed = [name for name in args.given if name.startswith('centroid_')]
    if typed and not centroid_heads(model):
        raise OptionError(f'--{typed[0].replace("_", "-")}: only --classifier dnc has centroids')
    set_centroid_learning(model, args)
    if args.grad_checkpointing:
        with option_errors('--grad-checkpointing'):
            model.set_grad_checkpointing()
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(device=args.device, memory_format=layout)
    return convert_sync_batchnorm(model) if syncs_batch_norm(args) else model


def syncs_batch_norm(args: argparse.Namespace) -> bool:
    """Whether batch-norm sees the crops of all processes. Unless told, as all published systems were trained so."""
    wanted = bool(args.segmenter) and torch.device(args.device).type != 'cpu' if args.sync_bn is None else args.sync_bn
    return args.distributed and wanted


def build_optimizer(args: argparse.Namespace, model: Segmenter) -> tuple[torch.optim.Optimizer, Scheduler]:
    """The optimizer, with a learning rate for each group of parameters, and its schedule."""
    known = list_optimizers()
    if args.opt.lower().removeprefix('lookahead_') not in known:
        raise OptionError(f'--opt: there is no optimizer {args.opt!r}{nearest(args.opt.lower(), known)}')
    groups = parameter_groups(model, args.weight_decay, not args.no_norm_decay, args.layer_decay, args.head_lr_scale)
    with option_errors(f'--opt {args.opt}'):
        optimizer = create_optimizer_v2(groups, args.opt, args.lr, args.weight_decay, args.momentum, **args.opt_kwargs)
    with option_errors(f'--schedule {args.schedule}'):
        scheduler = create_schedule(
            args.schedule,
            optimizer,
            args.iterations,
            power=args.power,
            min_lr=args.min_lr,
            warmup=args.warmup,
            warmup_ratio=args.warmup_ratio,
            periods=args.periods,
            restart_weights=args.restart_weights,
        )
    return optimizer, scheduler
