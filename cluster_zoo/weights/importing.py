"""From a checkpoint file, the authors', timm's or this package's, to a model folder in timm's hub layout.

The folder has the weights as safetensors under this package's names, the configuration with which timm builds and feeds
the model, and a model card. The model runs before it is written and again from what was written.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
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
from .configs import CONFIG, check_config, check_size
from .download import fetch, hub_folder, organization
from .loading import load_model
from .reading import extract_state_dict, is_averaged, load_weights, read_checkpoint

__all__ = ['find_weights', 'import_checkpoint', 'install', 'write_folder']

_DATA = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
# What timm's configuration of an architecture says of its own weights does not hold for others
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
    path, folder = Path(path), Path(folder).resolve()
    saved, state_dict, source = _read(path, model_name, use_ema)
    options, found = saved['args'], saved.get('data_config')
    model_name = model_name or saved['arch']
    if not (model_name and timm.is_model(model_name)):
        what = f'There is no model {model_name!r}' if model_name else f"'{path}' does not name its architecture"
        hint = nearest(model_name or '', timm.list_models()) or f', such as {", ".join(metadata.package_models()[:4])}'
        raise CheckpointError(f'{what}: give --model NAME{hint}.')
    # What a file says of its model and images is as little to be trusted as what a configuration says
    extra = options.get('model_kwargs')
    arguments = dict(num_classes=options.get('num_classes'), in_chans=options.get('in_chans'))
    arguments |= dict(global_pool=options.get('gp')) | (extra if isinstance(extra, dict) else {})
    arguments |= conversion.context_cluster_args(state_dict) | (model_args or {})
    arguments = {key: value for key, value in arguments.items() if value is not None}
    data = _data_config(found if isinstance(found, dict) else options, arguments)
    data |= _data_config(data_config or {}, arguments)
    labels = label_names or saved.get('label_names')
    config = dict(architecture=model_name, pretrained_cfg=data, model_args=arguments, label_names=labels)
    check_config(config, f"'{path}'")
    overlay = dict.fromkeys(_OF_WEIGHTS) | dict(label_offset=0)
    build = partial(timm.create_model, model_name, pretrained_cfg_overlay=overlay, **arguments)
    check_size(build, state_dict, f"'{path}'")
    model = build()
    labels = list(labels.values() if isinstance(labels, dict) else labels or ())
    if label_names and len(labels) != model.num_classes:
        raise CheckpointError(f'There are {len(labels)} label names for {model.num_classes} classes.')
    source = dict(file=one_line(path.name), sha256=cache.sha256(path)) | source
    images = dict(data_config=data, label_names=labels if len(labels) == model.num_classes else None)
    _convert(model, state_dict, cache.new_folder(folder), folder.name, source, **images)


def install(name: str, path: Path, folder: Path, source: dict[str, str]) -> None:
    """Fill a folder of the cache with a release of this package's tags, from the authors' file."""
    _, state_dict, weights = _read(path, name)
    model = timm.create_model(name, **conversion.context_cluster_args(state_dict))
    _convert(model, state_dict, nullcontext(folder), name, source | weights)


def _read(path: Path, expected: str | None, use_ema: bool = False) -> tuple[dict[str, Any], dict[str, Tensor], dict]:
    """What a file says, with its architecture and the training script's options; its weights; and which those are.

    The weights of one model may fit another, and mean nothing there.
    """
    with tempfile.TemporaryDirectory() as scratch:
        packed = path.is_file() and is_archive(path)
        file = unpack_checkpoint(path, Path(scratch)) if packed else path
        try:
            checkpoint = read_checkpoint(file)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(file), str(path))) from error
    saved = dict.copy(checkpoint) if isinstance(checkpoint, dict) else {}
    options = saved.get('args')
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    options = options if isinstance(options, dict) else {}
    said = [name for name in (saved.get('arch'), options.get('model')) if isinstance(name, str) and timm.is_model(name)]
    found = said[0].partition('.')[0] if said else None
    if found and metadata.is_ours(found) and timm.is_model(expected or '') and expected.partition('.')[0] != found:
        raise CheckpointError(f"'{path}' was refused: it says that it is of {found}, which is not {expected}.")
    taken = dict(weights='averaged' if is_averaged(checkpoint, use_ema) else 'not averaged')
    return saved | dict(args=options, arch=found), extract_state_dict(checkpoint, path, use_ema), taken


def _convert(model: nn.Module, state_dict: dict, place: Any, title: str, source: dict, **images: Any) -> None:
    """Load the weights, write the folder, see `write_folder`, and compare the model with what the folder gives."""
    load_weights(model, state_dict)
    logits = _run(model, images.get('data_config'))
    with place as folder:
        write_folder(model, folder, title, source, **images)
        if not torch.equal(_run(load_model(f'local-dir:{folder}')), logits):
            raise CheckpointError('The model gives other results from the converted file than before it was written.')


@torch.inference_mode()
def _run(model: nn.Module, data: dict[str, Any] | None = None) -> Tensor:
    """Logits of two images of noise, of the size that the model is meant for."""
    try:
        size = timm.data.resolve_input_data_config(model, data)['input_size']
        logits = model.eval()(torch.rand(2, *size, generator=torch.Generator().manual_seed(0)))
    except Exception as error:  # a model can fail anywhere for images that make no sense
        raise CheckpointError(f'The model does not take such images: {one_line(error)}') from error
    if not bool(logits.isfinite().all()):
        raise CheckpointError('The model gives NaN or infinity with these weights.')
    return logits


def _data_config(said: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What options or a configuration say of images, in the terms of timm's configurations."""
    data = {key: said[key] for key in _DATA if isinstance(said.get(key), (int, float, str, list, tuple)) and said[key]}
    if isinstance(side := said.get('img_size'), int):
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
    """Write a model of timm's factory as a model folder, with the title of its card and where the weights come from.

    What images and classes are like is as in `import_checkpoint`, by default as in the model's configuration.
    """
    labels = dict(label_names=label_names or metadata.label_names(model.pretrained_cfg))
    timm.models.save_for_hf(model, folder, safe_serialization=True, data_config=data_config, model_config=labels)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # stands beside it; transformers would pass it twice
    config |= dict(sha256=cache.sha256(folder / cache.WEIGHTS), source=source)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    (folder / 'README.md').write_text(model_card(config, title), encoding='utf-8')


def find_weights(name: str, url: str | None, root: str | Path | None = None, **options: Any) -> Path:
    """The model folder of a release: from the cache, the organization of ``CLUSTER_ZOO_HUB``, or its authors."""
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
