"""Which modules LoRA can work on: PEFT is asked, and a forward pass is watched. No table of architectures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear module but the head."""


def linear_names(model: PreTrainedModel) -> list[str]:
    """The distinct last names of the linear modules: `q_proj`, `up_proj`."""
    return sorted({_last(name) for name, _ in _linear_modules(model)})


def unfit_names(model: PreTrainedModel) -> dict[str, str]:
    """{last name: why} of the linear modules that LoRA can't work on.

    PEFT refuses some modules of some architectures. Others it takes, though they would never learn: LoRA acts where
    a module is called, and Mamba reads the weight of its `dt_proj` without calling it.
    """
    kind = type(model).__name__
    unfit = dict.fromkeys(_uncalled(model), f"{kind} reads its weight without calling it")
    refused = (name for name in linear_names(model) if _is_refused(model, name))
    return unfit | dict.fromkeys(refused, f"PEFT refuses it on a {kind}")


def excluding(excluded: Any, names: list[str]) -> Any:
    """PEFT's `exclude_modules` (a list, a regular expression or nothing) with more names in it."""
    if isinstance(excluded, str):
        return rf"(?:{excluded})|(?:.*\.)?(?:{'|'.join(names)})"
    return sorted({*(excluded or ()), *names})


def _linear_modules(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return ((name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D))


def _is_refused(model: PreTrainedModel, name: str) -> bool:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba  # pyright: ignore[reportPrivateUsage]

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


def _uncalled(model: PreTrainedModel) -> list[str]:
    """Last names under which no module is called in a forward pass of training; none if the model can't run here."""
    import torch

    called: set[torch.nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _inputs: called.add(module)) for _, m in _linear_modules(model)]
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), torch.random.fork_rng():  # dropout must not move the seed
            model.train()(input_ids=torch.zeros((1, 4), dtype=torch.long, device=model.device), use_cache=False)
    except Exception:  # a quantised model away from its accelerator, for instance; then nothing is known
        return []
    finally:
        for hook in hooks:
            hook.remove()
        model.eval()
        for module in training:
            module.training = True
    live = {_last(name) for name, module in _linear_modules(model) if module in called}
    return [name for name in linear_names(model) if name not in live]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
