"""Parameter groups and learning-rate schedules of segmenters."""

import itertools
import math
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.scheduler.scheduler import Scheduler

__all__ = ['NORM_DECAYS', 'SCHEDULES', 'IterationScheduler', 'create_schedule', 'parameter_groups']

NORM_DECAYS = ('all', 'heads', 'none')
SCHEDULES = ('poly', 'cosine', 'cosine_restarts')


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    norm_decay: str = 'all',
    layer_decay: float | None = None,
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups parameters by learning rate and weight decay.

    Args:
        model: A segmenter.
        weight_decay: Weight decay.
        norm_decay: ``'all'``: all parameters decay. ``'heads'``: norms, position embeddings and tables, and tokens of
            the backbone do not, as in the recipes of Swin and RegionProxy. ``'none'``: parameters with one dimension
            (norms and biases) and those of ``model.no_weight_decay()`` do not, which is timm's convention.
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
    undecayed = _undecayed(model, norm_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (last - layers.get(name, last)) if layer_decay is not None else 1.0
        if name.startswith(('head.', 'auxiliary.')):
            scale *= head_lr_scale
        decay = 0.0 if name in undecayed else weight_decay
        group = groups.setdefault((scale, decay), dict(params=[], weight_decay=decay, lr_scale=scale))
        group['params'].append(parameter)
    return list(groups.values())


def _undecayed(model: nn.Module, norm_decay: str) -> set[str]:
    """Returns the names of the parameters without weight decay, see `parameter_groups`."""
    if norm_decay == 'all':
        return set()
    parameters = dict(model.named_parameters())
    patterns = model.no_weight_decay()
    found = {name for name in parameters if any(fnmatch(name, pattern) for pattern in patterns)}
    if norm_decay == 'none':
        return found | {name for name, parameter in parameters.items() if parameter.ndim <= 1}
    for name, module in model.backbone.named_modules(prefix='backbone'):
        if getattr(module, 'weight', None) is not None and module.weight.ndim == 1:  # a norm
            found.update(f'{name}.{part}' for part, _ in module.named_parameters(recurse=False))
    return found


class IterationScheduler(Scheduler):
    """Learning rates of one or several periods, which fall to an absolute floor, as in mmcv.

    After n iterations the rate of a group is ``min_lr + (lr_scale * lr - min_lr) * fraction(n)``. timm's schedules
    multiply the floor by the group's ``lr_scale``, too. A warm-up multiplies the rate by a factor that rises linearly
    to 1.

    Args:
        optimizer: The optimizer.
        periods: Iterations of each period. The first one includes the warm-up.
        weights: Initial fraction of each period.
        power: Within a period the fraction falls by ``(1 - progress) ** power``; None for half a cosine.
        min_lr: The floor, the rate after the last period.
        warmup: Iterations of the warm-up.
        warmup_ratio: Factor at its start.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        periods: Sequence[int],
        weights: Sequence[float],
        power: float | None = None,
        min_lr: float = 0.0,
        warmup: int = 0,
        warmup_ratio: float = 1e-6,
    ):
        super().__init__(optimizer, 'lr', t_in_epochs=False)
        self.starts = [0, *itertools.accumulate(periods)]
        self.weights = list(weights)
        self.power = power
        self.min_lr = min_lr
        self.warmup = warmup
        self.warmup_ratio = warmup_ratio
        self.step_update(0)

    def fraction(self, n: int) -> float:
        """Returns the position between the floor (0) and the learning rate (1) after n iterations."""
        for start, end, weight in zip(self.starts, self.starts[1:], self.weights):
            if start <= n < end:
                progress = (n - start) / (end - start)
                shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.power is None else (1 - progress) ** self.power
                return weight * shape
        return 0.0

    def rate(self, n: int, lr: float) -> float:
        """Returns the rate after n iterations of parameters whose full rate is ``lr``."""
        rate = self.min_lr + (lr - self.min_lr) * self.fraction(n)
        if n < self.warmup:
            rate *= self.warmup_ratio + (1 - self.warmup_ratio) * n / self.warmup
        return rate

    def _get_lr(self, t: int) -> list[float]:
        scales = [group.get('lr_scale', 1.0) for group in self.optimizer.param_groups]
        # timm multiplies the result by the scale
        return [self.rate(t, lr * scale) / scale for lr, scale in zip(self.base_values, scales)]


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
) -> IterationScheduler:
    """Creates a schedule that is updated once per iteration: call ``step_update(n)`` after n iterations.

    Args:
        name: ``'poly'``: ``min_lr + (lr - min_lr) (1 - n / iterations) ** power``; ``'cosine'``;
            ``'cosine_restarts'``: cosine periods of given lengths and initial rates, as for RegionProxy.
        optimizer: The optimizer.
        iterations: Number of iterations of the run.
        power: Exponent of ``'poly'``.
        min_lr: Final learning rate of all parameters; the factor ``lr_scale`` of a group does not apply to it.
        warmup: Iterations of linear warm-up at the start of the schedule.
        warmup_ratio: Learning rate at the start of the warm-up, as a fraction of the full one.
        periods: Iterations of the periods of ``'cosine_restarts'`` (default: one period).
        restart_weights: Initial learning rate of each period, as a fraction (default: 1).

    Raises:
        ValueError: The name is unknown, the warm-up is too long, or the periods do not add up to the run.
    """
    if not 0 <= warmup < iterations:
        raise ValueError(f'Warm-up of {warmup} iterations does not fit a run of {iterations}.')
    if name not in SCHEDULES:
        raise ValueError(f'There is no schedule {name!r}: expected one of {", ".join(SCHEDULES)}.')
    if name != 'cosine_restarts':
        periods = restart_weights = None
    periods = list(periods or [iterations])
    weights = list(restart_weights or [1.0] * len(periods))
    if len(weights) != len(periods) or sum(periods) != iterations or min(periods) < 1:
        raise ValueError(
            f'Periods of {periods} iterations with weights {weights} do not fit: the periods (--periods) must be above '
            f'0 and add up to the run (--iterations {iterations}), with one weight each (--restart-weights).'
        )
    shape = power if name == 'poly' else None
    return IterationScheduler(optimizer, periods, weights, shape, min_lr, warmup, warmup_ratio)
