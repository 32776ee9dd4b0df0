"""Valid checkpoints and archives are read; all others raise an error of one line with little time and memory.

The hostile files are read in a process of its own, with limits of memory and time: what crashes or hangs there fails.
"""

import argparse
import collections
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from _codecs import encode
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forged import (
    REBUILD,
    Call,
    Reference,
    edit_zip,
    legacy_tensor,
    pickled,
    refusal,
    tensor,
    write_checkpoint,
    write_legacy,
    write_safetensors,
    write_tar,
    write_zip,
)
from safetensors.torch import save_file

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.weights import load_checkpoint, load_state_dict, pickle_scan, read_checkpoint
from cluster_zoo.weights.archives import is_archive, unpack_checkpoint

FOUR = np.arange(4, dtype='<f4').tobytes()
ZEROS = bytes(64 << 20)
TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, num_classes=5)

# --- invalid and hostile files ----------------------------------------------------------------------------------------


def zipped(value, **entries):
    """A checkpoint of a value, or of a pickle."""
    program = value if isinstance(value, bytes) else pickled(value)
    return lambda path: write_checkpoint(path, program, **(entries or dict(_0=FOUR)))


def program(body):
    return zipped(b'\x80\x02' + body + b'.')


def keys(pack, count=50_000):
    """A dictionary with many keys."""
    return program(b'}(' + b''.join(pack(i) + b'N' for i in range(1, count)) + b'u')


def legacy(value, names=('0',), numel=4):
    return lambda path: write_legacy(path, value, list(names), struct.pack('<Q', numel) + FOUR)


def content(data):
    return lambda path: path.write_bytes(data)


def changed(change, **kwargs):
    """A modified checkpoint of torch.save."""

    def write(path):
        with path.open('wb') as file:  # names the folder in the zip file `archive`
            torch.save({'a': torch.arange(100.0), 'b': torch.ones(3)}, file, **kwargs)
        result = change(path)
        if isinstance(result, bytes):
            path.write_bytes(result)

    return write


def cut(keep, **kwargs):
    return changed(lambda path: path.read_bytes()[:keep], **kwargs)


def added(name, data):
    def change(path):
        with zipfile.ZipFile(path, 'a') as archive:
            archive.writestr(name, data)

    return changed(change)


def compressed(path):
    write_checkpoint(path, pickled({'a': tensor(1 << 24, (1 << 24,), (1,))}), zipfile.ZIP_DEFLATED, _0=ZEROS)


def overlapping(path):
    """A hundred storages that share the same four megabytes."""
    tensors = {f'a{i}': tensor(1 << 20, (1 << 20,), (1,), key=str(i)) for i in range(100)}
    names = {f'_{i}': b'' if i else os.urandom(4 << 20) for i in range(100)}
    write_checkpoint(path, pickled(tensors), **names)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo('archive/data/0').header_offset
    for i in range(1, 100):
        edit_zip(path, f'archive/data/{i}', offset=offset, size=4 << 20, packed=4 << 20)


def two_views(path):
    """Two concatenated zip files, of which readers may find different ones."""
    evil, good = io.BytesIO(), io.BytesIO()
    torch.save({'a': torch.ones(1)}, good)
    with zipfile.ZipFile(evil, 'w') as archive:
        archive.writestr('archive/data.pkl', pickled({'a': Call(os.mkdir, MARKER)}))
        archive.writestr('archive/version', '3\n')
    path.write_bytes(evil.getvalue() + good.getvalue()[:-22] + evil.getvalue()[-22:])


def flags(state):
    """A NumPy scalar with a state of its type."""
    kind = b'cnumpy\ndtype\n' + pickled(('f8', False, True))[2:-1] + b'R' + pickled(state)[2:-1] + b'b'
    return program(b'cnumpy._core.multiarray\nscalar\n' + kind + pickled(bytes(8))[2:-1] + b'\x86R')


def scalar(code, data=bytes(8)):
    return zipped(Call(np._core.multiarray.scalar, Call(np.dtype, code, False, True), data))


def called(function, arguments):
    """A call whose arguments are not a tuple."""
    module, name = function.split()
    return program(f'c{module}\n{name}\n'.encode() + arguments + b'R')


MARKER = os.environ.get('MARKER', 'marker')
HASH = 2**61 - 1  # modulus of Python's hashes of numbers
THOUSAND = tensor(4, (10**10,), (0,))


def header(content, size=0, length=None):
    return lambda path: write_safetensors(path, content, bytes(size), length)


def entry(shape, offsets, name='a', dtype='F32'):
    return {name: dict(dtype=dtype, shape=shape, data_offsets=offsets)}


def number(value):
    return pickled(value)[2:-1]


