"""What the pickle of a checkpoint would do, found out without doing it.

A pickle is a program for a small stack machine. ``torch.load(weights_only=True)`` calls only functions that it knows,
but with whatever arguments the file gives: ``bytearray(10**12)``, a tensor of 10**12 numbers on a storage of one, keys
that nest until hashing them overflows the stack. Here the program runs on descriptions: a storage is its size, a tensor
is the check that it lies within its storage, and the functions are a handful.
"""

import math
import mmap
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .archives import check_archive
from .errors import CheckpointError, damaged, one_line

_MAX_INSTRUCTIONS = 2_000_000  # some 90,000 tensors
_MAX_PICKLE = 64 * 2**20
_MAX_VALUES = 2_000_000  # where a value counts as often as it is referred to
_MAX_DEPTH = 64
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # files that torch.save wrote before PyTorch 1.6
_LEGACY_VERSION = 1001

_STORAGES = {
    'torch DoubleStorage': 8,
    'torch FloatStorage': 4,
    'torch HalfStorage': 2,
    'torch BFloat16Storage': 2,
    'torch LongStorage': 8,
    'torch IntStorage': 4,
    'torch ShortStorage': 2,
    'torch CharStorage': 1,
    'torch ByteStorage': 1,
    'torch BoolStorage': 1,
    'torch ComplexFloatStorage': 8,
    'torch ComplexDoubleStorage': 16,
}
_DTYPES = frozenset(
    f'torch {name}'
    for name in (
        *('float64', 'float32', 'float16', 'bfloat16', 'complex64', 'complex128'),
        *('int64', 'int32', 'int16', 'int8', 'uint8', 'bool'),
    )
)
_NUMPY_DTYPES = {
    'f8': 8,
    'f4': 4,
    'f2': 2,
    'i8': 8,
    'i4': 4,
    'i2': 2,
    'i1': 1,
    'u8': 8,
    'u4': 4,
    'u2': 2,
    'u1': 1,
    'b1': 1,
}


class _Refused(Exception):
    """The program does what no checkpoint needs to do."""


@dataclass(frozen=True)
class _Name:
    """A global that the program names: a type of storage or number, or a function to be called."""

    name: str


@dataclass(frozen=True)
class _Storage:
    numel: int


@dataclass(frozen=True)
class _Plain:
    """An object without parts, such as a tensor or a number of NumPy's."""

    kind: str
    size: int = 0  # bytes


@dataclass
class _Namespace:
    values: dict[str, Any] = field(default_factory=dict)


class _OrderedDict(dict):
    metadata: Any = None


def check_pickled(path: str | Path) -> None:
    """Raise unless ``torch.load`` can read a file without running anything, in memory in proportion to the file's size.

    A checkpoint may hold tensors, dictionaries, lists, tuples, text, numbers (Python's or NumPy's), ``OrderedDict``,
    ``torch.dtype``, ``torch.device``, ``torch.Size``, and an ``argparse.Namespace`` of such values: timm's saver keeps
    the script's arguments in one.

    Args:
        path: A file that ``torch.save`` wrote, as a zip or as before PyTorch 1.6.

    Raises:
        CheckpointError: It is damaged or would do anything else. The message says what.
    """
    path = Path(path)
    try:
        with path.open('rb') as file:
            zipped = file.read(4) == b'PK\3\4'
        _check_zip(path) if zipped else _check_legacy(path)
    except _Refused as error:
        raise CheckpointError(
            f"'{path}' was refused: {one_line(str(error))}. Checkpoints may hold tensors and plain values only. "
            'If you trust its origin, save its state_dict alone and load that.'
        ) from error
    except (ValueError, IndexError, KeyError) as error:  # not a pickle, or one whose stack or memo runs empty
        raise damaged(path, 'a checkpoint') from error


def _check_zip(path: Path) -> None:
    places = check_archive(path)
    position, size = places['data.pkl']
    if size > _MAX_PICKLE:
        raise _Refused(f'its description of the tensors takes {size} bytes')
    with path.open('rb') as file:
        file.seek(position)
        program = file.read(size)

    def storage(type_name: Any, key: Any, location: Any, numel: Any) -> _Storage:
        size = _storage_bytes(type_name, key, location, numel)
        if f'data/{key}' not in places or places[f'data/{key}'][1] != size:
            raise _Refused(f'it describes {size} bytes of numbers as entry data/{key}, which is not so')
        return _Storage(numel)

    _check_nesting(_run(pickletools.genops(program), storage))


