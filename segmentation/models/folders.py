"""Model folders of segmenters: ``model.safetensors``, ``config.json`` and a model card, as for classifiers.

``config.json`` contains the arguments of `create_segmenter`, the images (mean, std, test protocol) and the classes with
their colors. Folders from others are untrusted: a configuration must not name code or files, and its sizes are limited
(see `cluster_zoo.weights.configs`).
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn as nn
from safetensors.torch import save_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cluster_zoo.errors import CheckpointError, OptionError, one_line, quoted
from cluster_zoo.weights import cache
from cluster_zoo.weights.configs import CONFIG, check_config, load_config
from cluster_zoo.weights.download import hub_folder
from cluster_zoo.weights.loading import FOREIGN

from ..data.classes import numbered_classes
from ..data.layouts import LAYOUTS
from .card import segmenter_card
from .published_systems import CONFIGS

__all__ = ['BUNDLED', 'describe', 'is_segmenter_folder', 'open_folder', 'read_segmenter_config', 'save_pretrained']

# Trained by this project, see docs/measured-here.md
BUNDLED = {name: Path(__file__).parents[1] / 'assets' / name for name in ('semantic_fpn_coc_tiny.camvid',)}

_KEYS = ('head', 'backbone', 'num_classes', 'model_args', 'segmenter', 'pretrained_cfg', 'test', 'label_names')
_KEYS += ('label_colors', 'sha256', 'source')
_FACTORY = ('head', 'backbone', 'num_classes', 'pretrained_backbone')  # of `create_segmenter`, not of the model
_TEST = ('mode', 'crop', 'stride', 'pad', 'scale', 'multiple')  # see `segmentation.engine.inference.predict`
_INPUT_SIZE = 512  # side of images in pixels, unless a published system has another


def describe(
    head: str, backbone: str, num_classes: int, options: dict[str, Any], segmenter: str | None = None
) -> dict[str, Any]:
    """Returns the configuration of a new segmenter, with the images and classes of a published system.

    Args:
        head, backbone, num_classes, options: Arguments of `create_segmenter`.
        segmenter: Name of the published system; None for other models.
    """
    published = CONFIGS.get(segmenter)
    side, test = _INPUT_SIZE, dict(mode='whole')
    classes = numbered_classes(num_classes)
    if published:
        side = published.crop
        test = dict(mode=published.test_mode, scale=list(published.scale), multiple=published.test_multiple)
        if published.test_mode == 'slide':
            test |= dict(crop=side, stride=published.test_stride, pad=published.test_pad)
        if num_classes == published.num_classes:
            classes = LAYOUTS[published.dataset].classes
    images = dict(input_size=[options.get('in_chans', 3), side, side], interpolation='bilinear')
    images |= dict(mean=list(IMAGENET_DEFAULT_MEAN), std=list(IMAGENET_DEFAULT_STD))
    return dict(
        head=head,
        backbone=backbone,
        num_classes=num_classes,
        model_args={k: v for k, v in options.items() if v is not None and k not in ('device', 'dtype')},
        segmenter=segmenter,
        pretrained_cfg=images,
        test=test,
        label_names=list(classes.names),
        label_colors=classes.colours.tolist(),
    )


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: list[str] | tuple[str, ...] | None = None,
    colors: Any = None,
    mean: list[float] | tuple[float, ...] | None = None,
    std: list[float] | tuple[float, ...] | None = None,
    test: dict[str, Any] | None = None,
    source: dict[str, str] | None = None,
) -> None:
    """Writes a segmenter to a model folder, which ``create_segmenter('local-dir:FOLDER')`` opens.

    What is not given is that of the model: of the published system or of the folder that it was created from.

    Args:
        model: A segmenter of `create_segmenter`.
        folder: Model folder. An existing model folder is replaced when the new one is complete.
        label_names: Names of the K classes.
        colors: Their RGB colors, [K, 3], 0 to 255.
        mean: Mean of each channel, for pixel values 0 to 1.
        std: Standard deviation of each channel.
        test: Arguments of `segmentation.engine.inference.predict`: ``mode``, ``crop``, ``stride``, ``pad``; and the
            size of the images: ``scale``, ``multiple``.
        source: Origin of the weights, for the model card.

    Raises:
        OptionError: The model is not from `create_segmenter`, or a value is invalid.
        CheckpointError: The folder exists and is no model folder, or cannot be written.
    """
    if not getattr(model, 'config', None):
        raise OptionError(f'This {type(model).__name__} cannot be saved: only models of create_segmenter can.')
    given = dict(label_names=label_names, label_colors=None if colors is None else np.asarray(colors).tolist())
    given |= dict(test=test)
    config = model.config | {key: value for key, value in given.items() if value is not None}
    images = {key: list(value) for key, value in dict(mean=mean, std=std).items() if value is not None}
    config['pretrained_cfg'] = config['pretrained_cfg'] | images
    config['model_args'] = config['model_args'] | dict(auxiliary=model.auxiliary is not None)
    config = json.loads(json.dumps(config))  # as it is read
    try:
        check_segmenter_config(config, 'The segmenter')
    except CheckpointError as error:
        raise OptionError(str(error)) from error
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"'{folder}' is no model folder and cannot be replaced: name another folder.")
    with cache.new_folder(folder) as new:
        write_folder(model, new, config, folder.name, source or config.get('source'))


def write_folder(
    model: nn.Module, folder: Path, config: dict[str, Any], title: str, source: dict[str, str] | None
) -> None:
    """Writes the files of a model folder into an empty folder."""
    save_model(model, str(folder / cache.WEIGHTS))
    config = config | dict(sha256=cache.sha256(folder / cache.WEIGHTS), source=source or {})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    (folder / 'README.md').write_text(segmenter_card(config, title), encoding='utf-8')


def is_segmenter_folder(folder: Path) -> bool:
    """Whether a folder has a readable ``config.json`` of a segmenter, which need not be valid."""
    try:
        config = load_config(folder)
    except CheckpointError:
        return False
    return isinstance(config, dict) and 'head' in config


def open_folder(name: str, cache_dir: str | Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of ``'local-dir:FOLDER'``, ``'hf-hub:ORG/NAME'`` or a bundled name, and its configuration.

    Raises:
        CheckpointError: The folder does not exist or cannot be downloaded, or its configuration is refused.
    """
    if name in BUNDLED:
        return BUNDLED[name], read_segmenter_config(BUNDLED[name])
    source, _, location = name.partition(':')
    if source not in FOREIGN or not location:
        raise OptionError(f'{name!r} is no model folder: expected local-dir:FOLDER or hf-hub:ORG/NAME.')
    folder = hub_folder(location, cache_dir) if source == 'hf-hub' else Path(location)
    return folder, read_segmenter_config(folder)


