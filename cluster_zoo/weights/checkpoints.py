"""Reading untrusted checkpoint files of this package, of the authors, of timm and of other frameworks.

A checkpoint is safetensors, or a file for ``torch.load(weights_only=True)`` with a few more allowed classes. `scan`
refuses those that would still crash or exhaust the process. Every problem raises `CheckpointError`.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, one_line
from . import metadata
from .pickle_scan import check_checksums, check_file, check_tensors

__all__ = [
    'check_architecture',
    'check_fit',
    'convert_state_dict',
    'extract_state_dict',
    'load_checkpoint',
    'load_state_dict',
    'load_weights',
    'read_checkpoint',
    'training_metadata',
    'weights_in_use',
]

# Keys under which training scripts save the weights and their average, timm's first
_KEYS = ('state_dict', 'model', 'model_state', 'model_state_dict', 'net', 'network', 'params', 'weights', 'module')
_EMA_KEYS = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'params_ema', 'ema')
# Prefixes that DistributedDataParallel and SWA, torch.compile, Lightning and others add to all names
_PREFIXES = ('module.', '_orig_mod.', 'model.', 'net.')
_NO_WEIGHTS = re.compile(r'(^|\.)(total_ops|total_params)$|^n_averaged$')  # added by thop and SWA
_OTHER_FILES = {
    b'\x1f\x8b': 'compressed with gzip. Unpack it first: gunzip FILE',
    b'BZh': 'compressed with bzip2. Unpack it first: bunzip2 FILE',
    b'{': 'a JSON file, such as the index of weights in several files. Join these files first',
    b'<': 'a web page. The download failed: open its address in a browser',
    b'version ': 'a pointer of Git LFS. Download the file itself: git lfs pull',
}
_SHOWN = 4  # names in a message


class _NumpyType:
    """Replaces ``numpy.dtype`` while a file is read, and allows numbers only."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code if re.fullmatch('[<>=|]?[fiub][1248]', code) else 'invalid')

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] in ('<', '>') else '=')


def _numpy_number(kind: _NumpyType, content: bytes) -> np.generic:
    return np.frombuffer(content, kind.dtype)[0]


# Classes in addition to those of `torch.load`: timm saves the script's arguments, other scripts metrics from NumPy
_ALLOWED = [
    argparse.Namespace,
    (_NumpyType, 'numpy.dtype'),
    (_numpy_number, 'numpy.core.multiarray.scalar'),  # before NumPy 2.0
    (_numpy_number, 'numpy._core.multiarray.scalar'),
]


def read_checkpoint(path: str | Path) -> Any:
    """Reads the whole content of a checkpoint file, on the CPU.

    Args:
        path: A safetensors file or one written by ``torch.save``. The content determines the format, not the name.

    Raises:
        CheckpointError: The file does not exist, is damaged, is no checkpoint, or its pickle would run code.
    """
    path = Path(path)
    if not path.is_file():
        problem = 'is a folder' if path.is_dir() else 'is not a file' if path.exists() else 'does not exist'
        raise CheckpointError(f"No checkpoint at '{path}': it {problem}.")
    with path.open('rb') as file:
        start = file.read(9)
    try:
        if start[8:] == b'{':
            return load_file(path)
        check_file(path)
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about old formats and protocols
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        check_tensors(checkpoint, path)
        if start.startswith(b'PK\3\4'):
            check_checksums(path)
        return checkpoint
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise any error
        raise CheckpointError(f"'{path}' {_explain(path, start, error)}") from error


def _explain(path: Path, start: bytes, error: Exception) -> str:
    """Returns the reason why a file cannot be read, and the solution."""
    name = one_line(path.name)
    try:
        message = str(error)
    except Exception:  # a KeyError whose key is an object from the file
        message = ''
    if 'TorchScript' in message:
        weights = f"torch.save(torch.jit.load('{name}').state_dict(), 'weights.pth')"
        return f'is a TorchScript program, not a checkpoint. Save its weights: {weights}'
    code = re.search(r'GLOBAL (\S+)|unrecognized function (.+)|[Cc]an only (.+)', message)
    protocol = 'Unsupported operand' in message and start[:1] in (b'P', b'\x80')
    if protocol or code:
        reason = f'PyTorch {torch.__version__} cannot read its pickle protocol safely'
        if not protocol:
            reason = f'it would import and could run {one_line(next(filter(None, code.groups())))}'
        return (
            f'was refused: {reason}. If you trust its origin, save its state dict alone, which runs the code in the '
            f"file: torch.save(torch.load('{name}', weights_only=False)['state_dict'], 'weights.pth')"
        )
    if start.startswith(b'PK') and ('data.pkl' in message or 'subdirectory' in message):
        return (
            'is a zip archive, but not a checkpoint. Pass an archive of a checkpoint to cluster-zoo import. Save the '
            f"weights of an exported program (.pt2): torch.save(torch.export.load('{name}').state_dict, 'weights.pth')"
        )
    for magic, what in _OTHER_FILES.items():
        if start.startswith(magic):
            return f'is {what}.'
    found = re.search('Unpickler error: (.+)', message)
    reason = one_line(found[1] if found else message or type(error).__name__).partition('. ')[0]
    return f'is truncated, damaged or not a checkpoint ({reason}). Download the file again.'


