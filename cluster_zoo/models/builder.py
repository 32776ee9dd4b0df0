"""Building models with their pretrained weights. No model gets random weights in the place of others."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor

from ..weights.configs import check_config, check_size
from ..weights.download import hub_folder, is_drive
from ..weights.importing import find_weights
from ..weights.loading import FOREIGN, open_model_folder, split_hub_id
from ..weights.reading import check_fit, convert_state_dict, load_state_dict

__all__ = ['ASSETS', 'build_model']

ASSETS = Path(__file__).parents[1] / 'assets'


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_filter_fn: Callable | None = None,
    variant_args: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's ``build_model_with_cfg``, with weights from the package, the cache or a download, and `check_fit`.

    Only what timm adapts may differ from the model: the classifier if ``num_classes`` does, and the first convolution's
    input channels if ``in_chans`` does.

    Args:
        model_cls: As in timm, and so is what is not mentioned here.
        variant: The architecture.
        variant_args: Arguments that make the architecture. Those that belong to the weights win over them, and
            ``kwargs`` over both.
        cache_dir: Folder in place of the cache of weights and of Hugging Face's.

    Raises:
        CheckpointError: The pretrained weights cannot be had, cannot be read or do not fit; or a configuration from
            elsewhere is refused.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    source = resolve_pretrained_cfg(variant, pretrained_cfg).source
    foreign = source in FOREIGN
    if foreign:
        own = get_pretrained_cfg(variant)
        overlay |= dict(classifier=own.classifier, first_conv=own.first_conv, source=None)  # not for a file to say
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    where, folder, stored = str(cfg.hf_hub_id or cfg.file), None, {}
    if foreign:
        described = {k: v for k, v in pretrained_cfg.items() if k not in ('source', 'hf_hub_id', 'file')}
        model_args = kwargs.get('pretrained_model_args') or {}
        check_config(dict(architecture=variant, pretrained_cfg=described, model_args=model_args), where)
        if pretrained and not cfg.state_dict:
            folder = Path(cfg.file) if source == 'local-dir' else hub_folder(*split_hub_id(cfg.hf_hub_id), cache_dir)
    elif pretrained and not (cfg.state_dict or cfg.file or cfg.hf_hub_id) and (is_drive(cfg.url) or not cfg.url):
        folder = find_weights(f'{variant}.{cfg.tag}', cfg.url, cache_dir)
    if folder is not None:
        config, state_dict = open_model_folder(folder, variant)
        overlay |= dict(state_dict=state_dict)
        stored = {} if foreign else config.get('model_args') or {}
    elif pretrained and cfg.file and not foreign:
        overlay |= dict(state_dict=load_state_dict(cfg.file))
    build = partial(build_model_with_cfg, model_cls, variant, pretrained_cfg=pretrained_cfg)
    arguments = {**(variant_args or {}), **stored, **kwargs}
    if foreign:
        check_size(partial(build, pretrained=False, **copy.deepcopy(arguments)), overlay.get('state_dict'), where)
    model = build(
        pretrained=pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_checked(pretrained_filter_fn, cfg, bool(kwargs.get('features_only'))),
        **arguments,
    )
    model.pretrained_cfg.pop('state_dict', None)  # the weights are in the model now
    model._model_args = dict(stored)  # as timm's create_model keeps those of the call
    return model


def _checked(filter_fn: Callable | None, cfg: PretrainedCfg, features_only: bool) -> Callable:
    """A filter for timm, which converts a state dict and compares it with the model."""

    def adapted(model: nn.Module) -> set[str]:
        layers = []
        if features_only or model.num_classes != model.pretrained_cfg['num_classes']:
            layers += [cfg.classifier] if isinstance(cfg.classifier, str) else list(cfg.classifier or ())
        if model.in_chans != cfg.input_size[0]:
            layers += [cfg.first_conv] if isinstance(cfg.first_conv, str) else list(cfg.first_conv or ())
        return {f'{layer}.{kind}' for layer in layers for kind in ('weight', 'bias')}

    def filter_and_check(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if filter_fn:
            state_dict = convert_state_dict(state_dict, model, filter_fn)
        head = state_dict.get(f'{cfg.classifier}.weight')
        if head is not None and len(head) == model.num_classes and cfg.num_classes >= 0:  # below 0: leave it out
            model.pretrained_cfg['num_classes'] = model.num_classes  # or timm would drop a head that fits
        model.pretrained_cfg.pop('state_dict', None)  # or wrappers of the model would keep it
        check_fit(state_dict, model, ignore=adapted(model).__contains__)
        return state_dict

    return filter_and_check
