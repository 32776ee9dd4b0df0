"""Untrusted model configurations: the ``config.json`` of a model folder and the options stored in a checkpoint.

A configuration describes a model of timm or of this package, its images and its classes. It must not name code or other
files, and its sizes are limited. `check_size` builds the model without memory and within a time limit.
"""

import dataclasses
import inspect
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import CheckpointError, one_line, quoted

__all__ = ['CONFIG', 'check_config', 'check_size', 'load_config', 'read_config']

CONFIG = 'config.json'

_MAX_BYTES = 4 << 20  # the class names and descriptions of ImageNet-21k have two million
_MAX_DEPTH = 8
_MAX_CLASSES = 1_000_000
_MAX_NUMBER = 65_536  # for all other numbers, such as channels and centers
_MAX_SIDE = 4096  # pixels of an image
_MAX_LIST = 64  # items of an argument
_MAX_ELEMENTS = 250_000_000  # of a model without weights; the largest of this package has 87 million
_SECONDS = 20.0  # to build a model without memory; the largest of timm takes two

_CODE = {'auto_map', 'trust_remote_code', 'custom_load', 'custom_pipelines', '_target_'}
_LOCATIONS = {'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict'}
_LABELS = ('label_names', 'label_descriptions', 'labels', 'label_colors')
# Arguments that `timm.create_model` handles itself instead of passing them to the model
_FACTORY = {
    *_CODE,
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *('features_only', 'out_indices', 'feature_cls', 'pruned', 'device', 'dtype', 'variant_args'),
}


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, int | float) for one in value)


def _are_sides(value: Any) -> bool:
    return _are_numbers(value) and all(isinstance(side, int) and 0 < side <= _MAX_SIDE for side in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) and all(isinstance(name, str) for name in value)


_INTERPOLATIONS = ('bicubic', 'bilinear', 'nearest', 'lanczos', 'box', 'hamming', 'random')
_CROP_MODES = ('center', 'squash', 'border')
_EXPECTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ('num_classes', lambda x: isinstance(x, int) and x >= 0, 'a number of at least 0'),
    ('label_offset', lambda x: x in (0, 1), '0 or 1'),
    ('label_names', _are_names, 'a list of text'),
    ('label_descriptions', lambda x: isinstance(x, dict), 'text for each label'),
    *(
        (key, lambda x: _are_sides(x) and len(x) == 3, f'channels, height and width from 1 to {_MAX_SIDE}')
        for key in ('input_size', 'test_input_size', 'min_input_size')
    ),
    ('interpolation', lambda x: x in _INTERPOLATIONS, f'one of {", ".join(_INTERPOLATIONS)}'),
    ('crop_mode', lambda x: x in _CROP_MODES, f'one of {", ".join(_CROP_MODES)}'),
    ('crop_pct', lambda x: isinstance(x, int | float) and 0.1 <= x <= 2, 'a number from 0.1 to 2'),
    ('mean', _are_numbers, 'a list of numbers'),
    ('std', _are_numbers, 'a list of numbers'),
    ('sha256', lambda x: isinstance(x, str) and bool(re.fullmatch('[0-9a-f]{64}', x)), '64 hexadecimal digits'),
)


def read_config(folder: Path, architecture: str | None = None) -> dict[str, Any]:
    """Reads the configuration of a model folder and checks it, see `check_config`."""
    config = load_config(folder)
    check_config(config, f"'{Path(folder) / CONFIG}'", architecture)
    return config


def load_config(folder: Path) -> Any:
    """Reads the configuration of a model folder. The caller has to check what it contains."""
    path = Path(folder) / CONFIG
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f'it has more than {_MAX_BYTES} bytes')
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{folder}' is no model folder: it has no {CONFIG}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is damaged or not a model configuration ({one_line(error)}).") from error


def check_config(config: Any, where: str, architecture: str | None = None) -> None:
    """Raises `CheckpointError` unless a configuration only describes a model, its images and its classes.

    Args:
        config: Content of a ``config.json`` in timm's layout, with or without ``pretrained_cfg``.
        where: Name of the configuration in error messages.
        architecture: Required architecture; None accepts any that is registered.
    """
    try:
        _check(config, architecture)
    except Exception as error:  # ValueError below, or any error of timm for values of unexpected types
        raise CheckpointError(f'{where} was refused: {one_line(error)}.') from error


