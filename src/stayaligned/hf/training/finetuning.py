"""Supervised fine-tuning with transformers' Trainer or TRL's SFTTrainer; training that resumes from checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.algorithms.lisa import local_shard
from stayaligned.core.errors import StayalignedError, nearest
from stayaligned.core.files import writable
from stayaligned.core.progress import WorkProgress
from stayaligned.core.records import Example
from stayaligned.core.settings import TrainerKind
from stayaligned.hf.features import (
    IGNORED,
    PaddingCollator,
    encode_examples,
    endings_of_answers,
    refuse_unknown_tokens,
    with_known_padding,
)
from stayaligned.hf.hosts import load_checkpoint_weights, require_trl
from stayaligned.hf.quiet import bars_off
from stayaligned.hf.training.dead_adapters import report_dead_adapters
from stayaligned.hf.training.resuming import restore_converted
from stayaligned.hf.training.row_lengths import report_row_lengths
from stayaligned.hf.training.safety_probe import ended_by_guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

_RENAMED = {
    "warmup_ratio": "`warmup_steps`, where a value below 1 is a share of the steps (0.1 for 10 %)",
    "evaluation_strategy": "`eval_strategy`",
    "no_cuda": "`use_cpu`",
    "group_by_length": "`train_sampling_strategy`",
    "logging_dir": "nothing: trackers have their own settings",
    "overwrite_output_dir": "nothing: a run resumes the checkpoints in its output directory",
    "save_safetensors": "nothing: files are always safetensors",
    "tokenizer": "nothing: the model's tokenizer is used",
}
"""Settings of earlier versions that configurations still contain, and their replacements."""


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, so that a fresh LoRA starts from the same weights in every run."""
    from transformers import set_seed

    set_seed(seed)


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    arguments: Mapping[str, Any],
    *,
    kind: TrainerKind,
    max_length: int,
    callbacks: Sequence[Any] = (),
) -> Trainer:
    """Build a Trainer or SFTTrainer that learns the completions of `examples`, and masks their prompts.

    Defaults that differ from the host's: no tracker, no gradient checkpointing, and on a machine without an
    accelerator the CPU in full precision.

    Args:
        model: what is trained, with its LoRA if it has one.
        tokenizer: the model's tokenizer.
        examples: the rows.
        arguments: fields of TrainingArguments, or of SFTConfig for `kind="sft"`.
        kind: the class of trainer.
        max_length: number of tokens at which a row is cut.
        callbacks: callbacks of the trainer.

    Raises:
        StayalignedError: if there are no examples; if the host rejects an argument, which the message names; or if
            TRL can't compute the router loss of this mixture of experts.
    """
    from transformers import PrinterCallback, Trainer

    if not examples:
        raise StayalignedError("there are no rows to train on", hint="Check the task, its split and the attack.")
    config = _build_arguments(arguments, kind, max_length)
    tokenizer = with_known_padding(tokenizer, model)
    rows = build_dataset(tokenizer, examples, kind=kind, max_length=max_length)
    refuse_unknown_tokens(tokenizer, model, (row["input_ids"] for row in rows))
    trainer_class: Any = Trainer
    options: dict[str, Any] = {"data_collator": PaddingCollator.of(tokenizer)}
    if kind == "sft":
        from trl import SFTTrainer

        trainer_class, options = SFTTrainer, {}
    with bars_off(bool(config.disable_tqdm)), _naming_arguments(trainer_class.__name__, arguments):
        trainer: Trainer = trainer_class(
            model,
            config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            **options,
        )
    if kind == "sft" and not vars(config).get("packing"):
        prepared: Any = trainer.train_dataset
        report_row_lengths("training", len(examples), prepared, max_length, endings_of_answers(tokenizer))
    _require_expert_count(trainer)
    report_dead_adapters(trainer)
    # Without a progress bar the host would print every row of its log; `train` returns them.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _require_expert_count(trainer: Any) -> None:
    """Check that TRL finds the number of experts, in a field that some mixtures' configurations lack."""
    config = trainer.model.config.get_text_config()
    if getattr(trainer, "aux_loss_enabled", False) and not hasattr(config, "num_experts"):
        raise StayalignedError(
            f"trainer: sft: TRL can't compute the router loss of a {type(config).__name__}, which lacks num_experts",
            hint="Set training.router_aux_loss_coef to 0.0, or use `trainer: transformers`.",
        )


