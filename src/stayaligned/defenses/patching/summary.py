"""Say in words and numbers what a patch did to the layers, for the record, the terminal and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from stayaligned.core.records import LayerReport
from stayaligned.defenses import PatchDefense
from stayaligned.weights.unsupported import list_names

NEARLY_DELETED = 0.05
"""Share of the update below which a patch is nearly a deletion of the layers that it changes."""
NORM_OF_SUM = (
    "the patch adds another adapter's update to the changed layers: their norm after the patch is that of the sum, not "
    "of what is kept"
)
"""Note on the norms of a patch that adds something."""
_LARGE_ERROR = 0.1
"""Bound on the error of the paper's C, through a subspace file, from which it is noted."""


class LayerTotals(NamedTuple):
    """What a patch did to all layers together."""

    layers: int
    """Number of layers."""
    candidates: int
    """Number of layers that a projection can change: not those with a zero update or V = 0."""
    changed: int
    """Number of layers that the patch changed."""
    kept_median: float | None
    """Median over the changed layers of the norm of the update after / before the patch; None if none changed."""
    kept_changed: float | None
    """Norm of the update after / before the patch over the changed layers together; None if none changed."""
    kept_norm: float
    """Norm of the whole update after / before the patch, over all layers; 1 for an update that was zero."""


def summarize(layers: Sequence[LayerReport]) -> LayerTotals:
    """Return the numbers of a patch, given the reports of its layers."""
    changed = [layer for layer in layers if layer.selected]
    return LayerTotals(
        layers=len(layers),
        candidates=sum(layer.skipped is None for layer in layers),
        changed=len(changed),
        kept_median=median(layer.shrinkage for layer in changed) if changed else None,
        kept_changed=_kept(changed) if changed else None,
        kept_norm=_kept(layers),
    )


def describe_kept(summary: LayerTotals) -> str:
    """Return the share of the update that the changed layers keep, as a sentence; empty if no layer changed."""
    if summary.kept_median is None:
        return ""
    return (
        f"the {summary.changed} changed layers keep {percent(summary.kept_median)} of their update (median of the "
        f"norms); the whole update keeps {percent(summary.kept_norm)} of its norm"
    )


def notes_on(patch: PatchDefense, layers: Sequence[LayerReport], *, would: bool = False) -> list[str]:
    """Return what a reader of the reports must know and may overlook.

    Args:
        patch: the defense.
        layers: the reports of one adapter or model.
        would: whether nothing was written (a scan).
    """
    summary, rank = summarize(layers), _requested_rank(patch)
    notes: list[str] = []
    for reason, words in (
        ("zero_update", "the update is zero (never trained, or removed before)"),
        ("rounded_update", "the update is only rounding to another type (never trained)"),
        ("no_direction", "aligned and base are equal, so that there is no alignment direction"),
        (
            "rounded_direction",
            "aligned and base differ only by rounding to another type, so that there is no alignment direction",
        ),
    ):
        names = [layer.module for layer in layers if layer.skipped == reason]
        if names:
            notes.append(
                f"in {len(names)} of {len(layers)} layers {words}; no rule selects them, and they are unchanged: "
                f"{list_names(names, 5)}"
            )
    undecided = [layer.module for layer in layers if layer.undecided]
    if undecided:
        notes.append(
            f"the subspace file leaves open whether {len(undecided)} of {summary.candidates} layers belong to the "
            f"selection; they were decided by approximate similarities: {list_names(undecided, 5)}"
        )
    inexact = [layer for layer in layers if layer.selected and (layer.truncation_error or 0.0) > _LARGE_ERROR]
    if inexact:
        worst = max(layer.truncation_error or 0.0 for layer in inexact)
        notes.append(
            f"the subspace file holds only a part of V: in {len(inexact)} of {summary.changed} changed layers C ΔW may "
            f"be off by more than {percent(_LARGE_ERROR)} of its norm (at most {percent(worst)}); --aligned and --base "
            "give the exact one"
        )
    clamped = [
        layer.subspace_rank for layer in layers if layer.subspace_rank is not None and layer.subspace_rank < (rank or 0)
    ]
    if clamped:
        notes.append(
            f"rank {rank} was given, but V has fewer directions in {len(clamped)} of {len(layers)} layers: "
            f"{min(clamped)} to {max(clamped)} were used there"
        )
    if summary.candidates and not summary.changed and not would:
        notes.append(
            "no layer was selected, so the output equals the input. This does not show that it is safe: similarity "
            "measures the direction of the update, not what the model does"
        )
    if summary.kept_changed is not None and _deletes(patch):
        notes.extend(_note_on_deletion(summary, would))
    return notes


def percent(share: float) -> str:
    """Format a share with as many digits as its size needs: 63 %, 4.2 %, 0.41 %."""
    value = 100 * share
    digits = 0 if value >= 10 or value == 0 else 1 if value >= 1 else 2
    return f"{value:.{digits}f} %" if value >= 0.005 or value == 0 else f"{value:.1e} %"


def _note_on_deletion(summary: LayerTotals, would: bool) -> list[str]:
    if summary.kept_median is None or summary.kept_median >= NEARLY_DELETED:
        return []
    verb = "would keep" if would else "keep"
    return [
        f"the {summary.changed} changed layers {verb} {percent(summary.kept_median)} of their update (median): this is "
        "nearly the same as deleting them, as the control `drop` does"
    ]


def _deletes(patch: PatchDefense) -> bool:
    """Return whether the patch is no control: a control's user knows what it removes."""
    from stayaligned.defenses._projection import Control

    return not isinstance(patch, Control)


def _requested_rank(patch: PatchDefense) -> int | None:
    from stayaligned.defenses._projection import Control

    rank = getattr(patch.like if isinstance(patch, Control) else patch, "rank", None)
    return rank if isinstance(rank, int) else None


def _kept(layers: Sequence[LayerReport]) -> float:
    before = math.fsum(layer.update_norm**2 for layer in layers)
    after = math.fsum((layer.update_norm * layer.shrinkage) ** 2 for layer in layers)
    return math.sqrt(after / before) if before else 1.0