HOSTILE = {
    # Code
    'calls a function': (zipped({'a': Call(os.mkdir, MARKER)}), 'could run posix.mkdir'),
    'calls a function, before 1.6': (legacy({'a': Call(os.mkdir, MARKER)}), 'could run posix.mkdir'),
    'calls a function in options': (zipped(argparse.Namespace(a=Call(os.mkdir, MARKER))), 'could run posix.mkdir'),
    'calls print': (zipped(Call(print, 'x')), 'could run print'),
    'calls getattr': (zipped(Call(getattr, torch.Size, 'mro')), 'could run getattr'),
    'INST': (zipped(b'(S"touch"\nios\nsystem\n.'), 'protocol'),
    'OBJ': (zipped(b'\x80\x02(cos\nsystem\nU\x05toucho.'), 'os.system'),
    'a name of the stack': (zipped(pickled(Call(os.mkdir, MARKER), 4)), 'protocol'),
    'EXT1': (program(b'\x82\x01'), 'protocol'),
    'a module': (zipped(torch.nn.Linear(1, 1)), 'torch.nn.modules.linear.Linear'),
    'a path': (zipped(Path('a')), 'pathlib.PosixPath'),
    'a terminal sequence': (program(b'cos\n\x1b[2Jx\n'), 'os.?[2Jx'),
    'an array of NumPy': (zipped(np.zeros(3)), '_reconstruct'),
    'a reference to a module': (zipped(Reference('module', 'x')), 'not a checkpoint'),
    'a rebuilt function': (zipped(Call(torch._tensor._rebuild_from_type_v2, os.mkdir, set, (MARKER,), {})), 'mkdir'),
    # Time
    'tuples in tuples as a key': (program(b'})' + b'\x85' * 1_000_000 + b'Ns'), 'nested more than 200'),
    'tuples in tuples': (program(b')' + b'\x85' * 1_000_000), 'nested more than 200'),
    'lists in lists': (program(b']' * 100_001 + b'a' * 100_000), 'nested more than 200'),
    'dictionaries in dictionaries': (program(b'}K\x01' * 100_000 + b'N' + b's' * 100_000), 'nested more than 200'),
    'integers of one hash': (keys(lambda i: number(i * HASH)), 'keys that are not text'),
    'complex numbers of one hash': (keys(lambda i: number(complex(-1000003 * i, i))), 'keys that are not'),
    'floats of one hash': (keys(lambda i: number(float(i * 2**61))), 'keys that are not text'),
    'tuples of one hash': (keys(lambda i: number((i * HASH, 1))), 'keys that are not text'),
    'a set of one hash': (zipped(Call(set, [i * HASH for i in range(1, 50_000)])), 'keys that are not text'),
    'a counter of one hash': (zipped(Call(collections.Counter, [i * HASH for i in range(50_000)])), 'keys that are'),
    'a counter under its former name': (
        called('UserDict Counter', b'](' + b''.join(number(i * HASH) for i in range(50_000)) + b'e\x85'), 'keys that'
    ),
    'attributes of one hash': (
        program(
            b'cargparse\nNamespace\n)\x81](' + b''.join(number((i * HASH, 1)) for i in range(50_000)) + b'eb'
        ), 'keys that are not text',
    ),
    'a set that is filled later': (
        program(
            b'cbuiltins\nset\n]q\x00\x85h\x00(' + b''.join(number(i * HASH) for i in range(1, 50_000)) + b'e'
        ), 'inside of another',
    ),
    'a set that calls itself': (
        zipped(Call(torch._tensor._rebuild_from_type_v2, set, set, ([i * HASH for i in range(50_000)],), {})),
        'copies a value',
    ),
    'many marks': (program(b'N' * 200_000 + b'(t' * 200_000), 'found a tuple'),
    'a list in itself': (program(b']q\x00h\x00a'), 'found a list'),
    'a dictionary in itself': (program(b'}q\x00X\x01\x00\x00\x00ah\x00s'), "'a' are no plain tensors"),
    'a list told 2**60 times': (program(b']q\x00' + b']q\x01(h\x00h\x00eq\x00' * 60), 'found a list'),
    'a set of a tensor': (zipped(Call(set, THOUSAND)), 'more numbers than the file'),
    'a tensor that is changed': (
        zipped(pickled(tensor(4, (4,), (1,)))[:-1] + number((tensor(4, (4,), (1,)), 0, (10**10,), (0,))) + b'b.'),
        'changes a'
    ),
    'a shape of a tensor': (zipped(Call(torch.Size, tensor(4, (4,), (1,)))), 'a Size of a tensor'),
    'a codec that takes its time': (
        zipped(Call(encode, ''.join(map(chr, range(256, 50_000))), 'punycode')), 'calls encode'
    ),
    # Memory
    'a bytearray': (zipped(Call(bytearray, 10**10)), 'calls bytearray'),
    'a bytearray of a list': (called('builtins bytearray', b']' + number(10**10) + b'a'), 'other arguments'),
    'a bytearray of a rebuilt function': (
        zipped(Call(torch._tensor._rebuild_from_type_v2, bytearray, bytearray, (10**10,), {})), 'calls bytearray'
    ),
    'a set that is copied': (
        program(b'cbuiltins\nset\nq\x00](' + b'N' * 1000 + b'eq\x01' + b'h\x00h\x01\x85R' * 1000), 'copies a value'
    ),
    'bytes that are copied': (
        program(b'c_codecs\nencode\nq\x00X\x06\0\0\0latin1q\x01' + b'h\x00h\x01h\x01\x86R' * 2), 'copies a value'
    ),
    'attributes that are copied': (program(b'}q\x00' + b'cargparse\nNamespace\n)\x81h\x00b' * 2), 'copies a value'),
    'text that doubles': (zipped(Call(encode, b'x', 'hex')), 'calls encode'),
    'torch.Tensor of a size': (zipped(Call(torch.Tensor, 10**10)), 'makes tensors with Tensor'),
    'a copy for another device': (
        zipped(Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, tensor(4, (4,), (1,)), 1, 'cpu', False)),
        'makes tensors with _rebuild_device',
    ),
    'a compressed entry': (compressed, 'its entries are compressed or overlap'),
    'entries that overlap': (overlapping, 'its entries are compressed or overlap'),
    # Inconsistent tensors
    'beyond its storage': (zipped({'a': tensor(4, (1 << 33,), (1,))}), 'more numbers than the file'),
    'one number 10**10 times': (zipped({'a': THOUSAND}), 'more numbers than the file'),
    'one number a hundred times': (zipped({'a': tensor(4, (100,), (0,))}), 'larger than its storage'),
    'a little beyond its storage': (zipped({'a': tensor(4, (500,), (1,))}), 'not a checkpoint'),
    'starts beyond it': (zipped({'a': tensor(4, (1,), (1,), offset=1 << 62)}), 'not a checkpoint'),
    'starts in 40 GB': (zipped({'a': tensor(4, (1,), (1,), offset=10**10)}), 'not a checkpoint'),
    'negative stride': (zipped({'a': tensor(4, (4,), (-1,))}), 'not a checkpoint'),
    'negative offset': (zipped({'a': tensor(4, (1,), (1,), -1)}), 'not a checkpoint'),
    'negative size': (zipped({'a': tensor(4, (-1,), (1,))}), 'not a checkpoint'),
    'a size of floats': (zipped({'a': tensor(4, (2.0,), (1,))}), 'more numbers'),
    'a thousand dimensions': (zipped({'a': tensor(4, (1,) * 1000, (1,) * 1000)}), 'more numbers'),
    'a parameter with methods of its own': (
        zipped({'a': Call(torch._utils._rebuild_parameter_with_state, tensor(4, (9,), (0,)), True, OrderedDict(),
                          {'numel': torch.Size, 'element_size': torch.Size})}), 'larger than its storage'
    ),
    'an error that has no text': (
        zipped(Call(torch.serialization._get_layout, Call(
            torch._utils._rebuild_parameter_with_state, tensor(4, (4,), (1,)), True, OrderedDict(),
            {'numel': torch.Size},
        ))), 'not a checkpoint (KeyError)'
    ),
    'no storage': (zipped(Call(REBUILD, [1.0], 0, (1,), (1,), False, OrderedDict())), 'not a checkpoint'),
    'too few arguments': (zipped(Call(REBUILD, 1)), 'more numbers'),
    'more numbers than bytes': (zipped({'a': tensor(1 << 40, (4,), (1,))}), 'more numbers'),
    'a storage that is not there': (zipped({'a': tensor(4, (4,), (1,), key='7')}), 'not a checkpoint'),
    'another entry as numbers': (zipped({'a': tensor(2, (2,), (1,), key='../version', kind=torch.ByteStorage)}),
        'not a checkpoint'),
    'before 1.6, more numbers than bytes': (legacy({'a': legacy_tensor(1 << 40, (4,))}, numel=1 << 40), 'more numbers'),
    'before 1.6, two counts': (legacy({'a': legacy_tensor(1 << 33, (4,))}), 'more numbers'),
    'before 1.6, a view beyond': (legacy({'a': legacy_tensor(4, (4,), view=('v', 0, 1 << 40))}), 'does not fit'),
    'before 1.6, no keys': (legacy({'a': legacy_tensor(4, (4,))}, names=()), 'does not fit'),
    'before 1.6, tuples in tuples': (legacy(b'\x80\x02})' + b'\x85' * 1_000_000 + b'Ns.'), 'nested more than'),
    # NumPy scalars
    'an object of NumPy': (scalar('O8'), 'invalid'),
    'a structure of NumPy': (zipped(Call(np._core.multiarray.scalar, Call(np.dtype, [('a', 'O')]), b'a')),
        'not a checkpoint'),
    'a large type of NumPy': (scalar('V1000000000'), 'invalid'),
    'a number without bytes': (scalar('f8', b'0'), 'not a checkpoint'),
    'flags of objects': (flags((3, '|', None, None, None, -1, -1, 63)), 'found a float64'),
    'a type of no state': (flags(()), 'not a checkpoint'),
    # Damaged files
    'nothing': (content(b''), 'not a checkpoint'),
    'random bytes': (content(np.random.default_rng(0).bytes(5000)), 'not a checkpoint'),
    'random bytes of a zip': (content(b'PK\3\4' + np.random.default_rng(1).bytes(5000)), 'not a checkpoint'),
    'random bytes of a pickle': (content(b'\x80\x02' + np.random.default_rng(2).bytes(5000)), 'not a checkpoint'),
    **{f'cut at {keep}': (cut(keep), 'truncated') for keep in (1, 4, 30, 300, 800, -200, -98, -22, -1)},
    **{
        f'before 1.6, cut at {keep}': (cut(keep, _use_new_zipfile_serialization=False), 'truncated')
        for keep in (1, 20, 100, 250, 400, -300, -1)
    },
    'a wrong checksum': (changed(lambda path: edit_zip(path, 'archive/data/0', crc=1)), 'is damaged: Bad CRC'),
    'a changed number': (
        changed(lambda path: path.read_bytes().replace(struct.pack('<f', 77), struct.pack('<f', 78))), 'Bad CRC'
    ),
    'an empty stack': (program(b'a'), 'not a checkpoint'),
    'an empty memo': (program(b'h\x00'), 'not a checkpoint'),
    'a missing mark': (program(b't'), 'not a checkpoint'),
    'a text beyond the end': (program(b'X\xff\xff\xff\xffabc'), 'not a checkpoint'),
    'an integer of a million digits': (zipped(b'L' + b'9' * 1_000_000 + b'L\n.'), 'not a checkpoint'),
    # safetensors
    'a length of 2**63': (header({}, 8, 1 << 63), 'not a checkpoint'),
    'a length beyond the file': (header({}, 8, 1000), 'not a checkpoint'),
    'a header that is no object': (header(b'{[]'), 'not a checkpoint'),
    'a header that nests': (header(b'{"a":' * 20_000 + b'1' + b'}' * 20_000), 'not a checkpoint'),
    'offsets beyond the file': (header(entry([1 << 40], (0, 1 << 42)), 8), 'not a checkpoint'),
    'offsets that overlap': (header(entry([2], (0, 8)) | entry([2], (0, 8), 'b'), 8), 'not a checkpoint'),
    'another shape': (header(entry([3], (0, 8)), 8), 'not a checkpoint'),
    'a shape beyond 64 bits': (header(entry([1 << 62, 1 << 62], (0, 8)), 8), 'not a checkpoint'),
    'an unknown type': (header(entry([2], (0, 8), dtype='F33'), 8), 'not a checkpoint'),
    'a name of control characters': (header(entry([2], (8, 16), '\x1b[2J\n'), 16), 'not a checkpoint'),
    # Other files
    'TorchScript': (lambda path: torch.jit.script(torch.nn.Linear(1, 1)).save(str(path)), 'a TorchScript program'),
    'constants': (added('archive/constants.pkl', b''), 'a TorchScript program'),
    'an exported program': (lambda path: write_zip(path, {'a/models/model.json': b'{}', 'a/version': b'3'}, 0), '.pt2'),
    'a zip': (lambda path: write_zip(path, {'a.txt': b'a', 'b.txt': b'b'}), 'not a checkpoint'),
    'gzip': (content(gzip.compress(FOUR)), 'gunzip'),
    'bzip2': (content(b'BZh91AY&SY'), 'bunzip2'),
    'a web page': (content(b'<!DOCTYPE html><html></html>'), 'a web page'),
    'a pointer of Git LFS': (content(b'version https://git-lfs.github.com/spec/v1\n'), 'git lfs pull'),
    'HDF5': (content(b'\x89HDF\r\n\x1a\n' + bytes(100)), 'not a checkpoint'),
    'an array': (lambda path: np.save(path.open('wb'), np.zeros(3)), 'not a checkpoint'),
    'an index.json': (content(b'{"weight_map": {"a": "model-1.safetensors"}}'), 'several files'),
    'text': (content(b'not a checkpoint'), 'not a checkpoint'),
    'a pipe': (os.mkfifo, 'not a file'),
    'a folder': (Path.mkdir, 'a folder'),
    'a zip before a zip': (two_views, 'could run posix.mkdir'),
    'protocol 4': (changed(lambda path: None, pickle_protocol=4), 'protocol'),
    'protocol 5': (changed(lambda path: None, pickle_protocol=5), 'protocol'),
}  # fmt: skip

