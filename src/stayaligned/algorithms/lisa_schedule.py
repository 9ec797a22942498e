"""Lisa's settings, and what they prescribe for each optimizer step: its phase and its ρ (arXiv 2405.18641).

Imports no torch, so that a configuration is validated without it. The operations on weights are in `lisa.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stayaligned.core.errors import StayalignedError, did_you_mean

AnchorDevice = Literal["model", "cpu"]
"""Where copies of the weights are stored: on the model's device, or in main memory."""
ProximalMode = Literal["coupled", "decoupled"]
RhoSchedule = Literal["constant", "rising", "falling"]
StepBudget = Literal["shared", "cover"]
RunEnd = Literal["cycle", "alignment"]
AlignmentLossName = Literal["sft", "kl", "dpo"]


class Phase(StrEnum):
    """The two phases of bi-state optimization (the paper's "states")."""

    ALIGNMENT = "alignment"
    FINETUNING = "finetuning"


_NUMBERS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    float | None: (int | float | None, "a number or None"),
    bool: (bool, "True or False"),
}
"""Types of the settings that are no choices: what they accept, and how to say it."""
_FEW_CYCLES = 3
"""Number of cycles below which a run gets a note: on the testbed one cycle costs half of the accuracy, eight a few
points."""


@dataclass(frozen=True, kw_only=True)
class LisaSettings:
    """The hyper-parameters of one Lisa run, as the Trainer reads them.

    `stayaligned.defenses.lisa.Lisa` has the same fields for YAML, and documents each in detail.

    Raises:
        StayalignedError: if a value is out of range, or two settings contradict each other.
    """

    alignment_steps: int = 100
    """Number of optimizer steps in each alignment phase (K1)."""
    finetuning_steps: int = 900
    """Number of optimizer steps in each fine-tuning phase (K2)."""
    rho: float = 1.0
    """Strength of the proximal term (ρ); 0 is BSO, which stores no anchor."""
    proximal: ProximalMode = "coupled"
    """Whether the proximal term is part of the gradient, or a step of its own after the optimizer's."""
    proximal_warmup_ratio: float = 0.1
    """Share of all steps before the proximal term is switched on."""
    rho_schedule: RhoSchedule = "constant"
    """How ρ changes after the warm-up."""
    alignment_loss_budget: float | None = None
    """Rise of the alignment loss, in nats per token, above which ρ is doubled; None for a fixed ρ."""
    rho_ceiling: float = 100.0
    """Largest ρ that `alignment_loss_budget` may reach."""
    budget: StepBudget = "shared"
    """Whether alignment steps are taken from the steps of plain fine-tuning, or added to them."""
    finish: RunEnd = "cycle"
    """Whether the run ends where its last cycle ends, or with K1 alignment steps."""
    alignment_loss: AlignmentLossName = "sft"
    """Loss of the alignment phase."""
    dpo_beta: float = 0.1
    """β of DPO."""
    anchor_device: AnchorDevice = "model"
    """Where the anchor is stored."""
    drift_from_start: bool = False
    """Whether to log the distance to the initial weights."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _require_kind(name, kind, getattr(self, name))
        BiStateSchedule(self.alignment_steps, self.finetuning_steps)
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise StayalignedError(
                f"rho={self.rho:g} is not a strength of the proximal term", hint="Set rho to 0 or more; 0 is BSO."
            )
        if not 0 <= self.proximal_warmup_ratio <= 1:
            raise StayalignedError(
                f"proximal_warmup_ratio={self.proximal_warmup_ratio:g} is not a share of the steps",
                hint="Give a number from 0 to 1.",
            )
        if self.budget == "cover" and not self.finetuning_steps:
            raise StayalignedError(
                "budget='cover' trains on every user row, but finetuning_steps=0 takes none",
                hint="Set finetuning_steps, or budget='shared'.",
            )
        if self.finish == "alignment" and not self.alignment_steps:
            raise StayalignedError(
                "finish='alignment' ends the run with alignment steps, but alignment_steps=0 has none",
                hint="Set alignment_steps, or finish='cycle'.",
            )
        if self.alignment_loss_budget is None:
            return
        if not (self.rho and self.alignment_steps and self.finetuning_steps):
            raise StayalignedError(
                "alignment_loss_budget adapts rho once per cycle, which needs rho, alignment_steps and "
                "finetuning_steps above 0",
                hint="Set all three, or remove alignment_loss_budget.",
            )
        if self.rho_ceiling < self.rho:
            raise StayalignedError(
                f"rho_ceiling={self.rho_ceiling:g} is below rho={self.rho:g}", hint="Raise rho_ceiling, or lower rho."
            )

    def first_proximal_step(self, total_steps: int) -> int:
        """Return the first step with the proximal term: the one after the warm-up share, as in the published code."""
        return math.floor(self.proximal_warmup_ratio * total_steps) + 1

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> LisaSettings:
        """Return the settings of a mapping, as in YAML.

        Raises:
            StayalignedError: if a setting is unknown, of another type or out of range.
        """
        kinds = get_type_hints(cls)
        if unknown := sorted(given.keys() - kinds.keys()):
            hint = did_you_mean(unknown[0], list(kinds), "its settings")
            raise StayalignedError(f"lisa has no setting {unknown[0]!r}", hint=hint)
        for name, value in given.items():
            _require_kind(name, kinds[name], value)
        floats = {name for name, kind in kinds.items() if float in (kind, *get_args(kind))}
        read: dict[str, Any] = {k: float(v) if k in floats and v is not None else v for k, v in given.items()}
        return cls(**read)

    def schedule(self, total_steps: int) -> BiStateSchedule:
        """Return the schedule of a run of that many steps."""
        ends_aligned_at = total_steps if self.finish == "alignment" else None
        return BiStateSchedule(self.alignment_steps, self.finetuning_steps, ends_aligned_at)

    def require_finetuning(self, total_steps: int) -> None:
        """Check that a run of that many steps trains on the user's rows at all.

        Raises:
            StayalignedError: if it ends before its first fine-tuning step.
        """
        if not self.finetuning_steps or self.schedule(total_steps).steps_before(total_steps, Phase.FINETUNING):
            return
        alignment, finetuning = self._shorter_cycle(total_steps) or (1, 1)
        raise StayalignedError(
            f"a run of {total_steps} optimizer steps never trains on the user's rows: with "
            f"alignment_steps={self.alignment_steps} and finish={self.finish!r} all of them are alignment steps",
            hint=f"Set alignment_steps={alignment} and finetuning_steps={finetuning}, or train for more steps "
            f"(max_steps, num_train_epochs): {_FEW_CYCLES * (self.alignment_steps + self.finetuning_steps)} or more.",
        )

    def notes(self, total_steps: int) -> list[str]:
        """Return a note if a run of that many steps ends inside a cycle, and one if it has few cycles.

        The paper's result is the iterate after a full fine-tuning phase.
        """
        cycle = self.alignment_steps + self.finetuning_steps
        found: list[str] = []
        if not (self.alignment_steps and self.finetuning_steps):
            return found
        if self.finish == "cycle" and (rest := total_steps % cycle):
            found.append(
                f"a run of {total_steps} steps ends after {rest} of {cycle} steps of a cycle, which can change harm a "
                f"lot; max_steps={max(1, round(total_steps / cycle)) * cycle} completes the cycle"
            )
        if self.rho and total_steps < _FEW_CYCLES * cycle:
            shorter = self._shorter_cycle(total_steps)
            found.append(
                f"a run of {total_steps} steps has {total_steps / cycle:.1f} cycles of {cycle} steps: with so few the "
                "proximal term acts mostly towards the initial weights, which costs accuracy; "
                + (f"set alignment_steps={shorter[0]} and finetuning_steps={shorter[1]}, or " if shorter else "")
                + f"train for {_FEW_CYCLES * cycle} steps or more"
            )
        return found

    def _shorter_cycle(self, total_steps: int) -> tuple[int, int] | None:
        """Return K1 and K2 in about the same proportion, of which the run has enough cycles; None if there are none."""
        cycle, whole = total_steps // _FEW_CYCLES, self.alignment_steps + self.finetuning_steps
        if not 2 <= cycle < whole:
            return None
        alignment = min(max(round(cycle * self.alignment_steps / whole), 1), cycle - 1)
        return alignment, cycle - alignment

    def fingerprint(self, total_steps: int) -> dict[str, Any]:
        """Return the settings that must be equal for a resumed run of that many steps to be the same run."""
        proximal_term = {
            "proximal": self.proximal,
            "proximal_from_step": self.first_proximal_step(total_steps),
            "rho_schedule": self.rho_schedule
            if self.rho_schedule == "constant"
            else f"{self.rho_schedule} to {total_steps}",
            "alignment_loss_budget": self.alignment_loss_budget,
            "rho_ceiling": self.rho_ceiling,
        }
        return {
            "alignment_steps": self.alignment_steps,
            "finetuning_steps": self.finetuning_steps,
            "rho": self.rho,
            **(proximal_term if self.rho else {}),
            "budget": self.budget,
            "finish": self.finish if self.finish == "cycle" else f"alignment at {total_steps}",
            "alignment_loss": self.alignment_loss,
            **({"dpo_beta": self.dpo_beta} if self.alignment_loss == "dpo" else {}),
        }


def _require_kind(name: str, kind: Any, value: Any) -> None:
    """Check that a value is of a setting's type."""
    choices = get_args(kind)
    if get_origin(kind) is Literal and value not in choices:
        raise StayalignedError(f"{name}={value!r} is unknown", hint=f"Choose from: {', '.join(choices)}.")
    expected = _NUMBERS.get(kind)
    if expected and not (isinstance(value, expected[0]) and (kind is bool or not isinstance(value, bool))):
        raise StayalignedError(f"{name}={value!r} is not {expected[1]}", hint=f"Set {name} to {expected[1]}.")


