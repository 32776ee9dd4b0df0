"""What ``torch.load(weights_only=True)`` does not protect from: small files that crash the process or exhaust it.

``weights_only`` makes sure that no code runs. It does build whatever the pickle describes: tuples that are nested until
hashing them overflows the stack, keys whose hashes all collide, zip entries that grow a thousand times. This module
looks at a file's instructions and sizes before they are executed, and at the tensors afterwards.
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

_MAX_INSTRUCTIONS = 2_000_000  # some 80,000 tensors
_MAX_DEPTH = 200  # of values inside of each other
_MAX_ODD_KEYS = 10_000  # keys whose hash a file can choose: large integers, floats, complex numbers, tuples
_MAX_SAFE_INTEGER = 2**31  # its hash is itself, so that such keys do not collide
_MAX_VALUES = 5_000_000
_LEGACY_PICKLES = 5  # magic number, version, system, the object, keys of the storages: files before PyTorch 1.6

_IN_PLACE = ('APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD')  # change the value below the others
_PUTS = ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE')
_GETS = ('GET', 'BINGET', 'LONG_BINGET')
_CALLS = ('REDUCE', 'NEWOBJ')
_LATIN = ('latin1', 'latin-1')  # as pickles spell bytes; another codec may take its time or grow the text


def check_file(path: Path) -> None:
    """Raise unless a file that ``torch.save`` wrote is safe to give to ``torch.load``."""
    with path.open('rb') as file:
        if file.read(4) == b'PK\3\4':
            # With PyTorch's own reader, because other readers may find other entries in the same file.
            reader = torch._C.PyTorchFileReader(str(path))
            if hasattr(reader, 'get_record_size'):  # PyTorch 2.11 lacks it
                size = sum(reader.get_record_size(name) for name in reader.get_all_records())
            else:
                with zipfile.ZipFile(path) as archive:
                    size = sum(entry.file_size for entry in archive.infolist())
            if size > path.stat().st_size:
                raise CheckpointError(
                    f"'{path}' was refused: its entries are compressed or overlap, and take {size} bytes. torch.save "
                    'never writes such a file; pack it again without compression (zip -0).'
                )
            programs: Iterable[Any] = [reader.get_record('data.pkl')]
        else:
            file.seek(0)
            programs = [file] * _LEGACY_PICKLES
        try:
            for program in programs:
                _check_program(program, path.stat().st_size)
        except _Refused as error:
            raise CheckpointError(f"'{path}' was refused: {error}, as no checkpoint does.") from error


class _Refused(Exception):
    """What a pickle does that no checkpoint does."""


class _Value:
    """What is known of a value on the pickle machine's stack.

    Attributes:
        kind: The instruction that made it.
        content: A number, a text, an imported name, or the values in a tuple.
        depth: Containers inside of each other.
        odd: Keys of hashes that a file can choose, if this value is a key or its items become keys.
        held: How many other values have it inside. What is known of these would not follow a change.
    """

    __slots__ = ('content', 'depth', 'held', 'kind', 'odd')

    def __init__(self, kind: str, content: Any = None, depth: int = 0, odd: int = 0):
        self.kind, self.content, self.depth, self.odd, self.held = kind, content, depth, odd, 0


def _check_program(program: bytes | IO[bytes], size: int) -> None:
    """Follow the instructions of one pickle without executing them."""
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    odd_keys = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
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
            taken = _take(stack, opcode)
            odd_keys += _hashed(name, taken, size)
            if odd_keys > _MAX_ODD_KEYS:
                raise _Refused(f'it has more than {_MAX_ODD_KEYS} keys that are not text or small integers')
            stack += [_result(name, argument, taken)] * len(opcode.stack_after)


def _take(stack: list, opcode: pickletools.OpcodeInfo) -> list[_Value]:
    """Remove from the stack what an instruction uses."""
    before = opcode.stack_before
    start = len(stack) - len(before)
    if pickletools.markobject in before:
        mark = next(i for i in reversed(range(len(stack))) if stack[i] is None)
        start = mark - before.index(pickletools.markobject)
    if start < 0:
        raise ValueError('the stack of the pickle runs empty')
    taken = [value for value in stack[start:] if value is not None]
    del stack[start:]
    return taken


def _hashed(name: str, taken: list[_Value], size: int) -> int:
    """How many keys of chosen hashes an instruction puts into a dictionary or a set, if it may be executed."""
    if name in ('SETITEM', 'SETITEMS'):
        return sum(key.odd for key in taken[1::2])
    if name == 'BUILD':
        target, state = taken
        made_by = str(target.content[0].content) if target.kind in _CALLS else ''
        if made_by.startswith('torch') and not (state.kind == 'EMPTY_DICT' or _is_plain(state)):
            raise _Refused('it changes a tensor')
        if state.held:
            raise _Refused('it copies a value')
    if name in ('ADDITEMS', 'BUILD'):
        return sum(value.odd for value in taken[1:])
    if name == 'BINPERSID' and 'TUPLE' in taken[0].kind:
        _check_numbers(taken[0].content[4:5], size)
    return _hashed_by_call(*taken, size) if name in _CALLS else 0


def _hashed_by_call(function: _Value, arguments: _Value, size: int) -> int:
    """Likewise for a call. It may not make more of its arguments than the file has, or take a tensor apart."""
    if 'TUPLE' not in arguments.kind:
        raise _Refused('it calls a function with other arguments than a tuple')
    items = arguments.content
    name = function.content.split()[-1] if function.kind == 'GLOBAL' else ''
    if name == '_rebuild_from_type_v2' and len(items) > 2:  # which calls the first with the third
        return _hashed_by_call(items[0], items[2], size)
    if name.startswith(('_rebuild_tensor', '_rebuild_qtensor')):
        _check_numbers(items[2].content if len(items) > 2 and 'TUPLE' in items[2].kind else [arguments], size)
    if name.startswith('_rebuild_device') or (name in ('Tensor', 'UntypedStorage', 'TypedStorage') and items):
        raise _Refused(f'it makes tensors with {name}')
    if name in ('encode', 'bytearray'):
        if items and items[-1].content not in _LATIN and not (name == 'bytearray' and _is_bytes(items[-1])):
            raise _Refused(f'it calls {name} for something else than bytes')
    elif name in ('set', 'Counter', 'OrderedDict', 'Size'):
        if not _is_plain(arguments):
            raise _Refused(f'it makes a {name} of a tensor')
    else:
        return 0
    if arguments.held or any(item.held > 1 for item in items[:1]):
        raise _Refused('it copies a value')
    return arguments.odd if name in ('set', 'Counter', 'OrderedDict') else 0


def _is_bytes(value: _Value) -> bool:
    """Whether it is the result of ``_codecs.encode``, or the bytes of later protocols."""
    return 'BYTES' in value.kind or (value.kind == 'REDUCE' and str(value.content[0].content).endswith(' encode'))


def _is_plain(value: _Value) -> bool:
    """Whether it is a tuple without tensors and other objects directly inside."""
    return 'TUPLE' in value.kind and not any(item.kind in (*_CALLS, 'BINPERSID') for item in value.content)


def _check_numbers(shape: list[_Value], size: int) -> None:
    sides = [side.content for side in shape[:_MAX_DEPTH] if type(side.content) is int]
    if len(sides) < len(shape) or math.prod(sides) > size:
        raise _Refused('it has a tensor of more numbers than the file has bytes')


def _result(name: str, argument: Any, taken: list[_Value]) -> _Value:
    """What an instruction leaves on the stack."""
    if not taken:
        odd = type(argument) is float or (type(argument) is int and abs(argument) >= _MAX_SAFE_INTEGER)
        return _Value(name, taken if 'TUPLE' in name else argument, 0, odd)
    depth = 1 + max(value.depth for value in taken)
    if depth > _MAX_DEPTH:
        raise _Refused(f'its values are nested more than {_MAX_DEPTH} deep')
    odd = sum(value.odd for value in taken)
    if name in _IN_PLACE:
        changed = taken[0]
        if changed.held:
            raise _Refused('it changes a value that is inside of another')
        changed.depth = max([changed.depth, *(1 + value.depth for value in taken[1:])])
        changed.odd = odd
        taken = taken[1:]
    for value in taken:
        value.held += 1
    if name in _IN_PLACE:
        return changed
    return _Value(name, taken, depth, max(1, odd) if 'TUPLE' in name or name in _CALLS else odd)


def check_checksums(path: Path) -> None:
    """Raise if the CRC-32 of an entry of a zip file is wrong: PyTorch does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                # 0 stands for no checksum, see torch.serialization.set_crc32_options
                if entry.CRC and entry.compress_type == zipfile.ZIP_STORED:
                    with archive.open(entry) as content:
                        while content.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}. Get the file again.") from error


def check_tensors(value: Any, path: Path) -> None:
    """Raise if the tensors of a loaded file have more numbers than the file."""
    pending, seen, storages = [value], set(), {}
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_meta:
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
        raise CheckpointError(
            f"'{path}' was refused: its tensors take {sum(storages.values())} bytes, more than it has."
        )
