"""Adapters of a PeftModel as values, and back."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.weights.adapters import Adapter

if TYPE_CHECKING:
    from peft import PeftModel


def active_adapter(peft_model: PeftModel) -> str:
    """The name of the one adapter that is active.

    Raises:
        StayalignedError: if several are.
    """
    active = peft_model.active_adapter
    if isinstance(active, str):
        return active
    if len(active) == 1:
        return str(active[0])
    raise StayalignedError(f"the adapters {', '.join(active)} are active together", hint="Name one by `adapter_name`.")


def adapter_in_memory(peft_model: PeftModel, name: str) -> Adapter:
    """One LoRA of a model, as `save_pretrained` would write it. The tensors are copies, on the CPU.

    Args:
        peft_model: the model.
        name: which of its adapters.

    Raises:
        StayalignedError: if there is no such adapter, or it is no LoRA.
    """
    import torch
    from peft import get_peft_model_state_dict

    if name not in peft_model.peft_config:
        raise StayalignedError(
            f"the model has no adapter {name!r}",
            hint=did_you_mean(str(name), sorted(peft_model.peft_config), "adapters"),
        )
    settings: dict[str, Any] = peft_model.peft_config[name].to_dict()
    if settings.get("peft_type") != "LORA":
        raise StayalignedError(f"adapter {name!r} is {settings.get('peft_type')}, expected LORA", hint="Name a LoRA.")
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    # Embeddings would be copied beside a LoRA that targets them; the model has them already.
    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    held = {key: value.detach().to(torch.device("cpu"), copy=True) for key, value in tensors.items()}
    return Adapter(MappingProxyType(config), MappingProxyType(held), Path(f"<adapter {name!r} in memory>"))


def add_adapter(peft_model: PeftModel, adapter: Adapter, name: str, *, like: str) -> None:
    """Give a model one more LoRA and make it the active one; on failure the model is as it was.

    Args:
        peft_model: the model.
        adapter: its tensors.
        name: what to call it; must be new.
        like: the adapter whose configuration it takes.
    """
    from peft import set_peft_model_state_dict

    active = active_adapter(peft_model)
    peft_model.add_adapter(name, copy.deepcopy(peft_model.peft_config[like]))
    try:
        set_peft_model_state_dict(peft_model, dict(adapter.tensors), adapter_name=name)
        peft_model.set_adapter(name)
    except BaseException:
        peft_model.delete_adapter(name)
        peft_model.set_adapter(active)
        raise
