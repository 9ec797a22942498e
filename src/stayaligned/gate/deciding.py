"""Two sides and limits to an answer. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome
from stayaligned.evaluation.metrics import MeanOfPrompts, exact_interval, holm, mean_of_prompts
from stayaligned.evaluation.results import Evidence, StoredResult
from stayaligned.gate.reading import Side, pair_runs, refuse_incomparable
from stayaligned.gate.values import (
    Answer,
    Criterion,
    Decision,
    Kind,
    Limits,
    Measure,
    OtherJudge,
    SideSummary,
)
from stayaligned.gate.words import reason_of, sentence_of

Scores = dict[int, dict[str, float | None]]
"""A side's numbers by seed and prompt."""


@dataclass(frozen=True)
class _Found:
    """A criterion before it is decided."""

    name: str
    measure: Measure
    kind: Kind
    limit: float
    judge: str
    baseline: float | None = None
    candidate: float | None = None
    mean: MeanOfPrompts | None = None
    bounds: tuple[float, float] | None = None
    interval: str = ""
    p_above: float = 1.0
    n_answers: int = 0
    unscored: tuple[int, int] = (0, 0)
    too_many_unscored: bool = False


def decide(baseline: Side, candidate: Side, limits: Limits, *, judge: str | None = None) -> Decision:
    """Whether the candidate is worse than the baseline by more than the limits: pass, fail or undecided.

    Each criterion compares the two on the same prompts and asks where the two-sided interval of the difference lies:
    all within the limit, all beyond it, or over it. It passes if every criterion does, which needs no correction: a
    candidate that is beyond some limit passes only if that one criterion errs, in at most 1 - confidence of cases.
    It fails if some criterion is beyond its limit after Holm's correction over all of them, so that adding criteria
    raises no false alarms.

    Args:
        baseline: what is in use.
        candidate: what would replace it.
        limits: what is asked.
        judge: whose verdicts count; the baseline's primary judge if not given.

    Raises:
        StayalignedError: if the two can't be compared, or something that is asked was not measured.
    """
    pairs = pair_runs(baseline, candidate)
    measures = list({m.name: m for _, m, _, _ in limits.criteria()}.values())
    judged = any(measure.outcome is not None for measure in measures)
    chosen = _choose_judge(baseline, candidate, judge) if judged else ""
    refuse_incomparable(pairs, measures, [chosen] if chosen else [])
    criteria = _criteria(pairs, limits, chosen)
    answer = _overall(criteria)
    others = _others(pairs, measures, limits, chosen, answer, baseline, candidate) if judged else []
    return Decision(
        answer=answer,
        sentence=sentence_of(answer, criteria),
        confidence=limits.confidence,
        judge=chosen,
        baseline=_summary(baseline),
        candidate=_summary(candidate),
        criteria=tuple(criteria),
        disagreements=tuple(others),
        notes=tuple(_notes(baseline, candidate)),
    )


def _choose_judge(baseline: Side, candidate: Side, judge: str | None) -> str:
    common = [name for name in baseline.judges if name in candidate.judges]
    if judge is not None:
        if judge not in common:
            raise StayalignedError(
                f"judge {judge!r} did not judge both sides", hint=f"These did: {', '.join(common) or 'none'}."
            )
        return judge
    primary = [side.judges[0] if side.judges else "none" for side in (baseline, candidate)]
    if primary[0] != primary[1] or not common:
        raise StayalignedError(
            f"the primary judges differ: {primary[0]} of the baseline, {primary[1]} of the candidate",
            hint=f"Choose one that judged both with --judge ({', '.join(common) or 'none did'}), or judge one again.",
        )
    return primary[0]


def _criteria(
    pairs: Sequence[tuple[StoredResult, StoredResult]], limits: Limits, judge: str, *, instead: str | None = None
) -> list[Criterion]:
    """Every criterion by one judge, or by `instead` where that one can't tell what is asked."""

    def asked_of(measure: Measure) -> str:
        blind = measure.outcome is Outcome.REFUSE and not _tells_refusals(pairs, judge)
        return instead if instead is not None and blind else judge

    found = [_find(pairs, limits, asked_of(asked[1]), *asked) for asked in limits.criteria()]
    adjusted = holm([1.0 if one.too_many_unscored else one.p_above for one in found])
    return [_judged(one, p_fail, limits, len(found)) for one, p_fail in zip(found, adjusted, strict=True)]