def _check_legacy(path: Path) -> None:
    """Magic number, version, facts about the machine, the object, the storages' keys, each storage with its size."""
    if not path.stat().st_size:
        raise ValueError('the file is empty')
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        sizes: dict[str, tuple[int, int]] = {}

        def storage(type_name: Any, key: Any, location: Any, numel: Any, view: Any) -> _Storage:
            size = _storage_bytes(type_name, key, location, numel)
            if view is not None or sizes.setdefault(key, (numel, size)) != (numel, size):
                raise _Refused(f'it describes the storage {key} in two ways')
            return _Storage(numel)

        run = partial(_run, storage=None)
        if run(pickletools.genops(content)) != _LEGACY_MAGIC or run(pickletools.genops(content)) != _LEGACY_VERSION:
            raise ValueError('not a checkpoint')
        _check_nesting(run(pickletools.genops(content)))
        result = _run(pickletools.genops(content), storage)
        _check_nesting(result)
        keys = run(pickletools.genops(content))
        if not isinstance(keys, list) or {*map(type, keys)} - {str} or sorted(keys) != sorted(sizes):
            raise _Refused('its list of storages is not what its tensors need')
        position = content.tell()
        for key in keys:
            numel, size = sizes[key]
            if int.from_bytes(content[position : position + 8], 'little', signed=True) != numel:
                raise _Refused(f'it describes {size} bytes of numbers as storage {key}, which is not so')
            position += 8 + size
        if position > len(content):
            raise ValueError('truncated')


def _storage_bytes(type_name: Any, key: Any, location: Any, numel: Any) -> int:
    if not isinstance(type_name, _Name) or type_name.name not in _STORAGES:
        raise _Refused('it describes numbers of an unknown type')
    if not isinstance(key, str) or not isinstance(location, str) or not _is_size(numel):
        raise _Refused('it describes its numbers in an unknown way')
    return numel * _STORAGES[type_name.name]


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


# The functions that a checkpoint may call, as checks of their arguments


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any) -> _Plain:
    """A tensor may not go beyond its storage, which would be read or made larger, nor have more numbers than it."""
    described = isinstance(storage, _Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
    if not (described and len(size) == len(stride) <= _MAX_DEPTH and all(map(_is_size, (offset, *size, *stride)))):
        raise _Refused('it describes a tensor in an unknown way')
    if type(requires_grad) is not bool or hooks:
        raise _Refused('it describes a tensor with functions that run in the backward pass')
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if numel > storage.numel or (numel and last >= storage.numel):
        raise _Refused(f'it describes a tensor of {numel} numbers, more than the {storage.numel} that are there for it')
    return _Plain('tensor')


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> _Plain:
    if tensor != _Plain('tensor') or type(requires_grad) is not bool or hooks:
        raise _Refused('it describes a parameter in an unknown way')
    return tensor


def _ordered_dict() -> _OrderedDict:
    return _OrderedDict()


def _size(dimensions: Any) -> _Plain:
    if not isinstance(dimensions, tuple) or len(dimensions) > _MAX_DEPTH or not all(map(_is_size, dimensions)):
        raise _Refused('it describes a torch.Size in an unknown way')
    return _Plain('size')


def _device(*arguments: Any) -> _Plain:
    if [type(argument) for argument in arguments] not in ([str], [str, int]):
        raise _Refused('it describes a torch.device in an unknown way')
    return _Plain('device')


def _encoded(text: Any, encoding: Any) -> _Plain:
    if not isinstance(text, str) or encoding != 'latin1':
        raise _Refused('it describes bytes in an unknown way')
    return _Plain('bytes', len(text))


def _numpy_dtype(code: Any, align: Any, copy: Any) -> _Plain:
    if not isinstance(code, str) or code not in _NUMPY_DTYPES:
        raise _Refused("it describes a number of NumPy's in an unknown way")
    return _Plain('numpy dtype', _NUMPY_DTYPES[code])


def _numpy_scalar(dtype: Any, content: Any) -> _Plain:
    described = isinstance(dtype, _Plain) and dtype.kind == 'numpy dtype' and isinstance(content, _Plain)
    if not described or content != _Plain('bytes', dtype.size):
        raise _Refused("it describes a number of NumPy's in an unknown way")
    return _Plain('numpy scalar')


_CALLS: dict[str, Callable[..., Any]] = {
    'torch._utils _rebuild_tensor_v2': _tensor,
    'torch._utils _rebuild_parameter': _parameter,
    'torch Size': _size,
    'torch device': _device,
    'collections OrderedDict': _ordered_dict,
    '_codecs encode': _encoded,  # how protocol 2 writes bytes
    'numpy dtype': _numpy_dtype,
    'numpy.core.multiarray scalar': _numpy_scalar,  # NumPy before 2.0
    'numpy._core.multiarray scalar': _numpy_scalar,
}
_NAMESPACE = 'argparse Namespace'
_NAMES = _CALLS.keys() | _STORAGES.keys() | _DTYPES | {_NAMESPACE}


# The machine

_VALUES = ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINSTRING')
_MAKE = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_DICT': dict,
    'EMPTY_LIST': list,
    'EMPTY_TUPLE': tuple,
}
_TAKEN = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2}  # from the stack; others: since the mark