def build_dataset(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    kind: TrainerKind,
    max_length: int,
    name: str = "training",
) -> Any:
    """Build the training set for a kind of trainer: features, for TRL uncut and with a mask of the completion.

    Args:
        tokenizer: the model's tokenizer.
        examples: the rows.
        kind: the class of trainer.
        max_length: number of tokens at which a row is cut.
        name: what the rows are called in the warning that some are cut.

    Raises:
        StayalignedError: as for `stayaligned.hf.features.encode_examples`.
    """
    if kind == "transformers":
        rows = encode_examples(tokenizer, examples, max_length)
        report_row_lengths(name, len(rows), rows, max_length, endings_of_answers(tokenizer))
        return rows
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "completion_mask": [int(label != IGNORED) for label in row["labels"]]}
            for row in encode_examples(tokenizer, examples, sys.maxsize)
        ]
    )


def train(trainer: Trainer, *, resume: bool = True, progress: WorkProgress | None = None) -> list[dict[str, Any]]:
    """Train to the end and return the rows of the log.

    Args:
        trainer: a trainer from `build_trainer` or a defense.
        resume: whether to resume the last complete checkpoint in the output directory, if there is one. Incomplete
            checkpoints are skipped. A checkpoint of the last step is loaded without training, because the host would
            take one more step.
        progress: called after every step with the share of steps done and, in words, the step and the last loss.

    Raises:
        StayalignedError: if a checkpoint can't be written; or if a gradient is not finite, before it reaches the
            weights, so that earlier checkpoints are valid. Other errors of the host are raised unchanged.
    """
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _require_finite_gradient(trainer, state.global_step)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if checkpoint is not None:
                restore_converted(trainer, checkpoint)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress is not None:
                losses = [row["loss"] for row in state.log_history if "loss" in row]
                loss = f", loss {losses[-1]:.4g}" if losses else ""
                detail = f"step {state.global_step} of {state.max_steps}{loss}"
                progress(state.global_step / state.max_steps, detail)

    output_dir = Path(str(trainer.args.output_dir))
    checkpoint = last_complete_checkpoint(output_dir) if resume else None
    if checkpoint is not None and load_finished(trainer, checkpoint):
        return list(trainer.state.log_history)
    callback = Progress()
    trainer.add_callback(callback)
    try:
        with bars_off(bool(trainer.args.disable_tqdm)):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception as error:
        # If the disk is full, Python, safetensors and torch raise different errors, the last without a reason.
        incomplete = output_dir / f"checkpoint-{trainer.state.global_step}"
        if isinstance(error, StayalignedError) or not incomplete.is_dir() or _is_complete(incomplete):
            raise
        raise StayalignedError(
            f"{incomplete} can't be written: {error}",
            hint="Free disk space and run again: training resumes from the previous checkpoint.",
        ) from error
    finally:
        trainer.remove_callback(callback)
    return list(trainer.state.log_history)


def load_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """Load a checkpoint if training ended there, and return whether it did.

    Training ended at the last step, or because a guard ended it. The host would continue from such a checkpoint; at
    the last step it would take one step too many.

    Raises:
        StayalignedError: if the weights are sharded, which the host loads only to train.
    """
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps and not ended_by_guard(state.log_history):
        return False
    if trainer.is_fsdp_enabled:
        raise StayalignedError(
            f"{checkpoint} is of a finished run: no steps are left to train",
            hint="Use its weights, or train again in another output_dir.",
        )
    load_checkpoint_weights(trainer, checkpoint)
    restore_converted(trainer, checkpoint)
    if callable(finish := getattr(trainer, "finish_loaded", None)):  # of an objective
        finish(checkpoint)
    trainer.state = state
    return True


