"""Checks for untrusted checkpoints that ``torch.load(weights_only=True)`` does not make.

``weights_only`` ensures that no code runs, but it builds any object that the pickle describes. A small file can still
crash or exhaust the process: with tuples nested so deeply that hashing them overflows the stack, with dictionary keys
whose hashes all collide, or with zip entries that unpack to a thousand times their size. This module checks the pickle
instructions and the sizes of the entries before a file is loaded, and the tensors afterwards.
"""

import math
import pickletools
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = ['check_checksums', 'check_file', 'check_tensors']

_MAX_INSTRUCTIONS = 2_000_000  # enough for 80,000 tensors
_MAX_DEPTH = 200  # of nested values
_MAX_UNSAFE_KEYS = 10_000  # keys whose hashes a file can choose: large integers, floats, complex numbers, tuples
_MAX_SAFE_INTEGER = 2**31  # smaller integers are their own hashes and cannot collide
_MAX_VALUES = 5_000_000
_LEGACY_PICKLES = 5  # in files from before PyTorch 1.6: magic number, version, system, content, storage keys

_IN_PLACE = ('APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD')  # modify the first value they take
_PUTS = ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE')
_GETS = ('GET', 'BINGET', 'LONG_BINGET')
_CALLS = ('REDUCE', 'NEWOBJ')
_LATIN = ('latin1', 'latin-1')  # the codec of pickled bytes; others can be slow or expand the text


def check_file(path: Path) -> None:
    """Raises `CheckpointError` unless a file written by ``torch.save`` is safe to pass to ``torch.load``."""
    with path.open('rb') as file:
        if file.read(4) == b'PK\3\4':
            # PyTorch's reader, because another reader may find other entries in the same file
            reader = torch._C.PyTorchFileReader(str(path))
            if hasattr(reader, 'get_record_size'):  # missing in PyTorch 2.11
                size = sum(reader.get_record_size(name) for name in reader.get_all_records())
            else:
                with zipfile.ZipFile(path) as archive:
                    size = sum(entry.file_size for entry in archive.infolist())
            if size > path.stat().st_size:
                raise CheckpointError(
                    f"'{path}' was refused: its entries are compressed or overlap, and take {size} bytes. torch.save "
                    'never writes such a file; pack it again without compression (zip -0).'
                )
            pickles: Iterable[Any] = [reader.get_record('data.pkl')]
        else:
            file.seek(0)
            pickles = [file] * _LEGACY_PICKLES
        try:
            for pickle in pickles:
                _check_pickle(pickle, path.stat().st_size)
        except _Refused as error:
            raise CheckpointError(f"'{path}' was refused: {error}, which no checkpoint does.") from error


class _Refused(Exception):
    """A pickle does something that no checkpoint does."""


class _Value:
    """A value on the stack of the pickle machine.

    Attributes:
        kind: Name of the instruction that created it.
        content: A number, a text, the name of an import, or the list of values in a tuple.
        depth: Number of nested containers.
        unsafe: Number of unsafe keys if the value, or each of its items, becomes a key.
        owners: Number of values that contain it. Once contained, it must not change, because the attributes of its
            owners would not be updated.
    """

    __slots__ = ('content', 'depth', 'kind', 'owners', 'unsafe')

    def __init__(self, kind: str, content: Any = None, depth: int = 0, unsafe: int = 0):
        self.kind, self.content, self.depth, self.unsafe, self.owners = kind, content, depth, unsafe, 0

    def is_tuple(self) -> bool:
        return 'TUPLE' in self.kind

    def is_plain_tuple(self) -> bool:
        """Whether it is a tuple that directly contains no tensors or other objects."""
        return self.is_tuple() and not any(item.kind in (*_CALLS, 'BINPERSID') for item in self.content)

    def is_bytes(self) -> bool:
        """Whether it is bytes, which older protocols create by calling ``_codecs.encode``."""
        return 'BYTES' in self.kind or (self.kind == 'REDUCE' and str(self.content[0].content).endswith(' encode'))


def _check_pickle(pickle: bytes | IO[bytes], file_size: int) -> None:
    """Simulates the instructions of one pickle without executing them."""
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    unsafe_keys = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        if count > _MAX_INSTRUCTIONS:
            raise _Refused(f'it has more than {_MAX_INSTRUCTIONS} instructions')
        name = opcode.name
        if name in _PUTS:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == 'MARK':
            stack.append(None)
        else:
            taken = _pop(stack, opcode)
            unsafe_keys += _check_instruction(name, taken, file_size)
            if unsafe_keys > _MAX_UNSAFE_KEYS:
                raise _Refused(f'it has more than {_MAX_UNSAFE_KEYS} keys that are not text or small integers')
            stack += [_result(name, argument, taken)] * len(opcode.stack_after)


def _pop(stack: list, opcode: pickletools.OpcodeInfo) -> list[_Value]:
    """Removes the values that an instruction takes from the stack."""
    before = opcode.stack_before
    start = len(stack) - len(before)
    if pickletools.markobject in before:
        mark = next(i for i in reversed(range(len(stack))) if stack[i] is None)
        start = mark - before.index(pickletools.markobject)
    if start < 0:
        raise ValueError('the stack of the pickle is empty')
    taken = [value for value in stack[start:] if value is not None]
    del stack[start:]
    return taken


