"""SBR: safety bottleneck regularization, anchored at the last hidden state (Lu and others, ICML 2026)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from stayaligned.hf.training.objective import ObjectiveRun


class Sbr(TrainingDefense):
    """Hold the last hidden state of a few harmful requests where it was (SBR).

        L = CE(user's rows) + α·MSE(h(anchors), h_aligned(anchors))

    h is the output of the last layer, before the head, at the last token of the prompt, which decides how an answer
    begins; MSE is the mean over anchors and dimensions. The anchors are the requests of the first alignment rows.
    α = 50 is of the published code, which has eight anchors, of its own; the paper finds one enough. The code also
    trains at a rate of 1e-5 for 20 epochs, which is left to `training` here. The gradient of the term is added once per
    optimizer step, which is the code's mean over micro-batches.

    Cost: a forward and backward pass of the anchors in each step. Controls: `safety_kl` with
    `alignment_rows_per_step: 1`, and `mixing`.
    """

    name: ClassVar[str] = "sbr"
    paper: ClassVar[str] = "https://arxiv.org/abs/2605.05995"
    needs_alignment_data: ClassVar[bool] = True

    alpha: float = Field(default=50.0, ge=0.0, allow_inf_nan=False)
    """Weight of the term (α); 0 is plain fine-tuning."""
    anchors: int = Field(default=1, ge=1)
    """Number of anchors: the requests of this many alignment rows, from the first."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind that adds the gradient of the term to each step.

        Raises:
            StayalignedError: if there are fewer alignment rows than anchors, or the training is not supported.
        """
        import torch
        from torch.nn.functional import mse_loss

        from stayaligned.hf.features import encode_prompt
        from stayaligned.hf.training.objective import Objective, attach_objective
        from stayaligned.hf.training.reference import adapter_names, as_reference, evaluating, require_unchanged_base

        setup.require_alignment_examples(self.name)
        require_unchanged_base(setup.model, f"defense {self.name!r}")
        rows = setup.alignment_examples[: self.anchors]
        if len(rows) < self.anchors:
            raise StayalignedError(
                f"defense 'sbr' needs {self.anchors} anchors, but there are {len(rows)} alignment rows",
                hint="Add rows to `alignment_data:`, or lower anchors.",
            )
        trainer = setup.trainer()
        prompts = [
            torch.tensor([encode_prompt(setup.tokenizer, row.prompt)], device=trainer.args.device) for row in rows
        ]

        def last_states(model: object) -> Tensor:
            return torch.cat([_last_state(model, prompt) for prompt in prompts])

        model = trainer.model
        with torch.no_grad(), as_reference(model) if adapter_names(model) else evaluating(model):
            aligned = last_states(model)

        def penalty(run: ObjectiveRun) -> Tensor:
            return self.alpha * mse_loss(last_states(run.model).float(), aligned.float())

        return attach_objective(trainer, Objective(self.name, penalty=penalty if self.alpha else None))


def _last_state(model: object, prompt: Tensor) -> Tensor:
    made = model(input_ids=prompt, output_hidden_states=True, use_cache=False)  # type: ignore[operator]
    return made.hidden_states[-1][:, -1]
