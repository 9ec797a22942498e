"""Copies and near copies of prompts over all results of a comparison: each counts as one prompt in all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from stayaligned.core.records import PromptSet, sampled_prompt, worst_outcome
from stayaligned.data.copies import PromptSketch, join_copies
from stayaligned.evaluation.results import Evidence, StoredResult


@dataclass(frozen=True)
class _JoinedResult(StoredResult):
    """A stored result whose prompts were joined with those of other results."""

    joined: tuple[Evidence, ...] = ()

    @cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        return self.joined


def join_samples(rows: Iterable[Evidence]) -> list[Evidence]:
    """Return one row for all sampled completions of a prompt, and every other row.

    By each judge it has the worst outcome. It is degenerate, or cut, if at least half of them are.
    """
    found: dict[tuple[PromptSet, str], list[Evidence]] = {}
    for row in rows:
        name = sampled_prompt(row.id) if row.prompt_set == "sampled" else row.id
        found.setdefault((row.prompt_set, name), []).append(row)
    return [same[0] if key[0] != "sampled" else _worst_sample(key[1], same) for key, same in found.items()]


def _worst_sample(name: str, rows: Sequence[Evidence]) -> Evidence:
    judges = dict.fromkeys(judge for row in rows for judge in row.outcomes)
    checked = [row.degenerate for row in rows if row.degenerate is not None]
    texts = "\n".join(row.completion for row in rows)
    return rows[0].model_copy(
        update={
            "id": name,
            "outcomes": {judge: worst_outcome([row.outcomes.get(judge) for row in rows]) for judge in judges},
            "judge_scores": {},
            "degenerate": 2 * sum(checked) >= len(checked) if checked else None,
            "completion": hashlib.sha256(texts.encode()).hexdigest()[:16] if all(r.completion for r in rows) else "",
            "cut": 2 * sum(bool(row.cut) for row in rows) >= len(rows),
        }
    )


def join_results(results: Sequence[StoredResult], *, templates: bool = True) -> list[StoredResult]:
    """Return results whose rows have equal groups if their prompts count as one, in whichever result they are.

    Sampled completions of one prompt are one row.

    Args:
        results: all results of a comparison.
        templates: whether a template around the prompts is ignored; if not, prompts that differ in little beside a long
            template are one.
    """
    rows = join_rows([join_samples(result.evidence) for result in results], templates=templates)
    return [
        _JoinedResult(one.directory, one.root, one.result, tuple(found))
        for one, found in zip(results, rows, strict=True)
    ]


def join_rows(runs: Sequence[Sequence[Evidence]], *, templates: bool = True) -> list[list[Evidence]]:
    """Return the rows of every result with joined groups; see `join_results`."""
    sketches: dict[PromptSet, dict[PromptSketch, None]] = {}
    for row in (row for rows in runs for row in rows):
        sketch = PromptSketch(row.prompt, row.group, row.sketch, row.own_sketch)
        sketches.setdefault(row.prompt_set, {})[sketch] = None
    joined = {prompt_set: join_copies(found, templates=templates) for prompt_set, found in sketches.items()}

    def of(row: Evidence) -> Evidence:
        group = joined[row.prompt_set][row.prompt]
        return row if row.group == group else row.model_copy(update={"group": group})

    return [[of(row) for row in rows] for rows in runs]


def note_templates(runs: Sequence[Sequence[Evidence]]) -> Iterator[str]:
    """Yield a note for each prompt set with prompts that are different only if a template around them is ignored."""
    counts: list[dict[PromptSet, int]] = []
    for templates in (True, False):
        groups: dict[PromptSet, set[str]] = {}
        for row in (row for rows in join_rows(runs, templates=templates) for row in rows):
            groups.setdefault(row.prompt_set, set()).add(row.group)
        counts.append({prompt_set: len(found) for prompt_set, found in groups.items()})
    for prompt_set, different in counts[0].items():
        fewest = counts[1][prompt_set]
        if fewest < different:
            yield (
                f"{prompt_set} prompts share a long text and differ in a few words: they are {different} prompts if "
                f"that text is a template, and {fewest} if not; intervals take it for a template"
            )
