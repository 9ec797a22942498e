"""A judge's verdicts: `verdicts.jsonl`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stayaligned.core.progress import Progress, silent
from stayaligned.core.records import JUDGED, Completion, Verdict, read_jsonl, write_jsonl
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.measure import Judged, judge_names, refuse_unscored
from stayaligned.evaluation.verdicts import LEDGER_FILE, Ledger, judge_completions, what_is_judged
from stayaligned.experiments.config.validation import resolve_references
from stayaligned.experiments.stages.keys import identify_judge, judge_key
from stayaligned.experiments.stages.store import Store


@dataclass(frozen=True)
class Judging:
    """How judges are run and how they report."""

    store: Store
    seed: int
    """Seed of the testbed that the judges' `testbed:` references mean."""
    max_unscored: float
    """Largest share of unscored verdicts with which a stage is complete."""
    host_libraries: Callable[[], contextlib.AbstractContextManager[None]]
    """Entered around a judge that runs a model in this process."""
    progress: Progress = silent
    announce: Callable[[str], None] = lambda _text: None


def judge_all(judging: Judging, judges: Sequence[Judge], completions: Sequence[Completion]) -> list[Judged]:
    """Return every judge's verdicts on the completions of harmful and benign prompts.

    A stage is complete only with few enough unscored verdicts: a rerun judges again what was unscored, and nothing
    else. Completions without a final answer are unscored by every judge and do not count here.

    Raises:
        StayalignedError: as `judge_completions`, or if more than `max_unscored` of a judge's verdicts are unscored.
    """
    read = [completion for completion in completions if completion.prompt_set in JUDGED]
    return [_judge(judging, judge, name, read) for judge, name in judge_names(judges).items()]


def _judge(judging: Judging, judge: Judge, name: str, completions: Sequence[Completion]) -> Judged:
    store, title = judging.store, f"judge {name}"
    identity = identify_judge(judge, judging.seed)

    def refuse(verdicts: Sequence[Verdict]) -> None:
        read = [v for v, c in zip(verdicts, completions, strict=True) if what_is_judged(judge, c) is not None]
        refuse_unscored(name, read, judging.max_unscored)

    def fill(directory: Path) -> None:
        judging.progress(title, 0.0)
        around = judging.host_libraries() if judge.uses_torch else contextlib.nullcontext()
        with around, Ledger.open(store.root / LEDGER_FILE) as ledger:
            verdicts = judge_completions(
                resolve_references(judge, judging.seed),
                completions,
                ledger,
                identity=identity,
                progress=functools.partial(judging.progress, title),
                announce=lambda forecast: judging.announce(f"{title}: {forecast}"),
            )
        refuse(verdicts)
        write_jsonl(directory / "verdicts.jsonl", verdicts)

    key = judge_key(identity, completions, reads_thoughts=judge.reads_thoughts)
    stage = store.compute("judge", key, fill)
    verdicts = read_jsonl(stage / "verdicts.jsonl", Verdict)
    refuse(verdicts)
    return Judged(judge=judge, name=name, identity=identity, verdicts=tuple(verdicts), stage=stage)
