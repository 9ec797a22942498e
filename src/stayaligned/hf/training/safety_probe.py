"""What is watched while a model trains: its safety, by probes; and LoRA layers that learn nothing.

A watched trainer logs, every `every_steps` steps and before the first, a row of its own to whatever `report_to` names:

- `watch/refusal_margin`: nats, mean over the prompts; `watch/refusing`: share of the prompts where it is above 0.
- `watch/alignment_loss`: nats a token, on held-out safe answers.
- `watch/out_of_tolerance`: 1 where the guard acted; `watch/stopped`: 1 where it ended training, `watch/rolled_back_to`:
  the step whose weights it restored.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stayaligned.algorithms.lisa import local
from stayaligned.core.errors import StayalignedError
from stayaligned.core.settings import Guard, Watch
from stayaligned.data.sources import read_examples
from stayaligned.hf.features import PaddingCollator, encode_examples, encode_prefix
from stayaligned.hf.training.weight_files import read_weights, reshard, trainable_weights, weights_file, write_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

TrainerT = TypeVar("TrainerT", bound="Trainer")
Row = Mapping[str, Sequence[int]]
SAFE = "watch_safe"
_PREFIX = "watch/"
_STOPPED = "watch/stopped"
_log = logging.getLogger(__name__)


class Probe:
    """The encoded rows of a watch, and what a model makes of them."""

    def __init__(self, watch: Watch, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self._collator, self._batch_size = PaddingCollator.of(tokenizer), watch.batch_size
        self._refusals: Sequence[Row] = ()
        self._compliances: Sequence[Row] = ()
        self._answers: Sequence[Row] = ()
        if watch.prompts is not None:
            asked = read_examples(watch.prompts, origin="harmful", prompts_only=True)[: watch.limit]
            self._refusals = [encode_prefix(tokenizer, example.prompt, watch.refusal) for example in asked]
            self._compliances = [encode_prefix(tokenizer, example.prompt, watch.compliance) for example in asked]
        if watch.alignment_data is not None:
            safe = read_examples(watch.alignment_data, origin="alignment")[: watch.limit]
            self._answers = encode_examples(tokenizer, safe, max_length)

    def measure(self, model: Any) -> dict[str, float]:
        """The measures of a model in evaluation mode; no random number is drawn."""
        found: dict[str, float] = {}
        if self._refusals:
            margins = [
                refusal - compliance
                for refusal, compliance in zip(
                    self._log_probabilities(model, self._refusals),
                    self._log_probabilities(model, self._compliances),
                    strict=True,
                )
            ]
            found["refusal_margin"] = sum(margins) / len(margins)
            found["refusing"] = sum(margin > 0 for margin in margins) / len(margins)
        if self._answers:
            tokens = sum(label >= 0 for row in self._answers for label in row["labels"][1:])
            found["alignment_loss"] = -sum(self._log_probabilities(model, self._answers)) / tokens
        return found

    def _log_probabilities(self, model: Any, rows: Sequence[Row]) -> list[float]:
        """Of the labels of each row, given what is before them: log p, in nats."""
        device = next(model.parameters()).device
        found: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            batch = {k: v.to(device) for k, v in self._collator(rows[start : start + self._batch_size]).items()}
            labels = batch.pop("labels")
            with torch.no_grad():
                found += label_log_probabilities(model(**batch).logits, labels).tolist()
        return found


def label_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ log p of each row's labels, in fp32.

    Args:
        logits: (batch, length, vocabulary); position t predicts label t + 1.
        labels: (batch, length); negative where there is none.

    Returns:
        (batch,), in nats.
    """
    predicted = labels[:, 1:]
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, predicted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(predicted < 0, 0.0, chosen).sum(-1)


