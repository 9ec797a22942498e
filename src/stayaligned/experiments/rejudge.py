"""Finished completions judged again, without the model that wrote them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import fingerprint, write_text
from stayaligned.core.progress import Progress, silent
from stayaligned.core.provenance import commit, versions
from stayaligned.core.records import Completion, Verdict, read_jsonl, write_jsonl
from stayaligned.evaluation.degeneration import Degeneration, signs
from stayaligned.evaluation.judges import JUDGES, Judge
from stayaligned.evaluation.measure import JUDGED, Place, judge_names, measure, prompt_hash
from stayaligned.evaluation.results import (
    Evidence,
    Provenance,
    Result,
    evidence_text,
    read_evidence,
    read_result,
    result_files,
    write_result,
)
from stayaligned.evaluation.verdicts import LEDGER_FILE, Ledger
from stayaligned.experiments.config.validation import resolve_references, strings_in
from stayaligned.experiments.config.yaml_file import load_yaml
from stayaligned.experiments.stages.judge import stored_verdicts
from stayaligned.experiments.stages.keys import identify, stage_key
from stayaligned.experiments.stages.store import Store, refuse_foreign

COMPLETIONS_FILE = "completions.jsonl"
JUDGING_FILE = "judging.yaml"


@dataclass(frozen=True, slots=True)
class _Answered:
    """Completions, and what is known of them without judging them."""

    completions: tuple[Completion, ...]
    result: Result | None
    """What a run found of them; None of a bare file."""
    evidence: tuple[Evidence, ...] = ()

    @property
    def seed(self) -> int:
        """Of the testbed that a judge's `testbed:` reference means."""
        return 0 if self.result is None else self.result.seed

    @property
    def content(self) -> str:
        """What tells these completions from others."""
        rows = "".join(c.model_dump_json() for c in self.completions)
        return hashlib.sha256(rows.encode("utf-8", "surrogatepass")).hexdigest()


