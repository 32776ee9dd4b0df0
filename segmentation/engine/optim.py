"""What an optimizer gets of a segmenter, and how its learning rate goes with the iterations."""

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
_HEAD = ('head.', 'auxiliary.')


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    decay_norms: bool = True,
    layer_decay: float | None = None,
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameters that share a learning rate and a weight decay.

    Args:
        model: A segmenter.
        weight_decay: Of the parameters that decay.
        decay_norms: Whether all of them do. If not, everything of one dimension (norms, biases) and what
            ``model.no_weight_decay()`` names (positions, class token) has none. That biases have none either is timm's
            convention; the authors' code lets them decay, and leaves out norms only.
        layer_decay: Factor of the learning rate from each layer to the one before, by ``model.group_matcher``. The
            decoder and the classifier are the last layer.
        head_lr_scale: Factor of the learning rate of decoder, classifier and auxiliary head.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``lr_scale``, which timm's schedules multiply the rate with.
    """
    layers: dict[str, int] = {}
    if layer_decay is not None:
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values(), default=0)
    kept = () if decay_norms else model.no_weight_decay()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (last - layers.get(name, last)) if layer_decay is not None else 1.0
        if name.startswith(_HEAD):
            scale *= head_lr_scale
        decays = decay_norms or (parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in kept))
        decay = weight_decay if decays else 0.0
        group = groups.setdefault((scale, decay), dict(params=[], weight_decay=decay, lr_scale=scale))
        group['params'].append(parameter)
    return list(groups.values())


class CosineRestartScheduler(Scheduler):
    """Cosine cycles of any lengths, each from its own share of the learning rate to the minimum.

    timm's cosine schedule multiplies both from one cycle to the next by a factor; RegionProxy's are a table.

    Args:
        optimizer: Whose learning rate it sets.
        periods: Iterations of each cycle.
        weights: Where each starts, between the minimum (0) and the learning rate (1).
        lr_min: The minimum.
        warmup_t: Iterations of linear warm-up, within the first cycle.
        warmup_lr_init: Where warm-up starts.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        periods: Sequence[int],
        weights: Sequence[float],
        lr_min: float = 0.0,
        warmup_t: int = 0,
        warmup_lr_init: float = 0.0,
    ):
        super().__init__(optimizer, param_group_field='lr', t_in_epochs=False)
        self.starts = [0, *itertools.accumulate(periods)]
        self.weights = list(weights)
        self.lr_min = lr_min
        self.warmup_t = warmup_t
        self.warmup_lr_init = warmup_lr_init
        if warmup_t:
            self.update_groups(warmup_lr_init)

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            passed = t / self.warmup_t
            return [self.warmup_lr_init + passed * (lr - self.warmup_lr_init) for lr in self.base_values]
        for start, end, weight in zip(self.starts, self.starts[1:], self.weights):
            if t < end:
                share = weight * 0.5 * (1 + math.cos(math.pi * (t - start) / (end - start)))
                return [self.lr_min + share * (lr - self.lr_min) for lr in self.base_values]
        return [self.lr_min for _ in self.base_values]


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
    """A schedule by iterations: ``step_update(n)`` sets the rate of the iteration after the first n.

    Args:
        name: ``'poly'``: ``min_lr + (lr - min_lr) (1 - n / iterations) ** power``; ``'cosine'``;
            ``'cosine_restarts'``, see `CosineRestartScheduler`.
        optimizer: Whose learning rate it sets; the scale of each group (``lr_scale``) applies to ``min_lr`` too.
        iterations: Of the whole run.
        power: Of ``'poly'``.
        min_lr: Where the rate ends.
        warmup: Iterations in which the rate rises linearly to its full value, within the schedule.
        warmup_ratio: Share of the learning rate that warm-up starts from.
        periods: Iterations of the cycles of ``'cosine_restarts'``.
        restart_weights: Height of each of them.

    Raises:
        ValueError: Unknown name, warm-up as long as the run, or cycles that do not make up the run.
    """
    if not 0 <= warmup < iterations:
        raise ValueError(f'Warm-up of {warmup} iterations does not fit a run of {iterations}.')
    warming = dict(warmup_t=warmup, warmup_lr_init=warmup_ratio * optimizer.param_groups[0]['lr'])
    if name == 'poly':
        return PolyLRScheduler(optimizer, iterations, power=power, lr_min=min_lr, t_in_epochs=False, **warming)
    if name == 'cosine':
        return CosineLRScheduler(optimizer, iterations, lr_min=min_lr, t_in_epochs=False, **warming)
    if name != 'cosine_restarts':
        raise ValueError(f'There is no schedule {name!r}: expected one of {", ".join(SCHEDULES)}.')
    periods = list(periods or [iterations])
    weights = list(restart_weights or [1.0] * len(periods))
    if len(weights) != len(periods) or sum(periods) != iterations or min(periods) < 1:
        raise ValueError(
            f'Cosine cycles of {periods} iterations with weights {weights} do not make up a run of {iterations}: '
            'the cycles have to add up to it, with one weight each.'
        )
    return CosineRestartScheduler(optimizer, periods, weights, lr_min=min_lr, **warming)
