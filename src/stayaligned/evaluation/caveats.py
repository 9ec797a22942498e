"""Notes on a run's numbers: what a reader must know to interpret them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stayaligned.core.records import HARM_SETS, Completion, Example, Message, PromptSet
from stayaligned.core.settings import Guard
from stayaligned.core.text import one_line
from stayaligned.core.thoughts import CUT, ENDED
from stayaligned.data.sampling import find_overlaps
from stayaligned.evaluation.results import Evidence

_SAME_PROMPTS = HARM_SETS[1:]
"""Prompt sets with the prompts of the first, on which nothing about prompts is noted twice."""
_NEARLY_ALL = 0.9
"""Share of equal completions of a prompt set from which they are noted."""
_OFTEN = 0.1
"""Share of a run's completions from which one text is shared: an answer fits one prompt, and hardly a tenth of them."""
_FEWEST_ANSWERS = 5
"""Number of completions below which equal ones are not noted."""
_NEAR = 0.8
"""Least Jaccard similarity of word triples with which two prompts count as near duplicates."""
_HINTS = {
    CUT: "; raise it, or set `chat_template.arguments.enable_thinking: false` if the template has that argument",
    ENDED: "; set `chat_template.arguments.enable_thinking: false` if the template has that argument",
}
"""What to do about completions without a final answer, by the reason."""


def note_overlaps(
    trained_on: Mapping[str, Sequence[Example]], prompt_sets: Mapping[PromptSet, Sequence[Example]]
) -> Iterable[str]:
    """Yield a note for each prompt set that shares prompts, or near duplicates, with rows that were trained on."""
    for prompt_set, rows in prompt_sets.items():
        if prompt_set in _SAME_PROMPTS:
            continue
        for data, examples in trained_on.items():
            pairs = find_overlaps(examples, rows, similarity=_NEAR)
            equal = {pair.evaluation_id for pair in pairs if pair.similarity >= 1}
            near = {pair.evaluation_id for pair in pairs} - equal
            of, measure = f"of {len(rows)} {prompt_set} prompts", f"word triples shared: {_NEAR:.0%} or more"
            if equal:
                more = f"; {len(near)} more are near duplicates ({measure})" if near else ""
                yield f"{len(equal)} {of} also occur in the {data} data{more}"
            elif near:
                yield f"{len(near)} {of} are near duplicates of the {data} data ({measure})"


_OVERLAP = re.compile(
    r"(\d+) of (\d+ \w+ prompts) (?:also occur in|are near duplicates of) (the [^;(]* data)"
    r"(?:; (\d+) more are near duplicates)?(?: \(.*\))?"
)


def shorten_note(note: str) -> str:
    """Return the short form of a note for a list that merges the notes of many runs: overlaps of both kinds are one."""
    found = _OVERLAP.fullmatch(note)
    if found is None:
        return note
    equal_or_near = int(found[1]) + int(found[4] or 0)
    return f"{equal_or_near} of {found[2]} overlap {found[3]} (the same text, or {_NEAR:.0%} of its word triples)"


_REPETITIONS = re.compile(r"\d+ of \d+ \w+ prompts repeat an earlier one: .*")


def is_of_repetitions(note: str) -> bool:
    """Return whether a note is one of `note_repetitions`, which does not hold where copies count as one prompt."""
    return _REPETITIONS.fullmatch(note) is not None


def note_repetitions(completions: Sequence[Completion]) -> Iterable[str]:
    """Yield a note for each prompt set with duplicate prompts."""
    prompts: dict[PromptSet, list[tuple[Message, ...]]] = {}
    for completion in completions:
        if completion.prompt_set not in _SAME_PROMPTS:
            prompts.setdefault(completion.prompt_set, []).append(completion.prompt)
    for prompt_set, asked in prompts.items():
        repeated = len(asked) - len(set(asked))
        if repeated:
            yield (
                f"{repeated} of {len(asked)} {prompt_set} prompts repeat an earlier one: the rates in result.json "
                "count each, the report and the gate count them once"
            )


