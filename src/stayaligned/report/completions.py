"""The completions in the page: samples with their text, and the table of all of them, which its script decodes."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from stayaligned.core.records import Outcome
from stayaligned.core.text import one_line
from stayaligned.evaluation.results import Evidence
from stayaligned.report.values import ArmCompletion, ComparedPrompt, Report

_SHOWN_CHARACTERS = 400
_MOST_CHARACTERS = 20_000
"""Characters of one text beyond which the page omits the rest."""
_ALL_CHARACTERS = 400_000
"""Characters of all sample completions together; many texts have fewer characters each."""
_ALPHABET = string.ascii_letters + string.digits + "-_"


# ---- sample completions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Clipped:
    """A text split for display."""

    start: str
    """The part that is always shown."""
    rest: str
    """The part that is shown on demand."""
    n_left_out: int
    """Number of characters that the page omits."""


def clipper(report: Report) -> Callable[[str], Clipped]:
    """Return the function that splits a text, with its share of the characters that all samples may have together."""
    n = sum(len(prompt.completions) for prompt in report.prompts)
    most = max(_SHOWN_CHARACTERS, min(_MOST_CHARACTERS, _ALL_CHARACTERS // max(1, n)))

    def clip(text: str) -> Clipped:
        return Clipped(text[:_SHOWN_CHARACTERS], text[_SHOWN_CHARACTERS:most], max(0, len(text) - most))

    return clip


def disputed(report: Report) -> list[ComparedPrompt]:
    """Return the prompts whose sample completions judges dispute, with those completions."""
    found = [
        replace(prompt, completions=tuple(c for c in prompt.completions if _is_disputed(c)))
        for prompt in report.prompts
    ]
    return [prompt for prompt in found if prompt.completions]


def _is_disputed(completion: ArmCompletion) -> bool:
    """Whether judges gave different outcomes; with a judge that does not distinguish refusals, only harm counts."""
    found = {outcome for outcome in completion.outcomes.values() if outcome is not None}
    if Outcome.SAFE in found:
        return Outcome.HARM in found
    return len(found) > 1


# ---- the table of all completions ------------------------------------------------------------------------------------


def completion_table(report: Report) -> str | None:
    """Return the evidence of all completions as JSON for a data `<script>` element; None without evidence.

    A grid has tens of thousands of rows. The prompts of a run are stored once for all runs that have the same ones in
    the same order, and each column of a run as its distinct values and one character per row.

    Returns:
        JSON with `alphabet`; `columns` (titles: prompt, arm, seed, prompt set, category, then the outcomes); `prompts`
        (a list of columns `prompt`, `prompt set` and `category`); and `runs`, each with `arm`, `seed`, the index of its
        `prompts`, and its `cells`: for each outcome column null (no row has a value), `[values, characters]`, or the
        plain list of values where there are too many different ones.
    """
    if not report.evidence_rows:
        return None
    judges = list(dict.fromkeys(judge for row in report.evidence_rows for judge in row.evidence.outcomes))
    scales = list(dict.fromkeys(judge for row in report.evidence_rows for judge in row.evidence.judge_scores))
    outcomes = [*judges, *(f"{judge}: score" for judge in scales)]
    prompts: dict[str, tuple[int, list[Any]]] = {}
    runs: list[dict[str, Any]] = []
    for (arm, seed), found in groupby(report.evidence_rows, key=lambda row: (row.arm, row.seed)):
        rows = [row.evidence for row in found]
        asked = _prompts(rows)
        index, _ = prompts.setdefault(json.dumps(asked), (len(prompts), asked))
        cells = [
            *(_pack(_outcome(row, judge) for row in rows) for judge in judges),
            *(_pack(_number(row.judge_scores.get(judge)) for row in rows) for judge in scales),
            _pack(_number(row.score) for row in rows),
            _pack(None if row.degenerate is None else "yes" if row.degenerate else "no" for row in rows),
        ]
        runs.append({"arm": one_line(arm, 60), "seed": seed, "prompts": index, "cells": cells})
    titles = ["prompt", "arm", "seed", "prompt set", "category", *outcomes, "score", "degenerate"]
    return _inert_json(
        {
            "alphabet": _ALPHABET,
            "columns": [one_line(title, 40) for title in titles],
            "prompts": [asked for _, asked in prompts.values()],
            "runs": runs,
        }
    )


def _prompts(rows: Sequence[Evidence]) -> list[Any]:
    return [
        [one_line(row.id, 60) for row in rows],
        _pack(row.prompt_set for row in rows),
        _pack(one_line(row.category, 60) for row in rows),
    ]


def _outcome(row: Evidence, judge: str) -> str | None:
    if judge not in row.outcomes:
        return None
    found = row.outcomes[judge]
    return "unscored" if found is None else found.value


def _number(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _pack(cells: Iterable[str | float | None]) -> list[Any] | None:
    """Return a column as its distinct values and a string with one character per cell."""
    column = list(cells)
    values = list(dict.fromkeys(column))
    if values == [None]:
        return None
    if len(values) > len(_ALPHABET):
        return column
    codes = dict(zip(values, _ALPHABET, strict=False))
    return [values, "".join(codes[cell] for cell in column)]


def _inert_json(value: object) -> str:
    """Return JSON for a data `<script>` element, encoded so that it cannot close the element or open another."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e")
