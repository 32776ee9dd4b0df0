"""Model configurations: JSON files in the layout of timm's hub folders."""

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg

from ..tags import is_ours
from .errors import CheckpointError, damaged, one_line, quoted, refused

_MAX_BYTES = 4 * 2**20  # the names and descriptions of ImageNet-21k take two
_MAX_DEPTH = 16
_MAX_CLASSES = 1_000_000
_MAX_ARGUMENT = 65_536  # channels, blocks, ...
_MAX_SIDE = 4096  # pixels of an image: its square is what is allocated
_MAX_LIST = 64
_MAX_TEXT = 500  # characters of a note on where weights come from

# By these keys configurations name code to import, or ask for a loader of the model's own
_CODE = {'auto_map', 'trust_remote_code', 'custom_load', 'custom_pipelines', 'custom_objects', '_target_'}
_REDIRECTIONS = ('url', 'file', 'hf_hub_id', 'source', 'state_dict')
_FILE_NAME = re.compile(r'[\w-][\w.-]*')
_CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')  # all but tab and line feed

# What `timm.create_model` takes for itself, before a model sees its arguments
_FACTORY = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *('features_only', 'out_indices', 'feature_cls', 'pruned', 'device', 'dtype', 'variant_args', 'args_from_weights'),
}


def read_config_file(path: str | Path, architecture: str | None = None) -> dict[str, Any]:
    """The configuration of a model folder, checked by `check_config`.

    Args:
        path: A ``config.json`` in the layout of timm's hub folders.
        architecture: See `check_config`.

    Raises:
        CheckpointError: No such file, it is too large or not JSON, or `check_config` refuses it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No model configuration at '{path}'.")
    if path.stat().st_size > _MAX_BYTES:
        raise refused(path, f'a model configuration takes no more than {_MAX_BYTES} bytes')
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise damaged(path, 'a model configuration', error) from error
    check_config(config, f"'{path}'", architecture)
    return config


def parse_json(content: bytes) -> Any:
    """JSON as all readers understand it alike: no name twice in an object, no NaN. ValueError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError('a name stands twice in one object')
        return dict(pairs)

    def constant(name: str) -> None:
        raise ValueError(f'{name} is no number')

    try:
        return json.loads(content.decode(), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None


def check_config(config: Any, where: str, architecture: str | None = None) -> None:
    """Raise unless a model configuration describes a model and does nothing else.

    It may name an architecture that timm knows, arguments of it that are numbers, choices and lists of these, how
    images are prepared and what the classes are called. It may not name code, nor weights other than those beside it.

    Args:
        config: What ``config.json`` holds, in today's layout of timm or in the earlier one without ``pretrained_cfg``.
        where: What messages call it.
        architecture: The one that it has to name; None for any that is registered.

    Raises:
        CheckpointError: It does. The message names the key.
    """
    try:
        if not isinstance(config, dict):
            raise _Refused(f'a model configuration is an object, this is a {type(config).__name__}')
        _check_values(config)
        _check_architecture(config.get('architecture'), architecture)
        pretrained_cfg = config.get('pretrained_cfg', _early_layout(config))
        _check_pretrained_cfg(pretrained_cfg)
        if pretrained_cfg.get('label_offset') and is_ours(config['architecture']):  # the others' heads timm cuts
            raise _Refused('its label_offset leaves classes out, which no model of this package does')
        for key in ('num_classes', 'num_features', 'labels', 'label_names', 'label_descriptions', 'sha256'):
            if config.get(key) is not None:
                _check_entry(key, config[key])
        if 'pretrained_cfg' in config and config.get('source') is not None:  # before, it was one of its keys
            _check_source(config['source'])
        _check_model_args(config.get('model_args') or {})
    except _Refused as error:
        raise CheckpointError(f'{where} was refused: {one_line(str(error))}.') from error


class _Refused(Exception):
    """Why a configuration is refused."""


def _early_layout(config: dict[str, Any]) -> dict[str, Any]:
    """What timm makes a pretrained configuration of where there is none."""
    others = ('architecture', 'num_features', 'labels')
    return {key: value for key, value in config.items() if key not in others}


def _check_values(config: dict[str, Any]) -> None:
    """Nothing but JSON, not deep, no text that a terminal acts on, no key that names code."""
    for path, value in _walk(config):
        if isinstance(value, str):
            if _CONTROL.search(value):
                raise _Refused(f'{path} has control characters')
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise _Refused(f'{path} is not a finite number')
        elif isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) or _CONTROL.search(key):
                    raise _Refused(f'{path} has a key that is no plain text')
                if key in _CODE and value[key]:
                    raise _Refused(f'{path}.{key}'.lstrip('.') + ' asks for code of its own')
        elif not isinstance(value, list | tuple | int | None):
            raise _Refused(f'{path} is a {type(value).__name__}')


