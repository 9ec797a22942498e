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


def count_row_lengths(given: int, rows: Iterable[Mapping[str, Any]], max_length: int | None) -> RowLengths:
    """Count the rows that were left out, and those that were cut after `max_length` tokens.

    A row of that many tokens was cut unless it ends like a shorter row.

    Args:
        given: number of rows before they were tokenized.
        rows: rows with `input_ids`.
        max_length: number of tokens at which rows are cut; None if they are not.
    """
    ids: list[Sequence[int]] = [row["input_ids"] for row in rows]
    if max_length is None:
        return RowLengths(given, given - len(ids), 0)
    ends = {one[-1] for one in ids if 0 < len(one) < max_length}
    return RowLengths(given, given - len(ids), sum(len(one) >= max_length and one[-1] not in ends for one in ids))


def report_row_lengths(name: str, given: int, rows: Iterable[Mapping[str, Any]], max_length: int | None) -> RowLengths:
    """Count as `count_row_lengths`, and log a warning if rows were left out or cut."""
    found = count_row_lengths(given, rows, max_length)
    if found.left_out:
        _log.warning(
            "%d of %d %s rows left out: their prompts fill max_length=%s tokens, %d rows are left",
            found.left_out,
            given,
            name,
            max_length,
            given - found.left_out,
        )
    if found.cut:
        _log.warning(
            "%d of %d %s rows are cut at max_length=%s tokens; the ends of their completions are not learned",
            found.cut,
            given,
            name,
            max_length,
        )
    return found
