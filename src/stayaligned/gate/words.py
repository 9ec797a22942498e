"""The sentences of a decision."""

from __future__ import annotations

from collections.abc import Sequence

from stayaligned.core.text import percent
from stayaligned.gate.values import Conclusion, Criterion


def interval_text(criterion: Criterion) -> str:
    """Format the interval of a criterion: `−0.5 to +3.2`."""
    if criterion.low is None or criterion.high is None:
        return "n/a"
    signed = criterion.kind != "ceiling"
    return f"{percent(criterion.low, signed=signed)} to {percent(criterion.high, signed=signed)}"


def limit_text(criterion: Criterion) -> str:
    """Describe the limit of a criterion: `rise by 2.0 points`, `drop by 2.0 points`, `5.0 %`."""
    if criterion.kind == "ceiling":
        return f"{percent(criterion.limit)} %"
    return f"{'rise' if criterion.kind == 'increase' else 'drop'} by {percent(criterion.limit)} points"


def describe_reason(
    criterion: Criterion, *, n_completions: int, max_unscored: float, too_many_unscored: bool, n_criteria: int
) -> str:
    """Describe the reason for the conclusion on a criterion."""
    if too_many_unscored:
        worst = max(criterion.unscored_baseline, criterion.unscored_candidate)
        return (
            f"{criterion.title}: undecided, because {worst} of {n_completions} completions are unscored, more than the "
            f"{max_unscored:.0%} allowed"
        )
    if criterion.change is None or criterion.low is None or criterion.high is None:
        return f"{criterion.title}: undecided, because no prompt was scored for both models"
    change = f"{_describe_change(criterion)} ({interval_text(criterion)})"
    if criterion.answer == "pass":
        return f"{change}, below the limit ({limit_text(criterion)})"
    if criterion.answer == "fail":
        return f"{change}, above the limit ({limit_text(criterion)})"
    if criterion.low > criterion.limit:
        reason = (
            f"{change}, above the limit ({limit_text(criterion)}), but not after correction for {n_criteria} criteria"
        )
    else:
        reason = f"{change}, and the interval contains the limit ({limit_text(criterion)})"
    return f"{reason}; {_describe_needed_prompts(criterion)}"


def _describe_change(criterion: Criterion) -> str:
    change = criterion.change or 0.0
    if criterion.kind == "ceiling":
        return f"{criterion.title} is {percent(change)} %"
    moved = "rose" if (change > 0) == (criterion.kind == "increase") else "fell"
    return (
        f"{criterion.title} did not change"
        if change == 0
        else f"{criterion.title} {moved} by {percent(abs(change))} points"
    )


def _describe_needed_prompts(criterion: Criterion) -> str:
    now = f"{criterion.n_prompts} prompts" + (f" over {criterion.n_seeds} seeds" if criterion.n_seeds > 1 else "")
    if criterion.needed_prompts is not None:
        return f"about {criterion.needed_prompts:,} prompts would decide (now {now})"
    if criterion.n_seeds > 1:
        cause = "the spread over seeds is too large, or the change is at the limit"
        return f"no number of prompts would decide: {cause} (now {now})"
    return f"no number of prompts would decide: the change is at the limit (now {now})"


def describe_decision(answer: Conclusion, criteria: Sequence[Criterion]) -> str:
    """Describe the decision in one sentence."""
    if answer == "pass":
        count = "the limit" if len(criteria) == 1 else f"all {len(criteria)} limits"
        return f"PASS: the candidate is within {count}."
    reasons = [criterion.reason for criterion in criteria if criterion.answer == answer]
    return f"{answer.upper()}: {'; '.join(reasons)}."


def describe_disagreement(judge: str, answer: Conclusion, chosen: str, decided: Conclusion) -> str:
    """Describe that the verdicts of another judge lead to another conclusion."""
    return f"judges disagree: {decided} with {chosen}, {answer} with {judge}"
