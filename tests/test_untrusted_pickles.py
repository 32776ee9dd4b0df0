"""Checkpoints whose author is not trusted: what a pickle may do, and what is refused before it costs memory."""

import argparse
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import forged
import numpy as np
import pytest
import torch
from forged import Call, Reference
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

from cluster_zoo.untrusted import CheckpointError, pickles
from cluster_zoo.weights import load_state_dict, read_checkpoint

FOUR = np.arange(4, dtype='<f4').tobytes()


def _refusal(path):
    """The message of the one error that reading ends in: one line that a terminal shows as it is."""
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 1000
    return text


# What is accepted


@pytest.mark.parametrize('zipped', [True, False])
def test_tensors_of_every_kind_are_read_as_they_were(tmp_path, zipped):
    base = torch.arange(24.0)
    tensors = {
        'matrix': base.view(4, 6),
        'transposed': base.view(4, 6).T,
        'row': base.view(4, 6)[2],
        'every second': base[1::2],
        'scalar': torch.tensor(3.5),
        'empty': torch.empty(0, 3),
        'repeated': torch.arange(4.0).expand(1, 4),
        'parameter': torch.nn.Parameter(torch.ones(2)),
        **{str(t): torch.ones(3).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.complex64)},
        **{str(t): torch.ones(3).to(t) for t in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)},
    }
    torch.save(tensors, tmp_path / 'c.pth', _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / 'c.pth')
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value)
        assert (found[name].dtype, type(found[name])) == (value.dtype, type(value))
    assert found['row'].untyped_storage().data_ptr() == found['matrix'].untyped_storage().data_ptr()


@pytest.mark.parametrize('zipped', [True, False])
def test_plain_values_are_read_as_they_were(tmp_path, zipped):
    metadata = OrderedDict([('', dict(version=1)), ('norm', dict(version=2))])
    state_dict = OrderedDict(weight=torch.ones(2))
    state_dict._metadata = metadata
    shared = [1, 2]
    values = dict(
        state_dict=state_dict,
        args=argparse.Namespace(lr=1e-3, aa=None, mean=(0.5, 0.5), opts=dict(a=[True, -1]), name='Größe', dirs=[]),
        metric=np.float64(73.25),
        counts=[np.int64(3), np.float32(0.5), np.bool_(True), np.uint8(200)],
        size=torch.Size([2, 3]),
        device=torch.device('cuda', 1),
        dtype=torch.bfloat16,
        numbers={1: 2**62, -3: 2**200, 'x': -1.5},
        twice=[shared, shared],
        deep=_nested(50),
    )
    torch.save(values, tmp_path / 'c.pth', _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / 'c.pth')
    assert torch.equal(found.pop('state_dict')['weight'], values.pop('state_dict')['weight'])
    assert found == values
    assert [type(n) for n in found['counts']] == [type(n) for n in values['counts']]


def _nested(depth):
    value = 'bottom'
    for _ in range(depth):
        value = [value]
    return value


def test_numbers_of_both_major_versions_of_numpy(tmp_path):
    torch.save(dict(metric=np.float64(73.25)), tmp_path / 'c.pth')
    (name,) = {
        n for n in (b'numpy.core.multiarray', b'numpy._core.multiarray') if n in (tmp_path / 'c.pth').read_bytes()
    }
    program = pickle.dumps(dict(metric=np.float64(73.25)), 2)
    for other in (b'numpy.core.multiarray', b'numpy._core.multiarray'):
        forged.write_checkpoint(tmp_path / 'c.pth', program.replace(name, other))
        assert read_checkpoint(tmp_path / 'c.pth') == dict(metric=73.25)


def test_what_timms_saver_writes_is_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3)
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model='coc_small', lr=1e-3, mean=None, lr_noise=[0.4, 0.7], model_kwargs=dict(depth=3))
    CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(tmp_path)).save_checkpoint(3, metric=71.5)
    found = read_checkpoint(tmp_path / 'last.pth.tar')
    assert (found['epoch'], found['metric'], found['args']) == (3, 71.5, args)
    assert torch.equal(found['optimizer']['state'][0]['exp_avg'], optimizer.state_dict()['state'][0]['exp_avg'])
    assert load_state_dict(tmp_path / 'last.pth.tar').keys() == model.state_dict().keys()