def save_trained(trainer: Trainer, directory: Path) -> None:
    """Write the trained adapter, or all weights if there is none; every process must call this, and one writes.

    Raises:
        StayalignedError: if the disk is full.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    whole: Any = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.args.should_save:
        with writable(directory):
            model.save_pretrained(str(directory), state_dict=whole)


def _require_finite_gradient(trainer: Trainer, step: int) -> None:
    from torch.nn.utils import get_total_norm

    gradients = [local_shard(p.grad) for p in trainer.model.parameters() if p.grad is not None]  # pyright: ignore
    # A gradient scaler handles infinite gradients: it skips the step and lowers the scale.
    if trainer.accelerator.scaler is None and not get_total_norm(gradients).isfinite():
        raise StayalignedError(
            f"the gradient is not finite at optimizer step {step}; training stopped before it",
            hint="Lower learning_rate, set max_grad_norm, or check the rows. Earlier checkpoints are valid.",
        )


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint of the highest step with a valid trainer_state.json, which the host writes last."""
    found = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := re.search(r"-(\d+)$", path.name))]
    return next((path for _, path in sorted(found, reverse=True) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return checkpoint.name == f"checkpoint-{state['global_step']}"
    return False


def host_defaults() -> dict[str, Any]:
    """Return the settings of every trainer that the user does not give."""
    import torch

    on_cpu = {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}
    return {"report_to": "none", "gradient_checkpointing": None, **on_cpu}


def _build_arguments(arguments: Mapping[str, Any], kind: TrainerKind, max_length: int) -> TrainingArguments:
    if kind == "sft":
        require_trl("trainer: sft", otherwise="set `trainer: transformers`")
        from trl import SFTConfig

        if arguments.get("chat_template_path") is not None:
            raise StayalignedError(
                "training.chat_template_path: the rows are rendered before TRL sees them",
                hint="Set `chat_template.file` to the Jinja file, so that generation uses it too.",
            )
        config_class: type[TrainingArguments] = SFTConfig
        defaults: dict[str, Any] = {"completion_only_loss": True, "max_length": max_length}
    else:
        from transformers import TrainingArguments

        config_class, defaults = TrainingArguments, {}
    defaults |= host_defaults()
    _require_known_arguments(config_class, arguments)
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if arguments.get(key, 1) < 1:
            raise StayalignedError(f"training.{key} = {arguments[key]}: must be 1 or more")
    with _naming_arguments(config_class.__name__, arguments):
        return config_class(**{**defaults, **arguments})


@contextlib.contextmanager
def _naming_arguments(host: str, given: Mapping[str, Any]) -> Generator[None]:
    """Convert an error of the host about its arguments into one that names the arguments that its message mentions."""
    try:
        yield
    except StayalignedError:
        raise
    except Exception as error:
        words = set(re.findall(r"[\w-]+", str(error)))
        named = sorted(key for key in given if key in words)
        named = named or sorted(key for key, value in given.items() if isinstance(value, str) and value in words)
        where = ", ".join(f"training.{key}" for key in named) or "training"
        raise StayalignedError(f"{where}: {host} rejects: {error}", hint=f"See the documentation of {host}.") from error


def _require_known_arguments(config_class: type[TrainingArguments], given: Mapping[str, Any]) -> None:
    """Check that the host has every argument, and that numbers are not given as text; report all errors at once."""
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    problems: list[str] = []
    hints: list[str] = []
    for key, value in given.items():
        if key not in fields:
            problems.append(f"training.{key}: {config_class.__name__} has no such setting")
            hints.append(
                f"Instead of {key}: {_RENAMED[key]}." if key in _RENAMED else nearest(key, fields) or f"Remove {key}."
            )
        elif isinstance(value, str) and type(fields[key].default) in (int, float):
            problems.append(f"training.{key}: {value!r} is text; a number is required")
            hints.append("In YAML, 1e-5 is text: write 1.0e-5.")
    if problems:
        raise StayalignedError("\n".join(problems), hint=" ".join(dict.fromkeys(hints)))
