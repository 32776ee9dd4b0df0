"""Weights as the papers' authors published them: Google Drive folders, downloaded with gdown and converted.

Nothing is downloaded unless the user agrees: ``cluster-zoo fetch``, or ``CLUSTER_ZOO_AUTHORS=1`` for
``timm.create_model(name, pretrained=True)``.
"""

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm

from . import store, tags
from .untrusted import check_archive, is_archive
from .untrusted.errors import reason
from .weights import CheckpointError

__all__ = ['allowed', 'fetch', 'is_folder', 'publication']

_FOLDER = re.compile(r'https://drive\.google\.com/drive/folders/([\w-]+)')
_SUFFIXES = ('.pth.tar', '.pth', '.pt', '.bin', '.ckpt', '.safetensors')
_OTHER_TASKS = {'detection', 'det', 'segmentation', 'seg', 'coco', 'ade20k', 'fpn', 'rcnn', 'scanobjectnn'}
_TIMEOUT = 60  # seconds without a byte
_RETRIES = 3


def allowed() -> bool:
    """Whether ``CLUSTER_ZOO_AUTHORS=1`` allows downloads without a question."""
    return os.environ.get('CLUSTER_ZOO_AUTHORS') == '1'


def is_folder(url: Any) -> bool:
    """Whether an address is that of a Drive folder."""
    return isinstance(url, str) and _FOLDER.fullmatch(url) is not None


def publication(name: str) -> str | None:
    """Address of the folder in which authors published the weights of a tag; None if they published none."""
    cfg = timm.models.get_pretrained_cfg(name)
    return cfg.url if cfg and is_folder(cfg.url) else None


def fetch(
    name: str,
    member: str | None = None,
    force: bool = False,
    progress: bool = True,
    root: str | Path | None = None,
) -> Path:
    """Download what the authors published for a tag, convert it, and put it into the store.

    Several processes may ask at once: one downloads, the others wait. An interrupted download goes on where it ended.

    Args:
        name: A tag with a `publication`.
        member: File of the folder, as a path in it, where its names do not tell which one it is.
        force: Download again, replace the store's entry, and accept a file other than the one first used.
        progress: Show progress on standard error.
        root: The store's folder, see `store.folder`.

    Returns:
        The store's model folder.

    Raises:
        CheckpointError: There is no publication, gdown is missing, or the download failed or is not the tag's model.
    """
    url = publication(name)
    if url is None:
        raise CheckpointError(f'The authors have published no weights for {name}.')
    target = store.folder(name, root)
    with store.lock(name, root):
        if not force and target.exists():
            try:
                store.verified_weights(target)
                return target
            except CheckpointError:  # damaged: it is replaced
                pass
        file_id, path = _choose(name, _list(url), member)
        downloaded = _download(file_id, path, target.parent / 'downloads', progress)
        _adopt(downloaded, name, url, (file_id, path), force, root)
        return store.folder(name, root)  # no longer where it may have stood since a process was killed


def _adopt(downloaded: Path, name: str, url: str, origin: tuple[str, str], force: bool, root: Any) -> None:
    """From a downloaded file to an entry of the store. The file is of no use afterwards, whatever came of it."""
    from .importing import import_checkpoint  # which knows models, as this does not at import time

    file_id, path = origin
    source = f'drive:{file_id}'
    try:
        _check_sums(downloaded, path)
        digest, known = store.sha256(downloaded), store.recorded(source, root)
        if known not in (None, digest) and not force:
            raise CheckpointError(
                f"'{path}' of {url} was refused: its SHA-256 is {digest} and was {known} when it was first used. "
                'If you know why the authors have changed it, --force accepts the new one.'
            )
        origin = dict(url=url, file=path, drive_id=file_id, sha256=digest)
        import_checkpoint(downloaded, name, replace=True, source=origin, root=root)
        store.record(source, digest, root)
    finally:
        downloaded.unlink(missing_ok=True)