_READ = """
import json, os, resource, signal, sys, warnings
from pathlib import Path
import torch
from cluster_zoo.weights import CheckpointError, load_checkpoint
model = torch.nn.Linear(1, 1)
torch.set_num_threads(1)
def kibibytes(kind):
    return int(next(line for line in open('/proc/self/status') if line.startswith(kind)).split()[1])

resource.setrlimit(resource.RLIMIT_AS, ((kibibytes('VmSize') + (2 << 20)) << 10,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir(), key=lambda path: int(path.name)):
    if int(path.name) < int(sys.argv[2]):
        continue
    signal.alarm(60)
    try:
        outcome = 'read: ' + str(load_checkpoint(model, path))
    except CheckpointError as error:
        causes = [error.__cause__, getattr(error.__cause__, '__cause__', None)]
        outcome = 'no memory' if any(isinstance(cause, MemoryError) for cause in causes) else str(error)
    except BaseException as error:
        outcome = f'{type(error).__name__}: {error}'
    # Not ru_maxrss, which includes the parent process
    print(json.dumps([int(path.name), outcome, kibibytes('VmHWM') >> 10]), flush=True)
"""


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    """The error for each hostile file, and the peak memory of the process in MiB so far."""
    folder = tmp_path_factory.mktemp('hostile')
    for i, (write, _) in enumerate(HOSTILE.values()):
        write(folder / str(i))
    found, start = {}, 0
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parents[1]))
    while start < len(HOSTILE):
        command = [sys.executable, '-c', _READ, str(folder), str(start)]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)
        found |= {i: (outcome, memory) for i, outcome, memory in map(json.loads, run.stdout.splitlines())}
        start = 1 + max([start, *found]) if run.returncode == 0 else 1 + max([start - 1, *found])
        if start < len(HOSTILE):
            found[start] = (f'the process ended with {run.returncode}: {run.stderr[-500:]}', 0)
            start += 1
    assert not (folder.parent / MARKER).exists(), 'code has run'
    return dict(zip(HOSTILE, (found[i] for i in range(len(HOSTILE)))))


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is limited and read as Linux does')
@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_files_raise_one_line_and_use_little_memory(case, outcomes):
    message, memory = outcomes[case]
    assert HOSTILE[case][1] in message
    assert message.isprintable() and len(message) < 1000
    assert "can't allocate" not in message and memory < 1500


