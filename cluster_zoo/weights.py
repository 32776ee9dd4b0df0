"""How checkpoints are opened, and what is checked before a model takes them.

A checkpoint is data: only tensors, plain containers and an explicit list of classes are ever unpickled, see
`check_pickled`, and nothing is loaded in part. Whatever is wrong with a file is one `CheckpointError`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from .untrusted import CheckpointError, check_pickled, check_safetensors
from .untrusted.errors import damaged, one_line, quoted

__all__ = ['CheckpointError', 'load_checkpoint', 'load_state_dict', 'load_weights', 'read_checkpoint', 'state_dict_of']

# What a checkpoint may hold beside what `torch.load` knows: timm's saver stores the script's arguments, and scripts
# that measure with NumPy store its numbers, such as the best accuracy. `check_pickled` sees to it that these are made
# of plain values, and leaves out much of what `torch.load` knows.
_NUMPY_SCALAR = np.float64().__reduce__()[0]
_ALLOWED_CLASSES = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in ('f8', 'f4', 'f2', 'i8', 'i4', 'i2', 'i1', 'u8', 'u4', 'u2', 'u1', 'b1')},
    (_NUMPY_SCALAR, 'numpy.core.multiarray.scalar'),  # before NumPy 2.0
    (_NUMPY_SCALAR, 'numpy._core.multiarray.scalar'),
]
_STATE_DICT_KEYS = ('state_dict', 'model')
_EMA_KEYS = ('state_dict_ema', 'model_ema')
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 4  # differing entries that a message names


def read_checkpoint(path: str | Path) -> Any:
    """Everything that a file holds, on the CPU.

    Args:
        path: File. A ``.safetensors`` file, or one written by ``torch.save``.

    Raises:
        CheckpointError: No such file, a damaged one, or one whose pickle would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"No checkpoint at '{path}': the path is {'a folder' if path.is_dir() else 'not a file'}."
        )
    return _read_safetensors(path) if path.suffix == '.safetensors' else _read_pickle(path)


def load_state_dict(path: str | Path, use_ema: bool = True) -> dict[str, Tensor]:
    """Read the weights of a checkpoint: safetensors, a state dict, or a dictionary saved by timm's training script.

    Args:
        path: See `read_checkpoint`.
        use_ema: Prefer the averaged weights where the file has both.

    Returns:
        Tensors by name, on the CPU, without the prefixes of DistributedDataParallel and torch.compile.

    Raises:
        CheckpointError: The file cannot be read, or has no weights.
    """
    return state_dict_of(read_checkpoint(path), path, use_ema)


def state_dict_of(checkpoint: Any, path: str | Path, use_ema: bool = True) -> dict[str, Tensor]:
    """The weights among everything that `read_checkpoint` found in a file, see `load_state_dict`.

    Args:
        checkpoint: What the file holds.
        path: The file, for messages.
        use_ema: Prefer the averaged weights where there are both.
    """
    state_dict = checkpoint
    if isinstance(checkpoint, dict):
        keys = (_EMA_KEYS + _STATE_DICT_KEYS) if use_ema else _STATE_DICT_KEYS
        state_dict = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    if not isinstance(state_dict, dict) or not state_dict:
        raise CheckpointError(f"'{path}' holds no weights: expected tensors by name, found {_describe(state_dict)}.")
    others = [str(name) for name, x in state_dict.items() if not (isinstance(name, str) and isinstance(x, Tensor))]
    if others:
        raise CheckpointError(f"'{path}' holds no weights: the entries {_first(others)} are not tensors.")
    return clean_state_dict(state_dict)


def _describe(value: Any) -> str:
    return 'an empty dictionary' if isinstance(value, dict) else f'a {type(value).__name__}'


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    check_safetensors(path)
    try:
        return load_file(path)
    except Exception as error:  # a shape beyond 64 bits, a type that this version of PyTorch does not have, ...
        raise damaged(path, 'a safetensors file', error) from error


def _read_pickle(path: Path) -> Any:
    check_pickled(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED_CLASSES):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # what is altered where nothing but the reader looks fails with any error
        raise damaged(path, 'a checkpoint') from error


