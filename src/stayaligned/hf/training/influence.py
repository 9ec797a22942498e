"""The influence of single training rows on a model: the norm of each row's gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.core.progress import WorkProgress
from stayaligned.core.records import Example, Influence
from stayaligned.core.settings import ChatTemplate
from stayaligned.hf.features import IGNORED, encode_examples, refuse_unknown_tokens
from stayaligned.hf.models import load_finetuned, load_tokenizer


def row_influences(
    model: str | Path,
    chat_template: ChatTemplate,
    examples: Sequence[Example],
    *,
    max_length: int,
    progress: WorkProgress = lambda _share, _detail="": None,
) -> list[Influence]:
    """Return ‖∇‖² of each row's mean loss by all weights of a model, and the number of tokens that it learns.

    Rows are computed one at a time, in the type of the stored weights and without dropout.

    Args:
        model: a checkpoint directory or a hub id.
        chat_template: how conversations are rendered.
        examples: the rows.
        max_length: number of tokens at which a row is cut.
        progress: called with the share of the rows that is done, and in words.

    Raises:
        StayalignedError: if the model or its template is unusable, a row's gradient is not finite, or
            memory is too small.
    """
    import torch

    tokenizer = load_tokenizer(model, chat_template)
    rows = encode_examples(tokenizer, examples, max_length)
    network = load_finetuned(model, None)
    refuse_unknown_tokens(tokenizer, network, (row["input_ids"] for row in rows))
    weights = [weight.requires_grad_() for weight in network.parameters() if weight.is_floating_point()]
    found: list[Influence] = []
    for number, row in enumerate(rows, start=1):
        ids, labels = (torch.tensor([row[name]], device=network.device) for name in ("input_ids", "labels"))
        try:
            loss = network(input_ids=ids, labels=labels, use_cache=False).loss
            gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        except torch.OutOfMemoryError as error:
            raise StayalignedError(
                f"{model}: out of memory: {' '.join(str(error).split())[:200]}",
                hint="A gradient is as large as all weights. Lower `max_length`, or use a larger device.",
            ) from None
        square = sum(float(each.double().square().sum()) for each in gradients)
        if not math.isfinite(square):
            raise StayalignedError(
                f"{model}: the gradient of row {examples[number - 1].id!r} is not finite",
                hint="Check the weights, or remove the row.",
            )
        found.append(Influence(squared_norm=square, answer_tokens=sum(label != IGNORED for label in row["labels"])))
        progress(number / len(rows), f"row {number} of {len(rows)}")
    return found