def test_the_numbers_of_instructions_and_values_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_scan, '_MAX_INSTRUCTIONS', 1000)
    program(b'N' * 1001)(tmp_path / 'c.pth')
    assert 'it has more than 1000 instructions' in refusal(read_checkpoint, tmp_path / 'c.pth')
    monkeypatch.setattr(pickle_scan, '_MAX_VALUES', 100)
    torch.save([[] for _ in range(200)], tmp_path / 'c.pth')
    assert 'it holds more than 100 values' in refusal(read_checkpoint, tmp_path / 'c.pth')


def test_the_index_of_several_files(tmp_path):
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert 'Join these files' in refusal(read_checkpoint, tmp_path / 'model.safetensors.index.json')
    assert 'it does not exist' in refusal(read_checkpoint, tmp_path / 'missing')


def test_no_function_runs_code_from_a_file(tmp_path):
    model = timm.create_model('coc_tiny', **TINY)
    torch.save(dict(model.state_dict(), args=Call(os.mkdir, str(tmp_path / 'pwned'))), tmp_path / 'evil.pth')
    overlay = dict(file=str(tmp_path / 'evil.pth'))
    assert 'mkdir' in refusal(load_state_dict, tmp_path / 'evil.pth')
    assert 'mkdir' in refusal(load_checkpoint, model, tmp_path / 'evil.pth')
    assert 'mkdir' in refusal(timm.create_model, 'coc_tiny', True, pretrained_cfg_overlay=overlay, **TINY)
    assert not (tmp_path / 'pwned').exists()


