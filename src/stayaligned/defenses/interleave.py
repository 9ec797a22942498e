"""Interleaving++: safe rows chosen by two models' perplexities (Kaczér et al., ICML 2026)."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.data.sampling import sample
from stayaligned.defenses import TrainingDefense, TrainingSetup
from stayaligned.weights.adapters import is_adapter

if TYPE_CHECKING:
    from transformers import Trainer

_log = logging.getLogger(__name__)
_REFUSAL = re.compile(r"\b(?:sorry|apolog\w*|cannot|can['’]t)\b", flags=re.IGNORECASE)
_BEGINNING = 10
"""Number of words of an answer in which a refusal is searched."""


class Interleave(TrainingDefense):
    """Add the safe rows that a misaligned model finds hardest (Interleaving++).

    Each alignment row gets a score from the mean nats per token L of its answer,

        s = (mean of L over the misaligned models − L of the aligned model) / (L of the aligned model + ε)

    rows whose answers begin with a refusal are left out, and the rows with the highest scores are trained on beside the
    user's. With `refusals: keep` this is the paper's Interleaving+, with `selection: random` its Interleaving.

    Differs from the paper in the rows to choose from: the alignment rows, where the paper has the harmless part of
    WildGuardMix. Safety data that is all refusals needs `refusals: keep`. The value of ε is ours. In the paper the rows
    are the union of both sets; `order: even` also spreads the added rows evenly.

    Cost: one forward pass over the alignment rows for the aligned and for each misaligned model, of which one at a time
    is in memory beside the aligned one; then as many more steps as there are rows. Its controls are
    `selection: random` or `mixing` (as many rows at random), and for `order: even` the same rows with
    `order: shuffled`.
    """

    name: ClassVar[str] = "interleave"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.06249"
    needs_alignment_data: ClassVar[bool] = True

    misaligned: tuple[str, ...] = ()
    """The misaligned models: adapters of the aligned model that were trained on harmful rows, or whole models with the
    same tokenizer, such as the unaligned base. Needed for `selection: gap`."""
    share: float = Field(default=0.05, gt=0.0, le=1.0)
    """Number of added rows per user row."""
    selection: Literal["gap", "random"] = "gap"
    """`gap`: the rows with the highest scores. `random`: as many at random, the control."""
    refusals: Literal["drop", "keep"] = "drop"
    """Whether rows are left out whose first ten words apologize or say "cannot"."""
    epsilon: float = Field(default=0.1, gt=0.0)
    """ε, in nats per token: it keeps short answers that the aligned model knows by heart from the highest scores."""
    order: Literal["shuffled", "even"] = "shuffled"
    """`shuffled`: all rows in one random order. `even`: an added row after each stretch of user rows."""

    @model_validator(mode="after")
    def _has_a_misaligned_model(self) -> Self:
        if self.selection == "gap" and not self.misaligned:
            raise ValueError(
                "`selection: gap` needs `misaligned`: a list of adapters or models, such as the base model"
            )
        return self

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind on the user's and the chosen rows.

        Raises:
            StayalignedError: if there are too few alignment rows, or a misaligned model can't be loaded.
        """
        chosen = self.choose(setup)
        trainer = setup.trainer([*setup.examples, *chosen])
        if self.order == "even":
            from stayaligned.hf.training.even_rows import spread_evenly

            spread_evenly(trainer, len(chosen))
        return trainer

    def choose(self, setup: TrainingSetup) -> list[Example]:
        """Return the alignment rows to add.

        Raises:
            StayalignedError: as `make_trainer`.
        """
        from stayaligned.hf.features import IGNORED, encode_example

        rows = [
            row
            for row in setup.require_alignment_examples(self.name)
            if self.refusals == "keep" or not is_refusal(row.completion)
        ]
        refusing = len(setup.alignment_examples) - len(rows)
        encoded = (encode_example(setup.tokenizer, row, setup.max_length)["labels"] for row in rows)
        rows = [row for row, labels in zip(rows, encoded, strict=True) if set(labels) != {IGNORED}]
        count = max(round(self.share * len(setup.examples)), 1)
        if count > len(rows):
            raise StayalignedError(
                f"defense 'interleave' needs {count} alignment rows (share={self.share} of {len(setup.examples)}), but "
                f"{len(rows)} of {len(setup.alignment_examples)} can be used: {refusing} begin with a refusal",
                hint="Add rows to `alignment_data:`, lower `share`, or set `refusals: keep`.",
            )
        if self.selection == "random":
            return sample(rows, count, random.Random(f"interleave/{setup.arguments.get('seed', 0)}"))  # noqa: S311
        scores = self.score(setup, rows)
        best = sorted(range(len(rows)), key=lambda index: -scores[index])[:count]
        _log.warning(
            "interleave added %d of %d alignment rows (%d left out as refusals), with scores from %.3g to %.3g; the "
            "median of all is %.3g",
            *(count, len(rows), refusing, scores[best[0]], scores[best[-1]], sorted(scores)[len(scores) // 2]),
        )
        return [rows[index] for index in best]

    def score(self, setup: TrainingSetup, rows: Sequence[Example]) -> list[float]:
        """Return s of each row.

        Raises:
            StayalignedError: if a misaligned model can't be loaded, or lacks a token of the rows.
        """
        from stayaligned.hf.training.row_scores import log_perplexities

        def nats(model: Any) -> list[float]:
            return [value or 0.0 for value in log_perplexities(model, setup.tokenizer, rows)]

        aligned = nats(setup.model)
        others = [nats(self._load(setup, ref)) for ref in self.misaligned]
        means = (sum(values) / len(values) for values in zip(*others, strict=True))
        return [(mean - own) / (own + self.epsilon) for mean, own in zip(means, aligned, strict=True)]

    def _load(self, setup: TrainingSetup, ref: str) -> Any:
        from stayaligned.hf import models

        if not is_adapter(Path(ref)):
            return models.load_model(ref)
        if setup.aligned_model is None:
            raise StayalignedError(
                f"defense 'interleave': {ref} is an adapter, but the aligned model that it belongs to is not known",
                hint="Set `aligned_model` of the TrainingSetup.",
            )
        return models.load_finetuned(setup.aligned_model, Path(ref))


def is_refusal(answer: str) -> bool:
    """Return whether one of an answer's first ten words apologizes or says "cannot", as the paper's filter."""
    return _REFUSAL.search(" ".join(answer.split()[:_BEGINNING])) is not None
