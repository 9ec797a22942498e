"""Whether an earlier decision is the earlier look of the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.gate.values import Decision, SideSummary

_UNEVEN = 0.1
"""How far the number of prompts may be from that of equal steps; copies of prompts and unscored ones cause some."""


def read_decision(path: Path) -> Decision:
    """Read a decision that `gate --json FILE` wrote.

    Raises:
        StayalignedError: If there is none.
    """
    try:
        return Decision.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no decision of the gate"
        raise StayalignedError(
            f"--previous {path}: {reason}", hint="Give the file that `gate --json FILE` wrote at the look before."
        ) from None


def follow_plan(earlier: Decision | None, now: Decision) -> Decision:
    """Return a decision that follows an earlier look; if none is given where there was one, with a note.

    Raises:
        StayalignedError: If the earlier decision is not an undecided, smaller look of the same plan.
    """
    if earlier is not None:
        _refuse_other_plan(earlier, now)
    elif now.look is not None and now.look.number > 1:
        text = "the earlier looks were not checked: give the decision of the one before with --previous"
        return now.model_copy(update={"notes": (text, *now.notes)})
    return now


def _refuse_other_plan(earlier: Decision, now: Decision) -> None:
    """Refuse an earlier decision that is not an undecided, smaller look of the same plan.

    Raises:
        StayalignedError: With the first difference.
    """
    for name, before, after in _plan(earlier, now):
        if before != after:
            raise StayalignedError(
                f"--previous: {name} was {before}, and is now {after}",
                hint="All looks of one plan compare the same models, by the same judge, limits and number of looks.",
            )
    if earlier.answer != "undecided":
        raise StayalignedError(
            f"--previous: look {earlier.look} decided already: {earlier.answer}",
            hint="The first look that decides is the decision; another look at the same models is none.",
        )
    if earlier.look is None or now.look is None or earlier.look.number >= now.look.number:
        raise StayalignedError(
            f"--previous: look {earlier.look} is not earlier than look {now.look}", hint="Give the next --look K/N."
        )
    smaller = [(one.n_prompts, other.n_prompts) for one, other in zip(earlier.criteria, now.criteria, strict=True)]
    for before, after in smaller:
        if before >= after > 0:
            raise StayalignedError(
                f"--previous: it had {before} prompts, and this look has {after}",
                hint="Evaluate both models on more prompts, those of the earlier look among them.",
            )
        expected = before * now.look.number / earlier.look.number
        if abs(after - expected) > _UNEVEN * expected:
            raise StayalignedError(
                f"--previous: look {earlier.look} had {before} prompts, so look {now.look} has about {expected:.0f}, "
                f"and not {after}",
                hint="Planned looks are at equal steps of the number of prompts: `evaluate --limit`.",
            )


def _plan(earlier: Decision, now: Decision) -> list[tuple[str, Any, Any]]:
    def side(one: SideSummary | None) -> str:
        return "none" if one is None else f"{one.arm} {one.model} {one.seeds}"

    def looks(one: Decision) -> int:
        return one.look.planned if one.look else 1

    def limits(one: Decision) -> list[tuple[Any, ...]]:
        return [(c.name, c.prompt_sets, c.against, c.limit) for c in one.criteria]

    return [
        ("the number of planned looks", looks(earlier), looks(now)),
        ("the baseline", side(earlier.baseline), side(now.baseline)),
        ("the candidate", side(earlier.candidate), side(now.candidate)),
        ("the anchor", side(earlier.anchor), side(now.anchor)),
        ("the judge", earlier.judge, now.judge),
        ("the list of limits", limits(earlier), limits(now)),
        ("the confidence", earlier.confidence, now.confidence),
        ("non-inferiority", earlier.non_inferiority, now.non_inferiority),
    ]
