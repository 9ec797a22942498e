"""Judge finished completions again, without the model that wrote them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import fingerprint, write_text
from stayaligned.core.progress import Progress, silent
from stayaligned.core.provenance import commit, versions
from stayaligned.core.records import JUDGED, Completion, PromptSet, write_jsonl
from stayaligned.evaluation import caveats
from stayaligned.evaluation.completions import (
    COMPLETIONS_FILE,
    check_completions,
    read_completions,
    stored_completions,
)
from stayaligned.evaluation.degeneration import Degeneration, check
from stayaligned.evaluation.foreign import read_foreign
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.measure import Judged
from stayaligned.evaluation.results import (
    RESULT_FILE,
    Place,
    Provenance,
    Result,
    StoredResult,
    output_root,
    read_results,
)
from stayaligned.evaluation.verdicts import LEDGER_FILE, Ledger
from stayaligned.experiments.assemble import describe_stages, find_inputs, read_notes, write_measured
from stayaligned.experiments.config.yaml_file import dump_yaml, load_yaml
from stayaligned.experiments.stages.judge import Judging, judge_all
from stayaligned.experiments.stages.keys import stage_key
from stayaligned.experiments.stages.store import Store, collect_warnings

JUDGING_FILE = "judging.yaml"


@dataclass(frozen=True)
class _Source:
    """Completions, and the result that was computed from them before."""

    completions: tuple[Completion, ...]
    before: Result
    """The earlier result; one without any measurement for a bare file."""
    stored: StoredResult | None
    """The earlier result on disk; None for a bare file."""
    warnings: tuple[str, ...] = ()
    """Warnings of the reader, such as the number of rows that it skipped."""

    @property
    def scores(self) -> dict[Place, float | None]:
        """The tasks' scores, which need the tasks' data and are not computed again."""
        evidence = () if self.stored is None else self.stored.evidence
        return {(row.prompt_set, row.id): row.score for row in evidence if row.prompt_set not in JUDGED}

    @property
    def degenerate(self) -> dict[Place, bool | None]:
        """Whether each completion is degenerate: as found before, or by the default settings for a bare file."""
        if self.stored is None:
            return {(c.prompt_set, c.id): check(c, Degeneration()).found for c in self.completions}
        rows = self.stored.evidence
        return {(row.prompt_set, row.id): row.degenerate for row in rows if row.degenerate is not None}


def rejudge(
    source: Path | str,
    judges: Sequence[Judge],
    out: Path,
    *,
    prompt_set: PromptSet | None = None,
    prompts: str | None = None,
    max_unscored: float = 0.1,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _text: None,
) -> list[Result]:
    """Judge completions again and write new results, with the task scores, notes and provenance of the old ones.

    Nothing is judged twice: neither in a rerun, nor what the same judge judged in the run at `source`.

    Args:
        source: an output directory of `run`, `evaluate`, `bench` or `judge`, a `completions.jsonl`, or completions that
            another tool wrote (`stayaligned.evaluation.foreign`).
        judges: all judges of the new results; the first one is the primary judge.
        out: the output directory.
        prompt_set: prompt set of the rows of another tool, which state none.
        prompts: source of the prompts of such rows, if they have only ids.
        max_unscored: largest share of unscored verdicts; a judge that leaves more fails.
        progress: called with what is being done and the share that is done.
        announce: called with a judge's forecast of its cost, before the judge starts, and if nothing was judged.

    Raises:
        StayalignedError: if `source` holds no completions or others than its result was computed from, if `out`
            belongs to something else or was written by another version, or if a judge fails.
    """
    if len(set(judges)) < len(judges):
        raise StayalignedError("the same judge is named twice, with the same settings", hint="Name each judge once.")
    name, source = str(source), Path(source)
    source = source.parent if source.name == RESULT_FILE else source
    sources = _read_sources(source, name, prompt_set, prompts)
    store = Store(out)
    store.refuse_foreign(JUDGING_FILE)
    place = str(source.resolve()) if source.exists() else name
    _refuse_other_source(place, out)
    with store.locked():
        settings = {
            "source": place,
            "judges": [judge.spec() for judge in judges],
            "max_unscored": max_unscored,
        }
        write_text(out / JUDGING_FILE, dump_yaml(settings))
        if source.is_dir():
            Ledger.copy_if_missing(output_root(source) / LEDGER_FILE, out / LEDGER_FILE)
        results: list[Result] = []
        for place, one in sources.items():
            judging = Judging(store, one.before.seed, max_unscored, _host_libraries, progress, announce)
            judged = judge_all(judging, judges, one.completions)
            directory = out / place
            write_jsonl(directory / COMPLETIONS_FILE, one.completions)
            background = _describe(one, judged, out)
            results.append(write_measured(directory, background, one.completions, judged, one.scores, one.degenerate))
        if not store.computed:
            announce(f"nothing was judged: every verdict is stored in {out}")
    return results


def _host_libraries() -> contextlib.AbstractContextManager[None]:
    from stayaligned.hf.quiet import quiet

    return quiet()


def _read_sources(source: Path, name: str, prompt_set: PromptSet | None, prompts: str | None) -> dict[str, _Source]:
    """Read the completions at `source`, by the place of their result below it."""
    if source.is_dir():
        if prompt_set or prompts:
            raise StayalignedError(
                f"{source}: its completions state their prompts and prompt sets",
                hint="--prompt-set and --prompts are for files of other tools.",
            )
        return {
            str(stored.directory.relative_to(source)): _Source(stored_completions(stored), stored.result, stored)
            for stored in read_results([source])
        }
    if source.is_file() and _is_own(source):
        return {"": _Source(read_completions(source), _describe_file(source), None)}
    if not source.exists() and "?" not in name and not name.startswith("hf://"):
        raise StayalignedError(
            f"{source}: no such file or directory",
            hint="Give an output directory of `run` or `bench`, a completions.jsonl, or completions of another tool.",
        )
    with collect_warnings() as warnings:
        found = read_foreign(name, prompt_set, prompts)
    check_completions(name, found)
    return {"": _Source(tuple(found), _describe_file(Path(name.partition("?")[0])), None, tuple(warnings))}


def _is_own(path: Path) -> bool:
    """Return whether a file begins with a row of a `completions.jsonl`."""
    try:
        with path.open(encoding="utf-8") as stream:
            first = json.loads(stream.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and {"prompt_set", "prompt", "text", "reference", "finished"} <= first.keys()


def _describe(source: _Source, judged: Sequence[Judged], out: Path) -> Result:
    """Return the earlier result with the new judges, and without what is measured again."""
    before, judges = source.before, [one.judge.spec() for one in judged]
    own_stages = {f"judge {one.name}": one.stage for one in judged}
    own = describe_stages(out, own_stages)
    stages = {name: place for name, place in before.provenance.stages.items() if not name.startswith("judge ")}
    provenance = before.provenance.model_copy(
        update={
            "inputs": _inputs(before, judges),
            "stages": {**stages, **own["stages"]},
            "seconds": {**before.provenance.seconds, **own["seconds"]},
        }
    )
    identities = [one.identity.model_dump_json() for one in judged]
    notes = [*before.notes, *source.warnings, *read_notes(own_stages)]
    if source.stored is None:  # a result has these notes from the command that wrote it
        notes += caveats.note_repetitions(source.completions)
        notes += caveats.note_cuts(source.completions, None)
        notes += caveats.note_uniform_answers(source.completions)
    return before.model_copy(
        update={
            "notes": tuple(dict.fromkeys(notes)),
            "id": stage_key(("judged again", before.id, identities), before.seed)[:20],
            "experiment": {**before.experiment, "judges": judges},
            "scores": tuple(metric for metric in before.scores if metric.name.startswith("lm_eval/")),
            "provenance": provenance,
        }
    )


def _inputs(before: Result, judges: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the inputs of the earlier result, with those of the new judges instead of the old ones."""
    inputs = {place: found for place, found in before.provenance.inputs.items() if not place.startswith("judges.")}
    return inputs | find_inputs({"judges": [*judges]}, before.seed)


def _describe_file(path: Path) -> Result:
    """Return a result for a bare file of completions, without any measurement."""
    return Result(
        id="",
        arm=path.stem,
        seed=0,
        experiment={},
        judges=(),
        scores=(),
        evidence_sha256="",
        provenance=Provenance(
            versions=versions(),
            commit=commit(),
            inputs={"completions": f"sha256:{fingerprint(path)}" if path.exists() else str(path)},
        ),
    )


def _refuse_other_source(source: str, out: Path) -> None:
    """Refuse an output directory that holds verdicts on other completions."""
    path = out / JUDGING_FILE
    if path.exists() and (before := load_yaml(path).get("source")) != source:
        raise StayalignedError(
            f"{out}: holds the judging of {before}",
            hint="Choose another --out; only judges may be added to a directory.",
        )
