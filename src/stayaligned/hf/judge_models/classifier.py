"""Requests with answers to labels, by a sequence classifier."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.generation.fitting import Fitted, as_text, by_length, fill, fit, input_room
from stayaligned.hf.models import load_classifier

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Reading:
    """What a classifier made of one answer."""

    labels: tuple[str, ...] | None
    """The likeliest label, or (multi-label) every one that is flagged; None where the request alone fills the input."""
    confidence: float
    """Probability of that label; of several, of the likeliest; where none is flagged, 1 - that of the likeliest."""
    was_cut: bool
    """Whether the end of the answer did not fit."""


@dataclass(frozen=True)
class PairClassifier:
    """A sequence classifier of (request, answer) pairs, single-label (softmax) or multi-label (sigmoid)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    is_multi_label: bool
    max_tokens: int
    has_padding: bool
    """Whether the checkpoint itself names a padding token."""

    @classmethod
    def load(cls, ref: str | Path) -> PairClassifier:
        """The classifier in a checkpoint directory or of a hub id.

        Raises:
            StayalignedError: if there is none, or it is a regression.
        """
        model, tokenizer = load_classifier(ref)
        config: Any = model.config
        several = config.problem_type == "multi_label_classification"
        if config.num_labels < (1 if several else 2) or config.problem_type == "regression":
            raise StayalignedError(
                f"{ref}: the judge must choose among labels; this one has {config.num_labels} "
                f"({config.problem_type or 'a score'})",
                hint="Regression models are not supported as judges.",
            )
        has_padding = tokenizer.pad_token_id is not None
        if not has_padding:
            tokenizer.pad_token = tokenizer.eos_token
        if config.pad_token_id is None:
            # Decoder models read their verdict at the last token that is not this one.
            config.pad_token_id = tokenizer.pad_token_id
        labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
        return cls(model, tokenizer, labels, several, input_room(config, tokenizer), has_padding)

    def classify(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        template: str | None = None,
        max_tokens: int | None = None,
        keep_end: bool = True,
        threshold: float = 0.5,
        batch_size: int = 32,
    ) -> Generator[tuple[int, Reading]]:
        """The place of each (request, answer) with its reading, batch by batch.

        Args:
            pairs: what was asked and what was answered; no answer is empty.
            template: the input's text, with `{request}` and `{answer}`; encoded as two segments if not given.
            max_tokens: of the input; what the model can read if not given, or if it can read less.
            keep_end: cut a long answer so that what the template writes after it stays; False cuts the input.
            threshold: probability above which a label of a multi-label classifier is flagged.
            batch_size: inputs at a time; batches are of like length.
        """
        import torch

        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        encoded = [self._encode(request, answer, template, limit, keep_end) for request, answer in pairs]
        yield from ((row, Reading(None, 0.0, was_cut=True)) for row, found in enumerate(encoded) if found is None)
        fitted = {row: found for row, found in enumerate(encoded) if found is not None}
        lengths = [0 if found is None else len(found.inputs["input_ids"]) for found in encoded]
        for rows in by_length(lengths, [*fitted], batch_size):
            batch = self.tokenizer.pad([fitted[row].inputs for row in rows], return_tensors="pt")
            with torch.no_grad():
                logits = self.model(**batch.to(self.model.device)).logits.float()
            yield from (
                (row, Reading(labels, confidence, was_cut=fitted[row].was_cut))
                for row, (labels, confidence) in zip(rows, self._read(logits, threshold), strict=True)
            )

    def _read(self, logits: Tensor, threshold: float) -> list[tuple[tuple[str, ...], float]]:
        """Labels and confidence of each row of (batch, labels)."""
        import torch

        found: list[tuple[tuple[str, ...], float]] = []
        for row in (torch.sigmoid(logits) if self.is_multi_label else torch.softmax(logits, dim=-1)).tolist():
            highest = max(row)
            if self.is_multi_label:
                flagged = tuple(label for label, p in zip(self.labels, row, strict=True) if p > threshold)
                found.append((flagged, highest if flagged else 1 - highest))
            else:
                found.append(((self.labels[row.index(highest)],), highest))
        return found

    def _encode(self, request: str, answer: str, template: str | None, limit: int, keep_end: bool) -> Fitted | None:
        """The input, with the answer cut to what fits; None if nothing of it does."""

        def encode(text: str) -> dict[str, Any]:
            if template is None:
                return dict(self.tokenizer(request, text, verbose=False))
            return dict(self.tokenizer(fill(template, request, text), verbose=False))

        if keep_end:
            return fit(self.tokenizer, encode, answer, limit)
        request, answer = as_text(self.tokenizer, request), as_text(self.tokenizer, answer)
        found, without_answer = encode(answer), encode("")
        ids: list[int] = found["input_ids"]
        if len(ids) <= limit:
            return Fitted(found, was_cut=False)
        after = len(self.tokenizer((template or "").partition("{answer}")[2], add_special_tokens=False)["input_ids"])
        request_ids = without_answer["input_ids"][: len(without_answer["input_ids"]) - after]
        if ids[:limit] == request_ids[:limit]:
            return None
        # What follows the answer may go without a word; it is no part of it.
        return Fitted({key: value[:limit] for key, value in found.items()}, was_cut=len(ids) - after > limit)
