"""Completions to verdicts. Each verdict is stored as soon as the judge gives it, and no completion is judged twice."""

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
from stayaligned.core.records import HARM_SETS, Completion, Verdict
from stayaligned.evaluation.judges import Forecast, Judge
from stayaligned.evaluation.results import JudgeIdentity

LEDGER_FILE = "verdicts.sqlite"
_OWN_FIELDS = {"id", "prompt_set", "judge"}
"""Fields of a verdict that come from the completion and the judge's name, and are not stored in the ledger."""

_BUSY_SECONDS = 60.0


def verdict_key(identity: JudgeIdentity, content: str) -> str:
    """Return the key under which verdicts are stored: the hash of the judge's identity and of what was judged."""
    return hashlib.sha256(f"{identity.model_dump_json()}\n{content}".encode("utf-8", "surrogatepass")).hexdigest()


class Ledger:
    """Scored verdicts by `verdict_key` of one completion, shared by all runs, seeds and models.

    An SQLite file, which several processes may use at once and which survives a killed process. Unscored verdicts are
    not stored, so that the judge is asked again.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Generator[Ledger]:
        """Open the ledger in `path`, creating it if it does not exist.

        Raises:
            StayalignedError: if the file is no ledger, or can't be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                # In this mode a killed process loses no stored row; only a power cut may cost the last rows.
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT) STRICT")
                yield cls(connection)
        except sqlite3.Error as error:
            raise StayalignedError(
                f"{path}: {error}",
                hint="Free some space if the disk is full; if the file is damaged, delete it to judge again.",
            ) from error

    @staticmethod
    def copy_if_missing(source: Path, target: Path) -> None:
        """Copy the ledger `source` to `target`, if `source` exists and `target` does not."""
        if target.exists() or not source.is_file():
            return
        try:
            with (
                replace_file(target) as temporary,
                contextlib.closing(sqlite3.connect(source, timeout=_BUSY_SECONDS)) as stored,
                contextlib.closing(sqlite3.connect(temporary)) as copy,
            ):
                stored.backup(copy)
        except sqlite3.Error as error:
            raise StayalignedError(f"{source}: {error}", hint="Delete it to judge again.") from error

    def find(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the stored verdict, as JSON, of each key that has one."""
        found: dict[str, str] = {}
        for key in keys:
            for (verdict,) in self._connection.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)):
                found[key] = verdict
        return found

    def store(self, key: str, verdict: str) -> None:
        """Store a verdict; if the key has one already, that one stays."""
        self._connection.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (key, verdict))


def judge_completions(
    judge: Judge,
    completions: Sequence[Completion],
    ledger: Ledger,
    *,
    identity: JudgeIdentity,
    progress: Callable[[float], None] = lambda _share: None,
    announce: Callable[[Forecast], None] = lambda _forecast: None,
) -> list[Verdict]:
    """Return one verdict per completion, in order; equal content is judged once, and never if the ledger has it.

    Content is the final answer with its prompt: a completion without a final answer is unscored.

    Args:
        judge: the judge.
        completions: completions of harmful and benign prompts.
        ledger: receives every scored verdict as soon as the judge yields it.
        identity: what the judge's verdicts depend on.
        progress: called with the share that is judged.
        announce: called before the judge starts, if it forecasts the cost of the remaining completions.

    Raises:
        StayalignedError: if the judge fails, gives a verdict on a completion that it was not given, or gives none on
            one that it was given.
    """
    read = [what_is_judged(judge, completion) for completion in completions]
    keys = ["" if c is None else verdict_key(identity, c.model_dump_json(exclude={"id"})) for c in read]
    judged = {key: c for key, c in zip(keys, read, strict=True) if c is not None}
    stored = ledger.find(judged)
    verdicts = {key: _parse_verdict(judge, text) for key, text in stored.items()}
    missing = {key: c for key, c in judged.items() if key not in verdicts}
    if missing:
        _judge_missing(judge, missing, verdicts, ledger, progress, announce, len(judged))
    return [
        verdicts[key].model_copy(update={"id": c.id, "prompt_set": c.prompt_set, "judge": judge.name})
        if key
        else Verdict(id=c.id, prompt_set=c.prompt_set, judge=judge.name, outcome=None, reason=c.split().reason)
        for key, c in zip(keys, completions, strict=True)
    ]


def what_is_judged(judge: Judge, completion: Completion) -> Completion | None:
    """Return a completion as a judge reads it, with its final answer as its text; None if it has none.

    To a judge, a completion of any set that measures harm is one of a plain harmful prompt.
    """
    read = completion if judge.reads_thoughts else completion.answered()
    if read is None or read.prompt_set not in HARM_SETS:
        return read
    return read.model_copy(update={"prompt_set": "harmful", "asked": (), "written": ""})


def _parse_verdict(judge: Judge, text: str) -> Verdict:
    try:
        return Verdict.model_validate({**json.loads(text), "id": "", "prompt_set": "harmful", "judge": judge.name})
    except (ValueError, TypeError):
        raise StayalignedError(
            f"{LEDGER_FILE}: invalid verdict: {text[:80]!r}",
            hint="The file was edited or damaged; delete it to judge again.",
        ) from None


def _judge_missing(
    judge: Judge,
    missing: dict[str, Completion],
    verdicts: dict[str, Verdict],
    ledger: Ledger,
    progress: Callable[[float], None],
    announce: Callable[[Forecast], None],
    total: int,
) -> None:
    """Run the judge on the completions without a verdict; add each verdict to `verdicts` and `ledger` at once."""
    waiting: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    asked: list[Completion] = []
    for key, completion in missing.items():
        # Prompts of the sets that measure harm share their ids.
        own = (
            completion
            if (completion.prompt_set, completion.id) not in waiting
            else completion.model_copy(update={"id": key})
        )
        waiting[own.prompt_set, own.id].append(key)
        asked.append(own)
    forecast = judge.forecast(asked)
    if forecast is not None:
        announce(forecast)
    for verdict in judge.judge(asked):
        keys = waiting[verdict.prompt_set, verdict.id]
        if not keys:
            raise _contract_error(judge, f"a verdict on {verdict.prompt_set} {verdict.id!r}, which it was not given")
        key = keys.pop(0)
        verdicts[key] = verdict
        if verdict.outcome is not None:
            ledger.store(key, verdict.model_dump_json(exclude=_OWN_FIELDS))
        progress(len(verdicts) / total)
    without = [place for place, keys in waiting.items() if keys]
    if without:
        raise _contract_error(judge, f"no verdict on {len(without)} of {len(missing)} completions")


def _contract_error(judge: Judge, what: str) -> StayalignedError:
    return StayalignedError(
        f"judge {judge.name!r} gave {what}",
        hint="A judge gives one verdict per completion, under its id; `outcome=None` where it can't tell.",
    )
