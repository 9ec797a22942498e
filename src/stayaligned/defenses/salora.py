"""SaLoRA: a LoRA whose update can't reach the features of safe answers (Li and others, ICLR 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer

    from stayaligned.hf.training.objective import ObjectiveRun


class SaLoRA(TrainingDefense):
    """Train a LoRA outside the directions of the model's outputs on safe answers.

        ΔW = (I − U_s U_sᵀ)·sBA,    U_s = the r_s leading left singular vectors of W X_safe

    with X_safe the layer's inputs at the tokens of the alignment rows' answers. The projection is applied to the
    output of B while training, and becomes a part of B at the end, so that a plain adapter is saved.
    Left out: the paper's second part, an initialization of A and B by W's singular vectors and the task's features. It
    changes the frozen weights, so that the saved adapter would need twice the rank; A and B start as LoRA's here.
    Differences: U_s is of the Gram matrix of all answer tokens, exactly, where the code samples it; 32 directions
    are those of its script, for models with 4096 outputs in a layer.

    Cost: one pass over the alignment rows and one out × out matrix per layer before training; two thin products per
    layer while training. Control: `random: true`, as many random directions.
    """

    name: ClassVar[str] = "salora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.01765"
    needs_alignment_data: ClassVar[bool] = True

    safety_rank: int = Field(default=32, ge=1)
    """Number r_s of directions that the update can't reach, in every adapted layer."""
    random: bool = False
    """Whether the directions are random: the control."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind, with the projection in the model's adapter.

        Raises:
            StayalignedError: if there are no alignment rows, no plain LoRA, a layer with too few outputs, or the
                training is not supported.
        """
        import torch

        from stayaligned.algorithms.alignment_delta import random_frame
        from stayaligned.hf.training.objective import Objective, attach_objective
        from stayaligned.hf.training.reference import output_grams, plain_lora_layers, require_reference

        setup.require_alignment_examples(self.name)
        require_reference(setup.model, f"defense {self.name!r}")
        layers = plain_lora_layers(setup.model, self.name)
        for name, layer in layers.items():
            if layer.factor.out_features <= self.safety_rank:
                raise StayalignedError(
                    f"defense 'salora': {name} has {layer.factor.out_features} outputs, and safety_rank="
                    f"{self.safety_rank} directions of them would leave nothing to train",
                    hint="Lower safety_rank, or adapt other layers.",
                )
        trainer = setup.trainer()
        rows = setup.alignment_rows(trainer, self.name)
        grams = output_grams(setup.model, layers, rows.all_rows(trainer, setup.model))
        frames = {name: torch.linalg.eigh(gram).eigenvectors[:, -self.safety_rank :] for name, gram in grams.items()}
        if self.random:
            generator = torch.Generator().manual_seed(trainer.args.seed)
            frames = {
                name: random_frame(len(frame), frame.shape[1], generator).to(frame) for name, frame in frames.items()
            }
        frames = {name: frame.to(layers[name].factor.weight.dtype) for name, frame in frames.items()}
        for name, layer in layers.items():
            layer.project(frames[name])

        def fold(run: ObjectiveRun) -> None:
            del run
            for name, layer in layers.items():
                weight, frame = layer.factor.weight, frames[name].to(layer.factor.weight)
                weight.sub_(frame @ (frame.T @ weight))

        return attach_objective(trainer, Objective(self.name, finish=fold))
