"""Building models, and where their pretrained weights come from.

The first of these that has them:

1. a file, folder, address or state dict that the caller names;
2. the package itself;
3. the local store, see `store`;
4. a Hugging Face organisation that the user names, see `hub`;
5. the authors' publication, if the user allows it, see `authors`.

Where none has them that is one error, which says what was tried. No model gets random weights in the place of others.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from timm.models._hub import download_cached_file, hf_split
from torch import Tensor

from . import authors, hub, store, tags
from .untrusted import check_config
from .weights import CheckpointError, check_fit, converted, load_state_dict

__all__ = ['WeightsNotFoundError', 'build_model', 'find_weights', 'where']

ASSETS = Path(__file__).parent / 'assets'


class WeightsNotFoundError(CheckpointError):
    """No source has the weights. The message lists what was tried, why each failed, and what would help."""


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
    """timm's ``build_model_with_cfg``, with weights from `find_weights`, read by `load_state_dict`, and `check_fit`.

    Only what timm adapts may differ from the model: the classifier if ``num_classes`` does, and the first convolution's
    input channels if ``in_chans`` does.

    Args:
        model_cls: As in timm, and so is what is not mentioned here.
        variant: The architecture.
        variant_args: Arguments that make the architecture. Those that were stored with weights win over them, and
            ``kwargs`` over both.
        cache_dir: Folder for what is downloaded, in place of the local store and of Hugging Face's cache.

    Raises:
        CheckpointError: The pretrained weights cannot be had, cannot be read or do not fit.
    """
    if isinstance(pretrained_cfg, dict):
        _check_origin(pretrained_cfg, variant, kwargs.get('pretrained_model_args'))
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    overlay = dict(pretrained_cfg_overlay or {})
    weights = None
    if pretrained and not cfg.state_dict:
        weights = find_weights(cfg, cache_dir)
        overlay |= dict(state_dict=load_state_dict(weights), source=None)
    stored = _stored_args(cfg, weights)

    def filter_and_check(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if pretrained_filter_fn:
            state_dict = converted(state_dict, model, pretrained_filter_fn)
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
        **{**(variant_args or {}), **stored, **kwargs},
    )
    model.pretrained_cfg.pop('state_dict', None)  # the weights are in the model now
    model._model_args = stored  # as timm's create_model keeps those of the call
    return model


def _check_origin(pretrained_cfg: dict[str, Any], variant: str, model_args: dict[str, Any] | None) -> None:
    """Refuses what a configuration from a hub or a folder may not say, before anything acts on it."""
    if pretrained_cfg.get('source') in ('hf-hub', 'local-dir'):
        where = pretrained_cfg.get('hf_hub_id') or pretrained_cfg.get('file')
        own = {key: value for key, value in pretrained_cfg.items() if key not in ('source', 'hf_hub_id', 'file')}
        config = dict(architecture=variant, pretrained_cfg=own, model_args=model_args or {})
        check_config(config, f'the configuration of {where}')


def _stored_args(cfg: PretrainedCfg, weights: Path | None) -> dict[str, Any]:
    """Arguments of the model that weights found by their name belong to. Of an explicit source timm knows them."""
    if cfg.source or cfg.state_dict or (cfg.file and not _is_in_store(cfg.file)):
        return {}
    folder = Path(weights or cfg.file or '').parent
    return dict(store.read_config(folder).get('model_args') or {}) if (folder / store.CONFIG).is_file() else {}


def _is_in_store(path: str | Path) -> bool:
    folder = Path(path).parent
    return Path(path).name == store.WEIGHTS and folder.parent == store.home()


def find_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path:
    """The file with the weights that a configuration stands for, downloaded if need be.

    Args:
        cfg: timm's configuration, as it was resolved.
        cache_dir: See `build_model`.

    Raises:
        CheckpointError: The one place that the configuration names does not have them, or they are damaged.
        WeightsNotFoundError: No source has them.
    """
    if cfg.source == 'local-dir':
        return _in_folder(Path(cfg.file))
    if cfg.source != 'hf-hub' and cfg.file:
        return _file(cfg)
    if cfg.hf_hub_id:
        return hub.download(*hf_split(cfg.hf_hub_id), cache_dir=cache_dir)
    if cfg.url and not authors.is_folder(cfg.url):
        return _from_address(cfg.url, cache_dir)
    return _search(f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture, cache_dir)


def _file(cfg: PretrainedCfg) -> Path:
    """An explicit file, or the one of a tag of the package or of the store, which has to be unchanged."""
    path = Path(cfg.file)
    expected = tags.facts(f'{cfg.architecture}.{cfg.tag}').sha256
    if path.parent == ASSETS and path.is_file() and expected != store.sha256(path):
        raise CheckpointError(f"'{path}' is damaged: its SHA-256 is not {expected}. Install the package again.")
    return store.verified_weights(path.parent) if _is_in_store(path) else path


def _in_folder(folder: Path) -> Path:
    if (folder / store.WEIGHTS).is_file():
        return store.verified_weights(folder)
    found = [path for path in (folder / 'pytorch_model.bin', *sorted(folder.glob('*.safetensors'))) if path.is_file()]
    if not found:
        raise CheckpointError(f"'{folder}' holds no {store.WEIGHTS}.")
    return found[0]


def _from_address(url: str | tuple[str, str], cache_dir: Any) -> Path:
    """A file that the caller names by its address, through timm's and torch hub's own cache."""
    try:
        path = Path(download_cached_file(url, cache_dir=cache_dir))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f'{url} could not be downloaded: {error}') from error
    hub.check_first_use(f'url:{url}', path)
    return path


def _search(name: str, cache_dir: str | Path | None) -> Path:
    tried = []
    for label, source in _SOURCES:
        try:
            return source(name, cache_dir)
        except CheckpointError as error:
            tried.append(f'  {label}: {error}')
    fetch = f'cluster-zoo fetch {name}'
    raise WeightsNotFoundError(
        '\n'.join(
            (
                f'No weights were found for {name}, and none are made up.',
                *tried,
                'What would help:' if authors.publication(name) else 'What would help, as there is no publication:',
                f'  {fetch if authors.publication(name) else "CLUSTER_ZOO_HUB=ORGANISATION, if one has them"}',
                f'  cluster-zoo import FILE --as {_importable(name)}',
            )
        )
    )


def _importable(name: str) -> str:
    """The name to import weights as: ``untrained`` is no tag for any."""
    return name if tags.is_published(name) else f'{name.partition(".")[0]}.TAG'


def _from_package(name: str, cache_dir: Any) -> Path:
    raise CheckpointError('not part of it')  # or the configuration would name a file


def _from_store(name: str, cache_dir: Any) -> Path:
    folder = _store_folder(name, cache_dir)
    if not folder.is_dir():
        raise CheckpointError(f"there is no '{folder}'")
    return store.verified_weights(folder)


def _store_folder(name: str, cache_dir: Any) -> Path:
    try:
        return store.folder(name, cache_dir)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _from_authors(name: str, cache_dir: Any) -> Path:
    url = authors.publication(name)
    if url is None:
        raise CheckpointError('they have published none')
    if not authors.allowed():
        raise CheckpointError(f'{url} was not asked, CLUSTER_ZOO_AUTHORS=1 would allow it')
    return authors.fetch(name, progress=os.isatty(2), root=cache_dir) / store.WEIGHTS


_SOURCES = (
    ('the package', _from_package),
    ('the local store', _from_store),
    ('Hugging Face', hub.fetch),
    ('the authors', _from_authors),
)


def where(name: str, root: str | Path | None = None) -> str:
    """Where the weights of a name are, or would come from, without asking anybody.

    Args:
        name: Architecture and tag.
        root: The store's folder, see `store.folder`.

    Returns:
        ``'package'``, ``'store'``, ``'hub'`` (an organisation is named, and may have them), ``'authors'`` (who have
        published them) or ``'none'``.
    """
    if tags.facts(name).sha256:
        return 'package'
    if name in store.entries(root):
        return 'store'
    if hub.organisation():
        return 'hub'
    return 'authors' if authors.publication(name) else 'none'
