"""What a model says about rows before training: the state at the end of each row, and how likely it finds answers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.hf.features import PaddingCollator, encode_example, refuse_unknown_tokens
from stayaligned.hf.generation.batching import split_by_size
from stayaligned.hf.generation.perplexity import answer_nats

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_BATCH = 16


def last_states(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    layer: int | None,
    default: float,
    max_length: int,
) -> Tensor:
    """Return the hidden state at the last token of each conversation with its answer, (rows, hidden), in fp32.

    Args:
        model: a causal language model, also one with an adapter.
        tokenizer: its tokenizer, with a chat template.
        examples: the rows.
        layer: the layer behind which to read; 0 is the embedding.
        default: the layer for None, as a share of the depth.
        max_length: number of tokens at which a row is cut.

    Raises:
        StayalignedError: if the model has no such layer, or does not return hidden states.
    """
    import torch

    rows = [encode_example(tokenizer, example, max_length)["input_ids"] for example in examples]
    refuse_unknown_tokens(tokenizer, model, rows)
    collate = PaddingCollator.of(tokenizer, model)
    found: dict[int, Tensor] = {}
    with _scoring(model):
        for batch in split_by_size([len(row) for row in rows], range(len(rows)), _BATCH):
            padded = collate([{"input_ids": rows[index], "labels": rows[index]} for index in batch])
            inputs = {name: padded[name].to(model.device) for name in ("input_ids", "attention_mask")}
            states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states or ()
            at = round(default * (len(states) - 1)) if layer is None else layer
            if at >= len(states):
                raise StayalignedError(
                    f"layer {at}: the model has {max(len(states) - 1, 0)} layers that return their states",
                    hint="Set `layer` to a number from 0 (the embedding) to that.",
                )
            for place, index in enumerate(batch):
                found[index] = states[at][place, len(rows[index]) - 1].to("cpu", torch.float32)
    return torch.stack([found[index] for index in range(len(rows))])


def log_perplexities(model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[float | None]:
    """Return the mean nats per token of each row's answer (see `answer_nats`); None for a row without one."""
    answers = [Completion.of(row, "skills", row.completion, finished=True) for row in examples]
    with _scoring(model):
        return answer_nats(model, tokenizer, answers, batch_size=_BATCH)


@contextlib.contextmanager
def _scoring(model: Any) -> Generator[None]:
    """Switch off gradients and dropout; use the accelerator, except where a Trainer divides the model later."""
    import torch

    training = [module for module in model.modules() if module.training]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and os.environ.get("WORLD_SIZE", "1") == "1":
        model.to(accelerator)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
