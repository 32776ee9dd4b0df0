"""Model configurations from elsewhere: the ``config.json`` of a model folder, and what a checkpoint says of its model.

A configuration describes a model of timm or of this package, its images and its classes. It can name neither code nor
other files, and its sizes are bounded. `check_size` then builds the model without memory, within a time limit.
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

from .errors import CheckpointError, one_line, quoted

__all__ = ['CONFIG', 'check_config', 'check_size', 'read_config']

CONFIG = 'config.json'

_MAX_BYTES = 4 << 20  # the names and descriptions of ImageNet-21k take two
_MAX_CLASSES = 1_000_000
_MAX_SIDE = 4096  # pixels of an image
_MAX_NUMBER = 65_536  # of any argument: channels, centers, ...
_MAX_LIST = 64  # items of an argument, characters of a choice
_LARGEST = 250_000_000  # numbers of a model that comes without weights; the largest here has 87 million
_SECONDS = 20.0  # to build a model without memory; the largest of timm takes two

# Keys that name code to import or another place for weights
_CODE = {'auto_map', 'trust_remote_code', 'custom_load', 'custom_pipelines', '_target_'}
_PLACES = {'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict'}
# What `timm.create_model` takes for itself, before a model sees its arguments
_FACTORY = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *_CODE,
    *('features_only', 'out_indices', 'feature_cls', 'pruned', 'device', 'dtype', 'variant_args', 'args_from_weights'),
}


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_count(value: Any, high: int, low: int = 0) -> bool:
    return isinstance(value, int) and _is_number(value, low, high)


def _is_list(value: Any, check: Callable[[Any], bool], longest: int = _MAX_LIST) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= longest and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_size(value: Any) -> bool:
    return _is_list(value, lambda side: _is_count(side, _MAX_SIDE, 1), 3)


def _are_names(value: Any) -> bool:
    return _is_list(list(value.values()) if isinstance(value, dict) else value, _is_text, _MAX_CLASSES)


def _is_argument(value: Any, nested: bool = False) -> bool:
    """A number, a choice such as 'avg', or a list of these; never a path or an address."""
    if isinstance(value, str):
        return len(value) <= _MAX_LIST and re.fullmatch(r'[\w+-]*', value) is not None
    if isinstance(value, (list, tuple)):
        return not nested and _is_list(value, lambda item: _is_argument(item, True))
    return value is None or isinstance(value, bool) or _is_number(value, -_MAX_NUMBER, _MAX_NUMBER)


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in choices), f'one of {", ".join(choices)}'


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ('input_size', 'test_input_size', 'min_input_size'), (_is_size, f'channels, height and width up to {_MAX_SIDE}')
    ),
    **dict.fromkeys(('pool_size', 'test_pool_size'), (_is_size, f'a size up to {_MAX_SIDE}')),
    'mean': (lambda value: _is_list(value, lambda x: _is_number(x, -1000, 1000)), 'one number a channel'),
    'std': (lambda value: _is_list(value, lambda x: _is_number(x, 1e-6, 1000)), 'one positive number a channel'),
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), (lambda value: _is_number(value, 0.1, 2), 'from 0.1 to 2')),
    'interpolation': _one_of('bicubic', 'bilinear', 'nearest', 'lanczos', 'box', 'hamming', 'random'),
    'crop_mode': _one_of('center', 'squash', 'border'),
    **dict.fromkeys(
        ('num_classes', 'num_features'), (lambda value: _is_count(value, _MAX_CLASSES), f'from 0 to {_MAX_CLASSES:,}')
    ),
    'label_offset': (lambda value: _is_count(value, 1), '0 or 1'),
    **dict.fromkeys(('label_names', 'label_descriptions', 'labels'), (_are_names, 'a list of text')),
    **dict.fromkeys(
        ('first_conv', 'classifier', 'notes', 'paper_ids'),
        (lambda value: _is_text(value) or _are_names(value), 'text, or a list of it'),
    ),
    **dict.fromkeys(('fixed_input_size', 'custom_load'), (lambda value: isinstance(value, bool), 'true or false')),
    'sha256': (lambda value: _is_text(value) and bool(re.fullmatch('[0-9a-f]{64}', value)), '64 hexadecimal digits'),
}
_TEXT = (_is_text, 'text')


def read_config(path: Path, architecture: str | None = None) -> dict[str, Any]:
    """The configuration of a model folder, checked by `check_config`.

    Args:
        path: The folder.
        architecture: See `check_config`.

    Raises:
        CheckpointError: There is no ``config.json``, it is too large or not JSON, or `check_config` refuses it.
    """
    path = Path(path) / CONFIG
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f'it has more than {_MAX_BYTES} bytes')
        config = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path.parent}' is no model folder: it holds no {CONFIG}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is damaged or not a model configuration ({one_line(error)}).") from error
    check_config(config, f"'{path}'", architecture)
    return config


def check_config(config: Any, where: str, architecture: str | None = None) -> None:
    """Raise unless a configuration describes a model, its images and its classes, and does nothing else.

    Args:
        config: The content of a ``config.json`` in timm's layout, today's or the earlier one without
            ``pretrained_cfg``.
        where: What messages call it.
        architecture: The one that it has to name; None for any that is registered.

    Raises:
        CheckpointError: It does. The message names the key.
    """
    try:
        _check(config, architecture)
    except ValueError as error:
        raise CheckpointError(f'{where} was refused: {error}.') from error


def _check(config: Any, architecture: str | None) -> None:
    if not isinstance(config, dict):
        raise ValueError(f'a configuration is an object, not {quoted(config)}')
    name = config.get('architecture')
    if not isinstance(name, str) or not re.fullmatch(r'[\w.-]+', name) or not timm.is_model(name):
        raise ValueError(f'its architecture, {quoted(name)}, is none that timm or cluster_zoo has')
    if architecture not in (None, name):
        raise ValueError(f'its architecture is {name}, not {architecture}')
    cfg = config.get('pretrained_cfg')
    if cfg is None:  # the earlier layout
        cfg = {key: value for key, value in config.items() if key not in ('architecture', 'labels', 'model_args')}
    elif not isinstance(cfg, dict):
        raise ValueError(f'its pretrained_cfg is an object, not {quoted(cfg)}')
    for key in _CODE:
        if config.get(key) or cfg.get(key):
            raise ValueError(f'{key} asks for code of its own')
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    for key, value in cfg.items():
        if key not in known:
            raise ValueError(f'its pretrained_cfg has an unknown key, {quoted(key)}')
        if key in _PLACES and value:
            raise ValueError(f'its {key} leads to other weights than those beside it')
        _check_value(key, value)
    for key in ('num_classes', 'num_features', 'labels', 'label_names', 'label_descriptions', 'sha256'):
        _check_value(key, config.get(key))
    channels = (cfg.get('input_size') or (3,))[0]
    for key in ('mean', 'std'):
        if len(cfg.get(key) or (0,)) not in (1, 3, channels):
            raise ValueError(f'its {key} has {len(cfg[key])} numbers for {channels} channels')

    arguments = config.get('model_args') or {}
    if not isinstance(arguments, dict):
        raise ValueError(f'its model_args are an object, not {quoted(arguments)}')
    for key, value in arguments.items():
        if key in _FACTORY or not re.fullmatch(r'[a-z]\w*', str(key)):
            raise ValueError(f'model_args.{one_line(key)} is no argument of a model, but of what builds and loads it')
        if not _is_argument(value):
            raise ValueError(f'model_args.{key} is no number, no choice and no list of these: {quoted(value)}')
        if key == 'img_size' and not all(
            _is_count(side, _MAX_SIDE, 1) for side in (value if isinstance(value, list) else [value])
        ):
            raise ValueError(f'model_args.img_size is one or two sides of up to {_MAX_SIDE} px, not {quoted(value)}')


def _check_value(key: str, value: Any) -> None:
    check, expected = _CHECKS.get(key, _TEXT)
    if value is not None and key not in _PLACES and not check(value):
        raise ValueError(f'its {key} is {expected}, not {quoted(value)}')


def check_size(build: Callable[[], nn.Module], state_dict: dict[str, Tensor] | None, where: str) -> None:
    """Build a model that somebody else describes without memory for its parameters, before it is built for use.

    Args:
        build: Builds the model, without pretrained weights.
        state_dict: What there is to fill it; None if it is to stay empty.
        where: What messages call the description.

    Raises:
        CheckpointError: The model cannot be built, takes too long, or is much larger than what there is to fill it.
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
    except Exception as error:  # a model can fail anywhere for arguments that make no sense
        raise CheckpointError(f'{where} describes no model that can be built: {one_line(error)}') from error
    finally:
        hook.remove()
    needed = sum(x.numel() for tensors in (model.parameters(), model.buffers()) for x in tensors)
    found = sum(x.numel() for x in (state_dict or {}).values())
    if needed > max(_LARGEST, 4 * found):
        raise CheckpointError(
            f'{where} was refused: it describes a model of {needed:,} numbers and has {found:,} of them.'
        )