# --- valid files ----------------------------------------------------------------------------------------------------

BASE = torch.arange(24.0)
STATE = OrderedDict(weight=torch.ones(2))
STATE._metadata = OrderedDict([('', dict(version=1)), ('norm', dict(version=2))])
SHARED = [1, 2]
PLAIN = dict(
    matrix=BASE.view(4, 6),
    transposed=BASE.view(4, 6).T,
    row=BASE.view(4, 6)[2],
    every_second=BASE[1::2],
    scalar=torch.tensor(3.5),
    empty=torch.empty(0, 3),
    one_that_is_expanded=torch.ones(1).expand(1, 1, 1),
    parameter=torch.nn.Parameter(torch.ones(2)),
    parameters_of_a_module=torch.nn.ParameterDict(dict(a=torch.ones(2))).state_dict(),
    not_a_number=torch.tensor([float('nan'), float('inf')]),
    **{
        str(dtype)[6:]: torch.ones(3).to(dtype)
        for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int16, torch.int8,
            torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
        )
    },
    sparse=torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (4,), check_invariants=True),
    compressed=torch.eye(3).to_sparse_csr(),
    quantized=torch.quantize_per_tensor(torch.ones(3), 0.1, 10, torch.quint8),
    meta=torch.empty(1 << 40, device='meta'),
    conjugate=torch.ones(2, dtype=torch.complex64).conj(),
    ordered=STATE,
    set={1, 2, 3},
    counter=collections.Counter({'1': 5, '2': 3}),
    complex=[complex(1, 2)] * 3 + [complex(i, i) for i in range(20_000)],
    losses=[i / 7 for i in range(20_000)],
    ranges=[(i, i + 0.5) for i in range(20_000)],
    tuple_keys={(0, 1): 'a', ('b', 2): 3, 1.5: 4},
    integer_keys={i: dict(step=i) for i in range(20_000)},
    large_numbers={1: 2**62, -3: 2**200, 'x': -1.5},
    bytes=b'abc\xff',
    bytearray=bytearray(b'abc\xff'),
    size=torch.Size([2, 3]),
    device=torch.device('cuda', 1),
    dtype=torch.bfloat16,
    layout=torch.strided,
    options=argparse.Namespace(lr=1e-3, aa=None, mean=(0.5, 0.5), opts=dict(a=[True, -1]), name='Größe', dirs=[]),
    numpy=[np.float64(73.25), np.int64(3), np.float32(0.5), np.bool_(True), np.uint8(200), np.float16(1)],
    numpy_of_the_other_order=np.dtype('>f8').type(73.25),
    twice=[SHARED, SHARED, dict(a=SHARED)],
    many={f'layer{i}.weight': torch.ones(1) for i in range(2000)},
    views=[*torch.arange(1000.0).view(500, 2)],
    text='\x00\x1b[31m ü \U0001f600' * 1000,
)  # fmt: skip


def _nested(depth):
    return ['bottom'] if depth == 0 else [_nested(depth - 1)]


def _stored(path):
    """Repacks the zip file with Python."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, 'w') as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def _large(path):
    """Repacks it with sizes of 64 bits, as for entries of more than 4 GiB."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, 'w') as new:
        for entry in old.infolist():
            with new.open(entry.filename, 'w', force_zip64=True) as file:
                file.write(old.read(entry))


def _short(path):
    """Removes the directory of 64 bits."""
    data = path.read_bytes()
    assert data[-42:-38] == b'PK\6\7'
    path.write_bytes(data[:-98] + data[-22:])


def _other_numpy(path):
    data = pickled({'metric': np.float64(73.25)})
    pair = (b'numpy._core.multiarray', b'numpy.core.multiarray')
    write_checkpoint(path, data.replace(*(pair if pair[0] in data else pair[::-1])))


