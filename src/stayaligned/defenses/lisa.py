"""Lisa: lazy safety alignment, during fine-tuning (Huang et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from stayaligned.algorithms.lisa_schedule import (
    AlignmentLossName,
    AnchorDevice,
    LisaSettings,
    ProximalMode,
    RhoSchedule,
    RunEnd,
    StepBudget,
)
from stayaligned.core.errors import StayalignedError
from stayaligned.core.extras import EXTRAS
from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer


class Lisa(TrainingDefense):
    """Alternate between alignment and user data, with a proximal term (Lisa).

    In turn K1 optimizer steps on f (alignment loss) and K2 on h (the user's loss), each with a proximal term
    (Algorithm 2, equation 2):

        min f(w) + ρ/2·‖w − w_t‖²,    min h(w) + ρ/2·‖w − w̃_{t+1}‖²

    Differences from the published code: a step is an optimizer step, not a micro-batch; user rows are not drawn and
    discarded during alignment steps; the proximal term is in no logged loss. `docs/concepts/paper_index.md` lists all
    of them.

    Not to be confused with layerwise importance sampling (LISA), an optimizer.
    """

    name: ClassVar[str] = "lisa"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.18641"
    needs_alignment_data: ClassVar[bool] = True

    alignment_steps: int = Field(default=100, ge=0)
    """Number of optimizer steps in each alignment phase (K1); 0 leaves only the proximal term towards the initial
    weights."""
    finetuning_steps: int = Field(default=900, ge=0)
    """Number of optimizer steps in each fine-tuning phase (K2)."""
    rho: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Strength of the proximal term (ρ); 0 is BSO, which needs no memory for an anchor."""
    proximal: ProximalMode = "coupled"
    """`coupled`: ρ(w − anchor) is added to the gradient before the optimizer's step (the paper).
    `decoupled`: after the optimizer's step w ← w − lr·ρ·(w − anchor), as AdamW decays weights; ρ is then on the scale
    of 1 / learning rate. Not from the paper."""
    proximal_warmup_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of all steps before the proximal term is switched on. In the published code and in the paper's figures, but
    not in its text."""
    rho_schedule: RhoSchedule = "constant"
    """`rising` from 0 to ρ, or `falling` from ρ to 0, over the steps after the warm-up. Not from the paper."""
    alignment_loss_budget: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    """Allowed rise of the alignment loss above that of the first alignment phase, in nats per token. After each cycle ρ
    is doubled if the rise is exceeded and halved if not, between `rho` and `rho_ceiling`. Not from the paper."""
    rho_ceiling: float = Field(default=100.0, gt=0.0, allow_inf_nan=False)
    """Largest ρ that `alignment_loss_budget` may reach."""
    budget: StepBudget = "shared"
    """`shared`: as many steps as plain fine-tuning on the user's rows, including the alignment steps (the paper).
    `cover`: enough steps that after e epochs every user row has been drawn at least e times.
    If the training settings have `max_steps`, that number of steps is taken in both cases."""
    finish: RunEnd = "cycle"
    """`cycle`: the run ends where its last cycle ends, in the paper after a fine-tuning phase.
    `alignment`: the last K1 steps of the run are alignment steps, which replace fine-tuning steps."""
    alignment_loss: AlignmentLossName = "sft"
    """`sft`: cross-entropy of the safe completions (the paper). `kl`: divergence from the model without its adapter on
    these completions. `dpo`: DPO on rows with `prompt`, `chosen` and `rejected`, which needs the trl extra."""
    dpo_beta: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    """β of DPO, for `alignment_loss: dpo`."""
    anchor_device: AnchorDevice = "model"
    """Where the anchor is stored. `cpu` uses main memory instead of the accelerator's, and takes some time per step."""
    drift_from_start: bool = False
    """Whether to log the distance to the initial weights too, which needs memory for one more copy of the weights."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        try:
            self.settings()
        except StayalignedError as error:
            raise ValueError(error.message) from None
        return self

    def settings(self) -> LisaSettings:
        """Return the settings in the form that `attach_lisa` and `with_lisa` take."""
        return LisaSettings(**{field.name: getattr(self, field.name) for field in fields(LisaSettings)})

    def packages(self) -> Sequence[str]:
        """Return TRL's package for DPO."""
        return EXTRAS["trl"] if self.alignment_loss == "dpo" else ()

    def notes(self, steps: int) -> list[str]:
        """Return a note if the run ended inside a cycle, and one if it had few cycles."""
        return self.settings().notes(steps)

    def check_steps(self, steps: int) -> None:
        """Refuse a run that ends before its first fine-tuning step."""
        self.settings().require_finetuning(steps)

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind that trains with Lisa."""
        from stayaligned.hf.training.lisa.trainer import attach_lisa

        trainer, settings = setup.trainer(), self.settings()
        if self.alignment_steps and self.alignment_loss == "dpo":
            preference_trainer = setup.preference_trainer(self.name, self.dpo_beta)
            return attach_lisa(trainer, lisa=settings, alignment_trainer=preference_trainer)
        alignment = setup.alignment_dataset(self.name) if self.alignment_steps else None
        return attach_lisa(trainer, lisa=settings, alignment_dataset=alignment)
