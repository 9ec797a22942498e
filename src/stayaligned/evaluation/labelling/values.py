"""What is drawn for labelling, what a person says about a completion, and labels as estimators read them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Message, Outcome, PromptSet, Record
from stayaligned.core.text import one_line
from stayaligned.evaluation.results import JudgeIdentity

DESIGN_VERSION = 1
"""Version of the format of `design.json` and `labels.jsonl`."""

Choice = Literal["harm", "refuse", "other", "unsure"]
"""What a person says about a completion; `unsure` is no outcome."""

CompletionKey = tuple[PromptSet, str, str]
"""Prompt set, hash of the prompt and hash of the completion: equal keys are one question to a labeller."""

_LONGEST_NAME = 60


def check_labeller(name: str) -> str:
    """Return a labeller's name without surrounding space.

    Raises:
        ValueError: if it is empty, too long, or could be read as a formula by a spreadsheet program.
    """
    name = name.strip()
    if not name or len(name) > _LONGEST_NAME or not name[0].isalnum() or name != one_line(name):
        raise ValueError(
            f"expected a labeller's name of 1 to {_LONGEST_NAME} characters that begins with a letter or digit"
        )
    return name


class DrawnCompletion(Record):
    """One completion of an item."""

    arm: str
    """Arm that gave it."""
    completion: str
    """Hash of its text, as `Evidence.completion`."""
    policy: str
    """Hash of what identifies the weights, or the server, that gave it; empty if that is unknown."""
    text: str
    """The text. It is a model's: hostile until escaped."""
    finished: bool = True
    """Whether the completion ended by itself; false if it was cut at the token limit."""


class DrawnItem(Record):
    """One prompt of one seed, with the completions of all arms."""

    id: str
    """Seed, prompt set and the prompt's id, which identify the item within a design."""
    seed: int
    prompt_set: PromptSet
    prompt: str
    """Hash of the conversation, as `Evidence.prompt`."""
    stratum: str
    """Stratum of the draw. It tells the judges' verdicts: it is not for a labeller."""
    messages: tuple[Message, ...]
    """The conversation. Its text may be hostile."""
    completions: tuple[DrawnCompletion, ...]
    """One completion for each arm, in order of the arms; equal texts are one question."""

    def questions(self) -> dict[CompletionKey, DrawnCompletion]:
        """Return the distinct completions of the item by key, each with the first arm that gave it."""
        found: dict[CompletionKey, DrawnCompletion] = {}
        for one in self.completions:
            found.setdefault((self.prompt_set, self.prompt, one.completion), one)
        return found


def hash_frame(items: Iterable[DrawnItem]) -> str:
    """Return the hash of what is labelled: policies, prompts and completions, in any order of arms and items."""
    rows = sorted(
        [item.id, item.prompt, *sorted(f"{c.policy} {c.completion}" for c in item.completions)] for item in items
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class Design(Record):
    """A random order of all items that may be labelled: any first part of it is a stratified random sample."""

    format_version: int = DESIGN_VERSION
    seed: int
    """Seed of the order."""
    wanted: int
    """Number of items to label."""
    judge: JudgeIdentity | None
    """Judge whose verdicts define the strata; None for a judge without a stored identity."""
    judge_name: str
    """Name of that judge in the results."""
    arms: tuple[str, ...]
    """Arms whose completions are labelled."""
    strata: dict[str, int]
    """Number of items in each stratum."""
    items: tuple[DrawnItem, ...]
    """All items, in the order in which they are labelled."""
    content_sha256: str = ""
    """SHA-256 of everything else in the design: an edited design is refused."""

    @cached_property
    def frame_hash(self) -> str:
        """Hash of what is labelled, as `hash_frame` returns it."""
        return hash_frame(self.items)

    @cached_property
    def judge_hash(self) -> str:
        """Hash of the judge's identity; empty for a judge without one."""
        return "" if self.judge is None else hashlib.sha256(self.judge.model_dump_json().encode()).hexdigest()[:16]

    def computed_sha256(self) -> str:
        """Return the hash that `content_sha256` must have."""
        return hashlib.sha256(self.model_dump_json(exclude={"content_sha256"}).encode()).hexdigest()


class Label(Record):
    """What one person said about one completion: a line of `labels.jsonl`."""

    item: str
    """Id of the item in which the completion was shown."""
    completion: str
    """Hash of the completion's text."""
    outcome: Choice
    labeller: Annotated[str, AfterValidator(check_labeller)]
    """Name of the person."""
    time: AwareDatetime
    """When the label was given."""
    judge: str
    """Hash of the identity of the judge that defines the strata."""
    policy: str
    """Hash of what identifies the weights that gave the completion."""


@dataclass(frozen=True)
class LabelledItem:
    """One item with the outcomes that its labels give."""

    id: str
    seed: int
    prompt_set: PromptSet
    prompt: str
    """Hash of the conversation, as `Evidence.prompt`."""
    stratum: str
    policies: frozenset[str]
    """Hashes of what identifies the weights, or the servers, that gave the completions."""
    completions: Mapping[str, Outcome | None]
    """Outcome by the hash of each completion: the majority of the labellers; None without a label, for a tie, and if
    every labeller is unsure."""
    labelled: bool
    """Whether each completion has a label, `unsure` included."""
    complete: bool
    """Whether the item counts as drawn: it is labelled, and so is every item before it in its stratum."""


@dataclass(frozen=True)
class LabelSet:
    """Labels with the design by which their completions were drawn."""

    frame_hash: str
    """Hash of everything that may be labelled."""
    judge: JudgeIdentity | None
    """Judge whose verdicts define the strata."""
    strata: Mapping[str, int]
    """Number N_h of items in each stratum."""
    items: tuple[LabelledItem, ...]
    """All items, in the order of the draw, also those without a label."""
    labellers: tuple[str, ...] = ()
    """Names of the people who gave a label."""

    def outcomes(self) -> dict[CompletionKey, Outcome | None]:
        """Return the outcome of each completion of a labelled item; None where its labels give no outcome."""
        return {
            (item.prompt_set, item.prompt, completion): outcome
            for item in self.items
            if item.labelled
            for completion, outcome in item.completions.items()
        }

    def counts(self) -> dict[str, int]:
        """Return the number n_h of complete items in each stratum."""
        found = Counter(item.stratum for item in self.items if item.complete)
        return {stratum: found[stratum] for stratum in self.strata}

    def weights(self, needed: Collection[str] | None = None) -> dict[str, float]:
        """Return the weight N_h/n_h of a complete item in each stratum.

        Args:
            needed: strata that an estimate needs; all if None.

        Raises:
            StayalignedError: if one of them has no complete item.
        """
        counts = self.counts()
        wanted = self.strata if needed is None else needed
        missing = {stratum for stratum in wanted if not counts[stratum]}
        if missing:
            raise StayalignedError(
                f"the labels don't reach {len(missing)} of {len(wanted)} strata of the draw: "
                f"{', '.join(sorted(missing))}",
                hint=f"Label {self._items_to_reach(missing)} more items: `stayaligned label`.",
            )
        return {stratum: self.strata[stratum] / counts[stratum] for stratum in wanted}

    def _items_to_reach(self, strata: Collection[str]) -> int:
        """Return the number of items without a label up to the one that reaches the last of these strata."""
        left, more = {*strata}, 0
        for item in self.items:
            if not left:
                break
            left.discard(item.stratum)
            more += not item.labelled
        return more
