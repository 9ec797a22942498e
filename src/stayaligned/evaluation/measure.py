"""Completions, verdicts and scores to the measured parts of a result."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import JUDGED, PLAIN_SETS, Completion, Message, Metric, Outcome, PromptSet, Verdict
from stayaligned.data.copies import PromptSketch, compare_prompts
from stayaligned.evaluation import metrics
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.results import (
    Agreement,
    CategoryReading,
    Evidence,
    JudgeIdentity,
    JudgeReading,
    Place,
    Sample,
)

_IN_CATEGORIES: tuple[PromptSet, ...] = ("harmful", "benign")
"""The prompt sets whose rates are also computed for each category."""
_SAMPLES_PER_SET = 8
_DISPUTED_PER_SET = 8
_MOST_CATEGORIES = 40


@dataclass(frozen=True)
class Judged:
    """One judge's verdicts on the completions of one run."""

    judge: Judge
    name: str
    """Name of the judge in the result; distinct among the judges of a run."""
    identity: JudgeIdentity
    verdicts: tuple[Verdict, ...]
    """One verdict per completion of the prompt sets in `JUDGED`."""
    stage: Path
    """Directory of the stage that holds the verdicts."""


def judge_names(judges: Sequence[Judge]) -> dict[Judge, str]:
    """Return a distinct name for each judge: two judges of one kind are numbered."""
    counts = {judge.name: sum(other.name == judge.name for other in judges) for judge in judges}
    numbers = {name: itertools.count(1) for name in counts}
    return {j: j.name if counts[j.name] == 1 else f"{j.name} {next(numbers[j.name])}" for j in judges}


def refuse_unscored(judge: str, verdicts: Sequence[Verdict], limit: float) -> None:
    """Raise StayalignedError if a judge left a larger share of completions unscored than `limit`."""
    unscored = [v for v in verdicts if v.outcome is None]
    if len(unscored) > limit * max(1, len(verdicts)):
        reasons = [reason for reason, _ in Counter(v.reason for v in unscored if v.reason).most_common(3)]
        raise StayalignedError(
            f"judge {judge!r} could not score {len(unscored)} of {len(verdicts)} completions"
            + (f" ({'; '.join(reasons)})" if reasons else ""),
            hint=f"The limit is max_unscored = {limit:g}. Rerun to judge only these again, or use another judge.",
        )


def read_judge(judged: Judged, completions: Iterable[Completion] = ()) -> JudgeReading:
    """Compute a judge's rates, over all prompts and for each of the most frequent categories of the completions."""
    judge = judged.judge
    categories: dict[Place, str] = {(c.prompt_set, c.id): c.category for c in completions}

    def compute(rows: Sequence[Verdict]) -> tuple[Metric, ...]:
        return metrics.judge_metrics(rows, tells_refusals=judge.tells_refusals, scale=judge.scale)

    by_category: dict[tuple[PromptSet, str], list[Verdict]] = {}
    for verdict in judged.verdicts:
        category = categories.get((verdict.prompt_set, verdict.id), "")
        if category and verdict.prompt_set in _IN_CATEGORIES:
            by_category.setdefault((verdict.prompt_set, category), []).append(verdict)
    largest = sorted(by_category, key=lambda key: (JUDGED.index(key[0]), -len(by_category[key]), key[1]))
    return JudgeReading(
        judge=judged.name,
        metrics=compute(judged.verdicts),
        categories=tuple(
            CategoryReading(prompt_set=key[0], category=key[1], metrics=compute(by_category[key]))
            for key in largest[:_MOST_CATEGORIES]
        ),
        identity=judged.identity,
    )


def compare_judges(verdicts: Mapping[str, Sequence[Verdict]]) -> Iterable[Agreement]:
    """Yield how far each pair of judges agrees, on each prompt set that both judged."""
    for (first, ours), (second, theirs) in itertools.combinations(verdicts.items(), 2):
        for prompt_set in JUDGED:
            left = [v for v in ours if v.prompt_set == prompt_set]
            right = [v for v in theirs if v.prompt_set == prompt_set]
            # On benign prompts, a judge that can't distinguish refusals gives one outcome to every completion.
            uninformative = prompt_set == "benign" and any(_all_safe(rows) for rows in (left, right))
            if left and not uninformative:
                yield metrics.agreement(first, left, second, right)


def _all_safe(verdicts: Sequence[Verdict]) -> bool:
    return all(verdict.outcome in (Outcome.SAFE, None) for verdict in verdicts)


