"""Lisa (arXiv 2405.18641) inside any Trainer: two phases of data, one anchor, one proximal term per step.

Rows of the Trainer's log that have `loss` also have:

- `alignment_loss`, `finetuning_loss`: mean loss of the steps of that phase since the last row; absent if there were
  none. Neither includes the proximal term, nor does `loss` (the published code includes it in all three).
- `drift`: ‖w − anchor‖ after the step; absent for ρ = 0, which stores no anchor. `drift_from_start` and `rho`, if the
  settings enable them.
- `alignment/…`: metrics of the trainer of the alignment phase (DPO's `rewards/margins`).

`grad_norm` is the norm that is clipped, which includes the proximal gradient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sized
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from stayaligned.algorithms.lisa_schedule import BiStateSchedule, LisaSettings, Phase
from stayaligned.core.errors import StayalignedError
from stayaligned.hf.hosts import checkpoint_directory, keep_column, loss_scaled
from stayaligned.hf.training.dead_adapters import report_dead_adapters
from stayaligned.hf.training.finetuning import last_complete_checkpoint, load_finished
from stayaligned.hf.training.lisa.alignment_rows import prepare_alignment_dataset, require_dataset
from stayaligned.hf.training.lisa.checkpoints import (
    describe_settings,
    read_progress,
    require_same_run,
    write_run,
)
from stayaligned.hf.training.lisa.losses import AlignmentLoss, AlignmentTrainer, ReferenceKl, TrainerLoss
from stayaligned.hf.training.lisa.proximal import ProximalTerm, RunContext
from stayaligned.hf.training.lisa.rows import (
    ALIGNMENT_ROW,
    BiStateSampler,
    PhaseCollator,
    RowSources,
    WrappedRows,
)
from stayaligned.hf.training.lisa.unsupported import read_settings, require_supported
from stayaligned.hf.training.resuming import restore_converted
from stayaligned.hf.training.row_lengths import report_row_lengths
from stayaligned.hf.training.weight_files import trainable_weights

if TYPE_CHECKING:
    from transformers import Trainer

    _Host = Trainer
else:
    _Host = object

_log = logging.getLogger(__name__)
_TrainerT = TypeVar("_TrainerT", bound="Trainer")


@cache
def with_lisa(trainer_class: type[_TrainerT]) -> type[_TrainerT]:
    """Return a subclass of `trainer_class` that trains with Lisa.

    Its constructor also takes `lisa=LisaSettings(...)` (or the defense `Lisa(...)`, or a mapping with its fields) and
    `alignment_dataset=...`.

    Example:
        trainer = with_lisa(SFTTrainer)(
            model, args, train_dataset=rows, alignment_dataset=safe, lisa=LisaSettings(rho=1.0)
        )

    `alignment_dataset` has the form of a training set of that class: rows of features for `transformers.Trainer`,
    any of TRL's formats for `SFTTrainer`, with a length or streamed. For another loss in the alignment phase, pass
    `alignment_trainer` instead: a function that builds a trainer of the alignment rows on the model that it receives.

        alignment_trainer=lambda model: DPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)

    Raises:
        StayalignedError: on construction, if this training is not supported exactly; the message names the setting.
    """
    if issubclass(trainer_class, BiStateMixin):
        raise StayalignedError(
            f"{trainer_class.__name__} already trains with Lisa", hint="Construct it with lisa=LisaSettings(…)."
        )
    return type(f"Lisa{trainer_class.__name__}", (BiStateMixin, trainer_class), {"__module__": __name__})  # pyright: ignore


def attach_lisa(
    trainer: _TrainerT,
    *,
    lisa: Any,
    alignment_dataset: Any = None,
    alignment_trainer: AlignmentTrainer | None = None,
    alignment_loss: AlignmentLoss | None = None,
) -> _TrainerT:
    """Add Lisa to a trainer that is already built, and return the same object, ready for `train()`.

    Args:
        trainer: a transformers Trainer, a TRL SFTTrainer, or a subclass of either.
        lisa: the settings: LisaSettings, the defense `Lisa` or a mapping with its fields.
        alignment_dataset: the alignment rows, as for `with_lisa`.
        alignment_trainer: builds the trainer of the alignment phase, as for `with_lisa`; instead of
            `alignment_dataset`.
        alignment_loss: the loss of the steps on `alignment_dataset`, instead of the one that the settings name.

    Raises:
        StayalignedError: if this training is not supported exactly; the trainer is then unchanged.
    """
    settings, plain = read_settings(lisa), type(trainer)
    trainer.__class__ = with_lisa(plain)
    try:
        trainer._set_up_lisa(settings, alignment_dataset, alignment_trainer, alignment_loss)  # pyright: ignore
    except BaseException:
        trainer.__class__ = plain
        raise
    return trainer


class BiStateMixin(_Host):
    """The mixin that `with_lisa` puts before a Trainer class; it copies none of the host's code.

    - Rows: `_get_train_sampler` returns indices into the user's rows followed by the alignment rows. An epoch has a
      whole number of optimizer steps, so neither accumulation nor the split over processes divides a phase.
    - Proximal term: `training_step` adds ρ(w − anchor) to the gradients after they are summed over accumulation and
      processes, and before they are clipped. If decoupled, a hook of the optimizer moves the weights after its step.
    - Resume: the phase is a function of `global_step`; only the anchor is stored, in every checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        lisa: Any = None,
        alignment_dataset: Any = None,
        alignment_trainer: AlignmentTrainer | None = None,
        **kwargs: Any,
    ) -> None:
        settings, user = read_settings(lisa), kwargs.get("train_dataset")
        if user is not None:
            require_dataset("train_dataset", user)
        super().__init__(*args, **kwargs)
        self._report_user_rows(user)
        self._set_up_lisa(settings, alignment_dataset, alignment_trainer)

    def _report_user_rows(self, given: Any) -> None:
        """Log how many of the user's rows TRL has left out or cut."""
        prepared: Any = self.train_dataset
        max_length, is_packed = (getattr(self.args, name, None) for name in ("max_length", "packing"))
        by_trl = max_length and not is_packed and prepared is not given
        if by_trl and isinstance(given, Sized) and hasattr(prepared, "__len__"):
            report_row_lengths("training", len(given), (prepared[i] for i in range(len(prepared))), max_length)

    def _set_up_lisa(
        self, lisa: LisaSettings, dataset: Any, build: AlignmentTrainer | None, loss: AlignmentLoss | None = None
    ) -> None:
        require_supported(self, lisa, dataset, build)
        if lisa.alignment_loss == "kl":
            loss = ReferenceKl(self)
        alignment: Any = None
        if build is not None:
            loss = TrainerLoss(self, build)
            alignment = WrappedRows(loss.trainer.train_dataset)
            self._collate_wrapped_rows(loss)
        elif lisa.alignment_steps:
            alignment = prepare_alignment_dataset(self, dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._lisa, self._alignment_loss = lisa, loss
        self._rows = RowSources(self.train_dataset, alignment, seed)
        lisa.require_finetuning(self._total_steps())
        for note in lisa.notes(self._total_steps()):
            _log.warning("%s", note)
        self._digests = {phase: self._rows.digest(phase) for phase in Phase}
        self.train_dataset = self._rows.dataset(self._run_schedule, self._rows_per_step)
        report_dead_adapters(self)
        self._reset_progress()

    def _collate_wrapped_rows(self, loss: TrainerLoss) -> None:
        """Make the host's collator pass alignment rows to the collator of their trainer."""
        self.data_collator = PhaseCollator(self.data_collator, loss.collator)
        keep_column(self, ALIGNMENT_ROW)

    def _reset_progress(self, resume_from: Path | None = None) -> None:
        self._resume_from = resume_from
        self._proximal: ProximalTerm | None = None
        self._begun_step: int | None = None
        self._sampler_is_used = self._rows.alignment is None or self._rows.streamed
        self._phase_loss: dict[Phase, Tensor] = {}
        self._phase_steps = dict.fromkeys(Phase, 0)
        self._step_loss: Tensor | None = None

    # ---- rows and the length of the run ------------------------------------------------------------------------

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler_is_used = True
        if self._rows.alignment is None:
            return super()._get_train_sampler(*args, **kwargs)
        return BiStateSampler(
            self._rows, self._run_schedule, self._rows_per_step, self._steps_per_epoch, lambda: self.state.global_step
        )

    def _rows_per_step(self) -> int:
        return self.get_total_train_batch_size(self.args)

    def _steps_per_epoch(self) -> int:
        """Count the steps of an epoch: those of plain training on the user's rows, or enough to cover these rows."""
        rows, accumulation = self._rows.count(Phase.FINETUNING), self.args.gradient_accumulation_steps
        if rows is None:
            return self.args.max_steps
        rows_per_batch = self._rows_per_step() // accumulation
        covers = self._lisa.budget == "cover"
        drops = self.args.dataloader_drop_last and not covers  # dropped rows would not be covered
        batches = rows // rows_per_batch if drops else -(-rows // rows_per_batch)
        plain = max(-(-batches // accumulation), 1)
        if not covers:
            return plain
        steps, epochs = self._lisa.schedule(0).steps_to_cover(plain), self.args.num_train_epochs
        while self._lisa.schedule(math.ceil(epochs * steps)).steps_before(
            math.ceil(epochs * steps), Phase.FINETUNING
        ) < math.floor(epochs * plain):
            steps += 1  # alignment steps at the end of the run have replaced fine-tuning steps
        return steps

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self._steps_per_epoch())

    def _run_schedule(self) -> BiStateSchedule:
        return self._lisa.schedule(self._total_steps())

    # ---- the course of a run -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer.train`; a checkpoint must have the same settings, data and number of processes.

        `resume_from_checkpoint=True` resumes the last complete checkpoint of the output directory, and starts from
        the beginning if there is none, so that the same command starts and resumes a run. Of a finished run it loads
        the weights. (The host takes the newest checkpoint, complete or not.)
        """
        from transformers.trainer_utils import TrainOutput

        finds_checkpoint = resume_from_checkpoint is True
        if finds_checkpoint:
            resume_from_checkpoint = last_complete_checkpoint(Path(str(self.args.output_dir)))  # pyright: ignore
        path = None if not resume_from_checkpoint else Path(str(resume_from_checkpoint))
        if path is not None:
            require_same_run(path, self._fingerprint(), describe_settings(self))
            if finds_checkpoint and load_finished(self, path):
                return TrainOutput(self.state.global_step, 0.0, {})
        self._lisa.require_finetuning(self._total_steps())  # the length of the run may have been changed
        self._reset_progress(path)
        try:
            return super().train(None if path is None else str(path), *args, **kwargs)
        finally:
            if self._proximal is not None:
                self._proximal.end_run()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run `Trainer.training_step`; after the last micro-batch of an optimizer step, add the proximal gradient."""
        step = self.state.global_step
        if step != self._begun_step:
            self._begin_step(step)
        phase = self._schedule.phase_at(step)
        loss = self._phase_step(phase, model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise StayalignedError(
                f"the loss is {loss.item()} at optimizer step {step}, in the {phase} phase; training stopped before it",
                hint="Lower learning_rate, set max_grad_norm, or check the rows. Earlier checkpoints are valid.",
            )
        self._phase_loss[phase] = self._phase_loss.get(phase, torch.zeros_like(loss)) + loss
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.accelerator.sync_gradients:
            self._end_gradient(phase, step)
        return loss

    def _phase_step(self, phase: Phase, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the host's step, with its flag set for whether this phase's loss is already divided by accumulation."""
        if self._alignment_loss is None or phase is Phase.FINETUNING:
            return super().training_step(model, inputs, *args, **kwargs)
        count = args[0] if args else kwargs.get("num_items_in_batch")
        with loss_scaled(self, self._alignment_loss.is_mean_over_step(count)), self._alignment_loss.activate():
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, as `Trainer.compute_loss`, or by the loss of the alignment phase if it has its own."""
        if self._alignment_loss is None or not self._is_aligning(model):
            return super().compute_loss(model, inputs, *args, **kwargs)
        return self._alignment_loss.compute_loss(self, model, inputs, kwargs.get("num_items_in_batch"))

    def _is_aligning(self, model: Any) -> bool:
        """Return whether the current loss is that of an alignment step, and not of an evaluation."""
        return model.training and self._schedule.phase_at(self.state.global_step) is Phase.ALIGNMENT

    def _end_gradient(self, phase: Phase, step: int) -> None:
        """Record the loss and add the proximal gradient, after a step's gradients are summed."""
        term = self._proximal_term()
        self._phase_steps[phase] += 1
        if self._lisa.alignment_loss_budget is not None and self._step_loss is not None:
            term.observe_loss(phase, self._mean_over_processes(self._step_loss).item())
        self._step_loss = None
        scaler = self.accelerator.scaler
        term.add_gradient(step, 1.0 if scaler is None else scaler.get_scale())

    def _begin_step(self, step: int) -> None:
        if self._begun_step is None:
            self._begin_run()
        self._begun_step = step
        if self._schedule.switches_at(step):
            self._proximal_term().begin_phase(self._schedule.phase_at(step))

    def _begin_run(self) -> None:
        if not self._sampler_is_used:
            raise StayalignedError(
                f"{type(self).__name__} draws its training rows without `_get_train_sampler`, "
                "so Lisa cannot choose them",
                hint="Do not override `get_train_dataloader` of transformers.Trainer.",
            )
        if self._resume_from is not None:
            restore_converted(self, self._resume_from)
        self._schedule = self._run_schedule()
        run = RunContext(
            total_steps=self._total_steps(),
            rank=self.args.process_index,
            processes=self.args.world_size,
            writes=self.args.should_save,
            output_dir=Path(str(self.args.output_dir)),
        )
        self._proximal = ProximalTerm(self._lisa, run)
        params = trainable_weights(self.model)  # pyright: ignore
        optimizer = _innermost(self.optimizer)
        if self._resume_from is None:
            self._proximal.begin_run(params, optimizer, lambda: self.state.global_step)
        else:
            progress = read_progress(self._resume_from)
            self._proximal.resume_run(params, optimizer, lambda: self.state.global_step, self._resume_from, progress)

    def _proximal_term(self) -> ProximalTerm:
        if self._proximal is None:
            raise RuntimeError("no run has begun")
        return self._proximal

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "mean")  # pyright: ignore

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        """Return what must be equal for a resumed run to be the same run."""
        return {
            **self._lisa.fingerprint(self._total_steps()),
            "total_steps": self._total_steps(),
            **({} if self._alignment_loss is None else {"alignment_loss": self._alignment_loss.name}),
            "user_rows": self._rows.count(Phase.FINETUNING),
            "user_rows_digest": self._digests[Phase.FINETUNING],
            "alignment_rows": self._rows.count(Phase.ALIGNMENT),
            "alignment_rows_digest": self._digests[Phase.ALIGNMENT],
            "rows_per_step": self._rows_per_step(),
            "processes": self.args.world_size,
            "seed": self._rows.seed,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the host's files: the host writes trainer_state.json last, which marks the checkpoint as complete.
        if not self.args.save_only_model:
            directory = checkpoint_directory(self, trial)
            term = self._proximal_term()
            term.save(directory)
            if self.args.should_save:
                write_run(directory, self._fingerprint(), describe_settings(self), term.progress())
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: Any) -> None:
        super()._save_rng_state(output_dir)
        # The first process marks the checkpoint as complete after this call, when every process must have written.
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            restore_converted(self, Path(self.state.best_model_checkpoint))

    # ---- logging -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, as `Trainer.log`, with the losses of the two phases and the drift in rows that have `loss`."""
        if "loss" in logs and self._proximal is not None:
            for phase, total in self._phase_loss.items():
                logs[f"{phase}_loss"] = (self._mean_over_processes(total) / self._phase_steps[phase]).item()
            logs |= self._proximal.measures()
            if self._alignment_loss is not None:
                logs |= {f"alignment/{name}": value for name, value in self._alignment_loss.take_metrics().items()}
            self._phase_loss = {}
            self._phase_steps = dict.fromkeys(Phase, 0)
        super().log(logs, *args, **kwargs)


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper, whose step a gradient scaler may skip."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
