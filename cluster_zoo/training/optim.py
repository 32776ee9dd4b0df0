"""Task, optimizer and learning rate schedule of a run, built from the options."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from timm import utils
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)

from ..datasets import class_counts
from ..errors import OptionError, nearest
from ..layers.nearest_centroid import centroid_heads
from .model import check_model_name
from .runtime import model_dtype, option_errors
from .tasks import with_centroid_learning
from .train_options import is_mixing

__all__ = [
    'build_optimizer',
    'build_scheduler',
    'build_task',
    'check_optimizer_name',
    'optimizer_options',
    'shorten_warmup',
]

_logger = logging.getLogger(__name__)

_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def build_task(args: argparse.Namespace, model: nn.Module, dataset: Any = None) -> TrainingTask:
    """Builds timm's task: the model, its loss and, for distillation, its teacher. Centroids learn in any task.

    Args:
        args: Options of the run.
        model: The model.
        dataset: Training split, for ``--class-weights``.
    """
    uses_bce = args.bce_loss or bool(args.multi_label)
    criterion = dict(
        loss_type='jsd' if args.jsd_loss else 'bce' if uses_bce else 'ce',
        smoothing=args.smoothing,
        soft_targets=is_mixing(args),
        jsd_splits=args.aug_splits,
    )
    if uses_bce:
        criterion |= dict(
            bce_sum=args.bce_sum,
            bce_target_thresh=args.bce_target_thresh,
            pos_weight=args.bce_pos_weight,
        )
    task_cls, options = ClassificationTask, {}
    if args.multi_label:
        if args.kd_model_name is not None or centroid_heads(model):
            raise OptionError('--multi-label cannot be combined with --kd-model-name or nearest-centroid models')
        task_cls = MultiLabelClassificationTask
    if args.class_weights:
        weights = _class_weights(args, dataset)
        if uses_bce:
            criterion['pos_weight' if args.multi_label else 'class_weight'] = weights
        else:  # timm's cross-entropy takes no weights; with mixup, the targets are smooth already
            smoothing = 0.0 if is_mixing(args) else args.smoothing
            options['criterion'] = nn.CrossEntropyLoss(torch.tensor(weights), label_smoothing=smoothing)
            criterion = None
    if args.kd_model_name is not None:
        check_model_name(args.kd_model_name, '--kd-model-name')
        task_cls, distillation = _distillation(args)
        options |= distillation
    if centroid_heads(model):
        task_cls = with_centroid_learning(task_cls)
    with option_errors(f'--kd-model-name {args.kd_model_name}'):
        task = task_cls(
            model,
            criterion_kwargs=criterion,
            device=torch.device(args.device),
            dtype=model_dtype(args),
            verbose=utils.is_primary(args),
            **options,
        )
    # On a CPU, unlike on a GPU, autocast would compute and accumulate the loss in bfloat16.
    task.criterion.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
    return task


def _class_weights(args: argparse.Namespace, dataset: Any) -> list[float]:
    """Returns the balanced weight of each class, or with several labels that of positive targets.

    The weights N / (K n) of K classes with n of N images each have a mean of 1 over the images. With several labels, a
    class is a binary decision, and the weight (N - n) / n balances both sides.
    """
    counts, total = class_counts(dataset, args.num_classes)
    known = np.maximum(counts, 1)
    weights = (total - counts) / known if args.multi_label else total / (len(counts) * known)
    weights[counts == 0] = 1.0
    _logger.info(f'--class-weights: {weights.min():.3g} to {weights.max():.3g} for {len(weights)} classes.')
    return weights.astype(np.float32).tolist()


def _distillation(args: argparse.Namespace) -> tuple[type[TrainingTask], dict[str, Any]]:
    """Task class of ``--kd-distill-type`` and its arguments."""
    options = dict(
        teacher_model=args.kd_model_name,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    if args.kd_distill_type == 'feature':
        options |= dict(
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
        )
        return FeatureDistillationTask, options
    options['temperature'] = args.kd_temperature
    if args.kd_distill_type == 'token':
        return TokenDistillationTask, options | dict(distill_type=args.kd_token_distill_type)
    return LogitDistillationTask, options | dict(loss_type=args.kd_loss_type)


def check_optimizer_name(name: str) -> None:
    """Raises `OptionError`, with the nearest names, for an optimizer that timm does not have."""
    known = list_optimizers()
    if name.lower().removeprefix('lookahead_') not in known:
        raise OptionError(f'--opt: there is no optimizer {name!r}{nearest(name.lower(), known)}')


def optimizer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns ``--opt-kwargs``, on CUDA with ``fused=True`` for SGD, Adam and AdamW of PyTorch.

    A fused optimizer updates all parameters in a few kernels, and the loss scaler of float16 does not wait for the
    device. ``--opt-kwargs fused=False`` turns it off.
    """
    optimizer = get_optimizer_info(args.opt.lower().removeprefix('lookahead_')).opt_class
    is_chosen = not {'fused', 'foreach', 'differentiable'}.isdisjoint(args.opt_kwargs)
    if is_chosen or optimizer not in _FUSED or not args.device.startswith('cuda'):
        return args.opt_kwargs
    return args.opt_kwargs | dict(fused=True)


def build_optimizer(args: argparse.Namespace, task: TrainingTask) -> torch.optim.Optimizer:
    """Builds the optimizer. Sets ``args.lr`` from the base rate and the images of an update if it is not given."""
    if args.lr is None:
        ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
        args.lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
        _logger.info(f'Learning rate {args.lr:.4g}: {args.lr_base:g} at {args.lr_base_size} images, {scale} scaling.')
    check_optimizer_name(args.opt)
    with option_errors(f'--opt {args.opt}', TypeError):
        return create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **optimizer_options(args))


def shorten_warmup(args: argparse.Namespace) -> None:
    """Shortens the warm-up and the cool-down of a recipe in a run that is short for them.

    If both together are longer than half of ``--epochs``, each gets at most a tenth of it. Values that the user has set
    are not changed.
    """
    before = (args.warmup_epochs, args.cooldown_epochs)
    if 2 * sum(before) > args.epochs:
        for name in ('warmup_epochs', 'cooldown_epochs'):
            if args.sources.get(name) not in ('flag', 'config'):
                setattr(args, name, min(getattr(args, name), args.epochs // 10))
    if (args.warmup_epochs, args.cooldown_epochs) != before:
        _logger.info(
            f'{args.epochs} epochs are too few for {before[0]} epochs of warm-up and {before[1]} of cool-down: '
            f'the run has {args.warmup_epochs} and {args.cooldown_epochs} (others: --warmup-epochs, --cooldown-epochs).'
        )
    elif args.warmup_epochs >= args.epochs > 0 and args.sched != 'none':
        _logger.warning(f'--warmup-epochs {args.warmup_epochs} is not shorter than --epochs {args.epochs}.')


def build_scheduler(
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
) -> tuple[Any, int]:
    """Builds the scheduler.

    Returns:
        The scheduler, None for ``--sched none``, and the number of epochs including warm-up prefix and cool-down.
    """
    with option_errors(f'--sched {args.sched}'):
        return create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
