"""One center of one layer: which points are like it, and which patches of other images are."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.utils import unwrap_model
from torch import Tensor

from ..errors import ImageError
from ..images import read_image
from ..layers.clustering import normalize
from .inputs import ImageLike, prepare
from .maps import center_grid, find_layers, head_features, input_stride, run, spread, to_map

__all__ = ['CenterView', 'Patch', 'center_view', 'similar_patches']


@dataclass(frozen=True, eq=False)
class CenterView:
    """A center and its similarity to the points of its image.

    Attributes:
        where: Stage, block (None for a pooling), head and number of the center.
        similarity: Cosine similarity of the center and each point, float32 [H', W'], -1 .. 1; NaN for points of other
            regions, which are not compared with it.
        members: Points that joined the center, bool [H', W'].
        feature: Normalized feature of the center in the space of the head, [D].
        input_size: Height and width of the model's input.
        stride: Height and width of a point, in pixels of the input.
    """

    where: tuple[int, int | None, int, int]
    similarity: np.ndarray
    members: np.ndarray
    feature: Tensor = field(repr=False)
    input_size: tuple[int, int]
    stride: int

    def at_pixels(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Returns values of the points at the pixels of a scaled image, see `ClusterMaps.at_pixels`."""
        return spread(values, self.stride, self.input_size, size)


@dataclass(frozen=True, eq=False)
class Patch:
    """A point of an image that is like a center.

    Attributes:
        image: File name or PIL image.
        box: Left, top, right and bottom of the point's patch, in pixels of the image.
        similarity: Cosine similarity to the center, -1 .. 1.
        pixels: The patch and its surroundings, three patches wide and high, cut at the border of the image.
    """

    image: str | Image.Image
    box: tuple[int, int, int, int]
    similarity: float
    pixels: Image.Image = field(repr=False)


@torch.no_grad()
def center_view(
    model: nn.Module,
    image: ImageLike,
    stage: int,
    block: int | None,
    head: int,
    center: int,
    size: int | None = None,
) -> CenterView:
    """Returns how similar each point of an image is to one center, as the layer compares them.

    Args:
        model: See `cluster_maps`.
        image: One image.
        stage: Index of the stage.
        block: Index of the block in the stage; None for the cluster pooling that leads to the stage.
        head: Index of the head.
        center: Number of the center, as in `ClusterMap`.
        size: See `cluster_maps`.

    Raises:
        ValueError: The model has no such layer, head or center, or see `cluster_maps`.
    """
    layer, x, inputs = _layer_input(model, image, stage, block, size)
    features, index = head_features(layer, x), layer.assign(x)
    index = index.unsqueeze(1) if index.ndim == 2 else index
    _, numbers = center_grid(layer, x.shape[-2:])
    if not 0 <= head < index.shape[1]:
        raise ValueError(f'The layer has no head {head}: expected 0 to {index.shape[1] - 1}.')
    if not 0 <= center <= numbers.max():
        raise ValueError(f'The layer has no center {center}: expected 0 to {numbers.max()}.')
    region, within = (int(found[0]) for found in np.nonzero(numbers == center))

    feature = normalize(features.centers[region, head, within])
    similarity = torch.full(index.shape, torch.nan)[:, :1]
    similarity[region, 0] = (normalize(features.points[region, head]) @ feature).float().cpu()
    members = torch.zeros(similarity.shape, dtype=torch.bool)
    members[region, 0] = (index[region, head] == within).cpu()
    similarity, members = (to_map(layer, values, x.shape[-2:])[0, 0].numpy() for values in (similarity, members))
    place, stride = (stage, block, head, center), input_stride(inputs, x)
    return CenterView(place, similarity, members, feature, tuple(inputs.shape[-2:]), stride)


@torch.no_grad()
def similar_patches(
    model: nn.Module,
    view: CenterView,
    images: Iterable[str | Image.Image],
    count: int = 12,
    size: int | None = None,
) -> list[Patch]:
    """Finds the points of other images that are most similar to a center, at most one of each image.

    Args:
        model: The model of the view.
        view: Result of `center_view`.
        images: File names, for example of `cluster_zoo.predict.find_images`, or PIL images.
        count: Number of patches.
        size: See `cluster_maps`.

    Returns:
        Patches, the most similar first.

    Raises:
        ImageError: A file is not a readable image.
    """
    stage, block, head, _ = view.where
    found: list[tuple[float, int, Patch]] = []
    for number, image in enumerate(images):
        try:
            pixels = image if isinstance(image, Image.Image) else read_image(image)
        except ImageError as error:
            raise ImageError(f'{image}: {error}') from error
        layer, x, inputs = _layer_input(model, pixels, stage, block, size)
        features = normalize(head_features(layer, x).points[:, head : head + 1])  # [r * r, 1, N, D]
        similarity = to_map(layer, features @ view.feature, x.shape[-2:])[0, 0]
        best = int(similarity.argmax())
        row, column = divmod(best, similarity.shape[1])
        stride = input_stride(inputs, x)
        box = _box(pixels, inputs, (stride * column, stride * row, stride * (column + 1), stride * (row + 1)))
        around = (stride * (column - 1), stride * (row - 1), stride * (column + 2), stride * (row + 2))
        value = similarity.flatten()[best].item()
        entry = (value, -number, Patch(image, box, value, pixels.crop(_box(pixels, inputs, around))))
        (heapq.heappush if len(found) < count else heapq.heappushpop)(found, entry)
    return [patch for *_, patch in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def _box(image: Image.Image, inputs: Tensor, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Converts a box in pixels of the input to pixels of the image, without what is outside."""
    sides = 2 * tuple(zip(image.size, (inputs.shape[-1], inputs.shape[-2])))
    return tuple(min(max(round(edge * shown / given), 0), shown) for edge, (shown, given) in zip(box, sides))


def _layer_input(
    model: nn.Module, image: ImageLike, stage: int, block: int | None, size: int | None
) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a layer, its input [1, C, H', W'] and the input of the model. The forward pass ends there."""
    model = unwrap_model(model)
    layers = find_layers(model)
    if (stage, block) not in layers:
        what = f'block {block} in stage {stage}' if block is not None else f'cluster pooling into stage {stage}'
        raise ValueError(f'The model has no {what}: expected {", ".join(map(str, layers))} (stage, block).')
    inputs, shown = prepare(model, image, size)
    if len(shown) != 1:
        raise ValueError(f'Expected one image, got {len(shown)}.')
    recorded: list[Tensor] = []
    where = (stage, block)
    run(model, inputs, {where: layers[where]}, lambda where, x: recorded.append(x), stop=True)
    return layers[where], recorded[0], inputs
