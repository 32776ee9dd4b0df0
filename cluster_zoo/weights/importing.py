"""Conversion of a checkpoint file of the authors, of timm or of this package to a model folder in timm's Hub layout.

The folder contains the weights as safetensors, the configuration that timm needs to build the model and to prepare its
images, and a model card. The results of the model are compared before and after writing.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from torch import Tensor

from ..errors import CheckpointError, nearest, one_line
from . import cache, conversion, metadata
from .archives import is_archive, unpack_checkpoint
from .card import model_card
from .checkpoints import (
    check_architecture,
    extract_state_dict,
    load_weights,
    read_checkpoint,
    training_metadata,
    weights_in_use,
)
from .configs import CONFIG, check_config, check_size
from .download import fetch, hub_folder, organization
from .loading import load_model

__all__ = ['find_weights', 'import_checkpoint', 'install', 'training_config', 'write_folder']

_DATA = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
# Keys of timm's configuration of an architecture that describe other weights than the imported ones
_OF_WEIGHTS = ('tag', 'url', 'file', 'hf_hub_id', 'license', 'origin_url', 'label_names', 'description')


def import_checkpoint(
    path: str | Path,
    folder: str | Path,
    model_name: str | None = None,
    use_ema: bool = False,
    model_args: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Converts a checkpoint to a model folder for ``timm.create_model(f'local-dir:{folder}', pretrained=True)``.

    The training script's options in the file are the defaults of ``model_args``, ``data_config`` and ``label_names``.

    Args:
        path: See `read_checkpoint`, or a zip or tar archive of one checkpoint.
        folder: Model folder. An existing one is replaced when the conversion is complete.
        model_name: Architecture; None for the one named in the file.
        use_ema: Prefer averaged weights.
        model_args: Arguments of the model, as for ``timm.create_model``.
        data_config: Preparation of the images: ``img_size`` or ``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct`` and ``crop_mode``, as for ``timm.data.resolve_data_config``.
        label_names: Names of the classes by index.

    Raises:
        CheckpointError: The file cannot be read, is refused, does not fit or belongs to another model, or the results
            of the model are not finite. Nothing is written.
    """
    path, folder = Path(path), Path(folder).resolve()
    saved, state_dict, source = _read(path, model_name, use_ema)
    model_name = model_name or saved['arch']
    if not (model_name and timm.is_model(model_name)):
        problem = f'There is no model {model_name!r}' if model_name else f"'{path}' does not name its architecture"
        hint = nearest(model_name or '', timm.list_models()) or f', such as {", ".join(metadata.package_models()[:4])}'
        raise CheckpointError(f'{problem}: give --model NAME{hint}.')
    config = training_config(saved, model_name)
    given = {key: value for key, value in (model_args or {}).items() if value is not None}
    arguments = config['model_args'] | conversion.context_cluster_args(state_dict) | given
    data = config['pretrained_cfg'] | _data_config(data_config or {}, arguments)
    labels = label_names or config['label_names']
    # Options from a file are as untrusted as a config.json
    check_config(config | dict(pretrained_cfg=data, model_args=arguments, label_names=labels), f"'{path}'")
    overlay = dict.fromkeys(_OF_WEIGHTS) | dict(label_offset=0)
    build = partial(timm.create_model, model_name, pretrained_cfg_overlay=overlay, **arguments)
    check_size(build, state_dict, f"'{path}'")
    model = build()
    labels = list(labels.values() if isinstance(labels, dict) else labels or ())
    if label_names and len(labels) != model.num_classes:
        raise CheckpointError(f'There are {len(labels)} label names for {model.num_classes} classes.')
    source = dict(file=one_line(path.name), sha256=cache.sha256(path)) | source
    load_weights(model, state_dict)
    logits = _run(model, data)
    model.multi_label = bool(saved['args'].get('multi_label'))
    with cache.new_folder(folder) as new:
        _write(model, logits, new, folder.name, source, data, labels if len(labels) == model.num_classes else None)


def install(name: str, path: Path, folder: Path, source: dict[str, str]) -> None:
    """Converts the authors' file for a name such as ``'coc_small.in1k'``, or an archive of it, to a model folder."""
    _, state_dict, weights = _read(path, name)
    model = timm.create_model(name, **conversion.context_cluster_args(state_dict))
    load_weights(model, state_dict)
    _write(model, _run(model), folder, name, source | weights)


