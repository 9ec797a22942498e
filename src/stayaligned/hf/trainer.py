"""Lisa (arXiv 2405.18641) inside any Trainer: two states of data, one anchor, one pull a step.

What the Trainer logs gains, in every row that has `loss`:

- `alignment_loss`, `finetuning_loss`: mean loss of the steps of that state since the last row; absent if there were
  none. The proximal term is in neither, nor in `loss` (the published code reports it in all three).
- `drift`: ‖w − anchor‖ after the step, absent for ρ = 0, which keeps no anchor.

`grad_norm` is the norm of what is clipped, the proximal gradient included.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sized
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Sampler

from stayaligned.bistate import (
    Anchor,
    BiStateSchedule,
    Phase,
    RowStream,
    add_proximal_gradient_,
    drift,
    take_anchor,
)
from stayaligned.errors import StayalignedError
from stayaligned.files import replace_file, write_text
from stayaligned.hf.quiet import bars_off

if TYPE_CHECKING:
    from transformers import Trainer

    _Host = Trainer
else:
    _Host = object

TrainerT = TypeVar("TrainerT", bound="Trainer")
ANCHOR_FILE = "lisa_anchor.safetensors"
STATE_FILE = "lisa.json"


class LisaSettings(Protocol):
    """What the Trainer reads of `stayaligned.Lisa`."""

    @property
    def alignment_steps(self) -> int: ...  # noqa: D102
    @property
    def finetuning_steps(self) -> int: ...  # noqa: D102
    @property
    def rho(self) -> float: ...  # noqa: D102
    @property
    def proximal_warmup_ratio(self) -> float: ...  # noqa: D102
    @property
    def budget(self) -> Literal["shared", "cover"]: ...  # noqa: D102


@cache
def with_lisa(trainer_class: type[TrainerT]) -> type[TrainerT]:
    """`trainer_class` with Lisa in it: it takes `lisa=Lisa(...)` and `alignment_dataset=...` besides its own arguments.

    Example:
        trainer = with_lisa(SFTTrainer)(model, args, train_dataset=rows, alignment_dataset=safe, lisa=Lisa(rho=1.0))

    `alignment_dataset` has the form of a training set of that class: rows of features for `transformers.Trainer`,
    any of TRL's formats for `SFTTrainer`.

    Raises:
        StayalignedError: on construction, if this training cannot be done exactly; the message names the setting.
    """
    if issubclass(trainer_class, BiStateMixin):
        raise StayalignedError(
            f"{trainer_class.__name__} already has Lisa in it", hint="Build it with `lisa=Lisa(...)`."
        )
    return type(f"Lisa{trainer_class.__name__}", (BiStateMixin, trainer_class), {"__module__": __name__})  # pyright: ignore


def attach_lisa(trainer: TrainerT, *, alignment_dataset: Any, lisa: LisaSettings) -> TrainerT:
    """Put Lisa into a trainer that is already built; returns the same object, ready for `train()`.

    Raises:
        StayalignedError: if this training cannot be done exactly; the trainer is left as it was.
    """
    plain = type(trainer)
    trainer.__class__ = with_lisa(plain)
    try:
        trainer._enter_bistate(alignment_dataset, lisa)  # pyright: ignore
    except BaseException:
        trainer.__class__ = plain
        raise
    return trainer


class BiStateMixin(_Host):
    """The part that `with_lisa` puts before a Trainer class; nothing of the host's code is copied.

    - Rows: `_get_train_sampler` gives indices into the user's rows followed by the alignment rows. An epoch has a
      whole number of optimizer steps, so neither accumulation nor a process border cuts a state.
    - Pull: `training_step` adds ρ(w − anchor) to the gradients once they are summed over accumulation and processes,
      before clipping.
    - Resume: the state is a function of `global_step`; only the anchor is stored, in every checkpoint.
    """

    def __init__(self, *args: Any, lisa: LisaSettings, alignment_dataset: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._enter_bistate(alignment_dataset, lisa)

    def _enter_bistate(self, alignment_dataset: Any, lisa: LisaSettings) -> None:
        schedule = BiStateSchedule(lisa.alignment_steps, lisa.finetuning_steps)
        if lisa.rho < 0:
            raise StayalignedError(f"rho={lisa.rho} would push away from the anchor", hint="Take 0 or more.")
        _refuse_what_is_not_exact(self, schedule, lisa.rho)
        combined, n_alignment = self.train_dataset, 0
        if schedule.alignment_steps:
            prepared = _prepare_alignment_dataset(self, alignment_dataset)
            combined, n_alignment = ConcatDataset([self.train_dataset, prepared]), len(prepared)  # pyright: ignore
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._lisa = lisa
        self._schedule = schedule
        self._finetuning_rows = RowStream(len(self.train_dataset), seed, "finetuning")  # pyright: ignore
        self._alignment_rows = RowStream(n_alignment, seed, "alignment")
        self.train_dataset = combined
        self._forget_progress()

    def _forget_progress(self, resume_from: Path | None = None) -> None:
        self._resume_from = resume_from
        self._anchor: Anchor | None = None
        self._trainable: dict[str, Tensor] = {}
        self._begun_step: int | None = None
        self._sampler_in_use = False
        self._phase_loss: dict[Phase, Tensor] = {}
        self._phase_steps = dict.fromkeys(Phase, 0)

    # ---- rows --------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler_in_use = True
        if self._schedule.alignment_steps == 0:
            return super()._get_train_sampler(*args, **kwargs)
        return _BiStateSampler(self)

    def _rows_per_step(self) -> int:
        return self.get_total_train_batch_size(self.args)

    def _steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch: as many as plain training of the user's rows takes, or enough to cover them."""
        rows, accumulation = self._finetuning_rows.size, self.args.gradient_accumulation_steps
        rows_per_batch = self._rows_per_step() // accumulation
        covers = self._lisa.budget == "cover"
        drops = self.args.dataloader_drop_last and not covers  # what is dropped would not be covered
        batches = rows // rows_per_batch if drops else -(-rows // rows_per_batch)
        plain = max(-(-batches // accumulation), 1)
        return self._schedule.steps_to_cover(plain) if covers else plain

    # ---- pull --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; a checkpoint must be of the same schedule, ρ, batch and numbers of rows."""
        if resume_from_checkpoint is True:
            from transformers.trainer_utils import get_last_checkpoint

            resume_from_checkpoint = get_last_checkpoint(str(self.args.output_dir)) or True
        path = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        if path is not None:
            _require_same_run(path, self._fingerprint())
        self._forget_progress(path)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """`Trainer.training_step`, and the proximal gradient after the last micro-batch of an optimizer step."""
        step = self.state.global_step
        if step != self._begun_step:
            self._begin_step(step)
        loss = super().training_step(model, inputs, *args, **kwargs)
        phase = self._schedule.phase_at(step)
        if not torch.isfinite(loss):
            raise StayalignedError(
                f"the loss is {loss.item()} at optimizer step {step}, in the {phase} state; training stopped before it",
                hint="Lower learning_rate, set max_grad_norm, or look for a broken row. Earlier checkpoints are sound.",
            )
        self._phase_loss[phase] = self._phase_loss.get(phase, torch.zeros_like(loss)) + loss
        if self.accelerator.sync_gradients:
            self._phase_steps[phase] += 1
            if self._anchor is not None and step >= self._proximal_from_step():
                scaler = self.accelerator.scaler
                scale = 1.0 if scaler is None else scaler.get_scale()
                add_proximal_gradient_(self._trainable, self._anchor, self._lisa.rho, scale=scale)
        return loss

    def _proximal_from_step(self) -> int:
        """The first step with the pull: the first after that share of all steps, as in the published code."""
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * self._steps_per_epoch())
        return math.floor(self._lisa.proximal_warmup_ratio * steps) + 1

    def _begin_step(self, step: int) -> None:
        first = self._begun_step is None
        self._begun_step = step
        if first and not self._sampler_in_use:
            raise StayalignedError(
                f"{type(self).__name__} draws its training rows without `_get_train_sampler`, "
                "so Lisa cannot choose them",
                hint="Leave `get_train_dataloader` to transformers.Trainer.",
            )
        if first or self._schedule.switches_at(step):
            self._trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}  # pyright: ignore
        if self._lisa.rho == 0:
            return
        if self._schedule.switches_at(step) or (first and self._resume_from is None):
            self._anchor = None  # frees the old copy before the new one is made
            self._anchor = take_anchor(self._trainable)
        elif first and self._resume_from is not None:
            self._anchor = _read_anchor(self._resume_from / ANCHOR_FILE, self._trainable)

    # ---- resume ------------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        return {
            "alignment_steps": self._schedule.alignment_steps,
            "finetuning_steps": self._schedule.finetuning_steps,
            "rho": self._lisa.rho,
            "proximal_from_step": self._proximal_from_step() if self._lisa.rho else None,
            "budget": self._lisa.budget,
            "user_rows": self._finetuning_rows.size,
            "alignment_rows": self._alignment_rows.size,
            "rows_per_step": self._rows_per_step(),
            "seed": self._finetuning_rows.seed,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the host's files: it writes trainer_state.json last, so a checkpoint that has it is complete.
        if self.args.should_save and not self.args.save_only_model:
            directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            if self._anchor is not None:
                _write_anchor(directory / ANCHOR_FILE, self._anchor)
            write_text(directory / STATE_FILE, json.dumps(self._fingerprint(), indent=2) + "\n")
        super()._save_checkpoint(model, trial)

    # ---- logging -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`Trainer.log`, with the losses of the two states and the drift in the rows of training."""
        if "loss" in logs:
            for phase, total in self._phase_loss.items():
                mean = self.accelerator.reduce(total, "mean") / self._phase_steps[phase]  # pyright: ignore
                logs[f"{phase}_loss"] = mean.item()
            if self._anchor is not None:
                logs["drift"] = drift(self._trainable, self._anchor).item()
            self._phase_loss = {}
            self._phase_steps = dict.fromkeys(Phase, 0)
        super().log(logs, *args, **kwargs)


