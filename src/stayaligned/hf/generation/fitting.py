"""Answers cut so that a judge's model can read them, and said so. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Fitted:
    """A judge's input as token ids, and whatever else its tokenizer gives."""

    inputs: dict[str, Any]
    was_cut: bool
    """Whether the end of the answer did not fit."""


def fill(template: str, request: str, answer: str) -> str:
    """A template with its `{request}` and `{answer}`; whatever else is in braces stays, in it and in both texts."""
    before, _, after = template.partition("{answer}")
    return before.replace("{request}", request) + answer + after.replace("{request}", request)


def fit(
    tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], dict[str, Any]], answer: str, max_tokens: int
) -> Fitted | None:
    """The input with as much of the answer's beginning as fits; None if nothing of it does.

    Args:
        tokenizer: by whose tokens the answer is cut.
        encode: from the answer's text to the whole input, `input_ids` among it.
        answer: not empty.
        max_tokens: of the whole input.
    """
    found = encode(answer)
    excess = len(found["input_ids"]) - max_tokens
    if excess <= 0:
        return Fitted(found, was_cut=False)
    ends = token_ends(tokenizer, answer)
    kept = len(ends) - excess
    while kept > 0:
        found = encode(answer[: ends[kept - 1]])
        excess = len(found["input_ids"]) - max_tokens
        if excess <= 0:
            return Fitted(found, was_cut=True)
        kept -= excess
    return None


def token_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Where each token of a text ends, in characters.

    Raises:
        StayalignedError: if the tokenizer can't tell.
    """
    if not tokenizer.is_fast:
        raise StayalignedError(
            f"the tokenizer of {tokenizer.name_or_path} can't tell where its tokens end, so no answer can be cut by it",
            hint="Put its tokenizer.json beside tokenizer_config.json.",
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in found["offset_mapping"]]


def as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text in which nothing is read as a control token, so that an answer can't end its turn or begin another.

    A space parts each such token's first character from the rest; other texts stay as they are.
    """
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content.startswith("<|")]
    for token in {*tokenizer.all_special_tokens, *added}:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def input_room(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a model can read at once."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    return min(positions, tokenizer.model_max_length)


def by_length(lengths: Sequence[int], rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Rows in batches of like length, the longest first, so that what is too much for memory fails at once."""
    ordered = sorted(rows, key=lambda row: -lengths[row])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
