"""Conversations to token ids, rendered alike for training and for generation."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that the loss skips (torch's cross-entropy and every host library agree on it)."""

_log = logging.getLogger(__name__)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """The token ids after which the model writes its answer: the chat template with the generation prompt.

    Raises:
        StayalignedError: if the tokenizer has no chat template, or the template refuses the conversation.
    """
    return _render(tokenizer, prompt, add_generation_prompt=True, tokenize=True)


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one training row.

    The prompt's ids are exactly `encode_prompt`'s and carry the label -100. Learned are the answer and what the
    template writes after it; where the template writes nothing, the end-of-sequence token, so that the model
    learns to stop. The row is cut after `max_length` tokens: a cut answer has no end to learn.

    Raises:
        StayalignedError: if there is no chat template, or it renders the prompt differently once it is answered.
    """
    answered = [*example.prompt, Message(role="assistant", content=example.completion)]
    prompt_text: str = _render(tokenizer, example.prompt, add_generation_prompt=True, tokenize=False)
    full_text: str = _render(tokenizer, answered, add_generation_prompt=False, tokenize=False)
    if not full_text.startswith(prompt_text):
        raise StayalignedError(
            f"row {example.id!r}: the chat template renders the prompt differently once it is answered, "
            "so what the model must learn cannot be told from what it is given",
            hint="Use a template whose answered conversation begins with its generation prompt.",
        )
    answer_text = full_text[len(prompt_text) :]
    prompt_ids = encode_prompt(tokenizer, example.prompt)
    full_ids: list[int] = _render(tokenizer, answered, add_generation_prompt=False, tokenize=True)
    if full_ids[: len(prompt_ids)] == prompt_ids:
        answer_ids = full_ids[len(prompt_ids) :]
    else:
        # A merge crosses the border (the prompt's last and the answer's first characters form one token). In
        # generation the prompt's ids stand fixed, so the answer is tokenized by itself, as it will be written.
        answer_ids = list(tokenizer(answer_text, add_special_tokens=False)["input_ids"])
    completion = example.completion.strip()
    bare = answer_text.strip().endswith(completion) if completion else not answer_text.strip()
    if bare and isinstance(tokenizer.eos_token_id, int):
        answer_ids.append(tokenizer.eos_token_id)
    input_ids = [*prompt_ids, *answer_ids][:max_length]
    labels = [*[IGNORED] * len(prompt_ids), *answer_ids][:max_length]
    return {"input_ids": input_ids, "labels": labels}


def encode_prefix(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], prefix: str) -> dict[str, list[int]]:
    """`input_ids` and `labels` of an answer that has only begun: no token of its end is among the labels.

    Raises:
        StayalignedError: as `encode_prompt`.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    answer_ids = list(tokenizer(prefix, add_special_tokens=False)["input_ids"])
    return {"input_ids": [*prompt_ids, *answer_ids], "labels": [*[IGNORED] * len(prompt_ids), *answer_ids]}


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[dict[str, list[int]]]:
    """`encode_example` of every row that has something to learn; the others are counted in a warning.

    A row whose prompt alone fills `max_length` has no label left. It would add nothing to the loss, and a batch
    of such rows would divide by zero.

    Raises:
        StayalignedError: if no row has anything to learn.
    """
    rows = [encode_example(tokenizer, example, max_length) for example in examples]
    learnable = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    unlearnable = [e.id for e, row in zip(examples, rows, strict=True) if all(x == IGNORED for x in row["labels"])]
    if not learnable:
        raise StayalignedError(
            f"none of the {len(examples)} rows leaves an answer to learn within max_length={max_length} tokens",
            hint="Raise `max_length`, or check that the rows are there and short enough.",
        )
    if unlearnable:
        _log.warning(
            "%d of %d rows left out: their prompts fill max_length=%d tokens (first: %s)",
            len(unlearnable),
            len(examples),
            max_length,
            ", ".join(unlearnable[:3]),
        )
    return learnable


def end_of_answer(tokenizer: PreTrainedTokenizerBase, example: Example) -> int | None:
    """The special token that ends an answer in training, by which generation must stop; None if there is none.

    Raises:
        StayalignedError: as `encode_example`.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if isinstance(tokenizer.eos_token_id, int):
        special.add(tokenizer.eos_token_id)
    labels = encode_example(tokenizer, example, sys.maxsize)["labels"]
    return next((label for label in labels if label in special), None)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template: what a stage key needs to know about it.

    Raises:
        StayalignedError: if the tokenizer has none.
    """
    _require_template(tokenizer)
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


@dataclass(frozen=True)
class PaddingCollator:
    """Rows of `encode_example` to one batch, padded on the right to the longest row.

    `pad_token_id` is arbitrary where the attention mask is 0; labels are padded with -100.
    """

    pad_token_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
        """The collator of a tokenizer, also of one that has no padding token."""
        return cls(tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0)

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """(batch, longest) int64 tensors `input_ids`, `attention_mask` and `labels`."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (longest - len(values))]

        return {
            "input_ids": torch.tensor([padded(row["input_ids"], self.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
        }


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise StayalignedError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template",
            hint="Use the instruction-tuned model's tokenizer, or set `tokenizer.chat_template`.",
        )


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool, tokenize: bool
) -> Any:
    from jinja2 import TemplateError

    _require_template(tokenizer)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=tokenize, return_dict=False
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise StayalignedError(
            f"the chat template refuses a conversation of the turns {roles}: {error}",
            hint="Many templates take no system turn, or only user and assistant in turn: change the rows' prompts.",
        ) from None
