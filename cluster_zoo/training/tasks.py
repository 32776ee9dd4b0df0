"""timm's training tasks for models with nearest-centroid heads."""

import functools
from typing import Any

import torch
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor

from ..layers.nearest_centroid import NearestCentroidHead, centroid_heads

__all__ = ['NearestCentroidTask', 'split_learning_state', 'with_centroid_learning']


class CentroidTaskMixin(TrainingTask):
    """Mixin for a task that updates the centroids of its model with every batch.

    The gradients need the centroids of the forward pass. So the centroids are updated in `update_ema`, which a training
    loop calls after each update, or in the next `forward`.
    """

    _target: Tensor | None = None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Computes the losses of the task, and adds ``contrast_loss`` if the heads have one."""
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
        """Updates the centroids with the last batch, once. With several processes all have to call this."""
        if self._target is None:
            return
        for head in centroid_heads(self.get_trainable_module()):
            head.learn(self._target_of(head))
        self._target = None

    def centroid_target(self, target: Tensor, shape: torch.Size) -> Tensor:
        """Returns the targets of the features of a head. Tasks override this if they differ from the batch's targets.

        Args:
            target: Targets of the batch.
            shape: Shape of the features without their width, which is the shape of targets that are class indices.
        """
        return target

    def _target_of(self, head: NearestCentroidHead) -> Tensor:
        # Without features, head.learn raises an error.
        return self._target if head._seen is None else self.centroid_target(self._target, head._seen.shape[:-1])

    @torch.no_grad()
    def update_ema(self, step: int | None = None) -> None:
        """Averages the weights. Centroids are averages already, so the averaged model gets a copy of them."""
        self.learn_last_batch()
        heads, averages = (centroid_heads(self.get_trainable_module(ema=ema)) for ema in (False, True))
        for head in (*heads, *averages):
            head.drop_anchors()  # timm averages buffers in pairs, and only one model may have these
        super().update_ema(step)
        for head, averaged in zip(heads, averages):
            averaged.prototypes.copy_(head.prototypes)

    def learning_state(self) -> list[dict[str, Any]]:
        """Returns `NearestCentroidHead.learning_state` of all heads in this process."""
        return [head.learning_state() for head in centroid_heads(self.get_trainable_module())]

    def load_learning_state(self, states: list[list[dict[str, Any]]]) -> None:
        """Restores states from `learning_state` of one or several processes; their memories are merged."""
        for head, of_head in zip(centroid_heads(self.get_trainable_module()), zip(*states)):
            head.load_learning_state(*of_head)


def split_learning_state(learned: list[Any], rank: int, world_size: int) -> list[Any]:
    """Returns the states that a process restores, from the `learning_state` of each process of the saved run.

    With fewer processes than in the saved run, a process gets several memories; with more, it may get none.
    """
    return learned[rank::world_size] or [[head | dict(memory=None) for head in heads] for heads in learned[:1]]


@functools.cache
def with_centroid_learning(task_class: type[TrainingTask]) -> type[TrainingTask]:
    """Returns a subclass of one of timm's task classes that updates the centroids of its model.

    Example:
        >>> task = with_centroid_learning(LogitDistillationTask)(model, teacher_model='resnet50')
    """
    namespace = dict(__module__=__name__, __doc__=f'{task_class.__name__} for models with nearest-centroid heads.')
    return type(f'NearestCentroid{task_class.__name__}', (CentroidTaskMixin, task_class), namespace)


class NearestCentroidTask(CentroidTaskMixin, ClassificationTask):
    """timm's `ClassificationTask` for models with a `NearestCentroidHead`.

    Example:
        >>> task = NearestCentroidTask(timm.create_model('dnc_resnet18'))
        >>> task(images, target)['loss'].backward()
        >>> optimizer.step()
        >>> task.update_ema()
    """
