"""What a model saw: which center each point of an image joined.

In every block of Context Cluster and FEC a point belongs to one center, so a picture of who joined whom shows what the
block did, not an estimate of it. The models take images of any size: to see the clusters of a photograph give it to
:func:`cluster_map` as it is, neither squashed nor cropped.
"""

import colorsys

import torch
import torch.nn as nn
from einops import rearrange
from PIL import Image
from timm.utils import unwrap_model
from torch import Tensor

from ..features import eval_mode, record_inputs
from ..layers.cluster_mixer import ClusterMixer
from ..layers.clustering import assign
from ..layers.grids import mean_centers, merge, partition
from ..models.context_cluster import ContextCluster

__all__ = ['cluster_map', 'draw_clusters']


@torch.no_grad()
def cluster_map(model: nn.Module, images: Tensor, stage: int, block: int = -1, head: int = 0) -> Tensor:
    """The center that each point joined in one head of one block (Context Cluster, section 4.4 and figure 4).

    Args:
        model: A Context Cluster or FEC model, or one built on it.
        images: Normalised images [B, C, H, W] of any size from 32 pixels.
        stage: Index of the stage, negative from the end.
        block: Index of the block in its stage, negative from the end.
        head: Index of the head, negative from the end.

    Returns:
        int64 [B, H', W'] on the CPU, one number a point of the stage's grid, H' = ceil(H / 4) for the first stage.
        Centers are numbered row by row over the image: with r x r regions of g x g centers, from 0 to (r g)^2 - 1.

    Raises:
        ValueError: If the model does not cluster, or has no such stage, block or head.
    """
    network = next((module for module in model.modules() if isinstance(module, ContextCluster)), None)
    if network is None:
        raise ValueError(f'{type(model).__name__} has no clusters: expected a Context Cluster or FEC model')
    blocks = _pick('stage', network.stages, stage).blocks
    mixer = _pick('block', blocks, block).token_mixer
    head = _pick('head', range(mixer.num_heads), head)

    with eval_mode(model), record_inputs(mixer) as seen:
        unwrap_model(model)(images)  # a compiled graph may not know of the hook
    return _joined(mixer, seen[0])[:, head].cpu()


def _pick(what: str, items: nn.Sequential | range, index: int):
    if not -len(items) <= index < len(items):
        raise ValueError(f'there is no {what} {index}: expected {-len(items)} to {len(items) - 1}')
    return items[index]


def _joined(mixer: ClusterMixer, x: Tensor) -> Tensor:
    """Input of a mixer [B, C, H, W] -> center of each head's points, int64 [B, E, H, W]."""
    size, r, g = tuple(x.shape[-2:]), mixer.regions, mixer.proposals
    points = partition(x, r)
    centers, _, center_mask = mean_centers(points, size, r, g)
    index, _ = assign(points, *mixer.project_queries(centers), center_mask)  # [B * r * r, E, N]

    # From a center's place in its region to its place among the rows and columns of all centers
    number = rearrange(torch.arange((r * g) ** 2, device=x.device), '(i a j b) -> (i j) (a b)', i=r, a=g, j=r, b=g)
    number = number.repeat(len(x), 1).unsqueeze(1)
    return merge(torch.take_along_dim(number, index, dim=-1).transpose(1, 2), r, size)


def draw_clusters(image: Image.Image, clusters: Tensor, opacity: float = 0.5) -> Image.Image:
    """Lay the clusters of an image over it, a colour for each center.

    Args:
        image: The picture whose points were clustered, as large as the model saw it.
        clusters: Numbers of the centers, [H', W'] from :func:`cluster_map`.
        opacity: Weight of the colours over the picture, 0 to 1.

    Returns:
        An RGB picture of the size of `image`.
    """
    numbers, place = clusters.unique(return_inverse=True)
    palette = torch.tensor([_colour(number) for number in numbers.tolist()], dtype=torch.uint8)
    colours = Image.fromarray(palette[place].numpy())
    # A point stands for a square patch, whose side is the stage's stride: a power of two. The patches of the last row
    # and column may reach beyond the picture.
    patch = max(-(-side // count) for side, count in zip(image.size, colours.size))
    patch = 1 << (patch - 1).bit_length()
    colours = colours.resize([patch * count for count in colours.size], Image.Resampling.NEAREST)
    return Image.blend(image.convert('RGB'), colours.crop((0, 0, *image.size)), opacity)


def _colour(number: int) -> tuple[int, ...]:
    """Red, green and blue; hues a golden angle apart, so that neighbouring centers differ."""
    hue, value = number * 0.381966 % 1, 1.0 - 0.3 * (number // 3 % 2)
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.9, value))