def load_state_dict(path: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint file.

    Args:
        path: See `read_checkpoint`.
        use_ema: Prefer averaged weights. If False, they are used only if the file has no others, as in timm.

    Returns:
        Tensors by name, on the CPU, without the prefixes of wrappers such as DistributedDataParallel and Lightning.

    Raises:
        CheckpointError: The file cannot be read or contains no weights.
    """
    return extract_state_dict(read_checkpoint(path), path, use_ema)


def extract_state_dict(checkpoint: Any, path: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """Extracts the weights from the content of a file, see `load_state_dict`.

    Args:
        checkpoint: Result of `read_checkpoint`.
        path: The file, for error messages.
        use_ema: See `load_state_dict`.
    """
    _, entries = _find_weights(checkpoint, use_ema)
    if not entries:
        what = 'nothing' if isinstance(checkpoint, dict) else f'a {type(checkpoint).__name__}'
        raise CheckpointError(f"'{path}' contains no weights: expected tensors by name, found {what}.")
    others = [key for key, x in entries.items() if not (isinstance(key, str) and _is_plain(x))]
    if others:
        named = _shown([repr(key) if isinstance(key, (str, int)) else f'a {type(key).__name__}' for key in others])
        raise CheckpointError(
            f"'{path}' contains no state dict that can be identified: {named} are no plain tensors, and there is no "
            f'usual key ({", ".join(_KEYS[:4])}, ...). Save the state dict alone.'
        )
    # `detach` drops attributes that a file may set on a parameter, which could replace its methods
    entries = {name: Tensor.detach(value) for name, value in entries.items() if not _NO_WEIGHTS.search(name)}
    while prefix := next((p for p in _PREFIXES if entries and all(name.startswith(p) for name in entries)), None):
        entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries


def _is_plain(value: Any) -> bool:
    """Whether it is a dense tensor with data: not sparse, nested or on the meta device."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_nested)


def _shown(names: list[str]) -> str:
    return one_line(', '.join(names[:_SHOWN])) + (', ...' if len(names) > _SHOWN else '')


def weights_in_use(checkpoint: Any, use_ema: bool = False) -> str:
    """Returns which weights `extract_state_dict` returns, for the user, and how to get the others if there are any."""
    averaged = [not set(_EMA_KEYS).isdisjoint(_find_weights(checkpoint, ema)[0]) for ema in (use_ema, not use_ema)]
    taken, other = ('averaged over the updates' if ema else 'of the last update' for ema in averaged)
    if averaged[0] != averaged[1]:
        return f'{taken} (the file also has weights {other}: {"without " * use_ema}--use-ema)'
    return 'averaged over the updates, the only ones in the file' if averaged[0] else 'the only ones in the file'


def training_metadata(checkpoint: Any) -> dict[str, Any]:
    """Returns what the training scripts of this package and of timm store beside the weights.

    Returns:
        ``arch``, the architecture without tag if timm knows it, else None; ``args``, the options of the script;
        ``data_config``, the preparation of images; ``label_names``; ``held_out``, the names of the images that
        ``--val-fraction`` held out, with NUL between them. What the file does not have is empty. The values are
        untrusted.
    """
    saved = checkpoint if isinstance(checkpoint, dict) else {}
    args = saved.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    names = [name for name in (saved.get('arch'), args.get('model')) if isinstance(name, str) and timm.is_model(name)]
    data = saved.get('data_config')
    return dict(
        arch=names[0].partition('.')[0] if names else None,
        args=args,
        data_config=data if isinstance(data, dict) else {},
        label_names=saved.get('label_names') or [],
        held_out=saved.get('held_out') or '',
    )


def check_architecture(found: Any, expected: str, where: str) -> None:
    """Raises `CheckpointError` if a checkpoint names another architecture, even if its weights would fit.

    Args:
        found: Name in the checkpoint, or None.
        expected: Name of the model, with or without tag.
        where: Name of the file for the message.
    """
    if isinstance(found, str) and found.partition('.')[0] != expected.partition('.')[0]:
        raise CheckpointError(f'{where} was refused: its weights are of {one_line(found)}, which is not {expected}.')


def _find_weights(checkpoint: Any, use_ema: bool) -> tuple[list[str], dict]:
    """Returns the keys that lead to the weights, which may be nested up to three levels, and the weights."""
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
    """Checks that a state dict has the names, shapes and types of the model, and finite values.

    A module may have optional entries: it lists them in ``optional_entries``, and its ``check_optional(entries)``
    raises ValueError for values that it does not accept.

    Args:
        state_dict: Tensors with the model's names.
        model: The model.
        ignore: Function that selects names to skip.

    Raises:
        CheckpointError: The state dict does not fit.
    """
    own = model.state_dict()
    optional, differences = _check_optional(state_dict, model)
    expected = {name: own[name] for name in own if name not in optional and not ignore(name)}
    found = {name: state_dict[name] for name in state_dict if name not in optional and not ignore(name)}
    pairs = [(name, found[name], expected[name]) for name in expected if name in found]
    shapes = [(name, list(a.shape), list(b.shape)) for name, a, b in pairs if a.shape != b.shape]
    types = [
        (name, a.dtype, b.dtype)
        for name, a, b in pairs
        if b.is_floating_point() and not (a.is_floating_point() and a.itemsize > 1)
    ]
    problems = {
        'missing': [name for name in expected if name not in found],
        'unknown to the model': sorted(found.keys() - expected.keys()),
        'of another shape': [f'{name}: {a} in the file, {b} in the model' for name, a, b in shapes],
        'of another type': [f'{name}: {a} in the file, {b} in the model' for name, a, b in types],
    }
    differences += [f'{len(names)} {label} ({_shown(names)})' for label, names in problems.items() if names]
    if differences:
        raise CheckpointError(
            f'The checkpoint does not fit this {type(model).__name__}: of {len(expected)} entries, '
            f'{"; ".join(differences)}.'
        )
    # After conversion to the model's type, because a value may be too large for it
    broken = [name for name, a, b in pairs if not bool(a.to(b.dtype).isfinite().all())]
    if broken:
        raise CheckpointError(
            f'The checkpoint is broken: {len(broken)} entries with NaN or infinity ({_shown(broken)}).'
        )


def _check_optional(state_dict: dict[str, Tensor], model: nn.Module) -> tuple[set[str], list[str]]:
    """Returns the names of the model's optional entries and the problems of those in the state dict."""
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
    """Loads a checkpoint file of the authors, of timm or of this package into a model that it fits completely.

    The ``checkpoint_filter_fn`` of the module that defines the model converts the names, as in timm.

    Args:
        model: Any timm model.
        path: See `load_state_dict`.
        use_ema: See `load_state_dict`.

    Raises:
        CheckpointError: The file cannot be read, does not fit, or names another model of this package. The model is
            unchanged.
    """
    checkpoint = read_checkpoint(path)
    found, expected = training_metadata(checkpoint)['arch'], getattr(model, 'pretrained_cfg', {}).get('architecture')
    if found and expected and metadata.is_ours(found):
        check_architecture(found, expected, f"'{path}'")
    load_weights(model, extract_state_dict(checkpoint, path, use_ema))


def load_weights(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Loads a state dict, which may have the authors' names, see `load_checkpoint`.

    Raises:
        CheckpointError: The state dict does not fit. The model is unchanged.
    """
    filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    own = {name: value.shape for name, value in model.state_dict().items()}
    # A filter may misinterpret names that already are the model's
    if filter_fn and own != {name: value.shape for name, value in state_dict.items()}:
        state_dict = convert_state_dict(state_dict, model, filter_fn)
    check_fit(state_dict, model)
    model.load_state_dict(state_dict)


def convert_state_dict(
    state_dict: dict[str, Tensor], model: nn.Module, filter_fn: Callable[..., Any]
) -> dict[str, Tensor]:
    """Applies one of timm's filter functions, which convert names and shapes.

    Raises:
        CheckpointError: The names are known, but the shapes cannot be converted.
    """
    try:
        return filter_fn(dict(state_dict), model)
    except Exception as error:
        raise CheckpointError(
            f'The checkpoint does not fit this {type(model).__name__}: its entries have known names, but shapes that '
            f'cannot be converted ({one_line(error)}).'
        ) from error
