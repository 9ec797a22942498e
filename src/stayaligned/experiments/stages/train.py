"""Fine-tuning: `adapter/` or `model/`, `log.jsonl`, and in `logs/` what trackers such as TensorBoard wrote."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stayaligned.core.files import write_text
from stayaligned.defenses import TrainingSetup
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.data import load_alignment_rows, load_training_rows

LOGS = "logs"
"""Directory of the trackers' files, in a training stage and in an aligned model."""
_NO_LOGS = frozenset({"adapter", "alignment.json", "README.md"})


def train(context: Context) -> Path | None:
    """Return the directory of the training stage; None if nothing is trained."""
    if not context.experiment.trains:
        return None
    stage = context.store.compute("train", context.plan.train, lambda directory: train_into(context, directory))
    # After the stage is complete: a disk that fills up while it is written must not cost the training.
    shutil.rmtree(_checkpoints(context), ignore_errors=True)
    return stage


def train_into(context: Context, directory: Path) -> Mapping[str, Any]:
    """Train and write the stage's files; in a distributed run, every process calls this."""
    with context.host_libraries():
        return _train(context, directory)


def read_training_log(context: Context) -> tuple[dict[str, Any], ...]:
    """Return the rows of the Trainer's log; none if nothing is trained."""
    stage = train(context)
    if stage is None:
        return ()
    return tuple(json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines())


def keep_logs(output_dir: Path, directory: Path) -> None:
    """Copy what trackers wrote into a Trainer's output directory to `directory`, which is created if there is any.

    Checkpoints, weights and hidden files are no logs.
    """
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        if path.name.startswith((".", "checkpoint-")) or path.name in _NO_LOGS or path.suffix == ".safetensors":
            continue
        directory.mkdir(exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, directory / path.name)
        else:
            shutil.copyfile(path, directory / path.name)


def _checkpoints(context: Context) -> Path:
    """Return the Trainer's output directory, beside the stage, where a rerun finds it and resumes."""
    return context.store.scratch("train", context.plan.train, "checkpoints")


def _train(context: Context, directory: Path) -> Mapping[str, Any]:
    from stayaligned.hf import models, templates
    from stayaligned.hf.features import template_hash
    from stayaligned.hf.rendering import save_tokenizer
    from stayaligned.hf.training import finetuning, safety_probe

    e, product = context.resolved, context.plan.product
    ordered = e.attack is not None and e.attack.ordered
    title = f"train {e.training_defense.name}"
    context.progress(title, 0.0, "loading the model")
    examples = load_training_rows(context)
    finetuning.seed_everything(e.seed)
    tokenizer = models.load_tokenizer(e.model, e.chat_template)
    model: Any = models.load_model(e.model)
    if e.lora is not None:
        model = models.attach_lora(model, e.lora)
    setup = TrainingSetup(
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        alignment_examples=load_alignment_rows(context),
        arguments={
            "disable_tqdm": True,
            **(e.training or {}),
            **({"train_sampling_strategy": "sequential"} if ordered else {}),
            "output_dir": str(_checkpoints(context)),
            "seed": e.seed,
        },
        kind=e.trainer,
        max_length=e.max_length,
        aligned_model=e.model,
        base_model=e.base_model,
        ordered=ordered,
    )
    defense = e.training_defense
    trainer = defense.make_trainer(setup)
    if e.watch is not None:
        safety_probe.attach_watch(trainer, e.watch, max_length=e.max_length)
    log = finetuning.train(trainer, progress=functools.partial(context.progress, title))
    finetuning.save_trained(trainer, directory / product)
    if e.lora is None:
        save_tokenizer(tokenizer, directory / product)
    templates.write_template(tokenizer, directory / product)
    if trainer.args.should_save:
        defense.after_saving(setup, directory / product)
    write_text(directory / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    keep_logs(_checkpoints(context), directory / LOGS)
    return {"template_hash": template_hash(tokenizer), "examples": len(examples)}
