"""Defenses: the abstract classes that a defense implements, during fine-tuning or after it.

A defense is a frozen value whose fields are its hyper-parameters and its YAML. Each is one file in this package, in a
plug-in file or in an installed package with an entry point; the file's name is the defense's name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stayaligned.core.component import Component, Registry
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, LayerReport, Message
from stayaligned.core.settings import ChatTemplate, TrainerKind
from stayaligned.data.sampling import spread_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from stayaligned.hf.training.objective import AlignmentRows
    from stayaligned.weights.adapters import Adapter
    from stayaligned.weights.checkpoints import Checkpoint
    from stayaligned.weights.deltas import BytesDone

SERVE_FILE = "serve.json"
"""File beside trained weights with the system prompt that the model must be deployed with."""


@dataclass(frozen=True)
class TrainingSetup:
    """The model, the data and the settings of one fine-tuning run, from which a training defense builds a trainer.

    Example:
        def make_trainer(self, setup):
            trainer = setup.trainer()              # plain supervised fine-tuning on the user's rows
            trainer.add_callback(MyCallback())
            return trainer
    """

    model: PreTrainedModel
    """The model to train; already a PEFT model if the experiment trains a LoRA."""
    tokenizer: PreTrainedTokenizerBase
    """The model's tokenizer, with its chat template."""
    examples: Sequence[Example]
    """The user's rows, which an attack may have poisoned."""
    alignment_examples: Sequence[Example]
    """The alignment rows (requests with safe completions); empty if the experiment has no `alignment_data`."""
    arguments: Mapping[str, Any]
    """Fields of TrainingArguments (of SFTConfig for `kind="sft"`), including `output_dir` and `seed`."""
    kind: TrainerKind = "transformers"
    """The class of trainer that `trainer()` builds."""
    max_length: int = 1024
    """Number of tokens at which a row is cut."""
    callbacks: Sequence[Any] = ()
    """Callbacks that every trainer of this setup gets."""
    aligned_model: str | None = None
    """The aligned model that `model` was loaded from: a directory or a hub id."""
    base_model: str | None = None
    """The unaligned ancestor of the aligned model: a directory or a hub id; for defenses that set `needs_base`."""
    ordered: bool = False
    """Whether the user's rows are learned in their order, because an attack has stages; `trainer` then spreads rows
    that a defense adds evenly between them."""

    def require_base(self, defense: str) -> ModelPair:
        """Return the aligned model and its base model.

        Args:
            defense: the name of the defense that needs them, for the error.

        Raises:
            StayalignedError: if there is no base model.
        """
        models = ModelPair(aligned=self.aligned_model, base=self.base_model)
        models.require_base(defense)
        models.require_aligned(defense)
        return models

    def trainer(self, examples: Sequence[Example] | None = None) -> Trainer:
        """Build a Trainer or SFTTrainer for plain supervised fine-tuning.

        Args:
            examples: the rows to train on; the user's rows if None.
        """
        from stayaligned.hf.training.finetuning import build_trainer

        rows = self.examples if examples is None else examples
        rows = spread_rows(rows, self.examples) if self.ordered else rows
        return build_trainer(
            self.model,
            self.tokenizer,
            rows,
            self.arguments,
            kind=self.kind,
            max_length=self.max_length,
            callbacks=self.callbacks,
        )

    def alignment_dataset(self, defense: str) -> Any:
        """Build the dataset of the alignment rows, in the form that this setup's kind of trainer reads.

        Args:
            defense: the name of the defense that needs them, for the error.

        Raises:
            StayalignedError: if there are no alignment rows.
        """
        self.require_alignment_examples(defense)
        from stayaligned.hf.training.finetuning import build_dataset

        return build_dataset(
            self.tokenizer, self.alignment_examples, kind=self.kind, max_length=self.max_length, name="alignment"
        )

    def alignment_rows(self, trainer: Trainer, defense: str, per_step: int | None = None) -> AlignmentRows:
        """Encode the alignment rows for an objective, which takes some of them in every optimizer step.

        Args:
            trainer: the trainer that the objective is attached to.
            defense: the name of the defense that needs them, for the error.
            per_step: number of rows in each optimizer step; None for as many as the user's.

        Raises:
            StayalignedError: if there are no alignment rows.
        """
        self.require_alignment_examples(defense)
        from stayaligned.hf.training.objective import AlignmentRows

        return AlignmentRows.encode(trainer, self.alignment_examples, self.max_length, per_step)

    def preference_trainer(self, defense: str, beta: float) -> Callable[[Any], Trainer]:
        """Return a function that builds a DPOTrainer of the alignment rows on the model that it receives.

        Args:
            defense: the name of the defense that needs them, for the error.
            beta: β of DPO.

        Raises:
            StayalignedError: if there are no alignment rows.
        """
        self.require_alignment_examples(defense)
        from stayaligned.hf.training.preferences import build_preference_trainer

        return lambda model: build_preference_trainer(
            model, self.tokenizer, self.alignment_examples, self.arguments, max_length=self.max_length, beta=beta
        )

    def require_alignment_examples(self, defense: str) -> Sequence[Example]:
        """Return `alignment_examples`.

        Raises:
            StayalignedError: if there are none; the message names the defense that needs them.
        """
        if not self.alignment_examples:
            raise _missing_alignment_data(defense)
        return self.alignment_examples