def _read(path: Path, expected: str | None, use_ema: bool = False) -> tuple[dict[str, Any], dict[str, Tensor], dict]:
    """Reads a checkpoint or an archive of one, and refuses the weights of another model, even if they would fit.

    Returns its `training_metadata`, the state dict, and which weights these are.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = unpack_checkpoint(path, Path(scratch)) if path.is_file() and is_archive(path) else path
        try:
            checkpoint = read_checkpoint(file)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(file), str(path))) from error
    saved = training_metadata(checkpoint)
    if saved['arch'] and metadata.is_ours(saved['arch']) and timm.is_model(expected or ''):
        check_architecture(saved['arch'], expected, f"'{path}'")
    return saved, extract_state_dict(checkpoint, path, use_ema), dict(weights=weights_in_use(checkpoint, use_ema))


def _write(model: nn.Module, logits: Tensor, folder: Path, *args: Any) -> None:
    """Writes a model folder, see `write_folder`, and compares the logits of the model in it."""
    write_folder(model, folder, *args)
    if not torch.equal(_run(load_model(f'local-dir:{folder}')), logits):
        raise CheckpointError('The model gives other results from the converted file than before it was written.')


@torch.inference_mode()
def _run(model: nn.Module, data: dict[str, Any] | None = None) -> Tensor:
    """Returns logits of two images of noise."""
    try:
        size = timm.data.resolve_input_data_config(model, data)['input_size']
        logits = model.eval()(torch.rand(2, *size, generator=torch.Generator().manual_seed(0)))
    except Exception as error:  # invalid sizes can raise any error in a model
        raise CheckpointError(f'The model does not accept such images: {one_line(error)}') from error
    if not bool(logits.isfinite().all()):
        raise CheckpointError('The model gives NaN or infinity with these weights.')
    return logits


def training_config(saved: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Returns the configuration of the model and its images that a training script stored, which is untrusted.

    Args:
        saved: Result of `training_metadata`.
        architecture: Name of the model, without tag.

    Returns:
        ``architecture``, ``model_args``, ``pretrained_cfg`` and ``label_names``, for `check_config`.
    """
    options, extra = saved['args'], saved['args'].get('model_kwargs')
    arguments = {key: options.get(key) for key in ('num_classes', 'in_chans', 'sub_centroids')}
    arguments |= dict(global_pool=options.get('gp')) | (extra if isinstance(extra, dict) else {})
    arguments = {key: value for key, value in arguments.items() if value is not None}
    data = _data_config(saved['data_config'] or options, arguments)
    return dict(architecture=architecture, pretrained_cfg=data, model_args=arguments, label_names=saved['label_names'])


def _data_config(options: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of timm's pretrained configuration for options that describe images."""
    types = (int, float, str, list, tuple)
    data = {key: options[key] for key in _DATA if isinstance(options.get(key), types) and options[key]}
    if isinstance(side := options.get('img_size'), int):
        data.setdefault('input_size', (arguments.get('in_chans', 3), side, side))
    return data


def write_folder(
    model: nn.Module,
    folder: Path,
    title: str,
    source: dict[str, str],
    data_config: dict[str, Any] | None = None,
    label_names: list[str] | None = None,
) -> None:
    """Writes a model that timm built to a folder, with a title and the origin of the weights for the model card.

    ``data_config`` and ``label_names``, see `import_checkpoint`, default to those of the model's configuration.
    """
    labels = dict(label_names=label_names or metadata.label_names(model.pretrained_cfg))
    timm.models.save_for_hf(model, folder, safe_serialization=True, data_config=data_config, model_config=labels)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # transformers would pass it twice
    config |= dict(sha256=cache.sha256(folder / cache.WEIGHTS), source=source)
    config |= dict(multi_label=True) if getattr(model, 'multi_label', False) else {}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    (folder / 'README.md').write_text(model_card(config, title), encoding='utf-8')


def find_weights(
    name: str,
    url: str | None,
    root: str | Path | None = None,
    member: str | None = None,
    force: bool = False,
    install: Callable[[str, Path, Path, dict[str, str]], None] = install,
) -> Path:
    """Returns the model folder of a name: from the cache, the organization in ``CLUSTER_ZOO_HUB``, or the authors.

    The address ``url`` of the authors' file is None if there is none. ``install`` converts it, see `install`. See
    `fetch` for the other arguments and errors; a file that ``member`` names comes from the authors.
    """
    problems = []
    try:
        if not (member or force) and (found := cache.cached(name, root)):
            return found
        if not member and (owner := organization()):
            try:
                folder = hub_folder(f'{owner}/{name}', cache_dir=root)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                cache.check_digest(f'hub:{owner}/{name}', cache.sha256(cache.verified_weights(folder)), root, force)
                return folder
        if url is None:
            raise CheckpointError('The authors have published none.')
        return fetch(name, url, partial(install, name), member, force, root)
    except CheckpointError as error:
        problems.append(str(error))
        hint = f'To use a file that you have: cluster-zoo import FILE --as {name}'
        raise CheckpointError(f'No pretrained weights for {name}: {" ".join(problems)} {hint}') from error
