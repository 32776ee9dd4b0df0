"""torchvision's detectors on the dense levels of registered backbones. `create_detector` builds them by name."""

import inspect
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from cluster_zoo.errors import CheckpointError, OptionError, nearest
from cluster_zoo.weights import check_fit, load_state_dict
from cluster_zoo.weights.checkpoints import convert_state_dict

from ..models.backbones import Pyramid, create_backbone
from .conventions import AlignedRoIPool, ClampedBoxCoder, PreciseDistanceCoder, RoundedResize, StrideAnchors
from .conversion import convert_detector
from .published_systems import CONFIGS

__all__ = ['DETECTORS', 'FeaturePyramid', 'create_detector', 'has_masks', 'load_detector_weights']

_TWO_STAGES = {'mask_rcnn': MaskRCNN, 'faster_rcnn': FasterRCNN}
_ONE_STAGE = {'retinanet': RetinaNet, 'fcos': FCOS}
DETECTORS = _TWO_STAGES | _ONE_STAGE
_CHANNELS = 256
_COCO_CLASSES = 80
_OF_CLASSES = (
    *('roi_heads.box_predictor.', 'roi_heads.mask_predictor.mask_fcn_logits.'),
    'head.classification_head.cls_logits.',
)

_logger = logging.getLogger(__name__)


