"""How a base model is aligned: the settings of `stayaligned align`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from stayaligned.core.records import Record
from stayaligned.experiments.config.host_settings import Host
from stayaligned.experiments.config.validation import parse, refuse_unknown_settings
from stayaligned.experiments.config.yaml_file import apply_overrides, load_yaml

if TYPE_CHECKING:
    pass


_PAPER_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}


_PAPER_TRAINING: dict[str, Any] = {
    "num_train_epochs": 30,
    "per_device_train_batch_size": 5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share, being below 1
    "weight_decay": 0.1,
    # Not the paper's, which says nothing of them; 30 epochs would leave over a hundred checkpoints.
    "logging_steps": 10,
    "save_total_limit": 2,
}


_PAPER_LEARNING_RATE = 1e-3


class Alignment(BaseModel):
    """How a base model is aligned: which model, on what data, with which settings.

    The defaults are those of the alignment stage of Lisa (arXiv 2405.18641, section 5.1; LoRA and schedule from its
    script SFT.sh). What differs from the published code: a conversation is rendered by a chat template, which stays
    with the result; the LoRA is merged in fp32 and rounded once to the base model's type, where the code adds in fp16;
    a base model stored in fp16 is trained in fp32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    paper: ClassVar[str] = "Huang et al., Lisa, NeurIPS 2024, arXiv 2405.18641 (alignment stage)"

    base_model: str
    """The unaligned model: a checkpoint directory or a hub id."""
    data: str
    """Requests and safe answers: a JSONL file or a hub data set."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many rows, the first ones."""
    chat_template: str | None = None
    """A Jinja file, for a base model without a template or in place of its own."""
    lora: dict[str, Any] | None = Field(default_factory=dict)
    """Fields of PEFT's LoraConfig, over the paper's; null trains the full weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the weights are trained in. auto: under a LoRA as stored, but fp32 if stored in fp16; full weights in fp32.
    The result has the base model's type, whatever this is."""
    trainer: Literal["transformers", "sft"] = "transformers"
    """transformers' Trainer, or TRL's SFTTrainer."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of TrainingArguments (of SFTConfig for `trainer: sft`), over the paper's."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens after which a row is cut."""
    seed: int = Field(default=0, ge=0)

    def spec(self) -> dict[str, Any]:
        """The plain mapping that makes an equal value; defaults included."""
        return self.model_dump(mode="json")

    @field_validator("chat_template")
    @classmethod
    def _is_a_jinja_file(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".jinja"):
            raise ValueError(f"expected the path of a .jinja file, found {value!r}")
        return value

    @field_validator("lora", "training", mode="before")
    @classmethod
    def _over_the_papers(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            return value
        if info.field_name == "lora":
            return {**_PAPER_LORA, **value}
        # A learning rate for LoRA factors is no default for full weights.
        rate = {"learning_rate": _PAPER_LEARNING_RATE} if info.data.get("lora") is not None else {}
        return {**_PAPER_TRAINING, **rate, **value}

    @field_validator("lora", "training")
    @classmethod
    def _host_knows_every_setting(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        host: Host = "lora" if info.field_name == "lora" else info.data.get("trainer", "transformers")
        refuse_unknown_settings(str(info.field_name), value or {}, host)
        return value

    @model_validator(mode="after")
    def _full_weights_need_a_rate(self) -> Alignment:
        if self.lora is None and "learning_rate" not in self.training:
            raise ValueError(
                f"training.learning_rate: required with `lora: null`: the default, {_PAPER_LEARNING_RATE:g}, is for a "
                "LoRA and would wreck full weights (1e-5 is a common start)"
            )
        return self


class AlignmentRecord(Record):
    """How an aligned model came about: the content of its `alignment.json`."""

    format_version: Literal[1] = 1
    paper: str = Alignment.paper
    alignment: dict[str, Any]
    """All settings, defaults included."""
    inputs: dict[str, str]
    """The place of each input in the settings, and what identifies its content."""
    rows: int
    """Rows trained on."""
    rows_cut: int
    """Those of them whose answers were cut at `max_length`, so that their ends were not learned."""
    steps: int
    """Optimizer steps."""
    log: tuple[dict[str, Any], ...]
    """The last rows of the training log."""
    trained_in: str
    stored_in: str
    template_hash: str
    notes: tuple[str, ...] = ()
    """What whoever uses the model must know besides."""
    versions: dict[str, str]
    commit: str = ""


def load_alignment(source: str, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> Alignment:
    """An alignment of a base model, or from a YAML file; every error in it at once, missing input files included.

    Args:
        source: a checkpoint directory or a hub id; or the path of a `.yaml` file.
        settings: whole settings over those of the file.
        overrides: dotted `key=value` over both.

    Raises:
        StayalignedError: as `stayaligned.experiments.config.validation.parse`, or if the YAML file can't be read.
    """
    in_file = source.endswith((".yaml", ".yml"))
    content = load_yaml(Path(source)) if in_file else {"base_model": source}
    content |= settings
    apply_overrides(content, overrides)
    return parse(Alignment, content, source if in_file else "align")