def attach_watch(trainer: TrainerT, watch: Watch, *, max_length: int = 1024) -> TrainerT:
    """Let a built trainer measure its model's safety while it trains; returns the same object.

    The probes leave training as it is, bit for bit, unless a guard acts. Every process measures all rows.

    Args:
        trainer: any transformers or TRL trainer, with Lisa in it or not.
        watch: what is measured, how often, and what is done about it.
        max_length: tokens after which the rows of `alignment_data` are cut.

    Raises:
        StayalignedError: if the rows can't be read, the trainer has no tokenizer, or a setting would undo the guard.
    """
    from transformers import TrainerCallback

    tokenizer: Any = trainer.processing_class
    if tokenizer is None:
        raise StayalignedError(
            "the trainer has no tokenizer to put the probes' prompts with", hint="Build it with processing_class=…."
        )
    guard = watch.guard
    if guard is not None and guard.action == "rollback" and trainer.args.load_best_model_at_end:
        raise StayalignedError(
            "load_best_model_at_end would undo what the guard's rollback restores", hint="Leave one of them out."
        )
    watcher = _Watcher(trainer, watch, Probe(watch, tokenizer, max_length=max_length))

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.begin(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % watch.every_steps == 0:
                watcher.look(state, control)

    trainer.add_callback(Callback())
    return trainer


class _Watcher:
    def __init__(self, trainer: Any, watch: Watch, probe: Probe) -> None:
        self._trainer, self._watch, self._probe = trainer, watch, probe
        self._start: dict[str, float] = {}
        self._safe_step = 0

    def begin(self, state: Any) -> None:
        """Measure before the first step; of a resumed run, find in its log what was measured then."""
        if self._watch.guard is not None and self._watch.guard.action == "lower_learning_rate":
            _lambda_scheduler(self._trainer)
        if ended_by_guard(state.log_history):
            raise StayalignedError(
                f"the guard ended this training after step {state.global_step}",
                hint="Use the weights of its last checkpoint, or train anew in another output_dir.",
            )
        rows = [row for row in state.log_history if f"{_PREFIX}refusing" in row or f"{_PREFIX}alignment_loss" in row]
        if state.global_step and rows:
            self._start = {key.removeprefix(_PREFIX): value for key, value in rows[0].items()}
            kept = [row["step"] for row in rows if not row.get(f"{_PREFIX}out_of_tolerance")]
            self._safe_step = kept[-1]
            if not (self._directory() / self._file(self._trainable())).is_file():
                self._keep_safe(state.global_step)  # resumed from another directory
            return
        self._start = self._measure()
        self._keep_safe(state.global_step)

    def look(self, state: Any, control: Any) -> None:
        """Measure, and act where the guard asks for it."""
        due = control.should_log
        found = self._measure(guarded=True)
        if found.get("out_of_tolerance"):
            self._act(control)
        else:
            self._keep_safe(state.global_step)
        control.should_log = due  # the host takes any row for the one of training that is due

    def _act(self, control: Any) -> None:
        guard = self._guard()
        if guard.action == "lower_learning_rate":
            _scale_learning_rate(self._trainer, guard.factor)
            return
        if guard.action == "rollback":
            self._restore()
        self._trainer.log({_STOPPED: 1.0})
        control.should_training_stop = True

    def _measure(self, *, guarded: bool = False) -> dict[str, float]:
        model = self._trainer.model
        training = model.training
        model.eval()
        try:
            found = self._same_everywhere(self._probe.measure(model))
            if guarded and self._watch.guard is not None and _worsened(self._watch.guard, found, self._start):
                found["out_of_tolerance"] = 1.0
            # In evaluation mode, or TRL would take its own metrics of training for those of this row.
            self._trainer.log({f"{_PREFIX}{name}": value for name, value in found.items()})
        finally:
            model.train(training)
            reshard(model)
        return found

    def _same_everywhere(self, found: dict[str, float]) -> dict[str, float]:
        """The means over all processes, so that none acts alone for a difference in the last bit."""
        if self._trainer.args.world_size == 1:
            return found
        values = torch.tensor(list(found.values()), dtype=torch.float64, device=self._trainer.args.device)
        return dict(zip(found, self._trainer.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _guard(self) -> Guard:
        if self._watch.guard is None:
            raise RuntimeError("no guard is set")
        return self._watch.guard

    # ---- rolling back ------------------------------------------------------------------------------------------

    def _keep_safe(self, step: int) -> None:
        self._safe_step = step
        if self._watch.guard is None or self._watch.guard.action != "rollback":
            return
        params = self._trainable()
        if self._trainer.args.should_save or self._file(params) != f"{SAFE}.safetensors":
            write_weights(
                self._directory() / self._file(params), {name: local(p).detach() for name, p in params.items()}
            )

    def _restore(self) -> None:
        params = self._trainable()
        self._trainer.accelerator.wait_for_everyone()
        safe = read_weights(self._directory() / self._file(params), params, device="model")
        with torch.no_grad():
            for name, param in params.items():
                local(param).copy_(safe[name])
        self._trainer.log({f"{_PREFIX}rolled_back_to": float(self._safe_step)})

    def _trainable(self) -> dict[str, Tensor]:
        return trainable_weights(self._trainer.model)

    def _directory(self) -> Path:
        return Path(str(self._trainer.args.output_dir))

    def _file(self, params: Mapping[str, Tensor]) -> str:
        args = self._trainer.args
        return weights_file(SAFE, params, rank=args.process_index, processes=args.world_size)


def _worsened(guard: Guard, found: Mapping[str, float], start: Mapping[str, float]) -> bool:
    change = found[guard.measure] - start[guard.measure]
    worse = -change if guard.measure == "refusal_margin" else change
    return not worse <= guard.tolerance  # what is not a number is out of tolerance


def ended_by_guard(log: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a guard has ended the training of which this is the log."""
    return any(_STOPPED in row for row in log)


def _lambda_scheduler(trainer: Any) -> torch.optim.lr_scheduler.LambdaLR:
    scheduler = trainer.lr_scheduler
    scheduler = getattr(scheduler, "scheduler", scheduler)  # what accelerate wraps
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise StayalignedError(
            f"the guard cannot lower the learning rate of a {type(scheduler).__name__}",
            hint="Take another lr_scheduler_type, or action: stop.",
        )
    return scheduler


def _scale_learning_rate(trainer: Any, factor: float) -> None:
    """For the steps to come, of a resumed run too: the scheduler keeps its base rates in the checkpoint."""
    scheduler = _lambda_scheduler(trainer)
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    # What the host logs.
    scheduler._last_lr = [rate * factor for rate in scheduler.get_last_lr()]  # pyright: ignore[reportPrivateUsage]
    for group in trainer.optimizer.param_groups:
        group["lr"] *= factor


def dead_adapters(model: Any) -> list[str]:
    """The LoRA modules whose factors have got no gradient, or a zero one, from the loss just now.

    PEFT attaches a LoRA to every module that is asked for, also where the model uses the weight without calling the
    module (`dt_proj` of Mamba): nothing is then ever learned there. Sharded weights are not looked at.
    """
    alive: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        module, found, _ = name.partition(".lora_")
        if found and parameter.requires_grad and not isinstance(parameter, DTensor):
            alive[module] = alive.get(module, False) or _is_nonzero(parameter.grad)
    return [module for module, is_alive in alive.items() if not is_alive]


def report_dead_adapters(trainer: Trainer) -> None:
    """Let a trainer log a warning after its first backward pass that names the LoRA layers without a gradient."""
    from transformers import TrainerCallback

    class DeadAdapters(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0 and (dead := dead_adapters(kwargs["model"])):
                layers = Counter(name.removesuffix(".base_layer").rpartition(".")[2] for name in dead)
                _log.warning(
                    "LoRA gets no gradient in %s, and will learn nothing there: leave them out of target_modules",
                    ", ".join(f"{count} layers {name}" for name, count in sorted(layers.items())),
                )

    if not any(
        type(callback).__qualname__ == DeadAdapters.__qualname__ for callback in trainer.callback_handler.callbacks
    ):
        trainer.add_callback(DeadAdapters())


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
