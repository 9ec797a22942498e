"""How many rows of a training set were left out or cut because they are too long."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)


class RowLengths(NamedTuple):
    """The rows of a training set after they were tokenized."""

    given: int
    """Number of rows before rows without a token to learn were left out."""
    left_out: int
    cut: int
    """Number of rows that were cut, so that the end of their completion is not learned."""


def count_row_lengths(
    given: int,
    rows: Iterable[Mapping[str, Any]],
    max_length: int | None,
    endings: Sequence[Sequence[int]] | None = None,
) -> RowLengths:
    """Count the rows that were left out, and those that were cut after `max_length` tokens.

    A row of that many tokens was cut unless it ends as a whole row does.

    Args:
        given: number of rows before they were tokenized.
        rows: rows with `input_ids`.
        max_length: number of tokens at which rows are cut; None if they are not.
        endings: what whole rows end with (`stayaligned.hf.features.endings_of_answers`); by default the last tokens of
            the shorter rows.
    """
    ids: list[Sequence[int]] = [row["input_ids"] for row in rows]
    if max_length is None:
        return RowLengths(given, given - len(ids), 0)
    if endings is None:
        endings = [[token] for token in {one[-1] for one in ids if 0 < len(one) < max_length}]
    return RowLengths(given, given - len(ids), sum(is_cut(one, max_length, endings) for one in ids))


def is_cut(ids: Sequence[int], max_length: int, endings: Sequence[Sequence[int]]) -> bool:
    """Return whether a row lost the end of its completion when it was cut after `max_length` tokens."""
    kept = list(ids[:max_length])
    return len(ids) >= max_length and not any(kept[-len(end) :] == list(end) for end in endings)


def report_row_lengths(
    name: str,
    given: int,
    rows: Iterable[Mapping[str, Any]],
    max_length: int | None,
    endings: Sequence[Sequence[int]] | None = None,
) -> RowLengths:
    """Count as `count_row_lengths`, and log a warning if rows were left out or cut."""
    found = count_row_lengths(given, rows, max_length, endings)
    log_row_lengths(name, found, max_length)
    return found


def log_row_lengths(name: str, found: RowLengths, max_length: int | None) -> None:
    """Log a warning if rows were left out or cut; `name` is what the rows are for."""
    if found.left_out:
        _log.warning(
            "%d of %d %s rows left out: their prompts fill max_length=%s tokens, %d rows are left",
            found.left_out,
            found.given,
            name,
            max_length,
            found.given - found.left_out,
        )
    if found.cut:
        _log.warning(
            "%d of %d %s rows are cut at max_length=%s tokens; the ends of their completions are not learned",
            found.cut,
            found.given,
            name,
            max_length,
        )
