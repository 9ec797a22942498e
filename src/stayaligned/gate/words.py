"""A decision in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from stayaligned.gate.values import Answer, Criterion


def points(share: float | None, *, signed: bool = False) -> str:
    """A share in percent or percentage points, one decimal: 2.0, or +2.0 and −2.0 with `signed`."""
    if share is None:
        return "n/a"
    rounded = round(100 * share, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "−") if signed else f"{rounded:.1f}"


def bounds_of(criterion: Criterion) -> str:
    """Its interval: `−0.5 to +3.2`."""
    if criterion.low is None or criterion.high is None:
        return "n/a"
    signed = criterion.kind != "ceiling"
    return f"{points(criterion.low, signed=signed)} to {points(criterion.high, signed=signed)}"


def limit_of(criterion: Criterion) -> str:
    """The limit in words: `rise by 2.0 points`, `drop by 2.0 points`, `5.0 %`."""
    if criterion.kind == "ceiling":
        return f"{points(criterion.limit)} %"
    return f"{'rise' if criterion.kind == 'increase' else 'drop'} by {points(criterion.limit)} points"


def reason_of(criterion: Criterion, *, asked: int, max_unscored: float, unsure: bool, among: int) -> str:
    """Why a criterion was answered as it was."""
    if unsure:
        worst = max(criterion.unscored_baseline, criterion.unscored_candidate)
        return (
            f"{criterion.title}: {worst} of {asked} answers could not be scored, more than the {max_unscored:.0%} "
            "allowed, so nothing is decided"
        )
    if criterion.change is None or criterion.low is None or criterion.high is None:
        return f"{criterion.title}: no answer could be scored on both sides"
    seen = f"{_change(criterion)} ({bounds_of(criterion)})"
    if criterion.answer == "pass":
        return f"{seen}, below the limit ({limit_of(criterion)})"
    if criterion.answer == "fail":
        return f"{seen}, above the limit ({limit_of(criterion)})"
    if criterion.low > criterion.limit:
        open_ = f"{seen}, above the limit ({limit_of(criterion)}), but not after correction for {among} criteria"
    else:
        open_ = f"{seen}, on both sides of the limit ({limit_of(criterion)})"
    return f"{open_}; {_needed(criterion)}"


def _change(criterion: Criterion) -> str:
    change = criterion.change or 0.0
    if criterion.kind == "ceiling":
        return f"{criterion.title} is {points(change)} %"
    moved = "rose" if (change > 0) == (criterion.kind == "increase") else "fell"
    return (
        f"{criterion.title} did not change"
        if change == 0
        else f"{criterion.title} {moved} by {points(abs(change))} points"
    )


def _needed(criterion: Criterion) -> str:
    have = f"{criterion.n_prompts} prompts" + (f" over {criterion.n_seeds} seeds" if criterion.n_seeds > 1 else "")
    if criterion.needed_prompts is not None:
        return f"about {criterion.needed_prompts:,} prompts would decide (now {have})"
    if criterion.n_seeds > 1:
        return (
            f"no number of prompts would decide: seeds spread too far, or the difference is at the limit (now {have})"
        )
    return f"no number of prompts would decide: the difference is at the limit (now {have})"


def sentence_of(answer: Answer, criteria: Sequence[Criterion]) -> str:
    """The whole decision in one sentence."""
    if answer == "pass":
        count = "its one limit" if len(criteria) == 1 else f"all {len(criteria)} limits"
        return f"PASS: the candidate stays within {count}."
    telling = [criterion.reason for criterion in criteria if criterion.answer == answer]
    return f"{answer.upper()}: {'; '.join(telling)}."


def judges_disagree(judge: str, answer: Answer, chosen: str, decided: Answer) -> str:
    """That another judge would decide otherwise."""
    return f"judges disagree: {chosen} says {decided}, {judge} would say {answer}"
