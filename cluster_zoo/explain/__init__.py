"""Explanations of a model's predictions: its clusters, and the training images that its centroids represent."""

from .centroids import Anchoring, Explanation, Neighbour, anchor, explain
from .clusters import cluster_map
from .figures import draw_centroids, draw_clusters, draw_explanation, draw_stages

__all__ = [
    'Anchoring',
    'Explanation',
    'Neighbour',
    'anchor',
    'cluster_map',
    'draw_centroids',
    'draw_clusters',
    'draw_explanation',
    'draw_stages',
    'explain',
]
