"""Host settings with which Lisa's rows, loss or proximal term would silently be wrong; each raises an error."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

from stayaligned.algorithms.lisa_schedule import LisaSettings
from stayaligned.core.errors import StayalignedError
from stayaligned.core.host_versions import installed_version
from stayaligned.hf.hosts import ignores_token_count, innermost_model, require_trl, trl_class
from stayaligned.hf.training.lisa.alignment_rows import require_dataset

if TYPE_CHECKING:
    from transformers import Trainer


def read_settings(lisa: Any) -> LisaSettings:
    """Return the settings of LisaSettings, of the defense `Lisa` or `BSO`, or of a mapping with their fields.

    Raises:
        StayalignedError: if it is none of them, or a setting is unknown or invalid.
    """
    if isinstance(lisa, Mapping):
        given: dict[str, Any] = {str(key): value for key, value in lisa.items()}  # pyright: ignore
        if given.get("name") == "lisa":
            del given["name"]
        return LisaSettings.of(given)
    of_defense = getattr(lisa, "settings", None)
    settings = of_defense() if callable(of_defense) and not isinstance(lisa, type) else lisa
    if not isinstance(settings, LisaSettings):
        raise StayalignedError(
            "lisa is missing" if lisa is None else f"lisa is {_kind(lisa)}, not LisaSettings",
            hint="Pass lisa=LisaSettings(alignment_steps=10, finetuning_steps=90, rho=1.0).",
        )
    return settings


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def require_supported(trainer: Trainer, lisa: LisaSettings, alignment_dataset: Any, alignment_trainer: Any) -> None:
    """Check that the rows, the loss and the proximal term of this training will be exactly Lisa's.

    Raises:
        StayalignedError: for the first unsupported setting.
    """
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):  # pyright: ignore
        raise StayalignedError("the model has no trainable weights", hint="Attach a LoRA, or unfreeze weights.")
    if trainer.train_dataset is None:
        raise StayalignedError("train_dataset is missing", hint="Pass the user's rows.")
    require_dataset("train_dataset", trainer.train_dataset)
    if of_trl := trl_class(trainer):
        require_trl(of_trl, otherwise="train with transformers.Trainer")
    if trainer.args.gradient_accumulation_steps > 1 and ignores_token_count(innermost_model(trainer)):
        raise StayalignedError(
            f"gradient_accumulation_steps={trainer.args.gradient_accumulation_steps}: transformers "
            f"{installed_version('transformers')} adds the mean losses of accumulated batches of a "
            f"{type(innermost_model(trainer)).__name__}, instead of averaging over their tokens",
            hint="Set it to 1, or pip install 'transformers>=5.18'.",
        )
    if trainer.args.fp16 and trainer.args.device.type == "cpu":
        raise StayalignedError(
            "fp16=True on the CPU is ignored by the host, which would train in fp32",
            hint="Set fp16=False, or bf16=True for half precision.",
        )
    _require_supported_loss(lisa, alignment_dataset, alignment_trainer)
    if alignment_trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise StayalignedError(
            "alignment_trainer is not supported with FSDP or DeepSpeed: it would compute its loss on a model that "
            "another trainer shards",
            hint="Train with DDP, or set alignment_loss='sft' or 'kl'.",
        )
    if alignment_trainer is not None and trainer.model_init is not None:
        raise StayalignedError(
            "alignment_trainer is built before model_init creates the model that is trained",
            hint="Construct the trainer with a model instead of model_init.",
        )
    strongest = lisa.rho if lisa.alignment_loss_budget is None else lisa.rho_ceiling
    if lisa.rho and lisa.proximal == "decoupled" and strongest * trainer.args.learning_rate > 1:
        named = "rho" if strongest == lisa.rho else "rho_ceiling"
        raise StayalignedError(
            f"{named}={strongest:g} with proximal='decoupled' and a learning rate of {trainer.args.learning_rate:g} "
            "would move the weights past the anchor",
            hint="Set it below 1 / learning_rate.",
        )
    if lisa.alignment_steps:
        _require_supported_sampling(trainer, lisa, alignment_dataset)
    if lisa.rho:
        _require_reachable_gradients(trainer, lisa.rho)


def _require_supported_loss(lisa: LisaSettings, dataset: Any, build: Any) -> None:
    if build is not None and (not callable(build) or isinstance(build, type)):
        raise StayalignedError(
            f"alignment_trainer is {_kind(build)}, not a function that builds a trainer on the model it receives",
            hint="Pass alignment_trainer=lambda model: DPOTrainer(model, args, train_dataset=pairs, …).",
        )
    if build is not None and dataset is not None:
        raise StayalignedError(
            "both alignment_dataset and alignment_trainer are given",
            hint="Pass alignment_trainer only: the trainer that it builds has its rows.",
        )
    if build is not None and not lisa.alignment_steps:
        raise StayalignedError(
            "alignment_trainer is given, but alignment_steps=0 never uses it",
            hint="Set alignment_steps, or remove alignment_trainer.",
        )
    if lisa.alignment_loss == "dpo" and build is None:
        raise StayalignedError(
            "alignment_loss='dpo' takes its loss from a trainer, but alignment_trainer is missing",
            hint="Pass alignment_trainer=lambda model: DPOTrainer(model, args, train_dataset=pairs, …).",
        )
    if lisa.alignment_loss == "kl" and build is not None:
        raise StayalignedError(
            "alignment_loss='kl' and alignment_trainer are two losses for one phase", hint="Remove one of the two."
        )


def _require_supported_sampling(trainer: Trainer, lisa: LisaSettings, alignment_dataset: Any) -> None:
    args = trainer.args
    unsupported = {
        f"train_sampling_strategy={args.train_sampling_strategy!r}": args.train_sampling_strategy != "random",
        "ignore_data_skip=True": args.ignore_data_skip,
        "auto_find_batch_size=True": args.auto_find_batch_size,
        "accelerator_config.split_batches=True": trainer.accelerator.split_batches,
    }
    for setting, is_set in unsupported.items():
        if is_set:
            raise StayalignedError(
                f"{setting} is not supported: it chooses training rows without regard to Lisa's phases",
                hint="Use the default of that setting; Lisa shuffles both datasets itself.",
            )
    streams = [
        name
        for name, rows in (("train_dataset", trainer.train_dataset), ("alignment_dataset", alignment_dataset))
        if rows is not None and not isinstance(rows, Sized)
    ]
    if not streams:
        return
    unsupported_streams = {
        "budget='cover'": (lisa.budget == "cover", "Set budget='shared' and max_steps: a stream has no epoch."),
        "max_steps unset": (args.max_steps <= 0, "Set max_steps: a stream has no epoch."),
        f"dataloader_num_workers={args.dataloader_num_workers}": (
            args.dataloader_num_workers > 1,
            "Set it to 0 or 1: each worker would read the whole stream.",
        ),
        "several processes without dispatch_batches=False": (
            args.world_size > 1 and trainer.accelerator.dispatch_batches is not False,
            "Set accelerator_config={'dispatch_batches': False}: otherwise the host joins batches of unequal lengths.",
        ),
    }
    for setting, (is_set, hint) in unsupported_streams.items():
        if is_set:
            raise StayalignedError(f"{' and '.join(streams)} streamed with {setting} is not supported", hint=hint)


def _require_reachable_gradients(trainer: Trainer, rho: float) -> None:
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    unsupported = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP1": trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2,
        f"optim={optimizer!r}": "lomo" in optimizer or "layerwise" in optimizer,
    }
    for setting, is_set in unsupported.items():
        if is_set:
            raise StayalignedError(
                f"{setting} is not supported with rho={rho}: Lisa can't add the proximal gradient to its gradients",
                hint="Train with DDP or FSDP2 and another optimizer, or without the proximal term: rho=0 (BSO).",
            )
