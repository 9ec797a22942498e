"""The contracts of a defense: during fine-tuning (a Trainer), or after it (a patched adapter).

One file per defense beside this one; the file's name is the defense's name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stayaligned.core.component import Component, Registry
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, LayerReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from stayaligned.weights.adapters import Adapter
    from stayaligned.weights.checkpoints import Checkpoint
    from stayaligned.weights.deltas import BytesDone

TrainerKind = Literal["transformers", "sft"]


@dataclass(frozen=True)
class TrainingSetup:
    """Everything a training defense may use; `trainer()` is plain supervised fine-tuning of it.

    `model` already carries its LoRA where the experiment asks for one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    """The user's rows, possibly poisoned."""
    alignment_examples: Sequence[Example]
    """Safety rows; empty if the experiment names none."""
    arguments: Mapping[str, Any]
    """Fields of TrainingArguments (or SFTConfig), `output_dir` and `seed` included."""
    kind: TrainerKind = "transformers"
    max_length: int = 1024
    """Tokens after which an example is cut."""
    callbacks: Sequence[Any] = field(default_factory=tuple)

    def trainer(self, examples: Sequence[Example] | None = None) -> Trainer:
        """Plain fine-tuning on `examples` (the user's rows if not given): a Trainer or an SFTTrainer."""
        from stayaligned.hf.training.finetuning import build_trainer

        return build_trainer(self, self.examples if examples is None else examples)

    def alignment_dataset(self, defense: str) -> Any:
        """The alignment rows as the dataset that this setup's kind of trainer takes.

        Raises:
            StayalignedError: if there are none; the message names `defense` as the one that needs them.
        """
        self._require_alignment_examples(defense)
        from stayaligned.hf.training.finetuning import build_dataset

        return build_dataset(self, self.alignment_examples)

    def preference_trainer(self, defense: str, beta: float) -> Callable[[Any], Trainer]:
        """Builds, on the model it is given, a DPOTrainer of the alignment rows, each of which has a rejected answer.

        Raises:
            StayalignedError: if there are none; the message names `defense` as the one that needs them.
        """
        self._require_alignment_examples(defense)
        from stayaligned.hf.training.preferences import build_preference_trainer

        return lambda model: build_preference_trainer(self, model, beta)

    def _require_alignment_examples(self, defense: str) -> None:
        if not self.alignment_examples:
            raise StayalignedError(
                f"defense {defense!r} needs alignment data, and the experiment names none",
                hint="Set `alignment_data:` to a JSONL file of requests and safe answers.",
            )


class TrainingDefense(Component):
    """A defense that acts during fine-tuning."""

    stage: ClassVar[str] = "finetuning"
    needs_alignment_data: ClassVar[bool] = False
    """Whether `make_trainer` asks for alignment rows, so that a missing file is an error before training."""

    def notes(self, steps: int) -> Sequence[str]:
        """What a reader of a run of that many optimizer steps must know; nothing unless overridden."""
        del steps
        return ()

    @abstractmethod
    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """A Trainer, ready for `train()`, that fine-tunes `setup.model` in this defense's way."""


@dataclass(frozen=True)
class ModelPair:
    """The checkpoints that a patch defense compares (a local directory or a hub id each), or what stands for them."""

    aligned: str | Path | None
    """The model that was fine-tuned."""
    base: str | Path | None
    """Its unaligned ancestor."""
    subspace: Path | None = None
    """A subspace file, which needs neither."""

    def require_aligned(self, defense: str) -> str | Path:
        """`aligned`, or an error that names the defense that needs it."""
        if self.aligned is None:
            raise StayalignedError(f"defense {defense!r} needs the aligned model", hint="Name the aligned model.")
        return self.aligned

    def require_base(self, defense: str) -> str | Path:
        """`base`, or an error that names the defense that needs it."""
        if self.base is None:
            raise StayalignedError(
                f"defense {defense!r} needs the unaligned base model",
                hint="Set `base_model:` (for a chat model, its pretrained ancestor).",
            )
        return self.base


@dataclass(frozen=True)
class Execution:
    """How a patch is worked out; it changes nothing of the outcome but its last bits."""

    device: str = "cpu"
    """Where the products are made: "cpu" or a GPU ("cuda")."""
    progress: Callable[[BytesDone], None] | None = None
    """Called as the weights stream past."""


@dataclass(frozen=True)
class PatchedAdapter:
    """The outcome of a patch: the new adapter and what was done to each layer."""

    adapter: Adapter
    layers: Sequence[LayerReport]
    notes: Sequence[str] = ()
    """What a reader of the record must know besides."""


class PatchDefense(Component):
    """A defense that acts on a finished adapter or fine-tuned model. It never changes its input."""

    stage: ClassVar[str] = "post_finetuning"
    needs_base: ClassVar[bool] = True
    """Whether `patch` compares the aligned model with its base."""
    patches_full_weights: ClassVar[bool] = False
    """Whether `patch_model` is there."""

    @abstractmethod
    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """A new adapter of the same rank and configuration, and a report per LoRA layer."""

    def patch_all(self, adapters: Sequence[Adapter], models: ModelPair, how: Execution) -> list[PatchedAdapter]:
        """`patch` for several adapters; override it to read the models' weights once for all of them."""
        del how
        return [self.patch(adapter, models) for adapter in adapters]

    def patch_model(self, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution) -> list[LayerReport]:
        """Write a fully fine-tuned model with changed weights into the empty directory `out`.

        Raises:
            StayalignedError: unless the defense overrides it.
        """
        del out, models, how
        raise StayalignedError(
            f"{finetuned.directory}: {self.name} patches LoRA adapters, not full weights",
            hint="Name an adapter, or a defense that does (safe_lora, complement and their controls).",
        )


Defense = TrainingDefense | PatchDefense
DEFENSES: Registry[Any] = Registry("defense", __name__, TrainingDefense, PatchDefense)