class _BiStateSampler(Sampler[int]):
    """The rows of one epoch: those of the optimizer steps from the epoch's first, whatever step it is read at."""

    def __init__(self, trainer: BiStateMixin) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer._steps_per_epoch() * self._trainer._rows_per_step()  # pyright: ignore

    def __iter__(self) -> Iterator[int]:
        trainer = self._trainer
        steps = trainer._steps_per_epoch()  # pyright: ignore
        # On resume the host skips the batches of the epoch that are done, so the epoch is given from its start.
        start = trainer.state.global_step // steps * steps
        for step in range(start, start + steps):
            yield from trainer._schedule.indices_at(  # pyright: ignore
                step,
                rows_per_step=trainer._rows_per_step(),  # pyright: ignore
                finetuning=trainer._finetuning_rows,  # pyright: ignore
                alignment=trainer._alignment_rows,  # pyright: ignore
            )


def _refuse_what_is_not_exact(trainer: Trainer, schedule: BiStateSchedule, rho: float) -> None:
    """Name the first setting under which the rows or the pull would silently differ from Lisa's."""
    args = trainer.args
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):  # pyright: ignore
        raise StayalignedError("the model has no trainable weights", hint="Attach a LoRA, or unfreeze some weights.")
    if not isinstance(trainer.train_dataset, Sized) or len(trainer.train_dataset) == 0:
        raise StayalignedError(
            f"train_dataset is {'empty' if isinstance(trainer.train_dataset, Sized) else 'without a length'}; "
            "Lisa shuffles its rows by index",
            hint="Give a dataset with rows and a length, not a stream.",
        )
    if schedule.alignment_steps:
        refused = {
            f"train_sampling_strategy={args.train_sampling_strategy!r}": args.train_sampling_strategy != "random",
            "ignore_data_skip=True": args.ignore_data_skip,
            "auto_find_batch_size=True": args.auto_find_batch_size,
            "accelerator_config.split_batches=True": trainer.accelerator.split_batches,
        }
        for setting, is_set in refused.items():
            if is_set:
                raise StayalignedError(
                    f"{setting} would draw rows in another order than Lisa's two states", hint="Leave it unset."
                )
    if rho > 0:
        optimizer = str(getattr(args.optim, "value", args.optim))
        refused = {
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "FSDP": trainer.is_fsdp_enabled,
            f"optim={optimizer!r}": "lomo" in optimizer or "layerwise" in optimizer,
        }
        for setting, is_set in refused.items():
            if is_set:
                raise StayalignedError(
                    f"{setting} keeps the gradients where Lisa's pull (rho={rho}) cannot be added to them",
                    hint="Train with DDP and another optimizer, or without the pull: rho=0 (BSO).",
                )


