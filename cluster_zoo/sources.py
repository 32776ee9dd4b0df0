"""Where pretrained weights come from. The first of these that has them:

1. a file, folder, address or repository that the caller names;
2. the package itself;
3. the local store, see `store`;
4. a Hugging Face organisation that the user names, see `hub`;
5. the authors' publication, if the user allows it, see `authors`.

Where none has them that is one error, which says what was tried.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg
from timm.models._hub import download_cached_file, hf_split
from torch import Tensor

from . import authors, hub, store, tags
from .weights import CheckpointError, load_state_dict

__all__ = ['Weights', 'WeightsNotFoundError', 'entry', 'find_weights', 'where']

ASSETS = Path(__file__).parent / 'assets'

_TRIES = 3  # at a folder that is replaced while it is read


class WeightsNotFoundError(CheckpointError):
    """No source has the weights. The message lists what was tried, why each failed, and what would help."""


@dataclass(frozen=True)
class Weights:
    """What a source has.

    Attributes:
        state_dict: Tensors by name.
        config: The configuration of the model folder that they are from; None where they are from a lone file.
    """

    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None = None


def find_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Weights:
    """The weights that a configuration stands for, downloaded if need be.

    Args:
        cfg: timm's configuration, as it was resolved.
        cache_dir: Folder for what is downloaded, in place of the local store and of Hugging Face's cache.

    Raises:
        CheckpointError: The one place that the configuration names does not have them, or they are damaged.
        WeightsNotFoundError: No source has them.
    """
    if cfg.source == 'local-dir':
        return _from_folder(Path(cfg.file), cfg.architecture)
    if cfg.file and cfg.source != 'hf-hub':
        return _from_file(cfg)
    if cfg.hf_hub_id:
        repo_id, revision = hf_split(cfg.hf_hub_id)
        return _from_cache(hub.download(repo_id, revision, cache_dir, cfg.hf_hub_filename, cfg.architecture))
    if cfg.url and not authors.is_folder(cfg.url):
        return _from_address(cfg.url, cache_dir)
    return _search(f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture, cache_dir)


def entry(cfg: PretrainedCfg) -> Path | None:
    """The model folder of a tag of the store, told by its name; None if a configuration is of another kind."""
    path = Path(cfg.file) if cfg.file and not cfg.source else None
    if path is None or path.name != store.WEIGHTS or path.parent.name != f'{cfg.architecture}.{cfg.tag}':
        return None
    folder = store.folder(path.parent.name, path.parent.parent)  # which may be elsewhere while it is replaced
    return folder if (folder / store.CONFIG).is_file() else None


def _from_file(cfg: PretrainedCfg) -> Weights:
    folder, path = entry(cfg), Path(cfg.file)
    if folder is not None:
        return _from_folder(folder, cfg.architecture)
    expected = tags.facts(path.stem).sha256 if path.parent == ASSETS else None
    if expected and path.is_file() and store.sha256(path) != expected:
        raise CheckpointError(f"'{path}' is damaged: its SHA-256 is not {expected}. Install the package again.")
    return Weights(load_state_dict(path))


def _from_folder(folder: Path, architecture: str) -> Weights:
    """Configuration and weights that belong together, even if another process puts others in their place."""
    for _ in range(_TRIES):
        before, error = _identity(folder), None
        try:
            found = Weights(load_state_dict(_weights_file(folder)), store.read_config(folder, architecture))
        except CheckpointError as problem:
            error = problem
        if _identity(folder) == before:
            if error:
                raise error
            return found
    raise CheckpointError(f"'{folder}' was replaced again and again while it was read. Try again.")


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _weights_file(folder: Path) -> Path:
    others = [folder / 'pytorch_model.bin', *sorted(folder.glob('*.safetensors'))]
    if (folder / store.WEIGHTS).is_file() or not any(path.is_file() for path in others):
        return store.verified_weights(folder)
    return next(path for path in others if path.is_file())


def _from_cache(path: Path) -> Weights:
    """From Hugging Face's cache, where a commit's files lie side by side and stay as they are."""
    return Weights(load_state_dict(path), store.read_config(path.parent))


def _from_address(url: str | tuple[str, str], cache_dir: Any) -> Weights:
    """A file that the caller names by its address, through timm's own cache."""
    address, filename = (url, None) if isinstance(url, str) else url
    # timm would take all files of one name for one file
    filename = filename or f'{hashlib.sha256(address.encode()).hexdigest()[:16]}-{Path(address).name}'
    source = f'url:{address}'
    path = _download(address, filename, cache_dir)
    if store.recorded(source) not in (None, store.sha256(path)):  # damaged in the cache, or changed at its address
        path.unlink()
        path = _download(address, filename, cache_dir)
    try:
        state_dict = load_state_dict(path)
    except CheckpointError:
        path.unlink(missing_ok=True)  # or every later try would find it
        raise
    store.check_first_use(source, path)
    return Weights(state_dict)


def _download(address: str, filename: str, cache_dir: Any) -> Path:
    try:
        return Path(download_cached_file((address, filename), cache_dir=cache_dir))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f'{address} could not be downloaded: {error}') from error


def _search(name: str, cache_dir: str | Path | None) -> Weights:
    tried = ['  the package: not part of it']  # or the configuration would name a file
    for label, source in (
        ('the local store', _from_store),
        ('Hugging Face', _from_hub),
        ('the authors', _from_authors),
    ):
        try:
            return source(name, cache_dir)
        except CheckpointError as error:
            tried.append(f'  {label}: {error}')
    command = f'  CLUSTER_ZOO_HOME={cache_dir} cluster-zoo' if cache_dir else '  cluster-zoo'
    if authors.publication(name):
        hints = ['What would help:', f'{command} fetch {name}', f'{command} import FILE --as {name}']
    else:
        own = f'{name.partition(".")[0]}.TAG'  # 'untrained' is no tag for any weights
        hints = ['What would help, as there is no publication:', '  CLUSTER_ZOO_HUB=ORGANISATION, if one has them']
        hints += [f'{command} import FILE --as {own}']
    raise WeightsNotFoundError('\n'.join((f'No weights were found for {name}, and none are made up.', *tried, *hints)))


def _from_store(name: str, cache_dir: Any) -> Weights:
    try:
        folder = store.folder(name, cache_dir)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not folder.is_dir():
        raise CheckpointError(f"there is no '{folder}'")
    return _from_folder(folder, name.partition('.')[0])


def _from_hub(name: str, cache_dir: Any) -> Weights:
    return _from_cache(hub.fetch(name, cache_dir))


def _from_authors(name: str, cache_dir: Any) -> Weights:
    url = authors.publication(name)
    if url is None:
        raise CheckpointError('they have published none')
    if not authors.allowed():
        raise CheckpointError(f'{url} was not asked, CLUSTER_ZOO_AUTHORS=1 would allow it')
    return _from_folder(authors.fetch(name, progress=os.isatty(2), root=cache_dir), name.partition('.')[0])


def where(name: str, root: str | Path | None = None) -> str:
    """Where the weights of a name are, or would come from, without asking anybody.

    Args:
        name: Architecture and tag.
        root: The store's folder, see `store.folder`.

    Returns:
        ``'package'``, ``'store'``, ``'hub'`` (an organisation is named, and may have them), ``'authors'`` (who have
        published them) or ``'none'``.
    """
    if tags.facts(name).sha256:
        return 'package'
    if name in store.entries(root):
        return 'store'
    if hub.organisation():
        return 'hub'
    return 'authors' if authors.publication(name) else 'none'
