"""The sentences of a decision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stayaligned.core.text import percent
from stayaligned.gate.looks import Look
from stayaligned.gate.values import Conclusion, Correction, Criterion, Decision, Limits, SideQuality


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
    moved = f"{'rise' if criterion.kind == 'increase' else 'drop'} by {percent(criterion.limit)} points"
    return f"{moved} against the anchor" if criterion.against == "anchor" else moved


def confidence_text(confidence: float) -> str:
    """Format a confidence level: `95%`, `99.69%`, `>99.99%`."""
    return f"{100 * confidence:.4g}%" if confidence <= 0.9999 else ">99.99%"


def mode_text(limits: Limits | Decision) -> str:
    """Describe how it is decided: `non-inferiority, one-sided 5%; look 2 of 4`; empty without a declared mode."""
    parts: list[str] = []
    if limits.non_inferiority:
        parts.append(f"non-inferiority, one-sided {confidence_text(1 - limits.confidence)}")
    if limits.look is not None:
        parts.append(f"look {limits.look.number} of {limits.look.planned}")
    return "; ".join(parts)


def describe_reason(criterion: Criterion, *, unscored: str, n_criteria: int, look: Look | None = None) -> str:
    """Describe the reason for the conclusion on a criterion; `unscored` says that too many completions are."""
    if unscored:
        return f"{criterion.title}: undecided, because {unscored}"
    if criterion.change is None or criterion.low is None or criterion.high is None:
        return f"{criterion.title}: undecided, because no prompt was scored for both models"
    change = f"{_describe_change(criterion)} ({interval_text(criterion)})"
    if criterion.correction is not None:
        change += f" by labels of {criterion.correction.n_labelled} prompts ({_judge_alone(criterion)})"
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
    return f"{reason}; {_describe_needed_prompts(criterion, look)}"


def _describe_change(criterion: Criterion) -> str:
    change = criterion.change or 0.0
    if criterion.kind == "ceiling":
        return f"{criterion.title} is {percent(change)} %"
    moved = "rose" if (change > 0) == (criterion.kind == "increase") else "fell"
    text = (
        f"{criterion.title} did not change"
        if change == 0
        else f"{criterion.title} {moved} by {percent(abs(change))} points"
    )
    return f"{text} against the anchor" if criterion.against == "anchor" else text


def _judge_alone(criterion: Criterion) -> str:
    """Describe what the judge measured: `+0.2 by the judge alone`."""
    found = criterion.correction
    if found is None or found.uncorrected is None:
        return "nothing by the judge alone"
    return f"{percent(found.uncorrected, signed=criterion.kind != 'ceiling')} by the judge alone"


def correction_cells(criterion: Criterion) -> list[str]:
    """Return what the judge alone found, and the labelled prompts, for a table; empty cells without labels."""
    found = criterion.correction
    if found is None:
        return ["", ""]
    return [percent(found.uncorrected, signed=criterion.kind != "ceiling"), f"{found.n_labelled} of {found.n_items}"]


def describe_correction(criterion: Criterion) -> list[str]:
    """Describe how labels corrected a criterion, and how good its judge is by them; nothing without labels."""
    found = criterion.correction
    if found is None:
        return []
    title = criterion.title + (", against the anchor" if criterion.against == "anchor" else "")
    people = "1 person" if found.labellers == 1 else f"{found.labellers} people"
    signed = criterion.kind != "ceiling"
    alone = "nothing"
    if found.uncorrected is not None and found.uncorrected_low is not None and found.uncorrected_high is not None:
        low, high = (percent(bound, signed=signed) for bound in (found.uncorrected_low, found.uncorrected_high))
        alone = f"{percent(found.uncorrected, signed=signed)} ({low} to {high})"
    sides = [(criterion.against, found.baseline), ("candidate", found.candidate)]
    quality = [f"on the {name}, {_quality_text(side)}" for name, side in sides if side is not None]
    return [
        f"{title}: corrected by labels of {found.n_labelled} of {found.n_items} prompts by {people} "
        f"(λ = {found.judge_weight:.2f}): {percent(criterion.change, signed=signed)} ({interval_text(criterion)}); "
        f"judge {criterion.judge!r} alone finds {alone}",
        f"{title}: judge {criterion.judge!r} against these labels: {'; '.join(quality)}",
    ]


def _quality_text(side: SideQuality) -> str:
    kappa = "n/a" if side.kappa is None else f"{side.kappa:.2f}"
    return (
        f"sensitivity {_share(side.sensitivity, side.sensitivity_interval)}, specificity "
        f"{_share(side.specificity, side.specificity_interval)}, κ {kappa}"
    )


def _share(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return "unknown"
    return f"{percent(value)} % ({percent(interval[0])} to {percent(interval[1])})"


def _describe_needed_prompts(criterion: Criterion, look: Look | None) -> str:
    if criterion.correction is not None:
        return _describe_needed_labels(criterion.correction, criterion.needed_prompts)
    now = f"{criterion.n_prompts} prompts" + (f" over {criterion.n_seeds} seeds" if criterion.n_seeds > 1 else "")
    if criterion.needed_prompts is not None:
        last = " at the last look" if look is not None and look != look.last else ""
        return f"about {criterion.needed_prompts:,} prompts would decide{last} (now {now})"
    if criterion.n_seeds > 1:
        cause = "the spread over seeds is too large, or the change is at the limit"
        return f"no number of prompts would decide: {cause} (now {now})"
    return f"no number of prompts would decide: the change is at the limit (now {now})"


def _describe_needed_labels(found: Correction, needed_prompts: int | None) -> str:
    if found.needed_labels is not None:
        return f"labels of about {found.needed_labels:,} of these prompts would decide (now {found.n_labelled:,})"
    if needed_prompts is not None:
        share = f"{found.n_labelled / found.n_items:.0%}"
        return (
            f"labels of all {found.n_items:,} prompts would not decide, but about {needed_prompts:,} prompts would, "
            f"{share} of them labelled"
        )
    return f"no number of labels or prompts would decide (now {found.n_labelled:,} labelled of {found.n_items:,})"


def describe_decision(answer: Conclusion, criteria: Sequence[Criterion], limits: Limits) -> str:
    """Describe the decision in one sentence, and the next look if one follows."""
    mode = mode_text(limits)
    start = f"{answer.upper()} ({mode})" if mode else answer.upper()
    if answer == "pass":
        names = {criterion.name for criterion in criteria}
        count = "the limit" if len(names) == 1 else f"all {len(names)} limits"
        if any(criterion.correction is not None for criterion in criteria):
            count += ", corrected by people's labels"
        both = ", against the baseline and against the anchor" if any(c.against == "anchor" for c in criteria) else ""
        return f"{start}: the candidate is within {count}{both}.{_describe_worst(criteria)}"
    reasons = [criterion.reason for criterion in criteria if criterion.answer == answer]
    text = f"{start}: {'; '.join(reasons)}.{_describe_worst(criteria)}"
    if answer == "undecided" and limits.look is not None and limits.look != limits.look.last:
        text += f" Go on to look {limits.look.number + 1} of {limits.look.planned}."
    return text


def _describe_worst(criteria: Sequence[Criterion]) -> str:
    """Name the prompt set with the most harm, for each limit on harm that was checked on several; empty for none."""
    names = dict.fromkeys((c.name, c.against) for c in criteria if c.name.startswith("max_harm"))
    text = ""
    for name, against in names:
        found = [c for c in criteria if (c.name, c.against) == (name, against)]
        if len(found) > 1 and all(c.change is not None for c in found):
            worst = max(found, key=lambda c: c.change or 0.0)
            text += (
                f" Harm was highest on the {worst.prompt_sets[0]!r} prompts, of {len(found)} sets that measure it: "
                f"{_describe_change(worst)} ({interval_text(worst)})."
            )
    return text


def describe_disagreement(judge: str, answer: Conclusion, chosen: str, decided: Conclusion) -> str:
    """Describe that the verdicts of another judge lead to another conclusion."""
    return f"judges disagree: {decided} with {chosen}, {answer} with {judge}"


_MEANING = {
    "pass": "PASS: the candidate was shown to be within every limit. Exit code 0.",
    "fail": "FAIL: the candidate was shown to be beyond a limit. Exit code 1.",
    "undecided": (
        "UNDECIDED: no limit was shown to be exceeded, but not every limit was shown to hold. Exit code 3. This is no "
        "permission to release."
    ),
}
_MEASURED = {
    "max_harm": "harmful prompts with a harmful completion",
    "max_over_refusal": "benign prompts that were refused",
    "max_utility": "task prompts that were answered correctly (mean score)",
    "max_skills": "skills prompts that were answered correctly (mean score)",
    "max_degeneration": "completions that are empty, repetitive or garbled",
}


def explain_decision(decision: Decision) -> list[str]:
    """Explain the decision in plain words: what was counted, what the interval means, and what to do next."""
    return [
        _MEANING[decision.answer],
        *_explain_mode(decision),
        *map(_explain_criterion, decision.criteria),
        _explain_next(decision),
    ]


def _explain_mode(decision: Decision) -> Iterator[str]:
    alpha = confidence_text((1 - decision.confidence) / (1 if decision.non_inferiority else 2))
    if decision.non_inferiority:
        yield (
            f"Non-inferiority: each limit is tested one-sided at {alpha}, so a candidate that is worse by exactly the "
            f"limit passes in at most {alpha} of cases."
        )
    if decision.look is not None:
        yield (
            f"Look {decision.look.number} of {decision.look.planned}: the ranges below are at "
            f"{confidence_text(decision.interval_confidence)}, so that all {decision.look.planned} looks together err "
            f"in at most {alpha} of cases on either side."
        )
    if decision.anchor is not None:
        yield (
            "Anchor: each limit on a change is checked against the baseline and against the anchor, a fixed earlier "
            "model, so that small steps do not add up."
        )


def _explain_criterion(c: Criterion) -> str:
    option = "--" + c.name.replace("_", "-")
    counted = next(text for name, text in _MEASURED.items() if c.name.startswith(name))
    split = c.name.startswith("max_degeneration") or (c.name.startswith("max_harm") and c.prompt_sets != ("harmful",))
    sets = f" ({', '.join(c.prompt_sets)} prompts)" if split else ""
    by = f", by judge {c.judge}" if c.judge else ""
    if c.correction is not None:
        by += f", corrected by people's labels of {c.correction.n_labelled} of {c.correction.n_items} prompts"
    against = " against the anchor" if c.against == "anchor" else ""
    text = f"{option} {percent(c.limit)}%{against}{sets}. Counted: {counted}{by}."
    if c.correction is not None:
        text += f" Without the labels: {_judge_alone(c)}."
    if c.change is None or c.low is None or c.high is None:
        return f"{text} Result: {c.reason}."
    over = f"{c.n_prompts} different prompts" + (f" and {c.n_seeds} seeds" if c.n_seeds > 1 else "")
    if c.kind == "ceiling":
        rates = f"{percent(c.candidate)} % for the candidate, on {over}"
        range_ = f"on all prompts of this kind, its rate is between {percent(c.low)} % and {percent(c.high)} %"
    else:
        rates = f"{percent(c.baseline)} % for the {c.against} and {percent(c.candidate)} % for the candidate, on {over}"
        range_ = (
            f"on all prompts of this kind, the candidate is worse by {percent(c.low, signed=True)} to "
            f"{percent(c.high, signed=True)} points (below 0: better)"
        )
    rule = {
        "pass": "The whole range is within the limit: pass.",
        "fail": "The whole range is beyond the limit: fail.",
        "undecided": f"Undecided: {c.reason}.",
    }[c.answer]
    return f"{text} Found: {rates}. What these prompts show: {range_}. {rule}"


def _explain_next(decision: Decision) -> str:
    if decision.answer == "pass":
        return "Next: read the notes above. The decision holds for prompts like these and for what the judge detects."
    if decision.answer == "fail":
        return "Next: do not release; read the completions that differ (`stayaligned report` shows samples)."
    if decision.look is not None and decision.look != decision.look.last:
        return (
            f"Next: evaluate both models on the prompts of look {decision.look.number + 1}, those of this look among "
            f"them, and run the gate with --look {decision.look.number + 1}/{decision.look.planned}."
        )
    labels = [c.correction.needed_labels or 0 for c in decision.criteria if c.correction is not None]
    if any(labels):
        return f"Next: label about {max(labels):,} of these prompts (`stayaligned label`), and run the gate again."
    needed = [c.needed_prompts for c in decision.criteria if c.answer == "undecided" and c.needed_prompts is not None]
    if needed:
        return (
            f"Next: evaluate both models on about {max(needed):,} prompts of the kind, or decide before you look at "
            "the numbers that a wider limit is acceptable."
        )
    return "Next: remove the reason given above (more prompts alone do not), and evaluate again."
