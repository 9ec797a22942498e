"""Sequence classifiers that label a completion together with its request."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.features import with_known_padding
from stayaligned.hf.generation.batching import split_by_size
from stayaligned.hf.judge_models.inputs import Fitted, escape_control_tokens, fill_template, fit_input
from stayaligned.hf.models import context_length, load_classifier

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Reading:
    """A classifier's labels of one completion."""

    labels: tuple[str, ...] | None
    """The most likely label, or (multi-label) every flagged label; None if the request alone fills the input."""
    confidence: float
    """Probability of the most likely label; 1 minus that probability if no label is flagged."""
    was_cut: bool
    """Whether the classifier did not read the end of the completion."""


@dataclass(frozen=True)
class PairClassifier:
    """A sequence classifier of (request, completion) pairs, single-label (softmax) or multi-label (sigmoid)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    is_multi_label: bool
    max_tokens: int
    """Largest number of tokens of an input."""
    has_padding: bool
    """Whether the checkpoint itself has a padding token."""

    @classmethod
    def load(cls, ref: str | Path) -> PairClassifier:
        """Load the classifier of a checkpoint directory or a hub id.

        Raises:
            StayalignedError: if there is none, or it is a regression model.
        """
        model, tokenizer = load_classifier(ref)
        config: Any = model.config
        several = config.problem_type == "multi_label_classification"
        if config.num_labels < (1 if several else 2) or config.problem_type == "regression":
            raise StayalignedError(
                f"{ref}: a judge must choose among labels; this model has {config.num_labels} "
                f"({config.problem_type or 'a score'})",
                hint="Regression models are not supported as judges.",
            )
        has_padding = tokenizer.pad_token_id is not None
        if not has_padding:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer = with_known_padding(tokenizer, model)
        # Decoder models classify at the last token that is not the configuration's padding.
        own, embedding = config.pad_token_id, cast(Any, model.get_input_embeddings())
        if own is not None and 0 <= own < embedding.weight.shape[0]:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own)
        else:
            config.pad_token_id = tokenizer.pad_token_id
        labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
        return cls(model, tokenizer, labels, several, context_length(config, tokenizer), has_padding)

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
        """Yield the index and the labels of each (request, completion) pair, batch by batch.

        Args:
            pairs: requests with completions; no completion is empty.
            template: text of the input, with `{request}` and `{answer}`; without it, the two are separate segments.
            max_tokens: largest number of tokens of an input, if less than the model can read.
            keep_end: whether to cut a long completion so that the template's text after it stays; False cuts the
                end of the input.
            threshold: probability above which a multi-label classifier flags a label.
            batch_size: number of inputs in a batch; batches hold similar lengths.
        """
        import torch

        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        encoded = [self._encode(request, answer, template, limit, keep_end) for request, answer in pairs]
        yield from ((row, Reading(None, 0.0, was_cut=True)) for row, found in enumerate(encoded) if found is None)
        fitted = {row: found for row, found in enumerate(encoded) if found is not None}
        lengths = [0 if found is None else len(found.inputs["input_ids"]) for found in encoded]
        for rows in split_by_size(lengths, [*fitted], batch_size):
            batch = self.tokenizer.pad([fitted[row].inputs for row in rows], return_tensors="pt")
            with torch.no_grad():
                logits = self.model(**batch.to(self.model.device)).logits.float()
            yield from (
                (row, Reading(labels, confidence, was_cut=fitted[row].was_cut))
                for row, (labels, confidence) in zip(rows, self._read(logits, threshold), strict=True)
            )

    def _read(self, logits: Tensor, threshold: float) -> list[tuple[tuple[str, ...], float]]:
        """Return labels and confidence of each row of (batch, labels)."""
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

    def _encode(self, request: str, completion: str, template: str | None, limit: int, keep_end: bool) -> Fitted | None:
        """Return the input, with the completion cut to what fits; None if nothing of it fits."""

        def encode(text: str) -> dict[str, Any]:
            if template is None:
                return dict(self.tokenizer(request, text, verbose=False))
            return dict(self.tokenizer(fill_template(template, request, text), verbose=False))

        if keep_end:
            return fit_input(self.tokenizer, encode, completion, limit)
        request = escape_control_tokens(self.tokenizer, request)
        completion = escape_control_tokens(self.tokenizer, completion)
        found, without_answer = encode(completion), encode("")
        ids: list[int] = found["input_ids"]
        if len(ids) <= limit:
            return Fitted(found, was_cut=False)
        after = len(self.tokenizer((template or "").partition("{answer}")[2], add_special_tokens=False)["input_ids"])
        request_ids = without_answer["input_ids"][: len(without_answer["input_ids"]) - after]
        if ids[:limit] == request_ids[:limit]:
            return None
        # The template's text after the completion is not part of it: cutting that text is not reported.
        return Fitted({key: value[:limit] for key, value in found.items()}, was_cut=len(ids) - after > limit)
