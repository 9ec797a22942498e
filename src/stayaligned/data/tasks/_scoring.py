"""How right an answer is: the metrics that tasks share. Each is 1 or 0, or None where the reference can't be read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

FINAL_ANSWER = "The final answer is:"
"""What precedes the result in Lisa's GSM8K rows."""

_NUMBER = re.compile(r"(?<![0-9.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))")


def exact_match(answer: str, references: Iterable[str]) -> float | None:
    """Whether the answer is one of the references, but for case and surrounding white space."""
    accepted = {reference.strip().casefold() for reference in references} - {""}
    return float(answer.strip().casefold() in accepted) if accepted else None


def contains(answer: str, reference: str) -> float | None:
    """Whether the reference stands somewhere in the answer, but for case and surrounding white space."""
    wanted = reference.strip().casefold()
    return float(wanted in answer.casefold()) if wanted else None


def number_match(answer: str, reference: str) -> float | None:
    """Whether the answer's final number equals the reference's; an answer without a number is wrong."""
    wanted = final_number(reference)
    return None if wanted is None else float(final_number(answer) == wanted)


def final_number(text: str) -> Decimal | None:
    """The first number after the last "The final answer is:", or else the last number of the text.

    Lisa's GSM8K metric, in decimal instead of floating point. What differs from the paper's code: where no number
    follows the marker it fell back to the last number of the text, and so does this; but "10-5" ends in 5 (its
    pattern read -5), and a model that says the marker twice is taken at its last word.
    """
    before, marker, after = text.rpartition(FINAL_ANSWER)
    stated = _NUMBER.search(after) if marker else None
    if stated is None:
        every = list(_NUMBER.finditer(before + after))
        stated = every[-1] if every else None
    return Decimal(stated.group().replace(",", "")) if stated is not None else None
