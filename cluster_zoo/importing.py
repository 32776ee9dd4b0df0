"""From a checkpoint file, the authors', timm's or this package's, to a model folder of the store.

The folder has the weights as safetensors under this package's names, the configuration with which timm builds and feeds
the model, and a model card. Before it is put into the store the model is run, and run again from what was written.
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

from . import published, store, tags
from .model_card import model_card
from .pretrained import check_size
from .untrusted import check_config, is_archive, unpack_checkpoint
from .weights import CheckpointError, load_weights, read_checkpoint, state_dict_of

__all__ = ['import_checkpoint', 'write_folder']

_DATA = ('input_size', 'img_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def import_checkpoint(
    path: str | Path,
    name: str,
    use_ema: bool = True,
    model_args: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    replace: bool = False,
    source: dict[str, Any] | None = None,
    root: str | Path | None = None,
) -> Path:
    """Put a checkpoint into the store, as the weights of a tag.

    A tag of one's own is known to timm by its name in processes that start later; in this one the folder is loaded by
    ``timm.create_model(f'local-dir:{folder}', pretrained=True)``.

    Args:
        path: See `weights.read_checkpoint`; or a zip or tar archive that holds one checkpoint.
        name: One of the package's published tags, such as ``'coc_small.in1k'``, or an architecture with a tag of one's
            own, such as ``'coc_small.birds'``.
        use_ema: Prefer the averaged weights where the file has both.
        model_args: Arguments of the model, as for ``timm.create_model``.
        data_config: How images are prepared: ``img_size`` or ``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct`` and ``crop_mode``, as for ``timm.data.resolve_data_config``.
        label_names: What the classes are called, by their index. Of these three, and of a tag of one's own, what the
            training script saved in the file is the default; those of a published tag are known.
        replace: Take the place of the store's entry, if there is one.
        source: Where the file comes from, for the record; the name and SHA-256 of the file if None.
        root: The store's folder, see `store.folder`.

    Returns:
        The model folder.

    Raises:
        CheckpointError: The file cannot be read, is refused, does not fit, says that it is of another model, or gives
            results that are not finite; the name is taken, means nothing, or is published for other images or classes.
            The store is then as it was.
    """
    path = Path(path)
    _check_name(name, replace, root)
    with tempfile.TemporaryDirectory() as scratch:
        file = unpack_checkpoint(path, Path(scratch)) if is_archive(path) else path
        checkpoint = read_checkpoint(file)
    state_dict = state_dict_of(checkpoint, path, use_ema)
    saved = checkpoint if isinstance(checkpoint, dict) else {}
    _check_architecture(saved, name, path)
    saved = {} if tags.is_published(name) else saved  # everything else is known of published tags
    model_args = _saved_model_args(saved) | published.context_cluster_args(state_dict) | (model_args or {})
    model_args = {key: value for key, value in model_args.items() if value is not None}
    data = _data_config(saved, data_config or {})
    _check_described(path, name, model_args, data, label_names or saved.get('label_names'))
    model = _build(path, name, model_args, state_dict)
    labels = _labels(model, label_names, saved.get('label_names'))
    if tags.is_published(name):
        _check_as_published(model, name, data, labels)
    load_weights(model, state_dict)
    logits = _run(model, data)
    source = source or dict(file=path.name, sha256=store.sha256(path))
    with store.new_folder(name, root, replace) as folder:
        write_folder(model, folder, name, labels, source, data)
        _check_results(folder, name, data, logits)
    return store.folder(name, root)


def _check_name(name: str, replace: bool, root: Any) -> None:
    try:
        target = store.folder(name, root)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    architecture, _, tag = name.partition('.')
    if not tags.is_ours(architecture):
        raise CheckpointError(f'{architecture} is no model of this package: one of {", ".join(tags.our_models())}.')
    if tags.facts(name).sha256:
        raise CheckpointError(f'{name} is part of the package, which never looks for it elsewhere: take another tag.')
    if tag == 'untrained':
        raise CheckpointError(f"'untrained' stands for no weights: take another tag, such as {architecture}.mine.")
    if target.exists() and not replace:
        raise CheckpointError(f"The store has {name} already, at '{target}'. With --force it is replaced.")


def _check_architecture(saved: dict[str, Any], name: str, path: Path) -> None:
    """A file may say which model it is of. The weights of one may fit another, and mean nothing there."""
    architecture = name.partition('.')[0]
    for said in (saved.get('arch'), _saved_options(saved).get('model')):
        other = said.partition('.')[0] if isinstance(said, str) else architecture
        if other != architecture and tags.is_ours(other):
            raise CheckpointError(
                f"'{path}' was refused: it says that it is of {other}, which is another model than {architecture}. "
                f'Import it as {other}.TAG, or save its state_dict alone if you know that it says so by mistake.'
            )


def _check_as_published(model: nn.Module, name: str, data: dict[str, Any], labels: dict[str, Any]) -> None:
    """Whoever loads a published tag gets the images and classes that it is known for, whatever its folder says."""
    cfg = model.pretrained_cfg
    resolve = timm.data.resolve_data_config
    differing = [
        what
        for what, differs in (
            (f'{model.num_classes} classes', model.num_classes != cfg['num_classes']),
            (f'{model.in_chans} channels', model.in_chans != cfg['input_size'][0]),
            ('images prepared in another way', resolve(data, model=model) != resolve({}, model=model)),
            ('other label names', labels.get('label_names') not in (None, tags.label_names(cfg))),
        )
        if differs
    ]
    if differing:
        raise CheckpointError(
            f'{name} is known for {cfg["num_classes"]} classes and images of {list(cfg["input_size"])}, so weights for '
            f'{", ".join(differing)} can not have its name. Take a tag of your own, such as '
            f'{name.partition(".")[0]}.mine.'
        )


def _check_results(folder: Path, name: str, data: dict[str, Any], logits: Tensor) -> None:
    """The folder gives the results of the model that it was written from, and so does its name if timm knows that."""
    ways = [dict(model_name=f'local-dir:{folder}')]
    if tags.is_published(name):
        ways.append(dict(model_name=name, cache_dir=folder.parent))
    for way in ways:
        if not torch.equal(_run(timm.create_model(**way, pretrained=True), data), logits):
            raise CheckpointError(f'{name} gives other results from the converted file than before it was written.')


def _saved_options(saved: dict[str, Any]) -> dict[str, Any]:
    """The options of the training script, timm's or this package's."""
    options = saved.get('args')
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    return options if isinstance(options, dict) else {}


def _saved_model_args(saved: dict[str, Any]) -> dict[str, Any]:
    options = _saved_options(saved)
    named = (('num_classes', 'num_classes'), ('in_chans', 'in_chans'), ('global_pool', 'gp'))
    further = options.get('model_kwargs')
    further = further if isinstance(further, dict) else {}
    return dict(further, **{argument: options.get(option) for argument, option in named})


def _data_config(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What this package's script has resolved, or else the options that timm's would have, under what is given."""
    found = saved.get('data_config')
    found = found if isinstance(found, dict) else _saved_options(saved)
    size = {'img_size', 'input_size'}
    replaced = size if size & given.keys() else set()  # two ways to say the same
    return {key: found[key] for key in _DATA if found.get(key) and key not in replaced} | given


