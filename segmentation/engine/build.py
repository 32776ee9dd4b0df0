"""Data, model, optimizer and schedule of a training run, built from the options."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler

from cluster_zoo.errors import OptionError
from cluster_zoo.training.model import set_centroid_learning
from cluster_zoo.training.optim import check_optimizer_name, optimizer_options
from cluster_zoo.training.runtime import in_first_process, option_errors

from ..data.datasets import SegmentationDataset, create_dataset
from ..data.transforms import eval_transform, train_transform
from ..models.backbones import fixed_size_message
from ..models.segmenter import Segmenter, create_segmenter
from .losses import PixelLoss
from .optim import create_schedule, parameter_groups
from .shared_options import label_remap, model_options

__all__ = ['build_datasets', 'build_eval_transform', 'build_loss', 'build_model', 'build_optimizer', 'check_data']
__all__ += ['syncs_batch_norm']

_logger = logging.getLogger(__name__)


def _normalization(args: argparse.Namespace) -> dict[str, list[float]]:
    return {name: getattr(args, name) for name in ('mean', 'std') if getattr(args, name) is not None}


def build_eval_transform(args: argparse.Namespace, scales: tuple[float, ...] | list[float] = (1.0,)) -> Callable:
    """Returns the transform of validation and test images."""
    with option_errors('test images'):
        return eval_transform(args.test_scale, args.test_multiple, scales, **_normalization(args))


def build_datasets(args: argparse.Namespace) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Opens the training and validation splits. Sets ``args.num_classes``."""
    with option_errors('training data'):
        transform = train_transform(
            tuple(args.crop) if len(args.crop) == 2 else args.crop[0],
            tuple(args.scale),
            tuple(args.ratio),
            args.max_category,
            args.flip,
            not args.no_distort,
            **_normalization(args),
        )
    common = dict(num_classes=args.num_classes, remap=label_remap(args), workers=max(args.workers, 1))
    train = create_dataset(args.dataset, args.data, args.train_split, transform, **common)
    val = create_dataset(args.dataset, args.data, args.val_split, build_eval_transform(args), **common)
    args.num_classes = len(train.classes)
    if both := len({sample.image for sample in train.samples} & {sample.image for sample in val.samples}):
        _logger.warning(
            f'{both} of {len(val)} validation images are also training images: --train-split {args.train_split} '
            f'--val-split {args.val_split}'
        )
    if not args.no_check_data:
        check_data(args, train, val)
    return train, val


def build_loss(args: argparse.Namespace, dataset: SegmentationDataset) -> PixelLoss:
    """Builds the loss of ``--loss``. Reads all masks of the dataset for ``--class-weights balanced``."""
    weights = _class_weights(args, dataset) if args.class_weights else None
    return PixelLoss(args.loss, weights, args.focal_gamma, tuple(args.tversky_weights), dataset.ignore_index)


def _class_weights(args: argparse.Namespace, dataset: SegmentationDataset) -> list[float]:
    if args.class_weights == ['balanced']:
        group = _patient_group(args)
        counts = np.array(in_first_process(args, lambda: dataset.count_pixels(max(args.workers, 1)).tolist(), group))
        weights = np.where(counts == 0, 1.0, counts.sum() / (len(counts) * np.maximum(counts, 1)))
        _logger.info(f'--class-weights: {weights.min():.3g} to {weights.max():.3g} for {len(weights)} classes.')
        return weights.tolist()
    weights = [float(weight) for weight in args.class_weights]
    if len(weights) != len(dataset.classes):
        raise OptionError(
            f'--class-weights has {len(weights)} numbers, but there are {len(dataset.classes)} classes: give one for '
            f'each, in this order: {", ".join(dataset.classes)}'
        )
    return weights


def _patient_group(args: argparse.Namespace) -> dist.ProcessGroup | None:
    """Returns a process group that waits while one process reads the data, which on slow storage takes long."""
    return dist.new_group(backend='gloo', timeout=timedelta(days=1)) if args.distributed else None


def check_data(args: argparse.Namespace, *datasets: SegmentationDataset) -> None:
    """Reads all images and masks in the first process. An error is raised in all processes."""

    def check() -> None:
        for dataset in datasets:
            dataset.check(max(args.workers, 1))

    in_first_process(args, check, _patient_group(args))


def build_model(args: argparse.Namespace) -> Segmenter:
    """Builds the segmenter to train, with its initial weights, on the device."""
    arguments = model_options(args)
    pretrained = True if args.pretrained_backbone == 'timm' else args.pretrained_backbone or False
    with option_errors('model', TypeError):
        model = create_segmenter(pretrained_backbone=pretrained, checkpoint_path=args.checkpoint, **arguments)
    _check_sizes(args, model)
    set_centroid_learning(model, args)
    if args.grad_checkpointing:
        with option_errors('--grad-checkpointing', AttributeError):
            model.set_grad_checkpointing()
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(device=args.device, memory_format=layout)
    return convert_sync_batchnorm(model) if syncs_batch_norm(args) else model


def _check_sizes(args: argparse.Namespace, model: Segmenter) -> None:
    """Raises OptionError if crops or test images can be larger than the fixed size of a backbone."""
    img_size = getattr(model.backbone, 'img_size', None)
    if img_size is None:
        return
    test = args.test_crop if args.test_mode == 'slide' else args.test_scale
    if test is None or max(*args.crop, *test) > min(img_size):
        raise OptionError(fixed_size_message(img_size))


def syncs_batch_norm(args: argparse.Namespace) -> bool:
    """Returns whether to synchronize batch norm: ``--sync-bn``, by default for published systems on GPUs."""
    wanted = bool(args.segmenter) and torch.device(args.device).type != 'cpu' if args.sync_bn is None else args.sync_bn
    return args.distributed and wanted


def build_optimizer(args: argparse.Namespace, model: Segmenter) -> tuple[torch.optim.Optimizer, Scheduler]:
    """Builds the optimizer, with parameter groups by learning rate and weight decay, and its schedule."""
    check_optimizer_name(args.opt)
    groups = parameter_groups(model, args.weight_decay, args.norm_decay, args.layer_decay, args.head_lr_scale)
    with option_errors(f'--opt {args.opt}', TypeError):
        options = optimizer_options(args)
        optimizer = create_optimizer_v2(groups, args.opt, args.lr, args.weight_decay, args.momentum, **options)
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