def _unchecked(path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(PLAIN['matrix'], path)
    finally:
        torch.serialization.set_crc32_options(before)


def _saved(change=lambda path: None, value=None, **kwargs):
    def write(path):
        torch.save(PLAIN['many'] if value is None else value, path, **kwargs)
        change(path)
        return PLAIN['many'] if value is None else value

    return write


def _old(value):
    return _saved(value=value, _use_new_zipfile_serialization=False)


def _written(function, expected, *args):
    return lambda path: (function(path, *args), expected)[1]


VALID = {
    **{name: _saved(value=value) for name, value in PLAIN.items()},
    **{f'{name}, before 1.6': _old(PLAIN[name]) for name in ('matrix', 'every_second', 'ordered', 'options', 'numpy')},
    **{f'{name}, before 1.6': _old(PLAIN[name]) for name in ('views', 'bfloat16', 'sparse', 'quantized', 'empty')},
    'everything': _saved(value={name: value for name, value in PLAIN.items() if name != 'meta'}),
    'deep': _saved(value=_nested(150)),
    'protocol 3': _saved(value=PLAIN['many'], pickle_protocol=3),
    'packed again': _saved(_stored),
    'entries of 64 bits': _saved(_large),
    'a directory of 32 bits': _saved(_short),
    'numbers of the other NumPy': _written(_other_numpy, {'metric': np.float64(73.25)}),
    'no checksums': _written(_unchecked, PLAIN['matrix']),
    'by hand': _written(
        lambda path: zipped({'a': tensor(4, (2, 2), (2, 1))})(path), {'a': torch.arange(4.0).view(2, 2)}
    ),
    'safetensors': _written(
        write_safetensors, {'a': torch.arange(4.0)},
        {'a': dict(dtype='F32', shape=[4], data_offsets=[0, 16]), '__metadata__': {'a': 'b'}}, FOUR,
    ),
    'an empty state_dict': _saved(value=OrderedDict()),
}  # fmt: skip


@pytest.mark.parametrize('case', VALID)
def test_valid_files_are_read(case, tmp_path):
    expected = VALID[case](tmp_path / 'c.pth')
    found = read_checkpoint(tmp_path / 'c.pth')
    assert repr(found) == repr(expected)
    assert getattr(found, '_metadata', None) == getattr(expected, '_metadata', None)


@pytest.mark.parametrize('protocol', [4, 5])
def test_later_protocols_pass_the_scan(protocol, tmp_path):
    value = {name: value for name, value in PLAIN.items() if name not in ('meta', 'sparse', 'compressed')}
    torch.save(value, tmp_path / 'c.pth', pickle_protocol=protocol)
    pickle_scan.check_file(tmp_path / 'c.pth')


TWO = dict(a=torch.zeros(2), b=torch.zeros(3))
MORE = {key: value + 1 for key, value in TWO.items()}


@pytest.mark.parametrize('content', [
    TWO,
    *(dict({key: TWO}, epoch=3, args=argparse.Namespace(lr=1)) for key in (
        'state_dict', 'model', 'model_state', 'model_state_dict', 'net', 'network', 'params', 'weights', 'module',
        'state_dict_ema', 'model_ema', 'ema_state_dict', 'params_ema', 'ema',
    )),
    dict(model=dict(state_dict=TWO, epoch=3)),
    dict(state_dict=TWO, state_dict_ema=MORE),
    dict(params=TWO, params_ema=MORE),
    *({prefix + key: value for key, value in TWO.items()} for prefix in (
        'module.', '_orig_mod.', 'model.', 'net.', 'module._orig_mod.', '_orig_mod.module.', 'model.net.',
    )),
    dict({f'module.{key}': value for key, value in TWO.items()}, n_averaged=torch.tensor(3)),
    dict(TWO, total_ops=torch.zeros(1), **{'layer.total_params': torch.zeros(1)}),
    dict(state_dict={f'model.{key}': value for key, value in TWO.items()}, **{'pytorch-lightning_version': '2.1'}),
], ids=lambda content: '-'.join(map(str, content))[:40])  # fmt: skip
def test_weights_are_found_under_the_usual_keys(content, tmp_path):
    torch.save(content, tmp_path / 'c.pth')
    found = load_state_dict(tmp_path / 'c.pth')
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in TWO.items()}
    assert found['a'].sum() == 0


def test_averaged_weights_are_preferred_on_request(tmp_path):
    for content in (dict(state_dict=TWO, state_dict_ema=MORE), dict(model=dict(net=TWO, ema=MORE)), dict(ema=MORE)):
        torch.save(content, tmp_path / 'c.pth')
        assert load_state_dict(tmp_path / 'c.pth', use_ema=True)['a'].sum() == 2


@pytest.mark.parametrize('content, words', [
    (dict(epoch=3), "'epoch' are no plain tensors"),
    ([1, 2], 'found a list'),
    ({}, 'found nothing'),
    ({1: torch.ones(1)}, '1 are no plain tensors'),
    ({'a': torch.ones(1), ('b',): torch.ones(1)}, 'a tuple are no plain tensors'),
    ({'state_dict': {'state_dict': 3}}, "'state_dict' are no plain tensors"),
    ({'a\x1b[2J\n': 3}, 'are no plain tensors'),
    ({'x' * 10_000: 3}, 'are no plain tensors'),
    ({2**2000: 3}, 'are no plain tensors'),
])  # fmt: skip
def test_files_without_weights(content, words, tmp_path):
    torch.save(content, tmp_path / 'c.pth')
    assert words in refusal(load_state_dict, tmp_path / 'c.pth')


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny():
    return timm.create_model('coc_tiny', **TINY)


@pytest.fixture
def weights(tiny):
    return {name: value.clone() for name, value in tiny.state_dict().items()}


