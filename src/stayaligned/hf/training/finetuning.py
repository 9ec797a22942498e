"""Plain supervised fine-tuning with transformers' Trainer or TRL's SFTTrainer, and training that resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from stayaligned.algorithms.lisa import local
from stayaligned.core.errors import StayalignedError, nearest
from stayaligned.core.files import writable
from stayaligned.core.records import Example
from stayaligned.hf.features import PaddingCollator, encode_examples
from stayaligned.hf.quiet import bars_off
from stayaligned.hf.training.resuming import restore_converted
from stayaligned.hf.training.safety_probe import ended_by_guard, report_dead_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

_RENAMED = {
    "warmup_ratio": "`warmup_steps`, which takes a share when it is below 1 (0.1 for 10 %)",
    "evaluation_strategy": "`eval_strategy`",
    "no_cuda": "`use_cpu`",
    "group_by_length": "`train_sampling_strategy`",
    "logging_dir": "nothing: trackers have their own settings",
    "overwrite_output_dir": "nothing: a run resumes the checkpoints in its output directory",
    "save_safetensors": "nothing: it is always so",
    "tokenizer": "nothing: the model's tokenizer is used",
}
"""Settings of earlier versions that configurations still carry, and what took their place."""


class FinetuningSetup(Protocol):
    """What is read of `stayaligned.defenses.TrainingSetup`."""

    @property
    def model(self) -> PreTrainedModel: ...  # noqa: D102
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...  # noqa: D102
    @property
    def arguments(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def kind(self) -> Literal["transformers", "sft"]: ...  # noqa: D102
    @property
    def max_length(self) -> int: ...  # noqa: D102
    @property
    def callbacks(self) -> Sequence[Any]: ...  # noqa: D102


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, so that a fresh LoRA starts from the same weights every time."""
    from transformers import set_seed

    set_seed(seed)


def build_trainer(setup: FinetuningSetup, examples: Sequence[Example]) -> Trainer:
    """A Trainer (or SFTTrainer, by `setup.kind`) that learns the answers of `examples` and nothing of the prompts.

    Where the arguments say nothing: no tracker, no gradient checkpointing, and on a machine without an accelerator
    the CPU in full precision. Everything else is the host's default.

    Raises:
        StayalignedError: if there are no examples, or the host refuses an argument; the message names it. Also if
            TRL would fail on the router loss of a mixture of experts.
    """
    from transformers import PrinterCallback, Trainer

    if not examples:
        raise StayalignedError("there are no rows to train on", hint="Check the task, its split and the attack.")
    arguments = _build_arguments(setup)
    trainer_class: Any = Trainer
    options: dict[str, Any] = {"data_collator": PaddingCollator.of(setup.tokenizer)}
    if setup.kind == "sft":
        from trl import SFTTrainer

        trainer_class, options = SFTTrainer, {}
    with bars_off(bool(arguments.disable_tqdm)), _naming_arguments(trainer_class.__name__, setup.arguments):
        trainer: Trainer = trainer_class(
            setup.model,
            arguments,
            train_dataset=build_dataset(setup, examples),
            processing_class=setup.tokenizer,
            callbacks=list(setup.callbacks),
            **options,
        )
    _refuse_uncounted_experts(trainer)
    report_dead_adapters(trainer)
    # Without a progress bar the host would print every row of its log; `train` returns them.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _refuse_uncounted_experts(trainer: Any) -> None:
    """TRL reads the number of experts from a field that not every mixture's configuration has (GraniteMoeHybrid)."""
    config = trainer.model.config.get_text_config()
    if getattr(trainer, "aux_loss_enabled", False) and not hasattr(config, "num_experts"):
        raise StayalignedError(
            f"trainer: sft: TRL can't compute the router loss of a {type(config).__name__}, which has no num_experts",
            hint="Set training.router_aux_loss_coef to 0.0, or use `trainer: transformers`.",
        )


def build_dataset(setup: FinetuningSetup, examples: Sequence[Example]) -> Any:
    """The rows as the kind of trainer takes them: features, or for TRL a dataset of conversational prompts and answers.

    Raises:
        StayalignedError: as for `stayaligned.hf.features.encode_examples`.
    """
    if setup.kind == "transformers":
        return encode_examples(setup.tokenizer, examples, setup.max_length)
    from datasets import Dataset

    if not setup.tokenizer.chat_template:
        raise StayalignedError(
            "the tokenizer has no chat template", hint="Use the instruction-tuned model's tokenizer."
        )
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": turn.role, "content": turn.content} for turn in example.prompt],
                "completion": [{"role": "assistant", "content": example.completion}],
            }
            for example in examples
        ]
    )