@dataclass(frozen=True, slots=True)
class BiStateSchedule:
    """K1 steps on alignment data, then K2 steps on the user's data, repeated (Lisa, Algorithms 1 and 2).

    A step is an optimizer step. The published code counts micro-batches, so its phases switch in the middle of an
    accumulated gradient.

    Example:
        >>> schedule = BiStateSchedule(alignment_steps=1, finetuning_steps=2)
        >>> [str(schedule.phase_at(step)) for step in range(4)]
        ['alignment', 'finetuning', 'finetuning', 'alignment']

    Args:
        alignment_steps: K1; 0 leaves only the proximal term towards the initial weights.
        finetuning_steps: K2.
        ends_aligned_at: number of steps of the whole run, of which the last K1 are alignment steps regardless of
            the cycle. None ends the run where its last cycle ends, in the paper after a fine-tuning phase.

    Raises:
        StayalignedError: if a number of steps is negative or both are 0.
    """

    alignment_steps: int
    finetuning_steps: int
    ends_aligned_at: int | None = None

    def __post_init__(self) -> None:
        if min(self.alignment_steps, self.finetuning_steps) < 0 or self.cycle_steps == 0:
            raise StayalignedError(
                f"alignment_steps={self.alignment_steps} and finetuning_steps={self.finetuning_steps} are not a "
                "schedule: numbers of optimizer steps are 0 or more, and not both 0",
                hint="The paper uses 100 and 900.",
            )

    @property
    def cycle_steps(self) -> int:
        """K1 + K2."""
        return self.alignment_steps + self.finetuning_steps

    def _count_in_cycles(self, step: int) -> int:
        """Count the steps before `step` that precede the alignment steps which end the run."""
        return step if self.ends_aligned_at is None else min(step, max(0, self.ends_aligned_at - self.alignment_steps))

    def phase_at(self, step: int) -> Phase:
        """Return the phase of optimizer step `step` (counted from 0)."""
        aligned = step % self.cycle_steps < self.alignment_steps or self._count_in_cycles(step + 1) <= step
        return Phase.ALIGNMENT if aligned else Phase.FINETUNING

    def switches_at(self, step: int) -> bool:
        """Return whether `step` is the first of a phase that follows another phase."""
        return step > 0 and self.phase_at(step) != self.phase_at(step - 1)

    def steps_before(self, step: int, phase: Phase) -> int:
        """Count the steps 0 … `step - 1` that are in `phase`."""
        in_cycles = self._count_in_cycles(step)
        cycles, rest = divmod(in_cycles, self.cycle_steps)
        alignment = cycles * self.alignment_steps + min(rest, self.alignment_steps) + step - in_cycles
        return alignment if phase is Phase.ALIGNMENT else step - alignment

    def steps_to_cover(self, finetuning_steps: int) -> int:
        """Return the smallest number of consecutive steps that always includes that many fine-tuning steps.

        Args:
            finetuning_steps: the number of fine-tuning steps required, from any start; the schedule must have some.
        """
        return finetuning_steps + math.ceil(finetuning_steps / self.finetuning_steps) * self.alignment_steps


