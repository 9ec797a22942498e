"""Vaccine's loss: the cross-entropy under the perturbation of hidden states that raises it most (arXiv 2402.01109)."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stayaligned.algorithms.objectives import IGNORED, label_log_probabilities
from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from transformers import Trainer


class PerturbedLoss:
    """The loss of an alignment step with every attention layer's output e moved by ρ·g/‖g‖, g its gradient.

    ‖g‖ is over all layers together. The perturbation is a constant of the second pass, as in the published code.

    Raises:
        StayalignedError: if the model has no attention layers.
    """

    name = "vaccine"

    def __init__(self, host: Trainer, rho: float) -> None:
        model: Any = host.model
        self._rho = rho
        self._layers = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
        if not self._layers:
            raise StayalignedError(
                f"defense 'vaccine' perturbs attention layers, and a {type(model).__name__} has none",
                hint="Use another defense for this architecture.",
            )

    def activate(self) -> contextlib.AbstractContextManager[None]:
        """Return an empty context: the layers are changed within `compute_loss` only."""
        return contextlib.nullcontext()

    def compute_loss(self, host: Any, model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
        """Compute the perturbed loss, the mean over the label tokens of the optimizer step."""
        labels = inputs["labels"]
        given = {**{key: value for key, value in inputs.items() if key != "labels"}, "use_cache": False}
        counted = count is not None and host.args.average_tokens_across_devices
        # The host's count is over all processes, whose gradients are then averaged.
        scale = host.accelerator.num_processes if counted else 1

        def loss(of: Any) -> Tensor:
            total = -label_log_probabilities(of(**given).logits, labels).sum()
            return total * scale / ((labels[:, 1:] != IGNORED).sum() if count is None else count)

        outputs: list[Tensor] = []
        with _changing(self._layers, lambda _, hidden: outputs.append(hidden) or hidden):
            plain = loss(host.accelerator.unwrap_model(model))
        gradients = torch.autograd.grad(plain, outputs)
        norm = torch.stack([gradient.float().norm() for gradient in gradients]).norm() + 1e-7
        moves = [gradient * (self._rho / norm).to(gradient.dtype) for gradient in gradients]
        with _changing(self._layers, lambda index, hidden: hidden + moves[index]):
            return loss(model)

    def is_mean_over_step(self, count: Any) -> bool:
        """Return whether the host counts the tokens of the step."""
        return count is not None

    def take_metrics(self) -> dict[str, float]:
        """Return no metrics: only the loss is logged."""
        return {}


@contextlib.contextmanager
def _changing(layers: list[nn.Module], change: Any) -> Generator[None]:
    """Within the block, replace the output of each layer by change(index of the layer, output)."""

    def hook(index: int) -> Any:
        def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
            del module, inputs
            if isinstance(output, tuple):
                return (change(index, output[0]), *output[1:])
            return change(index, output)

        return replace

    hooks = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
