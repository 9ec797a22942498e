"""The only writer of results: `result.json` and `evidence.jsonl` from completions, verdicts and scores."""

from __future__ import annotations

import hashlib
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
from stayaligned.experiments.stages.patch import read_patch_notes, read_patches
from stayaligned.experiments.stages.store import read_stage
from stayaligned.experiments.stages.train import read_training_log


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
    context: Context,
    completions: Sequence[Completion],
    judged: Sequence[Judged],
    position: int,
    warnings: Sequence[str] = (),
) -> Result:
    """Return the result of a run before its completions are measured; every stage must be complete.

    Args:
        context: the experiment and its stages.
        completions: completions of all prompt sets.
        judged: each judge's verdicts.
        position: index of the arm in its grid.
        warnings: warnings outside of the stages, which are notes too; read after everything was loaded.
    """
    experiment = context.experiment
    return Result(
        id=context.plan.id,
        arm=experiment.arm,
        seed=experiment.seed,
        position=position,
        notes=tuple(dict.fromkeys([*_notes(context, completions, judged), *warnings])),
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
    records = {name: read_stage(path) for name, path in stages.items()}
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


def read_notes(stages: Mapping[str, Path]) -> list[str]:
    """Return the warnings of complete stages, such as the number of rows that were skipped or cut, each once."""
    return list(dict.fromkeys(note for path in stages.values() for note in read_stage(path).get("notes", ())))


def _notes(context: Context, completions: Sequence[Completion], judged: Sequence[Judged]) -> Iterable[str]:
    """Yield what a reader must know to interpret the numbers."""
    yield from caveats.note_repetitions(completions)
    yield from caveats.note_cuts(completions, context.experiment.generation.max_new_tokens)
    yield from caveats.note_uniform_answers(completions)
    yield from caveats.note_unmeasured_usefulness(
        {c.prompt_set for c in completions}, lm_eval=context.experiment.lm_eval is not None
    )
    yield from find_skipped_metrics(context)
    yield from read_notes(_stages(context, judged))
    yield from read_patch_notes(context)
    experiment = context.experiment
    if not experiment.trains:
        return
    trained_on = {"training": load_training_rows(context), "alignment": load_alignment_rows(context)}
    yield from caveats.note_overlaps(trained_on, load_prompt_sets(context))
    log = read_training_log(context)
    yield from experiment.training_defense.notes(max((int(row["step"]) for row in log), default=0))
    if experiment.watch is not None and experiment.watch.guard is not None:
        yield from caveats.note_guard(experiment.watch.guard, log)


def _stages(context: Context, judged: Sequence[Judged]) -> dict[str, Path]:
    """Return the directory of each stage of a run, by the names that its provenance gives them."""
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
    return stages | {f"lm_eval {name}": store.directory("lm_eval", key) for name, key in plan.lm_eval.items()}


def _provenance(context: Context, judged: Sequence[Judged]) -> Provenance:
    experiment, stages = context.experiment, _stages(context, judged)
    places = describe_stages(context.store.root, stages)
    return Provenance(
        versions=versions(),
        commit=commit(),
        inputs=find_inputs(experiment.spec(), experiment.seed),
        template_hash=read_stage(stages["generate"])["template_hash"],
        stages=places["stages"],
        seconds=places["seconds"],
    )