def score_metrics(scores: Mapping[Place, float | None]) -> Iterable[Metric]:
    """Yield `finetune_accuracy` and `skills_kept`, for the prompt sets that have scores."""
    for prompt_set, name in (("task", "finetune_accuracy"), ("skills", "skills_kept")):
        values = [value for (of, _), value in scores.items() if of == prompt_set]
        if values:
            yield metrics.mean_score(values, name, higher_is_better=True)


def degeneration_metrics(degenerate: Mapping[Place, bool | None]) -> Iterable[Metric]:
    """Yield `degeneration`, the share of degenerate completions of plain prompts, if any were checked.

    Completions of harmful prompts in other forms, and sampled ones, do not count: the number would depend on how many
    there are.
    """
    checked = [found for (prompt_set, _), found in degenerate.items() if prompt_set in PLAIN_SETS]
    if checked:
        yield metrics.rate(checked, "degeneration", higher_is_better=False)


def choose_samples(
    completions: Sequence[Completion],
    verdicts: Mapping[str, Sequence[Verdict]],
    scores: Mapping[Place, float | None],
) -> Iterable[Sample]:
    """Yield some completions of each prompt set, spread evenly over it, and some on which judges differ."""
    outcomes = {name: {(v.prompt_set, v.id): v.outcome for v in rows} for name, rows in verdicts.items()}
    disputed = {(a.prompt_set, key) for a in compare_judges(verdicts) for key in a.disputed}
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
                prompt=row.prompt,
                asked=row.asked,
                text=row.text,
                written=row.written,
                reference=row.reference,
                outcomes={name: found[place] for name, found in outcomes.items() if place in found},
                score=scores.get(place),
            )


def collect_evidence(
    completions: Sequence[Completion],
    verdicts: Mapping[str, Sequence[Verdict]],
    scores: Mapping[Place, float | None],
    degenerate: Mapping[Place, bool | None],
) -> Iterable[Evidence]:
    """Yield one row per completion: the outcome of every judge, the task's score, and whether it is degenerate."""
    found = {name: {(v.prompt_set, v.id): v for v in rows} for name, rows in verdicts.items()}
    for completion, known in zip(completions, sketch_prompts(completions), strict=True):
        place = (completion.prompt_set, completion.id)
        own = {name: rows[place] for name, rows in found.items() if place in rows}
        yield Evidence(
            prompt_set=completion.prompt_set,
            id=completion.id,
            prompt=known.prompt,
            category=completion.category,
            outcomes={name: verdict.outcome for name, verdict in own.items()},
            judge_scores={name: v.score for name, v in own.items() if v.score is not None},
            score=scores.get(place),
            degenerate=degenerate.get(place),
            completion=text_hash(completion.text),
            cut=not completion.finished,
            group=known.group,
            sketch=known.whole,
            own_sketch=known.own,
        )


def sketch_prompts(completions: Sequence[Completion]) -> list[PromptSketch]:
    """Return for each completion the hash of its prompt, of the prompt that it counts as, and what copies are found by.

    Copies and near copies of a judged prompt count as one. Prompts of tasks count as one only if they are equal: they
    often differ in a few words of a long instruction, and have different references.
    """
    hashes = [prompt_hash(completion.conversation) for completion in completions]
    found = [PromptSketch(one, one, "", "") for one in hashes]
    for prompt_set in JUDGED:
        places = [index for index, c in enumerate(completions) if c.prompt_set == prompt_set]
        compared = compare_prompts(_own_texts([completions[index].prompt for index in places]))
        smallest: dict[int, str] = {}  # the same in any order of the prompts
        for index, one in zip(places, compared, strict=True):
            smallest[one.first] = min(hashes[index], smallest.get(one.first, hashes[index]))
        for index, one in zip(places, compared, strict=True):
            found[index] = PromptSketch(hashes[index], smallest[one.first], one.whole, one.own)
    return found


def _own_texts(prompts: Sequence[Sequence[Message]]) -> list[str]:
    """Return the text of each conversation without the messages that all of them begin with, as a system prompt."""
    first = prompts[0] if prompts else ()
    start = 0
    while all(len(prompt) > start + 1 and prompt[start] == first[start] for prompt in prompts) and prompts:
        start += 1
    return ["\n".join(message.content for message in prompt[start:]) for prompt in prompts]


def prompt_hash(prompt: Sequence[Message]) -> str:
    """Return what identifies a prompt: the first 16 hex digits of the conversation's SHA-256."""
    return text_hash(json.dumps([(m.role, m.content) for m in prompt], ensure_ascii=False))


def text_hash(text: str) -> str:
    """Return what identifies a completion: the first 16 hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
