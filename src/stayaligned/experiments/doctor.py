"""Check before a run what will fail, and how long it takes: the work of `stayaligned doctor`."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from stayaligned.core.errors import StayalignedError
from stayaligned.core.progress import Progress, silent
from stayaligned.core.provenance import versions
from stayaligned.core.records import Completion, Example, Message
from stayaligned.core.settings import ChatTemplate
from stayaligned.evaluation.caveats import note_overlaps
from stayaligned.experiments.config.alignment import Alignment, load_alignment
from stayaligned.experiments.config.experiment import Experiment, load_experiment
from stayaligned.experiments.config.packages import require_for_training, require_installed
from stayaligned.experiments.config.validation import resolve_references
from stayaligned.experiments.config.yaml_file import load_yaml
from stayaligned.experiments.estimate import (
    StepTimes,
    TimeEstimate,
    estimate_generation,
    estimate_trainings,
    generation_cost,
    measure_alignment,
    measure_training,
    training_cost,
)
from stayaligned.experiments.executors.local import default_workers
from stayaligned.experiments.grid import load_grid
from stayaligned.experiments.plan import plan_experiment
from stayaligned.experiments.preview import planned_steps, preview_training
from stayaligned.experiments.stages.asking import check_prompts
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.data import find_forms
from stayaligned.experiments.stages.store import Store, collect_warnings

_ASK = (Message(role="user", content="Say hello."),)
_FEW_SAFETY_ROWS = 100
_BUSY = 0.4
"""Load of the last minute, as a share of the CPU threads, from which times are doubtful."""
_COPIES = 5
"""Copies of the weights in fp32 that full fine-tuning with AdamW holds: weights, gradients, two moments, one spare."""

State = Literal["ok", "note", "fail"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    """What was checked: `machine`, `versions`, `configuration`, `model`, `data`, `server`, `memory` or `time`."""
    state: State
    """`fail`: the run will fail; `note`: it may matter; `ok`."""
    text: str
    hint: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and how long the parts of the run take."""

    findings: tuple[Finding, ...]
    estimates: tuple[TimeEstimate, ...] = ()

    @property
    def fails(self) -> bool:
        """Whether something was found that will fail."""
        return any(finding.state == "fail" for finding in self.findings)


def diagnose(
    config: Path | None,
    overrides: Sequence[str] = (),
    *,
    quick: bool = False,
    ask: bool = False,
    out: Path = Path(),
    progress: Progress = silent,
) -> Diagnosis:
    """Check the machine and, if a configuration is given, what it will do there; measure some steps and completions.

    Args:
        config: an experiment, a grid or an alignment; None checks the machine alone.
        overrides: `key=value` settings.
        quick: measure nothing.
        ask: ask each server that the experiment uses for one completion or verdict.
        out: directory in which the run will write.
        progress: called with what is being done.

    Raises:
        StayalignedError: if the configuration can't be read at all, or is none of these.
    """
    content = {} if config is None else load_yaml(config, overrides)
    if config is not None and not content.keys() & {"model", "axes", "base_model"}:
        raise StayalignedError(
            f"{config}: no experiment, grid or alignment",
            hint="Give a YAML file, as for `run`, `bench` or `align`.",
        )
    doctor = _Doctor(progress, quick=quick, ask=ask)
    doctor.check_machine(out)
    if config is not None and "axes" in content:
        doctor.check_grid(config, overrides)
    elif config is not None and "model" in content:
        doctor.check_experiment(config, overrides)
    elif config is not None:
        doctor.check_alignment(config, overrides)
    return Diagnosis(tuple(doctor.findings), tuple(doctor.estimates))


