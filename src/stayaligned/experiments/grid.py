"""A grid of experiments: shared stages are computed once, in several processes, and one failure stops nothing else."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from stayaligned import testbed
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.core.records import Record
from stayaligned.evaluation.results import INDEX_FILE, RESULT_FILE, Result, read_index, read_result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.packages import require_installed
from stayaligned.experiments.config.validation import explain, missing_inputs, parse, raise_problems, strings_in
from stayaligned.experiments.config.yaml_file import load_yaml, set_dotted
from stayaligned.experiments.executors.local import default_workers, execute
from stayaligned.experiments.jobs import Listener, plan_jobs, result_directory, result_job
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.store import Store


class Grid(Record):
    """A base experiment and axes of changes to it; every combination is one experiment.

    An axis is a list. A plain value sets the field that the axis is named after (`seed: [1, 2, 3]`); a mapping sets
    several dotted fields and may carry a `label`, the name of that row in tables.
    """

    title: str = "Comparison of defenses"
    reference: str = ""
    """Label of the arm with which the others are compared, seed by seed."""
    base: dict[str, Any]
    """Settings of an experiment that all combinations share."""
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]]
    """Changes to the base by the name of the axis."""

    def expand(self, where: str = "grid") -> list[Experiment]:
        """Return the experiment of every combination, the last axis varying fastest.

        Raises:
            StayalignedError: with every error of every combination, each reported once.
        """
        experiments: list[Experiment] = []
        problems: dict[str, str] = {}
        for content in self._combine():
            try:
                experiments.append(Experiment.model_validate(content))
            except ValidationError as error:
                problems |= {line: str(content.get("label", "")) for line in explain(error, Experiment)}
            problems |= {line: str(content.get("label", "")) for line in missing_inputs(content)}
        labels = {e.arm for e in experiments}
        if self.reference and not problems and self.reference not in labels:
            problems[f"reference: no arm is labelled {self.reference!r}; there are {', '.join(sorted(labels))}"] = ""
        counts = Counter((e.arm, e.seed) for e in experiments)
        duplicates = sorted(arm for (arm, _), count in counts.items() if count > 1)
        if duplicates and not problems:
            problems[f"axes: several combinations are called {duplicates[0]!r}; give each a `label`"] = ""
        if problems:
            raise_problems([f"{line}{f' (in {arm!r})' if arm else ''}" for line, arm in problems.items()], where)
        return experiments

    def _combine(self) -> Iterator[dict[str, Any]]:
        """Yield the settings of every combination."""
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
    """Load a grid from YAML.

    Args:
        path: the YAML file.
        overrides: `key=value`, which apply to the base experiment unless they begin with `axes.`, `base.`, `title=` or
            `reference=`.

    Raises:
        StayalignedError: with every error in the file.
    """
    placed = [o if o.startswith(("axes.", "title=", "reference=", "base.")) else f"base.{o}" for o in overrides]
    content = load_yaml(path, placed)
    if "model" in content and "axes" not in content:
        raise StayalignedError(f"{path}: one experiment, expected a grid", hint="Use `stayaligned run`.")
    return parse(Grid, content, str(path), check_inputs=False)


@dataclass
class GridOutcome:
    """The results of a grid, and the errors of the experiments without one."""

    results: list[Result] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """The error of each failed experiment, by its arm and seed."""
    trained: int = 0
    """Number of trainings that were computed, rather than found in the output directory."""
    computed: int = 0
    """Number of stages that were computed, trainings included."""


def run_grid(
    grid: Grid,
    out: Path,
    *,
    workers: int | None = None,
    plugins: Sequence[Path] = (),
    listener: Listener | None = None,
) -> GridOutcome:
    """Run every experiment of a grid into `out`; a stored stage is not computed again.

    Args:
        grid: the experiments.
        out: the output directory; new, empty, or written by an earlier, smaller version of this grid.
        workers: number of processes; by default one per CPU core, or one if there is a GPU.
        plugins: plug-in files that the processes load.
        listener: receives progress.

    Raises:
        StayalignedError: if the grid has errors, a package that it needs is not installed, the testbed's cache can't be
            written, or `out` belongs to something else or to another version.
    """
    experiments = grid.expand()
    require_installed(experiments)
    if any(testbed.is_reference(value) for e in experiments for _, value in strings_in(e.spec())):
        testbed.require_cache()
    listener = listener or Listener()
    store = Store(out)
    store.refuse_foreign(INDEX_FILE)
    contexts = [Context(experiment, store) for experiment in experiments]
    graph = plan_jobs(contexts, out)  # hashes every input, before anything is written
    with store.locked():
        _write_index(grid, out, contexts)
        _remove_stale_results(out, contexts)
        listener.started(len(graph.jobs))
        found = store.stages()
        errors = execute(graph, workers or default_workers(), plugins, listener)
        outcome = GridOutcome(
            trained=sum(name not in errors for name in graph.trainings), computed=len(store.stages() - found)
        )
        for context in contexts:
            experiment = context.experiment
            path = result_directory(out, experiment, context.plan) / RESULT_FILE
            error = errors.get(result_job(out, experiment, context.plan))
            if error is None:
                outcome.results.append(read_result(path))
            else:
                # An earlier result would appear in the report as if this grid had computed it.
                path.unlink(missing_ok=True)
                outcome.failures[f"{experiment.arm}, seed {experiment.seed}"] = error
    return outcome


def _write_index(grid: Grid, out: Path, contexts: Sequence[Context]) -> None:
    """Record the grid; refuse a directory with trainings that the grid does not contain."""
    trainings = sorted({context.plan.train for context in contexts if context.experiment.trains})
    path = out / INDEX_FILE
    if path.exists():
        before = read_index(out)["trainings"]
        store = contexts[0].store
        lost = {key for key in before if store.directory("train", key).exists()} - set(trainings)
        if lost:
            raise StayalignedError(
                f"{out}: belongs to another grid ({len(lost)} of its trainings are not in this one)",
                hint="A grid may grow in place (arms, thresholds, judges, seeds); for another one, or after an "
                "edit of an input file or a plug-in, use another --out.",
            )
    content = {"title": grid.title, "reference": grid.reference, "trainings": trainings, "grid": grid.model_dump()}
    write_text(path, json.dumps(content, indent=2) + "\n")


def _remove_stale_results(out: Path, contexts: Sequence[Context]) -> None:
    """Remove the results of an earlier version of the grid; their stages stay."""
    current = {result_directory(out, context.experiment, context.plan) for context in contexts}
    for directory in (out / "runs").glob("*"):
        if directory not in current:
            shutil.rmtree(directory, ignore_errors=True)
