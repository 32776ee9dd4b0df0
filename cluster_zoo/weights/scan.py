"""What ``torch.load(weights_only=True)`` does not protect from: small files that crash the process or exhaust it.

``weights_only`` makes sure that no code runs. It does build whatever the pickle describes: tuples that are nested until
hashing them overflows the stack, keys whose hashes all collide, zip entries that grow a thousand times. This module
looks at a file's instructions and sizes before they are executed, and at the tensors afterwards.
"""

import pickletools
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import CheckpointError

__all__ = ['check_checksums', 'check_file', 'check_tensors']

_MAX_INSTRUCTIONS = 5_000_000  # some 200,000 tensors
_MAX_DEPTH = 200  # of values inside of each other
_MAX_ODD_KEYS = 10_000  # keys whose hash a file can choose: large integers, floats, complex numbers, tuples
_MAX_SAFE_INTEGER = 2**31  # its hash is itself, so that such keys do not collide
_MAX_VALUES = 5_000_000
_LEGACY_PICKLES = 5  # magic number, version, system, the object, keys of the storages: files before PyTorch 1.6

_IN_PLACE = ('APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD')  # change the value below the others
_PUTS = ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE')
_GETS = ('GET', 'BINGET', 'LONG_BINGET')
_HASHING = ('builtins set', '__builtin__ set', 'collections Counter', 'collections OrderedDict')


def check_file(path: Path) -> None:
    """Raise unless a file that ``torch.save`` wrote is safe to give to ``torch.load``.

    Args:
        path: A zip file as PyTorch writes it, or a file of the format before PyTorch 1.6.

    Raises:
        CheckpointError: It would crash or exhaust the process. The message says how.
        Exception: It is not such a file: whatever the reader raises for it.
    """
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
                _check_program(program)
        except _Refused as error:
            raise CheckpointError(f"'{path}' was refused: {error}, as no checkpoint does.") from error


class _Refused(Exception):
    """What a pickle does that no checkpoint does."""


class _Value:
    """What is known of a value on the pickle machine's stack.

    Attributes:
        depth: Containers inside of each other.
        odd: Keys of hashes that a file can choose, if this value is a key or its items become keys.
        name: 'integer' for an integer or a tuple of one, or the imported name.
    """

    __slots__ = ('depth', 'name', 'odd')

    def __init__(self, depth: int = 0, odd: int = 0, name: str = ''):
        self.depth, self.odd, self.name = depth, odd, name


def _check_program(program: bytes | IO[bytes]) -> None:
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
            odd_keys += _hashed(name, taken)
            if odd_keys > _MAX_ODD_KEYS:
                raise _Refused(f'it has more than {_MAX_ODD_KEYS} keys that are not text or small integers')
            stack += [_result(name, argument, taken)] * len(opcode.stack_after)


def _take(stack: list, opcode: pickletools.OpcodeInfo) -> list[_Value]:
    """Remove from the stack what an instruction uses."""
    before = opcode.stack_before
    start = len(stack) - len(before)
    if pickletools.markobject in before:
        start = len(stack) - 1 - stack[::-1].index(None) - before.index(pickletools.markobject)
    if start < 0:
        raise ValueError('the stack of the pickle runs empty')
    taken = [value for value in stack[start:] if value is not None]
    del stack[start:]
    return taken


def _hashed(name: str, taken: list[_Value]) -> int:
    """How many keys of chosen hashes an instruction puts into a dictionary or a set."""
    if name in ('SETITEM', 'SETITEMS'):
        return sum(key.odd for key in taken[1::2])
    if name in ('ADDITEMS', 'FROZENSET', 'DICT'):
        return sum(value.odd for value in taken)
    if name in ('REDUCE', 'NEWOBJ'):
        function, arguments = taken[0], taken[1]
        if function.name in ('builtins bytearray', '__builtin__ bytearray') and arguments.name == 'integer':
            raise _Refused('it makes a bytearray of a size that it names')
        return arguments.odd if function.name in _HASHING else 0
    return 0


def _result(name: str, argument: Any, taken: list[_Value]) -> _Value:
    """What an instruction leaves on the stack."""
    depth = 1 + max((value.depth for value in taken), default=-1)
    if depth > _MAX_DEPTH:
        raise _Refused(f'its values are nested more than {_MAX_DEPTH} deep')
    odd = sum(value.odd for value in taken)
    if name in _IN_PLACE:
        changed = taken[0]
        changed.depth = max([changed.depth, *(1 + value.depth for value in taken[1:])])
        changed.odd = odd
        return changed
    if name == 'GLOBAL':
        return _Value(name=argument)
    if type(argument) is int:
        return _Value(odd=abs(argument) >= _MAX_SAFE_INTEGER, name='integer')
    if isinstance(argument, float):
        return _Value(odd=1)
    if name.startswith('TUPLE'):
        return _Value(depth, max(1, odd), 'integer' if any(value.name == 'integer' for value in taken) else '')
    return _Value(depth, max(odd, name in ('REDUCE', 'NEWOBJ')))


def check_checksums(path: Path) -> None:
    """Raise if the CRC-32 of an entry of a zip file is wrong: PyTorch does not look at them.

    Raises:
        CheckpointError: The content of an entry is damaged. The message names it.
    """
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
    """Raise if the tensors of a loaded file have more numbers than the file.

    Args:
        value: What ``torch.load`` made of the file.
        path: The file.

    Raises:
        CheckpointError: A tensor is larger than its storage, or the storages are larger than the file.
    """
    pending, seen, storages = [value], set(), {}
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_meta:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                if value.numel() * value.element_size() > storage.nbytes():
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