def rho_at(step: int, total_steps: int, *, rho: float, from_step: int, schedule: RhoSchedule) -> float:
    """Return ρ of one optimizer step: 0 before `from_step`, then constant, or linear over the remaining steps.

    The paper's ρ is constant. `rising` goes from 0 to ρ, `falling` from ρ to 0.

    Example:
        >>> [rho_at(step, 6, rho=1.0, from_step=2, schedule="rising") for step in range(6)]
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if step < from_step:
        return 0.0
    if schedule == "constant":
        return rho
    steps = max(total_steps - from_step, 1)
    share = (step - from_step + 1) / steps if schedule == "rising" else 1 - (step - from_step) / steps
    return rho * share


@dataclass(frozen=True, slots=True)
class LossBudget:
    """The rule by which ρ follows the alignment loss.

    Once per cycle, ρ is doubled if the mean alignment loss of the phase that ended is more than `rise` above that of
    the first alignment phase, and halved otherwise. It stays between the configured ρ and `ceiling` times that. The
    rule is that of the adaptive KL penalty of PPO (Schulman et al. 2017, §4), with the alignment loss instead of the
    divergence. Not from the Lisa paper.

    Example:
        >>> budget = LossBudget(rise=0.1, ceiling=8.0)
        >>> budget.next_factor(1.0, loss=0.5, first_loss=0.2), budget.next_factor(4.0, loss=0.25, first_loss=0.2)
        (2.0, 2.0)
    """

    rise: float
    """Allowed rise of the alignment loss, in nats per token."""
    ceiling: float
    """Largest factor by which ρ is multiplied."""

    def next_factor(self, factor: float, *, loss: float, first_loss: float) -> float:
        """Return what ρ is multiplied by in the next cycle, given `factor` in the current one."""
        return min(2 * factor, self.ceiling) if loss > first_loss + self.rise else max(factor / 2, 1.0)
