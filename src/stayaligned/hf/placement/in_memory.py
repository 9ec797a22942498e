"""Copy adapters out of a PeftModel, add them to one, and add updates to the weights of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.weights.adapters import Adapter

if TYPE_CHECKING:
    from peft import PeftModel

    from stayaligned.algorithms.safe_lora import LoraFactors


def active_adapter(peft_model: PeftModel) -> str:
    """Return the name of the active adapter.

    Raises:
        StayalignedError: if several adapters are active.
    """
    active = peft_model.active_adapter
    if isinstance(active, str):
        return active
    if len(active) == 1:
        return str(active[0])
    raise StayalignedError(f"several adapters are active: {', '.join(active)}", hint="Set adapter_name to one of them.")


def adapter_in_memory(peft_model: PeftModel, name: str) -> Adapter:
    """Return one LoRA of a model, as `save_pretrained` would write it. The tensors are copies, on the CPU.

    Args:
        peft_model: the model.
        name: the adapter's name.

    Raises:
        StayalignedError: if there is no such adapter, or it is not a LoRA.
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
        raise StayalignedError(f"adapter {name!r} is {settings.get('peft_type')}, expected LORA", hint="Give a LoRA.")
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    # By default PEFT also copies embeddings that a LoRA targets; the model has them already.
    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    copies = {key: value.detach().to(torch.device("cpu"), copy=True) for key, value in tensors.items()}
    return Adapter(MappingProxyType(config), MappingProxyType(copies), Path(f"<adapter {name!r} in memory>"))


def add_to_weights(model: Any, updates: Mapping[str, LoraFactors]) -> None:
    """Add an update to the weights of linear modules, in place: to the frozen weights, where a LoRA changes a module.

    The sum is computed in fp32 and rounded once.

    Args:
        model: a model in memory, or a PeftModel.
        updates: {module of the model without its adapter: the factors of its update}.
    """
    from transformers.pytorch_utils import Conv1D

    core = model.get_base_model() if hasattr(model, "peft_config") else model
    for name, update in updates.items():
        module = core.get_submodule(name)
        module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        weight, change = module.weight.data, update.scaling * (update.b @ update.a)
        change = change.T if isinstance(module, Conv1D) else change
        weight.copy_(weight.float() + change.to(weight.device))


def add_adapter(peft_model: PeftModel, adapter: Adapter, name: str, *, like: str) -> None:
    """Add a LoRA to a model and activate it; on failure the model is unchanged.

    Args:
        peft_model: the model.
        adapter: the tensors of the LoRA.
        name: a new name.
        like: the adapter of the model whose configuration to use.
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
