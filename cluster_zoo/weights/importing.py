"""From a checkpoint file, the authors', timm's or this package's, to a model folder in timm's hub layout.

The folder has the weights as safetensors under this package's names, the configuration with which timm builds and feeds
the model, and a model card. The model runs before it is written and again from what was written.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from torch import Tensor

from . import cache, names, tags
from .archives import is_archive, unpack_checkpoint
from .build import load_model
from .card import model_card
from .configs import CONFIG, check_config, check_size
from .errors import CheckpointError
from .reading import load_weights, read_checkpoint, state_dict_of

__all__ = ['import_checkpoint', 'install', 'write_folder']

_DATA = ('input_size', 'img_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def import_checkpoint(
    path: str | Path,
    folder: str | Path,
    model_name: str | None = None,
    use_ema: bool = False,
    model_args: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Make a model folder of a checkpoint: ``timm.create_model(f'local-dir:{folder}', pretrained=True)`` loads it.

    Args:
        path: See `read_checkpoint`; or a zip or tar archive that holds one checkpoint.
        folder: The folder. It takes its place when all is done; one that is there is replaced.
        model_name: The architecture; None for the one that the file names.
        use_ema: Take the averaged weights where the file has both.
        model_args: Arguments of the model, as for ``timm.create_model``.
        data_config: How images are prepared: ``img_size`` or ``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct`` and ``crop_mode``, as for ``timm.data.resolve_data_config``.
        label_names: What the classes are called, by their index. The default of these three is what the training script
            saved in the file.

    Raises:
        CheckpointError: The file cannot be read, is refused, does not fit or says that it is of another model, or the
            model gives results that are not finite. Nothing is written then.
    """
    path, folder = Path(path), Path(folder)
    checkpoint = _read(path)
    state_dict = state_dict_of(checkpoint, path, use_ema)
    saved = checkpoint if isinstance(checkpoint, dict) else {}
    options = _options(saved)
    model_name = model_name or _architecture(saved) or ''
    if not timm.is_model(model_name):
        what = f'There is no model {model_name!r}' if model_name else f"'{path}' does not name its architecture"
        raise CheckpointError(f'{what}: give --model NAME, one of {", ".join(tags.our_models()[:4])}, ...')
    _check_architecture(saved, model_name, path)
    extra = options.get('model_kwargs')
    arguments = dict(extra if isinstance(extra, dict) else {}, num_classes=options.get('num_classes'))
    arguments |= dict(in_chans=options.get('in_chans'), global_pool=options.get('gp'))
    arguments |= names.context_cluster_args(state_dict) | (model_args or {})
    arguments = {key: value for key, value in arguments.items() if value is not None}
    data = _data_config(saved, data_config or {})
    labels = label_names or saved.get('label_names')
    # What a file says of its model and images is as little to be trusted as what a configuration says.
    described = {key: value for key, value in data.items() if key != 'img_size'}
    config = dict(architecture=model_name, pretrained_cfg=described, model_args=arguments)
    check_config(config | (dict(label_names=list(labels)) if labels else {}), f"'{path}'")
    # What timm's configuration of the architecture says of its own weights does not hold for these.
    overlay = dict.fromkeys(
        ('tag', 'url', 'file', 'hf_hub_id', 'license', 'origin_url', 'label_names', 'description', 'label_offset')
    )
    build = partial(timm.create_model, model_name, pretrained_cfg_overlay=overlay | dict(label_offset=0), **arguments)
    check_size(build, state_dict, f"'{path}'")
    model = build()
    if label_names and len(label_names) != model.num_classes:
        raise CheckpointError(f'There are {len(label_names)} label names for {model.num_classes} classes.')
    labels = dict(label_names=list(labels)) if labels and len(labels) == model.num_classes else {}
    averaged = use_ema and any(key.endswith('ema') for key in saved)
    source = dict(file=path.name, sha256=cache.sha256(path), weights='averaged' if averaged else 'not averaged')
    with cache.new_folder(folder) as fresh:
        _convert(model, state_dict, fresh, folder.name, source, data, labels)


