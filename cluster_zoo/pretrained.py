"""Building models with their pretrained weights. No model gets random weights in the place of others."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor

from . import store
from .sources import Weights, entry, find_weights
from .untrusted import check_config
from .weights import CheckpointError, check_fit, converted

__all__ = ['build_model', 'check_size']

_FOREIGN = ('hf-hub', 'local-dir')  # where timm takes a configuration as it finds it
_LARGEST = 250_000_000  # numbers that a foreign configuration may ask for without having them; the largest here has 87


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_filter_fn: Callable | None = None,
    variant_args: dict[str, Any] | None = None,
    args_from_weights: Callable[[dict[str, Tensor]], dict[str, Any]] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's ``build_model_with_cfg``, with weights from `find_weights`, and `check_fit`.

    Only what timm adapts may differ from the model: the classifier if ``num_classes`` does, and the first convolution's
    input channels if ``in_chans`` does.

    Args:
        model_cls: As in timm, and so is what is not mentioned here.
        variant: The architecture.
        variant_args: Arguments that make the architecture. Those that belong to the weights win over them, and
            ``kwargs`` over both.
        args_from_weights: What tensors tell of the arguments that they belong to.
        cache_dir: See `find_weights`.

    Raises:
        CheckpointError: The pretrained weights cannot be had, cannot be read or do not fit; or a configuration from
            elsewhere is refused.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    foreign = isinstance(pretrained_cfg, dict) and pretrained_cfg.get('source') in _FOREIGN
    if foreign:
        overlay |= _check_origin(pretrained_cfg, variant, kwargs.get('pretrained_model_args'))
    if overlay.get('state_dict') or overlay.get('file'):
        overlay.setdefault('source', None)  # an explicit file comes before the hub's or the folder's
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    weights = find_weights(cfg, cache_dir) if pretrained and not cfg.state_dict else None
    if weights:
        overlay |= dict(state_dict=weights.state_dict, source=None)
    stored = _stored_args(cfg, weights)
    if foreign and weights and weights.config and stored != (kwargs.get('pretrained_model_args') or {}):
        raise CheckpointError(f'{_origin(pretrained_cfg)} has changed while it was loaded. Try again.')
    state_dict = weights.state_dict if weights else cfg.state_dict if pretrained else None
    if args_from_weights and state_dict:
        stored = args_from_weights(state_dict) | stored
    build = partial(build_model_with_cfg, model_cls, variant, pretrained_cfg=pretrained_cfg)
    arguments = {**(variant_args or {}), **stored, **kwargs}
    if foreign:
        check_size(partial(build, **copy.deepcopy(arguments)), state_dict, _origin(pretrained_cfg))
    model = build(
        pretrained=pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_checked(pretrained_filter_fn, cfg, bool(kwargs.get('features_only'))),
        **arguments,
    )
    model.pretrained_cfg.pop('state_dict', None)  # the weights are in the model now
    model._model_args = stored  # as timm's create_model keeps those of the call
    return model


def _origin(pretrained_cfg: dict[str, Any]) -> str:
    return str(pretrained_cfg.get('hf_hub_id') or pretrained_cfg.get('file'))


def _check_origin(pretrained_cfg: dict[str, Any], variant: str, model_args: dict[str, Any] | None) -> dict[str, Any]:
    """Refuses what a configuration from a hub or a folder may not say, before anything acts on it.

    Returns:
        What it has no say in: which layers are adapted to other classes and channels.
    """
    described = {key: value for key, value in pretrained_cfg.items() if key not in ('source', 'hf_hub_id', 'file')}
    config = dict(architecture=variant, pretrained_cfg=described, model_args=model_args or {})
    check_config(config, f'the configuration of {_origin(pretrained_cfg)}')
    own = get_pretrained_cfg(variant)
    return dict(classifier=own.classifier, first_conv=own.first_conv)


def check_size(build: Callable[..., nn.Module], state_dict: dict[str, Tensor] | None, origin: str) -> None:
    """Build a model that somebody else describes without memory for it, and see that it has a size to expect.

    Args:
        build: Builds it, called with ``pretrained=False``.
        state_dict: What there is to fill it; None if it is to stay empty.
        origin: What messages call the description.

    Raises:
        CheckpointError: It can not be built, or is much larger than what there is to fill it.
    """
    try:
        with torch.device('meta'):
            model = build(pretrained=False)
    except (
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        raise CheckpointError(f'{origin} describes no model that can be built: {error}') from error
    needed = sum(x.numel() for tensors in (model.parameters(), model.buffers()) for x in tensors)
    found = sum(x.numel() for x in (state_dict or {}).values())
    if needed > max(_LARGEST, 4 * found):
        raise CheckpointError(
            f'{origin} was refused: it describes a model of {needed:,} numbers and has {found:,} of them.'
        )


def _stored_args(cfg: PretrainedCfg, weights: Weights | None) -> dict[str, Any]:
    """Arguments of the model that weights from a model folder belong to, or would if they were wanted."""
    config = weights.config if weights else None
    if config is None and weights is None and (folder := entry(cfg)) is not None:
        config = store.read_config(folder, cfg.architecture)
    return dict((config or {}).get('model_args') or {})


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
            state_dict = converted(state_dict, model, filter_fn)
        head = state_dict.get(f'{cfg.classifier}.weight')
        if head is not None and len(head) == model.num_classes and cfg.num_classes >= 0:  # below 0: leave it out
            model.pretrained_cfg['num_classes'] = model.num_classes  # or timm would drop a head that fits
        model.pretrained_cfg.pop('state_dict', None)  # or wrappers of the model would keep it
        check_fit(state_dict, model, ignore=adapted(model).__contains__)
        return state_dict

    return filter_and_check
