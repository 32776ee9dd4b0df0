"""Downloads: the authors' files on Google Drive, through gdown, and model folders on the Hugging Face Hub.

``pretrained=True`` is the consent to a download, as in timm. ``CLUSTER_ZOO_AUTHORS=0`` forbids those from the authors,
``HF_HUB_OFFLINE=1`` all. No organization of the Hub is asked unless ``CLUSTER_ZOO_HUB`` or ``hf-hub:`` names it.
"""

import os
import re
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..errors import CheckpointError, one_line
from . import cache, metadata
from .archives import SUFFIXES
from .cache import WEIGHTS
from .configs import CONFIG

__all__ = ['fetch', 'hub_folder', 'is_drive', 'organization']

_DRIVE = re.compile(r'https://drive\.google\.com/(?:drive/folders|file/d)/([\w-]+)')
_TIMEOUT = (5.0, 60.0)  # seconds to connect, and without a byte
_RETRIES = 3
# Words in the paths of files for other tasks and data
_DETECTION = {'detection', 'det', 'coco', 'rcnn', 'scanobjectnn'}
_SEGMENTATION = {'segmentation', 'seg', 'ade20k', 'fpn'}
_SMALL_DATA = {'cifar', 'cifar10', 'cifar100'}


def is_drive(url: object) -> bool:
    """Whether an address is that of a file or a folder on Google Drive."""
    return isinstance(url, str) and _DRIVE.fullmatch(url) is not None


def fetch(
    name: str,
    url: str,
    install: Callable[[Path, Path, dict[str, str]], None],
    member: str | None = None,
    force: bool = False,
    root: str | Path | None = None,
) -> Path:
    """The authors' weights of a name: from the cache, or downloaded, checked and put there.

    Args:
        name: What the cache calls them.
        url: A file on Google Drive, or the folder that has the file.
        install: Converts the downloaded file: called with the file, an empty folder and where the file comes from.
        member: Path of the file in the folder, where the names in it do not tell which one is meant.
        force: Download again, and accept a file whose SHA-256 has changed.
        root: Folder of the cache.

    Returns:
        The model folder in the cache.

    Raises:
        CheckpointError: Downloads are forbidden or fail, it is not clear which file is meant, or the file is refused.
    """
    if found := None if force else cache.cached(name, root):
        return found
    if _offline() or os.environ.get('CLUSTER_ZOO_AUTHORS') == '0':
        setting = 'HF_HUB_OFFLINE' if _offline() else 'CLUSTER_ZOO_AUTHORS=0'
        raise CheckpointError(f'{name} is not in the cache, and {setting} forbids to download it from {url}.')
    with cache.exclusive(name, root):
        if found := None if force else cache.cached(name, root):  # by another process in the meantime
            return found
        check_network('https://drive.google.com')
        pinned_id, pinned = metadata.PINS.get(name, (None, None))
        file_id, path = (pinned_id, member) if pinned_id and not member else _choose(name, url, member)
        state = 'its SHA-256 is pinned' if pinned else 'no SHA-256 is pinned: it is recorded at the first use'
        cache.say(f'downloading {name} ({path or file_id}) from {url}; {state}')
        target = cache.entry(name, root)
        file = _download(file_id, path or '', target.parent / 'downloads')
        try:
            digest = cache.sha256(file)
            with cache.new_folder(target) as folder:
                install(file, folder, dict(url=url, file=path or '', drive_id=file_id, sha256=digest))
                cache.check_digest(f'drive:{file_id}', digest, root, force, pinned)
        finally:
            file.unlink(missing_ok=True)
    return target


def check_network(url: str) -> None:
    """Raise `CheckpointError` within seconds if a server cannot be reached, as libraries that retry do not.

    Any answer is one: of the server, of a proxy, of one whose certificate only the download knows to trust.
    """
    outcome: list[object] = ['no answer within 8 s']

    def ask() -> None:
        try:
            build_opener().open(Request(url, method='HEAD'), timeout=5).close()  # with the proxies of now
            outcome[0] = None
        except TimeoutError as error:
            outcome[0] = error
        except Exception as error:
            unreachable = type(error) is URLError and not isinstance(error.reason, ssl.SSLError)
            outcome[0] = error.reason if unreachable else None

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(8)
    if outcome[0] is not None:
        raise CheckpointError(
            f'{urlsplit(url).hostname} cannot be reached: {one_line(outcome[0])}. Is there a network?'
        )


