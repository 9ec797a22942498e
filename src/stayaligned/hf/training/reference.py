"""The aligned model inside the model that is trained: the same weights with the adapter and dropout off."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from torch import Tensor


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
    require_unchanged_base(model, user)


def require_unchanged_base(model: Any, user: str) -> None:
    """Check that a model without its adapter, if it has one, is the aligned model.

    Args:
        model: the model that is trained.
        user: what compares with the model without its adapter, for the error.

    Raises:
        StayalignedError: if the adapter's initialization has changed the weights below it.
    """
    from stayaligned.weights.unsupported import BASE_PRESERVING_INITS

    for name in adapter_names(model):
        init = getattr(model.peft_config[name], "init_lora_weights", True)
        if init not in BASE_PRESERVING_INITS:
            raise StayalignedError(
                f"{user} compares with the model without its adapter, which init_lora_weights={init!r} has made "
                "another than the aligned one",
                hint="Remove `lora.init_lora_weights`, or use another defense.",
            )


@contextlib.contextmanager
def as_reference(adapted: Any) -> Generator[None]:
    """Switch the adapter and dropout off, and restore the model exactly afterwards (PEFT would unfreeze weights)."""
    frozen = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    try:
        with adapted.disable_adapter(), evaluating(adapted):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def evaluating(model: Any) -> Generator[None]:
    """Switch dropout off, and restore the state of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class LoraModule:
    """One linear layer with a LoRA in a model."""

    base: Any
    """The frozen layer."""
    factor: Any
    """The module of B."""

    def project(self, frame: Tensor) -> None:
        """Remove the directions of `frame` (orthonormal columns) from B's output, in every later forward pass."""

        def remove(module: Any, inputs: Any, output: Tensor) -> Tensor:
            del module, inputs
            directions = frame.to(output)
            return output - (output @ directions) @ directions.T

        self.factor.register_forward_hook(remove)


def plain_lora_layers(model: Any, defense: str) -> dict[str, LoraModule]:
    """Return {module: its layers} of every linear layer with a LoRA.

    Args:
        model: the PEFT model.
        defense: the name of the defense, for the error.

    Raises:
        StayalignedError: if there is another kind of adapter or layer, whose update is not sBA alone.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    found: dict[str, LoraModule] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        adapter = str(module.active_adapters[0])  # pyright: ignore
        factor = dict(module.lora_B).get(adapter)
        plain = (
            isinstance(factor, nn.Linear)
            and getattr(factor, "bias", None) is None
            and not getattr(module, "use_dora", {}).get(adapter)
        )
        if not plain or not hasattr(module.get_base_layer(), "out_features"):
            raise StayalignedError(
                f"defense {defense!r} changes a plain LoRA on linear layers, and {name} is a {type(module).__name__} "
                "of another kind",
                hint="Set `lora:` without use_dora, lora_bias and target_parameters, on linear layers only.",
            )
        found[name] = LoraModule(module.get_base_layer(), factor)
    if not found:
        raise StayalignedError(f"defense {defense!r} needs a LoRA, and the model has none", hint="Set `lora:`.")
    return found


def output_grams(model: Any, layers: Mapping[str, LoraModule], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Compute Σ yyᵀ of each frozen layer's outputs y = Wx at the tokens with a label, in the aligned model, in fp32.

    Args:
        model: the PEFT model.
        layers: what `plain_lora_layers` returns.
        batches: batches of an objective's rows.
    """
    import torch

    grams: dict[str, Tensor] = {}
    learned: list[Tensor] = []

    def collect(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            del inputs
            y = (output if module.bias is None else output - module.bias)[learned[-1]].float()
            grams[name] = grams.get(name, 0) + y.T @ y

        return hook

    hooks = [layer.base.register_forward_hook(collect(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            learned.append(batch.labels >= 0)
            with torch.no_grad():
                _ = batch.reference_logits
    finally:
        for each in hooks:
            each.remove()
    return grams