def _check_described(path: Path, name: str, model_args: dict[str, Any], data: dict[str, Any], labels: Any) -> None:
    """What a file says of its model and images is as little to be trusted as what a configuration says."""
    described = {key: value for key, value in data.items() if key != 'img_size'}
    if 'img_size' in data:
        described['input_size'] = [3, data['img_size'], data['img_size']]
    architecture = name.partition('.')[0]
    config = dict(architecture=architecture, pretrained_cfg=described, model_args=model_args)
    check_config(config | (dict(label_names=labels) if labels else {}), f"'{path}'", architecture)


def _build(path: Path, name: str, model_args: dict[str, Any], state_dict: dict[str, Tensor]) -> nn.Module:
    architecture, _, tag = name.partition('.')
    check_size(partial(timm.create_model, architecture, **model_args), state_dict, f"'{path}'")
    overlay = {}
    if not tags.is_published(name):
        # What the architecture's own tag says of its weights does not hold for these.
        overlay |= dict.fromkeys(('url', 'file', 'license', 'origin_url', 'label_names', 'description'))
        overlay |= dict(tag=tag, architecture=architecture)
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(
            name if tags.is_published(name) else architecture, pretrained_cfg_overlay=overlay, **model_args
        )


def _labels(model: nn.Module, given: Sequence[str] | None, saved: Sequence[str] | None) -> dict[str, Any]:
    """The names of the classes, as timm's hub layout has them; none for ImageNet, whose names everybody knows."""
    if given is not None and len(given) != model.num_classes:
        raise CheckpointError(f'There are {len(given)} label names for {model.num_classes} classes.')
    names = given or (saved if saved and len(saved) == model.num_classes else None)
    return dict(label_names=list(names)) if names else {}


@torch.inference_mode()
def _run(model: nn.Module, data: dict[str, Any]) -> Tensor:
    """Logits of two images of noise, as the model is meant to see them."""
    size = timm.data.resolve_data_config(data, model=model)['input_size']
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    logits = model.eval()(images)
    if not bool(logits.isfinite().all()):
        raise CheckpointError('The model gives NaN or infinity with these weights.')
    return logits


def write_folder(
    model: nn.Module,
    folder: Path,
    name: str,
    labels: dict[str, Any],
    source: dict[str, Any],
    data_config: dict[str, Any] | None = None,
) -> None:
    """Write a model as a model folder.

    Args:
        model: A model of timm's factory.
        folder: Where to.
        name: Its tag, for the model card.
        labels: ``label_names`` and ``label_descriptions`` as timm's hub layout has them, or neither.
        source: Where the weights come from, for the record.
        data_config: See `import_checkpoint`.
    """
    timm.models.save_for_hf(model, folder, safe_serialization=True, data_config=data_config, model_config=labels)
    config = json.loads((folder / store.CONFIG).read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # is there already; transformers' wrapper would pass it twice
    config |= dict(sha256=store.sha256(folder / store.WEIGHTS), source=source)
    (folder / store.CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    (folder / store.CARD).write_text(model_card(config, tags.facts(name)), encoding='utf-8')
