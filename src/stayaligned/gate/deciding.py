"""The decision of the gate, computed from two sides and limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome
from stayaligned.core.text import percent, visible
from stayaligned.evaluation.caveats import is_of_repetitions
from stayaligned.evaluation.metrics import holm
from stayaligned.evaluation.results import StoredResult
from stayaligned.gate.answers import find_doubt
from stayaligned.gate.counting import CountedPairs, count_copies, describe_copies
from stayaligned.gate.labels import People
from stayaligned.gate.looks import repeated_p
from stayaligned.gate.measuring import (
    Measured,
    mean_change,
    measure,
    pair_values,
    read_values,
    split_metric,
    tells_refusals,
)
from stayaligned.gate.reading import (
    ComparedSide,
    Pairs,
    find_repeated,
    pair_runs,
    refuse_incomparable,
    same_weights,
)
from stayaligned.gate.values import (
    COMPARED_METRICS,
    ComparedMetric,
    Comparison,
    Conclusion,
    Criterion,
    Decision,
    Limits,
    OtherJudge,
    SideSummary,
)
from stayaligned.gate.words import describe_decision, describe_reason

Counted = Mapping[Comparison, CountedPairs]
"""The results that are compared, by the model that the candidate is compared with."""

_COMPARISONS: tuple[Comparison, ...] = ("baseline", "anchor")


def decide(
    baseline: ComparedSide,
    candidate: ComparedSide,
    limits: Limits,
    *,
    anchor: ComparedSide | None = None,
    judge: str | None = None,
    people: People | None = None,
) -> Decision:
    """Decide whether the candidate is worse than the baseline by more than the limits: pass, fail or undecided.

    Each criterion compares both on the same prompts, by the two-sided interval of the difference: entirely within the
    limit, entirely beyond it, or containing it. The decision is `pass` if every criterion passes. This needs no
    correction: a candidate beyond some limit passes only if that criterion errs, in at most 1 - confidence of cases.
    The decision is `fail` if some criterion is beyond its limit after Holm's correction over all criteria, so that
    additional criteria do not raise the rate of false alarms.

    Args:
        baseline: The model in use.
        candidate: The model that would replace it.
        limits: The limits to check.
        anchor: A fixed earlier model. Limits on a change are checked against it as well, so that small steps that all
            pass do not add up.
        judge: Name of the judge whose verdicts count; by default the primary judge of the baseline.
        people: Labels of a sample of these completions, by which what the judge measured is corrected.

    Raises:
        StayalignedError: If the sides cannot be compared, a metric with a limit was not measured, or the labels are not
            of these completions.
    """
    references = [baseline] if anchor is None else [baseline, anchor]
    paired = [pair_runs(side, candidate) for side in references]
    _refuse_repeated(candidate)
    if anchor is not None and all(kind == "ceiling" for _, _, kind, _ in limits.criteria()):
        raise StayalignedError(
            "an anchor needs a limit on a change, and only limits on the candidate's own rate are set",
            hint="Add one, for example --max-harm-increase 2%, or omit --anchor.",
        )
    if people is not None and limits.exact:
        raise StayalignedError(
            "labels exclude planned looks and a one-sided test, whose levels are not known to hold with them",
            hint="Omit --labels, or --look and --non-inferiority.",
        )
    metrics = list({m.name: m for _, m, _, _ in limits.criteria()}.values())
    judged = any(metric.outcome is not None for metric in metrics)
    chosen = choose_judge(baseline, candidate, judge) if judged else ""
    for side, pairs in zip(references, paired, strict=True):
        if chosen and chosen not in side.judges:
            raise StayalignedError(
                f"{side.role}: judge {chosen!r} did not judge it",
                hint="Judge its completions with the judge of the others: `stayaligned judge`.",
            )
        refuse_incomparable(pairs, metrics, [chosen] if chosen else [])
        if people is not None:
            people.refuse_others(pairs, chosen, metrics)
    counted = dict(zip(_COMPARISONS, map(count_copies, paired), strict=False))
    criteria = _criteria(counted, limits, chosen, people)
    answer = combine(criteria)
    others = (
        _find_disagreements(counted, metrics, limits, chosen, answer, references, candidate, people) if judged else ()
    )
    return Decision(
        answer=answer,
        sentence=describe_decision(answer, criteria, limits),
        confidence=limits.confidence,
        non_inferiority=limits.non_inferiority,
        look=limits.look,
        interval_confidence=limits.interval_confidence,
        judge=chosen,
        baseline=_summarize(baseline),
        candidate=_summarize(candidate),
        anchor=None if anchor is None else _summarize(anchor),
        criteria=tuple(criteria),
        disagreements=tuple(others),
        notes=(*_notes_on_labels(criteria), *_notes([*references, candidate], counted, limits, chosen)),
    )


def _refuse_repeated(candidate: ComparedSide) -> None:
    repeated = find_repeated(candidate)
    if repeated is not None:
        raise StayalignedError(
            f"candidate: {repeated[0].directory} and {repeated[1].directory} measure the same model, so they are one "
            "seed and not two",
            hint="Pass one of them, or results of separate trainings.",
        )


def choose_judge(baseline: ComparedSide, candidate: ComparedSide, judge: str | None) -> str:
    """Return the judge that decides: the given one, or the primary judge of both sides.

    Raises:
        StayalignedError: If it did not judge both sides, or the primary judges differ.
    """
    common = [name for name in baseline.judges if name in candidate.judges]
    if judge is not None:
        if judge not in common:
            raise StayalignedError(
                f"judge {judge!r} did not judge both sides",
                hint=f"Judges of both sides: {', '.join(common) or 'none'}.",
            )
        return judge
    primary = [side.judges[0] if side.judges else "none" for side in (baseline, candidate)]
    if primary[0] != primary[1] or not common:
        raise StayalignedError(
            f"the primary judges differ: {primary[0]} of the baseline, {primary[1]} of the candidate",
            hint=f"Choose a judge of both sides with --judge ({', '.join(common) or 'none'}), or judge one side again.",
        )
    return primary[0]


def _criteria(
    counted: Counted, limits: Limits, judge: str, people: People | None, *, fallback: str | None = None
) -> list[Criterion]:
    """Conclude every criterion by one judge; `fallback` replaces it for refusals that it does not distinguish.

    A conclusion has to hold with and without a template around the prompts.
    """
    compared: dict[Comparison, Pairs] = {key: one.pairs for key, one in counted.items()}
    criteria = conclude_all(compared, limits, judge, people, fallback)
    if all(one.strict is None for one in counted.values()):
        return criteria
    compared |= {key: one.strict for key, one in counted.items() if one.strict is not None}
    strict = conclude_all(compared, limits, judge, people, fallback)
    return [_agree(one, other) for one, other in zip(criteria, strict, strict=True)]


def _agree(one: Criterion, strict: Criterion) -> Criterion:
    """Return a criterion, undecided if its conclusion holds only if a template around the prompts is ignored."""
    if one.answer in ("undecided", strict.answer):
        return one
    reason = (
        f"{one.title}: undecided, because it is a {one.answer} only if {one.n_prompts} prompts that share a long text, "
        f"and differ in a few words, are different ones; otherwise they are {strict.n_prompts}"
    )
    return one.model_copy(update={"answer": "undecided", "reason": reason, "needed_prompts": None})


def conclude_all(
    compared: Mapping[Comparison, Pairs],
    limits: Limits,
    judge: str,
    people: People | None = None,
    fallback: str | None = None,
) -> list[Criterion]:
    """Conclude every criterion by one judge, on results whose copies of prompts are known."""

    def judge_of(pairs: Pairs, metric: ComparedMetric) -> str:
        cannot_tell = metric.outcome is Outcome.REFUSE and not tells_refusals(pairs, judge)
        return fallback if fallback is not None and cannot_tell else judge

    found = [
        replace(measure(pairs, limits, judge_of(pairs, one), name, one, kind, limit), against=against)
        for name, metric, kind, limit in limits.criteria()
        for against, pairs in compared.items()
        if against == "baseline" or kind != "ceiling"  # the candidate's own rate is the same in all comparisons
        for one in _by_prompt_set(pairs, name, metric)
    ]
    if people is not None:
        found = [people.correct(one, compared[one.against], limits) for one in found]

    def adjust(p_values: Iterator[float]) -> list[float]:
        return holm([repeated_p(p, limits.look) for p in p_values])

    adjusted = adjust(1.0 if one.blocked else one.p_above for one in found)
    at_best = adjust(1.0 if one.blocked else max(one.p_above, one.p_above_at_best) for one in found)
    return [
        _conclude(compared[one.against], one, p_fail, p_best, limits, len(found))
        for one, p_fail, p_best in zip(found, adjusted, at_best, strict=True)
    ]


def _by_prompt_set(pairs: Pairs, name: str, metric: ComparedMetric) -> Sequence[ComparedMetric]:
    """Return a metric for each prompt set that it counts.

    Raises:
        StayalignedError: if degeneration was checked on no prompt set.
    """
    found = split_metric(pairs, metric)
    if not found and metric.name == "degeneration":
        raise StayalignedError(
            f"{name}: degeneration was not measured", hint="Evaluate both again, or omit this limit."
        )
    return found or [metric]


def _conclude(
    pairs: Pairs, one: Measured, p_fail: float, p_fail_at_best: float, limits: Limits, n_criteria: int
) -> Criterion:
    answer: Conclusion = "undecided"
    doubt = ""
    if one.bounds is not None and not one.blocked:
        # Unscored completions may be the bad ones: a content filter removes exactly those.
        kind = "unscored completions" if one.correction is None else "completions about which people are unsure"
        unscored = f"{sum(one.unscored)} {kind} are"
        if one.bounds[1] < one.limit:
            if one.high_at_worst is not None and one.high_at_worst >= one.limit:
                doubt = f"it is within the limit only if the {unscored} not the worse ones"
            doubt = doubt or find_doubt(pairs, one, limits)
            answer = "undecided" if doubt else "pass"
        elif p_fail <= limits.alpha < p_fail_at_best:
            doubt = f"it is beyond the limit only if the {unscored} not the better ones"
        elif p_fail <= limits.alpha:
            answer = "fail"
    decidable = answer == "undecided" and not one.blocked and not doubt
    found = _criterion(one, answer, p_fail)
    if decidable:
        found = found.model_copy(update=one.needed(limits.last_confidence, n_criteria))
    reason = (
        f"{one.metric.title}: undecided, because {doubt}"
        if doubt
        else describe_reason(
            found,
            unscored=one.blocked,
            n_criteria=n_criteria,
            look=limits.look,
        )
    )
    return found.model_copy(update={"reason": reason})


def _criterion(one: Measured, answer: Conclusion, p_fail: float) -> Criterion:
    low, high = one.bounds or (None, None)
    mean = one.mean
    return Criterion(
        name=one.name,
        title=one.metric.title,
        prompt_sets=one.metric.prompt_sets,
        kind=one.kind,
        against=one.against,
        limit=one.limit,
        answer=answer,
        reason="",
        judge=one.judge,
        baseline=one.baseline,
        candidate=one.candidate,
        change=None if mean is None else mean.value,
        low=low,
        high=high,
        interval=one.interval,
        n_prompts=0 if mean is None else mean.n_prompts,
        n_seeds=1 if mean is None else mean.n_seeds,
        unscored_baseline=one.unscored[0],
        unscored_candidate=one.unscored[1],
        p_fail=None if mean is None else p_fail,
        correction=one.correction,
    )


def combine(criteria: Sequence[Criterion]) -> Conclusion:
    """Return the overall conclusion: the worst of the criteria."""
    answers = {criterion.answer for criterion in criteria}
    return "fail" if "fail" in answers else "undecided" if "undecided" in answers else "pass"


def _find_disagreements(
    counted: Counted,
    metrics: Sequence[ComparedMetric],
    limits: Limits,
    chosen: str,
    answer: Conclusion,
    references: Sequence[ComparedSide],
    candidate: ComparedSide,
    people: People | None,
) -> Iterator[OtherJudge]:
    """Yield judges of all sides with another conclusion; judges with different settings on the sides are skipped."""
    for name in references[0].judges:
        if name == chosen or any(name not in side.judges for side in (*references, candidate)):
            continue
        try:
            for one in counted.values():
                refuse_incomparable(one.pairs, metrics, [name])
        except StayalignedError:
            continue
        criteria = _criteria(counted, limits, name, people, fallback=chosen)
        other = combine(criteria)
        if other != answer:
            yield OtherJudge(judge=name, answer=other, criteria=tuple(criteria))


def _summarize(side: ComparedSide) -> SideSummary:
    first = side.runs[0].result
    model = first.experiment.get("adapter") or first.experiment.get("model") or ""
    return SideSummary(
        directories=tuple(visible(str(path)) for path in side.directories),
        arm=first.arm,
        model=str(model),
        seeds=tuple(run.result.seed for run in side.runs),
    )


def _notes_on_labels(criteria: Sequence[Criterion]) -> Iterator[str]:
    partial = [
        one.correction for one in criteria if one.correction and one.correction.n_labelled < one.correction.n_items
    ]
    if partial:
        yield (
            "the level holds for one gate at a number of labels that was fixed beforehand; a gate that is repeated as "
            "labels are added errs more often"
        )


def _notes(sides: Sequence[ComparedSide], counted: Counted, limits: Limits, judge: str) -> Iterator[str]:
    """Yield what a reader of the decision must know beside the criteria, and the notes of the runs."""
    pairs = counted["baseline"].pairs
    yield from _unlimited(pairs, limits, judge)
    yield from describe_copies(counted["baseline"])
    yield from _unpaired(pairs)
    for side in sides:
        repeated = find_repeated(side)
        if repeated is not None:
            yield (
                f"{side.role}: {repeated[0].directory} and {repeated[1].directory} measure the same model; the spread "
                "over seeds is that of the other side"
            )
        elif any(same_weights(*two) for two in itertools.combinations(side.runs, 2)):
            yield f"{side.role}: its seeds are samples of one model; the decision holds for this model alone"
    if "generation" not in sides[0].runs[0].result.experiment:
        yield "the results do not state how their completions were generated, so it was not compared"
    if all(_equal_texts(*pair) for pair in pairs):
        yield "baseline and candidate gave the same completions: check that the candidate's adapter was loaded"
    for side in sides:
        notes = dict.fromkeys(note for run in side.runs for note in run.result.notes)
        yield from (f"{side.role}: {note}" for note in notes if not is_of_repetitions(note))
    *earlier, versions = (side.runs[0].result.provenance.versions for side in sides)
    for side, found in zip(sides, earlier, strict=False):
        for package in ("stayaligned", "torch", "transformers"):
            ours, theirs = (one.get(package, "unknown") for one in (found, versions))
            if ours != theirs:
                yield f"{package}: the {side.role} was evaluated with {ours}, the candidate with {theirs}"


def _unlimited(pairs: Pairs, limits: Limits, judge: str) -> Iterator[str]:
    """Yield a note for each measured metric that became worse, and that no limit restricts."""
    limited = {metric.name for _, metric, _, _ in limits.criteria()}
    measured = (one for metric in COMPARED_METRICS.values() for one in split_metric(pairs, metric))
    for metric in measured:
        if metric.name in limited or (metric.outcome is not None and not judge):
            continue
        if metric.outcome is Outcome.REFUSE and not tells_refusals(pairs, judge):
            continue
        mean = mean_change(
            pair_values(pairs, lambda run, metric=metric: read_values(run, metric, judge)),
            1 if metric.higher_is_worse else -1,
        )
        if mean is not None and mean.interval(limits.confidence)[0] > 0:
            moved = "rose" if metric.higher_is_worse else "fell"
            yield f"{metric.title} {moved} by {percent(mean.value)} points, and no limit on it was given"


def _unpaired(pairs: Pairs) -> Iterator[str]:
    """Yield a note for each prompt set that only one side has, and that no limit compares: with one it is an error."""
    ours, theirs = ({name for pair in pairs for name, _ in pair[side].rows} for side in (0, 1))
    for prompt_set in sorted(ours ^ theirs):
        only = "baseline" if prompt_set in ours else "candidate"
        yield f"{prompt_set} prompts were asked of the {only} only, and are not compared"


def _equal_texts(ours: StoredResult, theirs: StoredResult) -> bool:
    texts = [{place: row.completion for place, row in run.rows.items()} for run in (ours, theirs)]
    return texts[0] == texts[1] and "" not in texts[0].values()
