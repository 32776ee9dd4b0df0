"""Explanations of a model's predictions: its clusters, and the training images that its centroids represent."""

from .centers import CenterView, Patch, center_view, similar_patches
from .centroid_figures import draw_centroids, draw_explanation
from .centroids import Anchoring, Explanation, Neighbour, anchor, explain
from .cluster_figures import draw_center, draw_clusters, draw_contributions, draw_film, draw_page
from .contributions import Contributions, contributions, remove_cluster
from .explained import Explained, can_explain, explain_image
from .maps import ClusterMap, ClusterMaps, cluster_maps, has_clusters
from .report import html_page, report
from .segments import Segments, segments

__all__ = [
    'Anchoring',
    'CenterView',
    'ClusterMap',
    'ClusterMaps',
    'Contributions',
    'Explained',
    'Explanation',
    'Neighbour',
    'Patch',
    'Segments',
    'anchor',
    'can_explain',
    'center_view',
    'cluster_maps',
    'contributions',
    'draw_center',
    'draw_centroids',
    'draw_clusters',
    'draw_contributions',
    'draw_explanation',
    'draw_film',
    'draw_page',
    'explain',
    'explain_image',
    'has_clusters',
    'html_page',
    'remove_cluster',
    'report',
    'segments',
    'similar_patches',
]
