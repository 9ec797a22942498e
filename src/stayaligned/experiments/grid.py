"""A grid of experiments: shared stages once, several processes, one failure does not stop the rest."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stayaligned import testbed
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.evaluation.results import INDEX_FILE, RESULT_FILE, Result, read_index, read_result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.validation import explain, missing_inputs, parse, raise_problems, strings_in
from stayaligned.experiments.config.yaml_file import load_yaml, set_dotted
from stayaligned.experiments.executors.local import default_workers, execute
from stayaligned.experiments.jobs import Job, Listener, run_directory
from stayaligned.experiments.pipeline import Run
from stayaligned.experiments.stages.store import Store, refuse_foreign


class Grid(BaseModel):
    """A base experiment and axes of changes to it; every combination is one experiment.

    An axis is a list. A plain value sets the field that the axis is named after (`seed: [1, 2, 3]`); a mapping sets
    several dotted fields and may carry a `label`, the name of that row in tables.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = "Comparison of defenses"
    reference: str = ""
    """The label of the arm that the others are compared with, seed by seed."""
    base: dict[str, Any]
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]]

    def expand(self, where: str = "grid") -> list[Experiment]:
        """Every combination, the last axis varying fastest.

        Raises:
            StayalignedError: with every error of every combination, each said once.
        """
        experiments: list[Experiment] = []
        problems: dict[str, str] = {}
        for content in self._combinations():
            try:
                experiments.append(Experiment.model_validate(content))
            except ValidationError as error:
                problems |= {line: str(content.get("label", "")) for line in explain(error, Experiment)}
            problems |= {line: str(content.get("label", "")) for line in missing_inputs(content)}
        labels = {e.arm for e in experiments}
        if self.reference and not problems and self.reference not in labels:
            problems[f"reference: no arm is labelled {self.reference!r}; there are {', '.join(sorted(labels))}"] = ""
        twice = [arm for (arm, _), group in _grouped(experiments, lambda e: (e.arm, e.seed)) if len(group) > 1]
        if twice and not problems:
            problems[f"axes: several combinations are called {twice[0]!r}; give each a `label`"] = ""
        if problems:
            raise_problems([f"{line}{f' (in {arm!r})' if arm else ''}" for line, arm in problems.items()], where)
        return experiments

    def _combinations(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.axes.values()):
            content: dict[str, Any] = copy.deepcopy(self.base)
            labels: list[str] = []
            for axis, value in zip(self.axes, values, strict=True):
                if isinstance(value, Mapping):
                    labels.append(str(value.get("label", "")))
                    for key, item in value.items():
                        if key != "label":
                            set_dotted(content, key, copy.deepcopy(item))
                else:
                    set_dotted(content, axis, value)
                    labels += [f"{axis}={value}"] if axis != "seed" else []
            content["label"] = " · ".join(label for label in labels if label) or content.get("label", "")
            yield content


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """A grid from YAML; overrides apply to the base experiment unless they begin with `axes.`.

    Raises:
        StayalignedError: with every error in it.
    """
    placed = [o if o.startswith(("axes.", "title=", "reference=", "base.")) else f"base.{o}" for o in overrides]
    return parse(Grid, load_yaml(path, placed), str(path), check_inputs=False)


