"""The jobs of a grid: units of work for one process."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.pipeline import Run


class Listener:
    """Hears what a grid run does; the default hears nothing. Override what you want to show."""

    def started(self, total: int) -> None:
        """`total` jobs are to be done."""

    def progress(self, worker: int, text: str, share: float) -> None:
        """A worker is at this share of what the text names."""

    def finished(self, title: str, error: str | None) -> None:
        """A job has ended."""


@dataclass(frozen=True)
class Job:
    """A unit of work for one process."""

    kind: Literal["testbed", "train", "result"]
    name: str
    experiment: Experiment
    out: Path
    position: int

    @property
    def title(self) -> str:
        """What the user sees of it."""
        of = {"testbed": "testbed", "train": f"train {self.experiment.training_defense.name}"}
        return f"{of.get(self.kind, self.experiment.arm)}, seed {self.experiment.seed}"


def run_directory(out: Path, run: Run) -> Path:
    """Where one experiment's result.json stands in a grid's output directory."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.experiment.arm.lower()).strip("-")[:60]
    return out / "runs" / f"{slug}-seed{run.experiment.seed}-{_short(run.experiment.arm + run.id)}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
