"""Cluster maps: the center that each point of an image is assigned to.

Every block of Context Cluster and FEC assigns each point to one center, so a map of the assignments shows exactly what
the block computes. The models take images of any size, so `cluster_map` needs no resizing or cropping.
"""

import torch
import torch.nn as nn
from einops import rearrange
from timm.utils import unwrap_model
from torch import Tensor

from ..features import eval_mode, record_inputs
from ..layers.cluster_mixer import ClusterMixer
from ..layers.grids import merge
from ..models.context_cluster import ContextCluster

__all__ = ['cluster_map']


@torch.no_grad()
def cluster_map(model: nn.Module, images: Tensor, stage: int, block: int = -1, head: int = 0) -> Tensor:
    """Returns the center of each point in one head of one block (Context Cluster, section 4.4 and figure 4).

    Args:
        model: A Context Cluster or FEC model, or a model that contains one.
        images: Normalized images [B, C, H, W], H and W at least 32.
        stage: Index of the stage, negative from the end.
        block: Index of the block in the stage, negative from the end.
        head: Index of the head, negative from the end.

    Returns:
        Index of a center for each point of the stage's grid, int64 [B, H', W'] on the CPU, H' = ceil(H / 4) in the
        first stage. Centers are numbered row by row over the whole image: 0 .. (r g)^2 - 1 for r x r regions of g x g
        centers.

    Raises:
        ValueError: The model does not cluster, or has no such stage, block or head.
    """
    network = next((module for module in model.modules() if isinstance(module, ContextCluster)), None)
    if network is None:
        raise ValueError(f'{type(model).__name__} has no clusters: expected a Context Cluster or FEC model.')
    blocks = _select('stage', network.stages, stage).blocks
    mixer = _select('block', blocks, block).token_mixer
    head = _select('head', range(mixer.num_heads), head)

    with eval_mode(model), record_inputs(mixer) as recorded:
        unwrap_model(model)(images)  # a compiled graph may skip the hook
    return _center_indices(mixer, recorded[0])[:, head].cpu()


def _select(name: str, items: nn.Sequential | range, index: int):
    if not -len(items) <= index < len(items):
        raise ValueError(f'The model has no {name} {index}: expected {-len(items)} to {len(items) - 1}.')
    return items[index]


def _center_indices(mixer: ClusterMixer, x: Tensor) -> Tensor:
    """Returns the center of each point in all heads, int64 [B, E, H, W], from the mixer's input [B, C, H, W]."""
    size, r, g = tuple(x.shape[-2:]), mixer.regions, mixer.proposals
    index = mixer.assign(x)  # [B * r * r, E, N]

    # Convert the index in the region to the index in the grid of all centers.
    in_image = rearrange(torch.arange((r * g) ** 2, device=x.device), '(i a j b) -> (i j) (a b)', i=r, a=g, j=r, b=g)
    in_image = in_image.repeat(len(x), 1).unsqueeze(1)
    return merge(torch.take_along_dim(in_image, index, dim=-1).transpose(1, 2), r, size)