def install(name: str, path: Path, folder: Path, source: dict[str, str]) -> None:
    """Fill a folder of the cache with a release of this package's tags, from the authors' file.

    Args:
        name: Architecture and tag. What its configuration says of images and classes holds.
        path: See `import_checkpoint`.
        folder: An empty folder.
        source: Where the file comes from, for the record.

    Raises:
        CheckpointError: See `import_checkpoint`.
    """
    checkpoint = _read(path)
    state_dict = state_dict_of(checkpoint, path)
    _check_architecture(checkpoint if isinstance(checkpoint, dict) else {}, name.partition('.')[0], path)
    model = timm.create_model(name, **names.context_cluster_args(state_dict))
    _convert(model, state_dict, folder, name, source)


def _read(path: Path) -> Any:
    if not (path.is_file() and is_archive(path)):
        return read_checkpoint(path)
    with tempfile.TemporaryDirectory() as scratch:
        return read_checkpoint(unpack_checkpoint(path, Path(scratch)))


def _convert(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    folder: Path,
    name: str,
    source: dict[str, str],
    data: dict[str, Any] | None = None,
    labels: dict[str, Any] | None = None,
) -> None:
    """Load the weights, write the folder, and compare the model with what the folder gives."""
    load_weights(model, state_dict)
    logits = _run(model, data)
    if not bool(logits.isfinite().all()):
        raise CheckpointError('The model gives NaN or infinity with these weights.')
    write_folder(model, folder, name, source, data, labels)
    if not torch.equal(_run(load_model(f'local-dir:{folder}'), data), logits):
        raise CheckpointError(f'{name} gives other results from the converted file than before it was written.')


@torch.inference_mode()
def _run(model: nn.Module, data: dict[str, Any] | None) -> Tensor:
    """Logits of two images of noise, of the size that the model is meant for."""
    size = timm.data.resolve_data_config(data or {}, model=model)['input_size']
    return model.eval()(torch.rand(2, *size, generator=torch.Generator().manual_seed(0)))


def _options(saved: dict[str, Any]) -> dict[str, Any]:
    """The options of the training script, timm's or this package's."""
    options = saved.get('args')
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    return options if isinstance(options, dict) else {}


def _architecture(saved: dict[str, Any]) -> str | None:
    """The model of this package that a file says it is of."""
    for said in (saved.get('arch'), _options(saved).get('model')):
        if isinstance(said, str) and timm.is_model(said.partition('.')[0]):
            return said.partition('.')[0]
    return None


def _check_architecture(saved: dict[str, Any], expected: str, path: Path) -> None:
    """The weights of one model may fit another, and mean nothing there."""
    found = _architecture(saved)
    if found not in (None, expected) and tags.is_ours(found):
        raise CheckpointError(f"'{path}' was refused: it says that it is of {found}, which is not {expected}.")


def _data_config(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What this package's script has resolved, or else the options that timm's would have, under what is given."""
    found = saved.get('data_config')
    found = found if isinstance(found, dict) else _options(saved)
    size = {'img_size', 'input_size'}
    replaced = size if size & given.keys() else set()  # two ways to say the same
    data = {key: found[key] for key in _DATA if found.get(key) and key not in replaced} | given
    if isinstance(side := data.get('img_size'), int):
        data['input_size'] = (data.get('input_size') or (3,))[:1] + (side, side)
    return data


def write_folder(
    model: nn.Module,
    folder: Path,
    name: str,
    source: dict[str, str],
    data_config: dict[str, Any] | None = None,
    labels: dict[str, Any] | None = None,
) -> None:
    """Write a model as a model folder.

    Args:
        model: A model of timm's factory.
        folder: Where to.
        name: Its title; what is known of a release of this name is on the card.
        source: Where the weights come from, for the record.
        data_config: See `import_checkpoint`.
        labels: ``label_names`` and ``label_descriptions`` as timm's hub layout has them.
    """
    timm.models.save_for_hf(model, folder, safe_serialization=True, data_config=data_config, model_config=labels)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # stands beside it; transformers would pass it twice
    config |= dict(sha256=cache.sha256(folder / cache.WEIGHTS), source=source)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    known = name in tags.our_tags()
    card = model_card(
        config, tags.release(name if known else config['architecture']), name, name if known else 'local-dir:FOLDER'
    )
    (folder / 'README.md').write_text(card, encoding='utf-8')
