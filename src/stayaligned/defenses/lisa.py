"""Lisa: lazy safety alignment, during fine-tuning (Huang et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer


_FEW_CYCLES = 3
"""Below it a run is noted: one cycle costs half of the accuracy on the testbed, eight a few points."""


class Lisa(TrainingDefense):
    """Alternate between safety data and user data, each state pulled to the weights at which it began.

    In turn K1 optimizer steps on f (alignment loss) and K2 on h (the user's loss), each with a proximal term
    (Algorithm 2, equation 2):

        min f(w) + ρ/2·‖w − w_t‖²,    min h(w) + ρ/2·‖w − w̃_{t+1}‖²

    Differs from the published code: a step is an optimizer step, not a micro-batch; user rows are not drawn and
    thrown away during alignment steps; the proximal term is in no logged loss. `docs/paper_index.md` has the list.

    Not to be confused with layerwise importance sampling (LISA), an optimizer.
    """

    name: ClassVar[str] = "lisa"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.18641"
    needs_alignment_data: ClassVar[bool] = True

    alignment_steps: int = Field(default=100, ge=0)
    """K1, optimizer steps in the alignment state; 0 leaves the pull to the initial weights alone."""
    finetuning_steps: int = Field(default=900, ge=0)
    """K2, optimizer steps in the fine-tuning state."""
    rho: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """ρ, strength of the pull; 0 is BSO and needs no memory for an anchor."""
    proximal: Literal["coupled", "decoupled"] = "coupled"
    """`coupled`: ρ(w − anchor) is added to the gradient, and the optimizer sees both (the paper).
    `decoupled`: after the optimizer's step w ← w − lr·ρ·(w − anchor), as AdamW decays weights. ρ then lives on the
    scale of 1 / learning rate. Not from the paper."""
    proximal_warmup_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the steps before the pull sets in. In the published code and in its figures, not in the paper's text."""
    rho_schedule: Literal["constant", "rising", "falling"] = "constant"
    """`rising` from 0 to ρ or `falling` from ρ to 0 over the steps after the warm-up. Not from the paper."""
    alignment_loss_budget: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    """Rise of the alignment loss, in nats a token, over that of the first alignment state. While it is exceeded ρ is
    doubled from cycle to cycle, and else halved, between `rho` and `rho_ceiling`. Not from the paper."""
    rho_ceiling: float = Field(default=100.0, gt=0.0, allow_inf_nan=False)
    """What `alignment_loss_budget` raises ρ to at most."""
    budget: Literal["shared", "cover"] = "shared"
    """`shared`: as many steps as plain fine-tuning of the user's rows, alignment steps included (the paper's count).
    `cover`: enough steps that after e epochs every user row has been drawn at least e times.
    Where the training settings name `max_steps`, that many are taken either way."""
    finish: Literal["cycle", "alignment"] = "cycle"
    """`cycle`: the run ends where its last cycle is, in the paper after a fine-tuning state.
    `alignment`: its last K1 steps are alignment steps, taken out of the fine-tuning ones."""
    alignment_loss: Literal["sft", "kl", "dpo"] = "sft"
    """`sft`: cross-entropy of the safe answers (the paper). `kl`: divergence from the model without its adapter on
    them. `dpo`: DPO on rows with `prompt`, `chosen` and `rejected`, which needs the trl extra."""
    dpo_beta: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    """β of DPO."""
    anchor_device: Literal["model", "cpu"] = "model"
    """`cpu` keeps the anchor in the host's memory, which costs the accelerator no memory and some time a step."""
    drift_from_start: bool = False
    """Log the distance to the initial weights too, for the memory of one more copy."""

    @model_validator(mode="after")
    def _fits_together(self) -> Lisa:
        if self.alignment_steps + self.finetuning_steps == 0:
            raise ValueError("alignment_steps and finetuning_steps are both 0; give optimizer steps to one of them")
        if self.budget == "cover" and self.finetuning_steps == 0:
            raise ValueError("budget='cover' asks for every user row, but finetuning_steps=0 takes none")
        if self.finish == "alignment" and self.alignment_steps == 0:
            raise ValueError("finish='alignment' ends the run with alignment steps, but alignment_steps=0 has none")
        adapts = self.alignment_loss_budget is not None
        if adapts and not (self.rho and self.alignment_steps and self.finetuning_steps):
            raise ValueError(
                "alignment_loss_budget adapts rho once a cycle; give rho, alignment_steps and finetuning_steps"
            )
        if adapts and self.rho_ceiling < self.rho:
            raise ValueError(f"rho_ceiling={self.rho_ceiling:g} is below rho={self.rho:g}")
        return self

    def notes(self, steps: int) -> list[str]:
        """Whether the run ended inside a cycle, or had too few of them."""
        cycle = self.alignment_steps + self.finetuning_steps
        found = [] if self.finish == "alignment" else cycle_notes(self.alignment_steps, self.finetuning_steps, steps)
        if self.rho and self.alignment_steps and self.finetuning_steps and steps < _FEW_CYCLES * cycle:
            found.append(
                f"the run had {steps / cycle:.1f} cycles of {cycle} steps: with so few the pull is nearly always to "
                "the first weights, which costs accuracy; shorten alignment_steps and finetuning_steps alike"
            )
        return found

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """A trainer of the setup's kind with Lisa in it."""
        from stayaligned.hf.training.lisa.trainer import attach_lisa

        trainer = setup.trainer()
        if self.alignment_steps and self.alignment_loss == "dpo":
            return attach_lisa(trainer, lisa=self, alignment_trainer=setup.preference_trainer(self.name, self.dpo_beta))
        alignment = setup.alignment_dataset(self.name) if self.alignment_steps else None
        return attach_lisa(trainer, alignment_dataset=alignment, lisa=self)


def cycle_notes(alignment_steps: int, finetuning_steps: int, steps: int) -> list[str]:
    """A note where a run ended inside a cycle: the paper's result is the iterate after a whole fine-tuning state."""
    cycle = alignment_steps + finetuning_steps
    if not alignment_steps or not finetuning_steps or steps % cycle == 0:
        return []
    nearest = max(1, round(steps / cycle)) * cycle
    return [
        f"the run ended after {steps % cycle} of {cycle} steps of a cycle, which can change harm a lot; "
        f"max_steps={nearest} makes it whole"
    ]
