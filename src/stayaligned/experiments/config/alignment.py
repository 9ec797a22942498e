"""The settings of `stayaligned align`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from stayaligned.core.records import Record
from stayaligned.core.settings import ChatTemplate, TrainerKind
from stayaligned.experiments.config.validation import check_host_settings, parse
from stayaligned.experiments.config.yaml_file import apply_overrides, load_yaml

RECORD_FORMAT = 1
"""Version of `alignment.json`."""

_PAPER_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}


_PAPER_TRAINING: dict[str, Any] = {
    "num_train_epochs": 30,
    "per_device_train_batch_size": 5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share, being below 1
    "weight_decay": 0.1,
    # Not in the paper; without a limit, 30 epochs would leave over a hundred checkpoints.
    "logging_steps": 10,
    "save_total_limit": 2,
}


_PAPER_LEARNING_RATE = 1e-3


class Alignment(BaseModel):
    """The settings with which a base model is aligned.

    The defaults are those of the alignment stage of Lisa (arXiv 2405.18641, section 5.1; LoRA and schedule from its
    script SFT.sh). Differences from the published code: conversations are rendered by a chat template, which is stored
    with the aligned model; the LoRA is merged in fp32 and rounded once to the base model's type, where the code adds in
    fp16; a base model stored in fp16 is trained in fp32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    paper: ClassVar[str] = "Huang et al., Lisa, NeurIPS 2024, arXiv 2405.18641 (alignment stage)"

    base_model: str
    """The unaligned model: a checkpoint directory or a hub id."""
    data: str
    """Requests with safe completions: a JSONL file or a hub data set."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of rows; the first ones are used."""
    chat_template: ChatTemplate = ChatTemplate()
    """The chat template's arguments and date, and the Jinja file with it for a base model without one; a path alone is
    the file."""
    lora: dict[str, Any] | None = Field(default_factory=dict)
    """Fields of PEFT's LoraConfig, which override the paper's; null trains the full weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights during training. auto: with a LoRA as stored (fp16 in fp32), full weights in fp32.
    The aligned model always has the base model's type."""
    trainer: TrainerKind = "transformers"
    """Trainer class: transformers' Trainer, or TRL's SFTTrainer."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of TrainingArguments (of SFTConfig for `trainer: sft`), which override the paper's."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens to which a row is cut."""
    seed: int = Field(default=0, ge=0)

    def spec(self) -> dict[str, Any]:
        """Return the plain mapping that validates to equal settings, defaults included."""
        return self.model_dump(mode="json")

    @field_validator("chat_template", mode="before")
    @classmethod
    def _may_be_null(cls, value: Any) -> Any:
        return ChatTemplate() if value is None else value

    @field_serializer("chat_template")
    def _as_short_as_possible(self, value: ChatTemplate) -> Any:
        """Keep the records of alignments whose setting was a path."""
        given = value.model_dump(mode="json", exclude_defaults=True)
        return given if given.keys() - {"file"} else given.get("file")

    @field_validator("lora", "training", mode="before")
    @classmethod
    def _over_the_papers(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            return value
        if info.field_name == "lora":
            return {**_PAPER_LORA, **value}
        # The learning rate of LoRA factors is too high for full weights.
        rate = {"learning_rate": _PAPER_LEARNING_RATE} if info.data.get("lora") is not None else {}
        return {**_PAPER_TRAINING, **rate, **value}

    _check_host_settings = field_validator("lora", "training")(check_host_settings)

    @model_validator(mode="after")
    def _check_training(self) -> Alignment:
        if self.training.get("max_steps") == 0:
            raise ValueError("training.max_steps: 0 trains nothing; -1 leaves the length to num_train_epochs")
        if self.lora and self.lora.get("alora_invocation_tokens"):
            raise ValueError("lora.alora_invocation_tokens: such a LoRA can't be merged into the model; remove it")
        if self.lora is None and "learning_rate" not in self.training:
            raise ValueError(
                f"training.learning_rate: required with `lora: null`: the default, {_PAPER_LEARNING_RATE:g}, is for a "
                "LoRA and would wreck full weights (1e-5 is a common start)"
            )
        return self


class AlignmentRecord(Record):
    """The record of an alignment: the content of `alignment.json`."""

    format_version: int = RECORD_FORMAT
    paper: str = Alignment.paper
    alignment: dict[str, Any]
    """All settings, defaults included."""
    inputs: dict[str, str]
    """Place of each input in the settings, and what identifies its content."""
    base_weights: str = ""
    """Hash of the base model's weights alone, as `weights_sha256` in `projection.json`; empty in older records."""
    rows: int
    """Number of rows that were trained on."""
    rows_cut: int
    """Number of rows whose completion was cut at `max_length`, so that its end was not learned."""
    steps: int
    """Number of optimizer steps."""
    log: tuple[dict[str, Any], ...]
    """Last rows of the training log."""
    trained_in: str
    """Type of the weights during training."""
    stored_in: str
    """Type of the stored weights."""
    template_hash: str
    notes: tuple[str, ...] = ()
    """What users of the aligned model must know."""
    versions: dict[str, str]
    commit: str = ""


def load_alignment(source: str, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> Alignment:
    """Validate the settings of an alignment; every error is reported at once, missing input files included.

    Args:
        source: the base model (a checkpoint directory or a hub id), or the path of a `.yaml` file.
        settings: settings that override those of the file.
        overrides: dotted `key=value`, which override both.

    Raises:
        StayalignedError: as `stayaligned.experiments.config.validation.parse`, or if the YAML file can't be read.
    """
    in_file = source.endswith((".yaml", ".yml"))
    content = load_yaml(Path(source)) if in_file else {"base_model": source}
    content |= settings
    apply_overrides(content, overrides)
    return parse(Alignment, content, source if in_file else "align")
