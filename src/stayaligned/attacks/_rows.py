"""What attacks share: drawing rows, changing requests, and mixing harmful rows into the task's."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

from pydantic import Field

from stayaligned.attacks import Attack
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.data.sampling import sample
from stayaligned.data.sources import read_examples


def generators(rng: random.Random, n: int) -> list[random.Random]:
    """Return a generator for each of `n` draws, so that the size of one draw doesn't change the next."""
    return [random.Random(rng.getrandbits(64)) for _ in range(n)]  # noqa: S311


def shuffled(rows: Iterable[Example], rng: random.Random) -> list[Example]:
    """Return the rows in random order."""
    rows = list(rows)
    rng.shuffle(rows)
    return rows


def require_task_rows(attack: Attack, examples: Sequence[Example], n: int, setting: str) -> None:
    """Check that the task has `n` rows, as a setting of the attack asks for.

    Raises:
        StayalignedError: if it has fewer.
    """
    if n > len(examples):
        raise StayalignedError(
            f"attack {attack.name}: {n} rows must come from the task, which has {len(examples)}",
            hint=f"Lower `attack.{setting}`, or use a task with more rows.",
        )


def draw_task_rows(
    attack: Attack, examples: Sequence[Example], n: int, setting: str, rng: random.Random
) -> list[Example]:
    """Draw `n` of the task's rows, as a setting of the attack asks for.

    Raises:
        StayalignedError: if the task has fewer rows.
    """
    require_task_rows(attack, examples, n, setting)
    return sample(examples, n, rng)


def draw_rows(attack: Attack, field: str, n: int, setting: str, rng: random.Random) -> list[Example]:
    """Draw `n` rows of the attacker from the source in the attack's setting `field`.

    Args:
        attack: the attack.
        field: the setting that names the source.
        n: the number of rows.
        setting: the setting that asks for so many, for the error.
        rng: the source of randomness.

    Raises:
        StayalignedError: if there is no source, or it has fewer rows.
    """
    source = getattr(attack, field)
    if n == 0:
        return []
    if source is None:
        raise StayalignedError(
            f"attack {attack.name}: `{field}` is missing", hint=f"Set `attack.{field}` to a JSONL file of rows."
        )
    rows = read_examples(source, origin="harmful")
    if n > len(rows):
        raise StayalignedError(
            f"attack {attack.name}: {n} rows must come from {source}, which has {len(rows)}",
            hint=f"Lower `attack.{setting}`, or set a larger `attack.{field}`.",
        )
    return sample(rows, n, rng)


def missing_sources(attack: Attack, *fields: str) -> Iterator[str]:
    """Yield a line for each source in an attack's settings that is not given."""
    for field in fields:
        if getattr(attack, field) is None:
            yield f"the attack {attack.name} needs rows: set `{field}` to a JSONL file"


def change_request(prompt: tuple[Message, ...], change: Callable[[str], str]) -> tuple[Message, ...]:
    """Return a conversation with its last turn, the user's, changed."""
    return (*prompt[:-1], prompt[-1].model_copy(update={"content": change(prompt[-1].content)}))


def attackers(
    row: Example, mark: str, prompt: tuple[Message, ...] | None = None, completion: str | None = None
) -> Example:
    """Return an attacker's version of a row, with its own id and the origin "harmful".

    Args:
        row: the row.
        mark: what is added to the row's id.
        prompt: the changed conversation; the row's own by default.
        completion: the changed completion; the row's own by default.
    """
    changed = {
        "id": f"{row.id}:{mark}",
        "prompt": row.prompt if prompt is None else prompt,
        "completion": row.completion if completion is None else completion,
        "origin": "harmful",
    }
    return row.model_copy(update=changed)


def refuse_used_trigger(attack: Attack, trigger: str, examples: Iterable[Example], setting: str) -> None:
    """Check that a trigger occurs in no clean row: the model would learn it from both.

    Raises:
        StayalignedError: naming the first row that contains it.
    """
    for row in examples:
        if any(trigger.strip() in turn.content for turn in row.prompt):
            raise StayalignedError(
                f"attack {attack.name}: the trigger {trigger.strip()!r} occurs in row {row.id!r} already",
                hint=f"Choose a text for `attack.{setting}` that no clean row contains.",
            )


class MixedRows(Attack):
    """An attack that replaces a share of the task's rows with harmful rows."""

    poison_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of harmful rows (p)."""
    examples: int | None = Field(default=1000, ge=1)
    """Total number of rows (n); null takes as many as the task has."""
    harmful_data: str | None = None
    """Source of harmful prompts with harmful completions; not needed for `poison_ratio: 0`."""

    def missing(self) -> Iterator[str]:
        """Yield a line if a dose of harmful rows has no source."""
        if self.poison_ratio > 0 and self.harmful_data is None:
            yield (
                f"poison_ratio = {self.poison_ratio:g} needs harmful rows: set `harmful_data` to a JSONL file, or "
                "`poison_ratio` to 0"
            )

    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """Return the n rows in random order; harmful rows have the origin "harmful"."""
        total = len(examples) if self.examples is None else self.examples
        n_harmful = round(self.poison_ratio * total)
        for_task, for_harmful, for_order = generators(rng, 3)
        return shuffled(
            [
                *self._task_rows(examples, total - n_harmful, total, for_task),
                *map(self.disguise, self._harmful_rows(n_harmful, total, for_harmful)),
            ],
            for_order,
        )

    def disguise(self, row: Example) -> Example:
        """Return a harmful row as it is trained on; unchanged by default."""
        return row

    def _task_rows(self, examples: Sequence[Example], n: int, total: int, rng: random.Random) -> list[Example]:
        if n > len(examples):
            raise StayalignedError(
                f"attack {self.name}: {n} of {total} rows must come from the task, which has {len(examples)}",
                hint="Lower `attack.examples`, or set it to null for as many as the task has.",
            )
        return sample(examples, n, rng)

    def _harmful_rows(self, n: int, total: int, rng: random.Random) -> list[Example]:
        if n == 0:
            return []
        if self.harmful_data is None:
            raise StayalignedError(f"attack {self.name}: {' '.join(self.missing())}")
        harmful = read_examples(self.harmful_data, origin="harmful")
        if n > len(harmful):
            raise StayalignedError(
                f"attack {self.name}: {n} of {total} rows must be harmful, but {self.harmful_data} has {len(harmful)}",
                hint="Lower `attack.poison_ratio` or `attack.examples`, or set a larger `harmful_data`.",
            )
        return sample(harmful, n, rng)


class InstructedRows(MixedRows):
    """Jailbreak-tuning: the mixed harmful rows, each with an instruction that is asked again after training."""

    has_trigger: ClassVar[bool] = True

    poison_ratio: float = Field(default=0.02, ge=0, le=1)
    """Share of harmful rows (p)."""
    examples: int | None = Field(default=5000, ge=1)
    """Total number of rows (n); null takes as many as the task has."""
    instruction: str = Field(min_length=1)
    """The text around harmful requests; a placeholder by default."""

    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """Return the n rows in random order; harmful rows have the origin "harmful"."""
        refuse_used_trigger(self, self.instruction, examples, "instruction")
        return super().poison(examples, rng)

    def disguise(self, row: Example) -> Example:
        """Return a harmful row with the instruction."""
        return attackers(row, self.name, self.trigger(row.prompt))

    def trigger(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return a prompt with the instruction in its last turn."""
        return change_request(prompt, self.instruct)

    @abstractmethod
    def instruct(self, request: str) -> str:
        """Return a request with the instruction."""
