"""A preference trainer, whose loss Lisa uses in its alignment phase."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.processes import is_distributed
from stayaligned.hf.features import (
    IGNORED,
    encode_example,
    endings_of_answers,
    refuse_unknown_tokens,
    with_known_padding,
)
from stayaligned.hf.hosts import require_trl, without_preparation
from stayaligned.hf.quiet import bars_off
from stayaligned.hf.training.finetuning import host_defaults
from stayaligned.hf.training.row_lengths import RowLengths, is_cut, log_row_lengths

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase, Trainer

    from stayaligned.core.records import Example

_SHARED = ("output_dir", "per_device_train_batch_size", "seed", "use_cpu", "bf16", "fp16", "disable_tqdm")
"""Settings of the fine-tuning that also apply to its alignment phase."""


def build_preference_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    arguments: Mapping[str, Any],
    *,
    max_length: int,
    beta: float,
) -> Trainer:
    """Build TRL's DPOTrainer on alignment rows: the safe completion is preferred to the rejected one.

    The reference is the model before training: with its adapter switched off if the adapter is fresh, and otherwise by
    precomputed log-probabilities.

    Args:
        model: what is trained.
        tokenizer: the model's tokenizer.
        examples: the alignment rows, each with a rejected completion.
        arguments: settings of the fine-tuning, of which the DPOTrainer takes those that apply to both phases.
        max_length: number of tokens at which a row is cut.
        beta: β of DPO (Rafailov et al. 2023, equation 7).

    Raises:
        StayalignedError: if a row has no rejected completion, TRL is missing or of another version, or the weights of
            the full model are trained in several processes; or as `stayaligned.hf.features.encode_example`.
    """
    from peft import PeftModel

    without = [example.id for example in examples if not example.rejected.strip()]
    if without:
        raise StayalignedError(
            f"alignment_loss='dpo' needs a rejected completion in every alignment row; "
            f"{len(without)} of {len(examples)} rows have none, the first is {without[0]}",
            hint='Give alignment_data rows of the form {"prompt": "…", "chosen": "…", "rejected": "…"}.',
        )
    if is_distributed() and not isinstance(model, PeftModel):
        raise StayalignedError(
            "alignment_loss='dpo' on full weights precomputes its reference, which is not supported in several "
            "processes",
            hint="Train a LoRA, or start without torchrun or accelerate launch.",
        )
    require_trl("alignment_loss='dpo'", otherwise="set `alignment_loss: sft`")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = with_known_padding(tokenizer, model)
    rows = [row for row in _encode(tokenizer, examples) if len(row["prompt_ids"]) < max_length]
    if not rows:
        raise StayalignedError(
            f"none of the {len(examples)} alignment rows leaves a completion within max_length={max_length} tokens",
            hint="Increase `max_length`, or shorten the prompts.",
        )
    endings = endings_of_answers(tokenizer)
    cut = sum(
        any(is_cut(row["prompt_ids"] + row[name], max_length, endings) for name in ("chosen_ids", "rejected_ids"))
        for row in rows
    )
    log_row_lengths("alignment", RowLengths(len(examples), len(examples) - len(rows), cut), max_length)
    refuse_unknown_tokens(tokenizer, model, [ids for row in rows for ids in row.values()])
    config = DPOConfig(
        **host_defaults() | {key: arguments[key] for key in _SHARED if key in arguments},
        beta=beta,
        max_length=max_length,
        precompute_ref_log_probs=not isinstance(model, PeftModel),
    )
    with bars_off(bool(config.disable_tqdm)):
        return without_preparation(DPOTrainer)(
            model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )


def _encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Return the token ids of each row's prompt and of what follows it with either completion."""
    rows: list[dict[str, list[int]]] = []
    for example in examples:
        row: dict[str, list[int]] = {}
        for name, text in (("chosen_ids", example.completion), ("rejected_ids", example.rejected)):
            found = encode_example(tokenizer, example.model_copy(update={"completion": text}), sys.maxsize)
            start = sum(label == IGNORED for label in found["labels"])
            row |= {"prompt_ids": found["input_ids"][:start], name: found["input_ids"][start:]}
        rows.append(row)
    return rows
