"""The aligned model inside the model that is trained: the same weights with the adapter and dropout off."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from stayaligned.core.errors import StayalignedError


def adapter_names(model: Any) -> list[str]:
    """Return the names of a model's adapters; none for a model without PEFT."""
    from peft import PeftModel

    return list(model.peft_config) if isinstance(model, PeftModel) else []


def require_reference(model: Any, user: str) -> None:
    """Check that a model has an adapter, without which it is the aligned model.

    Args:
        model: the model that is trained.
        user: what compares with the model without its adapter, for the error.

    Raises:
        StayalignedError: if there is none, as when all weights are trained.
    """
    if not adapter_names(model):
        raise StayalignedError(
            f"{user} compares with the model without its adapter, and this model has none",
            hint="Train a LoRA (`lora:`), or use another defense.",
        )


@contextlib.contextmanager
def as_reference(adapted: Any) -> Generator[None]:
    """Switch the adapter and dropout off, and restore the model exactly afterwards (PEFT would unfreeze weights)."""
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
