"""The detectors that authors published with code: architecture, training settings and results on COCO.

`create_detector` builds a system by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster_zoo.errors import OptionError, nearest

from ..models.published_systems import matching

__all__ = ['CONFIGS', 'DetectorConfig', 'detector_config', 'list_detectors']


@dataclass(frozen=True)
class DetectorConfig:
    """A published detector.

    All systems are trained on COCO for 12 epochs (the schedule "1x") with horizontal flips.
    """

    name: str
    detector: str  # see `create_detector`
    backbone: str  # timm model
    options: dict[str, Any] = field(hash=False)  # other arguments of `create_detector`
    paper: str
    source: str  # address of the folder with the authors' checkpoint
    box_ap: float  # published average precision of boxes, IoU 0.5 to 0.95, %
    mask_ap: float | None = None  # of masks
    num_classes: int = 80  # without background
    dataset: str = 'coco'
    size: tuple[int, int] = (1333, 800)  # sides that images are resized into, pixels
    batch_size: int = 32  # images per iteration, over all processes
    epochs: int = 12
    steps: tuple[int, ...] = (8, 11)  # epochs after which the learning rate is divided by 10
    optimizer: str = 'adamw'
    lr: float = 2e-4  # after warm-up, for batch_size
    weight_decay: float = 1e-4
    warmup: int = 500  # iterations of linear warm-up
    flip: float = 0.5  # probability of a horizontal flip


_COC_PAPER = 'Image as Set of Points, ICLR 2023, https://arxiv.org/abs/2303.01494'
_FEC_PAPER = 'Neural Clustering based Visual Representation Learning, CVPR 2024, https://arxiv.org/abs/2403.17409'
_FOLDER = 'https://drive.google.com/drive/folders/'


def _coc(name: str, proposals: int, box_ap: float, mask_ap: float, folder: str) -> DetectorConfig:
    """Mask R-CNN on Context Cluster, with as many centers in all stages."""
    return DetectorConfig(
        name=f'mask_rcnn_{name}_{proposals**2}',
        detector='mask_rcnn',
        backbone=name,
        options=dict(proposals=proposals),
        paper=_COC_PAPER,
        source=_FOLDER + folder,
        box_ap=box_ap,
        mask_ap=mask_ap,
    )


def _fec(name: str, box_ap: float) -> DetectorConfig:
    """Mask R-CNN on FEC, which clusters the large maps in regions."""
    return DetectorConfig(
        name=f'mask_rcnn_{name}',
        detector='mask_rcnn',
        backbone=name,
        options=dict(proposals=7, regions=(2, 2, 1, 1), pool_regions=(2, 1, 1)),
        paper=_FEC_PAPER,
        source=_FOLDER + '1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A',
        box_ap=box_ap,
    )


_CONFIGS = (
    # The numbers in the names of Context Cluster are centers per region.
    _coc('coc_small', 2, 35.9, 33.8, '1-TthSC4bWdKhyc_MW9Qsax9WohrniZWB'),
    _coc('coc_small', 5, 37.5, 35.4, '1Y-A-GinWSyhl8DWGu5qdJC36qc1FvSnD'),
    _coc('coc_small', 7, 37.2, 34.9, '1hDFZpy1y8GwN0ZvpoTw8OtPuYvvvw6Fy'),
    _coc('coc_medium', 2, 38.6, 36.1, '1a8X1Qw4z_hABe8jhOAmG6-qM6W0t-GPT'),
    _coc('coc_medium', 5, 40.1, 37.4, '1kvTZ9EX0rT_XQKVQUeS5536uHCDHh-Bg'),
    _coc('coc_medium', 7, 40.6, 37.6, '1xCc148wuHq4Y_zxhlzU1ZLw7ZxTp4rdh'),
    # Box AP of FEC as quoted by a later paper of the same group, which does not give the mask AP
    _fec('fec_small', 35.6),
    _fec('fec_base', 37.9),
    _fec('fec_large', 39.9),
)

CONFIGS: dict[str, DetectorConfig] = {config.name: config for config in _CONFIGS}


def list_detectors(filter: str = '') -> list[str]:
    """Returns the names of the published detectors, in natural order.

    Args:
        filter: Part of a name such as ``'coc'``, or a pattern of whole names such as ``'*_25'``; '' for all names.
    """
    return matching(CONFIGS, filter)


def detector_config(name: str) -> DetectorConfig:
    """Returns the published detector of a name.

    Raises:
        OptionError: The name is unknown.
    """
    if name not in CONFIGS:
        raise OptionError(f'There is no published detector {name!r}{nearest(name, CONFIGS)}: see list_detectors().')
    return CONFIGS[name]
