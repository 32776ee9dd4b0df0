"""The local cache of released weights: one model folder for each name.

    $CLUSTER_ZOO_HOME/           by default `cluster_zoo` in the folder of torch hub
      coc_small.in1k/            model.safetensors, config.json, README.md
      sha256.json                for each source that was used, the SHA-256 of its file at the first use
      downloads/                 what an interrupted download left, to resume from

A folder appears in one step, complete or not at all. Its config.json has the SHA-256 of the weights, which are compared
with it whenever they are read. Reading writes nothing.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError, one_line

__all__ = ['cached', 'check_digest', 'entry', 'exclusive', 'home', 'new_folder', 'say', 'sha256', 'verified_weights']

WEIGHTS = 'model.safetensors'


def home() -> Path:
    """The folder of the cache: ``CLUSTER_ZOO_HOME``, by default ``cluster_zoo`` in torch hub's folder."""
    named = os.environ.get('CLUSTER_ZOO_HOME')
    return (Path(named).expanduser() if named else Path(torch.hub.get_dir()) / 'cluster_zoo').absolute()


def entry(name: str, root: str | Path | None = None) -> Path:
    """The place of a name in the cache, whether it is there or not."""
    if not re.fullmatch(r'[a-z][a-z0-9_]*(\.[A-Za-z0-9][\w-]*)?', name):
        raise CheckpointError(f'{name!r} is no name of weights, such as coc_small.in1k.')
    return Path(root or home()) / name


def cached(name: str, root: str | Path | None = None) -> Path | None:
    """The model folder of a name in the cache; None if there is none."""
    path = entry(name, root)
    # A process that was killed while it replaced the folder has left the former one
    return next((folder for folder in (path, _former(path)) if (folder / WEIGHTS).is_file()), None)


def _former(path: Path) -> Path:
    return path.with_name(f'.old-{path.name}')


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of ``path`` in one step when the block ends without an error."""
    fresh, former = path.with_name(f'.new-{path.name}'), _former(path)
    try:
        if path.is_file():
            raise FileExistsError(errno.EEXIST, 'it is a file')
        shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
        fresh.mkdir(parents=True)
        yield fresh
        for file in fresh.iterdir():
            file.chmod(fresh.stat().st_mode & 0o666)  # safetensors writes for the user alone
            with file.open('rb') as written:
                os.fsync(written.fileno())
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
            path.rename(former)
        fresh.rename(path)
        shutil.rmtree(former, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """The error where a file or a folder of the cache cannot be written."""
    reason = getattr(error, 'strerror', None) or one_line(error)
    hint = ' CLUSTER_ZOO_HOME names another folder for the cache.' if path.is_relative_to(home()) else ''
    return CheckpointError(f"'{path}' cannot be written ({reason}).{hint}")


@contextmanager
def exclusive(name: str, root: str | Path | None = None) -> Iterator[None]:
    """One process at a time gets a name. Others wait and say so, and fail with it if it fails.

    The lock is a lease in a file: it needs no support of the file system, and one whose holder was stopped or killed
    expires after half a minute.
    """
    from filelock import SoftFileLease, Timeout  # of filelock 3.30: torch alone brings an older one

    folder = entry(name, root).parent / '.locks'
    lease, failure = SoftFileLease(folder / f'{name}.lease'), folder / f'{name}.failed'
    began, waited = time.time(), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lease.acquire(blocking=False)
        except Timeout:
            waited = True
            say(f'{name}: waiting for another process that is getting it')
            lease.acquire(poll_interval=0.1)
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    try:
        if waited and failure.is_file() and failure.stat().st_mtime >= began:
            raise CheckpointError(failure.read_text(encoding='utf-8'))
        try:
            yield
        except CheckpointError as error:
            with suppress(OSError):
                failure.write_text(str(error), encoding='utf-8')
            raise
    finally:
        lease.release()


def verified_weights(folder: Path) -> Path:
    """The weights file of a model folder, compared with the SHA-256 in its configuration if that has one."""
    files = [folder / WEIGHTS, folder / 'pytorch_model.bin', *sorted(folder.glob('*.safetensors'))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"'{folder}' holds no weights: no {WEIGHTS}.")
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        # transformers copies the entry to weights that it has trained further
        expected = None if 'transformers_version' in config else config.get('sha256')
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"'{folder / 'config.json'}' is damaged ({one_line(error)}).") from error
    if expected and file.name == WEIGHTS and (found := sha256(file)) != expected:
        raise CheckpointError(
            f"'{file.resolve()}' is damaged or was changed: its SHA-256 is {found}, and {expected} in config.json. "
            'Remove it and get it again.'
        )
    return file


def say(message: str) -> None:
    """One line on standard error."""
    print(f'cluster_zoo: {message}', file=sys.stderr, flush=True)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def check_digest(
    source: str, digest: str, root: str | Path | None = None, force: bool = False, pinned: str | None = None
) -> None:
    """Compare the SHA-256 of a source's file with the pinned one or that of its first use, or record it."""
    path = Path(root or home()) / 'sha256.json'
    try:
        records = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
        known, since = (pinned, 'as pinned') if pinned else (records.get(source), 'at the first use')
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is damaged ({error}). Remove it to start anew.") from error
    if known not in (None, digest):
        changed = f'{source} has changed: its SHA-256 was {known} {since} and is {digest} now'
        if not force:
            raise CheckpointError(f'{changed}. If you know why, accept it with cluster-zoo fetch NAME --force.')
        say(changed)
    if records.get(source) != digest:
        scratch = path.with_name(f'.sha256-{os.getpid()}.json')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(records | {source: digest}, indent=2, sort_keys=True) + '\n'
            scratch.write_text(content, encoding='utf-8')
            scratch.replace(path)
        except OSError as error:
            raise unwritable(path, error) from error
