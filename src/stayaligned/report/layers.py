"""The effect of a patch on each module as tables: kinds of module as rows, layers as columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from stayaligned.core.text import one_line
from stayaligned.report.values import ModuleEffect, PatchSummary

Quantity = Literal["similarity", "shrinkage"]

_MOST_KINDS = 24
_LEVELS = 10


@dataclass(frozen=True, slots=True)
class LayerCell:
    """The mean of the modules of one kind in one layer, formatted for a table."""

    text: str
    """The value in percent."""
    css: str
    """`hN` for a changed module, with N from 0 (unchanged value) to 9; and `part` if changed in a part of the seeds."""


@dataclass(frozen=True, slots=True)
class LayerTable:
    """One quantity of one patch, by kind of module and layer."""

    quantity: Quantity
    columns: tuple[str, ...]
    """Layers; `none` for modules outside of the numbered layers."""
    rows: tuple[tuple[str, tuple[LayerCell | None, ...]], ...]
    """Kind of module, and one cell per layer; None where the layer has no such module."""


def layer_table(patch: PatchSummary, quantity: Quantity) -> LayerTable:
    """Arrange one quantity of a patch by kind of module and layer."""
    kinds, columns, cells = module_grid(patch.modules)
    rows = tuple(
        (
            one_line(kind, 40),
            tuple(
                None if (found := cells.get((row, column))) is None else _cell(found, quantity)
                for column in range(len(columns))
            ),
        )
        for row, kind in enumerate(kinds)
    )
    return LayerTable(quantity, tuple(columns), rows)


def _cell(effects: Sequence[ModuleEffect], quantity: Quantity) -> LayerCell:
    value = fmean(getattr(effect, quantity) for effect in effects)
    selected, seeds = sum(e.n_selected for e in effects), sum(e.n_seeds for e in effects)
    level = min(_LEVELS - 1, max(0, int(_LEVELS * (1 - abs(value)))))
    css = "" if not selected else f"h{level}" if selected == seeds else f"h{level} part"
    return LayerCell(f"{100 * value:.0f}".replace("-", "−"), css)


def middle_and_range(patch: PatchSummary, quantity: Quantity) -> str:
    """Describe one quantity over the changed modules in percent, by median and range: `43 (12 to 80)`."""
    values = [100 * getattr(m, quantity) for m in patch.modules if m.n_selected]
    if not values:
        return "–"
    return f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})".replace("-", "−")


def count_changed(patch: PatchSummary) -> str:
    """Describe how many modules a patch changed."""
    changed = sum(module.n_selected > 0 for module in patch.modules)
    always = sum(module.n_selected == module.n_seeds for module in patch.modules)
    return f"{changed} of {len(patch.modules)}" + (f", {always} in every seed" if always != changed else "")


def module_grid(
    modules: Sequence[ModuleEffect],
) -> tuple[list[str], list[str], dict[tuple[int, int], list[ModuleEffect]]]:
    """Return kinds, layers, and the modules at each (kind, layer).

    The first number in a module's name is its layer; the part after it is its kind. If there are too many kinds for a
    table (for example with experts), further numbers are replaced by `*` and a cell is the mean of its modules.
    """
    found = [(*_kind_and_layer(effect.module), effect) for effect in modules]
    if len({kind for kind, _, _ in found}) > _MOST_KINDS:
        found = [(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind), layer, effect) for kind, layer, effect in found]
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(kind for kind, _, _ in found))}
    layers = sorted({layer for _, layer, _ in found}, key=lambda layer: (layer == "", len(layer), layer))
    places = {layer: i for i, layer in enumerate(layers)}
    cells: dict[tuple[int, int], list[ModuleEffect]] = {}
    for kind, layer, effect in found:
        cells.setdefault((kinds[kind], places[layer]), []).append(effect)
    return list(kinds), [layer or "none" for layer in layers], cells


def _kind_and_layer(module: str) -> tuple[str, str]:
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (module, "") if at is None else (".".join(parts[at + 1 :]) or module, parts[at])
