"""Check the rows of both phases, as the trainer's collator makes batches of them."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.features import IGNORED
from stayaligned.hf.hosts import collator_of_known_columns

if TYPE_CHECKING:
    from transformers import Trainer

_log = logging.getLogger(__name__)
SAMPLE = 64
"""Number of rows that are inspected for what their tokens show and their labels mask."""


def require_usable(trainer: Trainer, prepared: Any) -> None:
    """Check that the rows suffice for a batch, have labels, and pass the trainer's collator as the user's do."""
    user: Any = trainer.train_dataset
    batch = trainer.args.per_device_train_batch_size * max(trainer.args.world_size, 1)
    if isinstance(prepared, Sized) and len(prepared) < batch:
        packed = " after packing" if getattr(trainer.args, "packing", False) else ""
        raise StayalignedError(
            f"alignment_dataset has {len(prepared)} rows{packed}, fewer than a batch of {batch}, so a batch would "
            "repeat rows",
            hint="Pass more alignment rows, or lower per_device_train_batch_size.",
        )
    sample, user_sample = first_row(prepared), first_row(user)
    if isinstance(sample, Mapping) and isinstance(user_sample, Mapping):
        needed = {"input_ids", "labels"} & user_sample.keys()
        if missing := sorted(needed - sample.keys()):
            raise StayalignedError(
                f"the alignment rows lack {' and '.join(missing)}, which the user's rows have; "
                f"they have {', '.join(sorted(map(str, sample)))}",
                hint="Prepare both datasets in the same way: features for transformers.Trainer, text for SFTTrainer.",
            )
    for name, rows in (("train_dataset", user), ("alignment_dataset", prepared)):
        if isinstance(rows, Sized) and not any(_has_label(rows[i]) for i in range(len(rows))):  # pyright: ignore
            raise StayalignedError(
                f"every label of {name} is masked ({IGNORED}), so there is nothing to learn",
                hint="Set `labels` to the completions' tokens, or raise the length at which rows are cut.",
            )
    if isinstance(user, Sized):
        batches: list[Any] = []
        with contextlib.suppress(Exception):  # what the collator can't read, the host reports
            batches = _collate(trainer, [user[i] for i in range(min(SAMPLE, len(user)))])  # pyright: ignore
        _require_known_tokens(trainer, "train_dataset", batches)
    rows, learned, tokens = _count_collated(trainer, prepared, user_sample)
    if tokens and not learned:
        raise StayalignedError(
            "the data collator masks every label of the alignment rows, so there is nothing to learn",
            hint="Prepare the alignment rows like the user's: with the same chat template and response marks.",
        )
    if tokens and learned >= tokens - rows:  # a collator may mask one padding token that ends a row
        _log.warning(
            "every token of the alignment rows is learned, those of the prompts too: their `labels` mask nothing. "
            "Pass `prompt` and `completion` (SFTTrainer), or labels of %d for the prompts' tokens",
            IGNORED,
        )


def _count_collated(trainer: Any, rows: Any, user_sample: Any) -> tuple[int, int, int]:
    """Collate a sample of the alignment rows as the trainer will; return its numbers of rows, labels and tokens.

    Raises:
        StayalignedError: if the collator can't read the rows, such as one that needs a column which they lack.
    """
    sampled = list(islice(iterate_rows(rows), min(SAMPLE, len(rows) if isinstance(rows, Sized) else 1)))
    _require_equal_lengths(trainer, sampled)
    try:
        batches = _collate(trainer, sampled)
    except Exception as error:
        only = sorted(set(user_sample) - set(sampled[0])) if isinstance(user_sample, Mapping) else []
        lacking = f"; the user's rows also have {', '.join(map(str, only))}" if only else ""
        raise StayalignedError(
            f"the data collator can't read the alignment rows ({name_columns(sampled[0])}{lacking}): "
            f"{type(error).__name__}: {error}",
            hint="Give the alignment rows the columns that the collator reads.",
        ) from error
    _require_known_tokens(trainer, "alignment_dataset", batches)
    learned = tokens = 0
    for made in batches:
        labels = made.get("labels") if isinstance(made, Mapping) else None
        if isinstance(labels, Tensor) and isinstance(mask := made.get("attention_mask"), Tensor):
            learned, tokens = learned + int((labels != IGNORED).sum()), tokens + int(mask.sum())
    return len(sampled), learned, tokens


def _collate(trainer: Any, sampled: list[Any]) -> list[Any]:
    """Return the batches that the trainer's collator makes of rows; no random state changes."""
    collate, batch = collator_of_known_columns(trainer), trainer.args.per_device_train_batch_size
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            return [
                collate([dict(row) if isinstance(row, Mapping) else row for row in sampled[start : start + batch]])
                for start in range(0, len(sampled), batch)
            ]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _require_equal_lengths(trainer: Any, sampled: list[Any]) -> None:
    """Check that a row has a label for each token; a collator pads both without comparing them."""
    if getattr(trainer.model.config, "is_encoder_decoder", False):
        return
    for row in sampled:
        sizes = [
            len(row[key]) for key in ("input_ids", "labels") if isinstance(row, Mapping) and _is_list(row.get(key))
        ]
        if len({*sizes}) > 1:
            raise StayalignedError(
                f"a row of alignment_dataset has {sizes[0]} tokens in `input_ids` and {sizes[1]} in `labels`",
                hint=f"Give each token a label, {IGNORED} if it is not to be learned.",
            )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) or (isinstance(value, Tensor) and value.ndim == 1)


def _require_known_tokens(trainer: Any, name: str, batches: list[Any]) -> None:
    """Check that the model's embedding has a row for every token of some batches, and for the padding token."""
    embedding = getattr(trainer.model, "get_input_embeddings", lambda: None)()
    known = getattr(embedding, "num_embeddings", 0)
    tokens = [made["input_ids"] for made in batches if isinstance(made, Mapping) and "input_ids" in made]
    collator = trainer.data_collator
    padding = getattr(getattr(collator, "tokenizer", collator), "pad_token_id", None) or 0  # absent from equal rows
    largest = max((int(ids.max()) for ids in tokens if isinstance(ids, Tensor) and ids.numel()), default=0)
    largest = max(largest, padding)
    if known and largest >= known:
        raise StayalignedError(
            f"{name} has the token {largest}, but the model's embedding has {known} rows, for tokens 0 to {known - 1}",
            hint="Use the model's own tokenizer; or after adding tokens (a padding token), resize the embedding: "
            "model.resize_token_embeddings(len(tokenizer)).",
        )


def iterate_rows(rows: Any) -> Iterator[Any]:
    """Return an iterator over rows with an index, or over a stream."""
    return (rows[i] for i in range(len(rows))) if isinstance(rows, Sized) else iter(rows)  # pyright: ignore


def first_row(rows: Any) -> Any:
    """Return the first row; None if the rows are missing or have no index.

    Raises:
        StayalignedError: if a stream is empty.
    """
    if rows is None or (isinstance(rows, Sized) and len(rows) == 0):
        return None
    row = next(iterate_rows(rows), None)
    if row is None:
        raise StayalignedError("a stream of rows is empty", hint="Check its source and filters.")
    return row


def name_columns(row: Any) -> str:
    """Name a row's columns, or its type, for a message."""
    return f"columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"of type {type(row).__name__}"


def _has_label(row: Any) -> bool:
    """Return whether a row has an unmasked label, or no `labels`, which the collator then creates."""
    if not isinstance(row, Mapping) or "labels" not in row:
        return True
    labels = row["labels"]
    return any(label != IGNORED for label in (labels.tolist() if isinstance(labels, Tensor) else labels))