def test_a_head_that_fits_the_file_is_kept(weights, tmp_path):
    save_file(weights, tmp_path / 'own.bin')  # 5 classes, where the configuration says 1000
    overlay = dict(file=str(tmp_path / 'own.bin'))
    model = timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay, **TINY)
    assert torch.equal(model.head.fc.weight, weights['head.fc.weight'])
    model = timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay | dict(num_classes=-1), **TINY)
    assert not torch.equal(model.head.fc.weight, weights['head.fc.weight'])  # -1 requests a new head
    assert torch.equal(model.norm.weight, weights['norm.weight'])


def test_half_precision_and_models_of_timm(tiny, weights, tmp_path):
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / 'half.safetensors')
    load_checkpoint(tiny, tmp_path / 'half.safetensors')
    assert tiny.norm.weight.dtype == torch.float32
    torch.save(timm.create_model('resnet10t', num_classes=3).state_dict(), tmp_path / 'r.pth')
    load_checkpoint(timm.create_model('resnet10t', num_classes=3), tmp_path / 'r.pth')
    assert 'unknown to the model (bn1' in refusal(load_checkpoint, tiny, tmp_path / 'r.pth')


BIAS = torch.zeros(16)


@pytest.mark.parametrize('changes, words', [
    ({'norm.bias': None}, '1 missing (norm.bias)'),
    ({'surprise': torch.ones(1)}, '1 unknown to the model (surprise)'),
    ({'norm.bias': torch.ones(3)}, 'another shape (norm.bias: [3] in the file, [16] in the model)'),
    ({'norm.bias': BIAS + float('nan')}, 'NaN or infinity (norm.bias)'),
    ({'norm.bias': BIAS - float('inf')}, 'NaN or infinity (norm.bias)'),
    ({'norm.bias': BIAS.double() + 1e39}, 'NaN or infinity (norm.bias)'),  # too large for the model
    *(({'norm.bias': BIAS.to(dtype)}, f'norm.bias: {dtype} in the file') for dtype in (
        torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn
    )),
    ({'norm.bias': BIAS.to('meta')}, 'norm.bias'),
    ({'norm.bias': BIAS.to_sparse()}, 'norm.bias'),
    ({'norm.bias': torch.quantize_per_tensor(BIAS, 0.1, 10, torch.quint8)}, 'norm.bias'),
    ({'norm.bias': torch.nested.nested_tensor([BIAS, BIAS[:3]])}, 'norm.bias'),
    ({'norm.bias': torch.ones([1] * 60)}, 'another shape'),
    ({f'name{i}' * 100: torch.ones(1) for i in range(100)}, '100 unknown'),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_and_change_nothing(changes, words, tiny, weights, tmp_path):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    weights['head.fc.bias'] += 1
    weights = {name: value for name, value in {**weights, **changes}.items() if value is not None}
    torch.save(weights, tmp_path / 'c.pth')
    assert words in refusal(load_checkpoint, tiny, tmp_path / 'c.pth')
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    overlay = dict(file=str(tmp_path / 'c.pth'))
    refusal(timm.create_model, 'coc_tiny', True, pretrained_cfg_overlay=overlay, **TINY)


@pytest.mark.parametrize('name', ['coc_tiny', 'dnc_swin_tiny', 'vit_tiny_patch16_224'])
def test_known_names_with_impossible_shapes_are_refused(name, tmp_path):
    torch.save({'patch_embed.proj.weight': torch.tensor(1.0)}, tmp_path / 'c.pth')
    assert 'cannot be converted' in refusal(load_checkpoint, timm.create_model(name), tmp_path / 'c.pth')


def test_empty_tensors_of_huge_shapes_are_refused(tiny, tmp_path):
    """A safetensors header can contain any shape with a zero; the message must stay short."""
    header = {'norm.bias': dict(dtype='F32', shape=[0, *[1 << 40] + [1] * 50_000], data_offsets=[0, 0])}
    refusal(load_checkpoint, tiny, write_safetensors(tmp_path / 'c.safetensors', header))


# --- archives of a checkpoint -----------------------------------------------------------------------------------------

WEIGHTS = b'weights' * 1000
PACKERS = [write_zip, write_tar, lambda path, entries: write_tar(path, entries, 'w:gz')]
DRIVE = {
    'coc_small/': b'',
    'coc_small/model_best.pth.tar': WEIGHTS,
    'coc_small/args.yaml': b'lr: 1',
    '__MACOSX/coc_small/model_best.pth.tar': b'',
    'coc_small/._model_best.pth.tar': b'',
}


@pytest.mark.parametrize('pack', PACKERS)
@pytest.mark.parametrize('entries', [DRIVE, {'/etc/../../model.PTH': WEIGHTS}, {'a\\b.ckpt': WEIGHTS}])
def test_only_the_checkpoint_is_unpacked(pack, entries, tmp_path):
    path = pack(tmp_path / 'archive', entries)
    (tmp_path / 'new').mkdir()
    assert is_archive(path)
    assert unpack_checkpoint(path, tmp_path / 'new').read_bytes() == WEIGHTS
    assert {file.name for file in tmp_path.iterdir()} == {'archive', 'new'}
    assert {file.name for file in (tmp_path / 'new').iterdir()} <= {'checkpoint', 'unzipped'}


def test_is_archive(tmp_path):
    torch.save(TWO, tmp_path / 'c.pth')
    torch.save(TWO, tmp_path / 'legacy.pth', _use_new_zipfile_serialization=False)
    save_file(TWO, tmp_path / 'c.safetensors')
    (tmp_path / 'empty').touch()
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'c.pth').read_bytes()[:-30])  # `read_checkpoint` reports it
    assert not any(is_archive(path) for path in tmp_path.iterdir())
    (tmp_path / 'c.pth.gz').write_bytes(gzip.compress((tmp_path / 'c.pth').read_bytes()))
    assert is_archive(tmp_path / 'c.pth.gz')
    assert load_state_dict(unpack_checkpoint(tmp_path / 'c.pth.gz', tmp_path)).keys() == TWO.keys()


