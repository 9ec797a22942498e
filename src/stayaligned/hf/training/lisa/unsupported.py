"""The settings under which a run would silently not be Lisa's: each refused by name, with what to do."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.training.lisa.losses import AlignmentTrainer
from stayaligned.hf.training.lisa.proximal import LisaSettings

if TYPE_CHECKING:
    from transformers import Trainer


def refuse_what_is_not_exact(
    trainer: Trainer, lisa: LisaSettings, alignment_dataset: Any, alignment_trainer: AlignmentTrainer | None
) -> None:
    """Name the first setting under which the rows, the loss or the pull would differ from what was asked for.

    Raises:
        StayalignedError: that names the setting, and what to do.
    """
    if lisa.rho < 0:
        raise StayalignedError(f"rho={lisa.rho} would push away from the anchor", hint="Take 0 or more.")
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):  # pyright: ignore
        raise StayalignedError("the model has no trainable weights", hint="Attach a LoRA, or unfreeze some weights.")
    if trainer.train_dataset is None or (isinstance(trainer.train_dataset, Sized) and len(trainer.train_dataset) == 0):
        raise StayalignedError("train_dataset is empty", hint="Give the user's rows.")
    if trainer.args.fp16 and trainer.args.device.type == "cpu":
        raise StayalignedError(
            "fp16=True on the CPU trains in fp32 without a word",
            hint="Set fp16=False, or bf16=True for half precision.",
        )
    _refuse_losses(lisa, alignment_dataset, alignment_trainer)
    if alignment_trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise StayalignedError(
            "alignment_trainer computes its loss on a model that another trainer shards, which is not verified",
            hint="Train with DDP, or take alignment_loss='sft' or 'kl'.",
        )
    if alignment_trainer is not None and trainer.model_init is not None:
        raise StayalignedError(
            "model_init makes the model anew when training begins, and alignment_trainer is built before",
            hint="Give the trainer a model.",
        )
    strongest = lisa.rho if lisa.alignment_loss_budget is None else lisa.rho_ceiling
    if lisa.rho and lisa.proximal == "decoupled" and strongest * trainer.args.learning_rate > 1:
        named = "rho" if strongest == lisa.rho else "rho_ceiling"
        raise StayalignedError(
            f"{named}={strongest:g} with proximal='decoupled' and a learning rate of {trainer.args.learning_rate:g} "
            "would move the weights past the anchor",
            hint="Take values below 1 / learning_rate.",
        )
    if lisa.alignment_steps:
        _refuse_sampling(trainer, lisa, alignment_dataset)
    if lisa.rho:
        _refuse_hidden_gradients(trainer, lisa.rho)


def _refuse_losses(lisa: LisaSettings, dataset: Any, build: AlignmentTrainer | None) -> None:
    if build is not None and dataset is not None:
        raise StayalignedError(
            "both alignment_dataset and alignment_trainer are given", hint="Give the trainer alone: it has its rows."
        )
    if build is not None and not lisa.alignment_steps:
        raise StayalignedError(
            "alignment_trainer is given, but alignment_steps=0 never uses it", hint="Set alignment_steps."
        )
    if lisa.alignment_loss == "dpo" and build is None:
        raise StayalignedError(
            "alignment_loss='dpo' takes its loss from a trainer, and none is given",
            hint="Give alignment_trainer=lambda model: DPOTrainer(model, args, train_dataset=pairs, …).",
        )
    if lisa.alignment_loss == "kl" and build is not None:
        raise StayalignedError(
            "alignment_loss='kl' and alignment_trainer are two losses for one state", hint="Leave one of them out."
        )
    if lisa.alignment_loss_budget is not None and not (lisa.rho and lisa.alignment_steps and lisa.finetuning_steps):
        raise StayalignedError(
            "alignment_loss_budget adapts rho by the loss of the alignment states, and there is none of one of them",
            hint="Set rho, alignment_steps and finetuning_steps, or leave alignment_loss_budget out.",
        )


def _refuse_sampling(trainer: Trainer, lisa: LisaSettings, alignment_dataset: Any) -> None:
    args = trainer.args
    refused = {
        f"train_sampling_strategy={args.train_sampling_strategy!r}": args.train_sampling_strategy != "random",
        "ignore_data_skip=True": args.ignore_data_skip,
        "auto_find_batch_size=True": args.auto_find_batch_size,
        "accelerator_config.split_batches=True": trainer.accelerator.split_batches,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise StayalignedError(
                f"{setting} chooses training rows in a way that Lisa's states cannot keep to",
                hint="Leave that setting at its default; Lisa shuffles both data sets itself.",
            )
    streams = [
        name
        for name, rows in (("train_dataset", trainer.train_dataset), ("alignment_dataset", alignment_dataset))
        if rows is not None and not isinstance(rows, Sized)
    ]
    if not streams:
        return
    unfit = {
        "budget='cover'": (lisa.budget == "cover", "Take budget='shared' and max_steps: a stream has no epoch."),
        "max_steps unset": (args.max_steps <= 0, "Set max_steps: a stream has no epoch."),
        f"dataloader_num_workers={args.dataloader_num_workers}": (
            args.dataloader_num_workers > 1,
            "Take 0 or 1: each worker would read the whole stream.",
        ),
        "several processes without dispatch_batches=False": (
            args.world_size > 1 and trainer.accelerator.dispatch_batches is not False,
            "Set accelerator_config={'dispatch_batches': False}: the host would else join batches of unequal lengths.",
        ),
    }
    for setting, (is_so, hint) in unfit.items():
        if is_so:
            raise StayalignedError(f"{' and '.join(streams)} streamed with {setting}", hint=hint)


def _refuse_hidden_gradients(trainer: Trainer, rho: float) -> None:
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    refused = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP1": trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2,
        f"optim={optimizer!r}": "lomo" in optimizer or "layerwise" in optimizer,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise StayalignedError(
                f"{setting} keeps the gradients where Lisa's pull (rho={rho}) cannot be added to them",
                hint="Train with DDP or FSDP2 and another optimizer, or without the pull: rho=0 (BSO).",
            )
