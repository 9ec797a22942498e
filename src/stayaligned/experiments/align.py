"""Align a base model by supervised fine-tuning on safety data.

    base model + safety data ─► LoRA or full weights, resumable ─► merged, an ordinary checkpoint + alignment.json

During training, checkpoints are in `OUT.unfinished`; `OUT` appears by one rename when it is complete.
"""

from __future__ import annotations

import copy
import functools
import glob
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError, first_problem
from stayaligned.core.files import new_directory, read_text, refuse_existing, refuse_inside, writable, write_text
from stayaligned.core.progress import Progress, silent
from stayaligned.core.provenance import commit, versions
from stayaligned.core.records import Example
from stayaligned.data.sources import read_examples
from stayaligned.defenses import TrainingSetup
from stayaligned.experiments.config.alignment import RECORD_FORMAT, Alignment, AlignmentRecord
from stayaligned.experiments.config.packages import require_for_training
from stayaligned.experiments.config.validation import resolve_references
from stayaligned.experiments.stages.keys import identify, split_options
from stayaligned.experiments.stages.store import collect_warnings, exclusive
from stayaligned.experiments.stages.train import LOGS, keep_logs
from stayaligned.weights.checkpoints import checkpoint_directory, open_checkpoint, read_json_object, weights_fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from stayaligned.hf.training.row_lengths import RowLengths

ALIGNMENT_FILE = "alignment.json"
_KEPT_LOG_ROWS = 10


@dataclass(frozen=True)
class _Job:
    alignment: Alignment
    """The settings as they were given."""
    resolved: Alignment
    """The settings with each `testbed:` reference replaced by a path."""
    examples: Sequence[Example]
    inputs: Mapping[str, str]
    out: Path
    progress: Progress
    warnings: list[str]
    """Warnings so far, which become the record's notes."""

    @property
    def work(self) -> Path:
        """Directory of the training checkpoints: beside `out`, the same in a rerun."""
        return self.out.with_name(f"{self.out.name}.unfinished")


def align(alignment: Alignment, out: str | Path, *, progress: Progress = silent) -> AlignmentRecord:
    """Align a base model, and write an ordinary checkpoint and `alignment.json` into the new directory `out`.

    Called again with the same settings and inputs, it resumes from the last complete checkpoint, and on the same
    machine ends with the same bytes as an uninterrupted run. A complete `out` is not computed again.

    Args:
        alignment: the settings.
        out: the new directory.
        progress: called with what is being done and the share that is done, 0 to 1.

    Raises:
        StayalignedError: if `out` belongs to another alignment or holds other files, if an input is invalid, if a
            package is not installed, or if training diverges.
    """
    with collect_warnings() as warnings:
        return _align(alignment, Path(out), progress, warnings)


def _align(alignment: Alignment, out: Path, progress: Progress, warnings: list[str]) -> AlignmentRecord:
    require_for_training(alignment.trainer)
    resolved = resolve_references(alignment, alignment.seed, progress)
    examples = read_examples(resolved.data, origin="alignment")[: resolved.limit]
    job = _Job(alignment, resolved, examples, _inputs(alignment, resolved, examples), out, progress, warnings)
    refuse_inside(job.out, resolved.base_model, split_options(resolved.data)[0])
    if job.out.exists():
        return _finished(job)
    with exclusive(job.work):
        if job.out.exists():  # another process has finished it in the meantime
            return _finished(job)
        _enter(job)
        try:
            record = _make(job)
        except BaseException:
            _discard(job.work, only_if_nothing_is_lost=True)
            raise
    _discard(job.work)
    return record


def _inputs(alignment: Alignment, resolved: Alignment, examples: Sequence[Example]) -> dict[str, str]:
    """Return what identifies the content of each input: the hash of a file, or a hub id with its revision."""
    base = identify(alignment.base_model, alignment.seed, "base_model")
    if base == resolved.base_model:
        base = f"{base}@{checkpoint_directory(base).name}"
    rows = "".join(example.model_dump_json() + "\n" for example in examples)
    found = {"base_model": base, "data": _sha256(rows)}
    if resolved.chat_template.file is not None:
        found["chat_template"] = _sha256(_template(resolved.chat_template.file))
    return found


