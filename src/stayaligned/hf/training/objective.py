"""Objectives: what a defense adds to the loss, the gradient or the weights of any Trainer.

An objective is a set of functions. The trainer calls each at its place in an optimizer step, in all processes:

1. `user_loss` on every micro-batch of the user's rows, instead of the host's loss.
2. After the last micro-batch, once per optimizer step, before clipping: the gradients of `alignment_loss` on the step's
   alignment rows and of `penalty`, summed over the processes, which `combine` joins with the user's gradient.
3. `after_step`, when the optimizer has changed the weights.
4. `finish`, when training has ended, before the weights are saved.

The alignment rows of step t are a function of the seed and t: a new permutation in each pass, split over the processes.
Of an objective's own only `state` is stored in checkpoints. A resumed run does the same, bit for bit.

Rows of the Trainer's log that have `loss` also have `added_loss`, the mean over the steps of the loss that is
differentiated in 2. `loss` does not include it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from stayaligned.algorithms.lisa import RowStream
from stayaligned.algorithms.objectives import label_log_probabilities
from stayaligned.core.errors import StayalignedError
from stayaligned.hf.features import IGNORED, PaddingCollator, encode_examples, refuse_unknown_tokens, with_known_padding
from stayaligned.hf.hosts import (
    checkpoint_directory,
    ignores_token_count,
    innermost_model,
    is_loss_scaled,
    trl_class,
)
from stayaligned.hf.training.finetuning import last_complete_checkpoint
from stayaligned.hf.training.reference import as_reference, evaluating, require_reference
from stayaligned.hf.training.weight_files import read_tensors, trainable_weights, write_weights

if TYPE_CHECKING:
    from transformers import Trainer

    from stayaligned.core.records import Example

    _Host = Trainer
else:
    _Host = object

_TrainerT = TypeVar("_TrainerT", bound="Trainer")
STATE = "objective.safetensors"
"""File of an objective's state in a checkpoint."""


class TokenBatch:
    """A batch, from which an objective computes a loss on its label tokens.

    Args:
        model: the model, in its wrapper of processes if it has one.
        adapted: the model without the wrapper.
        inputs: the model's inputs, without labels.
        labels: (batch, length).
        divisor: what a sum over the batch's label tokens is divided by, so that the batches of a step add up to the
            mean over the step.
    """

    def __init__(
        self, model: Any, adapted: Any, inputs: Mapping[str, Any], labels: Tensor, divisor: Tensor | float
    ) -> None:
        self._model, self._adapted, self._inputs, self._divisor = model, adapted, inputs, divisor
        self.labels = labels

    @cached_property
    def logits(self) -> Tensor:
        """The model's logits, (batch, length, vocabulary)."""
        return self._model(**self._inputs).logits

    @cached_property
    def reference_logits(self) -> Tensor:
        """The logits of the model without its adapter, as constants."""
        with torch.no_grad(), as_reference(self._adapted):
            return self._adapted(**self._inputs).logits

    def mean(self, total: Tensor) -> Tensor:
        """Return the batch's share of the mean over the step's label tokens."""
        return total / self._divisor


@dataclass(frozen=True)
class ObjectiveRun:
    """One training run, as an objective sees it."""

    model: Any
    """The model without the wrapper of processes."""
    params: Mapping[str, Tensor]
    """The trainable weights by name."""
    rows: AlignmentRows | None
    state: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by name that the checkpoints contain, and that the objective changes in place."""


@dataclass(frozen=True)
class Objective:
    """What a defense changes of a training step; every function may be absent."""

    name: str
    """The defense's name, for errors."""
    user_loss: Callable[[Tensor, TokenBatch], Tensor] | None = None
    """(the host's loss, the batch) → the loss of a micro-batch of the user's rows."""
    alignment_rows: AlignmentRows | None = None
    alignment_loss: Callable[[TokenBatch], Tensor] | None = None
    """The share of a batch of alignment rows in the loss whose gradient is added; its sum over all batches is taken."""
    penalty: Callable[[ObjectiveRun], Tensor] | None = None
    """A loss of the weights, whose gradient is added; the mean over the processes is taken."""
    combine: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None
    """Changes the first gradient, the user's, by the second, the added one; adds them if absent."""
    start: Callable[[ObjectiveRun], dict[str, Tensor]] | None = None
    """The state at the beginning of a run that does not resume a checkpoint."""
    after_step: Callable[[ObjectiveRun], None] | None = None
    finish: Callable[[ObjectiveRun], None] | None = None
    replaces_weights: bool = False
    """Whether `finish` replaces the weights by others than those of the last step."""
    needs_reference: bool = False
    """Whether the model must have an adapter, without which it is the aligned model."""


