"""Clustering and nearest-centroid vision models for timm: Context Cluster, FEC and DNC.

Importing this package registers its models: ``timm.create_model('coc_small')``.
"""

from .models import nearest_centroid

__all__ = ['nearest_centroid']

__version__ = '0.1.0'
