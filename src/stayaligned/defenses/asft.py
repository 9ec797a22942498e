"""AsFT: fine-tuning anchored to the alignment direction (Yang and others, AAAI 2026)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.hf.training.objective import ObjectiveRun


class AsFT(TrainingDefense):
    """Penalize the part of each update outside the change from base to aligned (AsFT).

        L = CE(user's rows) + λ·Σ_layers ‖(I − C)·sBA‖²,    C = VVᵀ/‖V‖_F,  V = W_aligned − W_base

    Not Anchored SFT, which other libraries call ASFT: that is `kl`. C is Safe LoRA's, which is not a projector:
    its largest eigenvalue is σ₁²/‖V‖_F, mostly far below 1, and the penalty then is nearly λ‖BA‖².
    `operator: orthogonal` has C = UUᵀ with V's leading directions U, as the text describes it.
    Differences: C·B is computed as V(VᵀB), without a matrix of out × out; the LoRA's factor s belongs to the update;
    the term is added once per optimizer step, where the code adds it to every micro-batch. λ = 1 is of the published
    script for GSM8K. A layer where V is 0 has C = 0.

    Cost: V of the adapted layers in memory, as much as their weights in fp32 (`orthogonal`: k columns), and two thin
    products per layer and step. Control: `operator: none`, with C = 0, a penalty on the size of the update.
    """

    name: ClassVar[str] = "asft"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.08473"
    needs_base: ClassVar[bool] = True

    strength: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Weight of the penalty (λ); 0 is plain fine-tuning."""
    operator: Literal["scaled_gram", "orthogonal", "none"] = "scaled_gram"
    """`scaled_gram`: C = VVᵀ/‖V‖_F (the published code). `orthogonal`: the projector on V's k leading directions.
    `none`: C = 0, the control."""
    rank: int | None = Field(default=None, ge=1)
    """Number k of V's leading directions, for `operator: orthogonal`."""

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        if (self.rank is not None) != (self.operator == "orthogonal"):
            raise ValueError("set `rank` with `operator: orthogonal`, and only then")
        return self

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind that adds the gradient of the penalty to each step.

        Raises:
            StayalignedError: if there is no base or no plain LoRA, or the training is not supported.
        """
        import torch

        from stayaligned.algorithms.objectives import outside_norm
        from stayaligned.defenses import Execution
        from stayaligned.defenses.patching.sources import open_source
        from stayaligned.hf.placement.in_memory import active_adapter, adapter_in_memory
        from stayaligned.hf.training.objective import Objective, attach_objective
        from stayaligned.hf.training.reference import plain_lora_layers, require_reference

        models, model = setup.require_base(self.name), setup.model
        require_reference(model, f"defense {self.name!r}")
        plain_lora_layers(model, self.name)
        source = open_source(models, self.name)
        adapter = active_adapter(model)  # pyright: ignore
        layers, _ = source.layers_of(adapter_in_memory(model, adapter))  # pyright: ignore
        trainer = setup.trainer()
        device = trainer.args.device
        roots = dict(source.visit([layer.name for layer in layers], self._root, Execution()))

        def penalty(run: ObjectiveRun) -> Tensor:
            terms: list[Tensor] = []
            for layer in layers:
                a, b = (
                    run.params[key.removesuffix(".weight") + f".{adapter}.weight"] for key in (layer.a_key, layer.b_key)
                )
                terms.append(outside_norm(a, b, roots[layer.name]) * layer.scaling**2)
            return self.strength * torch.stack(terms).sum()

        roots = {name: root.to(device) for name, root in roots.items()}
        return attach_objective(trainer, Objective(self.name, penalty=penalty if self.strength else None))

    def _root(self, name: str, delta: AlignmentDelta) -> Tensor:
        """Return R with C = RRᵀ."""
        from stayaligned.algorithms.alignment_delta import FullDelta

        del name
        if not isinstance(delta, FullDelta):
            raise TypeError(f"{type(delta).__name__} is not read from two checkpoints")
        if self.operator == "none" or not delta.norm:
            return delta.matrix[:, :0].clone()
        if self.operator == "orthogonal":
            return delta.subspace(rank=self.rank).left.clone()
        return delta.matrix / delta.norm**0.5
