"""Conversations as token ids, rendered in the same way for training and for generation."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.core.thoughts import empty_thoughts, opened_thoughts, split_thoughts, without_empty_thoughts
from stayaligned.hf.rendering import (
    RenderedAnswer,
    around_answers,
    bind_template,
    is_shown,
    render_answer,
    render_prompt,
    warn_if_space_differs,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of tokens that the loss ignores, in torch's cross-entropy and in every host library."""

_PLACEHOLDER = "answer9d5c"
"""An answer that stands for any other."""

_log = logging.getLogger(__name__)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Return the token ids of a prompt: the chat template with the generation prompt.

    Raises:
        StayalignedError: if the tokenizer has no chat template, or the template rejects the conversation or leaves out
            a part of it.
    """
    return _tokens(tokenizer, render_prompt(tokenizer, prompt))


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of one training row.

    The prompt's ids are exactly those of `encode_prompt` and have the label -100. The model learns what follows them:
    the answer, whatever the template writes before it, such as empty thoughts, and its end. If the generation prompt
    opens thoughts that the template does not close before an answer, the model learns to close them. If the template
    writes no end token, the model learns the end-of-sequence token. The row is cut after `max_length` tokens; a cut
    answer has no end to learn.

    Raises:
        StayalignedError: if there is no usable chat template, it renders the prompt differently with an answer, it
            changes the answer, or there is no token that ends an answer.
    """
    rendered = render_answer(tokenizer, example.prompt, example.completion)
    learned = _learned_text(rendered, example.completion, f"row {example.id!r}")
    warn_if_space_differs(tokenizer, split_thoughts(example.completion).answer or example.completion, learned)
    prompt_ids = _tokens(tokenizer, rendered.asked)
    whole_ids = _tokens(tokenizer, rendered.asked + learned)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        answer_ids = whole_ids[len(prompt_ids) :]
    else:
        # The prompt's last and the answer's first characters form one token. In generation the prompt's ids are
        # fixed, so the answer is tokenized separately, as the model will generate it.
        answer_ids = _tokens(tokenizer, learned)
    if _end_in(tokenizer, rendered.header, rendered.tail) is None:
        answer_ids.append(_own_end(tokenizer, rendered.tail))
    input_ids = [*prompt_ids, *answer_ids][:max_length]
    labels = [*[IGNORED] * len(prompt_ids), *answer_ids][:max_length]
    return {"input_ids": input_ids, "labels": labels}


def encode_prefix(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], prefix: str) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of the beginning of an answer, without end tokens.

    What the template writes before an answer, such as empty thoughts, has the label -100 like the prompt.

    Raises:
        StayalignedError: as `encode_prompt`.
    """
    rendered = render_answer(tokenizer, prompt, _PLACEHOLDER)
    before = _learned_text(rendered, _PLACEHOLDER, "the prompt").rpartition(_PLACEHOLDER)[0]
    prompt_ids = _tokens(tokenizer, rendered.asked)
    # Space before an answer is one token with its first word in some vocabularies.
    visible = before.rstrip()
    prompt_ids += _tokens(tokenizer, visible) if visible else []
    answer_ids = _tokens(tokenizer, before[len(visible) :] + prefix)
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


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends an answer in training, where generation must stop; None if there is none.

    It is the first special or added token that the chat template writes behind an answer, or else the tokenizer's
    end-of-sequence token.

    Raises:
        StayalignedError: as `encode_prompt`.
    """
    end = _end_in(tokenizer, *around_answers(tokenizer))
    return tokenizer.eos_token_id if end is None and isinstance(tokenizer.eos_token_id, int) else end


