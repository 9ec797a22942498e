"""Conversations as token ids, rendered in the same way for training and for generation."""

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
"""Label of tokens that the loss ignores, in torch's cross-entropy and in every host library."""

_log = logging.getLogger(__name__)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Return the token ids of a prompt: the chat template with the generation prompt.

    Raises:
        StayalignedError: if the tokenizer has no chat template, or the template rejects the conversation.
    """
    return _render(tokenizer, prompt, add_generation_prompt=True, tokenize=True)


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of one training row.

    The prompt's ids are exactly those of `encode_prompt` and have the label -100. The model learns the answer and what
    the template renders after it, or, if that is nothing, the end-of-sequence token, so that it learns to stop. The
    row is cut after `max_length` tokens; a cut answer has no end to learn.

    Raises:
        StayalignedError: if there is no chat template, or it renders the prompt differently with an answer.
    """
    answered = [*example.prompt, Message(role="assistant", content=example.completion)]
    prompt_text: str = _render(tokenizer, example.prompt, add_generation_prompt=True, tokenize=False)
    full_text: str = _render(tokenizer, answered, add_generation_prompt=False, tokenize=False)
    if not full_text.startswith(prompt_text):
        raise StayalignedError(
            f"row {example.id!r}: the chat template renders the prompt differently with an answer, so the tokens "
            "to learn cannot be distinguished from the prompt",
            hint="Use a template whose rendered conversation begins with the rendered prompt.",
        )
    answer_text = full_text[len(prompt_text) :]
    prompt_ids = encode_prompt(tokenizer, example.prompt)
    full_ids: list[int] = _render(tokenizer, answered, add_generation_prompt=False, tokenize=True)
    if full_ids[: len(prompt_ids)] == prompt_ids:
        answer_ids = full_ids[len(prompt_ids) :]
    else:
        # The prompt's last and the answer's first characters form one token. In generation the prompt's ids are
        # fixed, so the answer is tokenized separately, as the model will generate it.
        answer_ids = list(tokenizer(answer_text, add_special_tokens=False)["input_ids"])
    completion = example.completion.strip()
    bare = answer_text.strip().endswith(completion) if completion else not answer_text.strip()
    if bare and isinstance(tokenizer.eos_token_id, int):
        answer_ids.append(tokenizer.eos_token_id)
    input_ids = [*prompt_ids, *answer_ids][:max_length]
    labels = [*[IGNORED] * len(prompt_ids), *answer_ids][:max_length]
    return {"input_ids": input_ids, "labels": labels}


def encode_prefix(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], prefix: str) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of the beginning of an answer, without end tokens.

    Raises:
        StayalignedError: as `encode_prompt`.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    answer_ids = list(tokenizer(prefix, add_special_tokens=False)["input_ids"])
    return {"input_ids": [*prompt_ids, *answer_ids], "labels": [*[IGNORED] * len(prompt_ids), *answer_ids]}


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> list[dict[str, list[int]]]:
    """Return `encode_example` of every row with tokens to learn; log a warning with the number of the others.

    A row whose prompt alone fills `max_length` has no labels. It would add nothing to the loss, and a batch of such
    rows would divide by zero.

    Raises:
        StayalignedError: if no row has tokens to learn.
    """
    rows = [encode_example(tokenizer, example, max_length) for example in examples]
    learnable = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    unlearnable = [e.id for e, row in zip(examples, rows, strict=True) if all(x == IGNORED for x in row["labels"])]
    if not learnable:
        raise StayalignedError(
            f"none of the {len(examples)} rows leaves an answer to learn within max_length={max_length} tokens",
            hint="Increase `max_length`, or shorten the prompts.",
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
    """Return the special token that ends an answer in training, where generation must stop; None if there is none.

    Raises:
        StayalignedError: as `encode_example`.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if isinstance(tokenizer.eos_token_id, int):
        special.add(tokenizer.eos_token_id)
    labels = encode_example(tokenizer, example, sys.maxsize)["labels"]
    return next((label for label in labels if label in special), None)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the chat template, which is part of a stage's key.

    Raises:
        StayalignedError: if the tokenizer has no chat template.
    """
    _require_template(tokenizer)
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


@dataclass(frozen=True)
class PaddingCollator:
    """A collator of rows of `encode_example` into one batch, padded on the right to the longest row."""

    pad_token_id: int
    """Token id of the padding; its value has no effect, because the attention mask is 0 there. Labels get -100."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
        """Return the collator of a tokenizer, which need not have a padding token."""
        return cls(tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0)

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` as int64 tensors (batch, longest row)."""
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
            f"the chat template rejects a conversation of the turns {roles}: {error}",
            hint="Many templates have no system turn, or need user and assistant alternating: change the prompts.",
        ) from None