@dataclass
class Outcome:
    """What a grid run gave: the results that there are, and why others are not."""

    results: list[Result] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Arm and seed, and the error that ended it."""
    trained: int = 0
    """How many trainings were computed (not found in the store)."""


def run_grid(
    grid: Grid,
    out: Path,
    *,
    workers: int | None = None,
    plugins: Sequence[Path] = (),
    listener: Listener | None = None,
) -> Outcome:
    """Run every experiment of a grid into `out`; what is already there is not computed again.

    Args:
        grid: the experiments.
        out: the output directory; one that an earlier, smaller version of this grid wrote is continued.
        workers: processes; by default one a CPU core, or one in all where there is a GPU.
        plugins: plug-in files that the workers load too.
        listener: hears of progress.

    Raises:
        StayalignedError: if the grid has errors, or `out` belongs to something else.
    """
    experiments = grid.expand()
    listener = listener or Listener()
    store = Store(out)
    refuse_foreign(out, INDEX_FILE)
    runs = [Run(experiment, store) for experiment in experiments]
    jobs, graph = _plan(runs, out)  # hashes every input, before anything is written
    with store.locked():
        _write_index(grid, out, runs)
        _drop_stale(out, runs)
        trainings = [name for name, job in jobs.items() if job.kind == "train"]
        listener.started(len(graph))
        try:
            errors = execute(jobs, graph, workers or default_workers(), plugins, listener)
        except BrokenProcessPool:
            raise StayalignedError(
                "a worker process was killed (out of memory?)",
                hint="Rerun the same command, it continues; `--workers 1` needs less memory.",
            ) from None
        outcome = Outcome(trained=sum(name not in errors for name in trainings))
        for run in runs:
            place = run_directory(out, run)
            error = errors.get(f"result {place.name}")
            if error is None:
                outcome.results.append(read_result(place / RESULT_FILE))
            else:
                # An earlier result would stand in the report as if it were this run's.
                (place / RESULT_FILE).unlink(missing_ok=True)
                outcome.failures[f"{run.experiment.arm}, seed {run.experiment.seed}"] = error
    return outcome


# ---- planning ---------------------------------------------------------------------------------------------------


def _plan(runs: Sequence[Run], out: Path) -> tuple[dict[str, Job], dict[str, set[str]]]:
    """Jobs by name, and for each the names of the jobs that must come first. Stored trainings are no jobs."""
    jobs: dict[str, Job] = {}
    graph: dict[str, set[str]] = {}
    arms = list(dict.fromkeys(run.experiment.arm for run in runs))
    for run in runs:
        position = arms.index(run.experiment.arm)
        before: set[str] = set()
        if any(testbed.is_reference(value) for _, value in strings_in(run.experiment.spec())):
            name = f"testbed seed {run.experiment.seed}"
            jobs.setdefault(name, Job("testbed", name, run.experiment, out, position))
            graph.setdefault(name, set())
            before = {name}
        stored = run.store.directory("train", run.adapter_key)
        if run.experiment.trains and not stored.exists():
            name = f"train {stored.name}"
            jobs.setdefault(name, Job("train", name, run.experiment, out, position))
            graph.setdefault(name, before)
            before = {name}
        name = f"result {run_directory(out, run).name}"
        jobs[name] = Job("result", name, run.experiment, out, position)
        graph[name] = before
    return jobs, graph


def _write_index(grid: Grid, out: Path, runs: Sequence[Run]) -> None:
    """Record what this directory is; refuse one whose trainings this grid does not contain."""
    trainings = sorted({run.adapter_key for run in runs if run.experiment.trains})
    path = out / INDEX_FILE
    if path.exists():
        before = read_index(out)["trainings"]
        lost = {key for key in before if runs[0].store.directory("train", key).exists()} - set(trainings)
        if lost:
            raise StayalignedError(
                f"{out}: belongs to another grid ({len(lost)} of its trainings are not in this one)",
                hint="A grid may grow in place (arms, thresholds, judges, seeds); for another one use another --out.",
            )
    content = {"title": grid.title, "reference": grid.reference, "trainings": trainings, "grid": grid.model_dump()}
    write_text(path, json.dumps(content, indent=2) + "\n")


def _drop_stale(out: Path, runs: Sequence[Run]) -> None:
    """Remove results of an earlier version of the grid; their stages stay."""
    current = {run_directory(out, run) for run in runs}
    for directory in (out / "runs").glob("*"):
        if directory not in current:
            shutil.rmtree(directory, ignore_errors=True)


# ---- execution --------------------------------------------------------------------------------------------------


def _grouped(items: Sequence[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    return [(k, list(g)) for k, g in itertools.groupby(sorted(items, key=key), key=key)]
