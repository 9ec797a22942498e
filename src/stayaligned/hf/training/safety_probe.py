"""Probes that measure a model's safety while it trains, and a guard that acts on them.

A watched trainer logs a row of its own before the first step and every `every_steps` steps, to the trackers that
`report_to` names:

- `watch/refusal_margin`: nats, mean over the prompts; `watch/refusing`: share of the prompts with a margin above 0.
- `watch/alignment_loss`: nats per token, on held-out safe completions.
- `watch/out_of_tolerance`: 1 if the guard acted; `watch/stopped`: 1 if it ended training; `watch/rolled_back_to`: the
  step whose weights it restored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from stayaligned.algorithms.lisa import local_shard
from stayaligned.algorithms.objectives import label_log_probabilities
from stayaligned.core.errors import StayalignedError
from stayaligned.core.settings import Guard, Watch
from stayaligned.data.sources import read_examples
from stayaligned.hf.features import PaddingCollator, encode_examples, encode_prefix
from stayaligned.hf.training.weight_files import read_weights, reshard, trainable_weights, weights_file, write_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

_TrainerT = TypeVar("_TrainerT", bound="Trainer")
_Row = Mapping[str, Sequence[int]]
SAFE_WEIGHTS = "watch_safe"
_PREFIX = "watch/"
_STOPPED = "watch/stopped"


class Probe:
    """The encoded rows of a watch, and the measures of a model on them."""

    def __init__(self, watch: Watch, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self._collator, self._batch_size = PaddingCollator(0), watch.batch_size
        self._refusals: Sequence[_Row] = ()
        self._compliances: Sequence[_Row] = ()
        self._answers: Sequence[_Row] = ()
        if watch.prompts is not None:
            harmful = read_examples(watch.prompts, origin="harmful", prompts_only=True)[: watch.limit]
            self._refusals = [encode_prefix(tokenizer, example.prompt, watch.refusal) for example in harmful]
            self._compliances = [encode_prefix(tokenizer, example.prompt, watch.compliance) for example in harmful]
        if watch.alignment_data is not None:
            safe = read_examples(watch.alignment_data, origin="alignment")[: watch.limit]
            self._answers = encode_examples(tokenizer, safe, max_length)

    def measure(self, model: Any) -> dict[str, float]:
        """Measure a model in evaluation mode, without drawing random numbers."""
        measures: dict[str, float] = {}
        if self._refusals:
            margins = [
                refusal - compliance
                for refusal, compliance in zip(
                    self._log_probabilities(model, self._refusals),
                    self._log_probabilities(model, self._compliances),
                    strict=True,
                )
            ]
            measures["refusal_margin"] = sum(margins) / len(margins)
            measures["refusing"] = sum(margin > 0 for margin in margins) / len(margins)
        if self._answers:
            tokens = sum(label >= 0 for row in self._answers for label in row["labels"][1:])
            measures["alignment_loss"] = -sum(self._log_probabilities(model, self._answers)) / tokens
        return measures

    def _log_probabilities(self, model: Any, rows: Sequence[_Row]) -> list[float]:
        """Compute log p of each row's labels, given the tokens before them, in nats."""
        device = next(model.parameters()).device
        values: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            batch = {k: v.to(device) for k, v in self._collator(rows[start : start + self._batch_size]).items()}
            labels = batch.pop("labels")
            with torch.no_grad():
                values += label_log_probabilities(model(**batch).logits, labels).sum(-1).tolist()
        return values


