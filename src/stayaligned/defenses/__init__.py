"""The contracts of a defense: during fine-tuning (a Trainer), or after it (a patched adapter).

One file per defense beside this one; the file's name is the defense's name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stayaligned.component import Component, Registry
from stayaligned.errors import StayalignedError
from stayaligned.records import Example, LayerReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from stayaligned.adapters import Adapter

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
        from stayaligned.hf.finetuning import build_trainer

        return build_trainer(self, self.examples if examples is None else examples)

    def alignment_dataset(self, defense: str) -> Any:
        """The alignment rows as the dataset that this setup's kind of trainer takes.

        Raises:
            StayalignedError: if there are none; the message names `defense` as the one that needs them.
        """
        if not self.alignment_examples:
            raise StayalignedError(
                f"defense {defense!r} needs alignment data, and the experiment names none",
                hint="Set `alignment_data:` to a JSONL file of requests and safe answers.",
            )
        from stayaligned.hf.finetuning import build_dataset

        return build_dataset(self, self.alignment_examples)


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
    """The checkpoints that a patch defense compares: a local directory or a hub id each."""

    aligned: str | Path
    """The model that the adapter was trained on."""
    base: str | Path | None
    """Its unaligned ancestor."""

    def require_base(self, defense: str) -> str | Path:
        """`base`, or an error that names the defense that needs it."""
        if self.base is None:
            raise StayalignedError(
                f"defense {defense!r} needs the unaligned base model",
                hint="Set `base_model:` (for a chat model, its pretrained ancestor).",
            )
        return self.base


@dataclass(frozen=True)
class PatchedAdapter:
    """The outcome of a patch: the new adapter and what was done to each layer."""

    adapter: Adapter
    layers: Sequence[LayerReport]


class PatchDefense(Component):
    """A defense that acts on a finished adapter. It never changes its input."""

    stage: ClassVar[str] = "post_finetuning"
    needs_base: ClassVar[bool] = True
    """Whether `patch` compares the aligned model with its base."""

    @abstractmethod
    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """A new adapter of the same rank and configuration, and a report per LoRA layer."""


Defense = TrainingDefense | PatchDefense
DEFENSES: Registry[Any] = Registry("defense", __name__, TrainingDefense, PatchDefense)