def read_segmenter_config(folder: Path) -> dict[str, Any]:
    """Reads the configuration of a model folder and checks it, see `check_segmenter_config`."""
    config = load_config(folder)
    check_segmenter_config(config, f"'{Path(folder) / CONFIG}'")
    return config


def check_segmenter_config(config: Any, where: str) -> None:
    """Raises `CheckpointError` unless a configuration only describes a segmenter, its images and its classes.

    Args:
        config: Content of a ``config.json``, see `describe`.
        where: Name of the configuration in error messages.
    """
    try:
        if isinstance(config, dict) and 'head' not in config and 'architecture' in config:
            raise ValueError('it describes a classifier: open it with timm.create_model')
        if not isinstance(config, dict) or not isinstance(config.get('pretrained_cfg'), dict):
            raise ValueError('it is no configuration of a segmenter')
        if unknown := sorted(config.keys() - set(_KEYS)):
            raise ValueError(f'it has an unknown key, {quoted(unknown[0])}')
        if not isinstance(config.get('model_args'), dict):
            raise ValueError('its model_args must be an object')
        _check_classes(config)
        for key in _FACTORY:
            if key in config['model_args']:
                raise ValueError(f'model_args.{key} is not an argument of a model')
        for key in ('head', 'backbone', 'segmenter'):
            if not re.fullmatch(r'[\w.-]*', str(config.get(key) or '')):
                raise ValueError(f'its {key} is {quoted(config[key])}, expected a name')
        _check_test(config.get('test') or {})
    except ValueError as error:
        raise CheckpointError(f'{where} was refused: {one_line(error)}.') from error
    # What remains is that of a classifier: names of models, numbers, preparation of images
    backbone = {key: value for key, value in config.items() if key not in ('head', 'backbone', 'segmenter')}
    check_config(backbone | dict(architecture=str(config.get('backbone')).partition('.')[0]), where)


def _check_classes(config: dict[str, Any]) -> None:
    """Checks that there is a name and a color for each class."""
    K, names, colors = (config.get(key) for key in ('num_classes', 'label_names', 'label_colors'))
    if not isinstance(K, int) or K < 1:
        raise ValueError(f'its num_classes is {quoted(K)}, expected a number of at least 1')
    for key, values in dict(label_names=names, label_colors=colors).items():
        if not isinstance(values, list) or len(values) != K:
            raise ValueError(f'its {key} must be a list with one item for each of {K} classes')
    if not all(isinstance(name, str) for name in names):
        raise ValueError('its label_names must be strings')
    for color in colors:
        valid = isinstance(color, list) and len(color) == 3
        if not (valid and all(isinstance(value, int) and 0 <= value <= 255 for value in color)):
            raise ValueError(f'its label_colors has {quoted(color)}, expected three numbers from 0 to 255')


def _check_test(test: Any) -> None:
    """Checks the names and values of a test protocol."""
    if not isinstance(test, dict) or not test.keys() <= set(_TEST):
        raise ValueError(f'its test is {quoted(test)}, expected an object with {", ".join(_TEST)}')
    if test.get('mode', 'whole') not in ('whole', 'slide') or not isinstance(test.get('pad', False), bool):
        raise ValueError('its test has another mode than whole or slide, or a pad that is neither true nor false')
    for key in ('crop', 'stride', 'scale', 'multiple'):
        sides = test.get(key)
        sides = [1] if sides is None else sides if isinstance(sides, list) else [sides]
        if not 1 <= len(sides) <= 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(f'its test.{key} is {quoted(test[key])}, expected one or two numbers of at least 1')
    if test.get('mode') == 'slide' and not test.get('crop'):
        raise ValueError('its test slides windows, but has no crop, their size')
