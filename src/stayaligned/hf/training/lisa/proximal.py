"""The pull of one run: its anchor, how strong it is at each step, and where it is applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from stayaligned.algorithms.lisa import (
    Anchor,
    Device,
    LossBudget,
    Phase,
    RhoSchedule,
    add_proximal_gradient_,
    drift,
    proximal_step_,
    rho_at,
    take_anchor,
)
from stayaligned.hf.training.lisa.checkpoints import ANCHOR, START
from stayaligned.hf.training.weight_files import read_weights, weights_file, write_weights


class LisaSettings(Protocol):
    """What the Trainer reads of `stayaligned.Lisa`."""

    @property
    def alignment_steps(self) -> int: ...  # noqa: D102
    @property
    def finetuning_steps(self) -> int: ...  # noqa: D102
    @property
    def rho(self) -> float: ...  # noqa: D102
    @property
    def proximal(self) -> Literal["coupled", "decoupled"]: ...  # noqa: D102
    @property
    def proximal_warmup_ratio(self) -> float: ...  # noqa: D102
    @property
    def rho_schedule(self) -> RhoSchedule: ...  # noqa: D102
    @property
    def alignment_loss_budget(self) -> float | None: ...  # noqa: D102
    @property
    def rho_ceiling(self) -> float: ...  # noqa: D102
    @property
    def budget(self) -> Literal["shared", "cover"]: ...  # noqa: D102
    @property
    def finish(self) -> Literal["cycle", "alignment"]: ...  # noqa: D102
    @property
    def alignment_loss(self) -> Literal["sft", "kl", "dpo"]: ...  # noqa: D102
    @property
    def dpo_beta(self) -> float: ...  # noqa: D102
    @property
    def anchor_device(self) -> Device: ...  # noqa: D102
    @property
    def drift_from_start(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Run:
    """What the pull needs to know of the run that it is part of."""

    total_steps: int
    rank: int
    processes: int
    writes: bool
    """Whether this process writes what all processes hold alike."""
    output_dir: Path


class Pull:
    """ρ, the anchor it pulls to, and what both have become in the course of a run."""

    def __init__(self, settings: LisaSettings, run: Run) -> None:
        self._settings, self._run = settings, run
        self._params: Mapping[str, Tensor] = {}
        self._anchor: Anchor | None = None
        self._start: Anchor | None = None
        self._hook: Any = None
        self._factor = 1.0  # what an adaptive pull multiplies ρ by
        self._first_loss: float | None = None
        self._state_loss, self._state_steps = 0.0, 0

    # ---- the course of a run -----------------------------------------------------------------------------------

    def begin_run(self, params: Mapping[str, Tensor], optimizer: Any, step: Callable[[], int]) -> None:
        """Take the weights as they are now for the first anchor."""
        self._enter(params, optimizer, step)
        if self._settings.rho:
            self._anchor = take_anchor(params, device=self._settings.anchor_device)
        if self._settings.drift_from_start:
            self._start = take_anchor(params, device=self._settings.anchor_device)
            self._write(self._run.output_dir, START, self._start)

    def resume_run(
        self, params: Mapping[str, Tensor], optimizer: Any, step: Callable[[], int], checkpoint: Path, progress: Any
    ) -> None:
        """Go on with the anchor of a checkpoint.

        Raises:
            StayalignedError: if it is missing, damaged or of another model.
        """
        self._enter(params, optimizer, step)
        if self._settings.rho:
            self._anchor = self._read(checkpoint, ANCHOR)
        if self._settings.drift_from_start:
            self._start = self._read(checkpoint.parent, START)
            self._write(self._run.output_dir, START, self._start)  # it may be another than the checkpoint's
        self._factor = float(progress.get("factor", 1.0))
        self._first_loss = progress.get("first_loss")
        self._state_loss, self._state_steps = progress.get("state_loss", 0.0), progress.get("state_steps", 0)

    def begin_state(self, phase: Phase) -> None:
        """Take the weights as they are now for the anchor of the state that begins."""
        if phase is Phase.FINETUNING:
            self._adapt()
        if self._anchor is not None:
            self._anchor = take_anchor(self._params, device=self._settings.anchor_device, into=self._anchor)

    def end_run(self) -> None:
        """Leave the optimizer as it was."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _enter(self, params: Mapping[str, Tensor], optimizer: Any, step: Callable[[], int]) -> None:
        self._params = params
        if not self._settings.rho or self._settings.proximal == "coupled":
            return

        # Not a callback of the host: those are called too where a gradient scaler has skipped the step.
        def after_step(stepped: torch.optim.Optimizer, *_: object) -> None:
            if self._anchor is not None and (rho := self.rho_at(step())):
                proximal_step_(self._params, self._anchor, rho, _learning_rates(stepped, self._params))

        self._hook = optimizer.register_step_post_hook(after_step)

    # ---- the pull itself ---------------------------------------------------------------------------------------

    def rho_at(self, step: int) -> float:
        """ρ of one optimizer step."""
        total, settings = self._run.total_steps, self._settings
        rho = rho_at(
            step, total, rho=settings.rho, from_step=first_pulled_step(settings, total), schedule=settings.rho_schedule
        )
        return rho * self._factor

    def add_gradient(self, step: int, scale: float) -> None:
        """Add the proximal gradient, where the pull is coupled to the optimizer."""
        if self._anchor is not None and self._settings.proximal == "coupled" and (rho := self.rho_at(step)):
            add_proximal_gradient_(self._params, self._anchor, rho, scale=scale)

    def observe(self, phase: Phase, loss: float) -> None:
        """Take note of the loss of an alignment step, mean over all processes."""
        if phase is Phase.ALIGNMENT:
            self._state_loss, self._state_steps = self._state_loss + loss, self._state_steps + 1

    def _adapt(self) -> None:
        """Set the strength for the next cycle by the alignment state that has ended."""
        if self._settings.alignment_loss_budget is None or not self._state_steps:
            return
        loss = self._state_loss / self._state_steps
        self._state_loss, self._state_steps = 0.0, 0
        self._first_loss = first = loss if self._first_loss is None else self._first_loss
        ceiling = max(self._settings.rho_ceiling / self._settings.rho, 1.0)
        budget = LossBudget(rise=self._settings.alignment_loss_budget, ceiling=ceiling)
        self._factor = budget.next_factor(self._factor, loss=loss, first_loss=first)

    def progress(self) -> dict[str, Any]:
        """What a resumed run must know besides the anchor."""
        return {
            "factor": self._factor,
            "first_loss": self._first_loss,
            "state_loss": self._state_loss,
            "state_steps": self._state_steps,
        }

    def measures(self) -> dict[str, float]:
        """How far the weights are from the anchor and from the start, and ρ where it is adaptive."""
        found: dict[str, float] = {}
        if self._anchor is not None:
            found["drift"] = drift(self._params, self._anchor).item()
        if self._start is not None:
            found["drift_from_start"] = drift(self._params, self._start).item()
        if self._settings.alignment_loss_budget is not None:
            found["rho"] = self._settings.rho * self._factor
        return found

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Write the anchor into a checkpoint."""
        if self._anchor is not None:
            self._write(checkpoint, ANCHOR, self._anchor)

    def _write(self, directory: Path, name: str, weights: Anchor) -> None:
        file = self._file(name)
        if self._run.writes or file != f"{name}.safetensors":
            write_weights(directory / file, weights)

    def _read(self, directory: Path, name: str) -> Anchor:
        return read_weights(directory / self._file(name), self._params, device=self._settings.anchor_device)

    def _file(self, name: str) -> str:
        return weights_file(name, self._params, rank=self._run.rank, processes=self._run.processes)


def first_pulled_step(settings: LisaSettings, total_steps: int) -> int:
    """The first step with the pull: the first after that share of all steps, as in the published code."""
    return math.floor(settings.proximal_warmup_ratio * total_steps) + 1


def _learning_rates(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> dict[str, float]:
    """By name; 0 where the optimizer does not have the weight, and so never moves it away from the anchor."""
    rates = {id(param): float(group["lr"]) for group in optimizer.param_groups for param in group["params"]}
    return {name: rates.get(id(param), 0.0) for name, param in params.items()}