def _check_instruction(name: str, taken: list[_Value], file_size: int) -> int:
    """Refuses dangerous instructions. Returns the number of unsafe keys added to a dictionary or a set."""
    if name in ('SETITEM', 'SETITEMS'):
        return sum(key.unsafe for key in taken[1::2])
    if name == 'BUILD':
        target, state = taken
        function = str(target.content[0].content) if target.kind in _CALLS else ''
        if function.startswith('torch') and not (state.kind == 'EMPTY_DICT' or state.is_plain_tuple()):
            raise _Refused('it changes a tensor')
        if state.owners:
            raise _Refused('it copies a value')
    if name in ('ADDITEMS', 'BUILD'):
        return sum(value.unsafe for value in taken[1:])
    if name == 'BINPERSID' and taken[0].is_tuple():
        _check_shape(taken[0].content[4:5], file_size)
    return _check_call(*taken, file_size) if name in _CALLS else 0


def _check_call(function: _Value, arguments: _Value, file_size: int) -> int:
    """Refuses calls that enlarge their arguments or iterate over a tensor. Returns the number of unsafe keys."""
    if not arguments.is_tuple():
        raise _Refused('it calls a function with other arguments than a tuple')
    items = arguments.content
    name = function.content.split()[-1] if function.kind == 'GLOBAL' else ''
    if name == '_rebuild_from_type_v2' and len(items) > 2:  # calls its first argument with the third
        return _check_call(items[0], items[2], file_size)
    if name.startswith(('_rebuild_tensor', '_rebuild_qtensor')):
        _check_shape(items[2].content if len(items) > 2 and items[2].is_tuple() else [arguments], file_size)
    if name.startswith('_rebuild_device') or (name in ('Tensor', 'UntypedStorage', 'TypedStorage') and items):
        raise _Refused(f'it makes tensors with {name}')
    if name in ('encode', 'bytearray'):
        if items and items[-1].content not in _LATIN and not (name == 'bytearray' and items[-1].is_bytes()):
            raise _Refused(f'it calls {name} for something else than bytes')
    elif name in ('set', 'Counter', 'OrderedDict', 'Size'):
        if not arguments.is_plain_tuple():
            raise _Refused(f'it makes a {name} of a tensor')
    else:
        return 0
    if arguments.owners or any(item.owners > 1 for item in items[:1]):
        raise _Refused('it copies a value')
    return arguments.unsafe if name in ('set', 'Counter', 'OrderedDict') else 0


def _check_shape(shape: list[_Value], file_size: int) -> None:
    sides = [side.content for side in shape[:_MAX_DEPTH] if type(side.content) is int]
    if len(sides) < len(shape) or math.prod(sides) > file_size:
        raise _Refused('it has a tensor of more numbers than the file has bytes')


def _result(name: str, argument: Any, taken: list[_Value]) -> _Value:
    """Returns the value that an instruction pushes onto the stack."""
    if not taken:
        unsafe = type(argument) is float or (type(argument) is int and abs(argument) >= _MAX_SAFE_INTEGER)
        return _Value(name, taken if 'TUPLE' in name else argument, 0, unsafe)
    depth = 1 + max(value.depth for value in taken)
    if depth > _MAX_DEPTH:
        raise _Refused(f'its values are nested more than {_MAX_DEPTH} deep')
    unsafe = sum(value.unsafe for value in taken)
    if name not in _IN_PLACE:
        changed = None
    else:
        changed, *taken = taken
        if changed.owners:
            raise _Refused('it changes a value that is inside of another')
        changed.depth = max([changed.depth, *(1 + value.depth for value in taken)])
        changed.unsafe = unsafe
    for value in taken:
        value.owners += 1
    return changed or _Value(name, taken, depth, max(1, unsafe) if 'TUPLE' in name or name in _CALLS else unsafe)


def check_checksums(path: Path) -> None:
    """Raises `CheckpointError` if the CRC-32 of a zip entry is wrong, which PyTorch does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                # A CRC of 0 means that there is none, see torch.serialization.set_crc32_options
                if entry.CRC and entry.compress_type == zipfile.ZIP_STORED:
                    with archive.open(entry) as content:
                        while content.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}. Download the file again.") from error


def check_tensors(value: Any, path: Path) -> None:
    """Raises `CheckpointError` if the tensors of a loaded file are larger than their storages or than the file."""
    pending, seen, storages = [value], set(), {}
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_meta:
                # Methods of Tensor, because a file may replace those of a parameter
                storage = Tensor.untyped_storage(value)
                storages[storage.data_ptr()] = storage.nbytes()
                if Tensor.numel(value) * Tensor.element_size(value) > storage.nbytes():
                    raise CheckpointError(
                        f"'{path}' was refused: a tensor of shape {list(value.shape)} is larger than its storage."
                    )
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                pending += dict.values(value)
            elif isinstance(value, (list, tuple, set)):
                pending += value
            elif isinstance(value, Namespace):
                pending += vars(value).values()
        if len(seen) > _MAX_VALUES:
            raise CheckpointError(f"'{path}' was refused: it holds more than {_MAX_VALUES} values.")
    if sum(storages.values()) > path.stat().st_size:
        raise CheckpointError(f"'{path}' was refused: its tensors are larger than the file.")