def _find(
    pairs: Sequence[tuple[StoredResult, StoredResult]],
    limits: Limits,
    judge: str,
    name: str,
    measure: Measure,
    kind: Kind,
    limit: float,
) -> _Found:
    ours, theirs = ({i: _scores(pair[side], measure, judge) for i, pair in enumerate(pairs)} for side in (0, 1))
    asked = sum(map(len, theirs.values()))
    if not asked:
        sets = ", ".join(measure.prompt_sets)
        raise StayalignedError(
            f"{name}: there is no answer to a prompt of {sets}",
            hint="Evaluate both with such prompts, or leave it out.",
        )
    if measure.name == "degeneration" and all(v is None for rows in theirs.values() for v in rows.values()):
        raise StayalignedError(f"{name}: degeneration was not looked at", hint="Evaluate both again, or leave it out.")
    unscored = tuple(sum(v is None for rows in side.values() for v in rows.values()) for side in (ours, theirs))
    counted = unscored[1:] if kind == "ceiling" else unscored
    one = _Found(
        name,
        measure,
        kind,
        limit,
        judge if measure.outcome is not None else "",
        n_answers=asked,
        unscored=(unscored[0], unscored[1]),
        too_many_unscored=max(counted) > limits.max_unscored * asked,
    )
    return _ceiling(one, theirs, limits) if kind == "ceiling" else _change(one, ours, theirs, limits)


def _scores(run: StoredResult, measure: Measure, judge: str) -> dict[str, float | None]:
    """The measure of every answer, keyed by the prompt itself, so that seeds that asked other prompts don't mix."""
    rows = {f"{set_} {id_} {row.prompt}": row for (set_, id_), row in run.rows.items() if set_ in measure.prompt_sets}
    if measure.outcome is Outcome.REFUSE and not _tells_refusals([(run, run)], judge):
        raise StayalignedError(
            f"judge {judge!r} can't tell a refusal from another harmless answer, so there is no {measure.title}",
            hint="Choose another --judge, or leave this limit out.",
        )
    return {key: _score(row, measure, judge) for key, row in rows.items()}


def _tells_refusals(pairs: Sequence[tuple[StoredResult, StoredResult]], judge: str) -> bool:
    rows = (row for pair in pairs for run in pair for row in run.rows.values())
    return all(row.outcomes.get(judge) is not Outcome.SAFE for row in rows)


def _score(row: Evidence, measure: Measure, judge: str) -> float | None:
    if measure.outcome is not None:
        outcome = row.outcomes.get(judge)
        return None if outcome is None else float(outcome is measure.outcome)
    if measure.name == "degeneration":
        return None if row.degenerate is None else float(row.degenerate)
    return row.score


def _change(one: _Found, ours: Scores, theirs: Scores, limits: Limits) -> _Found:
    """The difference on prompts that both scored, positive where the candidate is worse."""
    sign = 1 if one.measure.higher_is_worse else -1
    worse: dict[int, dict[str, float]] = {}
    before: list[float] = []
    after: list[float] = []
    for seed, rows in ours.items():
        for key, old in rows.items():
            new = theirs[seed][key]
            if old is not None and new is not None:
                worse.setdefault(seed, {})[key] = sign * (new - old)
                before.append(old)
                after.append(new)
    if len(worse) < len(ours):
        return one
    mean = mean_of_prompts(worse)
    return replace(
        one,
        baseline=fmean(before),
        candidate=fmean(after),
        mean=mean,
        bounds=mean.interval(limits.confidence),
        interval="paired by prompt, Student's with both ends added" + (" over seeds" if mean.n_seeds > 1 else ""),
        p_above=mean.p_above(one.limit),
    )


