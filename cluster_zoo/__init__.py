"""Clustering and nearest-centroid vision models for timm: Context Cluster, FEC and DNC.

Importing this package registers its models: ``timm.create_model('coc_small')``.
"""

import sys
from pathlib import Path
from typing import Any

__all__ = ['nearest_centroid']

__version__ = '0.1.0'

# The `cluster-zoo` command prints its help without importing PyTorch. It imports the models before it runs a command.
if Path(sys.argv[0] if sys.argv else '').stem != 'cluster-zoo':
    from .models import nearest_centroid


def __getattr__(name: str) -> Any:
    if name == 'nearest_centroid':
        from .models import nearest_centroid

        return nearest_centroid
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
