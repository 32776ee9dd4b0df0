"""Clustering and nearest-centroid vision models for timm: Context Cluster, FEC and DNC.

Importing this package registers its models: ``timm.create_model('coc_small')``.
"""

from . import context_cluster, fec

__all__ = ['context_cluster', 'fec']

__version__ = '0.1.0'
