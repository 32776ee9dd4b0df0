"""Converts the authors' detectors, whose checkpoints have the names of mmdetection 2, to torchvision's names."""

import re

import torch
from torch import Tensor, nn

from cluster_zoo.weights.conversion import Names, renamed

from ..models.conversion import convert_backbone

__all__ = ['convert_detector']

_HEADS: Names = (
    (r'^neck\.lateral_convs\.(\d+)\.conv\.', r'backbone.fpn.inner_blocks.\1.0.'),
    (r'^neck\.fpn_convs\.(\d+)\.conv\.', r'backbone.fpn.layer_blocks.\1.0.'),
    (r'^rpn_head\.rpn_conv\.', 'rpn.head.conv.0.0.'),
    (r'^rpn_head\.rpn_cls\.', 'rpn.head.cls_logits.'),
    (r'^rpn_head\.rpn_reg\.', 'rpn.head.bbox_pred.'),
    (r'^roi_head\.bbox_head\.shared_fcs\.([01])\.', lambda m: f'roi_heads.box_head.fc{int(m[1]) + 6}.'),
    (r'^roi_head\.bbox_head\.fc_cls\.', 'roi_heads.box_predictor.cls_score.'),
    (r'^roi_head\.bbox_head\.fc_reg\.', 'roi_heads.box_predictor.bbox_pred.'),
    (r'^roi_head\.mask_head\.convs\.(\d+)\.conv\.', r'roi_heads.mask_head.\1.0.'),
    (r'^roi_head\.mask_head\.upsample\.', 'roi_heads.mask_predictor.conv5_mask.'),
    (r'^roi_head\.mask_head\.conv_logits\.', 'roi_heads.mask_predictor.mask_fcn_logits.'),
)
# Outputs for the background, which comes first in torchvision and is not used there: 4 offsets of a box, 1 mask
_WITHOUT_BACKGROUND = {'roi_heads.box_predictor.bbox_pred.': 4, 'roi_heads.mask_predictor.mask_fcn_logits.': 1}


def convert_detector(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts a checkpoint of a whole detector to the names of torchvision's detectors.

    mmdetection has the background after the classes, and no boxes and masks of it. torchvision has it before them, with
    boxes and masks that are never used, which become 0.

    Args:
        state_dict: An authors' checkpoint, or one that has this package's names.
        model: The detector to load it into. Entries of a mask head are dropped if it has none.
    """
    if any(name.startswith(('neck.', 'rpn_head.', 'roi_head.')) for name in state_dict):
        state_dict = _convert(state_dict)
    if not any(name.startswith('roi_heads.mask') for name, _ in model.named_parameters()):
        state_dict = {name: x for name, x in state_dict.items() if not name.startswith('roi_heads.mask')}
    return state_dict


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    backbone = {name.removeprefix('backbone.'): x for name, x in state_dict.items() if name.startswith('backbone.')}
    heads = {name: x for name, x in state_dict.items() if not name.startswith('backbone.')}
    converted = {}
    for name, value in convert_backbone(backbone).items():
        converted[f'backbone.body.{name}' if name.startswith('norms.') else f'backbone.body.model.{name}'] = value
    for name, value in renamed(heads, _HEADS).items():
        prefix = re.sub(r'[^.]*$', '', name)
        if prefix == 'roi_heads.box_predictor.cls_score.':
            value = value.roll(1, 0)
        elif prefix in _WITHOUT_BACKGROUND:
            unused = value.new_zeros(_WITHOUT_BACKGROUND[prefix], *value.shape[1:])
            value = torch.cat([unused, value])
        converted[name] = value
    return converted