def _check_sums(downloaded: Path, path: str) -> None:
    """Look at the checksums of a zip file's entries, as PyTorch never does.

    Nothing else tells a weight that was damaged on its way from a true one, or a file whose first half is of another
    version than its second: gdown goes on with what an earlier download left, whatever has changed in the meantime.
    """
    if not zipfile.is_zipfile(downloaded) or is_archive(downloaded):  # of which the latter is unpacked with such a look
        return
    check_archive(downloaded)  # or reading all of it might not be harmless
    with zipfile.ZipFile(downloaded) as archive:
        entry = archive.testzip()
    if entry is not None:
        raise CheckpointError(f"'{path}' was damaged on its way: the checksum of '{entry}' is another. Try again.")


def _list(url: str) -> list[tuple[str, str]]:
    """The files of a Drive folder and of those in it: identifiers and paths."""
    with _gdown(url) as gdown:
        files = gdown.download_folder(
            url, skip_download=True, quiet=True, use_cookies=False, timeout=_TIMEOUT, output=os.curdir
        )
    if not files:
        raise CheckpointError(f'{url} shows no files: it may not be public any more. Look at it in a browser.')
    return [(file.id, Path(file.path).as_posix()) for file in files]


def _choose(name: str, files: list[tuple[str, str]], member: str | None) -> tuple[str, str]:
    """The checkpoint that belongs to a tag, told by its path."""
    offered = ', '.join(path for _, path in files) or 'nothing'
    if member is not None:
        found = [(file_id, path) for file_id, path in files if path == member]
        if len(found) != 1:
            raise CheckpointError(f"The authors' folder has {len(found)} files '{member}'; it holds {offered}.")
        return found[0]

    architecture = name.partition('.')[0]
    found = [(file_id, path) for file_id, path in files if path.lower().endswith(_SUFFIXES)]
    found = [(file_id, path) for file_id, path in found if architecture in (_named(path) or {architecture})]
    for keep in (
        lambda path: not _words(path) & _OTHER_TASKS,
        lambda path: architecture in _named(path),  # where one folder has several models
        lambda path: {architecture.split('_')[-1]} <= _words(path),
        lambda path: 'best' in _words(path),
        lambda path: 'last' in _words(path),
    ):
        kept = [(file_id, path) for file_id, path in found if keep(path)]
        found = kept or found
    if len(found) != 1:
        raise CheckpointError(
            f"Which file of the authors' folder is {name}? It holds {offered}. Name one: "
            f'cluster-zoo fetch {name} --file PATH'
        )
    return found[0]


def _words(path: str) -> set[str]:
    return set(re.split(r'[^a-z0-9]+', path.lower()))


def _named(path: str) -> set[str]:
    """The architectures that a path names. Where a name is part of another, the longer one is meant."""
    words = _words(path)
    found = {name: set(name.split('_')) for name in tags.our_models() if words.issuperset(name.split('_'))}
    return {name for name, own in found.items() if not any(own < others for others in found.values())}


def _download(file_id: str, path: str, folder: Path, progress: bool) -> Path:
    """Download a file of Google Drive, under a name that the server has no part in."""
    suffix = next((suffix for suffix in _SUFFIXES if path.lower().endswith(suffix)), '.pth')
    output = folder / f'{re.sub("[^A-Za-z0-9_-]", "", file_id)}{suffix}'
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        left = [*folder.glob(f'{output.name}*.part')]  # by a download that was interrupted
        try:
            with _gdown(f"'{path}'") as gdown:
                gdown.download(
                    id=file_id,
                    output=str(output),
                    quiet=not progress,
                    use_cookies=False,
                    resume=True,
                    timeout=_TIMEOUT,
                    retries=_RETRIES,
                )
            return output
        except CheckpointError as error:
            if not left or 'byte range' not in str(error):
                raise
            for part in left:  # complete already, or too long: gdown would try in vain to go on from it for ever
                part.unlink(missing_ok=True)


@contextmanager
def _gdown(what: str) -> Iterator[Any]:
    """The gdown module, all of whose errors become `CheckpointError`."""
    try:
        import gdown
    except ImportError as error:
        raise CheckpointError("Downloads from Google Drive need gdown: pip install 'cluster_zoo[authors]'.") from error
    try:
        yield gdown
    except Exception as error:  # gdown's, those of requests under it, and what a page that it cannot read causes
        raise CheckpointError(f'{what} could not be downloaded from drive.google.com: {reason(error)}') from error
