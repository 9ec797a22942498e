"""A client for chat completions of servers with OpenAI's HTTP interface: concurrent, with retries and limits.

It uses `httpx2` for HTTP and `tenacity` for retries, imported on first use. huggingface_hub's InferenceClient is
unsuitable: without a key, it sends the user's hub token to the server; with HF_HUB_OFFLINE set, it refuses local
servers; and its timeout applies to each chunk of a reply instead of the whole reply.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from stayaligned.core.errors import StayalignedError
from stayaligned.core.extras import EXTRAS, require_packages
from stayaligned.core.records import Message
from stayaligned.core.settings import Endpoint
from stayaligned.core.text import visible
from stayaligned.evaluation.endpoint.cost import Meter, Usage, estimate_usage
from stayaligned.evaluation.endpoint.replies import (
    FilteredError,
    Reply,
    ReportedError,
    UnreadableBodyError,
    parse_json,
    read_reply,
)

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

_RETRIED = frozenset({408, 409, 425, 429})
"""Status codes that are retried, in addition to all from 500 up."""
_GIVE_UP_AFTER = 10
"""Number of consecutive requests that fail after all attempts before asking ends with an error."""
_GIVE_UP_UNCONNECTED_AFTER = 3
"""Like `_GIVE_UP_AFTER`, while there has been no connection at all: a wrong address should be reported soon."""
_MAX_REPLY_BYTES = 16 << 20
"""Largest accepted reply; a chat completion takes a few thousand bytes."""
_MAX_QUOTE = 300
"""Number of characters of a server's message that an error quotes."""


_TAGS = re.compile(r"<(?:style|script|head)\b.*?</(?:style|script|head)>|<[^<>]*>", re.DOTALL | re.IGNORECASE)
"""What an error does not quote of a web page."""


FailureKind = Literal["no connection", "no reply", "rejected", "unreadable"]
"""No reply: a timeout, a connection closed early, 429 or 5xx. Rejected: the server does not accept this request.

Unreadable: the reply is not a chat completion, or not one that can be used."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why there is no usable reply after all attempts."""

    kind: FailureKind
    """Kind of the failure of the last attempt."""
    reason: str
    """Description of the failure of the last attempt."""
    requests: int = 1
    """Number of attempts."""


def accept_reply(_reply: Reply) -> str:
    """Accept every reply."""
    return ""


def ask(
    endpoint: Endpoint,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    temperature: float | None = 0.0,
    seed: int | Sequence[int] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    check: Callable[[Reply], str] = accept_reply,
    meter: Meter | None = None,
) -> Iterator[tuple[int, Reply | Failure]]:
    """Yield each conversation's index with its reply or failure, once each, in order of completion.

    At most `concurrency` conversations are sent before the caller takes their replies: a caller that stores each reply
    before taking the next loses at most this number if it is killed. Closing the iterator stops the requests.

    The key is read from the environment when the requests start and sent to `base_url` only; redirects are not
    followed. It is removed from all messages.

    Args:
        endpoint: Server, model and settings of the requests.
        conversations: Conversations that each end with a turn of the user.
        max_tokens: Maximum number of tokens of a completion.
        temperature: Sampling temperature; None omits it, for models that accept only their default.
        seed: Sampling seed, sent if given, or one for each conversation; few servers guarantee that it has an effect.
        template_arguments: Variables of the server's chat template, sent as `chat_template_kwargs` if there are any.
        check: Returns why a reply cannot be used, or ""; an unusable reply is requested again while attempts remain.
        meter: Counts tokens and requests, and stops at its budget.

    Raises:
        StayalignedError: If the server refuses the key or the model, stops responding, or the budget is used up.
    """
    options: dict[str, Any] = {endpoint.limit_field: max_tokens, "temperature": temperature}
    options["chat_template_kwargs"] = dict(template_arguments) if template_arguments else None
    sent = {"model": endpoint.model, "stream": False, **{k: v for k, v in options.items() if v is not None}}
    requests = _Requests(endpoint, sent, max_tokens, check, meter or Meter(), len(conversations))
    seeds = [seed] * len(conversations) if isinstance(seed, int | None) else seed
    return requests.run(conversations, seeds)