def _prepare_alignment_dataset(trainer: Trainer, dataset: Any) -> Any:
    """The alignment rows as the trainer's own rows are: for TRL's SFTTrainer tokenized by its own preparation."""
    if dataset is None:
        raise StayalignedError(
            "no alignment_dataset given, but alignment_steps is not 0",
            hint="Give safety rows, or alignment_steps=0 for the pull alone.",
        )
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise StayalignedError(
            f"alignment_dataset is {'empty' if isinstance(dataset, Sized) else 'without a length'}",
            hint="Give a dataset with rows and a length, not a stream.",
        )
    # Importing TRL takes seconds; who has built one of its trainers has imported it.
    sft = sys.modules.get("trl.trainer.sft_trainer")
    if sft is None or not isinstance(trainer, sft.SFTTrainer):
        of_trl = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
        if of_trl:
            raise StayalignedError(
                f"{of_trl[0]} prepares its rows in its own way, which Lisa does not know",
                hint="Lisa works in transformers.Trainer and TRL's SFTTrainer, and in subclasses of either.",
            )
        return dataset
    host: Any = trainer
    if host._is_vision_dataset:
        raise StayalignedError("Lisa trains on text; the user's rows hold images", hint="Drop the image columns.")
    if host._skip_prepare_dataset:
        return dataset
    # TRL decides once, from the user's first row, whether prompts are masked. That choice is not the alignment rows'.
    chosen: bool = host.completion_only_loss
    if host.args.completion_only_loss is None:
        sample = next(iter(dataset))  # pyright: ignore
        host.completion_only_loss = "prompt" in sample and "completion" in sample
    try:
        with bars_off(bool(host.args.disable_tqdm)):
            prepared = host._prepare_dataset(
                dataset, host.processing_class, host.args, host.args.packing, None, "alignment"
            )
    finally:
        host.completion_only_loss = chosen
    if len(prepared) == 0:
        raise StayalignedError(
            f"no alignment row leaves an answer to learn within max_length={host.args.max_length} tokens",
            hint="Raise max_length, or give shorter rows.",
        )
    return prepared