def attach_watch(trainer: _TrainerT, watch: Watch, *, max_length: int = 1024) -> _TrainerT:
    """Make a built trainer measure its model's safety while it trains, and return the same object.

    The probes do not change training, bit for bit, unless a guard acts. Every process measures all rows.

    Args:
        trainer: any transformers or TRL trainer, with or without Lisa.
        watch: what to measure, how often, and the guard.
        max_length: number of tokens at which the rows of `alignment_data` are cut.

    Raises:
        StayalignedError: if the rows can't be read, the trainer has no tokenizer, or a setting would undo the guard.
    """
    from transformers import TrainerCallback

    tokenizer: Any = trainer.processing_class
    if tokenizer is None:
        raise StayalignedError(
            "the trainer has no tokenizer to encode the probes' prompts",
            hint="Construct it with processing_class=tokenizer.",
        )
    guard = watch.guard
    if guard is not None and guard.action in ("stop", "rollback") and trainer.args.load_best_model_at_end:
        raise StayalignedError(
            f"load_best_model_at_end would undo the guard's {guard.action}: it loads the weights of another checkpoint",
            hint="Remove load_best_model_at_end or the guard.",
        )
    objective = getattr(trainer, "objective", None)
    if guard is not None and guard.action == "rollback" and objective is not None and objective.replaces_weights:
        raise StayalignedError(
            f"defense {objective.name!r} would undo the guard's rollback: it replaces the weights at the end",
            hint="Set another action, or use another defense.",
        )
    watcher = _Watcher(trainer, watch, Probe(watch, tokenizer, max_length=max_length))

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.begin(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % watch.every_steps == 0:
                watcher.check(state, control)

    trainer.add_callback(Callback())
    return trainer


class _Watcher:
    def __init__(self, trainer: Any, watch: Watch, probe: Probe) -> None:
        self._trainer, self._watch, self._probe = trainer, watch, probe
        self._start: dict[str, float] = {}
        self._safe_step = 0

    def begin(self, state: Any) -> None:
        """Measure before the first step, or read that measurement from the log of a resumed run."""
        if self._watch.guard is not None and self._watch.guard.action == "lower_learning_rate":
            _lambda_scheduler(self._trainer)
        if ended_by_guard(state.log_history):
            raise StayalignedError(
                f"the guard ended this training after step {state.global_step}",
                hint="Use the weights of its last checkpoint, or train again in another output_dir.",
            )
        rows = [row for row in state.log_history if f"{_PREFIX}refusing" in row or f"{_PREFIX}alignment_loss" in row]
        if state.global_step and rows:
            self._start = {key.removeprefix(_PREFIX): value for key, value in rows[0].items()}
            safe_steps = [row["step"] for row in rows if not row.get(f"{_PREFIX}out_of_tolerance")]
            self._safe_step = safe_steps[-1]
            if not (self._directory() / self._file(self._trainable())).is_file():
                self._store_safe(state.global_step)  # resumed from another directory
            return
        self._start = self._measure()
        self._store_safe(state.global_step)

    def check(self, state: Any, control: Any) -> None:
        """Measure, and let the guard act if the measure is out of tolerance."""
        due = control.should_log
        guard = self._watch.guard
        measures = self._measure(guard)
        if guard is not None and measures.get("out_of_tolerance"):
            self._act(guard, control)
        else:
            self._store_safe(state.global_step)
        control.should_log = due  # the host counts any logged row as the training row that is due

    def _act(self, guard: Guard, control: Any) -> None:
        if guard.action == "lower_learning_rate":
            _scale_learning_rate(self._trainer, guard.factor)
            return
        if guard.action == "rollback":
            self._restore()
        self._log({_STOPPED: 1.0})
        control.should_training_stop = True
        # A checkpoint with this row in its log, so that a rerun does not train again.
        control.should_save = self._trainer.args.save_strategy != "no"

    def _log(self, row: dict[str, float]) -> None:
        """Log a row in evaluation mode: otherwise TRL would add its training metrics, which the next row then lacks."""
        model = self._trainer.model
        training = model.training
        model.eval()
        try:
            self._trainer.log(row)
        finally:
            model.train(training)

    def _measure(self, guard: Guard | None = None) -> dict[str, float]:
        model = self._trainer.model
        training = model.training
        model.eval()
        try:
            measures = self._mean_over_processes(self._probe.measure(model))
            if guard is not None and _is_out_of_tolerance(guard, measures, self._start):
                measures["out_of_tolerance"] = 1.0
            self._log({f"{_PREFIX}{name}": value for name, value in measures.items()})
        finally:
            model.train(training)
            reshard(model)
        return measures

    def _mean_over_processes(self, measures: dict[str, float]) -> dict[str, float]:
        """Average over all processes, so that all act alike even if their values differ in the last bit."""
        if self._trainer.args.world_size == 1:
            return measures
        values = torch.tensor(list(measures.values()), dtype=torch.float64, device=self._trainer.args.device)
        return dict(zip(measures, self._trainer.accelerator.reduce(values, "mean").tolist(), strict=True))

    # ---- rolling back ------------------------------------------------------------------------------------------

    def _store_safe(self, step: int) -> None:
        self._safe_step = step
        if self._watch.guard is None or self._watch.guard.action != "rollback":
            return
        params = self._trainable()
        if self._trainer.args.should_save or self._file(params) != f"{SAFE_WEIGHTS}.safetensors":
            write_weights(
                self._directory() / self._file(params), {name: local_shard(p).detach() for name, p in params.items()}
            )

    def _restore(self) -> None:
        params = self._trainable()
        self._trainer.accelerator.wait_for_everyone()
        safe = read_weights(self._directory() / self._file(params), params, device="model")
        with torch.no_grad():
            for name, param in params.items():
                local_shard(param).copy_(safe[name])
        self._log({f"{_PREFIX}rolled_back_to": float(self._safe_step)})

    def _trainable(self) -> dict[str, Tensor]:
        return trainable_weights(self._trainer.model)

    def _directory(self) -> Path:
        return Path(str(self._trainer.args.output_dir))

    def _file(self, params: Mapping[str, Tensor]) -> str:
        args = self._trainer.args
        return weights_file(SAFE_WEIGHTS, params, rank=args.process_index, processes=args.world_size)


def _is_out_of_tolerance(guard: Guard, measures: Mapping[str, float], start: Mapping[str, float]) -> bool:
    change = measures[guard.measure] - start[guard.measure]
    worsening = -change if guard.measure == "refusal_margin" else change
    return not worsening <= guard.tolerance  # NaN is out of tolerance


def ended_by_guard(log: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a guard has ended the training that wrote this log."""
    return any(_STOPPED in row for row in log)


def _lambda_scheduler(trainer: Any) -> torch.optim.lr_scheduler.LambdaLR:
    scheduler = trainer.lr_scheduler
    scheduler = getattr(scheduler, "scheduler", scheduler)  # inside accelerate's wrapper
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise StayalignedError(
            f"the guard can't lower the learning rate of a {type(scheduler).__name__}",
            hint="Set another lr_scheduler_type, or action: stop.",
        )
    return scheduler


def _scale_learning_rate(trainer: Any, factor: float) -> None:
    """Multiply the learning rate of all later steps, also after a resume: checkpoints store the scheduler's rates."""
    scheduler = _lambda_scheduler(trainer)
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    # The rate that the host logs.
    scheduler._last_lr = [rate * factor for rate in scheduler.get_last_lr()]  # pyright: ignore[reportPrivateUsage]
    for group in trainer.optimizer.param_groups:
        group["lr"] *= factor