class _Doctor:
    def __init__(self, progress: Progress, *, quick: bool, ask: bool) -> None:
        self.findings: list[Finding] = []
        self.estimates: list[TimeEstimate] = []
        self._progress = progress
        self._quick, self._ask = quick, ask
        self._arm = ""
        self._known: dict[str, Any] = {}
        """What the checks of earlier arms of a grid returned."""
        self._said: set[tuple[str, str, str]] = set()

    def found(self, check: str, state: State, text: str, hint: str | None = None) -> None:
        if (check, state, text) not in self._said:
            self._said.add((check, state, text))
            where = f" (in {self._arm!r})" if self._arm and state != "ok" else ""
            self.findings.append(Finding(check, state, text + where, hint))

    def attempt(self, check: str, action: Callable[[], T], *same: object) -> T | None:
        """Return what an action returns; an error of it is a finding, and its warnings are notes.

        An action on the `same` things as an earlier one is not repeated.
        """
        key = repr((check, same))
        if same and key in self._known:
            return self._known[key]
        self._progress(f"check {check}", 0.0)
        value = None
        with collect_warnings() as notes:
            try:
                value = action()
            except StayalignedError as error:
                # The first such finding names every package.
                if not (_lacks_packages(error.message) and any(_lacks_packages(f.text) for f in self.findings)):
                    self.found(check, "fail", error.message, error.hint)
            except (OSError, MemoryError, RuntimeError) as error:
                self.found(check, "fail", f"{type(error).__name__}: {error}")
        for text in notes:
            self.found(check, "note", text)
        self._known[key] = value
        return value

    def check_machine(self, out: Path) -> None:
        installed = versions()
        self.found("versions", "ok", ", ".join(f"{name} {version}" for name, version in installed.items()))
        threads = len(os.sched_getaffinity(0))
        self.found("machine", "ok", f"{threads} CPU threads, {_gb(available_memory())} memory free, GPU: {_gpu()}")
        busy = os.getloadavg()[0]
        if busy > _BUSY * threads and not self._quick:
            self.found(
                "machine",
                "note",
                f"other programs use {busy:.1f} of {threads} CPU threads: measured times will be far too long",
            )
        place = next(path for path in out.absolute().parents if path.exists()) if not out.exists() else out
        free = shutil.disk_usage(place).free
        if not os.access(place, os.W_OK):
            self.found("machine", "fail", f"{place} is not writable", "Give another --out, or its permissions.")
        elif free < 2 << 30:
            self.found("machine", "note", f"{_gb(free)} free at {place}: checkpoints may not fit")
        else:
            self.found("machine", "ok", f"{_gb(free)} free at {place}")

    def check_experiment(self, config: Path, overrides: Sequence[str]) -> None:
        experiment = self.attempt("configuration", lambda: load_experiment(config, overrides))
        if experiment is not None:
            self.found("configuration", "ok", f"a valid experiment ({experiment.arm}, seed {experiment.seed})")
            self._check_each([experiment])

    def check_grid(self, config: Path, overrides: Sequence[str]) -> None:
        experiments = self.attempt("configuration", lambda: load_grid(config, overrides).expand(str(config)))
        if experiments is not None:
            arms = {experiment.arm for experiment in experiments}
            self.found("configuration", "ok", f"a valid grid: {len(arms)} arms, {len(experiments)} experiments")
            self._check_each(experiments)

    def check_alignment(self, config: Path, overrides: Sequence[str]) -> None:
        alignment = self.attempt("configuration", lambda: load_alignment(str(config), {}, overrides))
        if alignment is None:
            return
        self.found("configuration", "ok", "a valid alignment")
        self.attempt("configuration", lambda: require_for_training(alignment.trainer))
        a = self.attempt("model", lambda: resolve_references(alignment, alignment.seed, self._progress))
        if a is None:
            return
        tokenizer = self.attempt("model", lambda: self._find_tokenizer(a.base_model, a.chat_template))
        rows = self.attempt("data", lambda: self._check_safety_rows(a.data, a.limit, tokenizer, a.max_length))
        fits = self.attempt("memory", lambda: self._check_memory(a.base_model, full=a.lora is None))
        usable = tokenizer is not None and rows is not None and bool(fits)
        self._measure_if(usable, lambda: self._measure_alignment(alignment))

    def _check_each(self, experiments: Sequence[Experiment]) -> None:
        """Check one experiment of each arm, and measure those whose parts take different times."""
        self.attempt("configuration", lambda: require_installed(experiments, report=True))
        arms = {experiment.arm: experiment for experiment in reversed(experiments)}
        usable = True
        for arm, experiment in reversed(arms.items()):
            self._arm = arm if len(arms) > 1 else ""
            usable = self._check_one(experiment) and usable
        self._arm = ""
        self._measure_if(usable, lambda: self._measure(experiments))

    def _check_one(self, experiment: Experiment) -> bool:
        """Return whether the experiment could be measured."""
        e = self.attempt("model", lambda: resolve_references(experiment, experiment.seed, self._progress))
        if e is None:
            return False
        self.attempt("configuration", lambda: self._check_length(experiment))
        model = (e.model, e.base_model, e.chat_template, e.generation.backend)
        tokenizer = self.attempt("model", lambda: self._check_model(e), *model)
        prompts = (e.harmful_prompts, e.benign_prompts, e.limit)
        trained = (e.trains, e.task, e.training_defense.needs_alignment_data, e.alignment_data, e.max_length)
        rows = self.attempt("data", lambda: self._check_data(e, tokenizer), *model, *prompts, *trained)
        self.attempt("data", lambda: self._check_forms(experiment), "forms", e.attack, e.defenses, *model, *prompts)
        if self._ask:
            self._ask_servers(e)
        full = e.trains and e.lora is None
        fits = self.attempt("memory", lambda: self._check_memory(e.model, full=full), e.model, full)
        return rows is not None and tokenizer is not None and bool(fits)

    def _measure_if(self, usable: bool, measure: Callable[[], None]) -> None:
        if self._quick or not usable or any(f.state == "fail" for f in self.findings):
            self.found("time", "note", "not measured" if self._quick else "not measured: fix what fails first")
        else:
            self.attempt("time", measure)

    def _check_length(self, experiment: Experiment) -> None:
        for text in preview_training(experiment):
            self.found("configuration", "note", text)

    def _check_model(self, e: Experiment) -> Any:
        """Return the tokenizer, whose chat template has been probed."""
        if e.generation.backend == "endpoint":
            self.found("model", "ok", f"{e.model}: behind a server")
            return e.model
        tokenizer = self._find_tokenizer(e.model, e.chat_template)
        if e.base_model is not None:
            self._check_base(e.model, e.base_model)
        return tokenizer

    def _find_tokenizer(self, model: str, template: ChatTemplate) -> Any:
        from stayaligned.hf import models

        tokenizer = models.load_tokenizer(model, template)
        self.found("model", "ok", "found, and its chat template shows requests and answers")
        return tokenizer

    def _check_base(self, model: str, base: str) -> None:
        from stayaligned.weights.checkpoints import open_checkpoint

        ours, theirs = open_checkpoint(model), open_checkpoint(base)
        shared = sorted(name for name in ours if name in theirs and len(ours.shape(name)) == 2)
        if not shared:
            self.found("model", "fail", "base_model shares no weight with the model", "Name the model's own ancestor.")
        elif all(ours[name].equal(theirs[name]) for name in shared[-3:]):
            self.found(
                "model",
                "note",
                f"base_model has the model's own weights in {', '.join(shared[-3:])}: is it the same model?",
                "Name the base model before its alignment.",
            )
        else:
            self.found(
                "model", "ok", f"base_model differs from the model in its weights, of {len(shared)} shared matrices"
            )

    def _check_data(self, e: Experiment, tokenizer: Any) -> dict[str, Sequence[Example]]:
        from stayaligned.data.prompts import load_prompts

        trained_on: dict[str, Sequence[Example]] = {}
        if e.trains and e.task is not None:
            trained_on["training"] = e.task.load("train")
            self._describe_rows("training", trained_on["training"], tokenizer, e.max_length)
        if e.alignment_data is not None and e.training_defense.needs_alignment_data:
            trained_on["alignment"] = self._check_safety_rows(e.alignment_data, None, tokenizer, e.max_length)
        prompts: dict[Any, Sequence[Example]] = {}
        if e.harmful_prompts is not None:
            prompts["harmful"] = load_prompts(e.harmful_prompts, "harmful")[: e.limit]
        if e.benign_prompts is not None:
            prompts["benign"] = load_prompts(e.benign_prompts, "task")[: e.limit]
        if e.task is not None:
            prompts["task"] = e.task.load("test")[: e.limit]
        self.found("data", "ok", "prompts: " + (", ".join(f"{len(r)} {name}" for name, r in prompts.items()) or "none"))
        for text in note_overlaps(trained_on, prompts):
            self.found("data", "note", text)
        return trained_on

    def _check_forms(self, experiment: Experiment) -> None:
        """Check the forms in which harmful prompts are asked: their triggers must reach the model."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            context = Context(experiment, Store(Path(place)), self._progress)
            find_forms(context)
            check_prompts(context)
        if len(experiment.harm_sets) > 1:
            self.found("data", "ok", f"harm is measured on these prompt sets: {', '.join(experiment.harm_sets)}")

    def _check_safety_rows(self, data: str, limit: int | None, tokenizer: Any, max_length: int) -> Sequence[Example]:
        from stayaligned.data.sources import read_examples

        rows = read_examples(data, origin="alignment")[:limit]
        if len(rows) < _FEW_SAFETY_ROWS:
            few = f"{data}: {len(rows)} safety rows are few"
            self.found("data", "note", few, "Some hundreds, of many kinds of harm, generalize better.")
        self._describe_rows("alignment", rows, tokenizer, max_length)
        return rows

    def _describe_rows(self, name: str, rows: Sequence[Example], tokenizer: Any, limit: int) -> None:
        self.found("data", "ok", f"{name}: {len(rows)} rows{self._describe_lengths(rows, tokenizer, limit)}")

    def _describe_lengths(self, rows: Sequence[Example], tokenizer: Any, limit: int) -> str:
        if tokenizer is None or isinstance(tokenizer, str):
            return ""
        from stayaligned.hf.features import encode_example

        lengths = sorted(len(encode_example(tokenizer, row, 1 << 30)["input_ids"]) for row in rows[:500])
        cut = sum(length > limit for length in lengths)
        middle, longest = lengths[len(lengths) // 2], lengths[-1]
        if cut:
            text = f"{cut} of {len(lengths)} rows are longer than max_length = {limit} tokens (longest {longest})"
            self.found("data", "note", text, "The end of these completions is not learned: raise max_length.")
        return f", {middle} tokens in the middle and at most {longest}"

    def _check_memory(self, model: str, *, full: bool) -> bool:
        """Compare a lower bound with what is free, before anything is loaded; return whether it fits."""
        place = Path(model).expanduser()
        weights = sum(file.stat().st_size for file in place.glob("*.safetensors")) if place.is_dir() else 0
        if not weights:
            return True
        needed, free = weights * (_COPIES if full else 1), available_memory()
        how = f"full fine-tuning holds about {_COPIES} copies" if full else "the weights alone"
        if needed > free and _gpu() == "none":
            text = f"needs at least {_gb(needed)} ({how}), and {_gb(free)} are free"
            self.found("memory", "fail", text, "Train a LoRA, take a smaller model, or a machine with more memory.")
            return False
        self.found("memory", "ok", f"at least {_gb(needed)} needed ({how}), {_gb(free)} free")
        return True

    def _ask_servers(self, e: Experiment) -> None:
        from stayaligned.evaluation.answers import complete_over_endpoint

        endpoint = e.generation.endpoint
        if endpoint is not None:
            one = Example(id="0", prompt=_ASK, completion="")
            call = functools.partial(complete_over_endpoint, endpoint, [one], "benign", max_tokens=4)
            if self.attempt("server", lambda: list(call()), endpoint):
                self.found("server", "ok", f"{endpoint.base_url}: generates")
        said = Completion(prompt_set="benign", id="0", prompt=_ASK, text="Hello!")
        for judge in e.judges:
            if "endpoint" not in type(judge).model_fields:
                continue
            verdicts = self.attempt("server", lambda judge=judge: list(judge.judge([said])), judge)
            if verdicts is None:
                continue
            good = verdicts[0].outcome is not None
            self.found("server", "ok" if good else "fail", f"judge {judge.name}: {'judges' if good else verdicts[0]}")

    def _measure(self, experiments: Sequence[Experiment]) -> None:
        trainings: dict[str, Experiment] = {}
        generations: dict[str, Experiment] = {}
        for e in experiments:
            plan = plan_experiment(e)
            if e.trains:
                trainings.setdefault(plan.train, e)
            if e.generation.backend != "endpoint":
                generations.setdefault(plan.generate, e)
        self._measure_trainings([*trainings.values()])
        alike: dict[str, list[Experiment]] = {}
        for e in generations.values():
            alike.setdefault(generation_cost(e), []).append(e)
        for group in alike.values():
            found = estimate_generation(group[0], self._progress, runs=len(group))
            self.estimates += [found] if found else []
        self._show_times()
        if len(experiments) > 1:
            total, jobs = sum(one.seconds for one in self.estimates), min(default_workers(), len(experiments))
            self.found(
                "time",
                "ok",
                f"all {len(experiments)} experiments: about {_span(total)} one after the other; `bench` runs {jobs} at "
                "a time",
            )

    def _measure_trainings(self, experiments: Sequence[Experiment]) -> None:
        """Measure one training of each cost; their lengths may differ."""
        measured: dict[str, StepTimes] = {}
        lengths: list[tuple[StepTimes, int]] = []
        for e in experiments:
            cost = training_cost(e)
            if cost not in measured:
                measured[cost] = measure_training(e, self._progress)
            counted = None if e.training_defense.spec().get("budget") == "cover" else measured[cost].planned
            steps = planned_steps(e) or counted
            if steps is not None:
                lengths.append((measured[cost], steps))
        if len(lengths) < len(experiments):
            text = f"the length of {len(experiments) - len(lengths)} trainings is not known before their rows are read"
            self.found("time", "note", text)
        if lengths:
            self.estimates.append(estimate_trainings(lengths))

    def _measure_alignment(self, alignment: Alignment) -> None:
        times = measure_alignment(alignment, self._progress)
        if times.planned is not None:
            self.estimates.append(estimate_trainings([(times, times.planned)]))
        self._show_times()

    def _show_times(self) -> None:
        self.found(
            "memory", "ok", f"{_gb(peak_memory())} were used while measuring, {_gb(available_memory())} are free"
        )
        for one in self.estimates:
            shown = f"{one.part}: about {_span(one.seconds)} ({_span(one.low)} to {_span(one.high)}); {one.measured}"
            self.found("time", "ok", shown)
        self.found(
            "time",
            "note",
            "while nothing else uses this machine; without some seconds in which libraries are loaded, patches, judges "
            "that are models or servers, lm_eval, probes",
        )


def _lacks_packages(text: str) -> bool:
    return text.startswith("not installed: ")


def available_memory() -> int:
    """Return the bytes of main memory that are free for programs."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Return the most bytes of main memory that this process has used, or of the GPU's memory if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {_gb(free)} of {_gb(total)} free"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
