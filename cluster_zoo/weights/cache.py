"""The local cache of downloaded weights, with one model folder for each name.

    $CLUSTER_ZOO_HOME/           default: `cluster_zoo` in the folder of torch.hub
      coc_small.in1k/            model.safetensors, config.json, README.md
      sha256.json                SHA-256 of each downloaded file at its first use
      downloads/                 incomplete downloads, which the next call resumes

A folder appears in one step, complete or not at all. Its config.json contains the SHA-256 of the weights, which is
checked whenever the weights are read. Reading never writes to the cache.
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

from safetensors import SafetensorError

from ..errors import CheckpointError, one_line
from ..files import replacing
from ..home import home

__all__ = ['cached', 'check_digest', 'entry', 'exclusive', 'new_folder', 'say', 'sha256', 'verified_weights']

WEIGHTS = 'model.safetensors'


def entry(name: str, root: str | Path | None = None) -> Path:
    """Returns the path of a model folder in the cache, which need not exist."""
    if not re.fullmatch(r'[a-z][a-z0-9_]*(\.[A-Za-z0-9][\w-]*)?', name):
        raise CheckpointError(f'{name!r} is no name of weights, such as coc_small.in1k.')
    return Path(root or home()) / name


def cached(name: str, root: str | Path | None = None) -> Path | None:
    """Returns the model folder of a name if the cache contains it, else None."""
    path = entry(name, root)
    # If a process was killed while it replaced the folder, only the previous one exists
    return next((folder for folder in (path, _previous(path)) if (folder / WEIGHTS).is_file()), None)


def _previous(path: Path) -> Path:
    return path.with_name(f'.old-{path.name}')


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, and moves it to ``path`` in one step if the block ends without an error."""
    fresh, previous = path.with_name(f'.new-{path.name}'), _previous(path)
    try:
        if path.is_file():
            raise FileExistsError(errno.EEXIST, 'it is a file')
        shutil.rmtree(fresh, ignore_errors=True)  # left by a process that was killed
        fresh.mkdir(parents=True)
        yield fresh
        for file in fresh.iterdir():
            file.chmod(fresh.stat().st_mode & 0o666)  # safetensors makes its files readable for the user only
            with file.open('rb') as written:
                os.fsync(written.fileno())
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        fresh.rename(path)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """Returns the error for a file or a folder that cannot be written."""
    reason = getattr(error, 'strerror', None) or one_line(error)
    hint = ' Set CLUSTER_ZOO_HOME to use another folder for the cache.' if path.is_relative_to(home()) else ''
    return CheckpointError(f"'{path}' cannot be written ({reason}).{hint}")


@contextmanager
def exclusive(name: str, root: str | Path | None = None) -> Iterator[None]:
    """Lets one process at a time install a name. The others wait, and raise the same error if it fails.

    The lock is a lease in a file. It works on any file system and expires half a minute after its owner is killed.
    """
    from filelock import SoftFileLease, Timeout  # filelock >= 3.30; the one that torch installs may be older

    folder = entry(name, root).parent / '.locks'
    lease, failure = SoftFileLease(folder / f'{name}.lease'), folder / f'{name}.failed'
    began, waited = time.time(), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lease.acquire(blocking=False)
        except Timeout:
            waited = True
            say(f'{name}: waiting for another process that installs it')
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
    """Returns the weight file of a model folder after checking it against the SHA-256 in ``config.json``, if any."""
    files = [folder / WEIGHTS, folder / 'pytorch_model.bin', *sorted(folder.glob('*.safetensors'))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"'{folder}' contains no weights: no {WEIGHTS}.")
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        # transformers keeps the entry when it saves weights that it has trained further
        expected = None if 'transformers_version' in config else config.get('sha256')
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"'{folder / 'config.json'}' is damaged ({one_line(error)}).") from error
    if expected and file.name == WEIGHTS and (found := sha256(file)) != expected:
        raise CheckpointError(
            f"'{file.resolve()}' is damaged or was changed: its SHA-256 is {found}, and {expected} in config.json. "
            'Remove it and download it again.'
        )
    return file


def say(message: str) -> None:
    """Prints one line to standard error."""
    print(f'cluster_zoo: {message}', file=sys.stderr, flush=True)


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_digest(
    source: str, digest: str, root: str | Path | None = None, force: bool = False, pinned: str | None = None
) -> None:
    """Compares the SHA-256 of a download with the pinned one or with that of its first use, and records it.

    A different SHA-256 raises `CheckpointError`; with ``force`` it is accepted and reported on standard error.
    """
    path = Path(root or home()) / 'sha256.json'
    try:
        records = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
        recorded = records.get(source)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is damaged ({error}). Remove it to record every SHA-256 again.") from error
    expected = pinned or recorded
    if expected not in (None, digest):
        when = 'as pinned' if pinned else 'at the first use'
        changed = f'{source} has changed: its SHA-256 was {expected} {when} and is {digest} now'
        if not force:
            raise CheckpointError(f'{changed}. If this is expected, accept it with cluster-zoo fetch NAME --force.')
        say(changed)
    if recorded != digest:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(records | {source: digest}, indent=2, sort_keys=True) + '\n'
            with replacing(path) as scratch:
                scratch.write_text(content, encoding='utf-8')
        except OSError as error:
            raise unwritable(path, error) from error
