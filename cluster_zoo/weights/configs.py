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

from ..errors import CheckpointError, one_line, quoted

__all__ = ['CONFIG', 'check_config', 'check_size', 'read_config']

CONFIG = 'config.json'

_MAX_BYTES = 4 << 20  # the names and descriptions of ImageNet-21k take two
_MAX_DEPTH = 8
_MAX_CLASSES = 1_000_000
_MAX_NUMBER = 65_536  # of any other number: channels, centers, ...
_MAX_SIDE = 4096  # pixels of an image
_MAX_LIST = 64  # items of an argument
_LARGEST = 250_000_000  # numbers of a model that comes without weights; the largest here has 87 million
_SECONDS = 20.0  # to build a model without memory; the largest of timm takes two

_CODE = {'auto_map', 'trust_remote_code', 'custom_load', 'custom_pipelines', '_target_'}
_PLACES = {'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict'}  # of other weights
_LABELS = ('label_names', 'label_descriptions', 'labels')
# What `timm.create_model` takes for itself, before a model sees its arguments
_FACTORY = {
    *_CODE,
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *('features_only', 'out_indices', 'feature_cls', 'pruned', 'device', 'dtype', 'variant_args'),
}


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, int | float) for one in value)


_INTERPOLATIONS = ('bicubic', 'bilinear', 'nearest', 'lanczos', 'box', 'hamming', 'random')
_CROP_MODES = ('center', 'squash', 'border')
_EXPECTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ('num_classes', lambda x: isinstance(x, int) and x >= 0, 'a number of at least 0'),
    ('label_offset', lambda x: x in (0, 1), '0 or 1'),
    (
        'label_names',
        lambda x: isinstance(x, list | tuple | dict) and all(isinstance(name, str) for name in x),
        'a list of text',
    ),
    ('label_descriptions', lambda x: isinstance(x, dict), 'text for each label'),
    ('input_size', lambda x: isinstance(x, list | tuple) and len(x) == 3, 'channels, height and width'),
    ('interpolation', lambda x: x in _INTERPOLATIONS, f'one of {", ".join(_INTERPOLATIONS)}'),
    ('crop_mode', lambda x: x in _CROP_MODES, f'one of {", ".join(_CROP_MODES)}'),
    ('crop_pct', lambda x: isinstance(x, int | float) and 0.1 <= x <= 2, '0.1 to 2'),
    ('mean', _are_numbers, 'numbers'),
    ('std', _are_numbers, 'numbers'),
    ('sha256', lambda x: isinstance(x, str) and bool(re.fullmatch('[0-9a-f]{64}', x)), '64 hexadecimal digits'),
)


def read_config(folder: Path, architecture: str | None = None) -> dict[str, Any]:
    """The configuration of a model folder, checked by `check_config`."""
    path = Path(folder) / CONFIG
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f'it has more than {_MAX_BYTES} bytes')
        config = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{folder}' is no model folder: it holds no {CONFIG}.") from error
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
    except Exception as error:  # of ours, and of timm for values of other types than it expects
        raise CheckpointError(f'{where} was refused: {one_line(error)}.') from error


def _check(config: Any, architecture: str | None) -> None:
    if not isinstance(config, dict):
        raise ValueError(f'a configuration must be an object, not {quoted(config)}')
    name = config.get('architecture')
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f'its architecture, {quoted(name)}, is none that timm or cluster_zoo has')
    if architecture not in (None, name):
        raise ValueError(f'its architecture is {name}, not {architecture}')
    cfg = config.get('pretrained_cfg')
    if cfg is None:  # the earlier layout
        beside = ('architecture', 'num_features', 'labels', 'model_args')
        cfg = {key: value for key, value in config.items() if key not in beside}
    arguments = config.get('model_args') or {}
    if not (isinstance(cfg, dict) and isinstance(arguments, dict)):
        raise ValueError('its pretrained_cfg and model_args must be objects')
    for key in _CODE:
        if config.get(key) or cfg.get(key) or key in arguments:
            raise ValueError(f'{key} asks for code of its own')
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    for key, value in cfg.items():
        if key not in known:
            raise ValueError(f'its pretrained_cfg has an unknown key, {quoted(key)}')
        if key in _PLACES and value:
            raise ValueError(f'its {key} leads to other weights than those beside it')
    for key, value in arguments.items():
        if key in _FACTORY or not re.fullmatch(r'[a-z]\w*', str(key)):
            raise ValueError(f'model_args.{key} is not an argument of a model, but of what builds and loads it')
        if isinstance(value, dict) or (isinstance(value, str) and not re.fullmatch(r'[\w+-]{0,64}', value)):
            raise ValueError(f'model_args.{key} must be a number, a choice or a list of these, not {quoted(value)}')
    _check_values(config, '')

    sizes = [cfg.get(key) or () for key in ('input_size', 'test_input_size', 'min_input_size')]
    own = arguments.get('img_size')
    sizes.append(own if isinstance(own, list | tuple) else [own] if own is not None else [])
    for side in (side for size in sizes for side in size):
        if not (isinstance(side, int) and 0 < side <= _MAX_SIDE):
            raise ValueError(f'its images have a side of {quoted(side)}, where 1 to {_MAX_SIDE} is expected')
    for key, check, expected in _EXPECTED:
        for part in (config, cfg):
            if part.get(key) is not None and not check(part[key]):
                raise ValueError(f'its {key} is {quoted(part[key])}, where {expected} is expected')
    data = timm.data.resolve_data_config({}, pretrained_cfg={'input_size': (3, 224, 224), **cfg})
    channels = data['input_size'][0]
    if not {len(data['mean']), len(data['std'])} <= {1, 3, channels} or min(data['std']) <= 0:
        raise ValueError(
            f'its mean and std are not one number for each of {channels} channels, or a std is not positive'
        )


def _check_values(value: Any, path: str, depth: int = 0) -> None:
    """Raise unless all values are JSON's, and their sizes are bounded."""
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
    elif value is not None and not isinstance(value, int | float):
        raise ValueError(f'{path} is a {type(value).__name__}')
    elif value is not None and not abs(value) <= (
        _MAX_CLASSES if key in ('num_classes', 'num_features') else _MAX_NUMBER
    ):
        raise ValueError(f'{path} is {quoted(value)}, where up to {_MAX_NUMBER} is expected')


def check_size(build: Callable[[], nn.Module], state_dict: dict[str, Tensor] | None, where: str) -> None:
    """Build a model that somebody else describes without memory for its parameters, before it is built for use."""
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