def _choose(name: str, url: str, member: str | None) -> tuple[str, str]:
    """Identifier and path of the file that has the weights of a name."""
    file_id = _DRIVE.fullmatch(url)[1]
    if '/file/' in url:
        return file_id, ''
    import gdown

    try:
        listed = gdown.download_folder(
            url, skip_download=True, quiet=True, use_cookies=False, timeout=_TIMEOUT, output=os.curdir
        )
    except Exception as error:  # of gdown, of requests, and of pages that gdown cannot read
        raise CheckpointError(f'{url} cannot be listed: {one_line(error)}') from error
    files = [(Path(file.path).as_posix(), file.id) for file in listed or ()]
    found = _matching(name, [path for path, _ in files]) if member is None else [p for p, _ in files if p == member]
    if len(found) != 1:
        offered = ', '.join(one_line(path) for path, _ in files) or 'no files that can be seen'
        raise CheckpointError(
            f"Which file of {url} is {name}? It has {offered}. Name one: cluster-zoo fetch {name} --file 'PATH'"
        )
    return dict(files)[found[0]], found[0]


def _matching(name: str, paths: list[str]) -> list[str]:
    """The paths of a folder that can be the file of a name; one, if their words decide it."""
    models = {frozenset(model.split('_')) - {'dnc'} for model in metadata.package_models()}

    def named(path: str) -> set[frozenset[str]]:  # where one name is part of another, the longer one is meant
        found = {model for model in models if model <= _words(path)}
        return {model for model in found if not any(model < other for other in found)}

    own, segmenter = named(name), '.' not in name
    others = {word for model in models for word in model if not word.isdigit()} | _SMALL_DATA
    others = others - _words(name) | _DETECTION | (set() if segmenter else _SEGMENTATION)
    found = [
        path
        for path in paths
        if path.lower().endswith(SUFFIXES) and not _words(path) & others and named(path) in (own, set())
    ]
    for keep in (
        lambda path: named(path) == own,
        lambda path: name.partition('.')[0].split('_')[-1] in _words(path),
        lambda path: bool(_words(path) & _SEGMENTATION) == segmenter,
        lambda path: 'best' in _words(path),
        lambda path: 'last' in _words(path),
    ):
        found = list(filter(keep, found)) or found
    return found


def _words(path: str) -> set[str]:
    # A model for CIFAR-10 has cifar in its name
    return set(re.split(r'[^a-z0-9]+', path.lower().replace('cifar1', 'cifar cifar1')))


def _download(file_id: str, path: str, folder: Path) -> Path:
    """Download a file of Google Drive to a name that the server has no part in; resume what was interrupted."""
    import gdown

    output = folder / re.sub(r'[^\w-]', '', file_id)
    left = [*folder.glob(f'{output.name}*.part')]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        gdown.download(
            id=file_id,
            output=str(output),
            quiet=not sys.stderr.isatty(),
            use_cookies=False,
            resume=True,
            timeout=_TIMEOUT,
            retries=_RETRIES,
        )
    except Exception as error:  # of gdown, of requests, and of pages that gdown cannot read
        if isinstance(error, OSError) and error.errno:  # which errors of requests do not have
            raise cache.unwritable(folder, error) from error
        if not (left and 'byte range' in str(error)):
            raise CheckpointError(
                f"'{path or file_id}' cannot be downloaded from Google Drive: {one_line(error)}"
            ) from error
        for part in left:  # is complete already or longer than the file: it cannot be resumed
            part.unlink(missing_ok=True)
        return _download(file_id, path, folder)
    return output


def organization() -> str | None:
    """The organization of the Hugging Face Hub that ``CLUSTER_ZOO_HUB`` names; None if it names none."""
    named = os.environ.get('CLUSTER_ZOO_HUB', '').strip()
    if named and not re.fullmatch(r'[A-Za-z0-9][\w.-]*', named):
        raise CheckpointError(f'CLUSTER_ZOO_HUB={named!r} is no name of an organization, such as my-lab.')
    return named or None


def hub_folder(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """A model folder on the Hugging Face Hub, through its client's cache."""
    local, reason = _offline(), None
    try:
        local or check_network(huggingface_hub.constants.ENDPOINT)
    except CheckpointError as error:
        local, reason = True, error  # what was downloaded before is used

    def get(filename: str, revision: str | None) -> Path:
        options = dict(revision=revision, cache_dir=cache_dir, local_files_only=local)
        return Path(huggingface_hub.hf_hub_download(repo_id, filename, **options))

    try:
        folder = get(CONFIG, revision).parent
        try:
            get(WEIGHTS, folder.name)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not local:
                raise  # trouble with these weights, in the place of which no others are taken
            get('pytorch_model.bin', folder.name)
    except Exception as error:  # of the client, or of the HTTP library under it
        said = one_line(reason or error.__cause__ or error)
        raise CheckpointError(f'{repo_id} on the Hugging Face Hub cannot be had: {said}') from error
    return folder


def _offline() -> bool:
    return os.environ.get('HF_HUB_OFFLINE', '').upper() in ('1', 'ON', 'YES', 'TRUE')
