"""A local HTTP server that simulates failures of downloads."""

import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

_PATIENCE = 60  # seconds that a response waits for its event, so that a failing test ends


@dataclass
class Fault:
    """A failure of responses.

    Attributes:
        method: Method of the requests that fail; None for all methods.
        status, headers, body: Response in place of the correct one, if a status is given.
        drop_after: Number of bytes of the body after which the connection is closed.
        reset: Reset the connection instead of closing it.
        lie: Added to the ``Content-Length``.
        garbage: Replace the bytes of the body.
        until: Event for which the response waits, before it starts or before the connection is closed.
        times: Number of responses that fail; None for all.
    """

    method: str | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b''
    drop_after: int | None = None
    reset: bool = False
    lie: int = 0
    garbage: bool = False
    until: threading.Event | None = None
    times: int | None = 1


class Request(NamedTuple):
    """A request of a client."""

    method: str
    host: str
    path: str
    headers: dict[str, str]  # names in lower case


class FaultyServer(ThreadingHTTPServer):
    """Context manager that serves on a free local port and records all requests."""

    daemon_threads = False  # all threads end with the context

    def __init__(self, handler: type['FaultyHandler']) -> None:
        super().__init__(('127.0.0.1', 0), handler)
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self._faults: list[tuple[str, Fault]] = []
        self.handlers: set[FaultyHandler] = set()

    def fail(self, name: str, **fault) -> None:
        """Makes the next responses for a name (the end of a path, or an id) fail, see `Fault`."""
        with self.lock:
            self._faults.append((name, Fault(**fault)))

    def heal(self) -> None:
        """Ends all failures."""
        with self.lock:
            self._faults.clear()

    def next_fault(self, method: str, name: str) -> Fault | None:
        """Returns the failure of this response and counts it."""
        with self.lock:
            for pattern, fault in self._faults:
                if name.endswith(pattern) and fault.method in (None, method) and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def asked(self, method: str, name: str) -> list[Request]:
        """Returns the requests so far for paths that end with ``name``."""
        with self.lock:
            return [request for request in self.requests if request.method == method and request.path.endswith(name)]

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self._thread.join()
        with self.lock:
            handlers = list(self.handlers)
            events = [fault.until for _, fault in self._faults if fault.until]
        for event in events:
            event.set()
        for handler in handlers:  # because clients keep their connections open
            _end(handler.connection)
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Ignores closed connections, which some tests cause."""


class FaultyHandler(BaseHTTPRequestHandler):
    """Sends responses with the failures of the server."""

    protocol_version = 'HTTP/1.1'
    server: FaultyServer
    host = ''

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.handlers.add(self)

    def finish(self) -> None:
        with self.server.lock:
            self.server.handlers.discard(self)
        self.connection.close()  # after TLS, another one than the server's
        super().finish()

    def log_message(self, *_) -> None:
        """Prints nothing, because tests read standard error."""

    def note(self) -> None:
        """Records this request."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.lock:
            self.server.requests.append(Request(self.command, self.host, self.path, headers))

    def body(self) -> bytes:
        """Reads the body of the request, with a length or in chunks."""
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline().split(b';')[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, name: str, status: int, headers: dict[str, str], body: bytes = b'') -> None:
        """Sends a response for a name, or fails."""
        fault = self.server.next_fault(self.command, name) or Fault()
        if fault.until is not None and fault.drop_after is None:
            fault.until.wait(_PATIENCE)
        if fault.status is not None:
            status, headers, body = fault.status, fault.headers, fault.body
        elif fault.garbage:
            body = bytes(byte ^ 0x55 for byte in body)
        headers = {'Content-Length': str(len(body) + fault.lie), **headers}
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[: fault.drop_after])
        if fault.lie or fault.drop_after is not None:
            self.close_connection = True
            self.wfile.flush()
            if fault.until is not None:
                fault.until.wait(_PATIENCE)
            _end(self.connection, fault.reset)

    def answer_file(self, name: str, headers: dict[str, str], content: bytes, validators: tuple[str, ...]) -> None:
        """Sends a file, or the requested range if the file has not changed."""
        start = self.headers.get('Range', '').removeprefix('bytes=').removesuffix('-')
        fresh = self.headers.get('If-Range', validators[0]) in validators
        headers = {'Accept-Ranges': 'bytes', **headers}
        if not start.isdigit() or not fresh:
            return self.answer(name, 200, headers, content)
        if int(start) >= len(content):
            return self.answer(name, 416, {'Content-Range': f'bytes */{len(content)}'})
        headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
        self.answer(name, 206, headers, content[int(start) :])


def _end(connection: socket.socket, reset: bool = False) -> None:
    try:
        if reset:  # closes at once and discards unsent data
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            os.close(connection.detach())
        else:
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the client has closed the connection
