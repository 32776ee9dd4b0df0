"""Cluster maps: the center that each point joined, in every layer of a model that clusters.

Every block of Context Cluster and FEC, and every cluster pooling of FEC, assigns each point to one center. The maps are
these assignments, computed by the layers themselves in one forward pass.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.utils import unwrap_model
from torch import Tensor

from ..features import eval_mode
from ..layers.cluster_mixer import ClusterMixer
from ..layers.clustering import PointSets, normalize
from ..layers.grids import merge
from ..models.fec import ClusterPool
from .inputs import ImageLike, prepare

__all__ = ['ClusterMap', 'ClusterMaps', 'cluster_maps', 'has_clusters']


@dataclass(frozen=True, eq=False)
class ClusterMap:
    """Assignments of one cluster mixer or one cluster pooling, for B images and E heads (one for a pooling).

    Points are in a grid [H', W'] and K centers in a grid [rows, columns], both row by row from the top left of the
    image. A center is identified by its number in this grid, or by its region and its index in the region. Each point
    joins a center of its own region.

    Attributes:
        stage: Index of the stage. A pooling belongs to the stage that it leads to.
        block: Index of the block in the stage; None for a pooling.
        center: Number of the center that each point joined, int64 [B, E, H', W'], 0 .. K - 1.
        similarity: Cosine similarity of each point and its center in the space of the head, float32 [B, E, H', W'],
            -1 .. 1. The paper's similarity is the sigmoid of a linear function of it.
        grid: Rows and columns of the centers. K = rows * columns; for a pooling it is the next stage's grid of points.
        region: Region of each center, int64 [K].
        index: Index of each center in its region, int64 [K].
        position: Where each center starts: the mean position (y, x) of the points that it is the mean of, in pixels of
            the input, float32 [K, 2]; NaN for centers in the padding, which no point joins.
        stride: Height and width of a point, in pixels of the input.
    """

    stage: int
    block: int | None
    center: np.ndarray
    similarity: np.ndarray
    grid: tuple[int, int]
    region: np.ndarray
    index: np.ndarray
    position: np.ndarray
    stride: int

    @property
    def name(self) -> str:
        """For a reader: ``stage 0, block 1`` or ``pooling into stage 1``."""
        return f'pooling into stage {self.stage}' if self.block is None else f'stage {self.stage}, block {self.block}'

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.center.shape[1]

    def of_head(self, head: int, image: int = 0) -> np.ndarray:
        """Centers that the points of one image joined in one head, int64 [H', W']. Poolings have one for all heads.

        Raises:
            ValueError: The layer has no such head.
        """
        return self.center[image, _checked('head', head, self.heads) if self.block is not None else 0]


@dataclass(frozen=True, eq=False)
class ClusterMaps:
    """The maps of B images from one forward pass. `segments` and `contributions` take it instead of an image.

    Attributes:
        maps: Maps of all layers in the order of the forward pass.
        images: The images, RGB at the size in which they were given.
        inputs: Input of the model, [B, C, H, W].
        logits: Output of a classifier, float32 [B, num_classes]; None for other models and a single stage.
        features: Output of the last stage, [B, D, H', W']; None for a single stage.
    """

    maps: tuple[ClusterMap, ...]
    images: tuple[Image.Image, ...]
    inputs: Tensor = field(repr=False)
    logits: Tensor | None = field(default=None, repr=False)
    features: Tensor | None = field(default=None, repr=False)

    def at(self, stage: int, block: int | None = -1) -> ClusterMap:
        """Returns the map of a block, or of the pooling into a stage if ``block`` is None.

        Args:
            stage: Index of the stage, negative from the end.
            block: Index of the block, negative from the end.

        Raises:
            ValueError: There is no such map.
        """
        stages = sorted({found.stage for found in self.maps})
        stage = range(stages[-1] + 1)[_checked('stage', stage, stages[-1] + 1)]
        found = [found for found in self.maps if found.stage == stage]
        if not found:
            raise ValueError(f'There is no map of stage {stage}: expected one of {", ".join(map(str, stages))}.')
        if block is None:
            if found[0].block is not None:
                raise ValueError(f'No cluster pooling leads to stage {stage}: only FEC has it, from stage 1.')
            return found[0]
        blocks = [one for one in found if one.block is not None]
        return blocks[_checked('block', block, len(blocks))]

    def at_pixels(self, values: np.ndarray, stride: int, size: tuple[int, int]) -> np.ndarray:
        """Returns the values of points [H', W'] at the pixels of a scaled image: [height, width].

        Args:
            values: One value for each point, which are not interpolated.
            stride: Height and width of a point in pixels of the input.
            size: Width and height of the scaled image.
        """
        return spread(values, stride, tuple(self.inputs.shape[-2:]), size)


def cluster_maps(
    model: nn.Module,
    images: ImageLike | Sequence[ImageLike],
    stage: int | None = None,
    size: int | None = None,
) -> ClusterMaps:
    """Returns which center each point of an image joined, in every layer that clusters (Context Cluster, figure 4).

    The model stays as it was. Calls in several threads need a model each, or a lock.

    Args:
        model: A Context Cluster or FEC model, timm's ``features_only`` wrapper of one, a segmenter, or any other model
            that contains one.
        images: One image or several of the same size: PIL images of any mode (EXIF orientation is applied), arrays
            uint8 [H, W] or [H, W, C], or normalized tensors [C, H, W] or [B, C, H, W]. See `prepare` in
            `cluster_zoo.explain.inputs`.
        stage: Only this stage, negative from the end. The forward pass ends after it, and other stages have no maps.
        size: Shorter side of the input in pixels, from 32; the size that the model is tested at if None. The aspect
            ratio is kept, to 2 pixels. Cluster pooling compares all points of an image, so that its cost grows with the
            fourth power of the size.

    Raises:
        ValueError: The model does not cluster, has no such stage, or an image is not supported.
        ImageError: An image is too narrow.
    """
    model = unwrap_model(model)  # a compiled graph may skip the hooks
    layers = find_layers(model)
    count = 1 + max(where[0] for where in layers)
    if stage is not None:
        stage = range(count)[_checked('stage', stage, count)]
        layers = {where: layer for where, layer in layers.items() if where[0] == stage}
    inputs, shown = prepare(model, images, size)
    maps: dict[tuple[int, int | None], ClusterMap] = {}

    def record(where: tuple[int, int | None], x: Tensor) -> None:
        maps.setdefault(where, _map(layers[where], *where, x, inputs))

    features, logits = run(model, inputs, layers, record, stop=stage is not None)
    if stage is not None:
        features = logits = None
    return ClusterMaps(tuple(maps[where] for where in layers), tuple(shown), inputs, logits, features)


def find_layers(model: nn.Module) -> dict[tuple[int, int | None], ClusterMixer | ClusterPool]:
    """Returns the layers that cluster by stage and block (None for a pooling), in the order of the forward pass."""
    layers: dict[tuple[int, int | None], ClusterMixer | ClusterPool] = {}
    for name, module in model.named_modules():
        where = re.search(r'stages[._](\d+)\.(?:blocks\.(\d+)\.token_mixer|downsample)$', name)
        if where and isinstance(module, (ClusterMixer, ClusterPool)):
            layers.setdefault((int(where[1]), None if where[2] is None else int(where[2])), module)
    if not layers:
        raise ValueError(f'{type(model).__name__} has no clusters: expected a Context Cluster or FEC model.')
    return layers


def has_clusters(model: nn.Module) -> bool:
    """Whether a model clusters points."""
    return any(isinstance(module, (ClusterMixer, ClusterPool)) for module in model.modules())


class _Stop(Exception):
    """Ends a forward pass."""


@torch.no_grad()
def run(
    model: nn.Module,
    inputs: Tensor,
    layers: dict[tuple[int, int | None], nn.Module],
    record: Callable[[tuple[int, int | None], Tensor], None],
    stop: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Calls ``record`` with the input of each layer in a forward pass, which ends at the last of them if ``stop``.

    Returns:
        Output of the last layer's stage, and logits of a classifier; None for what was not computed.
    """
    last, features, output = list(layers)[-1], [], None

    def before(where, module, args):
        record(where, args[0])
        if stop and where == last:
            raise _Stop

    names = {id(module): name for name, module in model.named_modules()}
    stage = model.get_submodule(names[id(layers[last])].rsplit('.', 3 if last[1] is not None else 1)[0])
    handles = [stage.register_forward_hook(lambda module, args, output: features.append(output))]
    handles += [layer.register_forward_pre_hook(partial(before, where)) for where, layer in layers.items()]
    try:
        with eval_mode(model):
            output = model(inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    is_logits = isinstance(output, Tensor) and output.ndim == 2 and getattr(model, 'num_classes', 0) > 0
    return features[0] if features else None, output.float() if is_logits else None


def head_features(layer: ClusterMixer | ClusterPool, x: Tensor) -> PointSets:
    """Features that a layer compares, from its input [B, C, H, W]: points [S, E, N, D] and centers [S, E, M, D]."""
    sets = layer.head_sets(layer.f(x))
    if isinstance(layer, ClusterPool):
        return PointSets(sets.points.unsqueeze(1), sets.centers.unsqueeze(1), *sets[2:])
    B, E, areas = x.shape[0], layer.num_heads, layer.regions**2

    def by_region(features: Tensor) -> Tensor:  # [B * E * r * r, N, D] -> [B * r * r, E, N, D]
        return features.unflatten(0, (B, E, areas)).transpose(1, 2).flatten(0, 1)

    return PointSets(by_region(sets.points), by_region(sets.centers), *sets[2:])


def input_stride(inputs: Tensor, x: Tensor) -> int:
    """Height and width of a point of x, in pixels: a power of two. The last row and column may exceed the input."""
    side = max(-(-pixels // points) for pixels, points in zip(inputs.shape[-2:], x.shape[-2:]))
    return 1 << (side - 1).bit_length()


def spread(values: np.ndarray, stride: int, input_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """`ClusterMaps.at_pixels` for an input of ``input_size`` (height, width)."""
    points = []
    for pixels, shown in zip(input_size, reversed(size)):
        position = (np.arange(shown) + 0.5) * pixels / shown  # in the input
        points.append(np.minimum(position, pixels - 0.5).astype(np.int64) // stride)
    return values[points[0][:, None], points[1]]


def to_map(layer: ClusterMixer | ClusterPool, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of points [B * r * r, E, N] -> [B, E, H', W']."""
    cell = 2 if isinstance(layer, ClusterPool) else 1
    padded = tuple(side + -side % (layer.regions * cell) for side in size)
    return merge(x.transpose(1, 2), layer.regions, padded)[..., : size[0], : size[1]]


def center_grid(layer: ClusterMixer | ClusterPool, size: tuple[int, int]) -> tuple[tuple[int, int], np.ndarray]:
    """The grid of centers of a layer whose points are [H', W'].

    Returns:
        Rows and columns, and the number in this grid of each center of each region, int64 [r * r, M]; -1 for centers in
        the padding of cluster pooling.
    """
    r = layer.regions
    if isinstance(layer, ClusterPool):
        grid = tuple((side + 1) // 2 for side in size)
        per_region = tuple(-(-side // r) for side in grid)
    else:
        grid, per_region = (r * layer.proposals,) * 2, (layer.proposals,) * 2
    rows, columns = np.meshgrid(*(np.arange(r * count) for count in per_region), indexing='ij')
    number = np.where((rows < grid[0]) & (columns < grid[1]), rows * grid[1] + columns, -1)
    number = number.reshape(r, per_region[0], r, per_region[1]).transpose(0, 2, 1, 3)
    return grid, number.reshape(r * r, -1)


def _map(layer: ClusterMixer | ClusterPool, stage: int, block: int | None, x: Tensor, inputs: Tensor) -> ClusterMap:
    size = tuple(x.shape[-2:])
    index = layer.assign(x)
    index = index.unsqueeze(1) if index.ndim == 2 else index  # [B * r * r, E, N]
    features = head_features(layer, x)
    joined = torch.take_along_dim(normalize(features.centers), index.unsqueeze(-1), dim=2)
    similarity = (normalize(features.points) * joined).sum(-1, dtype=torch.float32)

    grid, numbers = center_grid(layer, size)
    table = torch.from_numpy(numbers).to(index.device).repeat(x.shape[0], 1).unsqueeze(1)
    center = torch.take_along_dim(table, index, dim=2)
    region, within = (np.empty(grid[0] * grid[1], np.int64) for _ in range(2))
    where = np.nonzero(numbers >= 0)
    region[numbers[where]], within[numbers[where]] = where
    stride = input_stride(inputs, x)
    return ClusterMap(
        stage=stage,
        block=block,
        center=to_map(layer, center, size).cpu().numpy(),
        similarity=to_map(layer, similarity, size).clamp(-1, 1).cpu().numpy(),
        grid=grid,
        region=region,
        index=within,
        position=stride * _positions(layer, grid, size),
        stride=stride,
    )


def _positions(layer: ClusterMixer | ClusterPool, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Mean position (y, x) of the points that each center starts as the mean of, in points, float32 [K, 2]."""
    axes = []
    for side, count in zip(size, grid):
        number = np.arange(count)
        if isinstance(layer, ClusterPool):
            start, stop = 2 * number, 2 * number + 2
        else:  # the bins of `mean_grid`
            n, g = -(-side // layer.regions), layer.proposals
            region, i = number // g * n, number % g
            start, stop = region + i * n // g, region + ((i + 1) * n + g - 1) // g
        stop = np.minimum(stop, side)
        axes.append(np.where(start < stop, (start + stop) / 2, np.nan))
    return np.stack(np.meshgrid(*axes, indexing='ij'), axis=-1).reshape(-1, 2).astype(np.float32)


def _checked(name: str, index: int, count: int) -> int:
    if not -count <= index < count:
        raise ValueError(f'The model has no {name} {index}: expected {-count} to {count - 1}.')
    return index
