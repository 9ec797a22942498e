"""Losses of the alignment phase other than the host's: that of another trainer (DPO), or KL to the reference.

The paper aligns by supervised fine-tuning and leaves preference-based alignment open (§6). Neither loss is from it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sized
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from stayaligned.algorithms.objectives import reference_kl
from stayaligned.core.errors import StayalignedError
from stayaligned.hf.hosts import is_loss_scaled, require_trl, trl_class
from stayaligned.hf.training.reference import adapter_names, as_reference, require_unchanged_base

if TYPE_CHECKING:
    from transformers import Trainer

AlignmentTrainer = Callable[[Any], "Trainer"]
"""A function that builds a trainer of the alignment rows on the model that it receives."""
_REFERENCE_ADAPTER = "ref"


class AlignmentLoss(Protocol):
    """The loss of an alignment step, instead of the host's."""

    @property
    def name(self) -> str:
        """The name that checkpoints store."""
        ...

    def activate(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for the forward and backward passes of an alignment step."""
        ...

    def compute_loss(self, host: Any, model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
        """Compute the scalar loss of a batch.

        `count` is the number of label tokens of the whole optimizer step, or None if the host does not count them.
        """
        ...

    def is_mean_over_step(self, count: Any) -> bool:
        """Return whether the loss is already divided by the number of accumulated batches."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics collected since the last call."""
        ...


class TrainerLoss:
    """The loss of another trainer, such as DPO's, on its own rows.

    Delegating to the trainer makes all variants of its loss available. Both trainers may replace the model's forward
    (TRL's fused heads, each with its own outputs), and DPO's switches dropout off. The model therefore has two forwards
    and two sets of dropout probabilities, one for each phase.
    """

    def __init__(self, host: Trainer, build: AlignmentTrainer) -> None:
        model: Any = host.model
        core = _base_of(model)
        forward, trained, adapters, fresh = (
            core.forward,
            _trainable_names(model),
            adapter_names(model),
            _is_fresh(model),
        )
        dropout = _dropout(model)
        try:
            self.trainer: Any = build(model)
            _require_fits(host, self.trainer, set(trained))
            if _REFERENCE_ADAPTER in set(adapter_names(model)) - set(adapters):
                self._delete_reference_copy(model, fresh)
        except BaseException:
            core.forward = forward
            _set_dropout(dropout)
            for name in set(adapter_names(model)) - set(adapters):
                model.delete_adapter(name)
            raise
        self._host_dropout, self._alignment_dropout = dropout, _dropout(model)
        _set_dropout(self._host_dropout)
        self._active = False
        if core.forward != forward:
            self._switch_forward(core, forward, core.forward)
        self.trainer.accelerator = host.accelerator

    def _delete_reference_copy(self, model: Any, fresh: bool) -> None:
        """Delete TRL's copy of the adapter, its reference, which every checkpoint would contain.

        The copy is redundant if the LoRA is fresh, because the reference is then the model with its adapter switched
        off, or if the reference log-probabilities are precomputed and stored in the rows.
        """
        if not (fresh or vars(self.trainer.args).get("precompute_ref_log_probs")):
            raise StayalignedError(
                "the alignment trainer keeps a copy of the adapter as its reference, which every checkpoint would "
                "contain",
                hint="Set precompute_ref_log_probs=True in its configuration.",
            )
        model.delete_adapter(_REFERENCE_ADAPTER)

    def _switch_forward(self, core: nn.Module, host: Callable[..., Any], alignment: Callable[..., Any]) -> None:
        @functools.wraps(type(core).forward)
        def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (alignment if self._active else host)(*args, **kwargs)

        core.forward = MethodType(forward, core)

    @property
    def name(self) -> str:
        """The name of the trainer's class."""
        return type(self.trainer).__name__

    @contextlib.contextmanager
    def activate(self) -> Generator[None]:
        """Switch to the forward and the dropout of the alignment trainer."""
        self._active = True
        _set_dropout(self._alignment_dropout)
        try:
            yield
        finally:
            self._active = False
            _set_dropout(self._host_dropout)

    @property
    def collator(self) -> Callable[[list[Any]], Any]:
        """The collator of the trainer's rows."""
        return self.trainer.data_collator

    def compute_loss(self, host: Any, model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
        """Compute the trainer's loss of one of its batches."""
        self.trainer.state = host.state
        return self.trainer.compute_loss(model, inputs, num_items_in_batch=count)

    def is_mean_over_step(self, count: Any) -> bool:
        """Return whether the loss is already divided, as the host decides it for a trainer of that class."""
        return is_loss_scaled(self.trainer, count)

    def take_metrics(self) -> dict[str, float]:
        """Return the means of the metrics that TRL's trainers collect for their log, such as `rewards/margins`."""
        collected: Mapping[str, dict[str, list[float]]] = vars(self.trainer).get("_metrics", {})
        metrics = {key: sum(values) / len(values) for key, values in collected.get("train", {}).items() if values}
        collected.get("train", {}).clear()
        return metrics


class ReferenceKl:
    """KL(p_ref ‖ p_w) on the completions of the alignment rows, with the model without its adapter as the reference.

    The target is the aligned model's distribution, not the content of the completions. It costs a second forward pass,
    of the reference; no second model is in memory.

    Raises:
        StayalignedError: if the model has no adapter that can be switched off.
    """

    name = "kl"

    def __init__(self, host: Trainer) -> None:
        if not adapter_names(host.model):
            raise StayalignedError(
                "alignment_loss='kl' compares with the model without its adapter, and this model has none",
                hint="Train a LoRA, or set alignment_loss='sft'.",
            )
        require_unchanged_base(host.model, "alignment_loss='kl'")

    def activate(self) -> contextlib.AbstractContextManager[None]:
        """Return an empty context: the model is used unchanged."""
        return contextlib.nullcontext()

    def compute_loss(self, host: Any, model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
        """Compute the mean KL over the label tokens of the optimizer step, in nats."""
        labels = inputs["labels"]
        given = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad(), as_reference(host.accelerator.unwrap_model(model)):
            reference = model(**given).logits
        loss = reference_kl(model(**given).logits, reference, labels, count)
        # The host's count is over all processes, whose gradients are then averaged.
        counted = count is not None and host.args.average_tokens_across_devices
        return loss * host.accelerator.num_processes if counted else loss

    def is_mean_over_step(self, count: Any) -> bool:
        """Return whether the host counts the tokens of the step."""
        return count is not None

    def take_metrics(self) -> dict[str, float]:
        """Return no metrics: only the loss is logged."""
        return {}


def _base_of(model: Any) -> nn.Module:
    """Return the module whose forward TRL replaces: the model without its adapters."""
    return model.get_base_model() if adapter_names(model) else model


def _trainable_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _is_fresh(model: nn.Module) -> bool:
    """Return whether every LoRA of the model is zero, so that it does not change the model."""
    factors = {n: p for n, p in model.named_parameters() if "lora_B." in n or "lora_embedding_A." in n}
    return bool(factors) and not any(bool(p.any()) for p in factors.values())


def _dropout(model: nn.Module) -> dict[nn.Dropout, float]:
    return {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}


def _set_dropout(probabilities: Mapping[nn.Dropout, float]) -> None:
    for module, probability in probabilities.items():
        module.p = probability


def _require_fits(host: Trainer, built: Any, trained: set[str]) -> None:
    from transformers import Trainer as AnyTrainer

    name = type(built).__name__
    if not isinstance(built, AnyTrainer):
        raise StayalignedError(
            f"alignment_trainer returned {name}, not a trainer",
            hint="Pass a function of the model: lambda model: DPOTrainer(model, args, train_dataset=pairs).",
        )
    if of_trl := trl_class(built):
        require_trl(of_trl, otherwise="set alignment_loss='sft'")
    if built.model is not host.model:
        raise StayalignedError(
            f"the {name} was built on another model, or wrapped the model again",
            hint="Build it on the model that alignment_trainer receives, without a peft_config.",
        )
    if set(_trainable_names(host.model)) != trained:
        raise StayalignedError(
            f"the {name} has changed which weights are trained",
            hint="Build it without changing requires_grad of the model's weights.",
        )
    if vars(built.args).get("sync_ref_model"):
        raise StayalignedError(
            f"sync_ref_model of the {name} is not supported: its callbacks run only in its own training loop",
            hint="Remove sync_ref_model.",
        )
    if host.args.world_size > 1 and (
        built.args.average_tokens_across_devices != host.args.average_tokens_across_devices
    ):
        raise StayalignedError(
            f"average_tokens_across_devices of the {name} differs from this trainer's, so their losses would be scaled "
            "differently",
            hint="Set it to the same value in both configurations.",
        )
    rows, batch = built.train_dataset, host.args.per_device_train_batch_size * max(host.args.world_size, 1)
    if not isinstance(rows, Sized):
        raise StayalignedError(
            f"the {name} has no train_dataset with a length", hint="Build it with the alignment rows, not a stream."
        )
    if len(rows) < batch:
        raise StayalignedError(
            f"the {name} has {len(rows)} alignment rows, fewer than a batch of {batch}",
            hint="Pass more rows, or lower per_device_train_batch_size.",
        )
