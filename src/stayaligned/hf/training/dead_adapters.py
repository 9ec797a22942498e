"""LoRA layers that get no gradient, and so learn nothing."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import Trainer

_log = logging.getLogger(__name__)


def dead_adapters(model: Any) -> list[str]:
    """Return the LoRA modules whose factors got no gradient, or a zero gradient, in the last backward pass.

    PEFT attaches a LoRA to every target module, even if the model uses the weight without calling the module
    (`dt_proj` of Mamba), so that the LoRA never learns. Sharded weights are not checked.
    """
    alive: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        module, found, _ = name.partition(".lora_")
        if found and parameter.requires_grad and not isinstance(parameter, DTensor):
            alive[module] = alive.get(module, False) or _is_nonzero(parameter.grad)
    return [module for module, is_alive in alive.items() if not is_alive]


def report_dead_adapters(trainer: Trainer) -> None:
    """Make a trainer log a warning after its first backward pass that names the LoRA layers without a gradient."""
    from transformers import TrainerCallback

    class DeadAdapters(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0 and (dead := dead_adapters(kwargs["model"])):
                layers = Counter(name.removesuffix(".base_layer").rpartition(".")[2] for name in dead)
                _log.warning(
                    "LoRA gets no gradient in %s and will learn nothing there: remove them from target_modules",
                    ", ".join(f"{count} layers {name}" for name, count in sorted(layers.items())),
                )

    if not any(
        type(callback).__qualname__ == DeadAdapters.__qualname__ for callback in trainer.callback_handler.callbacks
    ):
        trainer.add_callback(DeadAdapters())


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
