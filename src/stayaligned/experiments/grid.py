"""A grid of experiments: shared stages once, several processes, one failure does not stop the rest."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import shutil
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stayaligned import testbed
from stayaligned.core.component import load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.evaluation.results import RESULT_FILE, Result, read_result
from stayaligned.experiments.config.experiment import (
    REGISTRIES,
    Experiment,
    explain,
    load_yaml,
    missing_inputs,
    parse,
    raise_problems,
    set_dotted,
    strings_in,
)
from stayaligned.experiments.pipeline import Run
from stayaligned.experiments.stages.store import Store, refuse_foreign

INDEX_FILE = "index.json"


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


class Listener:
    """Hears what a grid run does; the default hears nothing. Override what you want to show."""

    def started(self, total: int) -> None:
        """`total` jobs are to be done."""

    def progress(self, worker: int, text: str, share: float) -> None:
        """A worker is at this share of what the text names."""

    def finished(self, title: str, error: str | None) -> None:
        """A job has ended."""


@dataclass(frozen=True)
class _Job:
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
            errors = _execute(jobs, graph, workers or default_workers(), plugins, listener)
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


def run_directory(out: Path, run: Run) -> Path:
    """Where one experiment's result.json stands in a grid's output directory."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.experiment.arm.lower()).strip("-")[:60]
    return out / "runs" / f"{slug}-seed{run.experiment.seed}-{_short(run.experiment.arm + run.id)}"


def default_workers() -> int:
    """One process a core without a GPU; one in all with one, since processes would share its memory."""
    if Path("/dev/nvidia0").exists():
        return 1
    return max(1, len(os.sched_getaffinity(0)))


# ---- planning ---------------------------------------------------------------------------------------------------


def _plan(runs: Sequence[Run], out: Path) -> tuple[dict[str, _Job], dict[str, set[str]]]:
    """Jobs by name, and for each the names of the jobs that must come first. Stored trainings are no jobs."""
    jobs: dict[str, _Job] = {}
    graph: dict[str, set[str]] = {}
    arms = list(dict.fromkeys(run.experiment.arm for run in runs))
    for run in runs:
        position = arms.index(run.experiment.arm)
        before: set[str] = set()
        if any(testbed.is_reference(value) for _, value in strings_in(run.experiment.spec())):
            name = f"testbed seed {run.experiment.seed}"
            jobs.setdefault(name, _Job("testbed", name, run.experiment, out, position))
            graph.setdefault(name, set())
            before = {name}
        stored = run.store.directory("train", run.adapter_key)
        if run.experiment.trains and not stored.exists():
            name = f"train {stored.name}"
            jobs.setdefault(name, _Job("train", name, run.experiment, out, position))
            graph.setdefault(name, before)
            before = {name}
        name = f"result {run_directory(out, run).name}"
        jobs[name] = _Job("result", name, run.experiment, out, position)
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


def read_index(out: Path) -> dict[str, Any]:
    """What `bench` recorded of its grid: `title`, `reference`, `trainings` and the grid itself.

    Raises:
        StayalignedError: if the record is damaged.
    """
    path = out / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if {"title", "reference", "trainings"} <= content.keys():
            return content
    except (ValueError, AttributeError):
        pass
    raise StayalignedError(f"{path}: damaged", hint="Run the same `bench` into another --out.")


def _drop_stale(out: Path, runs: Sequence[Run]) -> None:
    """Remove results of an earlier version of the grid; their stages stay."""
    current = {run_directory(out, run) for run in runs}
    for directory in (out / "runs").glob("*"):
        if directory not in current:
            shutil.rmtree(directory, ignore_errors=True)


# ---- execution --------------------------------------------------------------------------------------------------


def _execute(
    jobs: Mapping[str, _Job],
    graph: Mapping[str, set[str]],
    workers: int,
    plugins: Sequence[Path],
    listener: Listener,
) -> dict[str, str]:
    """Run the graph; returns the error of each job that failed or could not start because of one that did."""
    order = TopologicalSorter({name: edges & graph.keys() for name, edges in graph.items()})
    order.prepare()
    errors: dict[str, str] = {}
    with _pool(min(workers, len(graph)) or 1, plugins, listener) as pool:
        running: dict[Future[None], str] = {}
        while order.is_active():
            for name in order.get_ready():
                failed = next((edge for edge in graph[name] if edge in errors), None)
                if failed is None:
                    running[pool.submit(_work, jobs[name])] = name
                else:
                    errors[name] = errors[failed]
                    listener.finished(jobs[name].title, errors[name])
                    order.done(name)
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    future.result()
                except StayalignedError as error:
                    errors[name] = str(error)
                listener.finished(jobs[name].title, errors.get(name))
                order.done(name)
    return errors


@contextlib.contextmanager
def _pool(workers: int, plugins: Sequence[Path], listener: Listener) -> Generator[ProcessPoolExecutor]:
    """Worker processes that report to `listener`, and that die with this one."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() and int(asked) else max(1, cores // workers)
    ended = threading.Event()

    def relay() -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Empty):
                listener.progress(*messages.get(timeout=0.2))

    relay_thread = threading.Thread(target=relay, daemon=True)
    relay_thread.start()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(messages, threads, [*plugins])
    )
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        ended.set()
        relay_thread.join()
        messages.close()


_report: Callable[[str, float], None] = lambda _text, _share: None  # noqa: E731
_threads = 1


def _start_worker(messages: Any, threads: int, plugins: Sequence[Path]) -> None:
    global _report, _threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for plugin in plugins:
        load_plugin(plugin, REGISTRIES)
    worker = os.getpid()
    _threads = threads
    _report = lambda text, share: messages.put((worker, text, share))  # noqa: E731


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(job: _Job) -> None:
    try:
        _do(job)
    except StayalignedError:
        raise
    except Exception as error:
        # Many exceptions can't cross a process border, and one that can't would take the whole pool with it.
        path = job.out / "failures" / f"{job.name.replace(' ', '-')}.txt"
        write_text(path, traceback.format_exc())
        raise StayalignedError(f"{type(error).__name__}: {error}", hint=f"The whole traceback: {path}") from None


def _do(job: _Job) -> None:
    run = Run(
        job.experiment,
        Store(job.out),
        progress=lambda text, share: _report(f"{job.title} · {text}", share),
        threads=_threads,
        position=job.position,
    )
    if job.kind == "testbed":
        _ = run.resolved
    elif job.kind == "train":
        run.trained()
    else:
        run.write_into(run_directory(job.out, run))


def _grouped(items: Sequence[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    return [(k, list(g)) for k, g in itertools.groupby(sorted(items, key=key), key=key)]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
