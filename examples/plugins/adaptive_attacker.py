"""An attacker who knows that `complement` will be applied, and trains under the same projection.

    stayaligned bench studies/safe_lora_adaptive.yaml --plugin examples/plugins/adaptive_attacker.py --out adaptive

The patch `complement` removes the part of an update that lies in the leading directions of V = W_aligned - W_base. An
attacker who fine-tunes on poisoned rows and has both checkpoints can keep the update out of these directions from the
start. Then the patch finds nothing to remove, and harm that was learned outside these directions stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from stayaligned import StayalignedError, TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer

    from stayaligned.algorithms.safe_lora import Operator


class ProjectedTraining(TrainingDefense):
    """Fine-tune so that a later `complement` with the same rank and side changes nothing; not a defense.

    Projected gradient descent on the LoRA factors: after every optimizer step B ← (I - U_k U_kᵀ) B and
    A ← A (I - Q_k Q_kᵀ), with V's k leading directions. Adam's moments may point into these directions; the projection
    removes what a step adds there.
    """

    name: ClassVar[str] = "projected_training"

    base_model: str
    """The base model (directory or hub id); the aligned model is the one that is trained."""
    rank: int = Field(default=8, ge=1)
    """Rank k of the complement that the attacker expects."""
    side: Literal["left", "right", "both"] = "both"
    """Side of the complement that the attacker expects."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Return the setup's own trainer, with the projection after every optimizer step.

        Raises:
            StayalignedError: if the full weights are trained, or a LoRA layer is not linear.
        """
        from transformers import TrainerCallback

        trainer = setup.trainer()
        layers = _known_layers(setup.model, self)  # after the trainer, which moves the model to its device

        class Projected(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                _project(layers)

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                _project(layers)

        trainer.add_callback(Projected())
        return trainer


class _KnownLayer(NamedTuple):
    a: Any
    """The parameter A, shape (rank, in)."""
    b: Any
    """The parameter B, shape (out, rank)."""
    operator: Operator
    """The operator that the patch would apply to this layer."""


def _known_layers(model: Any, attacker: ProjectedTraining) -> list[_KnownLayer]:
    from peft.tuners.lora import LoraLayer

    from stayaligned import Complement
    from stayaligned.algorithms.alignment_delta import FullDelta
    from stayaligned.hf.models import load_model

    patch = Complement(rank=attacker.rank, side=attacker.side)
    named = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not named:
        raise StayalignedError(
            "projected_training projects LoRA factors, and this experiment trains the full weights",
            hint="Set `lora:`, or use the training defense `sft`.",
        )
    base = load_model(attacker.base_model)
    known: list[_KnownLayer] = []
    for name, module in named.items():
        (adapter,) = module.active_adapters
        if adapter not in module.lora_A:
            raise StayalignedError(
                f"projected_training: {name} is not a linear layer", hint="Target linear layers only."
            )
        ancestor = base.get_submodule(name.removeprefix("base_model.model.")).weight
        aligned = module.get_base_layer().weight
        delta = aligned.detach().float() - ancestor.detach().to(aligned.device).float()
        operator = patch.operator_for(FullDelta.from_matrix((delta.T if module.fan_in_fan_out else delta).contiguous()))
        known.append(_KnownLayer(module.lora_A[adapter].weight, module.lora_B[adapter].weight, operator))
    return known


def _project(layers: list[_KnownLayer]) -> None:
    import torch

    with torch.no_grad():
        for a, b, operator in layers:
            a.copy_(operator.map_inputs(a))
            b.copy_(operator.map_outputs(b))
