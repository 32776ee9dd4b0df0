"""Invalid and hostile checkpoints, archives and safetensors files."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster_zoo.errors import CheckpointError

REBUILD = torch._utils._rebuild_tensor_v2


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


class Reference:
    """Pickled as a persistent id, which ``torch.save`` writes for a storage."""

    def __init__(self, *words: Any):
        self.words = words


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.words if isinstance(value, Reference) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    content = io.BytesIO()
    _Pickler(content, protocol).dump(value)
    return content.getvalue()


def tensor(numel: Any, size: Any, stride: Any, offset: Any = 0, key: Any = '0', kind: Any = torch.FloatStorage) -> Call:
    storage = Reference('storage', kind, key, 'cpu', numel)
    return Call(REBUILD, storage, offset, size, stride, False, OrderedDict())


def write_checkpoint(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """Writes the zip format of ``torch.save`` with a pickle and storages: ``_0=...`` is the content of key 0."""
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', program)
        archive.writestr('archive/version', '3\n')
        archive.writestr('archive/byteorder', 'little')
        for key, content in entries.items():
            archive.writestr(f'archive/data/{key[1:]}', content)
    return path


def write_legacy(path: Path, value: Any, keys: Any = (), content: bytes = b'') -> Path:
    """Writes the format of ``torch.save`` from before PyTorch 1.6. The value may be a pickle."""
    head = (0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True))
    program = value if isinstance(value, bytes) else pickled(value)
    path.write_bytes(b''.join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps(keys, 2) + content)
    return path


def legacy_tensor(numel: Any, size: Any, key: str = '0', view: Any = None) -> Call:
    reference = Reference('storage', torch.FloatStorage, key, 'cpu', numel, view)
    return Call(REBUILD, reference, 0, size, (1,), False, OrderedDict())


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, entries: dict[str, bytes], mode: str = 'w') -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), tarfile.DIRTYPE if name.endswith('/') else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(content))
    return path


def edit_zip(path: Path, name: str, **fields: int) -> Path:
    """Changes fields of an entry in the zip directory: ``offset``, ``size``, ``packed``, ``crc``, ``flags``."""
    places = dict(flags=(8, 'H'), crc=(16, 'I'), packed=(20, 'I'), size=(24, 'I'), offset=(42, 'I'))
    content = bytearray(path.read_bytes())
    start = content.rindex(b'PK\1\2', 0, content.rindex(name.encode()))
    for field, value in fields.items():
        position, kind = places[field]
        struct.pack_into(f'<{kind}', content, start + position, value)
    path.write_bytes(content)
    return path


def write_safetensors(path: Path, header: Any, content: bytes = b'', length: int | None = None) -> Path:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(header) if length is None else length) + header + content)
    return path


def refusal(action, *args, **kwargs):
    """Returns the message of the `CheckpointError` that ``action`` must raise: one printable line."""
    with pytest.raises(CheckpointError) as error:
        action(*args, **kwargs)
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 1000
    return text
