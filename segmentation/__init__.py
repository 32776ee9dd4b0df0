"""Dense heads on any backbone: Semantic FPN, UPerNet, DeepLabV3+, FCN, CondNet, RegionProxy and nearest centroids.

>>> from segmentation import create_segmenter
>>> model = create_segmenter('semantic_fpn', 'coc_small', num_classes=150)
"""

import cluster_zoo  # noqa: F401  registers the backbones

from .engine.masks import predict
from .engine.trained import load_trained
from .models.folders import save_pretrained
from .models.published_systems import list_segmenters, segmenter_config
from .models.segmenter import Segmenter, create_segmenter

__all__ = [
    'Segmenter',
    'create_segmenter',
    'list_segmenters',
    'load_trained',
    'predict',
    'save_pretrained',
    'segmenter_config',
]
