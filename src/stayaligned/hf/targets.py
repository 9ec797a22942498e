"""Modules that LoRA can adapt, found with PEFT and a forward pass; there is no table of architectures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stayaligned.hf.hosts import is_rejected_target

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
"""PEFT's name for all linear modules except the head."""


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the distinct last names of the linear modules, such as `q_proj` and `up_proj`."""
    return sorted({_last_name(name) for name, _ in _linear_modules(model)})


def unfit_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the last names of the linear modules that LoRA can't adapt, with the reason for each.

    PEFT rejects some modules of some architectures. It accepts others that would never learn: LoRA acts when a module
    is called, and Mamba reads the weight of its `dt_proj` without calling it.
    """
    kind = type(model).__name__
    unfit = dict.fromkeys(_uncalled(model), f"{kind} reads its weight without calling it")
    rejected = (name for name in linear_names(model) if is_rejected_target(model, name))
    return unfit | dict.fromkeys(rejected, f"PEFT rejects it on a {kind}")


def excluding(excluded: Any, names: list[str]) -> Any:
    """Return PEFT's `exclude_modules` (a list, a regular expression or None) with more names."""
    if isinstance(excluded, str):
        return rf"(?:{excluded})|(?:.*\.)?(?:{'|'.join(names)})"
    return sorted({*(excluded or ()), *names})


def _linear_modules(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return ((name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D))


def _uncalled(model: PreTrainedModel) -> list[str]:
    """Return the last names whose modules a training forward pass never calls; none if the model can't run here."""
    import torch

    called: set[torch.nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _inputs: called.add(module)) for _, m in _linear_modules(model)]
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), torch.random.fork_rng():  # dropout must not advance the global generator
            model.train()(input_ids=torch.zeros((1, 4), dtype=torch.long, device=model.device), use_cache=False)
    except Exception:  # such as a quantized model without its accelerator: nothing is known then
        return []
    finally:
        for hook in hooks:
            hook.remove()
        model.eval()
        for module in training:
            module.training = True
    live = {_last_name(name) for name, module in _linear_modules(model) if module in called}
    return [name for name in linear_names(model) if name not in live]


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]
