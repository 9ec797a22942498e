"""Lisa (arXiv 2405.18641) inside any Trainer: two states of data, one anchor, one pull a step.

What the Trainer logs gains, in every row that has `loss`:

- `alignment_loss`, `finetuning_loss`: mean loss of the steps of that state since the last row; absent if there were
  none. The proximal term is in neither, nor in `loss` (the published code reports it in all three).
- `drift`: ‖w − anchor‖ after the step, absent for ρ = 0, which keeps no anchor. `drift_from_start` and `rho`, where
  the settings ask for them.
- `alignment/…`: what the trainer of the alignment state measures of itself (DPO's `rewards/margins`).

`grad_norm` is the norm of what is clipped, the proximal gradient included.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from stayaligned.algorithms.lisa import BiStateSchedule, Phase
from stayaligned.core.errors import StayalignedError
from stayaligned.hf.training.finetuning import last_complete_checkpoint, load_finished
from stayaligned.hf.training.lisa.checkpoints import read_progress, require_same_run, write_run
from stayaligned.hf.training.lisa.losses import AlignmentLoss, AlignmentTrainer, ReferenceKl, TrainerLoss
from stayaligned.hf.training.lisa.proximal import LisaSettings, Pull, Run, first_pulled_step
from stayaligned.hf.training.lisa.rows import (
    ALIGNMENT_ROW,
    BiStateSampler,
    PhaseCollator,
    Rows,
    Wrapped,
    prepare_alignment_dataset,
)
from stayaligned.hf.training.lisa.unsupported import refuse_what_is_not_exact
from stayaligned.hf.training.resuming import restore_converted
from stayaligned.hf.training.safety_probe import report_dead_adapters
from stayaligned.hf.training.weight_files import trainable_weights

if TYPE_CHECKING:
    from transformers import Trainer

    _Host = Trainer
else:
    _Host = object

TrainerT = TypeVar("TrainerT", bound="Trainer")


@cache
def with_lisa(trainer_class: type[TrainerT]) -> type[TrainerT]:
    """`trainer_class` with Lisa in it: it takes `lisa=Lisa(...)` and `alignment_dataset=...` besides its own arguments.

    Example:
        trainer = with_lisa(SFTTrainer)(model, args, train_dataset=rows, alignment_dataset=safe, lisa=Lisa(rho=1.0))

    `alignment_dataset` has the form of a training set of that class: rows of features for `transformers.Trainer`,
    any of TRL's formats for `SFTTrainer`, with a length or streamed. For an alignment state with another loss, give
    `alignment_trainer` in its place: a function that builds a trainer of the alignment rows on the model it is given.

        alignment_trainer=lambda model: DPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)

    Raises:
        StayalignedError: on construction, if this training cannot be done exactly; the message names the setting.
    """
    if issubclass(trainer_class, BiStateMixin):
        raise StayalignedError(
            f"{trainer_class.__name__} already has Lisa in it", hint="Build it with `lisa=Lisa(...)`."
        )
    return type(f"Lisa{trainer_class.__name__}", (BiStateMixin, trainer_class), {"__module__": __name__})  # pyright: ignore


def attach_lisa(
    trainer: TrainerT,
    *,
    lisa: LisaSettings,
    alignment_dataset: Any = None,
    alignment_trainer: AlignmentTrainer | None = None,
) -> TrainerT:
    """Put Lisa into a trainer that is already built; returns the same object, ready for `train()`.

    Args:
        trainer: a transformers Trainer, a TRL SFTTrainer, or a subclass of either.
        lisa: the settings.
        alignment_dataset: as for `with_lisa`.
        alignment_trainer: as for `with_lisa`, in the place of `alignment_dataset`.

    Raises:
        StayalignedError: if this training cannot be done exactly; the trainer is left as it was.
    """
    plain = type(trainer)
    trainer.__class__ = with_lisa(plain)
    try:
        trainer._enter_bistate(lisa, alignment_dataset, alignment_trainer)  # pyright: ignore
    except BaseException:
        trainer.__class__ = plain
        raise
    return trainer


class BiStateMixin(_Host):
    """The part that `with_lisa` puts before a Trainer class; nothing of the host's code is copied.

    - Rows: `_get_train_sampler` gives indices into the user's rows followed by the alignment rows. An epoch has a
      whole number of optimizer steps, so neither accumulation nor a process border cuts a state.
    - Pull: `training_step` adds ρ(w − anchor) to the gradients once they are summed over accumulation and processes,
      before clipping; decoupled, a hook of the optimizer moves the weights after its step.
    - Resume: the state is a function of `global_step`; only the anchor is stored, in every checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        lisa: LisaSettings,
        alignment_dataset: Any = None,
        alignment_trainer: AlignmentTrainer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._enter_bistate(lisa, alignment_dataset, alignment_trainer)

    def _enter_bistate(self, lisa: LisaSettings, dataset: Any, build: AlignmentTrainer | None) -> None:
        cycle = BiStateSchedule(lisa.alignment_steps, lisa.finetuning_steps)
        refuse_what_is_not_exact(self, lisa, dataset, build)
        loss: AlignmentLoss | None = ReferenceKl(self) if lisa.alignment_loss == "kl" else None
        alignment: Any = None
        if build is not None:
            loss = TrainerLoss(self, build)
            alignment = Wrapped(loss.trainer.train_dataset)
            self._take_wrapped_rows(loss)
        elif cycle.alignment_steps:
            alignment = prepare_alignment_dataset(self, dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._lisa, self._cycle, self._alignment_loss = lisa, cycle, loss
        self._rows = Rows(self.train_dataset, alignment, seed)
        self._digests = {phase: self._rows.digest(phase) for phase in Phase}
        self.train_dataset = self._rows.dataset(self._run_schedule, self._rows_per_step)
        report_dead_adapters(self)
        self._forget_progress()

    def _take_wrapped_rows(self, loss: TrainerLoss) -> None:
        """Let the host's collator leave alignment rows to the one of their trainer."""
        self.data_collator = PhaseCollator(self.data_collator, loss.collator)
        self._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, ALIGNMENT_ROW]  # pyright: ignore

    def _forget_progress(self, resume_from: Path | None = None) -> None:
        self._resume_from = resume_from
        self._pull: Pull | None = None
        self._begun_step: int | None = None
        self._rows_are_ours = self._rows.alignment is None or self._rows.streamed
        self._phase_loss: dict[Phase, Tensor] = {}
        self._phase_steps = dict.fromkeys(Phase, 0)
        self._step_loss: Tensor | None = None

    # ---- rows and the length of the run ------------------------------------------------------------------------

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._rows_are_ours = True
        if self._rows.alignment is None:
            return super()._get_train_sampler(*args, **kwargs)
        return BiStateSampler(
            self._rows, self._run_schedule, self._rows_per_step, self._steps_per_epoch, lambda: self.state.global_step
        )

    def _rows_per_step(self) -> int:
        return self.get_total_train_batch_size(self.args)

    def _steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch: as many as plain training of the user's rows takes, or enough to cover them."""
        rows, accumulation = self._rows.count(Phase.FINETUNING), self.args.gradient_accumulation_steps
        if rows is None:
            return self.args.max_steps
        rows_per_batch = self._rows_per_step() // accumulation
        covers = self._lisa.budget == "cover"
        drops = self.args.dataloader_drop_last and not covers  # what is dropped would not be covered
        batches = rows // rows_per_batch if drops else -(-rows // rows_per_batch)
        plain = max(-(-batches // accumulation), 1)
        if not covers:
            return plain
        steps, epochs = self._cycle.steps_to_cover(plain), self.args.num_train_epochs
        while self._closed(math.ceil(epochs * steps)).steps_before(
            math.ceil(epochs * steps), Phase.FINETUNING
        ) < math.floor(epochs * plain):
            steps += 1  # the alignment steps that end the run have taken the place of some
        return steps

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self._steps_per_epoch())

    def _closed(self, total_steps: int) -> BiStateSchedule:
        """The cycle, ended as the settings say."""
        return replace(self._cycle, ends_aligned_at=total_steps) if self._lisa.finish == "alignment" else self._cycle

    def _run_schedule(self) -> BiStateSchedule:
        return self._closed(self._total_steps())

    # ---- the course of a run -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; a checkpoint must be of the same settings, data and number of processes.

        `resume_from_checkpoint=True` goes on from the last complete checkpoint of the output directory, and starts
        where there is none yet, so that one command serves for a first and for every later start; of a run that is
        finished it loads the weights. (The host takes the newest checkpoint, whole or not.)
        """
        from transformers.trainer_utils import TrainOutput

        continues = resume_from_checkpoint is True
        if continues:
            resume_from_checkpoint = last_complete_checkpoint(Path(str(self.args.output_dir)))  # pyright: ignore
        path = None if not resume_from_checkpoint else Path(str(resume_from_checkpoint))
        if path is not None:
            require_same_run(path, self._fingerprint())
            if continues and load_finished(self, path):
                return TrainOutput(self.state.global_step, 0.0, {})
        self._forget_progress(path)
        try:
            return super().train(None if path is None else str(path), *args, **kwargs)
        finally:
            if self._pull is not None:
                self._pull.end_run()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """`Trainer.training_step`, and the proximal gradient after the last micro-batch of an optimizer step."""
        step = self.state.global_step
        if step != self._begun_step:
            self._begin_step(step)
        phase = self._schedule.phase_at(step)
        loss = self._phase_step(phase, model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise StayalignedError(
                f"the loss is {loss.item()} at optimizer step {step}, in the {phase} state; training stopped before it",
                hint="Lower learning_rate, set max_grad_norm, or look for a broken row. Earlier checkpoints are sound.",
            )
        self._phase_loss[phase] = self._phase_loss.get(phase, torch.zeros_like(loss)) + loss
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.accelerator.sync_gradients:
            self._end_gradient(phase, step)
        return loss

    def _phase_step(self, phase: Phase, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step, told whether the loss of this state is already divided by the accumulation."""
        if self._alignment_loss is None or phase is Phase.FINETUNING:
            return super().training_step(model, inputs, *args, **kwargs)
        count = args[0] if args else kwargs.get("num_items_in_batch")
        usual = self.loss_is_scaled_for_ga
        self.loss_is_scaled_for_ga = self._alignment_loss.is_mean_over_step(count)
        try:
            with self._alignment_loss.state():
                return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self.loss_is_scaled_for_ga = usual

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.compute_loss`; in an alignment step with a loss of its own, that."""
        if self._alignment_loss is None or not self._aligning(model):
            return super().compute_loss(model, inputs, *args, **kwargs)
        return self._alignment_loss.loss(self, model, inputs, kwargs.get("num_items_in_batch"))

    def _aligning(self, model: Any) -> bool:
        """Whether a loss is computed for an alignment step, and not in an evaluation."""
        return model.training and self._schedule.phase_at(self.state.global_step) is Phase.ALIGNMENT

    def _end_gradient(self, phase: Phase, step: int) -> None:
        """After the last micro-batch of a step, its gradients summed: note the loss, and pull."""
        pull = self._running()
        self._phase_steps[phase] += 1
        if self._lisa.alignment_loss_budget is not None and self._step_loss is not None:
            pull.observe(phase, self._mean_over_processes(self._step_loss).item())
        self._step_loss = None
        scaler = self.accelerator.scaler
        pull.add_gradient(step, 1.0 if scaler is None else scaler.get_scale())

    def _begin_step(self, step: int) -> None:
        if self._begun_step is None:
            self._begin_run()
        self._begun_step = step
        if self._schedule.switches_at(step):
            self._running().begin_state(self._schedule.phase_at(step))

    def _begin_run(self) -> None:
        if not self._rows_are_ours:
            raise StayalignedError(
                f"{type(self).__name__} draws its training rows without `_get_train_sampler`, "
                "so Lisa cannot choose them",
                hint="Leave `get_train_dataloader` to transformers.Trainer.",
            )
        if self._resume_from is not None:
            restore_converted(self, self._resume_from)
        self._schedule = self._run_schedule()
        run = Run(
            total_steps=self._total_steps(),
            rank=self.args.process_index,
            processes=self.args.world_size,
            writes=self.args.should_save,
            output_dir=Path(str(self.args.output_dir)),
        )
        self._pull = Pull(self._lisa, run)
        params = trainable_weights(self.model)  # pyright: ignore
        optimizer = _innermost(self.optimizer)
        if self._resume_from is None:
            self._pull.begin_run(params, optimizer, lambda: self.state.global_step)
        else:
            progress = read_progress(self._resume_from)
            self._pull.resume_run(params, optimizer, lambda: self.state.global_step, self._resume_from, progress)

    def _running(self) -> Pull:
        if self._pull is None:
            raise RuntimeError("no run has begun")
        return self._pull

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "mean")  # pyright: ignore

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        lisa, total = self._lisa, self._total_steps()
        pulled = {
            "proximal": lisa.proximal,
            "proximal_from_step": first_pulled_step(lisa, total),
            "rho_schedule": lisa.rho_schedule if lisa.rho_schedule == "constant" else f"{lisa.rho_schedule} to {total}",
            "alignment_loss_budget": lisa.alignment_loss_budget,
            "rho_ceiling": lisa.rho_ceiling,
        }
        return {
            "alignment_steps": lisa.alignment_steps,
            "finetuning_steps": lisa.finetuning_steps,
            "rho": lisa.rho,
            **(pulled if lisa.rho else {}),
            "budget": lisa.budget,
            "finish": lisa.finish if lisa.finish == "cycle" else f"alignment at {total}",
            "alignment_loss": lisa.alignment_loss if self._alignment_loss is None else self._alignment_loss.name,
            **({"dpo_beta": lisa.dpo_beta} if lisa.alignment_loss == "dpo" else {}),
            "user_rows": self._rows.count(Phase.FINETUNING),
            "user_rows_digest": self._digests[Phase.FINETUNING],
            "alignment_rows": self._rows.count(Phase.ALIGNMENT),
            "alignment_rows_digest": self._digests[Phase.ALIGNMENT],
            "rows_per_step": self._rows_per_step(),
            "processes": self.args.world_size,
            "seed": self._rows.seed,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the host's files: it writes trainer_state.json last, so a checkpoint that has it is complete.
        if not self.args.save_only_model:
            directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            pull = self._running()
            pull.save(directory)
            if self.args.should_save:
                write_run(directory, self._fingerprint(), pull.progress())
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: Any) -> None:
        super()._save_rng_state(output_dir)
        # The first process marks the checkpoint complete after this: not before every process has written its part.
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            restore_converted(self, Path(self.state.best_model_checkpoint))

    # ---- logging -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`Trainer.log`, with the losses of the two states and the drift in the rows of training."""
        if "loss" in logs and self._pull is not None:
            for phase, total in self._phase_loss.items():
                logs[f"{phase}_loss"] = (self._mean_over_processes(total) / self._phase_steps[phase]).item()
            logs |= self._pull.measures()
            if self._alignment_loss is not None:
                logs |= {f"alignment/{name}": value for name, value in self._alignment_loss.take_metrics().items()}
            self._phase_loss = {}
            self._phase_steps = dict.fromkeys(Phase, 0)
        super().log(logs, *args, **kwargs)


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer beneath what accelerate wraps around it: the one whose step is skipped where a scaler says so."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
