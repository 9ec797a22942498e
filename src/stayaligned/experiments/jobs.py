"""The jobs of a grid: which there are, and which must come first."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stayaligned import testbed
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.validation import strings_in
from stayaligned.experiments.plan import Plan
from stayaligned.experiments.stages.context import Context


class Listener:
    """Receives the progress of a grid; this one ignores it. Override the methods whose events you want to show."""

    def started(self, total: int) -> None:
        """Called once, with the number of jobs."""

    def progress(self, worker: int, work: str, share: float, detail: str = "") -> None:
        """Called while a worker works; see `core.progress.Progress`. `worker` is the number of its process."""

    def finished(self, title: str, error: str | None) -> None:
        """Called when a job has ended, with its error if it failed."""


@dataclass(frozen=True)
class Job:
    """A unit of work for one process."""

    kind: Literal["testbed", "train", "result"]
    name: str
    """Name of the job; distinct within the grid."""
    experiment: Experiment
    out: Path
    """Output directory of the grid."""
    position: int
    """Index of the experiment's arm in the grid."""

    @property
    def title(self) -> str:
        """The job as the user sees it; distinct within the grid, since an arm has one experiment per seed.

        Arms that share a training have one job for it, which is named after the first of them.
        """
        if self.kind == "testbed":
            return f"testbed, seed {self.experiment.seed}"
        arm = f"{self.experiment.arm}, seed {self.experiment.seed}"
        return f"{arm}, training" if self.kind == "train" else arm


@dataclass(frozen=True)
class JobGraph:
    """The jobs of a grid by name, and for each job the names of the jobs that must come first."""

    jobs: dict[str, Job]
    requires: dict[str, set[str]]

    @property
    def trainings(self) -> list[str]:
        """Names of the jobs that train."""
        return [name for name, job in self.jobs.items() if job.kind == "train"]


def plan_jobs(contexts: Sequence[Context], out: Path) -> JobGraph:
    """Return the jobs of a grid's experiments. A stored training is no job, and a shared training is one job."""
    graph = JobGraph({}, {})
    arms = list(dict.fromkeys(context.experiment.arm for context in contexts))
    for context in contexts:
        experiment = context.experiment
        position = arms.index(experiment.arm)
        required: set[str] = set()
        if any(testbed.is_reference(value) for _, value in strings_in(experiment.spec())):
            required = {_add(graph, Job("testbed", f"testbed seed {experiment.seed}", experiment, out, position))}
        stage = context.store.directory("train", context.plan.train)
        if experiment.trains and not stage.exists():
            required = {_add(graph, Job("train", f"train {stage.name}", experiment, out, position), required)}
        _add(graph, Job("result", result_job(out, experiment, context.plan), experiment, out, position), required)
    return graph


def result_directory(out: Path, experiment: Experiment, plan: Plan) -> Path:
    """Return the directory of one experiment's `result.json` in a grid's output directory."""
    slug = re.sub(r"[^a-z0-9]+", "-", experiment.arm.lower()).strip("-")[:60]
    distinct = hashlib.sha256((experiment.arm + plan.id).encode()).hexdigest()[:8]
    return out / "runs" / f"{slug}-seed{experiment.seed}-{distinct}"


def result_job(out: Path, experiment: Experiment, plan: Plan) -> str:
    """Return the name of the job that writes an experiment's result."""
    return f"result {result_directory(out, experiment, plan).name}"


def _add(graph: JobGraph, job: Job, required: set[str] | None = None) -> str:
    graph.jobs.setdefault(job.name, job)
    graph.requires.setdefault(job.name, required or set())
    return job.name