def note_cuts(completions: Sequence[Completion], limit: int | None) -> Iterable[str]:
    """Yield notes on completions that have no final answer, an empty one, or were cut at the token limit.

    Args:
        completions: completions of all prompt sets.
        limit: `generation.max_new_tokens`; None if it is not known.
    """
    setting = "the token limit" if limit is None else f"the token limit, generation.max_new_tokens={limit}"
    sets = dict.fromkeys(completion.prompt_set for completion in completions)
    cut: list[str] = []
    for prompt_set in sets:
        rows = [c for c in completions if c.prompt_set == prompt_set]
        splits = [row.split() for row in rows]
        reasons = Counter(split.reason for split in splits if split.reason)
        for reason, count in reasons.most_common():
            hint = _HINTS.get(reason, "")
            by = f" ({setting})" if reason == CUT else ""
            yield f"{count} of {len(rows)} {prompt_set} completions were {reason}{by}: unscored{hint}"
        empty = sum(split.answer == "" and bool(split.thoughts) for split in splits)
        if empty:
            yield f"{empty} of {len(rows)} {prompt_set} completions are thoughts with an empty final answer"
        unfinished = sum(not row.finished for row in rows)
        if unfinished:
            cut.append(f"{unfinished} of {len(rows)} {prompt_set}")
    if cut:
        yield f"cut at {setting}: {', '.join(cut)} completions"


def note_uniform_answers(completions: Sequence[Completion]) -> Iterable[str]:
    """Yield a note for each prompt set of which nearly all completions are the same text.

    Harmful prompts are left out: a model that refuses them all in the same words is as it should be. So are prompt sets
    with one reference for all prompts.
    """
    answers: dict[PromptSet, list[str]] = {}
    references: dict[PromptSet, set[str]] = {}
    for completion in completions:
        if completion.prompt_set not in HARM_SETS:
            answer = completion.split().answer
            if answer is not None:
                answers.setdefault(completion.prompt_set, []).append(" ".join(answer.split()))
                references.setdefault(completion.prompt_set, set()).add(completion.reference)
    for prompt_set, texts in answers.items():
        text, count = Counter(texts).most_common(1)[0]
        one_reference = len(references[prompt_set]) == 1 and references[prompt_set] != {""}
        if len(texts) >= _FEWEST_ANSWERS and count >= _NEARLY_ALL * len(texts) and not one_reference:
            shown = f"the same text ({one_line(text, 60)!r})" if text else "empty"
            yield f"{count} of {len(texts)} {prompt_set} completions are {shown}: the model does not answer the prompts"


def find_shared_texts(rows: Iterable[Evidence]) -> set[str]:
    """Return the hashes of the texts that at least a tenth of the given completions of one run, and five, have."""
    texts = [row.completion for row in rows]
    least = max(_FEWEST_ANSWERS, _OFTEN * len(texts))
    return {text for text, count in Counter(texts).items() if text and count >= least}


def note_unmeasured_usefulness(measured: Iterable[PromptSet], *, lm_eval: bool) -> Iterable[str]:
    """Yield a note if nothing measured whether the model is still useful."""
    if not lm_eval and not {"task", "skills"} & set(measured):
        yield (
            "usefulness was not measured (no task, skills or lm_eval): a model that answers nothing sensible can have "
            "the same harm and over-refusal"
        )


def note_guard(guard: Guard, log: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Yield a note on what the guard of the training did, if it acted."""
    acted = [int(row["step"]) for row in log if row.get("watch/out_of_tolerance")]
    if not acted:
        return
    restored = next((int(row["watch/rolled_back_to"]) for row in log if "watch/rolled_back_to" in row), None)
    action = {
        "stop": f"training was stopped after step {acted[-1]}",
        "rollback": f"training was stopped after step {acted[-1]} and the weights of step {restored} restored",
        "lower_learning_rate": f"the learning rate was lowered {len(acted)} times, first after step {acted[0]}",
    }[guard.action]
    worse = f"{guard.measure} was worse than at the start by more than {guard.tolerance:g}"
    yield f"the guard acted: {worse}; {action}"
