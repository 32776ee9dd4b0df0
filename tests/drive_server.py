"""A simulated Google Drive for gdown: a proxy that responds in place of Google's hosts and connects to no other."""

import email.utils
import ssl
from html import escape
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import trustme
from faults import FaultyHandler, FaultyServer

_HOSTS = ('drive.google.com', 'drive.usercontent.google.com', 'docs.google.com', 'accounts.google.com')
_DATE = email.utils.formatdate(1_700_000_000, usegmt=True)
_HTML = {'Content-Type': 'text/html; charset=utf-8'}


def _page(title: str, body: str) -> bytes:
    return f'<!DOCTYPE html><html><head><title>{title}</title></head><body>\n{body}\n</body></html>'.encode()


_QUOTA = _page(
    'Google Drive - Quota exceeded',
    '<div class="uc-main"><p class="uc-error-caption">Sorry, you can&#39;t view or download this file at this time.</p>'
    '\n<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently. Please try '
    'accessing the file again later.</p></div>',
)
_SIGN_IN = _page('Google Drive: Sign-in', '<form action="/signin"><input type="email" id="identifierId"></form>')

QUOTA_EXCEEDED = dict(status=200, headers=_HTML, body=_QUOTA, times=None)
PERMISSION_DENIED = dict(
    status=302, headers={'Location': 'https://accounts.google.com/ServiceLogin', 'Content-Length': '0'}, times=None
)


class DriveServer(FaultyServer):
    """Simulated Google Drive. Failures are selected by the id of a file or a folder.

    Attributes:
        scanned_size: Larger files are not scanned for viruses and need a confirmation.
    """

    def __init__(self, folder: Path, scanned_size: int = 1 << 20) -> None:
        """Writes the certificate that clients have to trust to ``folder``."""
        super().__init__(_DriveHandler)
        self.scanned_size = scanned_size
        self.folders: dict[str, tuple[str, list[str]]] = {}  # id -> name, ids of its content
        self.files: dict[str, tuple[str, bytes, str]] = {}  # id -> name, content, date
        authority = trustme.CA()
        self._certificates = folder / 'authority.pem'
        authority.cert_pem.write_to_path(self._certificates)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*_HOSTS).configure_cert(self.context)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a client."""
        url = f'http://127.0.0.1:{self.server_port}'
        none = dict.fromkeys(('NO_PROXY', 'no_proxy', 'CURL_CA_BUNDLE'), '')
        return none | dict(HTTPS_PROXY=url, https_proxy=url, REQUESTS_CA_BUNDLE=str(self._certificates))

    def add_folder(self, folder_id: str, name: str, parent: str | None = None) -> str:
        """Adds a folder. Its id must have at least 25 characters, as Google's."""
        self.folders[folder_id] = (name, [])
        if parent is not None:
            self.folders[parent][1].append(folder_id)
        return folder_id

    def add_file(self, file_id: str, name: str, content: bytes, parent: str | None = None, date: str = _DATE) -> str:
        """Adds a file, or replaces its content."""
        if parent is not None and file_id not in self.folders[parent][1]:
            self.folders[parent][1].append(file_id)
        self.files[file_id] = (name, content, date)
        return file_id

    def sent(self, file_id: str) -> list[str]:
        """Returns the requested ranges of a file's content, one for each request; '' is the whole file."""
        with self.lock:
            return [
                request.headers.get('range', '')
                for request in self.requests
                if request.host == 'drive.usercontent.google.com' and self._is_content(file_id, request.path)
            ]

    def _is_content(self, file_id: str, path: str) -> bool:
        query = parse_qs(urlsplit(path).query)
        small = len(self.files[file_id][1]) <= self.scanned_size
        return query.get('id') == [file_id] and (small or 'confirm' in query)


class _DriveHandler(FaultyHandler):
    server: DriveServer

    def do_CONNECT(self) -> None:
        """Acts as the requested host for the following encrypted requests."""
        self.host = self.path.partition(':')[0]
        if self.host not in _HOSTS:
            self.note()
            return self.answer(self.host, 502, {})
        self.wfile.write(b'HTTP/1.1 200 Connection established\r\n\r\n')
        self.rfile.close()
        self.request = self.server.context.wrap_socket(self.connection, server_side=True)
        self.setup()
        self.close_connection = False

    def do_GET(self) -> None:
        self.note()
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        item = query.get('id', '')
        match (self.host, url.path):
            case ('drive.google.com', '/embeddedfolderview') if item in self.server.folders:
                self.answer(item, 200, _HTML, self._folder_page(item))
            case ('drive.google.com' | 'docs.google.com', '/uc') if item in self.server.files:
                location = f'https://drive.usercontent.google.com/download?id={item}&export=download'
                self.answer('', 303, {'Location': location})
            case ('drive.usercontent.google.com', '/download') if item in self.server.files:
                self._download(item, 'confirm' in query)
            case ('accounts.google.com', '/ServiceLogin'):
                self.answer('', 200, _HTML, _SIGN_IN)
            case _:
                words = '<p>The requested URL was not found on this server.</p>'
                self.answer('', 404, _HTML, _page('Error 404 (Not Found)!!1', words))

    def _folder_page(self, folder_id: str) -> bytes:
        name, children = self.server.folders[folder_id]
        entries = []
        for child in children:
            if child in self.server.folders:
                title, link = self.server.folders[child][0], f'https://drive.google.com/drive/folders/{child}'
            else:
                title, link = self.server.files[child][0], f'https://drive.google.com/file/d/{child}/view?usp=drive_web'
            entries.append(
                f'<div class="flip-entry" id="entry-{child}"><div class="flip-entry-info"><a href="{link}" '
                'target="_blank"><div class="flip-entry-visual"></div>'
                f'<div class="flip-entry-title">{escape(title)}</div></a></div></div>'
            )
        return _page(escape(name), f'<div class="flip-entries">{"".join(entries)}</div>')

    def _download(self, file_id: str, confirmed: bool) -> None:
        name, content, date = self.server.files[file_id]
        if len(content) > self.server.scanned_size and not confirmed:
            return self.answer(f'{file_id} unconfirmed', 200, _HTML, self._confirmation_page(file_id))
        headers = {
            'Content-Type': 'application/octet-stream',
            'Content-Disposition': f'attachment; filename="{name}"',
            'Last-Modified': date,
        }
        self.answer_file(file_id, headers, content, (date,))

    def _confirmation_page(self, file_id: str) -> bytes:
        hidden = dict(id=file_id, export='download', confirm='t', uuid='0b5f5ed8-11ea-4f6b-9bf2-8a50f42b5f9d')
        inputs = ''.join(f'<input type="hidden" name="{name}" value="{value}">' for name, value in hidden.items())
        return _page(
            'Google Drive - Virus scan warning',
            '<p class="uc-warning-caption">Google Drive can\'t scan this file for viruses.</p>'
            '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
            f'<input type="submit" value="Download anyway">{inputs}</form>',
        )
