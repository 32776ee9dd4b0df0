"""timm training task for dense prediction: losses of all outputs of a segmenter, and updates of its centroids."""

from typing import Any

import torch
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor

from cluster_zoo.training.tasks import CentroidTaskMixin

from .losses import PixelLoss, dice_loss

__all__ = ['SegmentationTask']


class _DenseTask(ClassificationTask):
    """Computes the losses. A separate class, because `CentroidTaskMixin` must come before it."""

    def __init__(
        self,
        model: nn.Module,
        guidance_weight: float = 0.2,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        criterion: nn.Module | None = None,
    ):
        criterion = PixelLoss(ignore_index=ignore_index) if criterion is None else criterion
        super().__init__(model, criterion=criterion, device=device, dtype=dtype, verbose=False)
        self.guidance_weight = guidance_weight
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        outputs = self.trainable_module(input, all_outputs=True)
        losses = dict(pixel_loss=self.criterion(outputs['logits'], target))
        loss = losses['pixel_loss']
        if (guidance := outputs.get('guidance')) is not None:
            labels = unwrap_model(self.trainable_module).labels_at(target, guidance.shape[-2:], self.ignore_index)
            losses['guidance_loss'] = dice_loss(guidance, labels, self.ignore_index)
            loss = loss + self.guidance_weight * losses['guidance_loss']
        if (auxiliary := outputs.get('auxiliary')) is not None:
            losses['auxiliary_loss'] = self.criterion(auxiliary, target)
            loss = loss + self.auxiliary_weight * losses['auxiliary_loss']
        return dict(loss=loss, output=outputs['logits'], **losses)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> '_DenseTask':
        # Evaluate without DDP, which waits for processes that have fewer batches.
        self.eval_model = self.get_eval_model()
        return super().prepare_distributed(device_ids, **ddp_kwargs)


class SegmentationTask(CentroidTaskMixin, _DenseTask):
    """Training task of a segmenter.

    The loss is that of the pixels, plus ``guidance_weight`` times the Dice loss of the guidance logits (CondNet), plus
    ``auxiliary_weight`` times the pixel loss of the auxiliary head. Centroids are updated with every pixel of the
    feature map and its nearest label. EMA, distributed training and compilation work as in timm's tasks.

    Args:
        model: A `Segmenter`.
        guidance_weight: Weight of the Dice loss.
        auxiliary_weight: Weight of the auxiliary loss.
        ignore_index: Label of ignored pixels.
        device: Device of the task.
        dtype: Dtype of the task.
        criterion: Pixel loss of (logits [B, K, H, W], labels [B, H, W]) (default: cross-entropy).

    Example:
        >>> task = SegmentationTask(create_segmenter('fcn', 'resnet18', 11, classifier='dnc'))
        >>> task(images, labels)['loss'].backward()
        >>> optimizer.step()
        >>> task.update_ema()
    """

    def centroid_target(self, target: Tensor, shape: torch.Size) -> Tensor:
        """Resizes labels [B, H, W] to the shape [B, h, w] of a feature map."""
        return unwrap_model(self.trainable_module).labels_at(target, tuple(shape[1:]), self.ignore_index)
