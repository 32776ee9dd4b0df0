"""The local store: weights that were fetched or imported once, as folders in timm's hub layout.

    $CLUSTER_ZOO_HOME/                  by default the folder `cluster_zoo` beside torch hub's checkpoints
      coc_small.in1k/                   model.safetensors, config.json, README.md: a model folder
      sha256.json                       of every source that was used, the SHA-256 that its file had then
      downloads/                        what an interrupted download left, to go on from

A folder appears in one step, complete, or not at all. Where its config.json has the SHA-256 of the weights, as it does
in every folder that this package writes, the weights are compared with it whenever they are read. One process at a time
writes an entry. Nothing is written where weights are only read.

An entry is replaced in two steps: the former folder is renamed to `.old-NAME`, the new one to NAME. A reader that looks
in between waits a moment for the new one; after a crash in between it is given the former one, which the next process
to write the entry puts back.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from timm.models import DefaultCfg, PretrainedCfg

from . import tags
from .untrusted import read_config_file
from .weights import CheckpointError

__all__ = [
    'add_stored_tags',
    'check_first_use',
    'entries',
    'folder',
    'home',
    'new_folder',
    'read_config',
    'verified_weights',
]

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
CARD = 'README.md'

_NAME = re.compile(r'([a-z][a-z0-9_]*)\.([A-Za-z0-9][A-Za-z0-9_-]*)')  # an architecture and a tag, and so no path
_RECORDS = 'sha256.json'
_logger = logging.getLogger(__name__)


def home() -> Path:
    """The store's folder: ``CLUSTER_ZOO_HOME``, by default ``cluster_zoo`` in torch hub's folder. It need not exist.

    The path is absolute, so that weights found by it are found later too, wherever the process has gone.
    """
    named = os.environ.get('CLUSTER_ZOO_HOME')
    return (Path(named).expanduser() if named else Path(torch.hub.get_dir()) / 'cluster_zoo').absolute()


def folder(name: str, root: str | Path | None = None) -> Path:
    """Where the store has, or would have, a model folder.

    Args:
        name: Architecture and tag, such as ``'coc_small.in1k'``.
        root: The store's folder; `home` if None.

    Raises:
        ValueError: The name is not of that form.
    """
    return _present(_target(name, root))


def _target(name: str, root: str | Path | None) -> Path:
    """Where an entry belongs."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' is no name for weights: expected an architecture and a tag, such as coc_small.in1k; "
            'a tag is made of letters, digits, - and _.'
        )
    return Path(root or home()) / name


def _present(path: Path) -> Path:
    """Where an entry is to be read: its folder, or the former one if another was about to take its place."""
    former = _former(path)
    if os.path.lexists(path) or not former.is_dir():
        return path
    time.sleep(0.1)  # two renames take less, unless the process was killed
    return path if os.path.lexists(path) else former


def _former(path: Path) -> Path:
    """The name that an entry's folder has while another takes its place. No entry can be called so."""
    return path.with_name(f'.old-{path.name}')


def entries(root: str | Path | None = None) -> dict[str, Path]:
    """The store's model folders by name, in alphabetical order. None if there is no store."""
    try:
        names = {path.name.removeprefix('.old-') for path in Path(root or home()).iterdir()}
    except OSError:
        return {}
    found = {name: folder(name, root) for name in sorted(names) if _NAME.fullmatch(name)}
    return {name: path for name, path in found.items() if (path / CONFIG).is_file()}


def read_config(path: Path, architecture: str | None = None) -> dict[str, Any]:
    """The configuration of a model folder.

    Args:
        path: The folder.
        architecture: The one that it has to be of; None for any that timm knows.

    Raises:
        CheckpointError: It is missing, is not JSON, or holds what no configuration may.
    """
    return read_config_file(Path(path) / CONFIG, architecture)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    for block in iter(lambda: file.read(1 << 20), b''):
        digest.update(block)
    return digest.hexdigest()


def verified_weights(path: Path) -> Path:
    """The weights file of a model folder, after a look at its SHA-256 if the configuration has one.

    Raises:
        CheckpointError: There is no such file, or it is not the one that was written.
    """
    path = Path(path)
    weights = path / WEIGHTS
    try:
        config = read_config(path)
        # transformers copies the key to weights that it has trained further.
        expected = None if 'transformers_version' in config else config.get('sha256')
        if not weights.is_file():
            raise CheckpointError(f"'{path}' holds no {WEIGHTS}.")
        if expected and sha256(weights) != expected:
            raise CheckpointError(f"'{weights}' is damaged: its SHA-256 is not {expected}, which {CONFIG} has.")
    except CheckpointError as error:
        if path.parent == home() and _NAME.fullmatch(path.name):
            raise CheckpointError(f'{error} {_remedy(path.name)}') from error
        raise
    return weights


def _remedy(name: str) -> str:
    """How a damaged entry is replaced."""
    command = f'fetch {name}' if tags.is_published(name) else f'import FILE --as {name} --force'
    return f'To have it anew: cluster-zoo {command}'


