"""Requests with answers to labels, by a sequence classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.errors import StayalignedError
from stayaligned.hf.models import load_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Reading:
    """What a classifier made of one answer."""

    label: str | None
    """None where the request alone fills the classifier's input."""
    confidence: float
    """Softmax probability of the label."""
    was_cut: bool
    """Whether the end of the answer did not fit."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    inputs: dict[str, Any]
    was_cut: bool


@dataclass(frozen=True)
class PairClassifier:
    """A single-label sequence classifier of (request, answer) pairs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_tokens: int

    @classmethod
    def load(cls, ref: str | Path) -> PairClassifier:
        """The classifier in a checkpoint directory or of a hub id.

        Raises:
            StayalignedError: if there is none, or it does not choose one of several labels.
        """
        model, tokenizer = load_classifier(ref)
        config: Any = model.config
        if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
            raise StayalignedError(
                f"{ref}: the judge must choose one of several labels; this one has {config.num_labels} "
                f"({config.problem_type or 'a score'})",
                hint="Multi-label and regression models are not supported as judges.",
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if config.pad_token_id is None:
            # Decoder models read their verdict at the last token that is not this one.
            config.pad_token_id = tokenizer.pad_token_id
        positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
        labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
        return cls(model, tokenizer, labels, min(positions, tokenizer.model_max_length))

    def classify(
        self, pairs: Sequence[tuple[str, str]], *, template: str | None = None, batch_size: int = 32
    ) -> list[Reading]:
        """One reading per (request, answer), in order.

        Args:
            pairs: what was asked and what was answered.
            template: the input's text, with `{request}` and `{answer}`; encoded as two segments if not given.
            batch_size: inputs at a time; batches are of like length.
        """
        import torch

        encoded = {
            row: found
            for row, (request, answer) in enumerate(pairs)
            if (found := self._encode(request, answer, template)) is not None
        }
        rows = sorted(encoded, key=lambda row: -len(encoded[row].inputs["input_ids"]))
        readings = [Reading(None, 0.0, was_cut=True)] * len(pairs)
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            batch = self.tokenizer.pad([encoded[row].inputs for row in chosen], return_tensors="pt")
            with torch.no_grad():
                logits = self.model(**batch.to(self.model.device)).logits
            confidences, labels = torch.softmax(logits.float(), dim=-1).max(dim=-1)
            for row, confidence, label in zip(chosen, confidences.tolist(), labels.tolist(), strict=True):
                readings[row] = Reading(self.labels[label], confidence, was_cut=encoded[row].was_cut)
        return readings

    def _encode(self, request: str, answer: str, template: str | None) -> _Encoded | None:
        """The input, with the answer cut to what fits; None if nothing of it does."""

        def encode(text: str) -> Any:
            if template is None:
                return self.tokenizer(request, text, verbose=False)
            # Not str.format: a template's own text may hold braces.
            before, _, after = template.partition("{answer}")
            filled = before.replace("{request}", request) + text + after.replace("{request}", request)
            return self.tokenizer(filled, verbose=False)

        found = encode(answer)
        excess = len(found["input_ids"]) - self.max_tokens
        if excess <= 0:
            return _Encoded(dict(found), was_cut=False)
        offsets = self.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in offsets["offset_mapping"]]
        kept = len(ends) - excess
        while kept > 0:
            found = encode(answer[: ends[kept - 1]])
            excess = len(found["input_ids"]) - self.max_tokens
            if excess <= 0:
                return _Encoded(dict(found), was_cut=True)
            kept -= excess
        return None
