"""A trainer of preferences, of which Lisa takes the loss of its alignment state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.quiet import bars_off
from stayaligned.hf.training import processes
from stayaligned.hf.training.finetuning import FinetuningSetup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Trainer

    from stayaligned.core.records import Example

_SHARED = ("output_dir", "per_device_train_batch_size", "seed", "use_cpu", "bf16", "fp16", "disable_tqdm")
"""Settings of the fine-tuning that its alignment state has too."""


class PreferenceSetup(FinetuningSetup, Protocol):
    """What is read of `stayaligned.defenses.TrainingSetup`."""

    @property
    def alignment_examples(self) -> Sequence[Example]: ...  # noqa: D102


def build_preference_trainer(setup: PreferenceSetup, model: Any, beta: float) -> Trainer:
    """TRL's DPOTrainer on the alignment rows: the safe answer is preferred to the rejected one.

    The reference is the model as it is now: with its adapter switched off where it has a fresh one, and else by
    log-probabilities that are computed beforehand.

    Args:
        setup: the fine-tuning whose alignment state this is.
        model: what is trained.
        beta: β of DPO (Rafailov et al. 2023, equation 7).

    Raises:
        StayalignedError: if a row has no rejected answer, or TRL is not installed.
    """
    from peft import PeftModel

    without = [example.id for example in setup.alignment_examples if not example.rejected.strip()]
    if without:
        raise StayalignedError(
            f"alignment_loss='dpo' needs a rejected answer in every alignment row; "
            f"{len(without)} of {len(setup.alignment_examples)} have none ({without[0]} among them)",
            hint='Give alignment_data in the form {"prompt": "…", "chosen": "…", "rejected": "…"}.',
        )
    if processes.several() and not isinstance(model, PeftModel):
        raise StayalignedError(
            "alignment_loss='dpo' on all weights computes its reference beforehand, which works in one process only",
            hint="Train a LoRA, or start it without torchrun or accelerate launch.",
        )
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError:
        raise StayalignedError("alignment_loss='dpo' needs TRL", hint="pip install 'stayaligned[trl]'") from None
    import torch
    from datasets import Dataset

    def turn(content: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": content}]

    rows = [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in example.prompt],
            "chosen": turn(example.completion),
            "rejected": turn(example.rejected),
        }
        for example in setup.alignment_examples
    ]
    settings: dict[str, Any] = {"gradient_checkpointing": None}
    if not torch.accelerator.is_available():
        settings |= {"use_cpu": True, "bf16": False}
    settings |= {key: setup.arguments[key] for key in _SHARED if key in setup.arguments}
    arguments = DPOConfig(
        **settings,
        beta=beta,
        max_length=setup.max_length,
        precompute_ref_log_probs=not isinstance(model, PeftModel),
        report_to="none",
    )
    with bars_off(bool(arguments.disable_tqdm)):
        return DPOTrainer(
            model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=setup.tokenizer
        )
