"""The labelling server in a thread, and requests to it as the page sends them."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stayaligned.evaluation.labelling.server import LabellingServer, start_server


@dataclass
class Answer:
    """A reply of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """Requests to one server; each argument replaces what a page would send."""

    server: LabellingServer

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=10)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", f"/{self.server.token}/{path}", headers=headers)

    def post(self, body: Any, **headers: str) -> Answer:
        origin = "{0.scheme}://{0.netloc}".format(urlsplit(self.server.address))
        sent = {"Origin": origin, "Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", f"/{self.server.token}/label", data, {k: v for k, v in sent.items() if v})

    def state(self, labeller: str = "ann") -> Any:
        return self.get(f"state?labeller={labeller}").content

    def press(self, step: list[Any], outcome: str, previous: str | None = None, labeller: str = "ann") -> Answer:
        body = {"item": step[0], "completion": step[2], "outcome": outcome, "previous": previous, "labeller": labeller}
        return self.post(body)


@contextmanager
def labelling_page(directory: Path, labeller: str | None = None, port: int = 0) -> Iterator[Client]:
    """Serve a labelling in a thread."""
    with start_server(directory, labeller, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()
