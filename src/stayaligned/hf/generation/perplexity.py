"""How likely a model finds answers that another one wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stayaligned.core.records import Completion
from stayaligned.hf.features import IGNORED, PaddingCollator, encode_prompt
from stayaligned.hf.generation.fitting import by_length, input_room

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
    """−(1/n) Σ log p(token | prompt, tokens before) over the n tokens of each answer; None of an empty one.

    The end token is not counted: answers that were cut have none. Padding stands on the right, where no token before
    it can see it. What exceeds the model's context is left out.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: with a chat template.
        completions: prompts with answers.
        batch_size: answers at a time; batches are of like length.
        progress: called with the share that is done.
    """
    import torch

    room = input_room(model.config, tokenizer)
    rows: list[dict[str, list[int]]] = []
    for completion in completions:
        prompt = encode_prompt(tokenizer, completion.prompt)
        answer: list[int] = tokenizer(completion.text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        labels = [*[IGNORED] * len(prompt), *answer]
        rows.append({"input_ids": [*prompt, *answer][:room], "labels": labels[:room]})
    collate = PaddingCollator.of(tokenizer)
    asked = [row for row, each in enumerate(rows) if any(label != IGNORED for label in each["labels"])]
    found: list[float | None] = [None] * len(rows)
    done = 0
    for batch in by_length([len(each["input_ids"]) for each in rows], asked, batch_size):
        inputs = {name: tensor.to(model.device) for name, tensor in collate([rows[row] for row in batch]).items()}
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        ).double()
        means = losses.sum(dim=1) / (labels != IGNORED).sum(dim=1)
        for row, mean in zip(batch, means.tolist(), strict=True):
            found[row] = mean
        done += len(batch)
        progress(done / len(asked))
    return found
