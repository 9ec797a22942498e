"""The only writer of results: `result.json` and `evidence.jsonl` from completions, verdicts and scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stayaligned.core.provenance import commit, versions
from stayaligned.core.records import Completion
from stayaligned.evaluation import caveats
from stayaligned.evaluation.measure import (
    Judged,
    choose_samples,
    collect_evidence,
    compare_judges,
    degeneration_metrics,
    read_judge,
    score_metrics,
)
from stayaligned.evaluation.results import Place, Provenance, Result, evidence_text, write_result
from stayaligned.experiments.config.validation import strings_in
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.data import load_alignment_rows, load_prompt_sets, load_training_rows
from stayaligned.experiments.stages.keys import identify
from stayaligned.experiments.stages.lm_eval import find_skipped_metrics
from stayaligned.experiments.stages.patch import read_patches
from stayaligned.experiments.stages.train import read_training_log, read_training_notes


def write_measured(
    directory: Path,
    background: Result,
    completions: Sequence[Completion],
    judged: Sequence[Judged],
    scores: Mapping[Place, float | None],
    degenerate: Mapping[Place, bool | None],
) -> Result:
    """Measure completions, and write `evidence.jsonl` and `result.json`.

    Args:
        directory: where the files are written.
        background: a result that holds everything that is not measured on the completions: the experiment, notes,
            the training log, patches, provenance, and in `scores` the metrics of lm-eval.
        completions: completions of all prompt sets.
        judged: each judge's verdicts; the first judge is the primary one.
        scores: the task's score of each completion of the prompt sets that a task scores.
        degenerate: whether a completion is degenerate, for the completions that were checked.
    """
    verdicts = {one.name: one.verdicts for one in judged}
    rows = evidence_text(collect_evidence(completions, verdicts, scores, degenerate))
    result = background.model_copy(
        update={
            "judges": tuple(read_judge(one, completions) for one in judged),
            "agreements": tuple(compare_judges(verdicts)),
            "scores": (*score_metrics(scores), *degeneration_metrics(degenerate), *background.scores),
            "samples": tuple(choose_samples(completions, verdicts, scores)),
            "evidence_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        }
    )
    write_result(directory, result, rows)
    return result


def describe_run(
    context: Context, completions: Sequence[Completion], judged: Sequence[Judged], position: int
) -> Result:
    """Return the result of a run before its completions are measured; every stage must be complete."""
    experiment = context.experiment
    return Result(
        id=context.plan.id,
        arm=experiment.arm,
        seed=experiment.seed,
        position=position,
        notes=tuple(_notes(context, completions)),
        experiment=experiment.spec(),
        judges=(),
        scores=(),
        training_log=read_training_log(context),
        patches=read_patches(context),
        evidence_sha256="",
        provenance=_provenance(context, judged),
    )


def describe_stages(root: Path, stages: Mapping[str, Path]) -> dict[str, Any]:
    """Return the path, relative to `root`, and the seconds of each stage: two fields of a `Provenance`."""
    records = {name: json.loads((path / "stage.json").read_text(encoding="utf-8")) for name, path in stages.items()}
    return {
        "stages": {name: str(path.relative_to(root)) for name, path in stages.items()},
        "seconds": {name: record["seconds"] for name, record in records.items()},
    }


def find_inputs(spec: Mapping[str, object], seed: int) -> dict[str, str]:
    """Return the place of each model and data file in a configuration, and what identifies its content."""
    return {
        place: found
        for place, value in strings_in(dict(spec))
        if (found := identify(value, seed, place.rpartition(".")[2])) != value
    }


def _notes(context: Context, completions: Sequence[Completion]) -> Iterable[str]:
    """Yield what a reader must know to interpret the numbers."""
    yield from caveats.note_repetitions(completions)
    yield from caveats.note_cuts(completions, context.experiment.generation.max_new_tokens)
    yield from caveats.note_uniform_answers(completions)
    yield from caveats.note_unmeasured_usefulness(
        {c.prompt_set for c in completions}, lm_eval=context.experiment.lm_eval is not None
    )
    yield from find_skipped_metrics(context)
    experiment = context.experiment
    if not experiment.trains:
        return
    trained_on = {"training": load_training_rows(context), "alignment": load_alignment_rows(context)}
    yield from caveats.note_overlaps(trained_on, load_prompt_sets(context))
    log = read_training_log(context)
    of_defense = experiment.training_defense.notes(max((int(row["step"]) for row in log), default=0))
    yield from dict.fromkeys((*read_training_notes(context), *of_defense))
    if experiment.watch is not None and experiment.watch.guard is not None:
        yield from caveats.note_guard(experiment.watch.guard, log)


def _provenance(context: Context, judged: Sequence[Judged]) -> Provenance:
    experiment, plan, store = context.experiment, context.plan, context.store
    stages: dict[str, Path] = {}
    if experiment.trains:
        stages["data"] = store.directory("data", plan.data)
        stages["train"] = store.directory("train", plan.train)
    for patch, key in zip(experiment.patches, plan.patches, strict=True):
        stages[f"patch {patch.name}"] = store.directory("patch", key)
    stages["generate"] = store.directory("generate", plan.generate)
    if experiment.degeneration is not None:
        stages["degeneration"] = store.directory("degeneration", plan.degeneration)
    stages |= {f"judge {one.name}": one.stage for one in judged}
    stages |= {f"lm_eval {name}": store.directory("lm_eval", key) for name, key in plan.lm_eval.items()}
    generated = json.loads((stages["generate"] / "stage.json").read_text(encoding="utf-8"))
    places = describe_stages(store.root, stages)
    return Provenance(
        versions=versions(),
        commit=commit(),
        inputs=find_inputs(experiment.spec(), experiment.seed),
        template_hash=generated["template_hash"],
        stages=places["stages"],
        seconds=places["seconds"],
    )
