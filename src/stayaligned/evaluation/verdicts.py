"""Completions to verdicts, each kept on disk as it comes: nothing is asked twice, lost or counted twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import replace_file
from stayaligned.core.records import Completion, Verdict
from stayaligned.evaluation.judges import Forecast, Judge

LEDGER_FILE = "verdicts.sqlite"
_OWN = {"id", "prompt_set", "judge"}
"""What a verdict has of the completion and the judge, rather than of the content."""

_BUSY_SECONDS = 60.0


class Ledger:
    """Verdicts by content: what a judge said of a request with an answer, whichever run, seed or model it came from.

    A database of one file, which several processes may use at once and which survives being killed. Only what was
    scored is kept: an answer that a judge could not score is asked about again.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Generator[Ledger]:
        """The ledger in `path`, made if it is not there.

        Raises:
            StayalignedError: if the file is something else, or can't be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                # In this mode a killed process loses nothing that was kept; only a power cut may cost the last rows.
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT) STRICT")
                yield cls(connection)
        except sqlite3.Error as error:
            raise StayalignedError(
                f"{path}: {error}",
                hint="Free some space if the disk is full; a damaged file may be deleted, at the cost of asking again.",
            ) from error

    @staticmethod
    def take_over(source: Path, target: Path) -> None:
        """Let `target` begin with the verdicts of `source`, if there are some and `target` is not there yet."""
        if target.exists() or not source.is_file():
            return
        try:
            with (
                replace_file(target) as temporary,
                contextlib.closing(sqlite3.connect(source, timeout=_BUSY_SECONDS)) as kept,
                contextlib.closing(sqlite3.connect(temporary)) as copy,
            ):
                kept.backup(copy)
        except sqlite3.Error as error:
            raise StayalignedError(f"{source}: {error}", hint="Delete it to ask its judges again.") from error

    def find(self, keys: Iterable[str]) -> dict[str, str]:
        """The kept verdict, as JSON, of each key that has one."""
        found: dict[str, str] = {}
        for key in keys:
            for (verdict,) in self._connection.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)):
                found[key] = verdict
        return found

    def keep(self, key: str, verdict: str) -> None:
        """Keep one verdict; the first one stays."""
        self._connection.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (key, verdict))


def judge_completions(
    judge: Judge,
    completions: Sequence[Completion],
    ledger: Ledger,
    *,
    identity: str,
    progress: Callable[[float], None] = lambda _share: None,
    announce: Callable[[Forecast], None] = lambda _forecast: None,
) -> list[Verdict]:
    """One verdict per completion, in order; equal content is judged once, and what `ledger` has is not judged again.

    Args:
        judge: what judges.
        completions: answers to harmful and benign prompts.
        ledger: gets every scored verdict as soon as the judge yields it.
        identity: of the judge and of every file that it reads; a verdict is kept under it and the content.
        progress: called with the share that is judged.
        announce: called before the judge starts, if it forecasts what the rest will take.

    Raises:
        StayalignedError: if the judge can't work, answers for a completion that it was not given, or leaves one out.
    """
    keys = [_content_key(identity, completion) for completion in completions]
    kept = ledger.find(dict.fromkeys(keys))
    verdicts = {key: _kept_verdict(judge, text) for key, text in kept.items()}
    asked = {key: c for key, c in zip(keys, completions, strict=True) if key not in verdicts}
    if asked:
        _ask(judge, asked, verdicts, ledger, progress, announce, len(set(keys)))
    return [
        verdicts[key].model_copy(update={"id": c.id, "prompt_set": c.prompt_set, "judge": judge.name})
        for key, c in zip(keys, completions, strict=True)
    ]


def _kept_verdict(judge: Judge, text: str) -> Verdict:
    try:
        return Verdict.model_validate({**json.loads(text), "id": "", "prompt_set": "harmful", "judge": judge.name})
    except (ValueError, TypeError):
        raise StayalignedError(
            f"{LEDGER_FILE}: holds what is no verdict: {text[:80]!r}",
            hint="It was edited or damaged; delete it, at the cost of asking again.",
        ) from None


def _ask(
    judge: Judge,
    asked: dict[str, Completion],
    verdicts: dict[str, Verdict],
    ledger: Ledger,
    progress: Callable[[float], None],
    announce: Callable[[Forecast], None],
    total: int,
) -> None:
    """Let the judge read what has no verdict yet; `verdicts` and `ledger` get each as it comes."""
    forecast = judge.forecast([*asked.values()])
    if forecast is not None:
        announce(forecast)
    waiting: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for key, completion in asked.items():
        waiting[completion.prompt_set, completion.id].append(key)
    for verdict in judge.judge([*asked.values()]):
        keys = waiting[verdict.prompt_set, verdict.id]
        if not keys:
            raise _broken(judge, f"a verdict on {verdict.prompt_set} {verdict.id!r}, which it was not asked for")
        key = keys.pop(0)
        verdicts[key] = verdict
        if verdict.outcome is not None:
            ledger.keep(key, verdict.model_dump_json(exclude=_OWN))
        progress(len(verdicts) / total)
    missing = [place for place, keys in waiting.items() if keys]
    if missing:
        raise _broken(judge, f"no verdict on {len(missing)} of {len(asked)} answers")


def _broken(judge: Judge, what: str) -> StayalignedError:
    return StayalignedError(
        f"judge {judge.name!r} gave {what}",
        hint="A judge gives one verdict per completion, under its id; `outcome=None` where it can't tell.",
    )


def _content_key(identity: str, completion: Completion) -> str:
    content = completion.model_dump_json(exclude={"id"})
    return hashlib.sha256(f"{identity}\n{content}".encode("utf-8", "surrogatepass")).hexdigest()