def _missing_alignment_data(defense: str) -> StayalignedError:
    return StayalignedError(
        f"defense {defense!r} needs alignment data, but there is none",
        hint="Set `alignment_data:` to a JSONL file of requests and safe completions.",
    )


class TrainingDefense(Component):
    """A defense that acts during fine-tuning, by the trainer that it builds.

    Implement `make_trainer`. Declare hyper-parameters as pydantic fields, and set `name` to the name of the file.
    Import torch and transformers inside methods, so that configurations are validated without them.
    """

    stage: ClassVar[str] = "finetuning"
    """The stage that the defense acts in, as the survey of harmful fine-tuning names it."""
    needs_alignment_data: ClassVar[bool] = False
    """Whether `make_trainer` uses `setup.alignment_examples`; if so, missing `alignment_data` is an error before any
    training starts."""
    needs_base: ClassVar[bool] = False
    """Whether the defense uses `setup.base_model`; if so, a missing `base_model` is an error before any training
    starts."""

    @abstractmethod
    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build the trainer that fine-tunes `setup.model`; the caller calls its `train()` and saves the result.

        Start from `setup.trainer()`, and change its data, loss or callbacks. The trainer must resume from checkpoints
        in its output directory, as the Trainers of transformers and TRL do, and its training must be determined by
        `setup.arguments["seed"]`.

        Raises:
            StayalignedError: if this setup can't be trained with the defense.
        """

    def after_saving(self, setup: TrainingSetup, directory: Path) -> None:
        """Change the trained adapter or model after it was saved in `directory`; nothing by default.

        For what a trainer can't save: a projection that was applied in the forward pass, or an update of frozen weights
        that must become a part of the adapter. The caller removes the directory if this fails.

        Raises:
            StayalignedError: if the defense can't be written as an adapter of this layout.
        """
        del setup, directory

    def serve(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return the conversation that the deployed model gets instead of a user's; the same by default.

        For defenses that act by a system prompt after training. Every prompt of an evaluation is asked in this form,
        and judged as the user asked it.
        """
        return prompt

    def notes(self, steps: int) -> Sequence[str]:
        """Return caveats for the readers of a result, after a run of that many optimizer steps; none by default."""
        del steps
        return ()

    def run_steps(self, steps: int) -> int:
        """Return the steps of a run without `max_steps`, in which the user's rows take `steps`; the same by default."""
        return steps

    def check_steps(self, steps: int) -> None:
        """Refuse a run of that many optimizer steps if its result would be meaningless; no run by default.

        Raises:
            StayalignedError: saying how many steps the defense needs.
        """
        del steps


