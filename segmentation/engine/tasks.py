"""timm's training task for dense prediction: what a segmenter's outputs cost, and what its centroids learn from."""

from typing import Any

import torch
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor

from cluster_zoo.training.tasks import CentroidTaskMixin

from .losses import cross_entropy, dice_loss

__all__ = ['SegmentationTask']


class _DenseTask(ClassificationTask):
    """The losses of a segmenter's outputs; wrapping and compiling are those of timm's classification."""

    def __init__(
        self,
        model: nn.Module,
        guidance_weight: float = 0.2,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, criterion=cross_entropy, device=device, dtype=dtype, verbose=False)
        self.guidance_weight = guidance_weight
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        outputs = self.trainable_module(input, all_outputs=True)
        losses = dict(cross_entropy=self.criterion(outputs['logits'], target, self.ignore_index))
        loss = losses['cross_entropy']
        if (guidance := outputs.get('guidance')) is not None:
            labels = self.labels_at(target, guidance.shape[-2:])
            losses['guidance_loss'] = dice_loss(guidance, labels, self.ignore_index)
            loss = loss + self.guidance_weight * losses['guidance_loss']
        if (auxiliary := outputs.get('auxiliary')) is not None:
            losses['auxiliary_loss'] = self.criterion(auxiliary, target, self.ignore_index)
            loss = loss + self.auxiliary_weight * losses['auxiliary_loss']
        return dict(loss=loss, output=outputs['logits'], **losses)

    def labels_at(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """Labels [B, H, W] of a batch at the size of a feature map, [B, h, w]."""
        return unwrap_model(self.trainable_module).labels_at(labels, tuple(size), self.ignore_index)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> '_DenseTask':
        # Processes may evaluate different numbers of images, and each forward pass of DDP waits for all of them.
        self.eval_model = self.get_eval_model()
        return super().prepare_distributed(device_ids, **ddp_kwargs)


class SegmentationTask(CentroidTaskMixin, _DenseTask):
    """A segmenter with its loss: cross-entropy, and what its outputs have beside the logits.

    That is ``guidance_weight`` times the Dice loss of a conditional classifier's guidance logits (CondNet), and
    ``auxiliary_weight`` times the cross-entropy of an auxiliary head. The centroids of a nearest-centroid classifier
    learn from every pixel of the feature map, each with the label nearest to it. Averaged weights, several processes
    and compilation are timm's.

    Args:
        model: A :class:`~segmentation.models.segmenter.Segmenter`.
        guidance_weight: Of the Dice loss.
        auxiliary_weight: Of the auxiliary head's loss.
        ignore_index: Label of pixels that do not count.
        device: Of the task.
        dtype: Of the task.

    Example:
        >>> task = SegmentationTask(create_segmenter('fcn', 'resnet18', 11, classifier='dnc'))
        >>> task(images, labels)['loss'].backward()
        >>> optimizer.step()
        >>> task.update_ema()
    """

    def centroid_target(self, target: Tensor, shape: torch.Size) -> Tensor:
        """Labels [B, H, W] for the features [B, h, w] of a head."""
        return self.labels_at(target, shape[1:])
