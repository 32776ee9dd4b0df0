"""Losses and weights that are not finite, which are found before they reach a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ['SKIPPED_UPDATES', 'LossRecord', 'finite_metrics', 'has_finite_weights']

SKIPPED_UPDATES = 20  # in a row, for the loss scaler of float16, which halves its scale after each


@dataclass
class LossRecord:
    """Losses since the last check. They stay on the device until the check, so that training does not wait for it.

    Args:
        allowed: Number of losses in a row that may be NaN or infinite. The loss scaler of float16 skips such updates.
    """

    allowed: int = 0
    streak: int = 0  # of the losses that are checked
    waiting: list[tuple[Tensor, str, float]] = field(default_factory=list)

    def add(self, loss: Tensor, position: str, lr: float) -> None:
        """Adds a loss of one element, where in the run it is, and the learning rate of its update."""
        self.waiting.append((loss.detach().reshape(()), position, lr))

    def failure(self) -> tuple[str, float] | None:
        """Reads the losses that were added. Returns position and learning rate of the first that is one too many."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return None
        finite = torch.stack([loss for loss, *_ in waiting]).isfinite().tolist()
        for (_, position, lr), is_finite in zip(waiting, finite):
            self.streak = 0 if is_finite else self.streak + 1
            if self.streak > self.allowed:
                return position, lr
        return None


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics, or NaN for all of them if the loss is not finite: the largest of NaN logits is class 0."""
    return dict(metrics) if math.isfinite(metrics['loss']) else dict.fromkeys(metrics, math.nan)


@torch.no_grad()
def has_finite_weights(model: nn.Module) -> bool:
    """Returns whether all parameters are finite, and no buffer is NaN. An infinite buffer can be a mask."""
    tests = [parameter.isfinite().all() for parameter in model.parameters()]
    tests += [~buffer.isnan().any() for buffer in model.buffers() if buffer.is_floating_point()]
    return not tests or bool(torch.stack(tests).all())
