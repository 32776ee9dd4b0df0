"""Archives whose author is not trusted: checkpoints that are zips, archives that hold one, safetensors files."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import forged
import pytest
import torch
from forged import refusal
from safetensors.torch import save_file

from cluster_zoo.untrusted import archives, check_archive, is_archive, unpack_checkpoint
from cluster_zoo.weights import load_state_dict, read_checkpoint

ZEROS = bytes(8 << 20)


# Checkpoints that are zips


@pytest.fixture
def checkpoint(tmp_path):
    torch.save({'a': torch.arange(100.0), 'b': torch.ones(3)}, tmp_path / 'c.pth')
    return tmp_path / 'c.pth'


def test_the_places_of_a_checkpoints_entries(checkpoint):
    places = check_archive(checkpoint)
    content = checkpoint.read_bytes()
    position, size = places['data/0']
    assert content[position : position + size] == torch.arange(100.0).numpy().tobytes()
    with zipfile.ZipFile(checkpoint) as archive:
        assert {f'c/{name}': size for name, (_, size) in places.items()} == {
            entry.filename: entry.file_size for entry in archive.infolist()
        }


def test_a_directory_of_32_bits_is_read_as_one_of_64(checkpoint):
    """torch.save writes both; files below 4 GiB from elsewhere may have the first alone."""
    content = checkpoint.read_bytes()
    assert content[-42:-38] == b'PK\6\7'
    checkpoint.write_bytes(content[:-98] + content[-22:])
    assert torch.equal(read_checkpoint(checkpoint)['b'], torch.ones(3))


def _rewritten(change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Callable[[Path], None]:
    """A change that copies a zip entry by entry."""

    def apply(path: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, 'w') as new:
            for entry in old.infolist():
                change(new, entry, old.read(entry))

    return apply


def _extra(*entries: tuple[str, bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with zipfile.ZipFile(path, 'a') as archive:
            for name, content in entries:
                archive.writestr(name, content)

    return apply


def _compressed(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    archive.writestr(entry.filename, content, zipfile.ZIP_DEFLATED)


def _surrounded(before: bytes, after: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(before + path.read_bytes() + after)


def _moved_end(path: Path) -> None:
    """What the end says in 64 bits is another place than the one directly before it."""
    content = bytearray(path.read_bytes())
    struct.pack_into('<Q', content, len(content) - 50, 0)
    path.write_bytes(content)


def _moved_entry(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo('c/data/1').header_offset
    forged.edit_zip(path, 'c/data/1', offset=offset + 2)


ZIPS = {
    'compressed': (_rewritten(_compressed), 'is compressed'),
    'leading out': (_extra(('c/../../evil', b'')), 'outside of the archive'),
    'absolute': (_extra(('/tmp/evil', b'')), 'outside of the archive'),
    'for Windows': (_extra(('c\\..\\evil', b'')), 'outside of the archive'),
    'nameless': (_extra(('./', b'')), 'outside of the archive'),
    'two of a name': (_extra(('c/data/0', b'')), "two entries 'c/data/0'"),
    'two of a name but for case': (_extra(('c/DATA.pkl', b'')), "two entries 'c/DATA.pkl'"),
    'two of a name but for dots': (_extra(('c/./data.pkl', b'')), "two entries 'c/./data.pkl'"),
    'two folders': (_extra(('d/x', b'')), 'not in one folder'),
    'a program': (_extra(('c/constants.pkl', b'')), 'TorchScript'),
    'something before': (_surrounded(b'PK\3\4' + bytes(96), b''), 'damaged'),
    'something after': (_surrounded(b'', b'PK'), 'damaged'),
    'another end after': (_surrounded(b'', b'PK\5\6' + bytes(18)), 'damaged'),
    'an end that contradicts itself': (_moved_end, 'damaged'),
    'larger than the file': (lambda path: forged.edit_zip(path, 'c/data/0', size=1 << 30, packed=1 << 30), 'reaches'),
    'smaller when packed': (lambda path: forged.edit_zip(path, 'c/data/0', size=1 << 30), 'is compressed'),
    'inside another': (lambda path: forged.edit_zip(path, 'c/data/1', offset=0), 'reaches into the next'),
    'beyond the file': (lambda path: forged.edit_zip(path, 'c/data/1', offset=1 << 30), 'damaged'),
    'at no entry': (_moved_entry, 'damaged'),
    'encrypted': (lambda path: forged.edit_zip(path, 'c/data/1', flags=1), 'encrypted'),
}


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('case', ZIPS)
def test_zips_that_torch_does_not_write_are_refused(case, checkpoint):
    change, words = ZIPS[case]
    change(checkpoint)
    assert words in refusal(read_checkpoint, checkpoint)


def test_a_zip_of_other_things_says_what_it_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / 'c.pth', 'w') as archive:
        archive.writestr('coc_small/args.yaml', b'')
        archive.writestr('\x1b[2J', b'')
    message = refusal(read_checkpoint, tmp_path / 'c.pth')
    assert "'coc_small/args.yaml'" in message
    assert 'unpack it first' in message


def test_very_many_entries_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(archives, '_MAX_ENTRIES', 5)
    assert 'it has 8 entries' in refusal(check_archive, checkpoint)
    monkeypatch.setattr(archives, '_MAX_DIRECTORY', 100)
    assert 'its directory takes' in refusal(check_archive, checkpoint)


@pytest.mark.parametrize('keep', [4, 30, 300, -1, -22, -98, -120])
def test_truncated_zips_are_damaged(checkpoint, keep):
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    assert 'damaged' in refusal(check_archive, checkpoint)


# Archives that hold a checkpoint

CONTENT = b'weights' * 1000


def _zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def _tar(path: Path, entries: dict[str, bytes], mode: str = 'w', **kwargs: object) -> Path:
    with tarfile.open(path, mode, **kwargs) as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), tarfile.DIRTYPE if name.endswith('/') else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(content))
    return path


def _tar_gz(path: Path, entries: dict[str, bytes]) -> Path:
    return _tar(path, entries, 'w:gz')


PACKERS = [_zip, _tar, _tar_gz]
DRIVE = {
    'coc_small/': b'',
    'coc_small/model_best.pth.tar': CONTENT,
    'coc_small/args.yaml': b'lr: 1',
    '__MACOSX/coc_small/model_best.pth.tar': b'',
    'coc_small/._model_best.pth.tar': b'',
}


@pytest.mark.parametrize('pack', PACKERS)
def test_the_one_checkpoint_is_unpacked_and_nothing_else(pack, tmp_path):
    path = pack(tmp_path / 'archive', DRIVE)
    assert is_archive(path)
    assert unpack_checkpoint(path, tmp_path / 'new' / 'folder') == tmp_path / 'new' / 'folder' / 'model_best.pth.tar'
    assert [file.name for file in (tmp_path / 'new').rglob('*')] == ['folder', 'model_best.pth.tar']
    assert (tmp_path / 'new' / 'folder' / 'model_best.pth.tar').read_bytes() == CONTENT


@pytest.mark.parametrize('pack', PACKERS)
def test_a_real_checkpoint_survives(pack, checkpoint, tmp_path):
    path = pack(tmp_path / 'archive', {'c.pth': checkpoint.read_bytes()})
    found = load_state_dict(unpack_checkpoint(path, tmp_path / 'new'))
    assert torch.equal(found['a'], torch.arange(100.0))


def test_what_is_an_archive(checkpoint, tmp_path):
    assert not is_archive(checkpoint)
    assert not is_archive(tmp_path)
    assert not is_archive(tmp_path / 'missing')
    torch.save(torch.ones(1), tmp_path / 'legacy.pth', _use_new_zipfile_serialization=False)
    save_file({'a': torch.ones(1)}, tmp_path / 'c.safetensors')
    (tmp_path / 'empty').touch()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-30])  # what is broken is told when it is read
    for name in ('legacy.pth', 'c.safetensors', 'empty', 'c.pth'):
        assert not is_archive(tmp_path / name)


@pytest.mark.parametrize('pack', PACKERS)
@pytest.mark.parametrize('entries, words', [
    ({'a/model.pth': b'', 'a/last.pth': b''}, "holds 2 checkpoints ('a/model.pth', 'a/last.pth')"),
    ({'a/readme.txt': b''}, "holds no checkpoint (.pth.tar, .pth, .pt, .ckpt, .bin, .safetensors), but 'a/readme.txt'"),
    ({}, 'but nothing'),
    ({'model.pth/': b''}, 'holds no checkpoint'),
    ({'../model.pth': CONTENT}, "'../model.pth' names a place outside"),
    ({'model.pth': CONTENT, 'a/../../b': b''}, 'names a place outside'),
    ({'model.pth': CONTENT, '/etc/passwd': b''}, 'names a place outside'),
    ({'model.pth': CONTENT, '..\\b': b''}, 'names a place outside'),
    ({'model.pth': CONTENT, 'MODEL.pth': b''}, "two entries 'MODEL.pth'"),
    ({'model.pth': CONTENT, './model.pth': b''}, "two entries './model.pth'"),
])  # fmt: skip
def test_archives_that_are_not_unpacked(pack, entries, words, tmp_path):
    if pack is _zip and not entries:
        words = 'not an archive'  # it does not begin with an entry
    message = refusal(unpack_checkpoint, pack(tmp_path / 'archive', entries), tmp_path / 'new')
    assert words in message
    assert not (tmp_path / 'new').exists()
    assert not (tmp_path / 'model.pth').exists()


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo('model.pth')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.writestr(link, '/etc/passwd')
    assert "'model.pth' is a link" in refusal(unpack_checkpoint, tmp_path / 'a.zip', tmp_path / 'new')
    kinds = {
        tarfile.SYMTYPE: 'a link',
        tarfile.LNKTYPE: 'a link',
        tarfile.FIFOTYPE: 'neither',
        tarfile.CHRTYPE: 'neither',
    }
    for kind, words in kinds.items():
        member = tarfile.TarInfo('model.pth')
        member.type, member.linkname = kind, '/etc/passwd'
        with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
            archive.addfile(member)
        assert f"'model.pth' is {words}" in refusal(unpack_checkpoint, tmp_path / 'a.tar', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def _in_a_header(path: Path) -> None:
    """A header that is larger than any name."""
    _tar(path, {'model.pth': CONTENT}, 'w:gz', format=tarfile.PAX_FORMAT, pax_headers={'comment': 'x' * (2 << 20)})


def _sparse(path: Path) -> None:
    """A file of 8 GiB without content."""
    member = tarfile.TarInfo('model.pth')
    member.pax_headers = {
        'GNU.sparse.major': '0',
        'GNU.sparse.minor': '1',
        'GNU.sparse.map': '0,0',
        'GNU.sparse.size': str(8 << 30),
    }
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)


def _promising(path: Path) -> None:
    """A file of a terabyte, of which nothing is there."""
    member = tarfile.TarInfo('model.pth')
    member.size = 1 << 40
    path.write_bytes(member.tobuf())


def _negative(path: Path) -> None:
    """A file of less than nothing, so that what follows it is the file itself."""
    header = bytearray(tarfile.TarInfo('model.pth').tobuf())
    header[124:136] = b'\xff' * 10 + b'\xfe\0'  # -512 in base 256
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    path.write_bytes(header)


def _gigabytes(path: Path) -> None:
    forged.edit_zip(_zip(path, {'model.pth': b'x'}), 'model.pth', size=(1 << 32) - 2)


BOMBS = {
    'zip': (lambda path: _zip(path, {'model.pth': ZEROS}), 'would grow from'),
    'zip that says so': (_gigabytes, 'would grow from'),
    'tar.gz': (lambda path: _tar_gz(path, {'model.pth': ZEROS}), 'would grow to more than'),
    'tar.gz beside a checkpoint': (lambda path: _tar_gz(path, {'a.txt': ZEROS, 'model.pth': CONTENT}), 'would grow to'),
    'after the end of a tar.gz': (
        lambda path: path.write_bytes(_tar_gz(path, {'model.pth': CONTENT}).read_bytes() + gzip.compress(ZEROS)),
        'would grow to',
    ),
    'header of a tar.gz': (_in_a_header, 'its headers are too large'),
    'sparse': (_sparse, 'neither a plain file'),
    'tar': (_promising, 'would grow to more than'),
    'tar without end': (_negative, 'has a size of -512'),
}  # fmt: skip


@pytest.mark.parametrize('case', BOMBS)
def test_bombs_are_refused(case, tmp_path):
    pack, words = BOMBS[case]
    pack(tmp_path / 'archive')
    assert words in refusal(unpack_checkpoint, tmp_path / 'archive', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_very_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, '_MAX_ENTRIES', 4)
    for pack in PACKERS:
        assert 'entries' in refusal(unpack_checkpoint, pack(tmp_path / 'archive', DRIVE), tmp_path / 'new')


@pytest.mark.parametrize('pack', PACKERS)
def test_what_is_damaged_leaves_what_was_there(pack, tmp_path):
    content = bytes(torch.randint(0, 256, (5000,), dtype=torch.uint8).tolist())
    path = pack(tmp_path / 'archive', {'model.pth': content})
    whole = path.read_bytes()
    new = tmp_path / 'new'
    new.mkdir()
    (new / 'model.pth').write_bytes(b'earlier')
    for damaged in (whole[:0], whole[:3], whole[:100], whole[:2000], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert 'damaged' in refusal(unpack_checkpoint, path, new)
    if pack is not _tar:  # which has no checksum of the content
        path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
        assert 'damaged' in refusal(unpack_checkpoint, path, new)
    assert [(file.name, file.read_bytes()) for file in new.iterdir()] == [('model.pth', b'earlier')]
    path.write_bytes(whole)
    assert unpack_checkpoint(path, new).read_bytes() == content


def test_a_size_that_is_too_small_is_damage(tmp_path):
    path = _zip(tmp_path / 'archive', {'model.pth': CONTENT})
    forged.edit_zip(path, 'model.pth', size=100)
    assert 'damaged' in refusal(unpack_checkpoint, path, tmp_path / 'new')
    assert list((tmp_path / 'new').iterdir()) == []


def test_what_is_no_archive(tmp_path):
    (tmp_path / 'text').write_text('not an archive ' * 100)
    assert 'not an archive (.zip, .tar, .tar.gz)' in refusal(unpack_checkpoint, tmp_path / 'text', tmp_path)
    assert 'No archive at' in refusal(unpack_checkpoint, tmp_path / 'missing', tmp_path)
    assert 'No archive at' in refusal(unpack_checkpoint, tmp_path, tmp_path)


# safetensors


def _entry(dtype='F32', shape=(2,), offsets=(0, 8), **more):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets), **more)


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
HEADERS = {
    'length of 2**63': ({'a': _entry()}, 8, 1 << 63),
    'length of 2**64 - 1': ({'a': _entry()}, 8, (1 << 64) - 1),
    'length beyond the file': ({'a': _entry()}, 8, 1000),
    'length into the content': ({'a': _entry()}, 8, 70),
    'no length': ({}, 0, 0),
    'not JSON': (b'not JSON', 0, None),
    'not an object': ([], 0, None),
    'not UTF-8': (b'{"\xff": 1}', 0, None),
    'a number that is none': (b'{"a": NaN}', 0, None),
    'nested': (b'{"a":' * 20_000 + b'1' + b'}' * 20_000, 0, None),
    'a name twice': (TWICE, 8, None),
    'metadata twice': (b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"b"}}', 0, None),
    'metadata of numbers': ({'__metadata__': {'a': 1}}, 0, None),
    'offsets beyond the file': ({'a': _entry(shape=[1 << 40], offsets=[0, 1 << 42])}, 8, None),
    'offsets after nothing': ({'a': _entry(offsets=[8, 16])}, 16, None),
    'offsets backwards': ({'a': _entry(offsets=[8, 0])}, 8, None),
    'offsets of two tensors': ({'a': _entry(), 'b': _entry()}, 8, None),
    'offsets that overlap': ({'a': _entry(), 'b': _entry(offsets=[4, 12])}, 12, None),
    'content that is nobodys': ({'a': _entry()}, 16, None),
    'shape that is too large': ({'a': _entry(shape=[3])}, 8, None),
    'shape that is too small': ({'a': _entry(shape=[1])}, 8, None),
    'shape beyond 64 bits': ({'a': _entry(shape=[1 << 62, 1 << 62])}, 8, None),
    'shape of nothing beyond 64 bits': ({'a': _entry(shape=[0, (1 << 63) + 5], offsets=[0, 0])}, 0, None),
    'negative shape': ({'a': _entry(shape=[-2])}, 8, None),
    'unknown type': ({'a': _entry('F33')}, 8, None),
    'wider type': ({'a': _entry('F64')}, 8, None),
    'a key is missing': ({'a': dict(dtype='F32', shape=[2])}, 8, None),
    'a terminal sequence': ({'\x1b[2J\n': _entry(offsets=[8, 16])}, 16, None),
}


@pytest.mark.parametrize('case', HEADERS)
def test_safetensors_files_that_lie_are_refused(case, tmp_path):
    header, size, length = HEADERS[case]
    path = forged.write_safetensors(tmp_path / 'c.safetensors', header, bytes(size), length)
    assert 'damaged or not a safetensors file' in refusal(read_checkpoint, path)


def test_a_safetensors_file_written_by_hand_is_read_where_it_does_not_lie(tmp_path):
    content = struct.pack('<2f', 1, 2)
    path = forged.write_safetensors(tmp_path / 'c.safetensors', {'__metadata__': {'a': 'b'}, 'a': _entry()}, content)
    assert torch.equal(read_checkpoint(path)['a'], torch.tensor([1.0, 2.0]))
