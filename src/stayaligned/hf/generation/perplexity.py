"""How likely a model finds the completions of another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stayaligned.core.records import Completion
from stayaligned.hf.features import IGNORED, PaddingCollator, encode_prompt, refuse_unknown_tokens
from stayaligned.hf.generation.batching import split_by_size
from stayaligned.hf.generation.generate import opened_in_prompt
from stayaligned.hf.models import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_nats(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    *,
    batch_size: int = 16,
    progress: Callable[[float], None] = lambda _share: None,
) -> list[float | None]:
    """Return −(1/n) Σ log p(token | prompt, earlier tokens) over the n tokens of each final answer; None without one.

    Thoughts before the answer are part of what it follows, and are not measured.
    The end token is not counted, because truncated completions have none. Padding is on the right, where no earlier
    token can see it. Tokens beyond the model's context are ignored.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        completions: the completions, with their prompts.
        batch_size: number of completions in a batch; batches hold similar lengths.
        progress: called with the share of the completions that is done.
    """
    import torch

    limit = context_length(model.config, tokenizer)
    rows: list[dict[str, list[int]]] = []
    for completion in completions:
        prompt = encode_prompt(tokenizer, completion.prompt)
        thoughts, answer = _before_and_answer(completion)
        if thoughts:
            opening = opened_in_prompt(tokenizer, completion.prompt, prompt)
            prompt = [*prompt, *_encode(tokenizer, thoughts.removeprefix(opening))]
        tokens = _encode(tokenizer, answer)
        labels = [*[IGNORED] * len(prompt), *tokens]
        rows.append({"input_ids": [*prompt, *tokens][:limit], "labels": labels[:limit]})
    refuse_unknown_tokens(tokenizer, model, [row["input_ids"] for row in rows])
    collate = PaddingCollator.of(tokenizer, model)
    scored = [index for index, row in enumerate(rows) if any(label != IGNORED for label in row["labels"])]
    nats: list[float | None] = [None] * len(rows)
    done = 0
    for batch in split_by_size([len(row["input_ids"]) for row in rows], scored, batch_size):
        inputs = {name: tensor.to(model.device) for name, tensor in collate([rows[index] for index in batch]).items()}
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        ).double()
        means = losses.sum(dim=1) / (labels != IGNORED).sum(dim=1)
        for index, mean in zip(batch, means.tolist(), strict=True):
            nats[index] = mean
        done += len(batch)
        progress(done / len(scored))
    return nats


def _before_and_answer(completion: Completion) -> tuple[str, str]:
    """Return what precedes a completion's final answer, and the answer; two empty strings if it has none."""
    answer = completion.split().answer or ""
    before, _, _ = completion.text.rpartition(answer) if answer else ("", "", "")
    return before, answer


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