def _link(kind):
    def write(path):
        member = tarfile.TarInfo('model.pth')
        member.type, member.linkname = kind, '/etc/hostname'
        with tarfile.open(path, 'w') as archive:
            archive.addfile(member)

    return write


def _header(size):
    """A tar file that consists of a header with a size."""

    def write(path):
        header = bytearray(tarfile.TarInfo('model.pth').tobuf())
        header[124:136] = struct.pack('>iq', -1, size) if size < 0 else b'\x80' + struct.pack('>3xq', size)
        header[148:156] = b' ' * 8
        header[148:156] = b'%06o\0 ' % sum(header)
        path.write_bytes(header)

    return write


def _extended(path):
    """An endless sequence of extended headers."""
    member = tarfile.TarInfo('x')
    member.type = tarfile.GNUTYPE_LONGNAME
    path.write_bytes(member.tobuf() * 5000)


def _sparse(path):
    """A file of 8 GiB without content."""
    member = tarfile.TarInfo('model.pth')
    sizes = dict(major='0', minor='1', map='0,0', size=str(8 << 30))
    member.pax_headers = {f'GNU.sparse.{key}': value for key, value in sizes.items()}
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)


def _packed(pack, entries, keep=None, flip=None, **fields):
    def write(path):
        data = pack(path, entries).read_bytes()[:keep]
        path.write_bytes(data if flip is None else data[:flip] + bytes([data[flip] ^ 1]) + data[flip + 1 :])
        if fields:
            edit_zip(path, 'model.pth', **fields)

    return write


RANDOM = np.random.default_rng(0).bytes(5000)
TWO_FILES = {'a/model.pth': b'', 'a/last.pth': b''}
ARCHIVES = {
    **{f'two checkpoints {i}': (_packed(pack, TWO_FILES), "holds 2 checkpoints ('a/model.pth', 'a/last.pth'")
       for i, pack in enumerate(PACKERS)},
    **{f'no checkpoint {i}': (_packed(pack, {'a/readme.txt': b''}), "holds no checkpoint, but 'a/readme.txt'")
       for i, pack in enumerate(PACKERS)},
    **{f'a folder {i}': (_packed(pack, {'model.pth/': b''}), 'holds no checkpoint') for i, pack in enumerate(PACKERS)},
    **{f'cut {i} at {keep}': (_packed(pack, {'model.pth': RANDOM}, keep), 'damaged')
       for i, pack in enumerate(PACKERS) for keep in (3, 100, 700, 2000, -600) if (i, keep) != (1, -600)},
    **{f'a bit {i}': (_packed(PACKERS[i], {'model.pth': RANDOM}, flip=2000), 'damaged') for i in (0, 2)},
    'nothing': (_packed(write_tar, {}), 'no checkpoint, but nothing'),
    'text': (content(b'not an archive' * 100), 'not a supported archive'),
    'encrypted': (_packed(write_zip, {'model.pth': WEIGHTS}, flags=1), 'encrypted'),
    'a size that is too small': (_packed(write_zip, {'model.pth': WEIGHTS}, size=100), 'damaged'),
    'a zip bomb': (_packed(write_zip, {'model.pth': ZEROS}), 'more than 100 times'),
    'a tar.gz bomb': (_packed(PACKERS[2], {'model.pth': ZEROS}), 'more than 100 times'),
    'a bomb beside a checkpoint': (_packed(PACKERS[2], {'a': ZEROS, 'model.pth': WEIGHTS}), 'more than 100 times'),
    'a gzip bomb': (content(gzip.compress(ZEROS)), 'more than 100 times'),
    'gzip in gzip': (content(gzip.compress(gzip.compress(RANDOM))), None),
    'a symbolic link': (_link(tarfile.SYMTYPE), 'holds no checkpoint'),
    'a hard link': (_link(tarfile.LNKTYPE), 'holds no checkpoint'),
    'a device': (_link(tarfile.CHRTYPE), 'holds no checkpoint'),
    'less than nothing': (_header(-512), 'damaged'),
    'a terabyte that is not there': (_header(1 << 40), 'damaged'),
    'headers without end': (_extended, 'damaged'),
    'members without end': (_packed(write_tar, {f'{i}.txt': b'' for i in range(10_050)}), 'has no end'),
    'a sparse file': (_sparse, 'more than 100 times'),
    'a name of control characters': (_packed(write_tar, {'\x1b[2J\n': b''}), 'holds no checkpoint'),
}  # fmt: skip


@pytest.mark.parametrize('case', ARCHIVES)
def test_invalid_archives_are_refused(case, tmp_path):
    write, words = ARCHIVES[case]
    write(tmp_path / 'archive')
    (tmp_path / 'new').mkdir()
    if words is None:  # unpacked, but refused as a checkpoint
        assert 'gunzip' in refusal(read_checkpoint, unpack_checkpoint(tmp_path / 'archive', tmp_path / 'new'))
    else:
        assert words in refusal(unpack_checkpoint, tmp_path / 'archive', tmp_path / 'new')
    assert not (tmp_path / 'model.pth').exists()