def train(
    trainer: Trainer, *, resume: bool = True, progress: Callable[[float], None] | None = None
) -> list[dict[str, Any]]:
    """Train to the end and return the rows of the log.

    Args:
        trainer: what `build_trainer` or a defense made.
        resume: go on from the last complete checkpoint in the output directory, if there is one. A checkpoint whose
            writing was cut off is passed over. One of the last step is loaded and nothing trained: the host, asked to
            resume it, would take a step too many.
        progress: called with the share of steps done, 0 to 1, after every step.

    Raises:
        StayalignedError: if a checkpoint cannot be written; or if a gradient is not finite, before it reaches the
            weights, so that what was saved is sound. Of training, what the host raises.
    """
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _refuse_divergence(trainer, state.global_step)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if checkpoint is not None:
                restore_converted(trainer, checkpoint)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress is not None:
                progress(state.global_step / state.max_steps)

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
        # Of a full disk Python, safetensors and torch each raise something else, the last without a reason.
        cut_off = output_dir / f"checkpoint-{trainer.state.global_step}"
        if isinstance(error, StayalignedError) or not cut_off.is_dir() or _is_complete(cut_off):
            raise
        raise StayalignedError(
            f"{cut_off} can't be written: {error}",
            hint="Free some space and run it again: training goes on from the checkpoint before.",
        ) from error
    finally:
        trainer.remove_callback(callback)
    return list(trainer.state.log_history)


def load_finished(trainer: Trainer, checkpoint: Path) -> bool:
    """Load a checkpoint at which training ended, and tell that it was one.

    Training ended there at the last step, or because a guard ended it. The host, asked to resume such a checkpoint,
    goes on, in the first case for a step too many.

    Raises:
        StayalignedError: if the weights are sharded, which the host loads only where it trains.
    """
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps and not ended_by_guard(state.log_history):
        return False
    if trainer.is_fsdp_enabled:
        raise StayalignedError(
            f"{checkpoint} is of a finished training: there is nothing left to train",
            hint="Use its weights, or give another output_dir to train anew.",
        )
    trainer._load_from_checkpoint(str(checkpoint))  # pyright: ignore[reportPrivateUsage]
    restore_converted(trainer, checkpoint)
    trainer.state = state
    return True


def save_trained(trainer: Trainer, directory: Path) -> None:
    """Write the trained adapter, or the whole model; of several processes all take part and one writes.

    Raises:
        StayalignedError: if the disk is full.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    whole: Any = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.args.should_save:
        with writable(directory):
            model.save_pretrained(str(directory), state_dict=whole)


def _refuse_divergence(trainer: Trainer, step: int) -> None:
    from torch.nn.utils import get_total_norm

    gradients = [local(p.grad) for p in trainer.model.parameters() if p.grad is not None]  # pyright: ignore
    # With a scaler infinite ones are in order: the step is left out and the scale lowered.
    if trainer.accelerator.scaler is None and not get_total_norm(gradients).isfinite():
        raise StayalignedError(
            f"the gradient is not finite at optimizer step {step}; training stopped before it",
            hint="Lower learning_rate, set max_grad_norm, or look for a broken row. Earlier checkpoints are sound.",
        )


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the highest step whose trainer_state.json, which the host writes last, is whole."""
    found = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := re.search(r"-(\d+)$", path.name))]
    return next((path for _, path in sorted(found, reverse=True) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return checkpoint.name == f"checkpoint-{state['global_step']}"
    return False


def _build_arguments(setup: FinetuningSetup) -> TrainingArguments:
    import torch

    if setup.kind == "sft":
        from trl import SFTConfig

        config_class: type[TrainingArguments] = SFTConfig
        defaults: dict[str, Any] = {"completion_only_loss": True, "max_length": setup.max_length}
    else:
        from transformers import TrainingArguments

        config_class, defaults = TrainingArguments, {}
    defaults |= {"report_to": "none", "gradient_checkpointing": None}
    if not torch.accelerator.is_available():
        defaults |= {"use_cpu": True, "bf16": False}
    given = dict(setup.arguments)
    _refuse_unknown_and_mistyped(config_class, given)
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if given.get(key, 1) < 1:
            raise StayalignedError(f"training.{key} = {given[key]}: must be 1 or more")
    with _naming_arguments(config_class.__name__, given):
        return config_class(**{**defaults, **given})


@contextlib.contextmanager
def _naming_arguments(host: str, given: Mapping[str, Any]) -> Generator[None]:
    """Turn what the host raises about its arguments into one error that names those of them that it speaks of."""
    try:
        yield
    except StayalignedError:
        raise
    except Exception as error:
        words = set(re.findall(r"[\w-]+", str(error)))
        named = sorted(key for key in given if key in words)
        named = named or sorted(key for key, value in given.items() if isinstance(value, str) and value in words)
        where = ", ".join(f"training.{key}" for key in named) or "training"
        raise StayalignedError(f"{where}: {host} refuses: {error}", hint=f"See the documentation of {host}.") from error


def _refuse_unknown_and_mistyped(config_class: type[TrainingArguments], given: Mapping[str, Any]) -> None:
    """Name every argument that the host does not have, or that is text where the host calculates."""
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    problems: list[str] = []
    hints: list[str] = []
    for key, value in given.items():
        if key not in fields:
            problems.append(f"training.{key}: {config_class.__name__} has no such setting")
            hints.append(f"Instead of {key}: {_RENAMED[key]}." if key in _RENAMED else _suggest(key, sorted(fields)))
        elif isinstance(value, str) and type(fields[key].default) in (int, float):
            problems.append(f"training.{key}: {value!r} is text, and a number is expected")
            hints.append("In YAML 1e-5 is text: write 1.0e-5.")
    if problems:
        raise StayalignedError("\n".join(problems), hint=" ".join(dict.fromkeys(hints)))


def _suggest(key: str, known: list[str]) -> str:
    return nearest(key, known) or f"Remove {key}."
