"""Completions, verdicts and scores to the measured parts of a result."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from stayaligned import metrics
from stayaligned.judges import Judge
from stayaligned.records import Completion, Message, Metric, PromptSet, Verdict
from stayaligned.results import Agreement, Sample

_SAMPLES_PER_SET = 8


def judge_names(judges: Sequence[Judge]) -> dict[Judge, str]:
    """A distinct name for each judge: two of one kind are numbered."""
    counts = {judge.name: sum(other.name == judge.name for other in judges) for judge in judges}
    numbers = {name: itertools.count(1) for name in counts}
    return {j: j.name if counts[j.name] == 1 else f"{j.name} {next(numbers[j.name])}" for j in judges}


def agreements(verdicts: Mapping[str, Sequence[Verdict]]) -> Iterable[Agreement]:
    """How far each pair of judges agrees, on each prompt set that they judged."""
    for (first, ours), (second, theirs) in itertools.combinations(verdicts.items(), 2):
        for prompt_set in ("harmful", "benign"):
            left = [v for v in ours if v.prompt_set == prompt_set]
            right = [v for v in theirs if v.prompt_set == prompt_set]
            if left:
                yield metrics.agreement(first, left, second, right)


def score_metrics(scores: Mapping[tuple[PromptSet, str], float | None]) -> Iterable[Metric]:
    """`finetune_accuracy` and `skills_kept`, of the prompt sets that there are."""
    for prompt_set, name in (("task", "finetune_accuracy"), ("skills", "skills_kept")):
        values = [value for (of, _), value in scores.items() if of == prompt_set]
        if values:
            yield metrics.mean_score(values, name, higher_is_better=True)


def samples(
    completions: Sequence[Completion],
    verdicts: Mapping[str, Sequence[Verdict]],
    scores: Mapping[tuple[PromptSet, str], float | None],
) -> Iterable[Sample]:
    """A few answers of each prompt set, spread evenly over it."""
    outcomes = {name: {(v.prompt_set, v.id): v.outcome for v in rows} for name, rows in verdicts.items()}
    for prompt_set in ("harmful", "benign", "task", "skills"):
        rows = [c for c in completions if c.prompt_set == prompt_set]
        step = max(1, len(rows) // _SAMPLES_PER_SET)
        for row in rows[::step][:_SAMPLES_PER_SET]:
            place = (row.prompt_set, row.id)
            yield Sample(
                id=row.id,
                prompt_set=row.prompt_set,
                category=row.category,
                prompt=tuple(Message(role=m.role, content=m.content) for m in row.prompt),
                text=row.text,
                reference=row.reference,
                outcomes={name: found[place] for name, found in outcomes.items() if place in found},
                score=scores.get(place),
            )
