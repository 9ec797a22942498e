"""Write a scan of thresholds (the paper's figures 3 and 4 for one adapter) as JSON and SVG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stayaligned.core.files import write_text
from stayaligned.core.records import LayerReport
from stayaligned.defenses.patching.summary import summarize
from stayaligned.report.drawing import BLUE, ORANGE, drawing, standalone, svg

_STEPS = 20


class ThresholdOutcome(NamedTuple):
    """The effect of one threshold."""

    threshold: float
    layers: int
    """Number of layers that can be changed: not those with a zero update or V = 0."""
    changed: int
    """Number of these layers with similarity below the threshold."""
    kept_norm: float
    """Norm of the whole update after / before the patch, over all layers."""
    kept_median: float | None
    """Median over the changed layers of the norm of the update after / before the patch; None if none changes."""
    undecided: int = 0
    """Number of layers that a subspace file leaves open at this threshold."""


def threshold_outcomes(layers: Sequence[LayerReport]) -> list[ThresholdOutcome]:
    """Return the outcomes of the thresholds from 0 to above 1, in steps of 0.05.

    Args:
        layers: reports of a patch that changed every layer.
    """
    rows: list[ThresholdOutcome] = []
    for step in range(_STEPS + 2):
        threshold = step / _STEPS
        below = [layer.skipped is None and layer.similarity < threshold for layer in layers]
        after = [
            layer if changed else layer.model_copy(update={"shrinkage": 1.0, "selected": False})
            for layer, changed in zip(layers, below, strict=True)
        ]
        found = summarize(after)
        bounds = [layer.similarity_bounds for layer in layers if layer.similarity_bounds is not None]
        rows.append(
            ThresholdOutcome(
                threshold,
                layers=found.candidates,
                changed=found.changed,
                kept_norm=found.kept_norm,
                kept_median=found.kept_median,
                undecided=sum(low < threshold <= high for low, high in bounds),
            )
        )
    return rows


def write_scan(
    layers: Sequence[LayerReport], out: Path, defense: Mapping[str, Any], notes: Sequence[str] = ()
) -> list[Path]:
    """Write `scan.json` and `scan.svg` into a directory, and return their paths.

    Args:
        layers: reports of a patch that changed every layer.
        out: the directory; created if it does not exist.
        defense: the identity of the patch.
        notes: what a reader must know.
    """
    rows = threshold_outcomes(layers)
    record = {
        "defense": dict(defense),
        "notes": list(notes),
        "layers": [layer.model_dump(mode="json", exclude={"selected"}) for layer in layers],
        "thresholds": [row._asdict() for row in rows],
    }
    write_text(out / "scan.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "scan.svg", _figure(layers, rows))
    return [out / "scan.json", out / "scan.svg"]


def _figure(layers: Sequence[LayerReport], rows: Sequence[ThresholdOutcome]) -> str:
    """Plot changed layers and kept norm against the threshold (figure 3), and similarity by layer (figure 4)."""
    with drawing(860, 300) as figure:
        left, right = figure.subplots(1, 2)
        thresholds = [row.threshold for row in rows]
        left.step(
            thresholds,
            [row.changed / max(1, row.layers) for row in rows],
            where="post",
            color=BLUE,
            label="layers changed",
        )
        left.plot(thresholds, [row.kept_norm for row in rows], color=ORANGE, linestyle="--", label="norm kept")
        left.set_xlabel("threshold")
        left.set_title("share of layers changed, norm of the update kept")
        left.legend(frameon=False, fontsize=9)
        similarities = [layer.similarity if layer.skipped is None else float("nan") for layer in layers]
        right.plot(range(len(layers)), similarities, color=BLUE, marker=".", linewidth=0.8)
        right.set_xlabel("layer, in the model's order")
        right.set_title("similarity")
        for axes in (left, right):
            axes.grid(axis="y")
            axes.tick_params(length=0)
        text = svg(figure, "scan", f"A scan of thresholds over {len(layers)} layers; scan.json holds all values.")
    return standalone(text)