def test_files_written_by_hand_are_read_where_they_do_not_lie(tmp_path):
    path = forged.write_checkpoint(tmp_path / 'c.pth', forged.pickled({'a': forged.tensor(4, (2, 2), (2, 1))}), _0=FOUR)
    assert torch.equal(read_checkpoint(path)['a'], torch.arange(4.0).view(2, 2))
    value, size = {'a': forged.legacy_tensor(4, (4,))}, (4).to_bytes(8, 'little')
    assert torch.equal(read_checkpoint(forged.write_legacy(path, value, ['0'], size + FOUR))['a'], torch.arange(4.0))


# Tensors that are not what they say

TENSORS = {
    'beyond its storage': (forged.tensor(4, (1 << 33,), (1,)), 'more than the 4'),
    'starts beyond it': (forged.tensor(4, (2,), (1,), 3), 'a tensor of 2 numbers'),
    'steps beyond it': (forged.tensor(4, (2,), (4,)), 'a tensor of 2 numbers'),
    'one number 10**12 times': (forged.tensor(4, (10**12,), (0,)), '1000000000000 numbers'),
    'negative stride': (forged.tensor(4, (4,), (-1,)), 'in an unknown way'),
    'negative offset': (forged.tensor(4, (1,), (1,), -1), 'in an unknown way'),
    'negative size': (forged.tensor(4, (-1,), (1,)), 'in an unknown way'),
    'size that is no number': (forged.tensor(4, (2.0,), (1,)), 'in an unknown way'),
    'more sizes than strides': (forged.tensor(4, (1, 1), (1,)), 'in an unknown way'),
    'a thousand dimensions': (forged.tensor(4, (1,) * 1000, (1,) * 1000), 'in an unknown way'),
    'function in the backward pass': (forged.tensor(4, (4,), (1,), hooks=OrderedDict({0: torch.Size([])})), 'backward'),
    'no storage': (Call(forged.REBUILD, [1.0], 0, (1,), (1,), False, OrderedDict()), 'in an unknown way'),
    'too few arguments': (Call(forged.REBUILD, forged.storage()), 'in an unknown way'),
    'more numbers than bytes': (forged.tensor(1 << 40, (4,), (1,)), '4398046511104 bytes'),
    'fewer numbers than bytes': (forged.tensor(3, (3,), (1,)), '12 bytes'),
    'wider numbers than bytes': (forged.tensor(4, (4,), (1,), kind=torch.DoubleStorage), '32 bytes'),
    'entry that is not there': (forged.tensor(4, (4,), (1,), key='7'), 'data/7'),
    'another entry as numbers': (forged.tensor(4, (4,), (1,), key='../version'), 'data/../version'),
    'key that is no text': (forged.tensor(4, (4,), (1,), key=0), 'in an unknown way'),
    'count that is no number': (forged.tensor('4', (4,), (1,)), 'in an unknown way'),
    'unknown type': (forged.tensor(4, (4,), (1,), kind='FloatStorage'), 'unknown type'),
    'reference to something else': (Reference('module', 'x'), 'no storage'),
    'reference with too much': (Reference('storage', torch.FloatStorage, '0', 'cpu', 4, 5), 'in an unknown way'),
}


@pytest.mark.parametrize('case', TENSORS)
def test_tensors_that_lie_are_refused(case, tmp_path):
    value, words = TENSORS[case]
    path = forged.write_checkpoint(tmp_path / 'c.pth', forged.pickled({'a': value}), _0=FOUR)
    message = _refusal(path)
    assert 'was refused' in message
    assert words in message