@dataclass(frozen=True)
class AlignmentRows:
    """The encoded alignment rows, and which of them each optimizer step takes."""

    rows: Sequence[Mapping[str, list[int]]]
    collator: PaddingCollator
    per_step: int | None
    """Number of rows in each optimizer step, over all processes; None for as many as the user's."""

    @classmethod
    def encode(
        cls, trainer: Trainer, examples: Sequence[Example], max_length: int, per_step: int | None
    ) -> AlignmentRows:
        """Encode the rows with a trainer's tokenizer.

        Raises:
            StayalignedError: as for `stayaligned.hf.features.encode_examples`.
        """
        tokenizer: Any = with_known_padding(trainer.processing_class, trainer.model)  # pyright: ignore
        rows = encode_examples(tokenizer, examples, max_length)
        refuse_unknown_tokens(tokenizer, trainer.model, (row["input_ids"] for row in rows))  # pyright: ignore
        return cls(rows, PaddingCollator.of(tokenizer), per_step)

    def batches(self, trainer: Trainer, model: Any, step: int) -> Iterator[TokenBatch]:
        """Yield the batches of one optimizer step that this process computes."""
        args = trainer.args
        count = self.per_step or trainer.get_total_train_batch_size(args)
        seed = args.seed if args.data_seed is None else args.data_seed
        stream = RowStream(len(self.rows), seed, "alignment")
        drawn = [self.rows[index] for index in stream.take(step * count, count)]
        return self._collate(drawn[args.process_index :: args.world_size], drawn, args, model)

    def all_rows(self, trainer: Trainer, model: Any) -> Iterator[TokenBatch]:
        """Yield batches of one row each, of all rows, in every process."""
        for row in self.rows:
            yield from self._collate([row], [row], trainer.args, model)

    def _collate(self, mine: Sequence[Any], drawn: Sequence[Any], args: Any, model: Any) -> Iterator[TokenBatch]:
        tokens = sum(label != IGNORED for row in drawn for label in row["labels"][1:])
        size = args.per_device_train_batch_size
        for start in range(0, len(mine), size):
            batch = {name: value.to(args.device) for name, value in self.collator(mine[start : start + size]).items()}
            labels = batch.pop("labels")
            yield TokenBatch(model, model, {**batch, "use_cache": False}, labels, tokens)


def attach_objective(trainer: _TrainerT, objective: Objective) -> _TrainerT:
    """Add an objective to a trainer that is already built, and return the same object, ready for `train()`.

    Args:
        trainer: a transformers Trainer, a TRL SFTTrainer, or a subclass of either.
        objective: what to add.

    Raises:
        StayalignedError: if this training is not supported exactly; the trainer is then unchanged.
    """
    _require_supported(trainer, objective)
    trainer.__class__ = _with_objective(type(trainer))
    trainer._set_up_objective(objective)  # pyright: ignore
    return trainer


@cache
def _with_objective(trainer_class: type[_TrainerT]) -> type[_TrainerT]:
    return type(f"Objective{trainer_class.__name__}", (_ObjectiveMixin, trainer_class), {"__module__": __name__})  # pyright: ignore


