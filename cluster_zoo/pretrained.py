"""Building models, and where their pretrained weights come from."""

from collections.abc import Callable
from typing import Any

import torch.nn as nn
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor

from .weights import check_fit, load_state_dict

__all__ = ['build_model']


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_filter_fn: Callable | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's ``build_model_with_cfg``, but weights from files are read by `load_state_dict` and checked by `check_fit`.

    Only what timm adapts may differ from the model: the classifier if ``num_classes`` does, and the first convolution's
    input channels if ``in_chans`` does.

    Raises:
        CheckpointError: The pretrained weights cannot be read or do not fit.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    overlay = dict(pretrained_cfg_overlay or {})
    if pretrained and cfg.file and not cfg.state_dict:
        overlay['state_dict'] = load_state_dict(cfg.file)

    def filter_and_check(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if pretrained_filter_fn:
            state_dict = pretrained_filter_fn(dict(state_dict), model)
        head = state_dict.get(f'{cfg.classifier}.weight')
        if head is not None and len(head) == model.num_classes and cfg.num_classes >= 0:  # below 0: leave it out
            model.pretrained_cfg['num_classes'] = model.num_classes  # or timm would drop a head that fits
        adapted = []
        if kwargs.get('features_only') or model.num_classes != model.pretrained_cfg['num_classes']:
            adapted += [cfg.classifier] if isinstance(cfg.classifier, str) else list(cfg.classifier or ())
        if model.in_chans != cfg.input_size[0]:
            adapted += [cfg.first_conv] if isinstance(cfg.first_conv, str) else list(cfg.first_conv or ())
        prefixes = tuple(f'{name}.' for name in adapted)
        check_fit(state_dict, model, ignore=lambda name: name.startswith(prefixes))
        return state_dict

    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=filter_and_check,
        **kwargs,
    )
    model.pretrained_cfg.pop('state_dict', None)  # the weights are in the model now
    return model