def _require_same_run(checkpoint: Path, expected: dict[str, Any]) -> None:
    state_file = checkpoint / STATE_FILE
    needed = [state_file, *([checkpoint / ANCHOR_FILE] if expected["rho"] > 0 else [])]
    for file in needed:
        if not file.is_file():
            raise StayalignedError(
                f"{checkpoint} cannot be resumed with Lisa: it has no {file.name}",
                hint="Resume a checkpoint that Lisa wrote (not one with save_only_model), or start anew.",
            )
    try:
        found = json.loads(state_file.read_text(encoding="utf-8"))
    except ValueError:
        raise StayalignedError(f"{state_file} is not JSON", hint="Resume an earlier checkpoint.") from None
    differing = [
        f"{key}={found.get(key)} there, {value} here" for key, value in expected.items() if found.get(key) != value
    ]
    if differing:
        raise StayalignedError(
            f"{checkpoint} was made by another run: {'; '.join(differing)}",
            hint="Resume with the settings, data and batch size it was made with, or start anew from its weights.",
        )


def _write_anchor(path: Path, anchor: Anchor) -> None:
    from safetensors.torch import save_file

    with replace_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in anchor.items()}, temporary)


def _read_anchor(path: Path, params: dict[str, Tensor]) -> Anchor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise StayalignedError(f"{path} is damaged: {error}", hint="Resume an earlier checkpoint.") from None
    described = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    expected = {name: (tuple(p.shape), p.dtype) for name, p in params.items()}
    if described != expected:
        differing = sorted(
            name for name in described.keys() | expected.keys() if described.get(name) != expected.get(name)
        )
        raise StayalignedError(
            f"{path} holds the anchor of another model; differing in name, shape or type: {', '.join(differing)}",
            hint="Resume with the model and LoRA settings that the checkpoint was made with.",
        )
    return {name: stored[name].to(param.device) for name, param in params.items()}
