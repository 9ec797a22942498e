"""A data filter by the model's own representations: LARF (Li et al., EMNLP 2025)."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.data.sampling import sample
from stayaligned.data.sources import read_examples
from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

_log = logging.getLogger(__name__)


class DataFilter(TrainingDefense):
    """Leave out the rows that look most like harmful answers to the aligned model.

    A row's score is how much nearer its representation h is to harmful references than to safe ones:

        s(x) = mean over harmful r of cos(h(x), h(r)) − mean over safe r of cos(h(x), h(r))

    with h the hidden state of the aligned model behind one layer, at the last token of the conversation with its
    answer. The rows with the highest scores are left out.

    As LARF's published code, with these differences: the layer is a setting, where the paper searches for the one whose
    scaling changes the most refusals; the safe references are alignment rows, where the paper has refusals of the same
    100 requests as the harmful ones; a share of the rows is left out, where the code lists the top 1000 of 52,000.

    A note of the result says how many rows of each origin were left out. The harmful references must not be rows of the
    attack that the filter is tested on; a note says if they are. Rows that do harm without looking harmful pass.

    Cost: one forward pass over the user's rows and the references, about a third of an epoch. Its control is
    `order: random`: as many rows left out at random.
    """

    name: ClassVar[str] = "data_filter"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.18631"
    needs_alignment_data: ClassVar[bool] = True

    harmful_data: str
    """Source of the harmful references: harmful requests with harmful answers."""
    references: int = Field(default=100, ge=1)
    """Most rows to use of the harmful references and of the alignment rows, drawn from the run's seed."""
    layer: int | None = Field(default=None, ge=0)
    """Layer behind which the states are read, 0 for the embedding; null is 7/16 of the depth, LARF's layer 14 of
    Llama-3.1-8B's 32."""
    share: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the user's rows to leave out."""
    order: Literal["score", "random"] = "score"
    """`score`: leave out the rows with the highest scores. `random`: as many at random, the control."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind for plain fine-tuning on the rows that are left.

        Raises:
            StayalignedError: if there are no alignment rows or harmful references, or the model has no such layer.
        """
        rows = list(setup.examples)
        count = max(round(self.share * len(rows)), 1)
        if count >= len(rows):
            raise StayalignedError(f"defense 'data_filter' would leave out all {len(rows)} rows", hint="Lower `share`.")
        if self.order == "random":
            chosen = self._rng(setup, "random").sample(range(len(rows)), count)
        else:
            scores = self.score(setup)
            chosen = sorted(range(len(rows)), key=lambda index: -scores[index])[:count]
        total = Counter(row.origin for row in rows)
        dropped = Counter(rows[index].origin for index in chosen)
        each = ", ".join(f"{origin}: {dropped[origin]} of {number}" for origin, number in sorted(total.items()))
        _log.warning("data_filter left out %d of %d rows by %s (%s)", count, len(rows), self.order, each)
        left_out = set(chosen)
        return setup.trainer([row for index, row in enumerate(rows) if index not in left_out])

    def score(self, setup: TrainingSetup) -> list[float]:
        """Return the score of each of the user's rows.

        Raises:
            StayalignedError: as `make_trainer`.
        """
        safe = list(setup.require_alignment_examples(self.name))
        harmful = read_examples(self.harmful_data, origin="harmful")
        harmful, safe = (
            sample(rows, min(self.references, len(rows)), self._rng(setup, kind))
            for kind, rows in (("harmful", harmful), ("safe", safe))
        )
        trained = {(row.prompt, row.completion) for row in setup.examples}
        same = sum((row.prompt, row.completion) in trained for row in harmful)
        if same:
            _log.warning(
                "data_filter: %d of the %d harmful references are rows of the training data: its score knows these",
                *(same, len(harmful)),
            )
        states = self._states(setup, [*setup.examples, *harmful, *safe])
        return score_rows(*states.split([len(setup.examples), len(harmful), len(safe)]))

    def _states(self, setup: TrainingSetup, rows: Sequence[Example]) -> Tensor:
        from stayaligned.hf.training.row_scores import last_states

        return last_states(
            setup.model, setup.tokenizer, rows, layer=self.layer, default=7 / 16, max_length=setup.max_length
        )

    def _rng(self, setup: TrainingSetup, kind: str) -> random.Random:
        return random.Random(f"data_filter/{kind}/{setup.arguments.get('seed', 0)}")  # noqa: S311


def score_rows(rows: Tensor, harmful: Tensor, safe: Tensor) -> list[float]:
    """Compute mean cos(row, harmful) − mean cos(row, safe) for each row; all arguments are (number, hidden)."""
    from torch.nn.functional import normalize

    unit, towards, away = (normalize(states.double(), dim=1) for states in (rows, harmful, safe))
    return (unit @ (towards.mean(0) - away.mean(0))).tolist()