def check_fit(
    state_dict: dict[str, Tensor],
    model: nn.Module,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise `CheckpointError` unless a state dict has the model's names, shapes and kinds of numbers, all finite.

    A module may have entries that exist only at times: it names them in ``optional_entries``, and its
    ``check_optional(entries)`` raises ValueError for those of a file that it cannot take.

    Args:
        state_dict: Tensors under the model's names.
        model: The model, as it was built.
        ignore: Names that need not agree.
    """
    own = model.state_dict()
    optional, differences = _optional_entries(state_dict, model)
    expected, found = (
        {name: tuple(value.shape) for name, value in entries.items() if name not in optional and not ignore(name)}
        for entries in (own, state_dict)
    )
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        differences.append(f'{len(missing)} missing ({_first(missing)})')
    if extra:
        differences.append(f'{len(extra)} unknown to the model ({_first(extra)})')
    shapes = [name for name in expected if name in found and expected[name] != found[name]]
    if shapes:
        described = [
            f'{name}: {quoted(list(found[name]))} in the file, {list(expected[name])} in the model' for name in shapes
        ]
        differences.append(f'{len(shapes)} of another shape ({_first(described)})')
    types = [n for n in expected if n in found and own[n].is_floating_point() and state_dict[n].dtype not in _FLOATS]
    if types:
        described = [f'{name}: {state_dict[name].dtype} in the file, {own[name].dtype} in the model' for name in types]
        differences.append(f'{len(types)} of another type ({_first(described)})')
    name = type(model).__name__
    if differences:
        raise CheckpointError(
            f'The checkpoint does not fit this {name}: of {len(expected)} entries, ' + '; '.join(differences) + '.'
        )
    # As the model will hold them: a number may be too large for its type
    values = ((name, state_dict[name].to(own[name].dtype)) for name in found)
    broken = [name for name, value in values if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f'The checkpoint is broken: {len(broken)} entries hold NaN or infinity ({_first(broken)}).'
        )


def _optional_entries(state_dict: dict[str, Tensor], model: nn.Module) -> tuple[set[str], list[str]]:
    """Names of the entries that the model may have or not, and what is wrong with those of the state dict."""
    optional, problems = set(), []
    for path, module in model.named_modules():
        names = {name: f'{path}.{name}' if path else name for name in getattr(module, 'optional_entries', ())}
        optional.update(names.values())
        if names:
            try:
                module.check_optional({name: state_dict[key] for name, key in names.items() if key in state_dict})
            except ValueError as error:
                problems.append(f'{type(module).__name__} can not take {error}')
    return optional, problems


def _first(names: list[str]) -> str:
    return ', '.join(one_line(name) for name in names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')


def load_checkpoint(model: nn.Module, path: str | Path, use_ema: bool = True) -> None:
    """Load a checkpoint file, the authors', timm's or ours, into a model that it fits entirely.

    Names are converted by the ``checkpoint_filter_fn`` of the module that defines the model, timm's convention.

    Args:
        model: Any timm model.
        path: See `load_state_dict`.
        use_ema: See `load_state_dict`.

    Raises:
        CheckpointError: The file cannot be read or does not fit. The model is then unchanged.
    """
    load_weights(model, load_state_dict(path, use_ema))


def load_weights(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """`load_checkpoint` from tensors by name, which may be the authors' names.

    Raises:
        CheckpointError: They do not fit. The model is then unchanged.
    """
    state_dict = as_named_by(model, state_dict)
    check_fit(state_dict, model)
    model.load_state_dict(state_dict)


def as_named_by(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of a model, converted by its module's ``checkpoint_filter_fn`` if they are others.

    Raises:
        CheckpointError: They are not what that function converts.
    """
    shapes, found = ({name: x.shape for name, x in entries.items()} for entries in (model.state_dict(), state_dict))
    filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    return state_dict if found == shapes or filter_fn is None else converted(state_dict, model, filter_fn)


def converted(state_dict: dict[str, Tensor], model: nn.Module, filter_fn: Callable[..., Any]) -> dict[str, Tensor]:
    """What timm's filter functions make of a state dict. They know some names, and assume that these have their shapes.

    Args:
        state_dict: Tensors by name, which stay as they are.
        model: The model to convert for.
        filter_fn: Called with a copy of the dictionary and the model.

    Raises:
        CheckpointError: They have others.
    """
    try:
        return filter_fn(dict(state_dict), model)
    except Exception as error:
        raise CheckpointError(
            f'The checkpoint does not fit this {type(model).__name__}: its entries have known names, but shapes that '
            f'cannot be converted ({one_line(str(error))}).'
        ) from error
