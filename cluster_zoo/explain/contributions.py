"""What the clusters of the last stage add to the logit of a class, and the logits without one of them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..features import eval_mode
from ..models.context_cluster import ContextCluster
from ..weights.metadata import label_names
from .centroids import resolve_class_names
from .inputs import ImageLike
from .maps import ClusterMaps
from .segments import single

__all__ = ['Contributions', 'contributions', 'remove_cluster']


@dataclass(frozen=True, eq=False)
class Contributions:
    """Parts of the logit of a class. ``points.sum() + bias`` and ``clusters.sum() + bias`` are the logit.

    Attributes:
        class_index: Index of the class.
        class_name: Name of the class; ``class 0`` and so on without names.
        probability: Softmax probability of the class, 0 .. 1; with several classes per image, the sigmoid.
        logit: The logit of the model.
        bias: What the classifier adds to the logit of any image.
        points: What each point of the last stage adds, float64 [H', W'].
        center: Center that each point joined in the last block, int64 [H', W'].
        clusters: What the points of each center add together, float64 [K].
    """

    class_index: int
    class_name: str
    probability: float
    logit: float
    bias: float
    points: np.ndarray
    center: np.ndarray
    clusters: np.ndarray


@torch.no_grad()
def contributions(
    model: nn.Module,
    image: ImageLike | ClusterMaps,
    class_index: int | None = None,
    head: int = 0,
    size: int | None = None,
) -> Contributions:
    """Computes what each cluster of the last stage adds to the logit of a class.

    The classifier is a mean over the points z of the normalized last stage and a linear layer, so that the logit is
    exactly the sum of ``w . z / N`` over the N points, plus the bias. The parts are exact for this image. The last norm
    uses the mean and the variance of all points: without some of the points, the others would be normalized
    differently, and their parts would change. `remove_cluster` computes these logits.

    Args:
        model: A Context Cluster or FEC classifier with average pooling.
        image: One image, or its maps.
        class_index: Index of the class; the predicted class if None.
        head: Head of the last block whose clusters are used, negative from the end.
        size: See `cluster_maps`.

    Raises:
        ValueError: The model has another classifier, no such class or head, or see `cluster_maps`.
    """
    network = _classifier(model)
    maps = single(model, image, size)
    with eval_mode(network):
        points = network.norm(maps.features)[0].cpu().double()  # [D, H', W']
    logits = maps.logits[0].cpu().double()
    index = int(logits.argmax()) if class_index is None else class_index
    if not 0 <= index < len(logits):
        raise ValueError(f'The model has no class {index}: expected 0 to {len(logits) - 1}.')
    parts = torch.einsum('d,dhw->hw', network.head.fc.weight[index].cpu().double(), points) / points[0].numel()
    center, count = _last_map(maps, head)
    probability = logits.sigmoid() if getattr(network, 'multi_label', False) else logits.softmax(0)
    bias = network.head.fc.bias
    names = label_names({**(getattr(network, 'pretrained_cfg', None) or {}), 'num_classes': len(logits)})
    return Contributions(
        class_index=index,
        class_name=resolve_class_names(names, len(logits))[index],
        probability=float(probability[index]),
        logit=float(logits[index]),
        bias=0.0 if bias is None else float(bias[index]),
        points=parts.numpy(),
        center=center,
        clusters=np.bincount(center.flatten(), parts.numpy().flatten(), minlength=count),
    )


@torch.no_grad()
def remove_cluster(
    model: nn.Module, image: ImageLike | ClusterMaps, center: int, head: int = 0, size: int | None = None
) -> np.ndarray:
    """Computes the logits as if the points of a cluster were not in the last stage.

    The last norm and the mean use the other points only. The earlier layers still see the whole image.

    Args:
        model, image, head, size: See `contributions`.
        center: Number of the center in the last block.

    Returns:
        float32 [num_classes].

    Raises:
        ValueError: All points or none belong to the cluster, or see `contributions`.
    """
    network = _classifier(model)
    maps = single(model, image, size)
    keep = _last_map(maps, head)[0] != center
    if keep.all() or not keep.any():
        raise ValueError(f'{"No" if keep.all() else "Every"} point of the last block joined center {center}.')
    points = maps.features[:, :, torch.from_numpy(keep)].unsqueeze(-1)  # [1, D, N, 1]
    with eval_mode(network):
        return network.forward_head(network.norm(points))[0].float().cpu().numpy()


def _classifier(model: nn.Module) -> ContextCluster:
    network = unwrap_model(model)
    head = getattr(network, 'head', None)
    if not isinstance(network, ContextCluster):
        raise ValueError(f'{type(network).__name__} is no Context Cluster or FEC classifier.')
    if type(getattr(head, 'fc', None)) is not nn.Linear or head.global_pool.pool_type != 'avg':
        raise ValueError(
            'Contributions need average pooling and a linear classifier. '
            'Nearest-centroid models are explained by cluster_zoo.explain.explain.'
        )
    return network


def _last_map(maps: ClusterMaps, head: int) -> tuple[np.ndarray, int]:
    last = maps.at(-1)
    if not -last.heads <= head < last.heads:
        raise ValueError(f'The last block has no head {head}: expected {-last.heads} to {last.heads - 1}.')
    return last.center[0, head], last.grid[0] * last.grid[1]