class FeaturePyramid(nn.Module):
    """A backbone whose dense levels go through a feature pyramid network of 256 channels.

    Detectors of two stages have the levels at strides 4 to 32 and one at 64, every second point of the level before.
    Those of one stage have the levels at strides 8 to 32 and two at 64 and 128, by convolutions.

    Args:
        body: The backbone with its output norms.
        one_stage: Whether the pyramid is for a detector of one stage.
    """

    def __init__(self, body: Pyramid, one_stage: bool):
        super().__init__()
        self.first = 1 if one_stage else 0
        if one_stage:
            body.norms[0] = nn.Identity()  # a parameter without gradient would stop distributed training
        extra = LastLevelP6P7(_CHANNELS, _CHANNELS) if one_stage else LastLevelMaxPool()
        last = body.strides[-1]
        self.strides = [*body.strides[self.first :], *([2 * last, 4 * last] if one_stage else [2 * last])]
        self.out_channels = _CHANNELS
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.channels[self.first :], _CHANNELS, extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W] -> five maps [B, 256, H / strides[i], W / strides[i]], finest first.

        They have the dtype of the images, under autocast, too: anchors and boxes get it from the maps.
        """
        levels = {str(i): level for i, level in enumerate(self.body(x)[self.first :])}
        return {name: level.to(x.dtype) for name, level in self.fpn(levels).items()}


def create_detector(
    detector: str,
    backbone: str | None = None,
    num_classes: int | None = None,
    *,
    pretrained_backbone: bool | str | Path = False,
    checkpoint_path: str | Path | None = None,
    **options: Any,
) -> MaskRCNN | FasterRCNN | RetinaNet | FCOS:
    """Creates a detector, one of torchvision's on a registered backbone.

    It takes and returns what torchvision's detectors do. In training ``model(images, targets)`` is a dictionary of
    losses, else ``model(images)`` a dictionary for each image with ``boxes`` [N, 4] (x1, y1, x2, y2 in pixels),
    ``labels`` [N], ``scores`` [N] and, of Mask R-CNN, ``masks`` [N, 1, H, W], probabilities (an object is where they
    are at least 0.5). Images are a list of [C, H, W], 0 to 1, of any sizes: the model resizes and normalizes them.

    Anchors, RoIAlign, offsets of boxes, sizes of images and masks follow the conventions of mmdetection 2, see
    `conventions`, for all detectors and weights.

    Args:
        detector: 'mask_rcnn', 'faster_rcnn', 'retinanet' or 'fcos'; or the name of a published detector, see
            `list_detectors`, which sets the defaults of all following arguments.
        backbone: Name of a registered model with four stages: coc_*, fec_*, timm's ResNets, Swin, ConvNeXt and others.
        num_classes: Number of classes K, without background. Labels are 1 to K in targets and results, 0 is the
            background. (torchvision's own argument of this name is K + 1.)
        pretrained_backbone: True for timm's pretrained weights of the backbone, or the checkpoint file of a classifier.
        checkpoint_path: Checkpoint of a whole detector, of this package or of the authors (mmdetection 2), whose
            class i, counted from 0, becomes the label i + 1.
        **options: Options of torchvision's class, such as ``min_size`` (800) and ``max_size`` (1333), the sides that
            images are resized into, and ``box_score_thresh`` or ``score_thresh``. All others are passed to the
            backbone, such as ``proposals``, ``regions``, ``pool_regions`` of FEC, and ``drop_path_rate``.

    Raises:
        ValueError: A name is unknown, an option is invalid, or the backbone does not fit.
        CheckpointError: Weights cannot be read or do not fit.

    Example:
        >>> model = create_detector('mask_rcnn', 'coc_small', 80, proposals=5).eval()
        >>> result = model([torch.rand(3, 480, 640)])[0]
        >>> result['masks'].shape[1:]
        torch.Size([1, 480, 640])
    """
    detector, backbone, num_classes, options = _with_defaults(detector, backbone, num_classes, options)
    cls = DETECTORS[detector]
    names = inspect.signature(cls).parameters
    own = {name: options.pop(name) for name in list(options) if name in names}
    levels = create_backbone(backbone, pretrained=pretrained_backbone, **options)
    normalization = _normalization(levels.model, own)
    if {len(values) for values in normalization.values()} != {channels := options.get('in_chans', 3)}:
        raise OptionError(f'Images of {channels} channels need image_mean and image_std with {channels} values each.')
    model = _build(cls, FeaturePyramid(levels, detector in _ONE_STAGE), num_classes, {**own, **normalization})
    if checkpoint_path:
        load_detector_weights(model, load_state_dict(checkpoint_path), checkpoint_path)
    return model


def _with_defaults(
    detector: str, backbone: str | None, num_classes: int | None, options: dict[str, Any]
) -> tuple[str, str, int, dict[str, Any]]:
    """Checks the arguments of `create_detector` and adds those of a published detector."""
    if detector not in (*DETECTORS, *CONFIGS):
        raise OptionError(
            f'There is no detector {detector!r}{nearest(detector, [*DETECTORS, *CONFIGS])}: choose from '
            f'{", ".join(DETECTORS)}, or a published one of list_detectors().'
        )
    if options.pop('pretrained', False):
        source = f': the authors share theirs in {CONFIGS[detector].source}' if detector in CONFIGS else ''
        raise OptionError(
            f'Weights of whole detectors cannot be downloaded by name{source}. Download a file and give it as '
            'checkpoint_path, or use pretrained_backbone=True.'
        )
    if detector in CONFIGS:
        config = CONFIGS[detector]
        detector, backbone = config.detector, backbone or config.backbone
        num_classes = config.num_classes if num_classes is None else num_classes
        options = {**dict(min_size=config.size[1], max_size=config.size[0]), **config.options, **options}
    if backbone is None or num_classes is None:
        raise OptionError(f'The detector {detector} needs a backbone and num_classes.')
    if num_classes < 1:
        raise OptionError(f'num_classes must be at least 1, without the background, got {num_classes}.')
    return detector, backbone, num_classes, options


def has_masks(detector: str) -> bool:
    """Returns whether a detector, by its name or that of a published one, finds masks."""
    return (CONFIGS[detector].detector if detector in CONFIGS else detector) == 'mask_rcnn'


def _build(cls: type[nn.Module], pyramid: FeaturePyramid, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Builds a detector with the conventions of mmdetection. ``options`` are those of torchvision's class."""
    strides = pyramid.strides
    if cls in _ONE_STAGE.values():
        retina = cls is RetinaNet  # three anchors per octave, in three shapes; FCOS has one per place
        sizes = [[4 * stride * 2 ** (i / 3) for i in range(3)] if retina else [stride] for stride in strides]
        defaults = dict(anchor_generator=StrideAnchors(strides, sizes, (0.5, 1.0, 2.0) if retina else (1.0,)))
    else:
        defaults = dict(
            rpn_anchor_generator=StrideAnchors(strides, [[8 * stride] for stride in strides], (0.5, 1.0, 2.0)),
            rpn_post_nms_top_n_train=1000,
            box_roi_pool=AlignedRoIPool(strides[:-1], 7),
        )
        if cls is MaskRCNN:
            defaults['mask_roi_pool'] = AlignedRoIPool(strides[:-1], 14)
    sizes = {name: options.get(name, default) for name, default in (('min_size', 800), ('max_size', 1333))}
    model = cls(pyramid, num_classes + 1, **{**defaults, **options})
    model.transform = RoundedResize(**sizes, image_mean=options['image_mean'], image_std=options['image_std'])
    if isinstance(model, MaskRCNN):
        # The usual initialization grows for few classes: with one, the loss of masks would start at about 10
        nn.init.normal_(model.roi_heads.mask_predictor.mask_fcn_logits.weight, std=math.sqrt(2 / _COCO_CLASSES))
    if isinstance(model, FasterRCNN):
        model.rpn.min_size = torch.finfo(torch.float32).tiny  # pixels; torchvision drops boxes below 0.001
        for part in (model.rpn, model.roi_heads):
            part.box_coder = ClampedBoxCoder(part.box_coder.weights)
    elif isinstance(model, RetinaNet):
        model.box_coder = ClampedBoxCoder(model.box_coder.weights)
    else:
        model.box_coder = model.head.box_coder = PreciseDistanceCoder()
    return model


def _normalization(model: nn.Module, options: dict[str, Any]) -> dict[str, list[float]]:
    """Returns mean and standard deviation of the images, by default those of the backbone's pretrained weights."""
    return {
        f'image_{name}': list(model.pretrained_cfg[name] if (given := options.get(f'image_{name}')) is None else given)
        for name in ('mean', 'std')
    }


def load_detector_weights(
    model: nn.Module, state_dict: dict[str, Tensor], path: str | Path, new_classes: bool = False
) -> None:
    """Loads a state dict with the names of this package or of mmdetection into a detector.

    Args:
        model: A detector of `create_detector`.
        state_dict: The weights.
        path: Their file, for error messages.
        new_classes: Keep the model's own output layers if those of the state dict are for another number of classes.

    Raises:
        CheckpointError: It is not of a detector or does not fit. The model is unchanged.
    """
    if not any(name.startswith(('backbone.fpn.', 'rpn_head.', 'roi_head.', 'bbox_head.')) for name in state_dict):
        what = 'segmenter' if any(name.startswith('backbone.') for name in state_dict) else 'classifier'
        raise CheckpointError(
            f"'{path}' has the weights of a {what}, not of a detector. A training can start from those of a "
            'classifier: pretrained_backbone.'
        )
    state_dict = convert_state_dict(state_dict, model, convert_detector)
    if new_classes:
        own = {name: x for name, x in model.state_dict().items() if name.startswith(_OF_CLASSES) and name in state_dict}
        other = [name for name, x in own.items() if x.shape != state_dict[name].shape]
        if other:
            _logger.warning(f'{path} has another number of classes: {len(other)} entries of output layers start anew')
            state_dict |= {name: own[name] for name in other}
    check_fit(state_dict, model)
    model.load_state_dict(state_dict)
