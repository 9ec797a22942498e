"""What a reader must know before trusting a run's numbers, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stayaligned.core.records import Completion, Example, Message, PromptSet
from stayaligned.core.settings import Guard
from stayaligned.data.sampling import overlap

_NEAR = 0.8
"""Jaccard similarity of word triples from which two prompts count as nearly the same."""


def note_overlaps(
    trained_on: Mapping[str, Sequence[Example]], prompt_sets: Mapping[PromptSet, Sequence[Example]]
) -> Iterable[str]:
    """A note for each prompt set of which some prompts, or nearly the same ones, were trained on."""
    for prompt_set, rows in prompt_sets.items():
        for data, examples in trained_on.items():
            pairs = overlap(examples, rows, similarity=_NEAR)
            equal = {pair.evaluation_id for pair in pairs if pair.similarity >= 1}
            near = {pair.evaluation_id for pair in pairs} - equal
            of, triples = f"of {len(rows)} {prompt_set} prompts", f"word triples shared: {_NEAR:.0%} or more"
            if equal:
                nearly = f"; {len(near)} more nearly so ({triples})" if near else ""
                yield f"{len(equal)} {of} also stand in the {data} data{nearly}"
            elif near:
                yield f"{len(near)} {of} nearly stand in the {data} data ({triples})"


def note_repetitions(completions: Sequence[Completion]) -> Iterable[str]:
    """A note for each prompt set in which some prompts stand more than once: under one model, one answer each."""
    prompts: dict[PromptSet, list[tuple[Message, ...]]] = {}
    for completion in completions:
        prompts.setdefault(completion.prompt_set, []).append(completion.prompt)
    for prompt_set, asked in prompts.items():
        repeated = len(asked) - len(set(asked))
        if repeated:
            yield (
                f"{repeated} of {len(asked)} {prompt_set} prompts repeat an earlier one: they are counted as often as "
                "they stand, so the interval is narrower than it should be"
            )


def note_guard(guard: Guard, log: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What the guard has done, if it has."""
    acted = [int(row["step"]) for row in log if row.get("watch/out_of_tolerance")]
    if not acted:
        return
    back = next((int(row["watch/rolled_back_to"]) for row in log if "watch/rolled_back_to" in row), None)
    done = {
        "stop": f"training was stopped after step {acted[-1]}",
        "rollback": f"training was stopped after step {acted[-1]} and the weights of step {back} restored",
        "lower_learning_rate": f"the learning rate was lowered {len(acted)} times, first after step {acted[0]}",
    }[guard.action]
    worse = f"{guard.measure} was worse than at the start by more than {guard.tolerance:g}"
    yield f"the guard acted: {worse}; {done}"
