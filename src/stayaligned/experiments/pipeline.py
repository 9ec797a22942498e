"""One experiment as a straight pipe of stages, each a directory keyed by everything that it depends on.

    data ─► train ─► patch … ─► generate ─► degeneration, judge … ─► result

A stage that is there is not computed again, so five thresholds train once, a new judge needs no model, and resuming
is rerunning. A stage appears by one rename when it is complete; nothing half-written is ever taken for a result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.core.progress import Progress, silent
from stayaligned.core.provenance import commit, versions
from stayaligned.core.records import (
    Completion,
    Example,
    PromptSet,
    Verdict,
    read_jsonl,
    write_jsonl,
)
from stayaligned.data.prompts import Prompts, load_prompts
from stayaligned.data.sources import read_examples
from stayaligned.defenses import ModelPair, TrainingSetup
from stayaligned.defenses.patching.directories import PROJECTION_FILE, patch_directory, read_projection
from stayaligned.evaluation import caveats
from stayaligned.evaluation.answers import Ask, answer_all, ask_model, ask_server
from stayaligned.evaluation.degeneration import Degenerate, Degeneration, signs
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.lm_eval import harness_metrics
from stayaligned.evaluation.measure import JUDGED, Place, judge_names, measure
from stayaligned.evaluation.results import PatchRecord, Provenance, Result, evidence_text, write_result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.validation import strings_in
from stayaligned.experiments.stages.judge import stored_verdicts
from stayaligned.experiments.stages.keys import identify, stage_key
from stayaligned.experiments.stages.lm_eval import HarnessStages
from stayaligned.experiments.stages.store import Store

EXPERIMENT_FILE = "experiment.yaml"


@dataclass(frozen=True)
class Run:
    """An experiment and the store that keeps its stages."""

    experiment: Experiment
    store: Store
    progress: Progress = silent
    threads: int | None = None
    """CPU threads for torch; all if not given."""
    position: int = 0
    """The arm's place in its grid."""
    announce: Callable[[str], None] = lambda _text: None
    """Called with what a reader should know before something costly starts."""

    @cached_property
    def resolved(self) -> Experiment:
        """The experiment with every input a path."""
        return self.experiment.resolved(progress=self.progress)

    # ---- keys: pure in the experiment and its inputs' content ---------------------------------------------------

    @cached_property
    def data_key(self) -> str:
        """What the training rows depend on."""
        e = self.experiment
        return self._key("data", e.task and e.task.training_identity(), e.attack and e.attack.identity(), e.seed)

    @cached_property
    def adapter_key(self) -> str:
        """What the trained weights depend on."""
        e = self.experiment
        if not e.trains:
            return self._key("untrained", {"model": e.model, "adapter": e.adapter})
        defense = e.training_defense
        alignment = e.alignment_data if defense.needs_alignment_data else None
        return self._key(
            "train",
            self.data_key,
            {"model": e.model, "alignment_data": alignment},
            defense.identity(),
            e.lora,
            e.trainer,
            e.training,
            e.max_length,
            e.seed,
            *([] if e.watch is None else [e.watch.model_dump(mode="json")]),
        )

    @cached_property
    def patch_keys(self) -> tuple[str, ...]:
        """One key per patch; each depends on the adapter before it."""
        e = self.experiment
        keys: list[str] = []
        for patch in e.patches:
            models = {"model": e.model, "base_model": e.base_model if patch.needs_base else None}
            keys.append(self._key("patch", keys[-1] if keys else self.adapter_key, patch.identity(), models))
        return tuple(keys)

    @property
    def weights_key(self) -> str:
        """What the final weights depend on."""
        return self.patch_keys[-1] if self.patch_keys else self.adapter_key

    @cached_property
    def generate_key(self) -> str:
        """What the completions depend on."""
        e = self.experiment
        named = {"harmful_prompts": e.harmful_prompts, "benign_prompts": e.benign_prompts}
        prompts = {key: p.identity() if isinstance(p, Prompts) else p for key, p in named.items()} | {"limit": e.limit}
        tasks = [t and t.identity() for t in (e.task, e.skills)]
        return self._key("generate", self.weights_key, {"model": e.model}, prompts, tasks, e.generation.identity())

    @cached_property
    def degeneration_key(self) -> str:
        """What the signs of degeneration depend on."""
        settings = self.experiment.degeneration or Degeneration()
        model = {} if settings.perplexity is None else {"model": self.experiment.model}
        return self._key("degeneration", self.generate_key, settings.model_dump(mode="json"), model)

    def judge_key(self, judge: Judge) -> str:
        """What one judge's verdicts depend on."""
        return self._key("judge", self.generate_key, judge.identity())

    def harness_keys(self) -> dict[str, str]:
        """What the values of each of lm-eval's tasks depend on, by the name of the task."""
        e = self.experiment
        if e.lm_eval is None:
            return {}
        parts = (self.weights_key, {"model": e.model}, e.seed)
        return {name: self._key("lm_eval", *parts, e.lm_eval.identity(name)) for name in e.lm_eval.tasks}

    @cached_property
    def id(self) -> str:
        """The identity of the whole experiment."""
        judges = [self.judge_key(judge) for judge in self.experiment.judges]
        harness = [*self.harness_keys().values()]
        looked = [] if self.experiment.degeneration is None else [self.degeneration_key]
        seed = self.experiment.seed
        return self._key("result", self.generate_key, judges, seed, *([harness] if harness else []), *looked)[:20]

    def _key(self, *parts: object) -> str:
        return stage_key(parts, self.experiment.seed)

    # ---- stages ------------------------------------------------------------------------------------------------

    def examples(self) -> list[Example]:
        """The rows that are trained on, poisoned if there is an attack."""

        def fill(directory: Path) -> None:
            task, attack = self.resolved.task, self.resolved.attack
            rows: list[Example] = list(task.load("train")) if task else []
            if attack is not None:
                rows = attack.poison(rows, random.Random(f"{self.experiment.seed}:attack"))  # noqa: S311
            write_jsonl(directory / "examples.jsonl", rows)

        return read_jsonl(self.store.compute("data", self.data_key, fill) / "examples.jsonl", Example)

    def trained(self) -> Path | None:
        """The training stage, with `adapter/` (or `model/`) and `log.jsonl`; None if nothing is trained."""
        if not self.experiment.trains:
            return None

        stage = self.store.compute("train", self.adapter_key, self.train_into)
        # Not before the stage stands: a disk that fills up while it is written must not cost the training.
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        return stage

    @property
    def _checkpoints(self) -> Path:
        """The Trainer's output directory: beside the stage, under a fixed name that a rerun finds and resumes."""
        return self.store.root / "stages" / f".train-{self.adapter_key[:20]}.checkpoints"

    def train_into(self, directory: Path) -> Mapping[str, Any]:
        """Fill the training stage's directory; one of several processes calls this for its part in the training."""
        with self._host_libraries():
            return self._train(directory)

    def _train(self, directory: Path) -> Mapping[str, Any]:
        from stayaligned.hf import models, templates
        from stayaligned.hf.features import template_hash
        from stayaligned.hf.training import finetuning, safety_probe

        e = self.resolved
        examples = self.examples()
        finetuning.seed_everything(e.seed)
        tokenizer = models.load_tokenizer(e.model)
        model: Any = models.load_model(e.model)
        if e.lora is not None:
            model = models.attach_lora(model, e.lora)
        setup = TrainingSetup(
            model=model,
            tokenizer=tokenizer,
            examples=examples,
            alignment_examples=self._alignment_examples(),
            arguments={
                "disable_tqdm": True,
                **(e.training or {}),
                "output_dir": str(self._checkpoints),
                "seed": e.seed,
            },
            kind=e.trainer,
            max_length=e.max_length,
        )
        trainer = e.training_defense.make_trainer(setup)
        if e.watch is not None:
            safety_probe.attach_watch(trainer, e.watch, max_length=e.max_length)
        log = finetuning.train(trainer, progress=lambda share: self.progress(f"train {e.training_defense.name}", share))
        finetuning.save_trained(trainer, directory / self.product)
        if e.lora is None:
            tokenizer.save_pretrained(directory / "model")
        templates.write_template(tokenizer, directory / self.product)
        write_text(directory / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
        return {"template_hash": template_hash(tokenizer), "examples": len(examples)}

    def _alignment_examples(self) -> list[Example]:
        """The safety rows that the defense trains on; none if it trains on none."""
        e = self.resolved
        if e.alignment_data is None or not e.training_defense.needs_alignment_data:
            return []
        return read_examples(e.alignment_data, origin="alignment")

    def finetuned(self) -> Path | None:
        """What is judged: the adapter or model that was trained or given, then patched; None for the model as it is."""
        trained = self.trained()
        current: Path | None = None
        if self.resolved.adapter is not None:
            current = Path(self.resolved.adapter)
        elif trained is not None:
            current = trained / self.product
        pair = ModelPair(aligned=self.resolved.model, base=self.resolved.base_model)
        for patch, key in zip(self.resolved.patches, self.patch_keys, strict=True):
            source = current
            if source is None:
                raise StayalignedError(f"patch {patch.name!r} has nothing to work on")

            def fill(directory: Path, source: Path = source, patch: Any = patch) -> None:
                self.progress(f"patch {patch.name}", 0.0)
                with self._host_libraries():
                    patch_directory(source, directory / self.product, patch, pair)

            current = self.store.compute("patch", key, fill) / self.product
        return current

    @property
    def product(self) -> str:
        """The name of the directory that training and patches write: a LoRA's adapter, or the whole model."""
        return "model" if self.experiment.lora is None and self.experiment.adapter is None else "adapter"

    def completions(self) -> list[Completion]:
        """The answers of the final model to every prompt set."""

        def fill(directory: Path) -> Mapping[str, Any]:
            settings = self.resolved.generation
            if settings.endpoint is not None:
                return self._generate(directory, ask_server(settings, settings.endpoint), "server")
            with self._host_libraries():
                from stayaligned.hf.features import template_hash

                model, tokenizer = self._final_model()
                return self._generate(directory, ask_model(model, tokenizer, settings), template_hash(tokenizer))

        stage = self.store.compute("generate", self.generate_key, fill)
        self._answers.unlink(missing_ok=True)  # not before the stage stands
        return read_jsonl(stage / "completions.jsonl", Completion)

    @property
    def _answers(self) -> Path:
        """The journal of answers: beside the stage, under a fixed name that a rerun finds."""
        return self.store.root / "stages" / f".generate-{self.generate_key[:20]}.answers"

    def _generate(self, directory: Path, ask: Ask, template: str) -> Mapping[str, Any]:
        rows = answer_all(self._answers, self._prompt_sets(), ask, self.progress)
        write_jsonl(directory / "completions.jsonl", rows)
        return {"template_hash": template, "completions": len(rows)}

    def _final_model(self) -> tuple[Any, Any]:
        """The model that is judged, and its tokenizer."""
        from stayaligned.hf import models, templates

        e, finetuned = self.resolved, self.finetuned()
        whole = finetuned is not None and self.product == "model"
        tokenizer = models.load_tokenizer(e.model)
        for place in () if e.other_template else (Path(e.model), finetuned):
            if place is not None:
                templates.refuse_other_template(place, tokenizer)
        model = models.load_finetuned(finetuned if whole and finetuned else e.model, None if whole else finetuned)
        return model, tokenizer

    @cached_property
    def harness(self) -> HarnessStages:
        """The stages of lm-eval's tasks."""
        e = self.resolved
        return HarnessStages(
            self.store, e.lm_eval, self.harness_keys(), e.seed, self._host_libraries, progress=self.progress
        )

    def _prompt_sets(self) -> dict[PromptSet, Sequence[Example]]:
        e = self.resolved
        sets: dict[PromptSet, Sequence[Example]] = {}
        if e.harmful_prompts is not None:
            sets["harmful"] = load_prompts(e.harmful_prompts, "harmful")
        if e.benign_prompts is not None:
            sets["benign"] = load_prompts(e.benign_prompts, "task")
        if e.task is not None:
            sets["task"] = e.task.load("test")
        if e.skills is not None:
            sets["skills"] = e.skills.load("test")
        return {name: rows[: e.limit] for name, rows in sets.items()}

    def degenerate(self) -> dict[Place, bool | None]:
        """Whether each answer is no language; empty if the experiment does not look."""
        settings = self.experiment.degeneration
        if settings is None:
            return {}

        def fill(directory: Path) -> None:
            completions = self.completions()
            nats: Sequence[float | None] = [None] * len(completions)
            if settings.perplexity is not None:
                with self._host_libraries():
                    nats = self._nats(completions)
            found = [
                Degenerate(prompt_set=c.prompt_set, id=c.id, reasons=signs(c.text, settings, each), nats=each)
                for c, each in zip(completions, nats, strict=True)
            ]
            write_jsonl(directory / "degeneration.jsonl", found)

        stage = self.store.compute("degeneration", self.degeneration_key, fill)
        rows = read_jsonl(stage / "degeneration.jsonl", Degenerate)
        return {(row.prompt_set, row.id): bool(row.reasons) for row in rows}

    def _nats(self, completions: Sequence[Completion]) -> list[float | None]:
        """Nats a token of each answer under the aligned model."""
        from stayaligned.hf import models
        from stayaligned.hf.generation import perplexity

        model = models.load_finetuned(self.resolved.model, None)
        say = functools.partial(self.progress, "perplexity")
        return perplexity.answer_nats(model, models.load_tokenizer(self.resolved.model), completions, progress=say)

    def verdicts(self, judge: Judge) -> list[Verdict]:
        """One judge's verdicts on the answers to harmful and benign prompts."""
        return stored_verdicts(
            self.store,
            self.judge_key(judge),
            self.resolved.judges[self.experiment.judges.index(judge)],
            judge_names(self.experiment.judges)[judge],
            self.completions,
            seed=self.experiment.seed,
            max_unscored=self.experiment.max_unscored,
            around=self._host_libraries if judge.uses_torch else contextlib.nullcontext,
            progress=self.progress,
            announce=self.announce,
        )

    def write_into(self, directory: Path) -> Result:
        """Measure everything, and write `evidence.jsonl` and `result.json` into a directory.

        Raises:
            StayalignedError: if a judge left a larger share unscored than `max_unscored`.
        """
        self.harness.load_tasks()
        self.finetuned()  # so that the time of training and patching is not counted as generation's
        completions = self.completions()
        verdicts = {judge: self.verdicts(judge) for judge in self.experiment.judges}
        scores: dict[Place, float | None] = {
            (c.prompt_set, c.id): self._score(c) for c in completions if c.prompt_set not in JUDGED
        }
        of_harness = harness_metrics(self.harness.values(self._final_model))
        found = measure(completions, verdicts, scores, self.degenerate())
        rows = evidence_text(found.evidence)
        result = Result(
            id=self.id,
            arm=self.experiment.arm,
            seed=self.experiment.seed,
            position=self.position,
            notes=tuple(self._notes()),
            experiment=self.experiment.spec(),
            judges=found.judges,
            agreements=found.agreements,
            scores=(*found.scores, *of_harness),
            training_log=self._training_log(),
            patches=self._patch_records(),
            samples=found.samples,
            evidence_sha256=hashlib.sha256(rows.encode()).hexdigest(),
            provenance=self._provenance(),
        )
        write_result(directory, result, rows)
        return result

    def _score(self, completion: Completion) -> float | None:
        task = self.resolved.task if completion.prompt_set == "task" else self.resolved.skills
        return task.score(completion) if task is not None else None

    def _notes(self) -> Iterable[str]:
        """What a reader must know before trusting the numbers."""
        yield from caveats.of_repetitions(self.completions())
        yield from self.harness.left_out()
        e = self.experiment
        if not e.trains:
            return
        trained_on = {"training": self.examples(), "alignment": self._alignment_examples()}
        yield from caveats.of_overlaps(trained_on, self._prompt_sets())
        log = self._training_log()
        yield from e.training_defense.notes(max((int(row["step"]) for row in log), default=0))
        if e.watch is not None and e.watch.guard is not None:
            yield from caveats.of_guard(e.watch.guard, log)

    def _training_log(self) -> tuple[dict[str, Any], ...]:
        trained = self.trained()
        if trained is None:
            return ()
        return tuple(json.loads(line) for line in (trained / "log.jsonl").read_text(encoding="utf-8").splitlines())

    def _patch_records(self) -> tuple[PatchRecord, ...]:
        return tuple(
            PatchRecord(
                patch=patch.name,
                settings=patch.spec(),
                layers=read_projection(self.store.directory("patch", key) / self.product / PROJECTION_FILE).layers,
            )
            for patch, key in zip(self.experiment.patches, self.patch_keys, strict=True)
        )

    def _provenance(self) -> Provenance:
        stages: dict[str, Path] = {}
        if self.experiment.trains:
            stages["data"] = self.store.directory("data", self.data_key)
            stages["train"] = self.store.directory("train", self.adapter_key)
        for patch, key in zip(self.experiment.patches, self.patch_keys, strict=True):
            stages[f"patch {patch.name}"] = self.store.directory("patch", key)
        stages["generate"] = self.store.directory("generate", self.generate_key)
        if self.experiment.degeneration is not None:
            stages["degeneration"] = self.store.directory("degeneration", self.degeneration_key)
        for judge, name in judge_names(self.experiment.judges).items():
            stages[f"judge {name}"] = self.store.directory("judge", self.judge_key(judge))
        stages |= self.harness.directories()
        records = {name: json.loads((path / "stage.json").read_text()) for name, path in stages.items()}
        return Provenance(
            versions=versions(),
            commit=commit(),
            inputs=dict(self._inputs()),
            template_hash=records["generate"]["template_hash"],
            stages={name: str(path.relative_to(self.store.root)) for name, path in stages.items()},
            seconds={name: record["seconds"] for name, record in records.items()},
        )

    def _inputs(self) -> Iterable[tuple[str, str]]:
        """The place of each model and data file in the configuration, and what identifies its content."""
        for place, value in strings_in(self.experiment.spec()):
            found = identify(value, self.experiment.seed, place.rpartition(".")[2])
            if found != value:
                yield place, found

    @contextlib.contextmanager
    def _host_libraries(self) -> Generator[None]:
        """Torch on this run's threads; the host libraries quiet."""
        import torch

        from stayaligned.hf.quiet import quiet

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with quiet():
            yield
