"""The release gate: compares a candidate with a baseline and decides pass, fail or undecided. Imports no torch.

read_side(directories) ─► ComparedSide ─► decide(baseline, candidate, limits) ─► Decision ─► JSON, JUnit, Markdown
"""

from __future__ import annotations

from stayaligned.gate.deciding import decide
from stayaligned.gate.labels import People, read_people
from stayaligned.gate.reading import ComparedSide, read_side
from stayaligned.gate.values import Criterion, Decision, Limits
from stayaligned.gate.writing import to_json, to_junit, to_markdown

__all__ = [
    "ComparedSide",
    "Criterion",
    "Decision",
    "Limits",
    "People",
    "decide",
    "read_people",
    "read_side",
    "to_json",
    "to_junit",
    "to_markdown",
]
