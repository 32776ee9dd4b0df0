"""Segments of an image: its points, grouped through all layers that reduce them, then by k-means."""

import itertools
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch.nn as nn

from ..errors import OptionError
from .inputs import ImageLike
from .maps import ClusterMaps, cluster_maps

__all__ = ['Segments', 'compose', 'has_scikit_learn', 'k_means', 'segments', 'single']


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of one image.

    Attributes:
        labels: Segment of each pixel of the given image, int64 [H, W], 0 .. k - 1; from the largest to the smallest.
        k: Number of segments.
        points: Point of the last stage that each point of the first stage ends in, int64 [H', W'].
        point_labels: Segment of each point of the last stage, int64 [H'', W''].
    """

    labels: np.ndarray
    k: int
    points: np.ndarray
    point_labels: np.ndarray


def segments(model: nn.Module, image: ImageLike | ClusterMaps, k: int, size: int | None = None) -> Segments:
    """Groups the pixels of an image into at most k segments, which need not be connected.

    FEC (section 3.2 and figure 1): each cluster pooling assigns every point to one new point, so that through all
    poolings every pixel ends in one point of the last stage. k-means groups these points by their features.
    Context Cluster reduces the points by strided convolutions, which assign nothing. A pixel then ends in the point
    whose patch contains it, and the segments have the coarse borders of the last stage's patches.

    Args:
        model: See `cluster_maps`.
        image: One image, or its maps.
        k: Number of segments. There are fewer if the last stage has fewer points or fewer different features.
        size: See `cluster_maps`. A larger size gives finer segments.

    Raises:
        OptionError: scikit-learn is not installed.
        ValueError: k is not positive, the maps are of several images or of one stage, or see `cluster_maps`.
    """
    if k < 1:
        raise ValueError(f'The number of segments is at least 1, got {k}.')
    maps = single(model, image, size)
    points = compose(maps)
    point_labels = k_means(maps, k)
    labels = maps.at_pixels(point_labels.flatten()[points], maps.at(0).stride, maps.images[0].size)
    return Segments(labels, int(point_labels.max()) + 1, points, point_labels)


def single(model: nn.Module, image: ImageLike | ClusterMaps, size: int | None = None) -> ClusterMaps:
    """Maps of all stages of one image."""
    maps = image if isinstance(image, ClusterMaps) else cluster_maps(model, image, size=size)
    if len(maps.images) != 1 or maps.features is None:
        raise ValueError('Expected one image, or the maps of all stages of one image.')
    return maps


def compose(maps: ClusterMaps) -> np.ndarray:
    """Point of the last stage that each point of the first stage ends in, int64 [H', W'] for the first image."""
    height, width = maps.at(0).center.shape[-2:]
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing='ij')
    stages = sorted({found.stage for found in maps.maps})
    ends = rows * width + columns
    for before, after in itertools.pairwise(stages):
        pooling = [found for found in maps.maps if found.stage == after and found.block is None]
        if pooling:
            parents = pooling[0].center[0, 0]
        else:  # the strided convolution whose patch contains the point
            (h, w), (next_h, next_w) = (maps.at(stage).center.shape[-2:] for stage in (before, after))
            factor = maps.at(after).stride // maps.at(before).stride
            parents = np.minimum(np.arange(h) // factor, next_h - 1)[:, None] * next_w
            parents = parents + np.minimum(np.arange(w) // factor, next_w - 1)
        ends = parents.flatten()[ends]
    return ends


def has_scikit_learn() -> bool:
    """Whether scikit-learn is installed."""
    return find_spec('sklearn') is not None


def k_means(maps: ClusterMaps, k: int) -> np.ndarray:
    """Group of each point of the last stage by its feature, int64 [H'', W''], the group of most pixels first."""
    if not has_scikit_learn():
        raise OptionError("Segments need scikit-learn: pip install 'cluster_zoo[explain]'")
    from sklearn.cluster import KMeans

    features = maps.features[0].float().flatten(1).T.cpu().numpy()
    features = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    different, inverse = np.unique(features, axis=0, return_inverse=True)
    k = min(k, len(different))
    labels = KMeans(k, n_init=4, random_state=0).fit_predict(features) if k < len(different) else inverse.flatten()
    weight = np.bincount(compose(maps).flatten(), minlength=len(labels))
    order = np.argsort(-np.bincount(labels, weight, minlength=k), kind='stable')
    rank = np.empty(k, np.int64)
    rank[order] = np.arange(k)
    return rank[labels].reshape(maps.features.shape[-2:])
