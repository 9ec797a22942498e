"""The alignment state with another loss than the host's: a preference loss of another trainer, or KL to the reference.

The paper aligns by supervised fine-tuning and leaves preference-based alignment open (§6). Neither loss here is its.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sized
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from transformers import Trainer

AlignmentTrainer = Callable[[Any], "Trainer"]
"""Builds a trainer of the alignment rows on the model that it is given."""
_REFERENCE_ADAPTER = "ref"


class AlignmentLoss(Protocol):
    """The loss of an alignment step, in the place of the host's."""

    @property
    def name(self) -> str:
        """What a checkpoint remembers of it."""
        ...

    def state(self) -> contextlib.AbstractContextManager[None]:
        """Entered for the forward and backward passes of an alignment step."""
        ...

    def loss(self, host: Any, model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
        """A scalar; `count` is the number of label tokens of the whole optimizer step, where the host counts them."""
        ...

    def is_mean_over_step(self, count: Any) -> bool:
        """Whether `loss` is already divided by the accumulation."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """What was measured besides since the last call."""
        ...


class TrainerLoss:
    """The loss of another trainer, DPO's say, on its own rows: composition, so that every variant of it is there.

    Both trainers may replace the model's forward (TRL's fused heads, each with its own outputs), and DPO's switches
    dropout off. The model then has the one in the alignment state and the other in the fine-tuning state.
    """

    def __init__(self, host: Trainer, build: AlignmentTrainer) -> None:
        model: Any = host.model
        core = _core(model)
        forward, trained, adapters, fresh = core.forward, _trainable_names(model), _adapters(model), _is_fresh(model)
        dropout = _dropout(model)
        try:
            self.trainer: Any = build(model)
            _require_fits(host, self.trainer, set(trained))
            if _REFERENCE_ADAPTER in set(_adapters(model)) - set(adapters):
                self._drop_reference_copy(model, fresh)
        except BaseException:
            core.forward = forward
            _set_dropout(dropout)
            for name in set(_adapters(model)) - set(adapters):
                model.delete_adapter(name)
            raise
        self._own_dropout, self._its_dropout = dropout, _dropout(model)
        _set_dropout(self._own_dropout)
        self._active = False
        if core.forward != forward:
            self._switch_forward(core, forward, core.forward)
        self.trainer.accelerator = host.accelerator

    def _drop_reference_copy(self, model: Any, fresh: bool) -> None:
        """TRL copies an adapter that exists, as the reference, and every checkpoint would hold the copy.

        It goes where it says nothing: a fresh LoRA changes nothing, so the reference is the model with its adapter
        switched off; and a reference that was computed beforehand is in the rows.
        """
        if not (fresh or vars(self.trainer.args).get("precompute_ref_log_probs")):
            raise StayalignedError(
                "the alignment trainer keeps a copy of the adapter as its reference, which every checkpoint would hold",
                hint="Set precompute_ref_log_probs=True in its configuration: the reference is computed beforehand.",
            )
        model.delete_adapter(_REFERENCE_ADAPTER)

    def _switch_forward(self, core: nn.Module, own: Callable[..., Any], its: Callable[..., Any]) -> None:
        @functools.wraps(type(core).forward)
        def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (its if self._active else own)(*args, **kwargs)

        core.forward = MethodType(forward, core)

    @property
    def name(self) -> str:
        """The trainer's class."""
        return type(self.trainer).__name__

    @contextlib.contextmanager
    def state(self) -> Generator[None]:
        """The model as its trainer wants it."""
        self._active = True
        _set_dropout(self._its_dropout)
        try:
            yield
        finally:
            self._active = False
            _set_dropout(self._own_dropout)

    @property
    def collator(self) -> Callable[[list[Any]], Any]:
        """Makes the trainer's rows a batch."""
        return self.trainer.data_collator

    def loss(self, host: Any, model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
        """What the trainer computes of one of its batches."""
        self.trainer.state = host.state
        return self.trainer.compute_loss(model, inputs, num_items_in_batch=count)

    def is_mean_over_step(self, count: Any) -> bool:
        """As the host decides it of a trainer of that class."""
        if self.trainer.loss_is_scaled_for_ga is not None:
            return bool(self.trainer.loss_is_scaled_for_ga)
        counted = self.trainer.model_accepts_loss_kwargs and count is not None
        return bool(counted or self.trainer.compute_loss_func is not None)

    def take_metrics(self) -> dict[str, float]:
        """The means of what a trainer of TRL's collects for its log: `rewards/margins` of DPO."""
        collected: Mapping[str, dict[str, list[float]]] = vars(self.trainer).get("_metrics", {})
        metrics = {key: sum(values) / len(values) for key, values in collected.get("train", {}).items() if values}
        collected.get("train", {}).clear()
        return metrics


class ReferenceKl:
    """KL(p_ref ‖ p_w) on the answers of the alignment rows, the reference being the model without its adapter.

    It asks that the model answer as the aligned model would, whatever the rows' answers say. A second forward, of the
    reference, is the cost; no second model is held.

    Raises:
        StayalignedError: if the model has no adapter that can be switched off.
    """

    name = "kl"

    def __init__(self, host: Trainer) -> None:
        if not _adapters(host.model):
            raise StayalignedError(
                "alignment_loss='kl' compares with the model without its adapter, and this model has none",
                hint="Train a LoRA, or take alignment_loss='sft'.",
            )

    def state(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is changed."""
        return contextlib.nullcontext()

    def loss(self, host: Any, model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
        """Mean over the label tokens of the optimizer step, in nats."""
        labels = inputs["labels"]
        given = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad(), _as_reference(host.accelerator.unwrap_model(model)):
            reference = model(**given).logits
        loss = reference_kl(model(**given).logits, reference, labels, count)
        # The host's count is over all processes, whose gradients are then averaged.
        counted = count is not None and host.args.average_tokens_across_devices
        return loss * host.accelerator.num_processes if counted else loss

    def is_mean_over_step(self, count: Any) -> bool:
        """Where the host counts the tokens of the step."""
        return count is not None

    def take_metrics(self) -> dict[str, float]:
        """Nothing besides the loss."""
        return {}


@contextlib.contextmanager
def _as_reference(adapted: Any) -> Generator[None]:
    """The model without its adapter and without dropout; afterwards exactly as before (PEFT would unfreeze weights)."""
    frozen = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    training = [module for module in adapted.modules() if module.training]
    try:
        with adapted.disable_adapter():
            adapted.eval()
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(False)


def reference_kl(logits: Tensor, reference: Tensor, labels: Tensor, count: Any = None) -> Tensor:
    """Σ over label tokens of KL(reference ‖ model), divided by `count` or by their number; in fp32.

    Args:
        logits: (batch, length, vocabulary), of the model.
        reference: the same shape, of the reference.
        labels: (batch, length); -100 marks what is no label. Position t of the logits predicts label t + 1.
        count: the number of label tokens to divide by, where the batch is a part of a step.
    """
    predicted = labels[:, 1:] != -100
    ours = logits[:, :-1][predicted].float().log_softmax(-1)
    theirs = reference[:, :-1][predicted].float().log_softmax(-1)
    total = nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return total / (predicted.sum() if count is None else count)


def _core(model: Any) -> nn.Module:
    """The module whose forward TRL replaces: the model beneath its adapters."""
    return model.get_base_model() if _adapters(model) else model


def _adapters(model: Any) -> list[str]:
    from peft import PeftModel

    return list(model.peft_config) if isinstance(model, PeftModel) else []


def _trainable_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _is_fresh(model: nn.Module) -> bool:
    """Whether every LoRA of the model is still zero, so that the model without it is the same model."""
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
            f"alignment_trainer gave {name}, not a trainer",
            hint="Give a function of the model: lambda model: DPOTrainer(model, args, train_dataset=pairs).",
        )
    if built.model is not host.model:
        raise StayalignedError(
            f"the {name} was built on another model, or wrapped it anew",
            hint="Build it on the model that alignment_trainer is called with, without a peft_config of its own.",
        )
    if set(_trainable_names(host.model)) != trained:
        raise StayalignedError(
            f"the {name} has changed which weights are trained",
            hint="Build it so that it leaves the model's requires_grad as they are.",
        )
    if vars(built.args).get("sync_ref_model"):
        raise StayalignedError(
            f"sync_ref_model of the {name} is done by its callbacks, which only run where it trains by itself",
            hint="Leave it out.",
        )
    if host.args.world_size > 1 and (
        built.args.average_tokens_across_devices != host.args.average_tokens_across_devices
    ):
        raise StayalignedError(
            f"average_tokens_across_devices of the {name} is not this trainer's, so their losses are scaled apart",
            hint="Set it alike in both configurations.",
        )
    rows, batch = built.train_dataset, host.args.per_device_train_batch_size * max(host.args.world_size, 1)
    if not isinstance(rows, Sized):
        raise StayalignedError(
            f"the {name} has no train_dataset with a length", hint="Give it the alignment rows, not a stream."
        )
    if len(rows) < batch:
        raise StayalignedError(
            f"the {name} has {len(rows)} alignment rows, fewer than a batch of {batch}",
            hint="Give more rows, or a smaller per_device_train_batch_size.",
        )
