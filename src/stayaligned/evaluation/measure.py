"""Completions, verdicts and scores to the measured parts of a result."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message, Metric, Outcome, PromptSet, Verdict
from stayaligned.evaluation import metrics
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.results import Agreement, CategoryReading, Evidence, JudgeReading, Sample

JUDGED: tuple[PromptSet, ...] = ("harmful", "benign")
"""The prompt sets that judges read; tasks score the others."""

Place = tuple[PromptSet, str]
"""A completion's prompt set and id."""

_SAMPLES_PER_SET = 8
_DISPUTED_PER_SET = 8
_MOST_CATEGORIES = 40


@dataclass(frozen=True, slots=True)
class Found:
    """What is counted of one run's answers."""

    judges: tuple[JudgeReading, ...]
    agreements: tuple[Agreement, ...]
    scores: tuple[Metric, ...]
    samples: tuple[Sample, ...]
    evidence: tuple[Evidence, ...]


def measure(
    completions: Sequence[Completion],
    verdicts: Mapping[Judge, Sequence[Verdict]],
    scores: Mapping[Place, float | None],
    degenerate: Mapping[Place, bool | None],
) -> Found:
    """Everything that is counted of a run's answers.

    Args:
        completions: the answers to all prompt sets.
        verdicts: of each judge, the first one being the primary one, on the prompt sets of `JUDGED`.
        scores: of the other prompt sets, by a task.
        degenerate: whether an answer is no language, of those that were looked at.
    """
    names = judge_names([*verdicts])
    named = {names[judge]: rows for judge, rows in verdicts.items()}
    categories: dict[Place, str] = {(c.prompt_set, c.id): c.category for c in completions}
    return Found(
        judges=tuple(reading(judge, names[judge], rows, categories) for judge, rows in verdicts.items()),
        agreements=tuple(agreements(named)),
        scores=(*score_metrics(scores), *degeneration_metrics(degenerate)),
        samples=tuple(samples(completions, named, scores)),
        evidence=tuple(evidence(completions, named, scores, degenerate)),
    )


def judge_names(judges: Sequence[Judge]) -> dict[Judge, str]:
    """A distinct name for each judge: two of one kind are numbered."""
    counts = {judge.name: sum(other.name == judge.name for other in judges) for judge in judges}
    numbers = {name: itertools.count(1) for name in counts}
    return {j: j.name if counts[j.name] == 1 else f"{j.name} {next(numbers[j.name])}" for j in judges}


def refuse_unscored(judge: str, verdicts: Sequence[Verdict], limit: float) -> None:
    """Raise StayalignedError if a judge left a larger share unscored than `limit`: its rates would say little."""
    unscored = [v for v in verdicts if v.outcome is None]
    if len(unscored) > limit * max(1, len(verdicts)):
        reasons = [reason for reason, _ in Counter(v.reason for v in unscored if v.reason).most_common(3)]
        raise StayalignedError(
            f"judge {judge!r} could not score {len(unscored)} of {len(verdicts)} answers"
            + (f" ({'; '.join(reasons)})" if reasons else ""),
            hint=f"The limit is max_unscored = {limit:g}. Rerun to ask again about these alone, or use another judge.",
        )


def reading(
    judge: Judge, name: str, verdicts: Sequence[Verdict], categories: Mapping[Place, str] | None = None
) -> JudgeReading:
    """All numbers that one judge's verdicts give, over all prompts and for each of the commonest categories."""
    scale = None if judge.scale is None else (judge.scale.name, judge.scale.low, judge.scale.high)

    def numbers(rows: Sequence[Verdict]) -> tuple[Metric, ...]:
        return metrics.judge_metrics(rows, tells_refusals=judge.tells_refusals, scale=scale)

    by_category: dict[tuple[PromptSet, str], list[Verdict]] = {}
    for verdict in verdicts:
        category = (categories or {}).get((verdict.prompt_set, verdict.id), "")
        if category:
            by_category.setdefault((verdict.prompt_set, category), []).append(verdict)
    largest = sorted(by_category, key=lambda key: (JUDGED.index(key[0]), -len(by_category[key]), key[1]))
    return JudgeReading(
        judge=name,
        metrics=numbers(verdicts),
        categories=tuple(
            CategoryReading(prompt_set=key[0], category=key[1], metrics=numbers(by_category[key]))
            for key in largest[:_MOST_CATEGORIES]
        ),
    )


