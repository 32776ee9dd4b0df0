"""Train a detector: ``cluster-zoo detect train``.

    cluster-zoo detect train DATA --detector mask_rcnn --backbone coc_tiny --min-size 256
    torchrun --nproc-per-node=8 -m cluster_zoo detect train COCO --detector mask_rcnn_coc_small_25 \
        --train-split train2017 --val-split val2017 --pretrained-backbone FILE --amp

The loop over iterations, checkpoints and resuming are those of ``segmentation/train.py``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from timm import utils
from timm.optim import create_optimizer_v2
from timm.scheduler import MultiStepLRScheduler
from timm.task import ClassificationTask
from torch import Tensor

from cluster_zoo.errors import OptionError
from cluster_zoo.training import engine, run_folder
from cluster_zoo.training.loggers import check_loggers
from cluster_zoo.training.optim import check_optimizer_name, optimizer_options
from cluster_zoo.training.runtime import option_errors, set_up_device, set_up_processes
from cluster_zoo.weights import load_state_dict
from segmentation import train as loop
from segmentation.detection.coco import CocoDataset, RandomCrop, create_dataset, eval_transform, train_transform
from segmentation.detection.detectors import create_detector, has_masks, load_detector_weights
from segmentation.detection.evaluation import average_precision, collate, evaluate, table
from segmentation.detection.options import model_arguments, train_parser
from segmentation.detection.published_systems import CONFIGS
from segmentation.engine.build import check_data
from segmentation.engine.optim import parameter_groups

__all__ = ['DetectionTask', 'main']

_logger = logging.getLogger(__name__)

_OUTPUT = './output/detection'  # parent of the folders of runs
_STEPS = (8 / 12, 11 / 12)  # parts of the published schedule after which the learning rate is divided by 10
_WARMUP = 500  # iterations of the published schedule
_WARMUP_START = 1e-3  # of the learning rate


class DetectionTask(ClassificationTask):
    """timm training task of a detector. The loss is the sum of the losses that torchvision's detector returns.

    Args:
        model: A detector of `create_detector`.
        device: Device of the task.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None):
        super().__init__(model, criterion=nn.Identity(), device=device, verbose=False)

    def forward(self, input: list[Tensor], target: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses = self.trainable_module(input, target)
        return dict(loss=sum(losses.values()), **losses)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> DetectionTask:
        # Evaluate without DDP, which waits for processes that have fewer batches.
        self.eval_model = self.get_eval_model()
        return super().prepare_distributed(device_ids, **ddp_kwargs)


@dataclass(kw_only=True)
class Run(loop.Run):
    """A run of iterations of a detector."""

    task: DetectionTask
    train_data: CocoDataset
    val_data: CocoDataset
    metrics: ClassVar[tuple[str, ...]] = ('box_AP', 'box_AP50', 'box_AP75')
    unit: ClassVar[str] = 'images'

    def base_lr(self) -> float:
        return self.optimizer.param_groups[0]['lr']

    def batches(self) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
        for images, targets in loop.training_loader(self, collate_fn=collate):
            yield (
                [_to(self, image) for image in images],
                [{name: _to(self, value) for name, value in target.items()} for target in targets],
            )

    def validate(self) -> dict[str, Any]:
        args, ema = self.args, self.task.has_ema()
        if args.distributed:
            for averaged in (False, True) if ema else (False,):  # as DDP does in each forward pass
                utils.distribute_bn(self.task.get_trainable_module(ema=averaged), args.world_size, reduce=False)
        metrics = evaluate(
            self.task.get_eval_model(ema=ema),
            self.val_data,
            args.device,
            self.autocast,
            args.validation_batch_size,
            args.workers,
            args.rank,
            args.world_size,
            self.stop,
        )
        if metrics:
            _logger.info(f'{"EMA" if ema else "Test"} after {self.iteration} iterations:\n{table(metrics)}')
        return metrics


@dataclass(kw_only=True)
class MaskRun(Run):
    """A run of a detector with masks."""

    metrics: ClassVar[tuple[str, ...]] = ('mask_AP', 'mask_AP50', 'mask_AP75', *Run.metrics)


def _to(run: Run, value: Any) -> Any:
    return value.to(run.args.device, non_blocking=True) if isinstance(value, Tensor) else value


def build_datasets(args: argparse.Namespace) -> tuple[CocoDataset, CocoDataset]:
    """Opens the training and validation splits. Sets ``args.num_classes`` and the length of the run."""
    if not args.detector:
        raise OptionError('no --detector given: mask_rcnn, faster_rcnn, retinanet, fcos, or a published one')
    masks = has_masks(args.detector)
    with option_errors('training data'):
        transform = train_transform(args.flip)
    train = create_dataset(args.data, args.train_split, transform, masks)
    val = create_dataset(args.data, args.val_split, eval_transform(), masks, crowd=True)
    if train.classes != val.classes:
        raise OptionError(
            f'--val-split {args.val_split} has other categories ({", ".join(val.classes)}) than --train-split '
            f'{args.train_split} ({", ".join(train.classes)})'
        )
    if args.num_classes not in (None, len(train.classes)):
        raise OptionError(f'--num-classes {args.num_classes}: the dataset has {len(train.classes)} categories')
    if len(val) < args.world_size:
        raise OptionError(f'{len(val)} validation images are too few for {args.world_size} processes')
    args.num_classes = len(train.classes)
    if not args.no_check_data:
        check_data(args, train, val)
    epoch = max(len(train) // (args.batch_size * args.grad_accum_steps * args.world_size), 1)
    args.iterations = args.iterations or args.epochs * epoch
    args.val_interval = args.val_interval or epoch
    return train, val


def build_model(args: argparse.Namespace) -> nn.Module:
    """Builds the detector to train, with its initial weights, on the device."""
    pretrained = True if args.pretrained_backbone == 'timm' else args.pretrained_backbone or False
    with option_errors('model', TypeError):
        model = create_detector(**model_arguments(args), pretrained_backbone=pretrained)
    if args.checkpoint:
        load_detector_weights(model, load_state_dict(args.checkpoint), args.checkpoint, new_classes=True)
    if args.grad_checkpointing:
        with option_errors('--grad-checkpointing', AttributeError):
            model.backbone.body.model.set_grad_checkpointing()
    return model.to(args.device)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> tuple[torch.optim.Optimizer, MultiStepLRScheduler]:
    """Builds the optimizer and its schedule, with warm-up and steps. Sets ``args.warmup`` and ``args.steps``."""
    check_optimizer_name(args.opt)
    args.steps = list(_STEPS if args.steps is None else args.steps)
    args.warmup = min(_WARMUP, args.iterations // 10) if args.warmup is None else args.warmup
    if not all(0 < step < 1 for step in args.steps) or args.warmup >= args.iterations:
        raise OptionError('--steps must be above 0 and below 1, and --warmup shorter than the run')
    with option_errors(f'--opt {args.opt}', TypeError):
        groups = parameter_groups(model, args.weight_decay)
        options = optimizer_options(args)
        optimizer = create_optimizer_v2(groups, args.opt, args.lr, args.weight_decay, args.momentum, **options)
    schedule = MultiStepLRScheduler(
        optimizer,
        [round(step * args.iterations) + 1 for step in sorted(args.steps)],  # timm's steps come one update early
        decay_rate=0.1,
        warmup_t=args.warmup,
        warmup_lr_init=_WARMUP_START * args.lr,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    return optimizer, schedule


def start(args: argparse.Namespace) -> Run:
    """Builds all parts of a run and restores it from ``--resume``."""
    average_precision(masks=False)  # before the training, which needs its libraries only to validate
    check_loggers(args)
    run_folder.check_output_dir(args, _OUTPUT)
    set_up_device(args, tf32=True)
    set_up_processes(args)
    utils.random_seed(args.seed)  # the same in all processes, so that their models start equal
    args.torchcompile = None  # the sizes of images and the numbers of objects change all the time
    train_data, val_data = build_datasets(args)
    model = build_model(args)
    if args.crop:
        sizes = model.transform.min_size, model.transform.max_size
        if args.crop > min(*sizes[0], sizes[1]):
            raise OptionError(f'--crop {args.crop} is larger than the resized images: --min-size, --max-size')
        model.transform.crop = args.crop
        train_data.transform = train_transform(args.flip, RandomCrop(args.crop, *sizes))
    optimizer, scheduler = build_optimizer(args, model)
    task = DetectionTask(model, torch.device(args.device))
    name = args.detector if args.detector in CONFIGS else f'{args.detector}_{args.backbone}'
    parts = dict(task=task, optimizer=optimizer, scheduler=scheduler, train_data=train_data, val_data=val_data)
    return loop.open_run(MaskRun if train_data.masks else Run, args, name, _OUTPUT, **parts)


def main(argv: Sequence[str] | None = None, prog: str = 'cluster-zoo detect train') -> int:
    """Runs the script and returns its exit status, see `run_training`."""
    return engine.run_training(train_parser(prog), start, loop.fit, argv)
