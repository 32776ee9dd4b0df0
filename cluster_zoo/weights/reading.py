"""Reading checkpoint files: the authors', timm's, other frameworks' and this package's.

A checkpoint is data: ``torch.load(weights_only=True)`` with a short list of further classes, or safetensors. `scan`
refuses the files that would crash or exhaust the process all the same. Every problem is one `CheckpointError`.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, one_line
from .scan import check_checksums, check_file, check_tensors

__all__ = [
    'check_fit',
    'extract_state_dict',
    'is_averaged',
    'load_checkpoint',
    'load_state_dict',
    'load_weights',
    'read_checkpoint',
]

# Where training scripts keep the weights, and their average. timm's names come first.
_KEYS = ('state_dict', 'model', 'model_state', 'model_state_dict', 'net', 'network', 'params', 'weights', 'module')
_EMA_KEYS = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'params_ema', 'ema')
# What wrappers put before every name: DistributedDataParallel and SWA, torch.compile, Lightning and others
_PREFIXES = ('module.', '_orig_mod.', 'model.', 'net.')
_NO_WEIGHTS = re.compile(r'(^|\.)(total_ops|total_params)$|^n_averaged$')  # of thop, of SWA
_OTHER_FILES = {
    b'\x1f\x8b': 'compressed with gzip. Unpack it first: gunzip FILE',
    b'BZh': 'compressed with bzip2. Unpack it first: bunzip2 FILE',
    b'\x89HDF': 'an HDF5 file, as Keras writes it. Only weights of PyTorch can be read',
    b'\x93NUMPY': 'an array of NumPy. Only weights of PyTorch can be read',
    b'<!': 'a web page. The download went wrong: open its address in a browser',
    b'<html': 'a web page. The download went wrong: open its address in a browser',
    b'version ': 'a pointer of Git LFS. Get the file itself: git lfs pull',
}
_SHOWN = 4  # names in a message


class _NumpyType:
    """Stands for ``numpy.dtype`` while a file is read: one type of numbers, whatever else the file would make of it."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code if re.fullmatch('[<>=|]?[fiub][1248]', code) else 'invalid')

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] in ('<', '>') else '=')


def _numpy_number(kind: _NumpyType, content: bytes) -> np.generic:
    return np.frombuffer(content, kind.dtype)[0]


# What a checkpoint may hold beside what `torch.load` knows: timm's saver stores the script's arguments, and scripts
# that measure with NumPy store its numbers.
_ALLOWED = [
    argparse.Namespace,
    (_NumpyType, 'numpy.dtype'),
    (_numpy_number, 'numpy.core.multiarray.scalar'),  # before NumPy 2.0
    (_numpy_number, 'numpy._core.multiarray.scalar'),
]


def read_checkpoint(path: str | Path) -> Any:
    """Everything that a file holds, on the CPU.

    Args:
        path: A safetensors file, or one written by ``torch.save``. The content decides which, not the name.

    Raises:
        CheckpointError: There is no such file, it is damaged or something else, or its pickle would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"No checkpoint at '{path}': the path is {'a folder' if path.is_dir() else 'not a file'}."
        )
    with path.open('rb') as file:
        start = file.read(9)
    try:
        if start[8:] == b'{':
            return load_file(path)
        if path.name.endswith('.index.json'):
            raise CheckpointError(
                f"'{path}' is the index of weights in several files. Join them first: "
                '{k: v for f in files for k, v in safetensors.torch.load_file(f).items()}, then save_file.'
            )
        return _read_pickle(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails with any error, depending on where it is damaged
        raise CheckpointError(_explain(path, start, error)) from error


def _read_pickle(path: Path) -> Any:
    check_file(path)
    with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of old formats and protocols
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    check_tensors(checkpoint, path)
    with path.open('rb') as file:
        if file.read(4) == b'PK\3\4':
            check_checksums(path)
    return checkpoint


def _explain(path: Path, start: bytes, error: Exception) -> str:
    """Why a file cannot be read, and what to do about it."""
    name = one_line(path.name)
    try:
        said = str(error)
    except Exception:  # of a KeyError whose key is a value of the file
        said = ''
    again = f"torch.save(torch.load('{name}', weights_only=False)['state_dict'], 'weights.pth')"
    refused = re.search(r'GLOBAL (\S+)|unrecognized function (.+)|[Cc]an only (.+)', said)
    if 'TorchScript' in said:
        return (
            f"'{path}' is a TorchScript program, not a checkpoint. Save its weights: "
            f"torch.save(torch.jit.load('{name}').state_dict(), 'weights.pth')"
        )
    if 'Unsupported operand' in said and start[:1] in (b'P', b'\x80'):
        return (
            f"'{path}' was written with a pickle protocol that PyTorch {torch.__version__} does not read safely. If "
            f'you trust its origin, save its weights again, which runs the code in it: {again}'
        )
    if refused:
        what = next(filter(None, refused.groups()))
        return (
            f"'{path}' was refused: it would import and could run {one_line(what)}. Checkpoints may hold tensors and "
            f'plain values only. If you trust its origin, save its state_dict alone, which runs the code in it: {again}'
        )
    if start.startswith(b'PK') and ('data.pkl' in said or 'subdirectory' in said):
        return (
            f"'{path}' is a zip archive, but not a checkpoint. Give an archive of a checkpoint to cluster-zoo import, "
            f"and save the weights of an exported program (.pt2): torch.save(torch.export.load('{name}').state_dict, "
            "'weights.pth')"
        )
    for magic, what in _OTHER_FILES.items():
        if start.startswith(magic):
            return f"'{path}' is {what}."
    found = re.search('Unpickler error: (.+)', said)
    reason = one_line(found[1] if found else said or type(error).__name__).partition('. ')[0]
    return f"'{path}' is truncated, damaged or not a checkpoint ({reason}). Get the file again."


def load_state_dict(path: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint file.

    Args:
        path: See `read_checkpoint`.
        use_ema: Take the averaged weights where the file has both. Without it the averaged ones are taken only where
            there are no others, as timm does.

    Returns:
        Tensors by name, on the CPU, without the prefixes of wrappers such as DistributedDataParallel and Lightning.

    Raises:
        CheckpointError: The file cannot be read, or has no weights.
    """
    return extract_state_dict(read_checkpoint(path), path, use_ema)