def _ceiling(one: _Found, theirs: Scores, limits: Limits) -> _Found:
    """The candidate's own rate."""
    scored = {seed: {key: v for key, v in rows.items() if v is not None} for seed, rows in theirs.items()}
    if not all(scored.values()):
        return one
    mean = mean_of_prompts(scored, ends=(0.0, 1.0))
    if mean.n_seeds > 1 or not mean.step:
        bounds, p_above = mean.interval(limits.confidence), mean.p_above(one.limit)
        name = "Student's with both ends added" + (" over seeds" if mean.n_seeds > 1 else "")
    else:
        from scipy.special import betainc

        n, hits = mean.n_prompts, round(mean.value * mean.n_prompts)
        bounds = exact_interval(hits, n, confidence=limits.confidence)
        p_above = float(betainc(hits, n - hits + 1, one.limit)) if hits else 1.0
        name = "Clopper-Pearson"
    return replace(one, candidate=mean.value, mean=mean, bounds=bounds, interval=name, p_above=p_above)


def _judged(one: _Found, p_fail: float, limits: Limits, n_criteria: int) -> Criterion:
    low, high = one.bounds or (None, None)
    answer: Answer = "undecided"
    hides = False
    if high is not None and not one.too_many_unscored:
        # Answers that no judge could score may be the bad ones: a filter that swallows harm leaves just those out.
        hidden = (one.unscored[1] + (0 if one.kind == "ceiling" else one.unscored[0])) / one.n_answers
        if high < one.limit <= high + hidden:
            hides = True
        elif high < one.limit:
            answer = "pass"
        elif p_fail <= (1 - limits.confidence) / 2:
            answer = "fail"
    mean = one.mean
    needed = None
    if answer == "undecided" and mean is not None and not one.too_many_unscored and not hides:
        needed = mean.prompts_to_decide(one.limit, confidence=limits.confidence)
    found = Criterion(
        name=one.name,
        title=one.measure.title,
        kind=one.kind,
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
        unscored_baseline=0 if one.kind == "ceiling" else one.unscored[0],
        unscored_candidate=one.unscored[1],
        p_fail=None if mean is None else p_fail,
        needed_prompts=needed,
    )
    reason = reason_of(
        found, asked=one.n_answers, max_unscored=limits.max_unscored, unsure=one.too_many_unscored, among=n_criteria
    )
    if hides:
        reason = (
            f"{one.measure.title}: within the limit, but not if the {max(one.unscored)} answers that could not be "
            "scored were counted as the worse ones, so nothing is decided"
        )
    return found.model_copy(update={"reason": reason})


def _overall(criteria: Sequence[Criterion]) -> Answer:
    answers = {criterion.answer for criterion in criteria}
    return "fail" if "fail" in answers else "undecided" if "undecided" in answers else "pass"


def _others(
    pairs: Sequence[tuple[StoredResult, StoredResult]],
    measures: Sequence[Measure],
    limits: Limits,
    chosen: str,
    answer: Answer,
    baseline: Side,
    candidate: Side,
) -> Iterator[OtherJudge]:
    """Judges of both sides that would decide otherwise; one whose settings differ between the sides says nothing."""
    for name in baseline.judges:
        if name == chosen or name not in candidate.judges:
            continue
        try:
            refuse_incomparable(pairs, measures, [name])
        except StayalignedError:
            continue
        criteria = _criteria(pairs, limits, name, instead=chosen)
        other = _overall(criteria)
        if other != answer:
            yield OtherJudge(judge=name, answer=other, criteria=tuple(criteria))


def _summary(side: Side) -> SideSummary:
    first = side.runs[0].result
    model = first.experiment.get("adapter") or first.experiment.get("model") or ""
    return SideSummary(
        directories=tuple(map(str, side.directories)),
        arm=first.arm,
        model=str(model),
        seeds=tuple(run.result.seed for run in side.runs),
    )


def _notes(baseline: Side, candidate: Side) -> Iterator[str]:
    """What the runs themselves warn of, and versions that differ."""
    for side in (baseline, candidate):
        said = dict.fromkeys(note for run in side.runs for note in run.result.notes)
        yield from (f"{side.role}: {note}" for note in said)
    versions: list[Mapping[str, str]] = [side.runs[0].result.provenance.versions for side in (baseline, candidate)]
    for package in ("stayaligned", "torch", "transformers"):
        ours, theirs = (found.get(package, "unknown") for found in versions)
        if ours != theirs:
            yield f"{package} {ours} made the baseline's answers, {theirs} the candidate's"