def _template(path: str) -> str:
    return read_text(Path(path).expanduser(), hint="Give the path of a Jinja file.")


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


# ---- existing directories -----------------------------------------------------------------------------------------


def _finished(job: _Job) -> AlignmentRecord:
    """Return the record of a complete directory; refuse one that other settings or inputs produced."""
    file = job.out / ALIGNMENT_FILE
    if not file.is_file():
        refuse_existing(job.out)
    content = read_json_object(file, hint="Choose a new name, or remove it yourself.")
    _refuse_other(job, job.out, content)
    _discard(job.work)
    try:
        return AlignmentRecord.model_validate(content)
    except ValidationError as error:
        raise StayalignedError(
            f"{file}: not a record of format version {RECORD_FORMAT}: {first_problem(error)}",
            hint="It was edited or damaged; use another --out, or remove the directory.",
        ) from None


def _enter(job: _Job) -> None:
    """Prepare the working directory, keeping the checkpoints of the same alignment."""
    from stayaligned.hf.training.finetuning import last_complete_checkpoint

    file = job.work / ALIGNMENT_FILE
    if not file.is_file() and any(path.name != ".lock" for path in job.work.iterdir()):
        raise StayalignedError(f"{job.work}: holds files that this command did not write", hint="Use another --out.")
    if last_complete_checkpoint(job.work) is not None:
        _refuse_other(job, job.work, read_json_object(file, hint="Remove the directory."))
    for leftover in job.out.parent.glob(f".{glob.escape(job.out.name)}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    started = {"format_version": RECORD_FORMAT, "alignment": job.alignment.spec(), "inputs": job.inputs}
    write_text(file, json.dumps(started, indent=2) + "\n")


def _refuse_other(job: _Job, directory: Path, content: Mapping[str, Any]) -> None:
    version = content.get("format_version", RECORD_FORMAT)
    if version != RECORD_FORMAT:
        raise StayalignedError(
            f"{directory}: written by another version of stayaligned (format {version}, this version uses "
            f"{RECORD_FORMAT})",
            hint="Use another --out, or remove the directory and rerun.",
        )
    before = dict(_flat({**content.get("alignment", {}), **content.get("inputs", {})}))
    now = dict(_flat({**job.alignment.spec(), **job.inputs}))
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        raise StayalignedError(
            f"{directory}: belongs to another alignment; different: {', '.join(changed)}",
            hint="Use another --out, or remove it yourself.",
        )


def _flat(value: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{place}{key}.")
        else:
            yield f"{place}{key}", item


def _discard(work: Path, *, only_if_nothing_is_lost: bool = False) -> None:
    """Remove a working directory, and last of all the file that marks it."""
    from stayaligned.hf.training.finetuning import last_complete_checkpoint

    if not (work / ALIGNMENT_FILE).is_file() or (only_if_nothing_is_lost and last_complete_checkpoint(work)):
        return
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


# ---- training and merging ------------------------------------------------------------------------------------------


class _Trained(NamedTuple):
    model: PreTrainedModel | None
    """The full weights, on the CPU and in their stored types; None if an adapter was written."""
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    facts: dict[str, Any]
    """Fields of the record that training determines."""


def _make(job: _Job) -> AlignmentRecord:
    from stayaligned.hf.features import template_hash
    from stayaligned.hf.models import merge_adapter
    from stayaligned.hf.quiet import quiet
    from stayaligned.hf.rendering import save_tokenizer
    from stayaligned.hf.templates import write_template

    with quiet():
        trained = _train(job)
        job.progress("merge and write", 0.0)
        model = trained.model or merge_adapter(job.resolved.base_model, job.work / "adapter")
        model.generation_config = trained.generation
        record = AlignmentRecord(
            alignment=job.alignment.spec(),
            inputs=dict(job.inputs),
            base_weights=weights_fingerprint(open_checkpoint(job.resolved.base_model)),
            stored_in=str(model.dtype).removeprefix("torch."),
            template_hash=template_hash(trained.tokenizer),
            versions=versions(),
            commit=commit(),
            **trained.facts,
        )
        with new_directory(job.out) as temporary:
            model.save_pretrained(temporary)
            save_tokenizer(trained.tokenizer, temporary)
            write_template(trained.tokenizer, temporary)
            keep_logs(job.work, temporary / LOGS)
            write_text(temporary / ALIGNMENT_FILE, record.model_dump_json(indent=2) + "\n")
    return record


def _train(job: _Job) -> _Trained:
    """Train; write a LoRA into the working directory, so that its model is freed before it is merged."""
    from stayaligned.hf import models
    from stayaligned.hf.features import end_of_answer
    from stayaligned.hf.generation.generate import config_ending_with
    from stayaligned.hf.training import finetuning
    from stayaligned.weights.unsupported import BASE_PRESERVING_INITS, refuse_quantized

    a = job.resolved
    refuse_quantized(open_checkpoint(a.base_model))
    init = (a.lora or {}).get("init_lora_weights", True)
    if init not in BASE_PRESERVING_INITS:
        raise StayalignedError(
            f"lora.init_lora_weights={init!r} changes the base weights, but the LoRA is merged into unchanged ones",
            hint="Remove this setting.",
        )
    tokenizer = models.load_tokenizer(a.base_model, a.chat_template)
    end = end_of_answer(tokenizer)
    finetuning.seed_everything(a.seed)
    model = models.load_model(a.base_model)
    generation, config = config_ending_with(model, end), copy.deepcopy(model.config)
    types, trained_in = models.weight_types(model), _trained_in(a, model.dtype)
    models.cast_weights_(model, trained_in)
    adapted: Any = model if a.lora is None else models.attach_lora(model, a.lora)
    trainer = TrainingSetup(
        model=adapted,
        tokenizer=tokenizer,
        examples=job.examples,
        alignment_examples=(),
        arguments={"disable_tqdm": True, **a.training, "output_dir": str(job.work), "seed": a.seed},
        kind=a.trainer,
        max_length=a.max_length,
    ).trainer()
    lengths = _count_rows(trainer, tokenizer, len(job.examples), a.max_length)
    log = finetuning.train(trainer, progress=functools.partial(job.progress, "align"))
    if a.lora is None:
        model.cpu()
        models.cast_weights_(model, types)
        model.config = config  # the Trainer writes the tokenizer's special tokens into the config
    else:
        with writable(job.work):
            adapted.save_pretrained(str(job.work / "adapter"))
    facts = {
        "rows": lengths.given - lengths.left_out,
        "rows_cut": lengths.cut,
        "steps": trainer.state.global_step,
        "log": log[-_KEPT_LOG_ROWS:],
        "trained_in": str(trained_in).removeprefix("torch."),
        "notes": list(job.warnings),
    }
    return _Trained(model if a.lora is None else None, tokenizer, generation, facts)


def _trained_in(alignment: Alignment, stored: torch.dtype) -> torch.dtype:
    import torch

    if alignment.dtype != "auto":
        return getattr(torch, alignment.dtype)
    # AdamW's steps on fp16 weights and gradients through fp16 layers are unsafe without loss scaling.
    return torch.float32 if alignment.lora is None or stored == torch.float16 else stored


def _count_rows(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, given: int, max_length: int) -> RowLengths:
    """Count the rows, those left out, and those that are cut, as the training's warning does.

    Raises:
        StayalignedError: if all rows are cut: the model would not learn where a completion ends.
    """
    from stayaligned.hf.features import endings_of_answers
    from stayaligned.hf.training.row_lengths import count_row_lengths

    rows: Any = trainer.train_dataset
    limit = None if getattr(trainer.args, "packing", False) else max_length  # packed rows are joined to this length
    found = count_row_lengths(given, rows, limit, endings_of_answers(tokenizer))
    if limit is not None and found.cut == len(rows):
        raise StayalignedError(
            f"all {found.cut} rows are cut at max_length={max_length} tokens, so the end of a completion can't be "
            "learned",
            hint="Raise `max_length`, or use shorter rows.",
        )
    return found