class _AttemptError(Exception):
    """A failed attempt that may succeed if repeated."""

    def __init__(self, kind: FailureKind, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.kind: FailureKind = kind
        self.wait = wait


class _RejectedError(Exception):
    """The server rejected this request."""


class _StoppedError(Exception):
    """The requests were stopped."""


class _BudgetError(Exception):
    """The budget does not allow another request."""


class _Requests:
    """The shared state of the threads of one call of `ask`."""

    def __init__(
        self,
        endpoint: Endpoint,
        sent: Mapping[str, Any],
        max_tokens: int,
        check: Callable[[Reply], str],
        meter: Meter,
        total: int,
    ) -> None:
        self._endpoint, self._sent, self._max_tokens = endpoint, sent, max_tokens
        self._check, self._meter, self._total = check, meter, total
        self._key = os.environ.get(endpoint.api_key_env, "").strip()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._has_replied = False
        self._consecutive_failures = 0

    def run(
        self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int | None]
    ) -> Generator[tuple[int, Reply | Failure]]:
        budget_reached = False
        with self._client() as client:

            def send(index: int) -> Reply | Failure | None:
                return self._converse(client, conversations[index], seeds[index])

            with closing(
                _run_in_threads(
                    send, len(conversations), self._endpoint.concurrency, self._stop, lambda: budget_reached
                )
            ) as found:
                for index, reply in found:
                    if reply is None:
                        budget_reached = True
                    else:
                        yield index, reply
        if budget_reached:
            raise self._meter.budget_error()

    def _client(self) -> httpx2.Client:
        require_packages({f"the server {self._endpoint.base_url}": EXTRAS["endpoint"]})
        import httpx2

        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            if not (self._key.isascii() and self._key.isprintable()):
                raise StayalignedError(
                    f"the key in {self._endpoint.api_key_env} contains characters that are not allowed in a key",
                    hint="Set the environment variable again, without line breaks.",
                )
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx2.Limits(max_connections=self._endpoint.concurrency)
        return httpx2.Client(headers=headers, timeout=self._endpoint.timeout_seconds, limits=limits)

    def _converse(
        self, client: httpx2.Client, conversation: Sequence[Message], seed: int | None
    ) -> Reply | Failure | None:
        """Send one conversation, with all attempts; None if the budget is used up."""
        import tenacity

        messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
        # ASCII escapes: a completion may contain a lone surrogate, which cannot be encoded in UTF-8.
        own = {"messages": messages} if seed is None else {"seed": seed, "messages": messages}
        body = json.dumps({**self._sent, **own}).encode("ascii")
        estimate = estimate_usage((turn.content for turn in conversation), self._max_tokens)
        longest = self._endpoint.patience_seconds
        backoff = tenacity.wait_random_exponential(multiplier=self._endpoint.backoff_seconds, max=longest)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            return backoff(state) + (error.wait if isinstance(error, _AttemptError) else 0.0)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._endpoint.attempts),
            retry=tenacity.retry_if_exception_type(_AttemptError),
            wait=pause,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            reply = retrying(self._attempt, client, body, estimate)
        except _BudgetError:
            return None
        except (_AttemptError, _RejectedError) as error:
            kind = error.kind if isinstance(error, _AttemptError) else "rejected"
            return self._count_failure(Failure(kind, str(error), retrying.statistics["attempt_number"]))
        return replace(reply, requests=retrying.statistics["attempt_number"])

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _attempt(self, client: httpx2.Client, body: bytes, estimate: Usage) -> Reply:
        if self._stop.is_set():
            raise _StoppedError
        if not self._meter.admit(estimate):
            raise _BudgetError
        spent = estimate
        try:
            status, headers, content = self._post(client, body)
            if not 200 <= status < 300:
                spent = Usage(0, 0)
                raise self._status_error(status, headers, content)
            reply = self._read(status, headers, content, estimate)
            spent = reply.usage
        except _AttemptError as error:
            spent = Usage(0, 0) if error.kind == "no connection" else spent
            raise
        except FilteredError:
            self._count_reply()
            raise _RejectedError("the server filtered the completion (content_filter)") from None
        finally:
            self._meter.settle(estimate, spent)
        self._count_reply()
        problem = self._check(reply)
        if problem:
            raise _AttemptError("unreadable", problem)
        return reply

    def _post(self, client: httpx2.Client, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and the whole body, within the timeout and the size limit of a reply."""
        import httpx2

        deadline = time.monotonic() + self._endpoint.timeout_seconds
        content = bytearray()
        try:
            with client.stream("POST", f"{self._endpoint.base_url}/chat/completions", content=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        raise _AttemptError(
                            "no reply", f"no complete reply within {self._endpoint.timeout_seconds:g} s"
                        )
                    if len(content) > _MAX_REPLY_BYTES:
                        raise _AttemptError("unreadable", f"a reply above {_MAX_REPLY_BYTES >> 20} MiB")
                return response.status_code, response.headers, bytes(content)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            reason = self._sanitize(str(error)) or "the connection timed out"
            raise _AttemptError("no connection", reason) from None
        except httpx2.TimeoutException:
            raise _AttemptError("no reply", f"no reply within {self._endpoint.timeout_seconds:g} s") from None
        except httpx2.HTTPError as error:
            raise _AttemptError("no reply", f"{type(error).__name__}: {self._sanitize(str(error))}") from None

    def _read(self, status: int, headers: Mapping[str, str], content: bytes, estimate: Usage) -> Reply:
        """Read the reply, or raise the error that it reports."""
        try:
            return read_reply(content, estimate)
        except UnreadableBodyError as error:
            raise _AttemptError("unreadable", f"not a chat completion: {self._sanitize(str(error))}") from None
        except ReportedError as error:
            raise self._status_error(error.status, headers, content, shown=status) from None

    def _status_error(
        self, status: int, headers: Mapping[str, str], content: bytes, *, shown: int | None = None
    ) -> Exception:
        """Return the error for a status without success: for this request only, or for all requests.

        `shown` is the status in the message, if a reply of another status reports the error in its body.
        """
        endpoint = self._endpoint
        message = self._sanitize(_error_message(content)) or "no message"
        text = f"the server at {endpoint.base_url} replied {shown or status}: {message}"
        with self._lock:
            has_replied = self._has_replied
        if status == 401 or (status == 403 and not has_replied):
            had = "was refused; check it" if self._key else "is not set; set it"
            return StayalignedError(text, hint=f"The key in the environment variable {endpoint.api_key_env} {had}.")
        if status == 404 or 300 <= status < 400:
            hint = f"Check that {endpoint.model!r} is a model of this server, and the end of `base_url` (often /v1)."
            return StayalignedError(text, hint=hint)
        if status == 402 or "insufficient_quota" in content.decode("utf-8", "replace"):
            return StayalignedError(
                text, hint="Received replies are stored. Add credit to the account of the server and rerun to continue."
            )
        if status not in _RETRIED and status < 500:
            return _RejectedError(f"{shown or status}: {message}")
        wait = _retry_after(headers.get("retry-after", ""), time.time())
        if wait > endpoint.patience_seconds:
            return StayalignedError(
                f"{text}; it asks to wait {wait:.0f} s, more than patience_seconds {endpoint.patience_seconds:g}",
                hint="Received replies are stored. Rerun later, or raise patience_seconds.",
            )
        return _AttemptError("no reply", f"{shown or status}: {message}", wait=wait)

    def _count_reply(self) -> None:
        with self._lock:
            self._has_replied, self._consecutive_failures = True, 0

    def _count_failure(self, failure: Failure) -> Failure:
        """Return the failure, or raise an error after too many consecutive failures."""
        with self._lock:
            # Once the server has replied, a rejected or unreadable request says nothing about other requests.
            only_this = failure.kind in {"rejected", "unreadable"} and self._has_replied
            if only_this or "content_filter" in failure.reason:
                return failure
            self._consecutive_failures += 1
            unconnected = failure.kind == "no connection" and not self._has_replied
            if self._consecutive_failures < (
                min(_GIVE_UP_UNCONNECTED_AFTER, self._total) if unconnected else _GIVE_UP_AFTER
            ):
                return failure
            times = self._consecutive_failures
        raise StayalignedError(
            f"the server at {self._endpoint.base_url} failed {times} requests in a row, the last one "
            f"{failure.requests} times: {failure.reason}",
            hint="Received replies are stored. Rerun when the server is up; if it never replied, check `base_url`.",
        )

    def _sanitize(self, text: str) -> str:
        """Shorten a message of the server, and remove the key and terminal control characters."""
        text = text.replace(self._key, "[key]") if self._key else text
        return visible(" ".join(text[:_MAX_QUOTE].split()))


def _error_message(content: bytes) -> str:
    """Return the message in the body of an error, in any of the common formats."""
    text = content[: 4 * _MAX_QUOTE].decode("utf-8", "replace")
    if text.lstrip().startswith("<"):
        return " ".join(_TAGS.sub(" ", text).split())
    try:
        body = parse_json(content)
    except ValueError:
        return text
    body = body[0] if isinstance(body, list) and body else body
    error = body.get("error") or body if isinstance(body, dict) else body
    if isinstance(error, dict):
        found = [str(error[key]) for key in ("message", "detail", "code") if isinstance(error.get(key), str)]
        return " ".join(found) or text
    return error if isinstance(error, str) else text


def _retry_after(value: str, now: float) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date; 0 if it is invalid."""
    from email.utils import parsedate_to_datetime

    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0


def _run_in_threads(
    work: Callable[[int], T], total: int, threads: int, stop: threading.Event, ended: Callable[[], bool]
) -> Generator[tuple[int, T]]:
    """Yield the results of `work` for 0 … total-1 from threads; at most `threads` are started and not yet taken.

    The threads are daemons, which concurrent.futures does not support: an interrupted command must not wait for a
    server that does not reply.
    """
    waiting: SimpleQueue[int | None] = SimpleQueue()
    done: SimpleQueue[tuple[int, T | BaseException]] = SimpleQueue()

    def worker() -> None:
        while (index := waiting.get()) is not None:
            try:
                done.put((index, work(index)))
            except BaseException as error:
                done.put((index, error))

    threads = min(threads, total)
    for _ in range(threads):
        threading.Thread(target=worker, daemon=True).start()
    remaining = iter(range(total))
    n_running = 0
    try:
        for index in islice(remaining, threads):
            waiting.put(index)
            n_running += 1
        while n_running:
            index, result = done.get()
            n_running -= 1
            if isinstance(result, BaseException):
                raise result
            yield index, result
            if not ended() and (following := next(remaining, None)) is not None:
                waiting.put(following)
                n_running += 1
    finally:
        stop.set()
        for _ in range(threads):
            waiting.put(None)
