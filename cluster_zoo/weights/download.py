"""Downloads of the authors' files from Google Drive and of model folders from the Hugging Face Hub.

``pretrained=True`` allows downloads, as in timm. ``CLUSTER_ZOO_AUTHORS=0`` forbids those from Google Drive and
``HF_HUB_OFFLINE=1`` all. Only organizations that ``CLUSTER_ZOO_HUB`` or ``hf-hub:`` name are asked on the Hub.
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
_TIMEOUT = (5.0, 60.0)  # seconds to connect, and between two packets
_RETRIES = 3
# Words in the paths of files for other tasks and datasets
_DETECTION = {'detection', 'det', 'coco', 'rcnn', 'scanobjectnn'}
_SEGMENTATION = {'segmentation', 'seg', 'ade20k', 'fpn'}
_SMALL_DATA = {'cifar', 'cifar10', 'cifar100'}


def is_drive(url: object) -> bool:
    """Whether a value is the address of a file or a folder on Google Drive."""
    return isinstance(url, str) and _DRIVE.fullmatch(url) is not None


def fetch(
    name: str,
    url: str,
    install: Callable[[Path, Path, dict[str, str]], None],
    member: str | None = None,
    force: bool = False,
    root: str | Path | None = None,
) -> Path:
    """Returns the authors' weights for a name from the cache, and downloads them if necessary.

    Args:
        name: Name in the cache.
        url: A file on Google Drive, or the folder that contains it.
        install: Function that converts the downloaded file. Its arguments are the file, an empty folder to fill and the
            origin of the file.
        member: Path of the file in the folder, if the name does not determine it.
        force: Download again, and accept a file whose SHA-256 has changed.
        root: Folder of the cache.

    Returns:
        The model folder in the cache.

    Raises:
        CheckpointError: Downloads are forbidden or fail, the file cannot be determined, or it is refused.
    """
    if not force and (found := cache.cached(name, root)):
        return found
    if _offline() or os.environ.get('CLUSTER_ZOO_AUTHORS') == '0':
        setting = 'HF_HUB_OFFLINE' if _offline() else 'CLUSTER_ZOO_AUTHORS=0'
        raise CheckpointError(f'{name} is not in the cache, and {setting} forbids the download from {url}.')
    with cache.exclusive(name, root):
        if not force and (found := cache.cached(name, root)):  # another process has installed it
            return found
        if problem := _connection_problem('https://drive.google.com'):
            raise CheckpointError(problem)
        pinned_id, pinned = metadata.PINS.get(name, (None, None))
        file_id, path = (pinned_id, member) if pinned_id and not member else _find_file(name, url, member)
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


def _connection_problem(url: str) -> str | None:
    """Returns why a server does not respond, within seconds. The libraries for downloads retry for minutes.

    Any response counts, such as an error of a proxy, or a certificate that only the library for downloads trusts.
    """
    problem: list[object] = ['no answer within 8 s']

    def connect() -> None:
        try:
            build_opener().open(Request(url, method='HEAD'), timeout=5).close()  # uses the current proxy settings
            problem[0] = None
        except TimeoutError as error:
            problem[0] = error
        except Exception as error:
            no_response = type(error) is URLError and not isinstance(error.reason, ssl.SSLError)
            problem[0] = error.reason if no_response else None

    thread = threading.Thread(target=connect, daemon=True)  # because resolving a host name has no time limit
    thread.start()
    thread.join(8)
    host, reason = urlsplit(url).hostname, problem[0]
    return None if reason is None else f'{host} cannot be reached: {one_line(reason)}. Check the network.'


def _find_file(name: str, url: str, member: str | None) -> tuple[str, str]:
    """Returns the Google Drive id and the path of the file for a name."""
    drive_id = _DRIVE.fullmatch(url)[1]
    if '/file/' in url:
        return drive_id, ''
    import gdown

    try:
        listed = gdown.download_folder(
            url, skip_download=True, quiet=True, use_cookies=False, timeout=_TIMEOUT, output=os.curdir
        )
    except Exception as error:  # of gdown, of requests, or for a page that gdown cannot parse
        raise CheckpointError(f'{url} cannot be listed: {one_line(error)}') from error
    files = [(Path(file.path).as_posix(), file.id) for file in listed or ()]
    names = [path for path, _ in files]
    found = _matching(name, names) if member is None else [path for path in names if path == member]
    if len(found) != 1:
        offered = ', '.join(map(one_line, names)) or 'no visible files'
        raise CheckpointError(
            f'The file of {name} in {url} cannot be determined. The folder has {offered}. Select one: '
            f"cluster-zoo fetch {name} --file 'PATH'"
        )
    return dict(files)[found[0]], found[0]


def _matching(name: str, paths: list[str]) -> list[str]:
    """Returns the paths that can contain the weights of a name; only one if the words in the paths determine it."""
    models = {frozenset(model.split('_')) - {'dnc'} for model in metadata.package_models()}

    def models_in(path: str) -> set[frozenset[str]]:  # without names that are part of a longer name
        found = {model for model in models if model <= _words(path)}
        return {model for model in found if not any(model < other for other in found)}

    own, is_segmenter = models_in(name), '.' not in name
    others = {word for model in models for word in model if not word.isdigit()} | _SMALL_DATA
    others = others - _words(name) | _DETECTION | (set() if is_segmenter else _SEGMENTATION)
    found = [
        path
        for path in paths
        if path.lower().endswith(SUFFIXES) and not _words(path) & others and models_in(path) in (own, set())
    ]
    for prefers in (
        lambda path: models_in(path) == own,
        lambda path: name.partition('.')[0].split('_')[-1] in _words(path),
        lambda path: bool(_words(path) & _SEGMENTATION) == is_segmenter,
        lambda path: 'best' in _words(path),
        lambda path: 'last' in _words(path),
    ):
        found = list(filter(prefers, found)) or found
    return found


def _words(path: str) -> set[str]:
    # The names of models for CIFAR-10 contain `cifar`
    return set(re.split(r'[^a-z0-9]+', path.lower().replace('cifar1', 'cifar cifar1')))


def _download(file_id: str, path: str, folder: Path) -> Path:
    """Downloads a file from Google Drive, or resumes its download. The server does not influence the file name."""
    import gdown

    output = folder / re.sub(r'[^\w-]', '', file_id)
    incomplete = [*folder.glob(f'{output.name}*.part')]
    options = dict(quiet=not sys.stderr.isatty(), use_cookies=False, resume=True, timeout=_TIMEOUT, retries=_RETRIES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        gdown.download(id=file_id, output=str(output), **options)
    except Exception as error:  # of gdown, of requests, or for a page that gdown cannot parse
        if isinstance(error, OSError) and error.errno:  # errors of requests are OSErrors without errno
            raise cache.unwritable(folder, error) from error
        if not (incomplete and 'byte range' in str(error)):
            raise CheckpointError(
                f"'{path or file_id}' cannot be downloaded from Google Drive: {one_line(error)}"
            ) from error
        for part in incomplete:  # as long as the file or longer, so that the server refuses to resume
            part.unlink(missing_ok=True)
        return _download(file_id, path, folder)
    return output


def organization() -> str | None:
    """Returns the organization on the Hugging Face Hub in ``CLUSTER_ZOO_HUB``; None if it is not set."""
    named = os.environ.get('CLUSTER_ZOO_HUB', '').strip()
    if named and not re.fullmatch(r'[A-Za-z0-9][\w.-]*', named):
        raise CheckpointError(f'CLUSTER_ZOO_HUB={named!r} is no name of an organization, such as my-lab.')
    return named or None


def hub_folder(hub_id: str, cache_dir: str | Path | None = None) -> Path:
    """Downloads a model folder, ``org/name`` or ``org/name@revision``, from the Hugging Face Hub to its client's cache.

    Without a connection, files from an earlier download are used.

    Raises:
        CheckpointError: The repository or its files do not exist, are private, or cannot be downloaded.
    """
    problem = None if _offline() else _connection_problem(huggingface_hub.constants.ENDPOINT)
    local = _offline() or problem is not None
    repo_id, _, revision = hub_id.partition('@')

    def get(filename: str, revision: str) -> Path:
        options = dict(revision=revision, cache_dir=cache_dir, local_files_only=local)
        return Path(huggingface_hub.hf_hub_download(repo_id, filename, **options))

    try:
        folder = get(CONFIG, revision or 'main').parent
        try:
            get(WEIGHTS, folder.name)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not local:
                raise  # the download failed, which does not mean that the file does not exist
            get('pytorch_model.bin', folder.name)
    except Exception as error:  # of the client, or of its HTTP library
        reason = one_line(problem or error.__cause__ or error)
        if isinstance(error, LocalEntryNotFoundError) and _offline():
            reason = 'it is not in the cache, and HF_HUB_OFFLINE is set.'
        raise CheckpointError(f'{repo_id} on the Hugging Face Hub is not available: {reason}') from error
    return folder


def _offline() -> bool:
    # Read at each call, unlike huggingface_hub.constants.HF_HUB_OFFLINE
    return os.environ.get('HF_HUB_OFFLINE', '').upper() in ('1', 'ON', 'YES', 'TRUE')
