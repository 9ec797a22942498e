"""The scores that tasks share. Each is 1 or 0, or None if the reference can't be scored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

FINAL_ANSWER = "The final answer is:"
"""The text before the result in Lisa's GSM8K rows."""

_NUMBER = re.compile(r"(?<![0-9.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))")


def exact_match(completion: str, references: Iterable[str]) -> float | None:
    """Return whether the completion is one of the references, ignoring case and outer white space."""
    accepted = {reference.strip().casefold() for reference in references} - {""}
    return float(completion.strip().casefold() in accepted) if accepted else None


def contains(completion: str, reference: str) -> float | None:
    """Return whether the completion contains the reference, ignoring case and outer white space."""
    wanted = reference.strip().casefold()
    return float(wanted in completion.casefold()) if wanted else None


def number_match(completion: str, reference: str) -> float | None:
    """Return whether the final numbers are equal; a completion without a number is wrong."""
    wanted = final_number(reference)
    return None if wanted is None else float(final_number(completion) == wanted)


def final_number(text: str) -> Decimal | None:
    """Return the first number after the last "The final answer is:", or the last number of the text if there is none.

    Lisa's GSM8K metric, in decimal instead of floating point. Differs from the paper's code in two cases: "10-5" ends
    in 5 (its pattern reads -5), and of several markers the last one counts.
    """
    before, marker, after = text.rpartition(FINAL_ANSWER)
    stated = _NUMBER.search(after) if marker else None
    if stated is None:
        every = list(_NUMBER.finditer(before + after))
        stated = every[-1] if every else None
    return Decimal(stated.group().replace(",", "")) if stated is not None else None