def agreements(verdicts: Mapping[str, Sequence[Verdict]]) -> Iterable[Agreement]:
    """How far each pair of judges agrees, on each prompt set that they judged."""
    for (first, ours), (second, theirs) in itertools.combinations(verdicts.items(), 2):
        for prompt_set in JUDGED:
            left = [v for v in ours if v.prompt_set == prompt_set]
            right = [v for v in theirs if v.prompt_set == prompt_set]
            # On benign prompts, a judge that can't tell a refusal says the same of every answer.
            says_nothing = prompt_set == "benign" and any(_all_safe(rows) for rows in (left, right))
            if left and not says_nothing:
                yield metrics.agreement(first, left, second, right)


def _all_safe(verdicts: Sequence[Verdict]) -> bool:
    return all(verdict.outcome in (Outcome.SAFE, None) for verdict in verdicts)


def score_metrics(scores: Mapping[Place, float | None]) -> Iterable[Metric]:
    """`finetune_accuracy` and `skills_kept`, of the prompt sets that there are."""
    for prompt_set, name in (("task", "finetune_accuracy"), ("skills", "skills_kept")):
        values = [value for (of, _), value in scores.items() if of == prompt_set]
        if values:
            yield metrics.mean_score(values, name, higher_is_better=True)


def degeneration_metrics(degenerate: Mapping[Place, bool | None]) -> Iterable[Metric]:
    """`degeneration`: the share of answers that are no language, over all prompt sets that were looked at."""
    if degenerate:
        yield metrics.rate([*degenerate.values()], "degeneration", higher_is_better=False)


def samples(
    completions: Sequence[Completion],
    verdicts: Mapping[str, Sequence[Verdict]],
    scores: Mapping[Place, float | None],
) -> Iterable[Sample]:
    """A few answers of each prompt set, spread evenly over it, and a few more of those on which judges differ."""
    outcomes = {name: {(v.prompt_set, v.id): v.outcome for v in rows} for name, rows in verdicts.items()}
    disputed = {(a.prompt_set, key) for a in agreements(verdicts) for key in a.disputed}
    for prompt_set in (*JUDGED, "task", "skills"):
        rows = [c for c in completions if c.prompt_set == prompt_set]
        step = max(1, len(rows) // _SAMPLES_PER_SET)
        chosen = {row.id for row in rows[::step][:_SAMPLES_PER_SET]}
        chosen |= {row.id for row in [r for r in rows if (prompt_set, r.id) in disputed][:_DISPUTED_PER_SET]}
        for row in rows:
            if row.id not in chosen:
                continue
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


def evidence(
    completions: Sequence[Completion],
    verdicts: Mapping[str, Sequence[Verdict]],
    scores: Mapping[Place, float | None],
    degenerate: Mapping[Place, bool | None],
) -> Iterable[Evidence]:
    """One row per answer: what every judge, the task and the detector of degeneration found."""
    found = {name: {(v.prompt_set, v.id): v for v in rows} for name, rows in verdicts.items()}
    for completion in completions:
        place = (completion.prompt_set, completion.id)
        own = {name: rows[place] for name, rows in found.items() if place in rows}
        yield Evidence(
            prompt_set=completion.prompt_set,
            id=completion.id,
            prompt=prompt_hash(completion.prompt),
            category=completion.category,
            outcomes={name: verdict.outcome for name, verdict in own.items()},
            judge_scores={name: v.score for name, v in own.items() if v.score is not None},
            score=scores.get(place),
            degenerate=degenerate.get(place),
        )


def prompt_hash(prompt: Sequence[Message]) -> str:
    """What tells two prompts apart: the first 16 hex digits of the conversation's SHA-256."""
    content = json.dumps([(m.role, m.content) for m in prompt], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