def _run(instructions: Iterable[tuple], storage: Callable[..., _Storage] | None) -> Any:
    """What a pickle leaves on the stack, as a description.

    Args:
        instructions: As ``pickletools.genops`` gives them: opcode, argument, position.
        storage: Checks what the pickle says about a storage; None where it may not have any.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    for count, (opcode, argument, _) in enumerate(instructions):
        if count == _MAX_INSTRUCTIONS:
            raise _Refused(f'it has more than {_MAX_INSTRUCTIONS} instructions')
        match opcode.name:
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _MAKE:
                stack.append(_MAKE[name]())
            case 'BINGET' | 'LONG_BINGET':
                stack.append(memo[argument])
            case 'BINPUT' | 'LONG_BINPUT':
                memo[argument] = stack[-1]
            case 'MARK':
                outer.append(stack)
                stack = []
            case 'TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3' as name:
                items, stack = _take(name, stack, outer)
                stack.append(tuple(items))
            case 'APPENDS' | 'APPEND' as name:
                items, stack = _take(name, stack, outer)
                _extend(stack[-1], items, False)
            case 'SETITEMS' | 'SETITEM' as name:
                items, stack = _take(name, stack, outer)
                _extend(stack[-1], items, True)
            case 'GLOBAL':
                stack.append(_name(argument))
            case 'BINPERSID':
                stack.append(_storage(stack.pop(), storage))
            case 'REDUCE':
                arguments = stack.pop()
                stack[-1] = _call(stack[-1], arguments)
            case 'NEWOBJ':
                arguments = stack.pop()
                if stack[-1] != _Name(_NAMESPACE) or arguments != ():
                    raise _Refused('it makes objects of a class that makes none')
                stack[-1] = _Namespace()
            case 'BUILD':
                state = stack.pop()
                _build(stack[-1], state)
            case 'PROTO':
                pass
            case 'STOP':
                return stack.pop()
            case name:
                raise _Refused(f'it has an instruction ({name}) that torch.save does not write')
    raise ValueError('no end')


def _take(name: str, stack: list[Any], outer: list[list[Any]]) -> tuple[list[Any], list[Any]]:
    """The items that an instruction works on, and the stack without them."""
    count = _TAKEN.get(name)
    if count is None:
        return stack, outer.pop()
    if count > len(stack):
        raise IndexError('the stack runs empty')
    items = stack[-count:]
    del stack[-count:]
    return items, stack


def _extend(target: Any, items: list[Any], pairs: bool) -> None:
    if not pairs and type(target) is list:
        target.extend(items)
    elif pairs and isinstance(target, dict) and len(items) % 2 == 0:
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, str | int | float | None):  # hashing a tuple recurses into it
                raise _Refused('it has a dictionary with keys other than text and numbers')
            target[key] = value
    else:
        raise _Refused('it puts items into what is no container')


def _name(argument: str) -> _Name:
    if argument not in _NAMES:
        raise _Refused(f'it would import and could run {argument.replace(" ", ".")}')
    return _Name(argument)


def _storage(reference: Any, storage: Callable[..., _Storage] | None) -> _Storage:
    if storage is None or not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != 'storage':
        raise _Refused('it refers to something that is no storage')
    try:
        return storage(*reference[1:])
    except TypeError:
        raise _Refused('it describes its numbers in an unknown way') from None


def _call(function: Any, arguments: Any) -> Any:
    check = _CALLS.get(function.name) if isinstance(function, _Name) else None
    if check is None or not isinstance(arguments, tuple):
        raise _Refused('it calls what is no function')
    try:
        return check(*arguments)
    except TypeError:
        raise _Refused(f'it calls {function.name.replace(" ", ".")} in an unknown way') from None


def _build(target: Any, state: Any) -> None:
    """Give an object its attributes."""
    match target:
        case _Namespace():
            if not isinstance(state, dict) or any(not isinstance(n, str) or n.startswith('__') for n in state):
                raise _Refused('it has an argparse.Namespace with unusual names')
            target.values.update(state)
        case _OrderedDict():
            if not isinstance(state, dict) or state.keys() - {'_metadata'}:
                raise _Refused('it changes what an OrderedDict does')
            target.metadata = state.get('_metadata')
        case _Plain(kind='numpy dtype'):
            # Version, byte order, and nothing of what makes a structured type
            if state not in [(3, order, None, None, None, -1, -1, 0) for order in '<|=']:
                raise _Refused("it describes a number of NumPy's in an unknown way")
        case _:
            raise _Refused('it changes an object that has no attributes')


def _check_nesting(value: Any) -> None:
    """Whoever walks through the result meets no endless loop, no depth, and no list that is told a million times."""
    pending, count = [(value, 0)], 0
    while pending:
        value, depth = pending.pop()
        parts: Iterable[Any] = ()
        if isinstance(value, _Name) and value.name not in _DTYPES:
            raise _Refused(f'it holds {value.name.replace(" ", ".")} as a value')
        if isinstance(value, dict):
            parts = [*value.values(), *([value.metadata] if isinstance(value, _OrderedDict) else [])]
        elif isinstance(value, list | tuple):
            parts = value
        elif isinstance(value, _Namespace):
            parts = value.values.values()
        count += len(parts)
        if count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise _Refused('its values are nested too deeply')
        pending.extend((part, depth + 1) for part in parts)