@contextmanager
def lock(name: str, root: str | Path | None = None) -> Iterator[None]:
    """One process at a time writes an entry: others wait here. The same process may enter again.

    Args:
        name: See `folder`, or a file of the store.
        root: See `folder`.

    Raises:
        CheckpointError: The store cannot be written to.
    """
    path = Path(root or home()) / '.locks' / f'{name}.lock'
    if path.is_symlink():
        raise CheckpointError(f"'{path}' is a link, and nothing is written where it leads. Remove it.")
    with _writing(root):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, is_singleton=True).acquire()
    with held:
        yield


@contextmanager
def _writing(root: str | Path | None) -> Iterator[None]:
    """No permission, no room: one message, whichever of the libraries that write meets it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The store '{root or home()}' can not be written to ({getattr(error, 'strerror', None) or error}). "
            'Change that, or let CLUSTER_ZOO_HOME name a folder that can be written to.'
        ) from error


@contextmanager
def new_folder(name: str, root: str | Path | None = None, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes the store's entry in one step when the block ends without an error.

    Args:
        name: See `folder`.
        root: See `folder`.
        replace: Take the place of an entry that exists.

    Raises:
        CheckpointError: The entry exists and is not to be replaced, or the store cannot be written to.
    """
    target = _target(name, root)
    with lock(name, root), _writing(root):
        scratch = target.with_name(f'.new-{name}')
        _tidy(scratch, target)
        if os.path.lexists(target) and not replace:
            raise CheckpointError(f"The store has {name} already, at '{target}'. With --force it is replaced.")
        try:
            fresh = scratch / name
            fresh.mkdir(parents=True)
            yield fresh
            for path in fresh.iterdir():
                _flush(path)
            _put(fresh, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _tidy(scratch: Path, target: Path) -> None:
    """Puts back or removes what a process left that was killed."""
    former = _former(target)
    if os.path.lexists(former):
        _remove(former) if os.path.lexists(target) else former.rename(target)
    if scratch.exists():
        shutil.rmtree(scratch)


def _put(fresh: Path, target: Path) -> None:
    """Gives a folder its name; what had the name before comes back if that fails."""
    former = _former(target)
    if os.path.lexists(target):
        target.rename(former)
    try:
        fresh.rename(target)
    except OSError:
        if os.path.lexists(former):
            former.rename(target)
        raise
    _remove(former)


def _remove(path: Path) -> None:
    """A folder, or what somebody has put in the place of one: a file, a link."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """On the disk before it gets its name, so that a crash leaves no empty file under it."""
    with open(path, 'rb') as file:
        os.fsync(file.fileno())


def recorded(source: str, root: str | Path | None = None) -> str | None:
    """The SHA-256 that the file of a source had when it was first used; None if it was not.

    Raises:
        CheckpointError: The store's records are damaged.
    """
    return _records(root).get(source)


def _records(root: str | Path | None) -> dict[str, str]:
    path = Path(root or home()) / _RECORDS
    try:
        records = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(records, dict):
            raise ValueError(f'a {type(records).__name__}')
        return records
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' can not be read ({error}): mend it, or remove it to start anew.") from error


def record(source: str, digest: str, root: str | Path | None = None) -> None:
    """Remember the SHA-256 of a source's file, in place of another if there is one.

    Raises:
        CheckpointError: The store cannot be written to, or its records are damaged.
    """
    with lock(_RECORDS, root), _writing(root):
        records = _records(root) | {source: digest}
        write_atomically(Path(root or home()) / _RECORDS, json.dumps(records, indent=2, sort_keys=True) + '\n')


def check_first_use(source: str, path: Path) -> None:
    """Compare a file's SHA-256 with what it was when its source was first used, or remember it.

    Args:
        source: What the records call it.
        path: The file.

    Raises:
        CheckpointError: It is another file, or the store's records are damaged.
    """
    digest, known = sha256(path), recorded(source)
    if known not in (None, digest):
        raise CheckpointError(
            f"'{path}' was refused: its SHA-256 is {digest}, and was {known} when {source} was first used. If you know "
            f"why it has changed, remove that line from '{home() / _RECORDS}'."
        )
    if known is None:
        with suppress(CheckpointError):  # a store that cannot be written to remembers nothing
            record(source, digest)


def write_atomically(path: Path, text: str) -> None:
    """A text file that is there with all of its content, or as it was before."""
    scratch = path.with_name(f'.{path.name}-{os.getpid()}')
    try:
        with open(scratch, 'w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def add_stored_tags(default_cfgs: dict[str, DefaultCfg]) -> None:
    """Adds the store's own tags of these architectures, so that timm knows them by name.

    A tag that the package has is left alone, and no default changes: what a name without a tag means does not depend on
    what is in the store. An entry that cannot be read is left out with a warning.
    """
    for name, path in entries().items():
        architecture, _, tag = name.partition('.')
        known = default_cfgs.get(architecture)
        if known is None or tag in known.cfgs:
            continue
        try:
            cfg = _pretrained_cfg(path, architecture) | dict(file=str(_target(name, None) / WEIGHTS))
        except CheckpointError as error:
            _logger.warning(f'{name} of the local store is left out: {error}')
            continue
        known.tags.append(tag)
        known.cfgs[tag] = PretrainedCfg(**cfg)


def _pretrained_cfg(path: Path, architecture: str) -> dict[str, Any]:
    """timm's pretrained configuration of a model folder."""
    config = read_config(path, architecture)
    named = {key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if key in config}
    return config['pretrained_cfg'] | named