def extract_state_dict(checkpoint: Any, path: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """The weights among everything that `read_checkpoint` found in a file, see `load_state_dict`.

    Args:
        checkpoint: What the file holds.
        path: The file, for messages.
        use_ema: Prefer the averaged weights where there are both.
    """
    _, entries = _innermost(checkpoint, use_ema)
    if not entries:
        what = 'nothing' if isinstance(checkpoint, dict) else f'a {type(checkpoint).__name__}'
        raise CheckpointError(f"'{path}' holds no weights: expected tensors by name, found {what}.")
    others = [key for key, x in entries.items() if not (isinstance(key, str) and _is_plain(x))]
    others = [repr(key) if isinstance(key, (str, int)) else f'a {type(key).__name__}' for key in others]
    if others:
        named = _shown(others)
        raise CheckpointError(
            f"'{path}' holds no weights that can be told: {named} are no plain tensors, and there is none of the usual "
            f'entries ({", ".join(_KEYS[:4])}, ...). Save the state_dict alone.'
        )
    # Without the attributes that a file may give to a parameter, which could stand before its methods
    entries = {name: Tensor.detach(value) for name, value in entries.items() if not _NO_WEIGHTS.search(name)}
    while prefix := next((p for p in _PREFIXES if entries and all(name.startswith(p) for name in entries)), None):
        entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose numbers are all there: not sparse, nested or on the meta device."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_nested)


def _shown(names: list[str]) -> str:
    return one_line(', '.join(names[:_SHOWN])) + (', ...' if len(names) > _SHOWN else '')


def is_averaged(checkpoint: Any, use_ema: bool = False) -> bool:
    """Whether `extract_state_dict` takes averaged weights."""
    return not set(_EMA_KEYS).isdisjoint(_innermost(checkpoint, use_ema)[0])


def _innermost(checkpoint: Any, use_ema: bool) -> tuple[list[str], dict]:
    """The entry with the weights, which may lie in another as in a checkpoint of a whole task, and the keys to it."""
    order = (*_EMA_KEYS, *_KEYS) if use_ema else (*_KEYS, *_EMA_KEYS)
    path, entries = [], dict.copy(checkpoint) if isinstance(checkpoint, dict) else {}
    while len(path) < 3 and (found := [key for key in order if isinstance(entries.get(key), dict) and entries[key]]):
        path.append(found[0])
        entries = dict.copy(entries[found[0]])
    return path, entries


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
    expected = {name for name in own if name not in optional and not ignore(name)}
    found = {name for name in state_dict if name not in optional and not ignore(name)}
    common = [name for name in own if name in expected & found]
    shapes = {name: (list(state_dict[name].shape), list(own[name].shape)) for name in common}
    types = {name: (state_dict[name].dtype, own[name].dtype) for name in common}
    for label, names in (
        ('missing', [name for name in own if name in expected - found]),
        ('unknown to the model', sorted(found - expected)),
        ('of another shape', [f'{n}: {a} in the file, {b} in the model' for n, (a, b) in shapes.items() if a != b]),
        (
            'of another type',
            [f'{n}: {a} in the file, {b} in the model' for n, (a, b) in types.items()
             if b.is_floating_point and not (a.is_floating_point and a.itemsize > 1)],
        ),
    ):  # fmt: skip
        if names:
            differences.append(f'{len(names)} {label} ({_shown(names)})')
    name = type(model).__name__
    if differences:
        raise CheckpointError(
            f'The checkpoint does not fit this {name}: of {len(expected)} entries, ' + '; '.join(differences) + '.'
        )
    # As the model will hold them: a number may be too large for its type
    broken = [name for name in common if not bool(state_dict[name].to(own[name].dtype).isfinite().all())]
    if broken:
        raise CheckpointError(
            f'The checkpoint is broken: {len(broken)} entries hold NaN or infinity ({", ".join(broken[:_SHOWN])}).'
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


def load_checkpoint(model: nn.Module, path: str | Path, use_ema: bool = False) -> None:
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
    filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    own = model.state_dict()
    # Filters convert by names, which may be the model's own already
    if filter_fn and {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state_dict.items()}:
        state_dict = convert_state_dict(state_dict, model, filter_fn)
    check_fit(state_dict, model)
    model.load_state_dict(state_dict)


def convert_state_dict(
    state_dict: dict[str, Tensor], model: nn.Module, filter_fn: Callable[..., Any]
) -> dict[str, Tensor]:
    """A state dict through one of timm's filter functions, which convert names and shapes."""
    try:
        return filter_fn(dict(state_dict), model)
    except Exception as error:
        raise CheckpointError(
            f'The checkpoint does not fit this {type(model).__name__}: its entries have known names, but shapes that '
            f'cannot be converted ({one_line(error)}).'
        ) from error
