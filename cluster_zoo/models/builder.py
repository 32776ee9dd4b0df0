"""Builds models with their pretrained weights, and never with random weights instead of pretrained ones."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor

from ..weights.checkpoints import check_fit, convert_state_dict, load_state_dict
from ..weights.configs import check_config, check_size
from ..weights.download import hub_folder, is_drive
from ..weights.importing import find_weights
from ..weights.loading import FOREIGN, open_model_folder

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
    """timm's ``build_model_with_cfg`` with weights from the package, the cache or a download, and with `check_fit`.

    The weights may differ from the model only where timm adapts them: in the classifier if ``num_classes`` differs, and
    in the input channels of the first convolution if ``in_chans`` differs.

    Args:
        model_cls: As in timm, like all arguments that are not listed here.
        variant: The architecture.
        variant_args: Arguments that define the architecture. The arguments stored with the weights override them, and
            ``kwargs`` override both.
        cache_dir: Folder used instead of the weight cache and of Hugging Face's cache.

    Raises:
        CheckpointError: The pretrained weights are not available, cannot be read or do not fit; or a configuration of a
            model folder or of the Hub is refused.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    source = resolve_pretrained_cfg(variant, pretrained_cfg).source
    foreign = source in FOREIGN
    if foreign:
        own = get_pretrained_cfg(variant)
        overlay |= dict(classifier=own.classifier, first_conv=own.first_conv, source=None)  # a file must not set these
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    where, folder, stored = str(cfg.hf_hub_id or cfg.file), None, {}
    if foreign:
        described = {k: v for k, v in pretrained_cfg.items() if k not in ('source', 'hf_hub_id', 'file')}
        model_args = kwargs.get('pretrained_model_args') or {}
        check_config(dict(architecture=variant, pretrained_cfg=described, model_args=model_args), where)
        if pretrained and not cfg.state_dict:
            folder = Path(cfg.file) if source == 'local-dir' else hub_folder(cfg.hf_hub_id, cache_dir)
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
    model.pretrained_cfg.pop('state_dict', None)  # already loaded; do not keep a second copy
    model._model_args = dict(stored)  # timm's create_model stores the arguments of the call here
    return model


def _checked(filter_fn: Callable | None, cfg: PretrainedCfg, features_only: bool) -> Callable:
    """A filter function for timm that converts a state dict and checks that it fits the model."""

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
        if head is not None and len(head) == model.num_classes and cfg.num_classes >= 0:  # negative: not loaded
            model.pretrained_cfg['num_classes'] = model.num_classes  # or timm would remove a head that fits
        model.pretrained_cfg.pop('state_dict', None)  # or wrappers of the model would store it
        check_fit(state_dict, model, ignore=adapted(model).__contains__)
        return state_dict

    return filter_and_check


def convert_in_place(state_dict: dict[str, Tensor], prefix: str, model: nn.Module, filter_fn: Callable) -> None:
    """Converts the entries of a model, whose names start with ``prefix``, in a state dict that is being loaded."""
    own = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    state_dict.update({prefix + name: value for name, value in convert_state_dict(own, model, filter_fn).items()})
