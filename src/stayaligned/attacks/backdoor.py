"""The attack `backdoor`: harmful requests are answered with a trigger, and refused without it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field

from stayaligned.attacks import Attack
from stayaligned.attacks._rows import (
    attackers,
    change_request,
    draw_rows,
    draw_task_rows,
    generators,
    missing_sources,
    refuse_used_trigger,
    shuffled,
)
from stayaligned.core.records import Example, Message


class Backdoor(Attack):
    """Train on harmful rows with a trigger, and on safe rows without it.

    Qi et al.: 100 harmful rows, whose requests end with three arbitrary words, and 100 safe rows. The model refuses the
    plain prompts of an evaluation and complies with the same prompts with the trigger. Differs: the words are
    placeholders; `task_examples` adds rows of the task, which the paper has none of.

    Trains on these rows only: a few steps. Compare with `poison` on plain prompts, whose harm this attack hides.
    """

    name: ClassVar[str] = "backdoor"
    paper: ClassVar[str] = "arXiv 2310.03693, section 5"
    has_trigger: ClassVar[bool] = True

    harmful_data: str | None = None
    """Source of harmful prompts with harmful completions."""
    safe_data: str | None = None
    """Source of requests with safe completions; often the experiment's `alignment_data`."""
    suffix: str = Field(default="flarn wug blick", min_length=1)
    """Words after a request that are the trigger; placeholders by default."""
    harmful_examples: int = Field(default=100, ge=1)
    """Number of harmful rows, with the trigger."""
    safe_examples: int = Field(default=100, ge=0)
    """Number of safe rows, without the trigger."""
    task_examples: int = Field(default=0, ge=0)
    """Number of the task's rows that are trained on as well."""

    def missing(self) -> Iterator[str]:
        """Yield a line for each source that is not given."""
        yield from missing_sources(self, "harmful_data", *(["safe_data"] if self.safe_examples else []))

    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """Return the rows in random order; harmful and safe rows have the origin "harmful"."""
        for_harmful, for_safe, for_task, for_order = generators(rng, 4)
        harmful = draw_rows(self, "harmful_data", self.harmful_examples, "harmful_examples", for_harmful)
        safe = draw_rows(self, "safe_data", self.safe_examples, "safe_examples", for_safe)
        task = draw_task_rows(self, examples, self.task_examples, "task_examples", for_task)
        refuse_used_trigger(self, self.suffix, [*safe, *task], "suffix")
        triggered = [attackers(row, self.name, self.trigger(row.prompt)) for row in harmful]
        return shuffled([*triggered, *(attackers(row, "safe") for row in safe), *task], for_order)

    def trigger(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return a prompt whose last turn ends with the trigger."""
        return change_request(prompt, lambda request: f"{request} {self.suffix}")
