"""Object detection and instance segmentation on any backbone: Mask R-CNN, Faster R-CNN, RetinaNet and FCOS.

>>> from segmentation.detection import create_detector
>>> model = create_detector('mask_rcnn', 'coc_small', num_classes=80, proposals=5)
"""

import cluster_zoo  # noqa: F401  registers the backbones

from .detectors import create_detector
from .prediction import Detected, predict
from .published_systems import detector_config, list_detectors
from .trained import load_trained

__all__ = ['Detected', 'create_detector', 'detector_config', 'list_detectors', 'load_trained', 'predict']
