"""A simulated Hugging Face Hub with the requests that its client needs to download and upload models."""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from faults import FaultyHandler, FaultyServer

OWNER, GUEST = 'hf_owner', 'hf_guest'  # tokens of the owner of all repositories and of another user
_LARGE = ('.safetensors', '.bin', '.pth', '.tar')


@dataclass
class Repository:
    """Files of every commit, and the newest commit."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ''

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit with these files."""
        text = self.head + ''.join(f'{name} {_sha256(content)}' for name, content in sorted(files.items()))
        self.head = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.head] = dict(files)
        return self.head


class HubServer(FaultyServer):
    """Simulated Hub. As on the Hub, large files are on another host, here 127.0.0.1 instead of localhost."""

    def __init__(self) -> None:
        super().__init__(_HubHandler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """Value for ``HF_ENDPOINT``."""
        return f'http://localhost:{self.server_port}'

    @property
    def storage_url(self) -> str:
        """Address of large files."""
        return f'http://127.0.0.1:{self.server_port}'

    def add(self, repo_id: str, files: Path | dict[str, bytes], private: bool = False, gated: bool = False) -> str:
        """Adds a repository, or a commit to it, with these files. Returns the commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        repository = self.repositories.setdefault(repo_id, Repository(private, gated))
        return repository.commit(files)


class _HubHandler(FaultyHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.host = self.headers['Host']
        self.note()
        self.sent = self.body()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip('/').split('/')]
        match (self.command, *parts):
            case ('HEAD' | 'GET', owner, name, 'resolve', revision, *path):
                self._resolve(f'{owner}/{name}', revision, '/'.join(path))
            case ('HEAD' | 'GET', 'storage', oid, _):
                self._stored(oid)
            case ('GET', 'api', 'whoami-v2'):
                self._whoami()
            case ('GET', 'api', 'models', owner, name):
                self._info(f'{owner}/{name}', 'main')
            case ('GET', 'api', 'models', owner, name, 'revision', revision):
                self._info(f'{owner}/{name}', revision)
            case ('GET', 'api', 'models', owner, name, 'tree', revision):
                self._tree(f'{owner}/{name}', revision)
            case ('POST', 'api', 'validate-yaml'):
                self._json(200, dict(errors=[], warnings=[]))
            case ('POST', 'api', 'repos', 'create'):
                self._create()
            case ('POST', 'api', 'models', owner, name, 'preupload', _):
                self._preupload(f'{owner}/{name}')
            case ('POST', owner, name, 'info', 'lfs', 'objects', 'batch'):
                self._lfs_batch(f'{owner}/{name}'.removesuffix('.git'))
            case ('PUT', 'upload', oid):
                self._lfs_upload(oid)
            case ('POST', 'verify', oid):
                self._json(200 if len(self.server.objects.get(oid, b'')) == json.loads(self.sent)['size'] else 404, {})
            case ('POST', 'api', 'models', owner, name, 'commit', _):
                self._commit(f'{owner}/{name}')
            case _:
                self._error(404, '', f'No such page: {self.command} {self.path}')

    # Permissions

    @property
    def _token(self) -> str | None:
        return self.headers.get('Authorization', '').removeprefix('Bearer ') or None

    def _repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """Returns the repository, or sends an error and returns None."""
        repository = self.server.repositories.get(repo_id)
        if self._token not in (None, OWNER, GUEST):
            return self._error(401, '', 'Invalid credentials in Authorization header')
        if repository is None or (repository.private and self._token != OWNER):  # the same response, as on the Hub
            if self._token is None:
                return self._error(401, 'RepoNotFound', 'Invalid username or password.')
            return self._error(404, 'RepoNotFound', 'Repository not found')
        if repository.gated and self._token != OWNER:
            words = f'Access to model {repo_id} is restricted'
            return self._error(401 if self._token is None else 403, 'GatedRepo', words)
        if write and self._token != OWNER:
            return self._error(403, '', f"You don't have the rights to write to {repo_id}")
        return repository

    def _whoami(self) -> None:
        if self._token not in (OWNER, GUEST):
            return self._error(401, '', 'Invalid username or password.')
        self._json(200, dict(type='user', name=self._token.removeprefix('hf_'), orgs=[]))

    # Downloads

    def _found(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        """Returns the repository and the commit, or sends an error and returns None."""
        if (repository := self._repository(repo_id)) is None:
            return None
        commit = repository.head if revision == 'main' else revision
        if commit not in repository.commits:
            return self._error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return repository, commit

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        if (found := self._found(repo_id, revision)) is None:
            return
        repository, commit = found
        headers = {'X-Repo-Commit': commit}
        content = repository.commits[commit].get(name)
        if content is None:
            return self._error(404, 'EntryNotFound', 'Entry not found', headers)
        if not name.endswith(_LARGE):
            etag = f'"{_git_sha1(content)}"'
            headers |= {'ETag': etag, 'Content-Type': 'text/plain'}
            return self.answer_file(self.path, headers, content, (etag,))
        oid = _sha256(content)
        self.server.objects[oid] = content
        headers |= {'X-Linked-ETag': f'"{oid}"', 'X-Linked-Size': str(len(content)), 'ETag': f'"{_git_sha1(b"")}"'}
        headers['Location'] = f'{self.server.storage_url}/storage/{oid}/{name.rpartition("/")[2]}'
        self.answer(self.path, 302, headers)

    def _stored(self, oid: str) -> None:
        etag = f'"{oid}"'
        headers = {'ETag': etag, 'Content-Type': 'application/octet-stream'}
        self.answer_file(self.path, headers, self.server.objects[oid], (etag,))

    def _info(self, repo_id: str, revision: str) -> None:
        if (found := self._found(repo_id, revision)) is None:
            return
        repository, commit = found
        siblings = [dict(rfilename=name) for name in repository.commits[commit]]
        gated = 'auto' if repository.gated else False
        info = dict(id=repo_id, sha=commit, private=repository.private, gated=gated, siblings=siblings, tags=[])
        self._json(200, info)

    def _tree(self, repo_id: str, revision: str) -> None:
        if (found := self._found(repo_id, revision)) is None:
            return
        repository, commit = found
        entries = []
        for name, content in repository.commits[commit].items():
            entry = dict(type='file', path=name, size=len(content), oid=_git_sha1(content))
            if name.endswith(_LARGE):
                entry['lfs'] = dict(oid=_sha256(content), size=len(content), pointerSize=130)
            entries.append(entry)
        self._json(200, entries)

    # Uploads

    def _create(self) -> None:
        wanted = json.loads(self.sent)
        if self._token is None:
            return self._error(401, '', 'Invalid username or password.')
        if self._token != OWNER:
            return self._error(403, '', "You don't have the rights to create a model under this namespace")
        repo_id = f'{wanted.get("organization") or "owner"}/{wanted["name"]}'
        url = f'{self.server.url}/{repo_id}'
        if repo_id in self.server.repositories:
            return self._json(409, dict(error='You already created this model repo', url=url))
        private = wanted.get('visibility') == 'private' or bool(wanted.get('private'))
        self.server.repositories[repo_id] = Repository(private=private)
        self.server.repositories[repo_id].commit({'.gitattributes': b''})
        self._json(200, dict(url=url, name=repo_id))

    def _preupload(self, repo_id: str) -> None:
        if (repository := self._repository(repo_id, write=True)) is None:
            return
        files = []
        for path in (file['path'] for file in json.loads(self.sent)['files']):
            content, large = repository.commits[repository.head].get(path), path.endswith(_LARGE)
            oid = None if content is None else _sha256(content) if large else _git_sha1(content)
            files.append(dict(path=path, uploadMode='lfs' if large else 'regular', shouldIgnore=False, oid=oid))
        self._json(200, dict(files=files))

    def _lfs_batch(self, repo_id: str) -> None:
        if self._repository(repo_id, write=True) is None:
            return
        objects = []
        for item in json.loads(self.sent)['objects']:
            if item['oid'] not in self.server.objects:
                hosts = dict(upload=self.server.storage_url, verify=self.server.url)
                item['actions'] = {key: dict(href=f'{host}/{key}/{item["oid"]}') for key, host in hosts.items()}
            objects.append(item)
        self._json(200, dict(transfer='basic', objects=objects))

    def _lfs_upload(self, oid: str) -> None:
        if _sha256(self.sent) != oid:
            return self._error(400, '', 'The content has another SHA-256')
        self.server.objects[oid] = self.sent
        self.answer(self.path, 200, {})

    def _commit(self, repo_id: str) -> None:
        if (repository := self._repository(repo_id, write=True)) is None:
            return
        files = dict(repository.commits[repository.head])
        for line in self.sent.splitlines():
            operation = json.loads(line)
            value = operation['value']
            match operation['key']:
                case 'file':
                    files[value['path']] = base64.b64decode(value['content'])
                case 'lfsFile':
                    files[value['path']] = self.server.objects[value['oid']]
                case 'deletedFile':
                    del files[value['path']]
        commit = repository.commit(files)
        self._json(200, dict(commitUrl=f'{self.server.url}/{repo_id}/commit/{commit}', commitOid=commit, success=True))

    # Responses

    def _json(self, status: int, value: dict | list) -> None:
        self.answer(self.path, status, {'Content-Type': 'application/json'}, json.dumps(value).encode())

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {**(headers or {}), 'X-Error-Message': message, 'Content-Type': 'application/json'}
        if code:
            headers['X-Error-Code'] = code
        self.answer(self.path, status, headers, json.dumps(dict(error=message)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
