"""The stage of a judge's verdicts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from stayaligned.core.progress import Progress, silent
from stayaligned.core.records import Completion, Verdict, read_jsonl, write_jsonl
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.measure import JUDGED, refuse_unscored
from stayaligned.evaluation.verdicts import LEDGER_FILE, Ledger, judge_completions
from stayaligned.experiments.stages.keys import stage_key
from stayaligned.experiments.stages.store import Store


def stored_verdicts(
    store: Store,
    key: str,
    judge: Judge,
    name: str,
    completions: Callable[[], Sequence[Completion]],
    *,
    seed: int,
    max_unscored: float,
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _text: None,
) -> list[Verdict]:
    """The verdicts of the stage `judge-KEY`, made of the judged ones among `completions` if it is not there.

    A stage stands only with few enough unscored: a rerun asks again about what could not be scored, and about
    nothing else.

    Raises:
        StayalignedError: as `judge_completions`, or if more than `max_unscored` of the verdicts are unscored.
    """

    def fill(directory: Path) -> None:
        progress(f"judge {name}", 0.0)
        with around(), Ledger.open(store.root / LEDGER_FILE) as ledger:
            found = judge_completions(
                judge,
                [c for c in completions() if c.prompt_set in JUDGED],
                ledger,
                identity=stage_key(("verdict", judge.identity()), seed),
                progress=lambda share: progress(f"judge {name}", share),
                announce=lambda forecast: announce(f"judge {name}: {forecast}"),
            )
        refuse_unscored(name, found, max_unscored)
        write_jsonl(directory / "verdicts.jsonl", found)

    verdicts = read_jsonl(store.compute("judge", key, fill) / "verdicts.jsonl", Verdict)
    refuse_unscored(name, verdicts, max_unscored)
    return verdicts