def _check(config: Any, architecture: str | None) -> None:
    if not isinstance(config, dict):
        raise ValueError(f'a configuration must be an object, not {quoted(config)}')
    if 'head' in config and 'backbone' in config:
        raise ValueError('it describes a segmenter: open it with segmentation.create_segmenter')
    name = config.get('architecture')
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f'its architecture, {quoted(name)}, is unknown to timm and cluster_zoo')
    if architecture not in (None, name):
        raise ValueError(f'its architecture is {name}, not {architecture}')
    cfg = config.get('pretrained_cfg')
    if cfg is None:  # timm's earlier layout
        others = ('architecture', 'num_features', 'labels', 'model_args')
        cfg = {key: value for key, value in config.items() if key not in others}
    arguments = config.get('model_args') or {}
    if not (isinstance(cfg, dict) and isinstance(arguments, dict)):
        raise ValueError('its pretrained_cfg and model_args must be objects')
    for key in _CODE:
        if config.get(key) or cfg.get(key):
            raise ValueError(f'{key} would load custom code')
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    for key, value in cfg.items():
        if key not in known:
            raise ValueError(f'its pretrained_cfg has an unknown key, {quoted(key)}')
        if key in _LOCATIONS and value:
            raise ValueError(f'its {key} would load weights from another location')
    for key, value in arguments.items():
        if key in _FACTORY or not re.fullmatch(r'[a-z]\w*', str(key)):
            raise ValueError(f'model_args.{key} is not an argument of a model')
        if isinstance(value, dict) or (isinstance(value, str) and not re.fullmatch(r'[\w+-]{0,64}', value)):
            raise ValueError(f'model_args.{key} must be a number, a name or a list of these, not {quoted(value)}')
    size = arguments.get('img_size')
    if not (size is None or _are_sides(size if isinstance(size, list | tuple) else [size])):
        raise ValueError(f'model_args.img_size is {quoted(size)}, expected sides from 1 to {_MAX_SIDE}')
    _check_values(config, '')
    for key, check, expected in _EXPECTED:
        for part in (config, cfg):
            if part.get(key) is not None and not check(part[key]):
                raise ValueError(f'its {key} is {quoted(part[key])}, expected {expected}')
    data = timm.data.resolve_data_config({}, pretrained_cfg={'input_size': (3, 224, 224), **cfg})
    channels = data['input_size'][0]
    if not {len(data['mean']), len(data['std'])} <= {1, 3, channels} or min(data['std']) <= 0:
        raise ValueError(f'its mean and std must have one value for each of {channels} channels, std a positive one')


def _check_values(value: Any, path: str, depth: int = 0) -> None:
    """Checks the types of all values and limits their sizes."""
    key = path.rpartition('.')[2]
    if depth > _MAX_DEPTH:
        raise ValueError(f'{path} is nested too deeply')
    if isinstance(value, dict | list | tuple):
        if len(value) > (_MAX_CLASSES if key in _LABELS else _MAX_LIST):
            raise ValueError(f'{path} has {len(value)} items')
        items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        for name, item in items:
            _check_values(item, path if name is None else f'{path}.{one_line(name)}'.lstrip('.'), depth + 1)
    elif isinstance(value, str):
        if not value.replace('\n', '').replace('\t', '').isprintable():
            raise ValueError(f'{path} has control characters')
    elif isinstance(value, int | float):
        limit = _MAX_CLASSES if key in ('num_classes', 'num_features') else _MAX_NUMBER
        if not abs(value) <= limit:  # true for NaN too
            raise ValueError(f'{path} is {quoted(value)}, expected at most {limit}')
    elif value is not None:
        raise ValueError(f'{path} is a {type(value).__name__}')


def check_size(build: Callable[[], nn.Module], state_dict: dict[str, Tensor] | None, where: str) -> None:
    """Builds an untrusted model on the meta device, to limit the time and to compare its size with its weights.

    Raises:
        CheckpointError: The model cannot be built, takes too long or is much larger than its weights.
    """
    thread, end = threading.get_ident(), time.monotonic() + _SECONDS

    def check_time(*_: Any) -> None:
        if threading.get_ident() == thread and time.monotonic() > end:
            raise TimeoutError(f'it takes more than {_SECONDS:g} s')

    hook = register_module_module_registration_hook(check_time)
    try:
        with torch.device('meta'):
            model = build()
    except CheckpointError:
        raise
    except Exception as error:  # invalid arguments can raise any error in a model
        raise CheckpointError(f'{where} describes no model that can be built: {one_line(error)}') from error
    finally:
        hook.remove()
    size = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    found = sum(x.numel() for x in (state_dict or {}).values())
    if size > max(_MAX_ELEMENTS, 4 * found):
        raise CheckpointError(
            f'{where} was refused: it describes a model of {size:,} elements, but has weights of {found:,} elements.'
        )
