"""Building models with their pretrained weights. No model gets random weights in the place of others."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor

from . import cache
from .configs import check_config, check_size, read_config
from .download import fetch, hub_folder, is_drive, organization
from .errors import CheckpointError, one_line
from .reading import check_fit, converted, load_state_dict

__all__ = ['ASSETS', 'build_model', 'load_model', 'open_folder', 'weights_folder']

ASSETS = Path(__file__).parents[1] / 'assets'
_FOREIGN = ('hf-hub', 'local-dir')  # where timm takes a configuration as it finds it


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
    foreign = source in _FOREIGN
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
            folder = Path(cfg.file) if source == 'local-dir' else hub_folder(*_split(cfg.hf_hub_id), cache_dir)
    elif pretrained and not (cfg.state_dict or cfg.file or cfg.hf_hub_id) and (is_drive(cfg.url) or not cfg.url):
        folder = weights_folder(f'{variant}.{cfg.tag}', cfg.url, cache_dir)
    if folder is not None:
        config, state_dict = open_folder(folder, variant)
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


def _split(hub_id: str) -> tuple[str, str | None]:
    repo_id, _, revision = hub_id.partition('@')
    return repo_id, revision or None


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


def weights_folder(name: str, url: str | None, root: str | Path | None = None, **options: Any) -> Path:
    """The model folder of a release: from the cache, the organization of ``CLUSTER_ZOO_HUB``, or its authors."""
    from .importing import install  # which builds models, as this module does for them

    problems = []
    try:
        if not options and (found := cache.cached(name, root)):
            return found
        force = options.get('force', False)
        named = organization()
        if named and not options.get('member'):
            try:
                folder = hub_folder(f'{named}/{name}', cache_dir=root)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                cache.check_digest(f'hub:{named}/{name}', cache.sha256(cache.verified_weights(folder)), root, force)
                return folder
        if url is None:
            raise CheckpointError('The authors have published none.')
        return fetch(name, url, partial(install, name), root=root, **options)
    except CheckpointError as error:
        said = ' '.join([*problems, str(error)])
        hint = f'If you have a file of them: cluster-zoo import FILE --as {name}'
        raise CheckpointError(f'No pretrained weights for {name}: {said} {hint}') from error


def open_folder(folder: Path, architecture: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked configuration and the weights of a model folder."""
    config = read_config(folder, architecture)
    return config, load_state_dict(cache.verified_weights(folder))


def load_model(name: str, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with one kind of error, and with checks of what comes from elsewhere.

    Args:
        name: Any model of timm or of this package, with or without a tag, ``hf-hub:org/name`` or ``local-dir:FOLDER``.
        pretrained: As for ``timm.create_model``.
        **kwargs: Likewise.

    Raises:
        CheckpointError: There is no such model, it cannot be built, or its weights cannot be had. The message says what
            would help.
    """
    source, _, place = name.partition(':')
    try:
        if source not in _FOREIGN:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        folder = hub_folder(*_split(place)) if source == 'hf-hub' else Path(place)
        _, state_dict = open_folder(folder) if pretrained else (read_config(folder), None)
        create = partial(timm.create_model, f'local-dir:{folder}', **kwargs)
        check_size(create, state_dict, name)
        return create(pretrained=pretrained, pretrained_cfg_overlay=dict(state_dict=state_dict, source=None))
    except CheckpointError:
        raise
    except Exception as error:  # of timm, of a client, or of a library that reads a damaged file
        raise CheckpointError(f"'{name}' cannot be loaded: {one_line(error)}") from error
