"""Inputs of judge models: a request and a completion in a template, the completion cut to what the model can read.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Fitted:
    """A judge's input that fits into its context."""

    inputs: dict[str, Any]
    """What the tokenizer returns: `input_ids`, and whatever else the model takes."""
    was_cut: bool
    """Whether the end of the completion was cut off."""


def fill_template(template: str, request: str, completion: str) -> str:
    """Replace `{request}` and `{answer}` in a template; other braces, also those of the two texts, stay."""
    before, _, after = template.partition("{answer}")
    return before.replace("{request}", request) + completion + after.replace("{request}", request)


def fit_input(
    tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], dict[str, Any]], completion: str, max_tokens: int
) -> Fitted | None:
    """Return the input with as much of the beginning of the completion as fits; None if nothing of it fits.

    Args:
        tokenizer: its tokens are the units in which the completion is cut.
        encode: returns the whole input for the text of a completion, with `input_ids`.
        completion: not empty.
        max_tokens: largest number of tokens of the whole input.
    """
    encoded = encode(completion)
    excess = len(encoded["input_ids"]) - max_tokens
    if excess <= 0:
        return Fitted(encoded, was_cut=False)
    ends = token_ends(tokenizer, completion)
    remaining = len(ends) - excess
    while remaining > 0:
        encoded = encode(completion[: ends[remaining - 1]])
        excess = len(encoded["input_ids"]) - max_tokens
        if excess <= 0:
            return Fitted(encoded, was_cut=True)
        remaining -= excess
    return None


def token_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the position in a text, in characters, at which each token ends.

    Raises:
        StayalignedError: if the tokenizer does not return positions.
    """
    if not tokenizer.is_fast:
        raise StayalignedError(
            f"the tokenizer of {tokenizer.name_or_path} does not return the positions of its tokens, so completions "
            "can't be cut to fit",
            hint="Put its tokenizer.json beside tokenizer_config.json.",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in encoded["offset_mapping"]]


def escape_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text in which nothing is read as a control token, so that a completion can't end its turn.

    A space is put after the first character of each control token; other texts do not change.
    """
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content.startswith("<|")]
    for token in {*tokenizer.all_special_tokens, *added}:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