@dataclass(frozen=True)
class ModelPair:
    """The two checkpoints that a patch defense compares, each a local directory or a hub id, or a subspace file."""

    aligned: str | Path | None
    """The aligned model, which was fine-tuned."""
    base: str | Path | None
    """The base model: the unaligned ancestor of the aligned model."""
    subspace: Path | None = None
    """A subspace file, with which neither model is needed."""
    allow_mismatch: bool = False
    """Whether to patch although the models don't seem to belong together or to the adapter; the record notes it."""
    allow_undecided: bool = False
    """Whether to patch although a subspace file leaves open which layers to change; the record notes it."""
    alignment_examples: Sequence[Example] = ()
    """The alignment rows (requests with safe completions), for patches that set `needs_alignment_data`."""
    chat_template: ChatTemplate = field(default_factory=ChatTemplate)
    """How conversations are rendered, for patches that run the model on rows."""

    def require_alignment_examples(self, defense: str) -> Sequence[Example]:
        """Return `alignment_examples`.

        Raises:
            StayalignedError: if there are none; the message names the defense that needs them.
        """
        if not self.alignment_examples:
            raise _missing_alignment_data(defense)
        return self.alignment_examples

    def require_aligned(self, defense: str) -> str | Path:
        """Return `aligned`.

        Raises:
            StayalignedError: if there is none; the message names the defense that needs it.
        """
        if self.aligned is None:
            raise StayalignedError(f"defense {defense!r} needs the aligned model", hint="Set the aligned model.")
        return self.aligned

    def require_base(self, defense: str) -> str | Path:
        """Return `base`.

        Raises:
            StayalignedError: if there is none; the message names the defense that needs it.
        """
        if self.base is None:
            raise StayalignedError(
                f"defense {defense!r} needs the unaligned base model",
                hint="Set `base_model:` (for a chat model, its pretrained ancestor).",
            )
        return self.base


def _ignore(note: str) -> None:
    del note


@dataclass(frozen=True)
class Execution:
    """How a patch is computed; the result depends on it only in its last bits."""

    device: str = "cpu"
    """The device of the matrix products: "cpu" or a GPU ("cuda")."""
    progress: Callable[[BytesDone], None] | None = None
    """Called as the weights are read."""
    note: Callable[[str], None] = _ignore
    """Called with each caveat for the readers of the record that concerns the models."""


@dataclass(frozen=True)
class PatchedAdapter:
    """The result of a patch: the new adapter, and what was done to each layer."""

    adapter: Adapter
    layers: Sequence[LayerReport]
    """One report for each LoRA layer, changed or not."""
    notes: Sequence[str] = ()
    """Caveats for the readers of the record."""


class PatchDefense(Component):
    """A defense that patches a finished adapter or fully fine-tuned model, and never changes its input.

    Implement `patch`. A defense that also patches full weights sets `patches_full_weights` and overrides `patch_model`.
    Declare hyper-parameters as pydantic fields, and set `name` to the name of the file. Import torch inside methods, so
    that configurations are validated without it.
    """

    stage: ClassVar[str] = "post_finetuning"
    """The stage that the defense acts in, as the survey of harmful fine-tuning names it."""
    needs_base: ClassVar[bool] = True
    """Whether `patch` reads the base model; if so, a missing `base_model` is an error before any work starts."""
    needs_alignment_data: ClassVar[bool] = False
    """Whether `patch` uses `models.alignment_examples`; if so, missing `alignment_data` is an error before any work."""
    patches_full_weights: ClassVar[bool] = False
    """Whether `patch_model` is implemented."""
    patches_adapters: ClassVar[bool] = True
    """Whether `patch` is implemented; it refuses adapters if not."""
    raises_rank: ClassVar[bool] = False
    """Whether the new adapter may have a higher rank, by further factors beside its own."""

    @abstractmethod
    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Return a new adapter, with a report for each LoRA layer.

        It has the same configuration; of a defense that sets `raises_rank`, other ranks and alphas.

        Raises:
            StayalignedError: if the adapter or the models can't be patched.
        """

    def patch_all(self, adapters: Sequence[Adapter], models: ModelPair, how: Execution) -> list[PatchedAdapter]:
        """Patch several adapters of one model; override it to read the models' weights once for all adapters."""
        del how
        return [self.patch(adapter, models) for adapter in adapters]

    def patch_model(self, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution) -> list[LayerReport]:
        """Write the patched copy of a fully fine-tuned model into the empty directory `out`, and report each layer.

        Raises:
            StayalignedError: unless the defense overrides this method.
        """
        del out, models, how
        raise StayalignedError(
            f"{finetuned.directory}: {self.name} patches LoRA adapters, not full weights",
            hint="Name an adapter, or use a defense that patches full weights (safe_lora, complement, csulora, their "
            "controls, safe_delta).",
        )


DEFENSES: Registry[Any] = Registry("defense", __name__, TrainingDefense, PatchDefense)
"""The registry of all defenses."""
