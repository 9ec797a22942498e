"""A chat-completions server whose verdicts are a pure function of the request, and that breaks 3 replies in 10.

    python benchmarks/faulty_server.py PORT_FILE

`endpoint.py` and `tests/faults/test_endpoint.py` use it. GET /stats returns its statistics.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BROKEN_SHARE = 0.3
NEVER_RIGHT = 200
"""One content in this many never gets a correct reply."""
DELAY_SECONDS = 6.0
"""Longer than the timeout of every client here."""
RETRY_AFTER_SECONDS = 1
BREAKS = (
    "delay",
    "429",
    "429 with Retry-After",
    "500",
    "503 with Retry-After",
    "closed before the reply",
    "closed within the reply",
    "malformed JSON",
    "truncated JSON",
    "no choices",
    "empty content",
    "out of range",
    "wrong words",
    "two scores",
)
SLOW = {"delay", "429 with Retry-After", "503 with Retry-After"}
"""Not used for contents that never get a correct reply: their many attempts would take minutes."""


def number_of(content: str) -> int:
    """Return a large number that depends only on the content."""
    return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def never_right(content: str) -> bool:
    """Whether this content never gets a usable reply."""
    return number_of(content) % NEVER_RIGHT == 0


def right_numbers(content: str) -> dict[str, int]:
    """Return the verdict on a content: the numbers of the rubric in it."""
    number = number_of(content) // NEVER_RIGHT
    # Only the end of the question belongs to the rubric; the completion may contain the same words.
    if "#thescore: a whole number" in content[-200:]:
        return {"thescore": number % 5 + 1}
    return {"refused": number % 2, "convincing": number // 2 % 5 + 1, "specific": number // 10 % 5 + 1}


def right_reply(content: str) -> str:
    """Return the text of the correct reply."""
    lines = [f"#{name}: {value}" for name, value in right_numbers(content).items()]
    return "\n".join(["#thereason: so said the function of the content", *lines])


class Seen:
    """Thread-safe statistics of the server."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.not_before: dict[str, float] = {}
        self.too_soon = 0
        self.under_way = self.most_under_way = 0

    def summary(self) -> dict[str, Any]:
        """Return the counts; `right_again` is the number of repeated correct replies to the same content."""
        with self.lock:
            return {
                "requests": self.asked.total(),
                "contents": len(self.asked),
                "right": self.right.total(),
                "right_again": self.right.total() - len(self.right),
                "broken": dict(self.broken),
                "too_soon": self.too_soon,
                "most_at_once": self.most_under_way,
            }


class Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions and GET /stats."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    seen: Seen

    def log_message(self, *_arguments: object) -> None:
        """No log."""

    def do_GET(self) -> None:
        self._send(200, json.dumps(self.seen.summary()).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = asked["messages"][-1]["content"]
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        with self.seen.lock:
            self.seen.under_way += 1
            self.seen.most_under_way = max(self.seen.most_under_way, self.seen.under_way)
            self.seen.too_soon += time.monotonic() < self.seen.not_before.pop(key, 0.0)
            self.seen.asked[key] += 1
            draw = random.Random(f"{key} {self.seen.asked[key]}")
        try:
            if never_right(content):
                self._break(draw.choice([kind for kind in BREAKS if kind not in SLOW]), key, content)
            elif draw.random() < BROKEN_SHARE:
                self._break(draw.choice(BREAKS), key, content)
            else:
                self._complete(right_reply(content))
                with self.seen.lock:
                    self.seen.right[key] += 1
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.seen.lock:
                self.seen.under_way -= 1

    def _break(self, kind: str, key: str, content: str) -> None:
        with self.seen.lock:
            self.seen.broken[kind] += 1
            if kind.endswith("Retry-After"):
                self.seen.not_before[key] = time.monotonic() + RETRY_AFTER_SECONDS
        right = self._body(right_reply(content))
        wrong_words = "I would rather not rate this, but the answer says #thescore or five of five."
        replies = {
            "empty content": "",
            "out of range": "#thereason: so\n#thescore: 6\n#refused: 2\n#convincing: 0\n#specific: 9",
            "wrong words": wrong_words,
            "two scores": "#thescore: 1\n#thescore: 5\n#refused: 0\n#refused: 1\n#convincing: 1\n#specific: 1",
        }
        bodies = {
            "malformed JSON": b"<html>502</html>",
            "truncated JSON": right[: len(right) // 2],
            "no choices": b'{"id": "x", "object": "chat.completion"}',
        }
        if kind == "delay":
            time.sleep(DELAY_SECONDS)
            self.close_connection = True
        elif kind.startswith(("429", "500", "503")):
            wait = {"Retry-After": str(RETRY_AFTER_SECONDS)} if kind.endswith("Retry-After") else {}
            self._send(int(kind[:3]), b'{"error": {"message": "broken on purpose"}}', wait)
        elif kind == "closed before the reply":
            self.close_connection = True
        elif kind == "closed within the reply":
            self._send(200, right, sent=len(right) // 2)
            self.close_connection = True
        elif kind in bodies:
            self._send(200, bodies[kind])
        else:
            self._complete(replies[kind])

    def _complete(self, text: str) -> None:
        self._send(200, self._body(text))

    def _body(self, text: str) -> bytes:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 400, "completion_tokens": 20, "total_tokens": 420}
        return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    """A server for many concurrent connections."""

    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore the closed connections of killed clients."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def main() -> None:
    """Serve on a free port, and write the port to the given file."""
    server = Server(("127.0.0.1", 0), type("WithSeen", (Handler,), {"seen": Seen()}))
    written = Path(sys.argv[1]).with_suffix(".partial")
    written.write_text(str(server.server_port), encoding="utf-8")
    written.replace(sys.argv[1])
    server.serve_forever()


if __name__ == "__main__":
    main()
