"""Parameter groups and learning-rate schedules of segmenters."""

import itertools
import math
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler

__all__ = ['SCHEDULES', 'CosineRestartScheduler', 'create_schedule', 'parameter_groups']

SCHEDULES = ('poly', 'cosine', 'cosine_restarts')


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    decay_norms: bool = True,
    layer_decay: float | None = None,
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups parameters by learning rate and weight decay.

    Args:
        model: A segmenter.
        weight_decay: Weight decay.
        decay_norms: Whether all parameters decay. Otherwise those with one dimension (norms, biases) and those of
            ``model.no_weight_decay()`` do not, which is timm's convention. (In the authors' code biases decay.)
        layer_decay: Factor on the learning rate from each layer to the previous one, see ``model.group_matcher``. The
            heads are the last layer.
        head_lr_scale: Factor on the learning rate of the heads.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``lr_scale``, a factor that timm's schedules apply.
    """
    layers: dict[str, int] = {}
    if layer_decay is not None:
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values(), default=0)
    no_decay = () if decay_norms else model.no_weight_decay()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (last - layers.get(name, last)) if layer_decay is not None else 1.0
        if name.startswith(('head.', 'auxiliary.')):
            scale *= head_lr_scale
        decays = decay_norms or (parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in no_decay))
        decay = weight_decay if decays else 0.0
        group = groups.setdefault((scale, decay), dict(params=[], weight_decay=decay, lr_scale=scale))
        group['params'].append(parameter)
    return list(groups.values())


class CosineRestartScheduler(CosineLRScheduler):
    """Cosine periods of given lengths and initial learning rates, as for RegionProxy.

    timm's cosine schedule multiplies both by a constant factor from one period to the next.

    Args:
        optimizer: The optimizer.
        periods: Iterations of each period. The first one includes the warm-up.
        weights: Initial learning rate of each period, between ``lr_min`` (0) and the learning rate (1).
        **kwargs: Options of timm's schedule, such as ``lr_min`` and ``warmup_t``.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, periods: Sequence[int], weights: Sequence[float], **kwargs: Any
    ):
        super().__init__(optimizer, sum(periods), t_in_epochs=False, **kwargs)
        self.starts = [0, *itertools.accumulate(periods)]
        self.weights = list(weights)

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            return super()._get_lr(t)
        fraction = 0.0
        for start, end, weight in zip(self.starts, self.starts[1:], self.weights):
            if start <= t < end:
                fraction = weight * 0.5 * (1 + math.cos(math.pi * (t - start) / (end - start)))
        return [self.lr_min + fraction * (lr - self.lr_min) for lr in self.base_values]


def create_schedule(
    name: str,
    optimizer: torch.optim.Optimizer,
    iterations: int,
    *,
    power: float = 0.9,
    min_lr: float = 0.0,
    warmup: int = 0,
    warmup_ratio: float = 1e-6,
    periods: Sequence[int] | None = None,
    restart_weights: Sequence[float] | None = None,
) -> Scheduler:
    """Creates a schedule that is updated once per iteration: call ``step_update(n)`` after n iterations.

    Args:
        name: ``'poly'``: ``min_lr + (lr - min_lr) (1 - n / iterations) ** power``; ``'cosine'``;
            ``'cosine_restarts'``, see `CosineRestartScheduler`.
        optimizer: The optimizer. The factor ``lr_scale`` of a group applies to ``min_lr``, too.
        iterations: Number of iterations of the run.
        power: Exponent of ``'poly'``.
        min_lr: Final learning rate.
        warmup: Iterations of linear warm-up at the start of the schedule.
        warmup_ratio: Learning rate at the start of the warm-up, as a fraction of the full one.
        periods: Iterations of the periods of ``'cosine_restarts'`` (default: one period).
        restart_weights: Initial learning rate of each period, as a fraction (default: 1).

    Raises:
        ValueError: The name is unknown, the warm-up is too long, or the periods do not add up to the run.
    """
    if not 0 <= warmup < iterations:
        raise ValueError(f'Warm-up of {warmup} iterations does not fit a run of {iterations}.')
    options = dict(lr_min=min_lr, warmup_t=warmup, warmup_lr_init=warmup_ratio * optimizer.param_groups[0]['lr'])
    if name == 'poly':
        return PolyLRScheduler(optimizer, iterations, power=power, t_in_epochs=False, **options)
    if name == 'cosine':
        return CosineLRScheduler(optimizer, iterations, t_in_epochs=False, **options)
    if name != 'cosine_restarts':
        raise ValueError(f'There is no schedule {name!r}: expected one of {", ".join(SCHEDULES)}.')
    periods = list(periods or [iterations])
    weights = list(restart_weights or [1.0] * len(periods))
    if len(weights) != len(periods) or sum(periods) != iterations or min(periods) < 1:
        raise ValueError(
            f'Periods of {periods} iterations with weights {weights} do not fit: the periods (--periods) must be above '
            f'0 and add up to the run (--iterations {iterations}), with one weight each (--restart-weights).'
        )
    return CosineRestartScheduler(optimizer, periods, weights, **options)
