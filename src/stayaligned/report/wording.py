"""What the numbers say, in sentences that claim no more than the numbers do. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from stayaligned.report.text import number, percent, points
from stayaligned.report.values import Arm
from stayaligned.results import Result

FEW_SEEDS = 5
"""Below this many, Student's quantile alone makes an interval 1.6 times as wide as many seeds would."""

NEVER_CLAIMED = (
    "Nothing here shows tamper resistance: whoever holds the weights can undo every defense of this kind. What is "
    "measured is accidental drift and poisoned data, for the party that runs the training."
)


def resolved(arm: Arm, metric: str) -> bool:
    """Whether the arm's paired difference from the reference leaves zero out of its interval."""
    difference = arm.differences.get(metric)
    if difference is None or difference.low is None or difference.high is None:
        return False
    return not difference.low <= 0.0 <= difference.high


def answer_in_words(arms: Sequence[Arm], reference: str | None) -> str:
    """The comparison in one sentence: what happened to the harmful score."""
    if reference is None:
        return _alone(arms)
    paired = [arm for arm in arms if arm.comparable and "harmful_score" in arm.differences]
    if not paired:
        return f"No other arm faced the same task and attack as {reference}, with a harmful score to compare."
    counted = f"{len(_lowered(arms)) or 'none'} of {len(paired)} other {'arm' if len(paired) == 1 else 'arms'}"
    return f"Against {reference}, {counted} lowered the harmful score beyond the interval of the difference."


def findings_in_words(arms: Sequence[Arm]) -> Iterable[str]:
    """What stands behind the answer: which arms, at what price in accuracy, and the front of the two."""
    lowered = _lowered(arms)
    if lowered:
        yield f"Lowered: {_names(lowered)}."
    costly = [arm for arm in lowered if _moves(arm, "finetune_accuracy", -1)]
    unresolved = [arm for arm in lowered if arm not in costly and "finetune_accuracy" in arm.differences]
    if costly:
        yield f"Of these, fine-tune accuracy fell beyond its interval for {_names(costly)}."
    if unresolved:
        yield f"For {_names(unresolved)} no loss of accuracy is resolved, which does not show that there is none."
    raised = [arm for arm in arms if arm.comparable and _moves(arm, "harmful_score", +1)]
    if raised:
        yield f"Raised beyond the interval: {_names(raised)}."
    yield from _front(arms)


def _alone(arms: Sequence[Arm]) -> str:
    harms = [(arm, arm.estimates["harmful_score"].mean) for arm in arms if "harmful_score" in arm.estimates]
    scored = [(arm, mean) for arm, mean in harms if mean is not None]
    if not scored:
        return "No harmful score could be measured."
    if len(scored) == 1:
        arm, harm = scored[0]
        return f"The harmful score of {arm.name} is {percent(harm)}."
    low, high = min(scored, key=lambda row: row[1]), max(scored, key=lambda row: row[1])
    return f"Harmful scores run from {percent(low[1])} ({low[0].name}) to {percent(high[1])} ({high[0].name})."


def _lowered(arms: Sequence[Arm]) -> list[Arm]:
    return [arm for arm in arms if arm.comparable and _moves(arm, "harmful_score", -1)]


def _moves(arm: Arm, metric: str, sign: int) -> bool:
    """Whether the difference from the reference is resolved and has this sign."""
    return resolved(arm, metric) and sign * (arm.differences[metric].mean or 0.0) > 0


def _front(arms: Sequence[Arm]) -> Iterable[str]:
    front = [arm for arm in arms if arm.on_front]
    if sum(arm.comparable for arm in arms) < 3 or not front:
        return
    front.sort(key=lambda arm: arm.estimates["harmful_score"].mean or 0.0)
    means = [[number(arm.estimates[name].mean) for name in ("harmful_score", "finetune_accuracy")] for arm in front]
    shown = [f"{arm.name} ({harm} / {accuracy})" for arm, (harm, accuracy) in zip(front, means, strict=True)]
    yield f"On the front of harm against accuracy, by their means in percent: {_join(shown)}."


