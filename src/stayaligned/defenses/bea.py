"""BEA: backdoor enhanced safety alignment (Wang et al., NeurIPS 2024)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.defenses import TrainingSetup
from stayaligned.defenses._served import ServedDefense
from stayaligned.defenses.mixing import Mixing

if TYPE_CHECKING:
    from transformers import Trainer

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class BackdoorEnhancedAlignment(ServedDefense):
    """Train safety rows behind a secret system prompt, and serve the model behind it.

    The secret works as a backdoor's trigger: training ties it to safe answers, and whoever serves the model puts it in
    front of every conversation. A user who trains does not know it, so the rows can't teach around it.

    Differs from the published code in the secret: 150 random made-up words instead of 150 random tokens of Llama 2's
    vocabulary, because random tokens turned into text are rarely the same tokens again. The code's safety rows are 11
    requests, one of each category of harm; here they are drawn at random from the alignment rows.

    The secret is drawn from `seed`, or given as `secret`. Whoever knows the settings knows it: a configuration, its
    results and `serve.json` beside the weights must be kept as secret as the secret itself.

    Cost: a few rows in training; the secret's tokens in every conversation. Its control is `mixing` with the same
    `alignment_rows`: the same rows without the secret.
    """

    name: ClassVar[str] = "bea"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.14968"
    needs_alignment_data: ClassVar[bool] = True

    alignment_rows: int = Field(default=11, ge=1)
    """Number of alignment rows that get the secret and are added to the user's rows."""
    secret: str = ""
    """The secret as text; empty to draw it from `seed`."""
    secret_words: int = Field(default=150, ge=1)
    """Number of made-up words to draw for the secret; a word is one to three tokens."""
    seed: int = Field(default=0, ge=0)
    """Seed of the secret that is drawn."""

    def system_text(self) -> str:
        """Return the secret."""
        if self.secret:
            return self.secret
        rng = random.Random(f"bea/{self.seed}")  # noqa: S311
        letters = (_CONSONANTS, _VOWELS, _CONSONANTS)
        return " ".join("".join(map(rng.choice, letters)) for _ in range(self.secret_words))

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind on the user's rows and the safety rows behind the secret.

        Raises:
            StayalignedError: if there are too few alignment rows, the template shows no system turns, or the secret
                leaves no room for an answer.
        """
        self.require_readable(setup, "secret")
        rows = Mixing(alignment_rows=self.alignment_rows).mix(setup, self.name)
        kept, added = rows[: len(setup.examples)], rows[len(setup.examples) :]
        secret = [row.model_copy(update={"prompt": self.serve(row.prompt)}) for row in added]
        for row in secret:
            _require_room(setup, row)
        return setup.trainer([*kept, *secret])


def _require_room(setup: TrainingSetup, row: Example) -> None:
    from stayaligned.hf.features import encode_example

    size, most = len(encode_example(setup.tokenizer, row, 1 << 30)["input_ids"]), setup.max_length
    if size > most:
        raise StayalignedError(
            f"defense 'bea': alignment row {row.id!r} has {size} tokens with the secret, more than max_length={most}",
            hint="Raise `max_length`, or use a shorter secret (`secret_words`).",
        )