LEGACY = {
    'more numbers than bytes': ({'a': forged.legacy_tensor(1 << 40, (4,))}, ['0'], (1 << 40), 'damaged'),
    'two counts': ({'a': forged.legacy_tensor(1 << 40, (4,))}, ['0'], 4, 'which is not so'),
    'one storage in two sizes': (
        {'a': forged.legacy_tensor(4, (4,)), 'b': forged.legacy_tensor(2, (2,))}, ['0'], 4, 'in two ways'
    ),
    'a view of a storage': ({'a': forged.legacy_tensor(4, (4,), view=('v', 0, 1 << 40))}, ['0'], 4, 'in two ways'),
    'storage that is not filled': ({'a': forged.legacy_tensor(4, (4,))}, [], 4, 'list of storages'),
    'storage that nobody needs': ({'a': forged.legacy_tensor(4, (4,))}, ['0', '1'], 4, 'list of storages'),
    'keys that nest': ({'a': forged.legacy_tensor(4, (4,))}, [['0']], 4, 'list of storages'),
    'a long key': ({'a': forged.legacy_tensor(2, (2,), key='k' * 10_000)}, ['k' * 10_000], 4, 'describes 8 bytes'),
    'keys that are none': ({'a': forged.legacy_tensor(4, (4,))}, {'0': 1}, 4, 'list of storages'),
    'beyond its storage': ({'a': forged.legacy_tensor(4, (1 << 33,))}, ['0'], 4, 'more than the 4'),
}  # fmt: skip


@pytest.mark.parametrize('case', LEGACY)
def test_earlier_files_that_lie_are_refused(case, tmp_path):
    value, keys, numel, words = LEGACY[case]
    path = forged.write_legacy(tmp_path / 'c.pth', value, keys, numel.to_bytes(8, 'little') + FOUR)
    assert words in _refusal(path)


# Programs that do more than hold values


def _many(n, instruction, before=b'', after=b''):
    return b'\x80\x02' + before + instruction * n + after + b'.'


PROGRAMS = {
    'bytes that are not in the file': (forged.pickled(Call(bytearray, 10**10)), 'bytearray'),
    'tensor that is not in the file': (forged.pickled(Call(torch.Tensor, 10**10)), 'torch.Tensor'),
    'set of a tensor': (forged.pickled(Call(set, [1])), 'set'),
    'a tensor of nothing': (forged.pickled({'a': torch.empty(1 << 40, device='meta')}), 'meta_tensor'),
    'a function as a value': (b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.', '_rebuild_tensor_v2 as a value'),
    'lists in lists': (_many(20_000, b'a', b']' * 20_001), 'nested too deeply'),
    'tuples in tuples': (_many(20_000, b'\x85', b')'), 'nested too deeply'),
    'dictionaries in dictionaries': (_many(20_000, b's', b'}K\x01' * 20_000 + b'N'), 'nested too deeply'),
    'a list in itself': (b'\x80\x02]q\x00h\x00a.', 'nested too deeply'),
    'a key that nests': (_many(50_000, b'\x85', b'})', b'Ns'), 'keys other than'),
    'a key that is a tensor': (forged.pickled({('a', 1): 2}), 'keys other than'),
    'a list told 2**60 times': (b'\x80\x02]q\x00' + b']q\x01(h\x00h\x00eq\x00' * 60 + b'.', 'nested too deeply'),
    'too many instructions': (_many(2_000_001, b'N'), 'instructions'),
    'names of a later protocol': (pickle.dumps(OrderedDict(), 4), 'torch.save does not write'),
    'items in what is no container': (b'\x80\x02K\x01K\x02a.', 'no container'),
    'a call of a number': (b'\x80\x02K\x01)R.', 'no function'),
    'a call of a type': (b'\x80\x02ctorch\nFloatStorage\n)R.', 'no function'),
    'an object of a function': (b'\x80\x02ctorch\ndevice\n)\x81.', 'makes none'),
    'attributes of a class': (b'\x80\x02cargparse\nNamespace\n}b.', 'no attributes'),
    'methods of a namespace': (
        b'\x80\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__ctorch\nSize\nsb.', 'unusual names'
    ),
    'methods of a dictionary': (b'\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsNsb.', 'OrderedDict'),
    'a dictionary that is copied': (forged.pickled(Call(OrderedDict, [('a', 1)])), 'OrderedDict'),
    'objects in a number of NumPy': (forged.pickled(Call(np.dtype, 'O8', False, True)), "NumPy's"),
    'a number of NumPy with too few bytes': (
        pickle.dumps(np.float64(1), 2).replace(b'f8', b'f4'), "NumPy's"
    ),
    'a structured number of NumPy': (pickle.dumps(np.zeros(1, 'f4,f4')[0], 2), "NumPy's"),
    'an array of NumPy': (pickle.dumps(np.zeros(3), 2), '_reconstruct'),
    'a terminal sequence': (b'\x80\x02cos\n\x1b[2Jx\n.', 'os.?[2Jx'),
    'a memo that is empty': (b'\x80\x02h\x00.', 'damaged'),
    'a stack that is empty': (b'\x80\x02a.', 'damaged'),
    'a mark that is missing': (b'\x80\x02t.', 'damaged'),
    'a text beyond the end': (b'\x80\x02X\xff\xff\xff\xffabc.', 'damaged'),
    'no end': (b'\x80\x02N', 'damaged'),
}  # fmt: skip


@pytest.mark.parametrize('case', PROGRAMS)
def test_programs_are_refused(case, tmp_path):
    program, words = PROGRAMS[case]
    assert words in _refusal(forged.write_checkpoint(tmp_path / 'c.pth', program))


@pytest.mark.parametrize('value', [
    torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,), check_invariants=True),
    torch.empty(1 << 40, device='meta'),
    torch.nn.Linear(1, 1),
    Path('a'),
], ids=lambda value: type(value).__name__)  # fmt: skip
@pytest.mark.parametrize('zipped', [True, False])
def test_what_torch_saves_beside_plain_tensors_is_refused(value, zipped, tmp_path):
    torch.save(dict(a=value), tmp_path / 'c.pth', _use_new_zipfile_serialization=zipped)
    assert 'was refused' in _refusal(tmp_path / 'c.pth')


