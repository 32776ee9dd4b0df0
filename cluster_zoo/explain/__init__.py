"""What a model saw and why it decided: its clusters, and the training images that its centroids stand for."""

from .clusters import cluster_map, draw_clusters

__all__ = ['cluster_map', 'draw_clusters']
