"""The proximal term during one run: its anchor, its strength at each step, and where it is applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stayaligned.algorithms.lisa import Anchor, add_proximal_gradient_, drift, proximal_step_, take_anchor
from stayaligned.algorithms.lisa_schedule import LisaSettings, LossBudget, Phase, rho_at
from stayaligned.hf.training.lisa.checkpoints import ANCHOR, START
from stayaligned.hf.training.weight_files import read_weights, weights_file, write_weights


@dataclass(frozen=True)
class RunContext:
    """The facts about a training run that the proximal term depends on."""

    total_steps: int
    rank: int
    processes: int
    writes: bool
    """Whether this process writes the files that are the same in all processes."""
    output_dir: Path


class ProximalTerm:
    """The proximal term of one run: ρ, the anchor, and their state as training proceeds."""

    def __init__(self, settings: LisaSettings, run: RunContext) -> None:
        self._settings, self._run = settings, run
        self._params: Mapping[str, Tensor] = {}
        self._anchor: Anchor | None = None
        self._start: Anchor | None = None
        self._hook: Any = None
        self._factor = 1.0  # by which an adaptive term multiplies ρ
        self._first_loss: float | None = None
        self._phase_loss, self._phase_steps = 0.0, 0

    # ---- the course of a run -----------------------------------------------------------------------------------

    def begin_run(self, params: Mapping[str, Tensor], optimizer: Any, step: Callable[[], int]) -> None:
        """Take the current weights as the first anchor."""
        self._attach(params, optimizer, step)
        if self._settings.rho:
            self._anchor = take_anchor(params, device=self._settings.anchor_device)
        if self._settings.drift_from_start:
            self._start = take_anchor(params, device=self._settings.anchor_device)
            self._write(self._run.output_dir, START, self._start)

    def resume_run(
        self, params: Mapping[str, Tensor], optimizer: Any, step: Callable[[], int], checkpoint: Path, progress: Any
    ) -> None:
        """Load the anchor and the progress of a checkpoint.

        Raises:
            StayalignedError: if the anchor is missing, damaged or of another model.
        """
        self._attach(params, optimizer, step)
        if self._settings.rho:
            self._anchor = self._read(checkpoint, ANCHOR)
        if self._settings.drift_from_start:
            self._start = self._read(checkpoint.parent, START)
            self._write(self._run.output_dir, START, self._start)  # the output directory may have changed
        self._factor = float(progress.get("factor", 1.0))
        self._first_loss = progress.get("first_loss")
        self._phase_loss, self._phase_steps = progress.get("state_loss", 0.0), progress.get("state_steps", 0)

    def begin_phase(self, phase: Phase) -> None:
        """Take the current weights as the anchor of the phase that begins."""
        if phase is Phase.FINETUNING:
            self._adapt_rho()
        if self._anchor is not None:
            self._anchor = take_anchor(self._params, device=self._settings.anchor_device, into=self._anchor)

    def end_run(self) -> None:
        """Remove the hook from the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _attach(self, params: Mapping[str, Tensor], optimizer: Any, step: Callable[[], int]) -> None:
        self._params = params
        if not self._settings.rho or self._settings.proximal == "coupled":
            return

        # Not a callback of the host, which is also called if a gradient scaler has skipped the step.
        def after_step(stepped: torch.optim.Optimizer, *_: object) -> None:
            if self._anchor is not None and (rho := self.rho_at(step())):
                proximal_step_(self._params, self._anchor, rho, _learning_rates(stepped, self._params))

        self._hook = optimizer.register_step_post_hook(after_step)

    # ---- the term ----------------------------------------------------------------------------------------------

    def rho_at(self, step: int) -> float:
        """Return ρ of one optimizer step."""
        total, settings = self._run.total_steps, self._settings
        from_step = settings.first_proximal_step(total)
        return self._factor * rho_at(step, total, rho=settings.rho, from_step=from_step, schedule=settings.rho_schedule)

    def add_gradient(self, step: int, scale: float) -> None:
        """Add the proximal gradient, if the term is coupled to the optimizer."""
        if self._anchor is not None and self._settings.proximal == "coupled" and (rho := self.rho_at(step)):
            add_proximal_gradient_(self._params, self._anchor, rho, scale=scale)

    def observe_loss(self, phase: Phase, loss: float) -> None:
        """Record the loss of a step, mean over all processes; only those of alignment steps are used."""
        if phase is Phase.ALIGNMENT:
            self._phase_loss, self._phase_steps = self._phase_loss + loss, self._phase_steps + 1

    def _adapt_rho(self) -> None:
        """Set ρ for the next cycle from the mean loss of the alignment phase that has ended."""
        if self._settings.alignment_loss_budget is None or not self._phase_steps:
            return
        loss = self._phase_loss / self._phase_steps
        self._phase_loss, self._phase_steps = 0.0, 0
        self._first_loss = first = loss if self._first_loss is None else self._first_loss
        ceiling = max(self._settings.rho_ceiling / self._settings.rho, 1.0)
        budget = LossBudget(rise=self._settings.alignment_loss_budget, ceiling=ceiling)
        self._factor = budget.next_factor(self._factor, loss=loss, first_loss=first)

    def progress(self) -> dict[str, Any]:
        """Return what a resumed run needs in addition to the anchor."""
        return {
            "factor": self._factor,
            "first_loss": self._first_loss,
            "state_loss": self._phase_loss,
            "state_steps": self._phase_steps,
        }

    def measures(self) -> dict[str, float]:
        """Measure the distances to the anchor and to the initial weights; includes ρ if it is adaptive."""
        values: dict[str, float] = {}
        if self._anchor is not None:
            values["drift"] = drift(self._params, self._anchor).item()
        if self._start is not None:
            values["drift_from_start"] = drift(self._params, self._start).item()
        if self._settings.alignment_loss_budget is not None:
            values["rho"] = self._settings.rho * self._factor
        return values

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


def _learning_rates(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the learning rate of each weight; 0 for a weight that the optimizer does not have and never moves."""
    rates = {id(param): float(group["lr"]) for group in optimizer.param_groups for param in group["params"]}
    return {name: rates.get(id(param), 0.0) for name, param in params.items()}