def test_a_large_description_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, '_MAX_PICKLE', 10_000)
    torch.save(dict(a='x' * 10_000), tmp_path / 'c.pth')
    assert 'takes 100' in _refusal(tmp_path / 'c.pth')


_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from cluster_zoo.weights import CheckpointError, read_checkpoint
kibibytes = int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1])
resource.setrlimit(resource.RLIMIT_AS, ((kibibytes << 10) + (200 << 20),) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        assert isinstance(error.__cause__, Exception | None) and not isinstance(error.__cause__, MemoryError), path
        print(path.name, 'refused')
    else:
        print(path.name, 'read')
"""


@pytest.mark.skipif(not Path('/proc/self/status').is_file(), reason='the limit of memory is that of Linux')
def test_refusals_take_little_memory(tmp_path):
    """All of the above in a process that may take 200 MiB, and a file of 8 MiB, to show that it is not too little."""
    for i, (value, _) in enumerate(TENSORS.values()):
        forged.write_checkpoint(tmp_path / f'tensor{i}', forged.pickled({'a': value}), _0=FOUR)
    for i, (value, keys, numel, _) in enumerate(LEGACY.values()):
        forged.write_legacy(tmp_path / f'legacy{i}', value, keys, numel.to_bytes(8, 'little') + FOUR)
    for i, (program, _) in enumerate(PROGRAMS.values()):
        forged.write_checkpoint(tmp_path / f'program{i}', program)
    zeros = dict(a=forged.tensor(1 << 26, (1 << 26,), (1,)))
    forged.write_checkpoint(tmp_path / 'zeros', forged.pickled(zeros), compression=8, _0=bytes(1 << 28))
    torch.save(torch.zeros(1 << 21), tmp_path / 'whole')
    expected = [f'{path.name} {"read" if path.name == "whole" else "refused"}' for path in sorted(tmp_path.iterdir())]
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parents[1]))
    run = subprocess.run(
        [sys.executable, '-c', _IN_LITTLE_MEMORY, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == expected