def rejudge(
    source: Path,
    judges: Sequence[Judge],
    out: Path,
    *,
    max_unscored: float = 0.1,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _text: None,
) -> list[Result]:
    """Judge completions again into `out`: new results, with the old scores of tasks, notes and provenance.

    Rerun, it asks about nothing that it has a verdict on. A judge that the run at `source` had already isn't asked
    again either: its verdicts are taken over.

    Args:
        source: a directory that `run`, `evaluate`, `bench` or this wrote, or a `completions.jsonl`.
        judges: all judges of the new results; the first one is the primary one.
        out: the output directory.
        max_unscored: a larger share of unscored verdicts fails, and nothing is written for that judge.
        progress: called with what is being done and the share that is done.
        announce: called with what a judge forecasts, before it starts.

    Raises:
        StayalignedError: if `source` holds no completions or others than its result was made of, if `out` belongs to
            something else, or a judge can't work.
    """
    if len(set(judges)) < len(judges):
        raise StayalignedError("the same judge is named twice, with the same settings", hint="Name each once.")
    found = _find(source)
    store = Store(out)
    refuse_foreign(out, JUDGING_FILE)
    _refuse_other_source(source, out)
    with store.locked():
        settings = {
            "source": str(source.resolve()),
            "judges": [judge.spec() for judge in judges],
            "max_unscored": max_unscored,
        }
        write_text(out / JUDGING_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        if source.is_dir():
            Ledger.take_over(source / LEDGER_FILE, out / LEDGER_FILE)
        results: list[Result] = []
        for place, answered in found.items():
            stages = {
                judge: stage_key(("rejudge", answered.content, judge.identity()), answered.seed) for judge in judges
            }
            verdicts = {
                judge: stored_verdicts(
                    store,
                    stages[judge],
                    JUDGES.parse(resolve_references(judge.spec(), answered.seed)),
                    name,
                    lambda answered=answered: answered.completions,
                    seed=answered.seed,
                    max_unscored=max_unscored,
                    around=_quiet if judge.uses_torch else contextlib.nullcontext,
                    progress=progress,
                    announce=announce,
                )
                for judge, name in judge_names(judges).items()
            }
            places = {name: store.directory("judge", stages[judge]) for judge, name in judge_names(judges).items()}
            results.append(_write(out / place, source, answered, verdicts, places))
    return results


def _quiet() -> contextlib.AbstractContextManager[None]:
    from stayaligned.hf.quiet import quiet

    return quiet()


def _find(source: Path) -> dict[str, _Answered]:
    """The completions at `source`, by where their result stands below it."""
    if not source.is_dir():
        if not source.exists():
            raise StayalignedError(f"{source}: no such file or directory", hint="Give what `run` or `bench` wrote.")
        return {"": _Answered(tuple(_read_completions(source)), None)}
    found: dict[str, _Answered] = {}
    for path in result_files(source):
        result = read_result(path)
        stage = source / result.provenance.stages.get("generate", "") / COMPLETIONS_FILE
        kept = path.parent / COMPLETIONS_FILE
        completions = _read_completions(kept if kept.exists() else stage)
        evidence = read_evidence(path.parent, result)
        asked = {(row.prompt_set, row.id): row.prompt for row in evidence}
        if asked != {(c.prompt_set, c.id): prompt_hash(c.prompt) for c in completions}:
            raise StayalignedError(
                f"{kept if kept.exists() else stage}: not the completions that {path} was made of",
                hint="They were edited or exchanged; rerun the command that made them.",
            )
        found[str(path.parent.relative_to(source))] = _Answered(tuple(completions), result, tuple(evidence))
    return found


def _read_completions(path: Path) -> list[Completion]:
    try:
        completions = read_jsonl(path, Completion)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StayalignedError(f"{path}: {reason}", hint="Completions stay in the run's `stages`; keep them.") from None
    if not any(c.prompt_set in JUDGED for c in completions):
        raise StayalignedError(f"{path}: no completion answers a harmful or benign prompt: there is nothing to judge")
    twice = len(completions) - len({(c.prompt_set, c.id) for c in completions})
    if twice:
        raise StayalignedError(
            f"{path}: {twice} ids stand there twice",
            hint="One row per prompt, each with an id of its own in its prompt set.",
        )
    return completions


def _write(
    directory: Path,
    source: Path,
    answered: _Answered,
    verdicts: Mapping[Judge, Sequence[Verdict]],
    stages: Mapping[str, Path],
) -> Result:
    """Write the completions, the evidence and the result of one run; `stages` by the judges' names."""
    scores: dict[Place, float | None] = {
        (row.prompt_set, row.id): row.score for row in answered.evidence if row.prompt_set not in JUDGED
    }
    degenerate: dict[Place, bool | None] = {
        (row.prompt_set, row.id): row.degenerate for row in answered.evidence if row.degenerate is not None
    }
    if answered.result is None:
        degenerate = {(c.prompt_set, c.id): bool(signs(c.text, Degeneration())) for c in answered.completions}
    found = measure(answered.completions, verdicts, scores, degenerate)
    rows = evidence_text(found.evidence)
    before = answered.result or _nothing_known(source)
    root = stages[next(iter(stages))].parent.parent
    kept = {name: place for name, place in before.provenance.stages.items() if not name.startswith("judge ")}
    own = {f"judge {name}": str(place.relative_to(root)) for name, place in stages.items()}
    seconds = {name: json.loads((root / place / "stage.json").read_text())["seconds"] for name, place in own.items()}
    provenance = before.provenance.model_copy(
        update={
            "inputs": _inputs(before, [judge.spec() for judge in verdicts]),
            # Of what made the answers, where that is known.
            "versions": before.provenance.versions or versions(),
            "commit": before.provenance.commit if answered.result else commit(),
            "stages": {**kept, **own},
            "seconds": {**before.provenance.seconds, **seconds},
        }
    )
    result = before.model_copy(
        update={
            "id": stage_key(("rejudged", before.id, sorted(own.values())), before.seed)[:20],
            "experiment": {**before.experiment, "judges": [judge.spec() for judge in verdicts]},
            "judges": found.judges,
            "agreements": found.agreements,
            "scores": before.scores if answered.result else found.scores,
            "samples": found.samples,
            "evidence_sha256": hashlib.sha256(rows.encode()).hexdigest(),
            "provenance": provenance,
        }
    )
    write_jsonl(directory / COMPLETIONS_FILE, answered.completions)
    write_result(directory, result, rows)
    return result


def _inputs(before: Result, judges: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The inputs of the run, with those of the judges that judged now in place of those that judged then."""
    kept = {place: found for place, found in before.provenance.inputs.items() if not place.startswith("judges.")}
    named = {
        place: found
        for place, value in strings_in({"judges": [*judges]})
        if (found := identify(value, before.seed, place.rpartition(".")[2])) != value
    }
    return kept | named


def _nothing_known(source: Path) -> Result:
    """The result of a bare file of completions, before they are judged."""
    return Result(
        id="",
        arm=source.stem,
        seed=0,
        experiment={},
        judges=(),
        scores=(),
        evidence_sha256="",
        provenance=Provenance(versions={}, inputs={"completions": f"sha256:{fingerprint(source)}"}),
    )


def _refuse_other_source(source: Path, out: Path) -> None:
    """Refuse an output directory that was made of other completions."""
    path = out / JUDGING_FILE
    if path.exists() and (before := load_yaml(path).get("source")) != str(source.resolve()):
        raise StayalignedError(
            f"{out}: holds the judging of {before}", hint="Choose another --out; more judges may be added in place."
        )
