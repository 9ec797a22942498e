"""The local page on which a person labels completions: one process, loopback only, a token in its address."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socketserver
import stat
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, StrictInt, ValidationError

from stayaligned.core.errors import StayalignedError, first_problem
from stayaligned.core.files import writable
from stayaligned.core.records import Record
from stayaligned.core.text import is_blank, one_line, visible
from stayaligned.evaluation.labelling.store import LabelStore, latest_labels
from stayaligned.evaluation.labelling.values import Choice, CompletionKey, DrawnItem, check_labeller

ADDRESS_FILE = "address.json"
"""File with the port and the token of a labelling's page, readable by its owner only."""

_SCREEN = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
_HERE = "127.0.0.1"
_LOOPBACK = frozenset({_HERE, "localhost", "[::1]"})
"""Host names in requests; a forwarded port (`ssh -L`) may have another number."""
_PAGE = Path(__file__).parent / "page"
_MAX_BODY = 16 * 1024
_MAX_ITEMS, _MAX_TEXT = 16, 1 << 20
"""Items, and about the characters of text, in one reply."""


def serve(
    directory: Path,
    *,
    labeller: str | None,
    port: int = 0,
    open_browser: bool = True,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve the labelling page of a directory until the process is interrupted.

    The server listens on 127.0.0.1 only. Each address contains a random token that is stored in the directory,
    readable by its owner only, with the port: the address stays valid when the command is started again.

    Args:
        directory: directory with a design; labels are appended to it.
        labeller: name of the person who labels; None lets the page ask for it.
        port: port to listen on; 0 takes the port of the last time or, if that is in use, a free one.
        open_browser: whether to open the page in the default browser.
        announce: receives the address.

    Raises:
        StayalignedError: if the directory has no design, its labels are damaged, the name is no labeller's name, or
            the port is in use.
    """
    with start_server(directory, labeller, port) as server:
        announce(server.address)
        if open_browser and any(os.environ.get(name) for name in _SCREEN):  # a text browser would take the terminal
            threading.Thread(target=webbrowser.open, args=(server.single_use_address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _checked_name(labeller: str) -> str:
    try:
        return check_labeller(labeller)
    except ValueError as error:
        raise StayalignedError(f"labeller {one_line(labeller)!r}: {error}", hint="Give another name.") from None


# ---- what the page asks for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reply:
    status: HTTPStatus
    content: Mapping[str, Any] | str
    """JSON as a mapping; text is the page."""
    location: str = ""


def _failure(status: HTTPStatus, message: str) -> _Reply:
    return _Reply(status, {"error": message})


class _Press(Record):
    """One label as the page sends it."""

    labeller: str
    item: StrictInt
    """Number of the item, in the order of the draw."""
    completion: str
    outcome: Choice
    previous: Choice | None
    """The label that the page showed for this completion: another one now means that another window changed it."""


@dataclass
class _Labelling:
    """The labels of one directory as the page reads and writes them, for one or several labellers."""

    store: LabelStore
    labeller: str | None
    """The only labeller; None for any."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def questions(self) -> list[list[CompletionKey]]:
        """The distinct completions of each item, in an order that is random but the same each time."""
        seed = self.store.design.seed

        def rank(key: CompletionKey) -> bytes:
            return hashlib.sha256(f"{seed} {key}".encode()).digest()

        return [sorted(item.questions(), key=rank) for item in self.store.design.items]

    def state(self, labeller: str | None) -> _Reply:
        """Return the labels of one labeller by completion, or only the names of labellers if there is no name."""
        labels = self.store.read()
        names = [self.labeller] if self.labeller else sorted({label.labeller for label in labels})
        if labeller is None:
            return _Reply(HTTPStatus.OK, {"labeller": self.labeller, "labellers": names})
        labeller = self._own(labeller)
        latest = latest_labels(self.store.items, labels)
        places: dict[CompletionKey, int] = {}
        for number, keys in enumerate(self.questions):
            for key in keys:
                places.setdefault(key, number)  # equal completions of one prompt under two seeds are asked about once
        steps = [
            (number, key[0], key[2], label.outcome if (label := latest.get(key, {}).get(labeller)) else None)
            for key, number in places.items()
        ]
        wanted, fixed = self.store.design.wanted, self.labeller is not None
        return _Reply(HTTPStatus.OK, {"labeller": labeller, "fixed": fixed, "wanted": wanted, "steps": steps})

    def items(self, first: int, count: int) -> _Reply:
        """Return prompts and completions, without anything that tells arm, model or verdict."""
        found: list[dict[str, Any]] = []
        size = 0
        for number in range(first, min(first + min(count, _MAX_ITEMS), len(self.questions))):
            if size > _MAX_TEXT:
                break
            item = self.store.design.items[number]
            shown = self._show(item, self.questions[number])
            size += sum(len(one["text"]) for one in [*shown["turns"], *shown["completions"]])
            found.append({"item": number, **shown})
        return _Reply(HTTPStatus.OK, {"items": found})

    def _show(self, item: DrawnItem, keys: list[CompletionKey]) -> dict[str, Any]:
        distinct = item.questions()
        return {
            "turns": [{"role": turn.role, "text": visible(turn.content)} for turn in item.messages],
            "completions": [
                {
                    "completion": key[2],
                    "text": visible(distinct[key].text),
                    "blank": is_blank(distinct[key].text),
                    "cut": not distinct[key].finished,
                }
                for key in keys
            ],
        }

    def label(self, press: _Press) -> _Reply:
        """Store one label, and reply once it is on the disk. A repeated one is accepted and stored once."""
        labeller = self._own(press.labeller)
        if not 0 <= press.item < len(self.questions):
            raise StayalignedError(f"item {press.item}: the design has {len(self.questions)} items")
        item = self.store.design.items[press.item]
        label = self.store.label(item.id, press.completion, press.outcome, labeller)
        key = (item.prompt_set, item.prompt, press.completion)
        with self._lock:
            found = latest_labels(self.store.items, self.store.read()).get(key, {}).get(labeller)
            current = found.outcome if found else None
            if current not in (press.outcome, press.previous):
                return _Reply(HTTPStatus.CONFLICT, {"outcome": current})
            try:
                self.store.append([label])
            except StayalignedError as error:
                return _failure(HTTPStatus.INSUFFICIENT_STORAGE, error.message)
        return _Reply(HTTPStatus.OK, {"outcome": press.outcome})

    def _own(self, labeller: str) -> str:
        """Return the labeller's name; the only one if the command named it."""
        if self.labeller is not None and labeller != self.labeller:
            raise StayalignedError(f"the labeller is {self.labeller}: start the command with another --labeller")
        return _checked_name(labeller)


@cache
def _page() -> tuple[str, str]:
    """Return the page, and its content security policy: its own script and style by hash, and no other origin."""
    style, script = ((_PAGE / name).read_text(encoding="utf-8") for name in ("label.css", "label.js"))
    html = (_PAGE / "label.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return html.replace("{STYLE}", style).replace("{SCRIPT}", script), policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- the server ------------------------------------------------------------------------------------------------------


class LabellingServer(ThreadingHTTPServer):
    """The server of one labelling. It knows two secrets: the token, and a word that opens the page once."""

    daemon_threads = True

    def __init__(self, labelling: _Labelling, port: int, token: str) -> None:
        super().__init__((_HERE, port), _Handler)
        self.labelling = labelling
        self.token = token
        self._once: str | None = secrets.token_urlsafe(24)
        self._lock = threading.Lock()

    def server_bind(self) -> None:
        """Bind without the base class's look-up of the host's name, which can take seconds without a network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HERE, self.server_address[1]

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{_HERE}:{self.server_port}/{self.token}/"

    @property
    def single_use_address(self) -> str:
        """An address that works once: a browser's command line can be read by other users of the machine."""
        return f"http://{_HERE}:{self.server_port}/{self._once}/"

    def takes(self, given: str) -> bool:
        """Return whether this is the word that opens the page once, and was not used before."""
        with self._lock:
            if self._once is None or not hmac.compare_digest(given.encode(), self._once.encode()):
                return False
            self._once = None
            return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that a browser closed early; show every other error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "stayaligned", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain"
    disable_nagle_algorithm = True
    timeout = 60
    server: LabellingServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: an address contains the token."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, find: Callable[[str, Mapping[str, str]], _Reply]) -> None:
        parts = urlsplit(self.path)
        _, token, *rest = [*parts.path.split("/", 2), ""]
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if (reply := self._refused(token)) is None:
            try:
                reply = find(rest[0], query)
            except StayalignedError as error:
                reply = _failure(HTTPStatus.BAD_REQUEST, error.message)
        self._send(reply)

    def _refused(self, token: str) -> _Reply | None:
        """Return the reply to a request of another site, or without the token; None for the page's own."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in _LOOPBACK and host not in _LOOPBACK:
            return self._refuse("This page answers only to the names of this machine: 127.0.0.1 or localhost.")
        if self.command == "POST" and self.headers.get("Origin") != f"http://{host}":
            return self._refuse("This request comes from another site.")
        if hmac.compare_digest(token.encode(), self.server.token.encode()):
            return None
        if self.command == "GET" and self.server.takes(token):
            return _Reply(HTTPStatus.SEE_OTHER, "", f"/{self.server.token}/")
        return self._refuse("This address is not valid. Open the one that `stayaligned label` printed.")

    def _refuse(self, message: str) -> _Reply:
        self.close_connection = True  # what follows the headers is not read
        return _failure(HTTPStatus.FORBIDDEN, message)

    def _get(self, path: str, query: Mapping[str, str]) -> _Reply:
        match path:
            case "":
                return _Reply(HTTPStatus.OK, _page()[0])
            case "state":
                return self.server.labelling.state(query.get("labeller"))
            case "items":
                return self.server.labelling.items(_number(query, "first"), _number(query, "count"))
            case _:
                return _failure(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self, path: str, _query: Mapping[str, str]) -> _Reply:
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get("Content-Type", "")
        if not length.isdecimal() or int(length) > _MAX_BODY or kind != "application/json":
            self.close_connection = True
            return _failure(HTTPStatus.BAD_REQUEST, f"expected JSON of at most {_MAX_BODY} bytes")
        body = self.rfile.read(int(length))
        if path != "label":
            return _failure(HTTPStatus.NOT_FOUND, "there is no such page")
        try:
            return self.server.labelling.label(_Press.model_validate_json(body))
        except ValidationError as error:
            return _failure(HTTPStatus.BAD_REQUEST, first_problem(error, "label"))

    def _send(self, reply: _Reply) -> None:
        html = isinstance(reply.content, str)
        body = (reply.content if isinstance(reply.content, str) else json.dumps(reply.content)).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "text/html; charset=utf-8" if html else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _page()[1] if html else "default-src 'none'")
        for name, value in _ALWAYS.items():
            self.send_header(name, value)
        if reply.location:
            self.send_header("Location", reply.location)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


_ALWAYS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise StayalignedError(f"{name}: expected a whole number")
    return int(text)


class _Address(Record):
    """The stored part of the address."""

    port: int = Field(ge=1, le=65535)
    token: str = Field(pattern=r"^[A-Za-z0-9_-]{43}$")


def start_server(directory: Path, labeller: str | None, port: int) -> LabellingServer:
    """Bind a server to the port, and store its address; `serve` has the arguments and the errors."""
    store = LabelStore.open(directory)
    store.read()  # damaged labels end the command, not the work of a person
    labelling = _Labelling(store, labeller if labeller is None else _checked_name(labeller))
    file = directory / ADDRESS_FILE
    stored = _stored_address(file)
    token = stored.token if stored else secrets.token_urlsafe(32)
    server = None
    for wanted in [port] if port else [*([stored.port] if stored else []), 0]:
        try:
            server = LabellingServer(labelling, wanted, token)
            break
        except (OSError, OverflowError) as error:
            if wanted == port:
                raise StayalignedError(
                    f"port {port} of {_HERE} can't be used: {error}",
                    hint="Choose another --port, or none for a free one.",
                ) from None
    assert server is not None  # noqa: S101
    address = _Address(port=server.server_port, token=token)
    if address != stored:
        with writable(file):
            _write_private(file, address.model_dump_json() + "\n")
    return server


def _write_private(file: Path, text: str) -> None:
    """Write a file that was at no moment readable by others."""
    temporary = file.with_name(f".{file.name}.partial")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
    temporary.replace(file)


def _stored_address(file: Path) -> _Address | None:
    """Return the address of the last time; None if there is none, or others could have read it."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid != os.geteuid():
            return None
        return _Address.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
