"""The dense systems that authors published with code: architecture, training and test settings, and results.

`create_segmenter` builds a system by its name. ``train.py`` and ``validate.py`` use the other values as defaults.
``python -m segmentation [FILTER]`` prints a table of the systems.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from timm.utils import natural_key

from cluster_zoo.errors import OptionError, nearest

__all__ = ['CONFIGS', 'SegmenterConfig', 'list_segmenters', 'matching', 'segmenter_config']


@dataclass(frozen=True)
class SegmenterConfig:
    """A published segmentation system.

    All systems are trained with cross-entropy over the labeled pixels, crops in which no class covers more than 75 %,
    horizontal flips, photometric distortion, and batch norms synchronized over processes.
    """

    name: str
    head: str  # see `create_segmenter`
    backbone: str  # timm model; a tag names the pretrained weights that the authors started from
    num_classes: int
    dataset: str  # see `create_dataset`
    options: dict[str, Any] = field(hash=False)  # other arguments of `create_segmenter`
    paper: str
    crop: int = 512  # side of training crops and of the windows of the 'slide' test, pixels
    scale: tuple[int, int] = (2048, 512)  # sides that images are resized into; in training times a factor 0.5 to 2
    batch_size: int = 16  # crops per iteration, over all processes
    iterations: int = 160_000
    optimizer: str = 'adamw'  # or 'sgd'
    lr: float = 6e-5  # after warm-up, for batch_size
    momentum: float = 0.9  # of 'sgd'
    weight_decay: float = 0.01
    norm_decay: str = 'heads'  # which norms, position embeddings and tables, and tokens decay: 'all' or 'heads'
    schedule: str = 'poly'  # lr to min_lr by (1 - step / iterations) ** power; or 'cosine_restarts'
    power: float = 1.0
    min_lr: float = 0.0  # of all parameters: head_lr_scale does not apply
    periods: tuple[int, ...] = ()  # of 'cosine_restarts', iterations
    restart_weights: tuple[float, ...] = ()  # initial learning rate of each period, as a fraction of lr
    warmup: int = 1500  # iterations of linear warm-up from 1e-6 * lr
    head_lr_scale: float = 1.0  # factor on the learning rate of everything but the backbone
    guidance_weight: float = 0.0  # of the Dice loss of the guidance logits
    auxiliary_weight: float = 0.0  # of the loss of the auxiliary head
    test_mode: str = 'whole'  # or 'slide', windows of size crop
    test_stride: int = 0  # distance of the windows, pixels
    test_pad: bool = False  # pad images smaller than a window
    test_multiple: int = 1  # a second resize rounds the sides of test images up to a multiple, pixels
    miou: float | None = None  # published mIoU at a single scale, %
    miou_ms: float | None = None  # with scales 0.5, 0.75, 1, 1.25, 1.5 and 1.75 and flips, %
    source: str | None = None  # address of the authors' checkpoint or of its folder


_COC_PAPER = 'Image as Set of Points, ICLR 2023, https://arxiv.org/abs/2303.01494'
_FEC_PAPER = 'Neural Clustering based Visual Representation Learning, CVPR 2024, https://arxiv.org/abs/2403.17409'
_COND_PAPER = 'CondNet: Conditional Classifier for Scene Segmentation, SPL 2021, https://arxiv.org/abs/2109.10322'
_PROXY_PAPER = 'Semantic Segmentation by Early Region Proxy, CVPR 2022, https://arxiv.org/abs/2203.14043'

_FOLDER = 'https://drive.google.com/drive/folders/'
_FILE = 'https://drive.google.com/file/d/'

_CLASSES = {'ade20k': 150, 'cityscapes': 19, 'pascal_context_59': 59}


def _semantic_fpn(name: str, backbone: str, proposals: Any, paper: str, folder: str, miou: float) -> SegmenterConfig:
    """Semantic FPN on ADE20K, with the settings of both Context Cluster and FEC."""
    return SegmenterConfig(
        name=f'semantic_fpn_{name}',
        head='semantic_fpn',
        backbone=backbone,
        num_classes=_CLASSES['ade20k'],
        dataset='ade20k',
        options=dict(dropout=0.1, proposals=proposals),
        iterations=80_000,
        lr=1e-4,
        weight_decay=1e-4,
        norm_decay='all',
        power=0.9,
        warmup=0,
        test_multiple=32,
        miou=miou,
        paper=paper,
        source=_FOLDER + folder,
    )


def _condnet(
    name: str, head: str, backbone: str, dataset: str, options: dict[str, Any], **kwargs: Any
) -> SegmenterConfig:
    """A conditional classifier on DeepLabV3+ or UPerNet, with an auxiliary head."""
    return SegmenterConfig(
        name=f'condnet_{name}_{dataset}',
        head=head,
        backbone=backbone,
        num_classes=_CLASSES[dataset],
        dataset=dataset,
        options=dict(classifier='cond', channels=512, dropout=0.1, auxiliary=True, **options),
        guidance_weight=0.2,
        auxiliary_weight=0.4,
        paper=_COND_PAPER,
        **kwargs,
    )


def _condnet_resnet(
    name: str, dataset: str, miou: tuple[float, float], file: str, stride: int = 0, **kwargs: Any
) -> SegmenterConfig:
    """CondNet on DeepLabV3+ and a ResNet whose stem has three 3 x 3 convolutions."""
    settings = dict(optimizer='sgd', lr=0.01, weight_decay=5e-4, norm_decay='all', power=0.9, min_lr=1e-4, warmup=0)
    settings |= dict(test_mode='slide' if stride else 'whole', test_stride=stride)
    settings |= dict(miou=miou[0], miou_ms=miou[1], source=_FILE + file)
    backbone = name.replace('r', 'resnet') + 'c'
    return _condnet(name, 'deeplabv3plus', backbone, dataset, dict(output_stride=8), **settings | kwargs)


def _region_proxy(
    name: str,
    backbone: str,
    early: int,
    miou: tuple[float, float],
    file: str,
    dataset: str = 'ade20k',
    crop: int = 512,
    restarts: bool = False,
) -> SegmenterConfig:
    """RegionProxy on a plain or hybrid ViT. The larger models are trained with cosine restarts."""
    iterations = 160_000 if dataset == 'ade20k' else 80_000
    schedule: dict[str, Any] = {}
    if restarts:
        periods = (iterations // 8, iterations // 4, iterations // 8 * 5)
        schedule = dict(schedule='cosine_restarts', periods=periods, restart_weights=(1.0, 0.5, 0.25))
    return SegmenterConfig(
        name=f'region_proxy_{name}_{dataset}',
        head='region_proxy',
        backbone=backbone,
        num_classes=_CLASSES[dataset],
        dataset=dataset,
        options=dict(early=early, img_size=crop, drop_path_rate=0.1),
        crop=crop,
        scale=(2048, 1024 if dataset == 'cityscapes' else crop),
        iterations=iterations,
        **schedule,
        test_mode='slide',
        test_stride=512 if dataset == 'cityscapes' else crop,
        test_pad=True,
        miou=miou[0],
        miou_ms=miou[1],
        paper=_PROXY_PAPER,
        source=_FILE + file,
    )


_PASCAL_CONTEXT = dict(lr=1e-3, weight_decay=1e-4, head_lr_scale=10.0, iterations=80_000, crop=480, scale=(520, 520))
_SWIN = 'swin_base_patch4_window12_384.ms_in1k'
_TI = 'vit_tiny_patch16_384.augreg_in21k_ft_in1k'
_S = 'vit_small_patch16_384.augreg_in21k_ft_in1k'
_B = 'deit_base_distilled_patch16_384.fb_in1k'
_L = 'vit_large_patch16_384.augreg_in21k_ft_in1k'
_R26 = 'vit_small_r26_s32_384.augreg_in21k_ft_in1k'
_R50 = 'vit_large_r50_s32_384.augreg_in21k_ft_in1k'
_STEM = -1  # early layer of a hybrid ViT: the output of its ResNet

_CONFIGS = (
    # The numbers in the names of Context Cluster are centers per region.
    _semantic_fpn('coc_small_4', 'coc_small', 2, _COC_PAPER, '1p3QF6shTC-QCHt9Ladj5OjI7D25rso33', 36.6),
    _semantic_fpn('coc_small_25', 'coc_small', 5, _COC_PAPER, '1NXC7NjqVeGoF7Y1IDgPj-Hk64VPPF67K', 36.4),
    _semantic_fpn('coc_small_49', 'coc_small', 7, _COC_PAPER, '1V7AoSElympAgNdyASZ6VfghUEEaxwQMF', 36.3),
    _semantic_fpn('coc_medium_4', 'coc_medium', 2, _COC_PAPER, '1CQAXrGoVVot5fcIJDEpx_VDqQaOpyd7u', 40.2),
    _semantic_fpn('coc_medium_25', 'coc_medium', 5, _COC_PAPER, '1tKYCQSqoOEPtHYBUEAEhzheObt6zBTwZ', 40.6),
    _semantic_fpn('coc_medium_49', 'coc_medium', 7, _COC_PAPER, '1VLfS9HH8WOM-VYFJo7oiTRut6JjxMuE9', 40.8),
    # mIoU of FEC as quoted by a later paper of the same group
    _semantic_fpn('fec_small', 'fec_small', (10, 10, 5, 5), _FEC_PAPER, '1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A', 35.3),
    _semantic_fpn('fec_base', 'fec_base', (10, 10, 5, 5), _FEC_PAPER, '1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A', 37.7),
    _semantic_fpn('fec_large', 'fec_large', (10, 10, 5, 5), _FEC_PAPER, '1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A', 40.5),
    _condnet_resnet('r50', 'ade20k', (43.68, 44.30), '1ngWFxzHgdKyHGKRzzHpM5qixb1nZQouI'),
    # Whole test images, as in the released configuration; an earlier one had windows of 512 with a stride of 342
    _condnet_resnet('r101', 'ade20k', (45.64, 47.12), '1LbMbEBkVuHFkKj3o1HSeTbRO4GzlA_ym'),
    _condnet_resnet(
        'r101', 'pascal_context_59', (54.29, 55.74), '1LjtqG_dcwseCJDx17ENj4o4EUlovk8EX', stride=320, **_PASCAL_CONTEXT
    ),
    _condnet('swin_base', 'upernet', _SWIN, 'ade20k', dict(img_size=512, drop_path_rate=0.3)),
    _region_proxy('vit_ti16', _TI, 4, (42.1, 43.1), '1sq3g3JcQ2NSJch-MvlvvnHFFeN-MU_DE'),
    _region_proxy('vit_s16', _S, 4, (47.6, 48.5), '1pJD4-xRiVj36SplzNhonIuNHd82A05GX'),
    _region_proxy('r26_s32', _R26, _STEM, (47.8, 49.1), '1n51emyE6EWAuoBq_P8cViFtNmf9dDxzV'),
    _region_proxy('vit_b16', _B, 4, (49.8, 50.5), '1PMVQv8cvaZmV16ARdbuQSv6-3DDeLXPy', restarts=True),
    _region_proxy('r50_l32', _R50, _STEM, (51.0, 51.7), '1Kk0ABYbMOwvomrU4FaDl4Ban2XBhcxjU', crop=640, restarts=True),
    _region_proxy('vit_l16', _L, 9, (52.9, 53.4), '1t6Un6m-1xdoir33TG7IAiilaLamgioFZ', crop=640, restarts=True),
    _region_proxy('vit_ti16', _TI, 2, (76.5, 77.7), '1N4Ef8kfMeAGhcI3JLoPGd_XfBBArdF8Y', 'cityscapes', 768),
    _region_proxy('vit_s16', _S, 2, (79.8, 81.5), '11GBWhCVAXEAO_iS_MFEecndK_IF2ik4Y', 'cityscapes', 768),
    _region_proxy('vit_b16', _B, 2, (81.0, 82.2), '10yTMd5j6xoPYcVSMzhkL5S_Hh9JQ4b64', 'cityscapes', 768, True),
    _region_proxy('vit_l16', _L, 5, (81.4, 82.7), '1EBfO9M8ZYB_Eye4WpHqMs9v2WrRzbORI', 'cityscapes', 768, True),
)

CONFIGS: dict[str, SegmenterConfig] = {config.name: config for config in _CONFIGS}


def list_segmenters(filter: str = '') -> list[str]:
    """Returns the names of the published systems, in natural order.

    Args:
        filter: Part of a name such as ``'coc'``, or a pattern of whole names such as ``'*_25'``; '' for all names.
    """
    return matching(CONFIGS, filter)


def matching(names: Iterable[str], filter: str) -> list[str]:
    """Returns the names that match a filter, see `list_segmenters`, in natural order."""
    pattern = filter if set(filter) & set('*?[') else f'*{filter}*'
    return sorted((name for name in names if fnmatchcase(name, pattern)), key=natural_key)


def segmenter_config(name: str) -> SegmenterConfig:
    """Returns the published system of a name.

    Raises:
        OptionError: The name is unknown.
    """
    if name not in CONFIGS:
        raise OptionError(
            f'There is no published system {name!r}{nearest(name, CONFIGS)} (--segmenter): list_segmenters() or '
            'python -m segmentation lists them.'
        )
    return CONFIGS[name]