def cautions_about(arms: Sequence[Arm], results: Sequence[Result], wanted_reference: str | None) -> Iterable[str]:
    """What a reader must know before believing the numbers, most important first."""
    names = {arm.name for arm in arms}
    if wanted_reference is not None and wanted_reference not in names:
        yield f"The reference arm {wanted_reference!r} has no result, so no differences are shown."
    for note, owners in _notes(results).items():
        yield f"{note} ({_names_of(owners)})."
    yield from _about_seeds(arms)
    yield from _about_scoring(arms, results)
    for what, values in (
        ("code commits", {r.provenance.commit for r in results if r.provenance.commit}),
        ("chat templates", {r.provenance.template_hash for r in results if r.provenance.template_hash}),
        ("sets of library versions", {tuple(sorted(r.provenance.versions.items())) for r in results}),
    ):
        if len(values) > 1:
            yield f"The results come from {len(values)} different {what}; they may not be comparable."
    apart = [arm for arm in arms if not arm.comparable]
    if apart:
        yield (
            f"{_names(apart)} {'was' if len(apart) == 1 else 'were'} not fine-tuned on the reference's task under its "
            "attack: landmarks, not competitors. The front leaves them out."
        )


def _about_seeds(arms: Sequence[Arm]) -> Iterable[str]:
    fewest = min(len(arm.seeds) for arm in arms)
    if fewest == 1:
        yield (
            "At least one arm has a single seed. Its interval covers which prompts were asked, not how the training "
            "turned out; differences between seeds are often larger."
        )
    elif fewest < FEW_SEEDS:
        yield (
            f"{fewest} seeds are few: intervals are wide and rest on the assumption of normal errors. Treat every "
            f"difference as provisional and rerun with at least {FEW_SEEDS}."
        )
    if len({arm.seeds for arm in arms}) > 1:
        yield "The arms do not all have the same seeds; differences use the seeds that both arms have."
    n_compared = sum(bool(arm.differences) for arm in arms)
    if n_compared > 2:
        yield (
            f"{n_compared} arms are compared with one reference and the intervals are not corrected for that: at 95 % "
            "one comparison in twenty leaves zero out by chance."
        )


def _about_scoring(arms: Sequence[Arm], results: Sequence[Result]) -> Iterable[str]:
    # The three rates of the harmful prompts read the same answers: counted once.
    read = [e for arm in arms for e in arm.estimates.values() if e.metric not in ("refusal_rate", "other_rate")]
    unscored = sum(estimate.n_unscored for estimate in read)
    if unscored:
        asked = unscored + sum(estimate.n for estimate in read)
        yield f"{unscored} of {asked} answers could not be scored. They enter no rate; the table shows where they are."
    judges = {result.judges[0].judge for result in results if result.judges}
    if len(judges) > 1:
        yield f"The primary judge is not the same everywhere ({_join(sorted(judges))}): their rates don't compare."
    low = [
        (pair.agreement, arm.name, pair.judges)
        for arm in arms
        for pair in arm.agreements
        if pair.agreement is not None and pair.agreement < 0.8
    ]
    if low:
        share, name, pair = min(low)
        yield (
            f"Judges {pair[0]} and {pair[1]} agree on only {percent(share)} of the answers of {name}; read the "
            "harmful scores with that in mind."
        )


def difference_in_words(difference_mean: float | None, low: float | None, high: float | None) -> str:
    """`-41.2 [-63.5, -18.9]`, in percentage points; the mean alone where there is no interval."""
    if difference_mean is None:
        return "n/a"
    if low is None or high is None:
        return points(difference_mean)
    return f"{points(difference_mean)} [{points(low)}, {points(high)}]"


def _notes(results: Sequence[Result]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for result in results:
        for note in result.notes:
            found.setdefault(note.rstrip("."), Counter())[result.arm] += 1
    return found


def _names_of(owners: Counter[str]) -> str:
    return _join([f"{name} × {count}" if count > 1 else name for name, count in owners.items()])


def _names(arms: Sequence[Arm]) -> str:
    return _join([arm.name for arm in arms])


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
