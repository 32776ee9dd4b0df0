"""Model folders on the Hugging Face Hub, through its own client: cache, tokens, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.

No organisation is asked unless the user names one, in ``CLUSTER_ZOO_HUB`` or as ``hf-hub:organisation/name``: a name
that anyone could register is no reason to trust what lies under it.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import store
from .untrusted import read_config_file
from .untrusted.errors import quoted, reason
from .weights import CheckpointError

__all__ = ['download', 'fetch', 'organisation', 'push']

_WEIGHTS = (store.WEIGHTS, 'pytorch_model.bin')  # in the order in which they are preferred


def organisation() -> str | None:
    """The organisation that ``CLUSTER_ZOO_HUB`` names; None if it names none.

    Raises:
        CheckpointError: It is no name of an organisation.
    """
    named = os.environ.get('CLUSTER_ZOO_HUB', '').strip()
    if named and not re.fullmatch(r'[A-Za-z0-9][\w.-]*', named):
        raise CheckpointError(
            f"CLUSTER_ZOO_HUB='{named}' is no name of an organisation on the Hugging Face Hub, such as my-lab."
        )
    return named or None


def download(
    repo_id: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    filename: str | None = None,
    architecture: str | None = None,
) -> Path:
    """The weights file of a repository in timm's hub layout, in Hugging Face's cache beside its ``config.json``.

    The file's SHA-256 has to be the one that the Hub states, that ``config.json`` has and that it had when it was first
    used. A file of the cache that is another is downloaded once more.

    Args:
        repo_id: ``organisation/name``.
        revision: Branch, tag or commit; None for the main branch.
        cache_dir: Hugging Face's cache; None for its default.
        filename: The weights file; None for ``model.safetensors``, or ``pytorch_model.bin`` where there is none.
        architecture: The one that ``config.json`` has to name; None for any that timm knows.

    Raises:
        CheckpointError: It cannot be had, or is not what it should be.
    """
    if filename is not None and not re.fullmatch(r'\w[\w.-]*', filename):
        raise CheckpointError(
            f'{quoted(filename)} is no name of a file at the top of {repo_id}, such as {_WEIGHTS[0]}.'
        )
    config_file = _get(repo_id, store.CONFIG, revision, cache_dir)
    try:
        stated = read_config_file(config_file, architecture).get('sha256')
    except CheckpointError as error:
        raise CheckpointError(f'{repo_id} on the Hugging Face Hub holds no model to load: {error}') from error
    commit = config_file.parent.name  # both files from one commit, whatever is pushed in between
    filename, path = _first_of([filename] if filename else _WEIGHTS, repo_id, commit, cache_dir)
    source = f'hub:{repo_id}@{commit}/{filename}'
    by_config = stated if filename == store.WEIGHTS else None
    expected = {_stated_by_the_hub(path), by_config, store.recorded(source)} - {None}
    if expected - {store.sha256(path)}:  # damaged in the cache or on its way there: the client compares sizes only
        try:
            path = _get(repo_id, filename, commit, cache_dir, force_download=True)
        except CheckpointError as error:
            raise CheckpointError(f"'{path}' is damaged. {error}") from error
    found = store.sha256(path)
    for digest in expected - {found}:
        raise CheckpointError(
            f"'{filename}' of {repo_id} was refused: its SHA-256 is {found}, and not {digest}, as the Hub or "
            f'{store.CONFIG} states it, or as it was when first used.'
        )
    store.check_first_use(source, path)
    return path


def _first_of(filenames: Sequence[str], repo_id: str, commit: str, cache_dir: Any) -> tuple[str, Path]:
    """The first of some files that the repository has."""
    for filename in filenames:
        with suppress(FileNotFoundError):
            return filename, _get(repo_id, filename, commit, cache_dir)
    raise CheckpointError(f'{repo_id} on the Hugging Face Hub holds no weights: no {" and no ".join(filenames)}.')


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """The weights of a tag from the organisation that the user names, which have to stay those first used.

    Args:
        name: Architecture and tag, which is what the repository is called.
        cache_dir: See `download`.

    Raises:
        CheckpointError: No organisation is named, or see `download`; or it has other weights by now.
    """
    named = organisation()
    if named is None:
        raise CheckpointError('not asked, CLUSTER_ZOO_HUB names no organisation')
    path = download(f'{named}/{name}', cache_dir=cache_dir, architecture=name.partition('.')[0])
    store.check_first_use(f'hub:{named}/{name}', path)
    return path


def _get(repo_id: str, filename: str, revision: str | None, cache_dir: Any, force_download: bool = False) -> Path:
    """A file in the cache. FileNotFoundError if the Hub says that there are no weights of that name."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                library_name=__package__,
            )
        )
    except Exception as error:  # of the client, or of the HTTP library under it, which changes between versions
        if isinstance(error, LocalEntryNotFoundError):  # the Hub said nothing, or nothing of use; the cause says more
            error = error.__cause__ or error
        elif isinstance(error, EntryNotFoundError) and filename != store.CONFIG:
            raise FileNotFoundError(filename) from error
        raise CheckpointError(
            f"'{filename}' of {repo_id} on the Hugging Face Hub could not be had: {reason(error)}"
        ) from error


def _stated_by_the_hub(path: Path) -> str | None:
    """The cache calls a large file by the SHA-256 that the Hub states for it; a small one by a hash of another kind."""
    name = path.resolve().name
    return name if re.fullmatch('[0-9a-f]{64}', name) else None


def push(folder: str | Path, repo_id: str, private: bool = False, message: str = 'Add model') -> str:
    """Upload a model folder, as a repository that ``timm.create_model('hf-hub:...')`` loads back.

    Args:
        folder: The model folder.
        repo_id: ``organisation/name``. It is made if it does not exist.
        private: Make it private, if it is made.
        message: What the commit says.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: The folder is damaged, or the Hub did not take it.
    """
    import huggingface_hub

    store.verified_weights(Path(folder))
    api = huggingface_hub.HfApi(library_name=__package__)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[store.WEIGHTS, store.CONFIG, store.CARD],
            commit_message=message,
        )
    except Exception as error:  # see `_get`
        refused = getattr(getattr(error, 'response', None), 'status_code', None) in (401, 403)
        hint = '. Are you logged in (`hf auth login`, or HF_TOKEN), with the right to write there?' if refused else ''
        said = reason(error).rstrip('.') if refused else reason(error)
        raise CheckpointError(f'The Hugging Face Hub did not take {repo_id}: {said}{hint}') from error
    return str(commit.commit_url)
