"""A preference trainer, whose loss Lisa uses in its alignment phase."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.quiet import bars_off
from stayaligned.hf.training import processes
from stayaligned.hf.training.finetuning import host_defaults

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
        StayalignedError: if a row has no rejected completion, TRL is not installed, or the weights of the full model
            are trained in several processes.
    """
    from peft import PeftModel

    without = [example.id for example in examples if not example.rejected.strip()]
    if without:
        raise StayalignedError(
            f"alignment_loss='dpo' needs a rejected completion in every alignment row; "
            f"{len(without)} of {len(examples)} rows have none, the first is {without[0]}",
            hint='Give alignment_data rows of the form {"prompt": "…", "chosen": "…", "rejected": "…"}.',
        )
    if processes.is_distributed() and not isinstance(model, PeftModel):
        raise StayalignedError(
            "alignment_loss='dpo' on full weights precomputes its reference, which is not supported in several "
            "processes",
            hint="Train a LoRA, or start without torchrun or accelerate launch.",
        )
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError:
        raise StayalignedError("alignment_loss='dpo' needs TRL", hint="pip install 'stayaligned[trl]'") from None
    from datasets import Dataset

    def as_turn(content: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": content}]

    rows = [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in example.prompt],
            "chosen": as_turn(example.completion),
            "rejected": as_turn(example.rejected),
        }
        for example in examples
    ]
    config = DPOConfig(
        **host_defaults() | {key: arguments[key] for key in _SHARED if key in arguments},
        beta=beta,
        max_length=max_length,
        precompute_ref_log_probs=not isinstance(model, PeftModel),
    )
    with bars_off(bool(config.disable_tqdm)):
        return DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