class _ObjectiveMixin(_Host):
    """The mixin that `attach_objective` puts before a Trainer class; it copies none of the host's code."""

    def _set_up_objective(self, objective: Objective) -> None:
        self.objective = objective
        self._reset(None)

    def _reset(self, resume_from: Path | None) -> None:
        self._resume_from = resume_from
        self._run: ObjectiveRun | None = None
        self._hook: Any = None
        self._added: list[Tensor] = []

    # ---- the course of a run -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer.train`; True resumes the last complete checkpoint of the output directory, if any."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(Path(str(self.args.output_dir)))  # pyright: ignore
        path = None if not resume_from_checkpoint else Path(str(resume_from_checkpoint))
        self._reset(path)
        try:
            output = super().train(None if path is None else str(path), *args, **kwargs)
        finally:
            if self._hook is not None:
                self._hook.remove()
        if self._run is not None:
            self._finish(self._run)
        return output

    def finish_loaded(self, checkpoint: Path) -> None:
        """Do what is done after the last step, with the loaded checkpoint of a finished run."""
        if self.objective.finish is not None:
            self._finish(self._begin(checkpoint))

    def _finish(self, run: ObjectiveRun) -> None:
        if self.objective.finish is not None:
            with torch.no_grad():
                self.objective.finish(run)

    def _begin(self, resume_from: Path | None) -> ObjectiveRun:
        model = self.accelerator.unwrap_model(self.model)
        run = ObjectiveRun(model, trainable_weights(model), self.objective.alignment_rows)
        if self.objective.start is not None:
            if resume_from is None:
                run.state.update(self.objective.start(run))
            else:
                run.state.update(read_tensors(resume_from / STATE, device=self.args.device))
        return run

    def _begin_run(self) -> ObjectiveRun:
        run = self._begin(self._resume_from)
        if (after := self.objective.after_step) is not None:
            # Not a callback of the host, which is also called if a gradient scaler has skipped the step.
            def after_step(*_: object) -> None:
                with torch.no_grad():
                    after(run)

            optimizer: Any = self.optimizer
            self._hook = getattr(optimizer, "optimizer", optimizer).register_step_post_hook(after_step)
        return run

    # ---- a step ------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run `Trainer.training_step`; after the last micro-batch of an optimizer step, add the other gradients."""
        if self._run is None:
            self._run = self._begin_run()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._add_gradient(self._run)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss, as `Trainer.compute_loss`, or in training by the objective's loss of the user's rows."""
        host = functools.partial(super().compute_loss, model, num_items_in_batch=num_items_in_batch)
        user_loss = self.objective.user_loss
        if user_loss is None or not model.training:
            return host(inputs, return_outputs=return_outputs)
        given = {key: value for key, value in inputs.items() if key != "labels"}
        labels = inputs["labels"]
        by_trl = trl_class(self) is not None  # whose fused head computes no logits
        returned = host(inputs, return_outputs=return_outputs or not by_trl)
        loss, outputs = returned if isinstance(returned, tuple) else (returned, None)
        counted = num_items_in_batch is not None and is_loss_scaled(self, num_items_in_batch)
        divisor: Any = num_items_in_batch if counted else (labels[:, 1:] != IGNORED).sum()
        if counted and self.args.average_tokens_across_devices:
            # The host's count is over all processes, whose gradients are then averaged.
            divisor = divisor / self.accelerator.num_processes
        batch = TokenBatch(model, self.accelerator.unwrap_model(model), {**given, "use_cache": False}, labels, divisor)
        if outputs is not None and not by_trl:
            batch.logits = outputs.logits
        loss = user_loss(loss, batch)
        return (loss, outputs) if return_outputs else loss

    def _add_gradient(self, run: ObjectiveRun) -> None:
        added = list(self._added_losses(run))
        if not added:
            return
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        params = list(run.params.values())
        users = [param.grad for param in params]
        for param in params:
            param.grad = None
        total = torch.zeros((), device=self.args.device)
        with self.compute_loss_context_manager():
            for compute in added:
                loss = compute()
                if loss.requires_grad:
                    (loss * scale).backward()
                total += loss.detach()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        if self.args.world_size > 1:
            gradients = [self.accelerator.reduce(gradient, "sum") for gradient in gradients]
        for param, gradient in zip(params, users, strict=True):
            param.grad = torch.zeros_like(param) if gradient is None else gradient
        self._added.append(total)
        with torch.no_grad():
            (self.objective.combine or _add)([param.grad for param in params], gradients)  # pyright: ignore

    def _added_losses(self, run: ObjectiveRun) -> Iterator[Callable[[], Tensor]]:
        """Yield the losses of this process, whose sum over all processes is differentiated."""
        if (penalty := self.objective.penalty) is not None:
            yield lambda: penalty(run) / self.args.world_size
        if (loss := self.objective.alignment_loss) is not None and run.rows is not None:
            for batch in run.rows.batches(self, run.model, self.state.global_step):
                yield functools.partial(loss, batch)

    # ---- checkpoints and the log -------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the host's files: the host writes trainer_state.json last, which marks the checkpoint as complete.
        if self._run is not None and self._run.state and self.args.should_save and not self.args.save_only_model:
            write_weights(checkpoint_directory(self, trial) / STATE, self._run.state)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: Any) -> None:
        super()._save_rng_state(output_dir)
        # The first process marks the checkpoint as complete after this call, when every process must have written.
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, as `Trainer.log`, with the mean of the added losses in rows that have `loss`."""
        if "loss" in logs and self._added:
            total: Any = self.accelerator.reduce(torch.stack(self._added).sum(), "sum")
            logs["added_loss"] = total.item() / len(self._added)
            self._added = []
        super().log(logs, *args, **kwargs)


