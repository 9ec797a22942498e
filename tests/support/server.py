"""A chat-completions server in a thread, with replies from a function."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


@dataclass(frozen=True)
class Raw:
    """A reply with its own status, body and headers."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Callable[[], Iterator[bytes]] | None = None
    """Chunks that are sent instead of `body`, without a content length."""


@dataclass
class Asked:
    """The requests that the server received, in order."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None


def completion(text: str | None, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": finish}]}


@contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Any]) -> Iterator[Asked]:
    """Run the server; `answer` returns a text, a body as a dict, or a `Raw`."""
    asked = Asked()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.bodies.append(body)
                asked.headers.append({name.lower(): value for name, value in self.headers.items()})
                asked.paths.append(self.path)
            found = answer(body)
            if isinstance(found, str):
                found = completion(found)
            if isinstance(found, dict):
                found = Raw(body=json.dumps(found).encode())
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            try:
                if found.pieces is None:
                    self.send_header("Content-Length", str(len(found.body)))
                    self.end_headers()
                    self.wfile.write(found.body)
                else:
                    self.close_connection = True
                    self.send_header("Connection", "close")
                    self.end_headers()
                    for piece in found.pieces():
                        self.wfile.write(piece)
                        self.wfile.flush()
            except ConnectionError:
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128
        connections: ClassVar[list[socket.socket]] = []

        def get_request(self) -> Any:
            connection, address = super().get_request()
            self.connections.append(connection)
            return connection, address

        def handle_error(self, *_arguments: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    asked.url = f"http://127.0.0.1:{server.server_port}/v1"
    closed = threading.Event()

    def close() -> None:
        if not closed.is_set():
            closed.set()
            server.shutdown()
            server.server_close()
            thread.join()
            for connection in server.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    asked.close = close
    try:
        yield asked
    finally:
        close()
