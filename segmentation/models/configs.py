"""Every dense system that authors published with code: what it is made of, how it was trained and tested, its figures.

`create_segmenter` builds one by its name, `train.py` and `validate.py` take the rest as their defaults. As markdown,
with the parameters counted:

    python -m segmentation
    python -m segmentation '*coc*'
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from timm.utils import natural_key

from cluster_zoo.errors import OptionError, nearest

__all__ = ['CONFIGS', 'SegmenterConfig', 'list_segmenters', 'segmenter_config']


@dataclass(frozen=True)
class SegmenterConfig:
    """A published segmentation system.

    All were trained with the cross-entropy of the pixels that have a label, crops in which no class covers more than
    75 %, flips, photometric distortion, and batch norms that are synchronised over the processes.

    Attributes:
        name: Its name here.
        head: The decoder, as `create_segmenter` names it.
        backbone: timm's name of the backbone. A tag names the pretrained weights that the authors started from.
        num_classes: Classes K.
        dataset: The dataset, as `create_dataset` names it.
        options: Further arguments of `create_segmenter`: the classifier, the widths, the backbone's own options.
        crop: Side of the square training crops and of the windows of the 'slide' test, pixels.
        scale: Size that an image is fitted into before both, (long side, short side) in pixels; in training times a
            random ratio from 0.5 to 2.
        batch_size: Crops in one step, over all processes.
        iterations: Training steps.
        optimizer: 'sgd' or 'adamw'.
        lr: Learning rate at the end of the warm-up, for ``batch_size``.
        momentum: Momentum of SGD; AdamW has its usual betas, 0.9 and 0.999.
        weight_decay: Weight decay.
        decay_norms: Whether norms, positions (and Swin's tables of them) and class tokens decay like the rest.
        schedule: 'poly', ``(1 - step / iterations) ** power`` from ``lr`` down to ``min_lr``, or 'cosine_restarts',
            half a cosine from ``lr`` times a weight to ``min_lr`` in each period.
        power: Exponent of 'poly'.
        min_lr: Learning rate that the schedule ends at.
        periods: Lengths of the periods of 'cosine_restarts', steps; they add up to ``iterations``.
        restart_weights: Share of ``lr`` that each period starts with.
        warmup: Steps in which the rate rises linearly, from a millionth of it.
        head_lr_scale: Learning rate of what is not the backbone, over that of the backbone.
        guidance_weight: Weight of the guidance's Dice loss beside the cross-entropy of weight 1; 0 without guidance.
        auxiliary_weight: Weight of the auxiliary head's cross-entropy; 0 without such a head.
        test_mode: 'whole' image or 'slide', windows of the crop's size.
        test_stride: Distance of the windows, pixels; 0 for 'whole'.
        test_pad: Whether images that are smaller than a window are padded; else, windows are as small as they.
        test_multiple: Sides of test images are rounded up to a multiple of this, pixels; 1 leaves them.
        miou: Published mIoU at a single scale, %; None where none is published.
        miou_ms: With scales 0.5, 0.75, 1, 1.25, 1.5 and 1.75, each also flipped, %; None where none is published.
        paper: Title, venue and address.
        source: Address of the authors' checkpoint, or of the folder that it is in; None where none is published.
    """

    name: str
    head: str
    backbone: str
    num_classes: int
    dataset: str
    options: dict[str, Any] = field(hash=False)
    paper: str
    crop: int = 512
    scale: tuple[int, int] = (2048, 512)
    batch_size: int = 16
    iterations: int = 160_000
    optimizer: str = 'adamw'
    lr: float = 6e-5
    momentum: float = 0.9
    weight_decay: float = 0.01
    decay_norms: bool = False
    schedule: str = 'poly'
    power: float = 1.0
    min_lr: float = 0.0
    periods: tuple[int, ...] = ()
    restart_weights: tuple[float, ...] = ()
    warmup: int = 1500
    head_lr_scale: float = 1.0
    guidance_weight: float = 0.0
    auxiliary_weight: float = 0.0
    test_mode: str = 'whole'
    test_stride: int = 0
    test_pad: bool = False
    test_multiple: int = 1
    miou: float | None = None
    miou_ms: float | None = None
    source: str | None = None


_COC_PAPER = 'Image as Set of Points, ICLR 2023, https://arxiv.org/abs/2303.01494'
_FEC_PAPER = 'Neural Clustering based Visual Representation Learning, CVPR 2024, https://arxiv.org/abs/2403.17409'
_COND_PAPER = 'CondNet: Conditional Classifier for Scene Segmentation, SPL 2021, https://arxiv.org/abs/2109.10322'
_PROXY_PAPER = 'Semantic Segmentation by Early Region Proxy, CVPR 2022, https://arxiv.org/abs/2203.14043'

_FOLDER = 'https://drive.google.com/drive/folders/'
_FILE = 'https://drive.google.com/file/d/'

_CLASSES = {'ade20k': 150, 'cityscapes': 19, 'pascal_context_59': 59}


def _semantic_fpn(
    name: str, backbone: str, proposals: Any, paper: str, folder: str, miou: float | None = None
) -> SegmenterConfig:
    """Semantic FPN on ADE20K, which Context Cluster and FEC are trained with alike."""
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
        decay_norms=True,
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
    """A conditional classifier on DeepLabV3+ or UPerNet, with guidance and an auxiliary head."""
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


_RESNET = dict(optimizer='sgd', lr=0.01, weight_decay=5e-4, decay_norms=True, power=0.9, min_lr=1e-4, warmup=0)


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
    """Region proxies on a plain or a hybrid ViT; the larger ones were trained with a rate that restarts."""
    iterations = 160_000 if dataset == 'ade20k' else 80_000
    schedule: dict[str, Any] = dict(schedule='poly')
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
        test_stride=crop,
        test_pad=True,
        miou=miou[0],
        miou_ms=miou[1],
        paper=_PROXY_PAPER,
        source=_FILE + file,
    )


_TI = 'vit_tiny_patch16_384.augreg_in21k_ft_in1k'
_S = 'vit_small_patch16_384.augreg_in21k_ft_in1k'
_B = 'deit_base_distilled_patch16_384.fb_in1k'
_L = 'vit_large_patch16_384.augreg_in21k_ft_in1k'
_R26 = 'vit_small_r26_s32_384.augreg_in21k_ft_in1k'
_R50 = 'vit_large_r50_s32_384.augreg_in21k_ft_in1k'
_STEM = -1  # early layer of a hybrid ViT: the tokens that its ResNet gives

_ALL = (
    # -4, -25 and -49: so many centers in every region
    _semantic_fpn('coc_small_4', 'coc_small', 2, _COC_PAPER, '1p3QF6shTC-QCHt9Ladj5OjI7D25rso33', 36.6),
    _semantic_fpn('coc_small_25', 'coc_small', 5, _COC_PAPER, '1NXC7NjqVeGoF7Y1IDgPj-Hk64VPPF67K', 36.4),
    _semantic_fpn('coc_small_49', 'coc_small', 7, _COC_PAPER, '1V7AoSElympAgNdyASZ6VfghUEEaxwQMF', 36.3),
    _semantic_fpn('coc_medium_4', 'coc_medium', 2, _COC_PAPER, '1CQAXrGoVVot5fcIJDEpx_VDqQaOpyd7u', 40.2),
    _semantic_fpn('coc_medium_25', 'coc_medium', 5, _COC_PAPER, '1tKYCQSqoOEPtHYBUEAEhzheObt6zBTwZ', 40.6),
    _semantic_fpn('coc_medium_49', 'coc_medium', 7, _COC_PAPER, '1VLfS9HH8WOM-VYFJo7oiTRut6JjxMuE9', 40.8),
    # FEC's mIoU as a later paper of the same group quotes it
    _semantic_fpn('fec_small', 'fec_small', (10, 10, 5, 5), _FEC_PAPER, '1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A', 35.3),
    _semantic_fpn('fec_base', 'fec_base', (10, 10, 5, 5), _FEC_PAPER, '1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A', 37.7),
    _semantic_fpn('fec_large', 'fec_large', (10, 10, 5, 5), _FEC_PAPER, '1X7MhOpg50d1aAmWOP9M7psBhW_fJzg2A', 40.5),
    # The ResNets are those whose first convolution is three of 3 x 3
    _condnet(
        'r50',
        'deeplabv3plus',
        'resnet50c',
        'ade20k',
        dict(output_stride=8),
        **_RESNET,
        miou=43.68,
        miou_ms=44.30,
        source=_FILE + '1ngWFxzHgdKyHGKRzzHpM5qixb1nZQouI',
    ),
    _condnet(
        'r101',
        'deeplabv3plus',
        'resnet101c',
        'ade20k',
        dict(output_stride=8),
        **_RESNET,
        test_mode='slide',
        test_stride=342,
        miou=45.64,
        miou_ms=47.12,
        source=_FILE + '1LbMbEBkVuHFkKj3o1HSeTbRO4GzlA_ym',
    ),
    _condnet(
        'r101',
        'deeplabv3plus',
        'resnet101c',
        'pascal_context_59',
        dict(output_stride=8),
        **_RESNET | dict(lr=1e-3, weight_decay=1e-4),
        crop=480,
        scale=(520, 520),
        iterations=80_000,
        head_lr_scale=10.0,
        test_mode='slide',
        test_stride=320,
        miou=54.29,
        miou_ms=55.74,
        source=_FILE + '1LjtqG_dcwseCJDx17ENj4o4EUlovk8EX',
    ),
    _condnet(
        'swin_base',
        'upernet',
        'swin_base_patch4_window12_384.ms_in1k',
        'ade20k',
        dict(img_size=512, drop_path_rate=0.3),
    ),
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

CONFIGS: dict[str, SegmenterConfig] = {config.name: config for config in _ALL}


def list_segmenters(filter: str = '') -> list[str]:
    """Names of the published systems, sorted as timm sorts models.

    Args:
        filter: A pattern such as ``'*coc*'``; '' for all names.
    """
    return sorted((name for name in CONFIGS if fnmatchcase(name, filter or '*')), key=natural_key)


def segmenter_config(name: str) -> SegmenterConfig:
    """The published system of that name.

    Raises:
        OptionError: There is none; the message has the nearest names.
    """
    if name not in CONFIGS:
        raise OptionError(f'{name!r} is no published system{nearest(name, CONFIGS)}; list_segmenters() has all names')
    return CONFIGS[name]
