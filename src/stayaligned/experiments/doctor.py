"""Check before a run what will fail, and how long it takes: the work of `stayaligned doctor`."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from stayaligned.core.errors import StayalignedError
from stayaligned.core.progress import Progress, silent
from stayaligned.core.provenance import versions
from stayaligned.core.records import Completion, Example, Message
from stayaligned.evaluation.caveats import note_overlaps
from stayaligned.experiments.config.experiment import Experiment, load_experiment
from stayaligned.experiments.config.packages import require_installed
from stayaligned.experiments.config.validation import resolve_references
from stayaligned.experiments.config.yaml_file import load_yaml
from stayaligned.experiments.estimate import TimeEstimate, estimate_generation, estimate_training
from stayaligned.experiments.preview import planned_steps, preview_training
from stayaligned.experiments.stages.store import collect_warnings

_ASK = (Message(role="user", content="Say hello."),)
_FEW_SAFETY_ROWS = 100
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
    """Check the machine and, if one is given, an experiment on it; measure some of its steps and completions.

    Args:
        config: an experiment; None checks the machine alone.
        overrides: `key=value` settings.
        quick: measure nothing.
        ask: ask each server that the experiment uses for one completion or verdict.
        out: directory in which the run will write.
        progress: called with what is being done.

    Raises:
        StayalignedError: if the configuration can't be read at all, or is a grid.
    """
    if config is not None and "model" not in load_yaml(config, overrides):
        raise StayalignedError(
            f"{config}: not one experiment", hint="Give the YAML file of an experiment, as for `run`."
        )
    doctor = _Doctor(progress)
    doctor.check_machine(out)
    if config is None:
        return Diagnosis(tuple(doctor.findings))
    experiment = doctor.attempt("configuration", lambda: load_experiment(config, overrides))
    if experiment is None:
        return Diagnosis(tuple(doctor.findings))
    doctor.found("configuration", "ok", f"a valid experiment ({experiment.arm}, seed {experiment.seed})")
    resolved = doctor.attempt("model", lambda: resolve_references(experiment, experiment.seed, progress))
    if resolved is not None:
        doctor.check_experiment(experiment, resolved, quick=quick, ask=ask)
    return Diagnosis(tuple(doctor.findings), tuple(doctor.estimates))


class _Doctor:
    def __init__(self, progress: Progress) -> None:
        self.findings: list[Finding] = []
        self.estimates: list[TimeEstimate] = []
        self._progress = progress

    def found(self, check: str, state: State, text: str, hint: str | None = None) -> None:
        self.findings.append(Finding(check, state, text, hint))

    def attempt(self, check: str, action: Callable[[], T]) -> T | None:
        """Return what an action returns; an error of it is a finding, and its warnings are notes."""
        self._progress(f"check {check}", 0.0)
        value = None
        with collect_warnings() as notes:
            try:
                value = action()
            except StayalignedError as error:
                self.found(check, "fail", error.message, error.hint)
            except (OSError, MemoryError, RuntimeError) as error:
                self.found(check, "fail", f"{type(error).__name__}: {error}")
        for text in notes:
            self.found(check, "note", text)
        return value

    def check_machine(self, out: Path) -> None:
        installed = versions()
        self.found("versions", "ok", ", ".join(f"{name} {version}" for name, version in installed.items()))
        threads = len(os.sched_getaffinity(0))
        self.found("machine", "ok", f"{threads} CPU threads, {_gb(available_memory())} memory free, GPU: {_gpu()}")
        place = next(path for path in out.absolute().parents if path.exists()) if not out.exists() else out
        free = shutil.disk_usage(place).free
        if not os.access(place, os.W_OK):
            self.found("machine", "fail", f"{place} is not writable", "Give another --out, or its permissions.")
        elif free < 2 << 30:
            self.found("machine", "note", f"{_gb(free)} free at {place}: checkpoints may not fit")
        else:
            self.found("machine", "ok", f"{_gb(free)} free at {place}")

    def check_experiment(self, experiment: Experiment, resolved: Experiment, *, quick: bool, ask: bool) -> None:
        self.attempt("configuration", lambda: require_installed([experiment], report=True))
        self.attempt("configuration", lambda: self._check_length(experiment))
        tokenizer = self.attempt("model", lambda: self._check_model(resolved))
        rows = self.attempt("data", lambda: self._check_data(resolved, tokenizer))
        if ask:
            self._ask_servers(resolved)
        fits = self.attempt("memory", lambda: self._check_memory(resolved))
        if quick or rows is None or tokenizer is None or not fits or any(f.state == "fail" for f in self.findings):
            self.found("time", "note", "not measured" if quick else "not measured: fix what fails first")
            return
        self.attempt("time", lambda: self._measure(experiment))

    def _check_length(self, experiment: Experiment) -> None:
        for text in preview_training(experiment):
            self.found("configuration", "note", text)

    def _check_model(self, e: Experiment) -> Any:
        """Return the tokenizer, whose chat template has been probed."""
        if e.generation.backend == "endpoint":
            self.found("model", "ok", f"{e.model}: behind a server")
            return e.model
        from stayaligned.hf import models

        tokenizer = models.load_tokenizer(e.model, e.chat_template)
        self.found("model", "ok", "found, and its chat template shows requests and answers")
        if e.base_model is not None:
            self._check_base(e.model, e.base_model)
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
        from stayaligned.data.sources import read_examples

        trained_on: dict[str, Sequence[Example]] = {}
        if e.trains and e.task is not None:
            trained_on["training"] = e.task.load("train")
        if e.alignment_data is not None and e.training_defense.needs_alignment_data:
            rows = read_examples(e.alignment_data, origin="alignment")
            trained_on["alignment"] = rows
            if len(rows) < _FEW_SAFETY_ROWS:
                few = f"{e.alignment_data}: {len(rows)} safety rows are few"
                self.found("data", "note", few, "Some hundreds, of many kinds of harm, generalize better.")
        for name, rows in trained_on.items():
            self.found("data", "ok", f"{name}: {len(rows)} rows{self._describe_lengths(rows, tokenizer, e.max_length)}")
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

    def _check_memory(self, e: Experiment) -> bool:
        """Compare a lower bound with what is free, before anything is loaded; return whether it fits."""
        place = Path(e.model).expanduser()
        weights = sum(file.stat().st_size for file in place.glob("*.safetensors")) if place.is_dir() else 0
        if not weights:
            return True
        full = e.trains and e.lora is None
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
            if self.attempt("server", lambda: list(complete_over_endpoint(endpoint, [one], "benign", max_tokens=4))):
                self.found("server", "ok", f"{endpoint.base_url}: generates")
        said = Completion(prompt_set="benign", id="0", prompt=_ASK, text="Hello!")
        for judge in e.judges:
            if "endpoint" not in type(judge).model_fields:
                continue
            verdicts = self.attempt("server", lambda judge=judge: list(judge.judge([said])))
            if verdicts is None:
                continue
            good = verdicts[0].outcome is not None
            self.found("server", "ok" if good else "fail", f"judge {judge.name}: {'judges' if good else verdicts[0]}")

    def _measure(self, experiment: Experiment) -> None:
        steps = planned_steps(experiment)
        if experiment.trains and steps is None:
            self.found("time", "note", "the length of the training is not known before its rows are read")
        elif experiment.trains and steps is not None:
            self.estimates.append(estimate_training(experiment, steps, self._progress))
        if experiment.generation.backend != "endpoint":
            found = estimate_generation(experiment, self._progress)
            self.estimates += [found] if found else []
        self.found(
            "memory", "ok", f"{_gb(peak_memory())} were used while measuring, {_gb(available_memory())} are free"
        )
        for one in self.estimates:
            shown = f"{one.part}: about {_span(one.seconds)} ({_span(one.low)} to {_span(one.high)}); {one.measured}"
            self.found("time", "ok", shown)
        self.found(
            "time",
            "note",
            "while nothing else uses this machine; without patches, judges that are models or servers, lm_eval, probes",
        )


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
