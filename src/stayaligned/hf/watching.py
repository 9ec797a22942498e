"""What is watched while a model trains: layers that learn nothing."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

_log = logging.getLogger(__name__)


def dead_adapters(model: Any) -> list[str]:
    """The LoRA modules whose factors have got no gradient, or a zero one, from the loss just now.

    PEFT attaches a LoRA to every module that is asked for, also where the model uses the weight without calling the
    module (`dt_proj` of Mamba): nothing is then ever learned there. Sharded weights are not looked at.
    """
    alive: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        module, found, _ = name.partition(".lora_")
        if found and parameter.requires_grad and not isinstance(parameter, DTensor):
            alive[module] = alive.get(module, False) or _is_nonzero(parameter.grad)
    return [module for module, is_alive in alive.items() if not is_alive]


def report_dead_adapters(model: Any) -> None:
    """Log a warning that names the LoRA modules without a gradient; before the pull is added to the gradients."""
    if dead := dead_adapters(model):
        _log.warning(
            "%d LoRA layers get no gradient and will learn nothing: %s. Leave them out of target_modules.",
            len(dead),
            ", ".join(dead),
        )


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
