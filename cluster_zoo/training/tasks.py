"""timm's training tasks, for models whose centroids learn."""

import functools
from typing import Any

import torch
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor

from ..layers.nearest_centroid import NearestCentroidHead, centroid_heads

__all__ = ['NearestCentroidTask', 'split_learning_state', 'with_centroid_learning']


class CentroidTaskMixin(TrainingTask):
    """What a task gets, in front of its own class, so that the centroids of its model learn from every batch.

    A batch is learned when its gradients have been taken, because these need the centroids of the forward pass:
    `update_ema` does it, which a training loop calls after each update, or else the next `forward`.
    """

    _target: Tensor | None = None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """As the task itself, with ``contrast_loss`` added where the heads have one."""
        self.learn_last_batch()
        result = super().forward(input, target)
        heads = [head for head in centroid_heads(self.get_trainable_module()) if head.training]
        if heads:
            self._target = target
        for head in heads:
            if head.learning.contrast > 0:
                contrast = head.contrast_loss(self._target_of(head))
                result |= dict(loss=result['loss'] + head.learning.contrast * contrast, contrast_loss=contrast)
        return result

    def learn_last_batch(self) -> None:
        """Learn the last batch if that has not been done. With several processes all have to call it."""
        if self._target is None:
            return
        for head in centroid_heads(self.get_trainable_module()):
            head.learn(self._target_of(head))
        self._target = None

    def centroid_target(self, target: Tensor, shape: torch.Size) -> Tensor:
        """What the features that a head has seen are examples of; for a task whose batches are no such targets.

        Args:
            target: Of the batch.
            shape: Of the features, without their width; targets that are class indices have the same.
        """
        return target

    def _target_of(self, head: NearestCentroidHead) -> Tensor:
        # Without features the head itself says what is wrong.
        return self._target if head._seen is None else self.centroid_target(self._target, head._seen.shape[:-1])

    @torch.no_grad()
    def update_ema(self, step: int | None = None) -> None:
        """Average the weights; the averaged model has the centroids themselves, which are averages already."""
        self.learn_last_batch()
        heads, averages = (centroid_heads(self.get_trainable_module(ema=ema)) for ema in (False, True))
        for head in (*heads, *averages):
            head.drop_anchors()  # timm averages entry by entry, and only one of the two may have the record
        super().update_ema(step)
        for head, averaged in zip(heads, averages):
            averaged.prototypes.copy_(head.prototypes)

    def learning_state(self) -> list[dict[str, Any]]:
        """What the heads remember in this process, see `NearestCentroidHead.learning_state`."""
        return [head.learning_state() for head in centroid_heads(self.get_trainable_module())]

    def load_learning_state(self, states: list[list[dict[str, Any]]]) -> None:
        """Go on from what `learning_state` gave, in one process or in several whose memories become this one's."""
        for head, of_head in zip(centroid_heads(self.get_trainable_module()), zip(*states)):
            head.load_learning_state(*of_head)


def split_learning_state(learned: list[Any], rank: int, world_size: int) -> list[Any]:
    """Of the `learning_state` of every process, what one goes on with, perhaps among another number of processes.

    With fewer processes than before it gets several memories, with more it may be none.
    """
    return learned[rank::world_size] or [[head | dict(memory=None) for head in heads] for heads in learned[:1]]


@functools.cache
def with_centroid_learning(task_class: type[TrainingTask]) -> type[TrainingTask]:
    """A subclass of any of timm's task classes, in which the centroids of the model learn.

    Example:
        >>> task = with_centroid_learning(LogitDistillationTask)(model, teacher_model='resnet50')
    """
    namespace = dict(__module__=__name__, __doc__=f'{task_class.__name__} for models with nearest-centroid heads.')
    return type(f'NearestCentroid{task_class.__name__}', (CentroidTaskMixin, task_class), namespace)


class NearestCentroidTask(CentroidTaskMixin, ClassificationTask):
    """timm's `ClassificationTask` for models with a `NearestCentroidHead`; for other models it is just that.

    Example:
        >>> task = NearestCentroidTask(timm.create_model('dnc_resnet18'))
        >>> task(images, target)['loss'].backward()
        >>> optimizer.step()
        >>> task.update_ema()
    """