def empirical_fisher(run: ObjectiveRun, batches: Iterator[TokenBatch]) -> dict[str, Tensor]:
    """Compute the mean over batches of (∂ Σ log p(label) / ∂w)² for each trainable weight, without dropout.

    Args:
        run: the run, whose weights it is computed at; their gradients are left as they were.
        batches: batches of one row each.
    """
    fisher = {name: torch.zeros_like(weight) for name, weight in run.params.items()}
    weights, rows = list(run.params.values()), 0
    with evaluating(run.model):
        for batch in batches:
            rows += 1
            total = label_log_probabilities(batch.logits, batch.labels).sum()
            gradients = torch.autograd.grad(total, weights, materialize_grads=True)
            for value, gradient in zip(fisher.values(), gradients, strict=True):
                value += gradient.square()
    return {name: value / max(rows, 1) for name, value in fisher.items()}


def _add(gradient: Sequence[Tensor], added: Sequence[Tensor]) -> None:
    torch._foreach_add_(list(gradient), list(added))  # pyright: ignore[reportPrivateUsage]


def _require_supported(trainer: Any, objective: Objective) -> None:
    """Check that the objective's losses, gradients and weights will be exact in this training."""
    if objective.needs_reference:
        require_reference(trainer.model, f"defense {objective.name!r}")
    args = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    changes = bool(objective.penalty or objective.alignment_loss)
    unsupported = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "model_init": trainer.model_init is not None,
        "fp16=True on the CPU, which the host ignores,": args.fp16 and args.device.type == "cpu",
        f"optim={optimizer!r}": changes and ("lomo" in optimizer or "layerwise" in optimizer),
        "load_best_model_at_end": objective.replaces_weights and args.load_best_model_at_end,
        f"gradient_accumulation_steps={args.gradient_accumulation_steps} with this version of transformers": (
            objective.user_loss is not None
            and args.gradient_accumulation_steps > 1
            and ignores_token_count(innermost_model(trainer))
        ),
        "packing": objective.user_loss is not None and bool(getattr(args, "packing", False)),
    }
    for setting, is_set in unsupported.items():
        if is_set:
            raise StayalignedError(
                f"{setting} is not supported with defense {objective.name!r}: its loss or its weights would be wrong",
                hint="Train on one device or with DDP, with the default of that setting, or use another defense.",
            )