def endings_of_answers(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token sequences that a row which is not cut ends with: what the template writes behind an answer.

    Where the template writes more behind the token at which generation stops, a row may lack it.

    Raises:
        StayalignedError: as `encode_prompt`.
    """
    header, tail = around_answers(tokenizer)
    ids, end = _tokens(tokenizer, tail), _end_in(tokenizer, header, tail)
    if end is None:
        return [[_own_end(tokenizer, tail)]]
    return [ids[:length] for length in range(ids.index(end) + 1, len(ids) + 1)]


def padding_id(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> int:
    """Return the id with which to pad: the tokenizer's, or 0 if it has none that the model knows (it is masked)."""
    own = tokenizer.pad_token_id
    return own if isinstance(own, int) and (model is None or own < _vocabulary(model)) else 0


def with_known_padding(tokenizer: PreTrainedTokenizerBase, model: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer for a host that pads with it: itself, or a copy whose padding token the model knows.

    Recipes for LLaMA add a token `[PAD]` and do not resize the model.
    """
    size = _vocabulary(model)
    if not isinstance(tokenizer.pad_token_id, int) or tokenizer.pad_token_id < size:
        return tokenizer
    known = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token_id
    known.pad_token = tokenizer.convert_ids_to_tokens(end if isinstance(end, int) and end < size else 0)
    return known


def refuse_unknown_tokens(tokenizer: PreTrainedTokenizerBase, model: Any, rows: Iterable[Sequence[int]]) -> None:
    """Refuse rows with a token that the model's embedding lacks.

    Raises:
        StayalignedError: with the token's name.
    """
    size = _vocabulary(model)
    worst = max((max(row, default=0) for row in rows), default=0)
    if worst >= size:
        raise StayalignedError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} writes "
            f"{tokenizer.convert_ids_to_tokens(worst)!r} (token {worst}), but the model's embedding has {size} tokens",
            hint="Tokens were added to the tokenizer, but the model was not resized: use the model's own tokenizer and "
            "chat template, or call `resize_token_embeddings` and save both.",
        )


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the chat template with its arguments and its date, which results record.

    Raises:
        StayalignedError: as `stayaligned.hf.rendering.bind_template`.
    """
    return hashlib.sha256(bind_template(tokenizer).encode()).hexdigest()


@dataclass(frozen=True)
class PaddingCollator:
    """A collator of rows of `encode_example` into one batch, padded on the right to the longest row."""

    pad_token_id: int
    """Token id of the padding; its value has no effect, because the attention mask is 0 there. Labels get -100."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: Any = None) -> PaddingCollator:
        """Return the collator of a tokenizer, which need not have a padding token, or one that the model knows."""
        return cls(padding_id(tokenizer, model))

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


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _learned_text(rendered: RenderedAnswer, answer: str, where: str) -> str:
    """Return what a model learns to write after the rendered prompt, checked to contain the answer."""
    opened = opened_thoughts(rendered.asked)
    own = split_thoughts(answer)
    final = answer if own.answer is None else own.answer
    learned = _after_prompt(rendered, opened, "" if own.thoughts else empty_thoughts(rendered.asked))
    if learned is None:
        raise StayalignedError(
            f"{where}: the chat template renders the prompt differently with an answer, so the tokens "
            "to learn cannot be distinguished from the prompt",
            hint="The generation prompt closes the thoughts that the row has: set `enable_thinking: true` in "
            "chat_template.arguments, or remove the thoughts from the rows."
            if own.thoughts
            else "Use a template whose rendered conversation begins with the rendered prompt.",
        )
    if opened and own.thoughts and learned.lstrip().startswith(opened.strip()):  # opened once more by the template
        learned = learned.lstrip()[len(opened.strip()) :].lstrip("\n")
    body = learned[: len(learned) - len(rendered.tail)]
    if opened and not _closes(opened, body, final):
        closed = f"{own.thoughts.strip()}\n{closing_mark(opened)}\n\n"
        if own.thoughts:  # in the row's marks, which are not those of the prompt
            learned, body = (text.replace(answer.strip(), final.strip(), 1) for text in (learned, body))
        learned, body = closed + learned.lstrip(), closed + body.lstrip()
    for part in (own.thoughts, final):
        if not is_shown(part, body):
            raise StayalignedError(
                f"{where}: the chat template changes or leaves out a part of the answer, "
                f"{part.strip()[:60]!r}, which would not be learned",
                hint="Remove thoughts from the rows, or use a template that keeps them."
                if own.thoughts
                else "Use a template that writes answers as they are: some cut long ones, or write other characters.",
            )
    return learned


def _after_prompt(rendered: RenderedAnswer, opened: str, empty: str) -> str | None:
    """Return what follows the rendered prompt with an answer; None if the prompt is rendered differently there.

    Args:
        rendered: the prompt and the conversation.
        opened: the opening mark of thoughts at which the prompt ends.
        empty: the empty thoughts at which the prompt ends, unless the answer has thoughts.
    """
    asked, told = rendered.asked, rendered.told
    if told.startswith(asked):
        return told[len(asked) :]
    if empty and told.startswith(before := asked[: len(asked) - len(empty)]):  # Gemma 4 writes them only to generate
        return without_empty_thoughts(told[len(before) :])
    if not opened:
        return None
    # DeepSeek's template opens thoughts only to generate; Nemotron's closes them without the line break.
    before = asked[: len(asked) - len(opened)]
    for prefix in (before + opened.rstrip(), before):
        if told.startswith(prefix):
            return told[len(prefix) :]
    return None


def _closes(opened: str, body: str, final: str) -> bool:
    """Return whether thoughts that a prompt opens are closed before the answer."""
    before = body[: len(body.rstrip()) - len(final.strip())]
    return closing_mark(opened) in before


def closing_mark(opened: str) -> str:
    """Return the mark that closes thoughts: `</think>` for `<think>`."""
    mark = opened.strip()
    if mark.startswith("Here are"):
        return "[BEGIN FINAL RESPONSE]"
    if mark.startswith("<|open|>"):
        return mark.replace("open", "close", 1)
    if mark.startswith("<|channel>"):
        return "<channel|>"
    if mark.startswith("[unused"):
        return "[unused17]"
    for begins, ends in (("START_", "END_"), ("begin_of_", "end_of_"), ("_prefix", "_suffix")):
        if begins in mark:
            return mark.replace(begins, ends)
    start = 2 if mark.startswith("<|") else 1
    return (
        f"{mark[:start]}/{mark[start:].split()[0].rstrip('>')}>"
        if start == 1 and mark[0] == "<"
        else (f"{mark[:start]}/{mark[start:]}")
    )


def _end_in(tokenizer: PreTrainedTokenizerBase, header: str, tail: str) -> int | None:
    """Return the first token behind an answer at which generation can stop: an added one, or the end of the sequence.

    A token that the template also writes between the prompt and the answer would stop before the answer.
    """
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    before = set(_tokens(tokenizer, header))
    ends = (t for t in _tokens(tokenizer, tail) if t in added or t == tokenizer.eos_token_id)
    return next((t for t in ends if t not in before), None)


def _own_end(tokenizer: PreTrainedTokenizerBase, tail: str) -> int:
    """Return the end-of-sequence token, for a template that writes no end."""
    name = tokenizer.name_or_path or "the tokenizer"
    if tail.strip():
        raise StayalignedError(
            f"the chat template of {name} ends an answer with {tail.strip()!r}, which is no token of its own, so "
            "generation could not stop there",
            hint="Add it to the tokenizer as a special token and resize the embedding, or write {{ eos_token }} there.",
        )
    if not isinstance(tokenizer.eos_token_id, int):
        raise StayalignedError(
            f"the chat template of {name} writes no token behind an answer, and the tokenizer has no end-of-sequence "
            "token, so the end of an answer can't be learned",
            hint="Set `eos_token` in tokenizer_config.json, or write the token that ends a turn behind the answer.",
        )
    return tokenizer.eos_token_id