def _walk(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All values, those inside of others too, and how they are reached."""
    pending: list[tuple[str, Any, int]] = [('', config, 0)]
    while pending:
        path, value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise _Refused(f'{path} is nested too deeply')
        yield path, value
        if isinstance(value, dict):
            pending += [(f'{path}.{quoted(key)[1:-1]}'.lstrip('.'), part, depth + 1) for key, part in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(path, part, depth + 1) for part in value]


def _check_architecture(name: Any, expected: str | None) -> None:
    if expected is not None and name != expected:
        raise _Refused(f'its architecture is {quoted(name)}, not {expected}')
    if expected is None and (
        not isinstance(name, str) or not re.fullmatch(r'[\w.-]+', name) or not timm.is_model(name)
    ):
        raise _Refused(f'its architecture, {quoted(name)}, is none that timm or this package has')


# What the values of a pretrained configuration are


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any, largest: int) -> bool:
    return _is_number(value) and isinstance(value, int) and 0 <= value <= largest


def _is_image_size(value: Any) -> bool:
    return _is_list(value, 3, 3) and all(_is_count(n, _MAX_SIDE) and n > 0 for n in value)


def _are_sides(value: Any) -> bool:
    return all(_is_count(n, _MAX_SIDE) and n > 0 for n in (value if _is_list(value, 1, 2) else [value]))


def _is_list(value: Any, shortest: int, longest: int) -> bool:
    return isinstance(value, list | tuple) and shortest <= len(value) <= longest


def _are_statistics(value: Any) -> bool:
    return _is_list(value, 1, _MAX_LIST) and all(_is_number(x) and abs(x) <= 1000 for x in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_by_key(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _are_names(value: Any) -> bool:
    return _is_text_by_key(value) or (isinstance(value, list | tuple) and all(map(_is_text, value)))


def _are_modules(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return _is_list(names, 0, _MAX_LIST) and all(isinstance(n, str) and re.fullmatch(r'[\w.]*', n) for n in names)


_EXPECTED: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        ('input_size', 'test_input_size', 'min_input_size'), (_is_image_size, 'channels, height and width of images')
    ),
    'mean': (_are_statistics, 'one number a channel'),
    'std': (lambda value: _are_statistics(value) and min(value) > 0, 'one positive number a channel'),
    **dict.fromkeys(
        ('crop_pct', 'test_crop_pct'),
        (lambda value: _is_number(value) and 0.1 <= value <= 2, 'a part of the image, from 0.1 to 2'),
    ),
    **dict.fromkeys(
        ('num_classes', 'num_features'),
        (lambda value: _is_count(value, _MAX_CLASSES), f'a number from 0 to {_MAX_CLASSES:,}'),
    ),
    'label_offset': (lambda value: _is_count(value, 1), '0 or 1'),
    **dict.fromkeys(('labels', 'label_names'), (_are_names, 'a list of text')),
    'label_descriptions': (_is_text_by_key, 'text for each label'),
    **dict.fromkeys(('notes', 'paper_ids'), (lambda value: _is_text(value) or _are_names(value), 'text')),
    'sha256': (
        lambda value: _is_text(value) and bool(re.fullmatch('[0-9a-f]{64}', value)),
        '64 hexadecimal digits, in lower case',
    ),
    **dict.fromkeys(('first_conv', 'classifier'), (_are_modules, 'names of modules')),
    **dict.fromkeys(
        ('pool_size', 'test_pool_size'),
        (lambda value: _is_list(value, 1, 3) and all(_is_count(n, _MAX_ARGUMENT) for n in value), 'a size'),
    ),
    **dict.fromkeys(('fixed_input_size', 'custom_load'), (lambda value: isinstance(value, bool), 'true or false')),
    'hf_hub_filename': (
        lambda value: isinstance(value, str) and bool(_FILE_NAME.fullmatch(value)),
        'the name of a file beside the configuration',
    ),
}
_IS_TEXT = (_is_text, 'text')


def _check_entry(key: str, value: Any) -> None:
    check, expected = _EXPECTED.get(key, _IS_TEXT)
    if not check(value):
        raise _Refused(f'its {key} is {expected}, not {quoted(value)}')


def _check_pretrained_cfg(cfg: Any) -> None:
    if not isinstance(cfg, dict):
        raise _Refused(f'its pretrained_cfg is an object, not {quoted(cfg)}')
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    for key, value in cfg.items():
        if key not in known:
            raise _Refused(f'its pretrained_cfg has an unknown key, {quoted(key)}')
        if key in _REDIRECTIONS and value:
            raise _Refused(f'its {key} leads to other weights than those beside it')
        if value is not None and key not in _REDIRECTIONS:
            _check_entry(key, value)
    channels = len(cfg.get('mean') or (0,)), len(cfg.get('std') or (0,))
    if not set(channels) <= {1, 3, *(cfg.get('input_size') or ())[:1]}:
        raise _Refused(f'its mean and std have {channels} numbers, one for each channel of an image')


def _check_source(source: Any) -> None:
    if not _is_text_by_key(source) or len(source) > _MAX_LIST or any(len(x) > _MAX_TEXT for x in source.values()):
        raise _Refused(f'its source is an object of short text, not {quoted(source)}')


def _check_model_args(arguments: Any) -> None:
    if not isinstance(arguments, dict):
        raise _Refused(f'its model_args are an object, not {quoted(arguments)}')
    for key, value in arguments.items():
        if key in _FACTORY or not key.isidentifier() or key.startswith('_'):
            raise _Refused(f'model_args.{key} is no argument of a model, but of what builds and loads it')
        if not _is_argument(value):
            raise _Refused(f'model_args.{key} is no number, no choice and no list of these: {quoted(value)}')
        if key == 'img_size' and value is not None and not _are_sides(value):
            raise _Refused(f'model_args.img_size is one or two sides of up to {_MAX_SIDE} pixels, not {quoted(value)}')


def _is_argument(value: Any, nested: bool = False) -> bool:
    if isinstance(value, list | tuple):
        return not nested and len(value) <= _MAX_LIST and all(_is_argument(part, True) for part in value)
    if isinstance(value, str):  # a choice such as 'avg', never a path, an address or something to import
        return len(value) <= _MAX_LIST and bool(re.fullmatch(r'[\w+-]*', value))
    return value is None or (isinstance(value, int | float) and abs(value) <= _MAX_ARGUMENT)
