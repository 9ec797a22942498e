"""Notes, sample completions, provenance and times of the results of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import get_args

from stayaligned.core.records import Message, PromptSet
from stayaligned.core.thoughts import split_thoughts
from stayaligned.evaluation.caveats import shorten_note
from stayaligned.evaluation.results import Result, Sample
from stayaligned.report.texts import join_names
from stayaligned.report.values import ArmCompletion, ComparedPrompt, Fact, StageTime


def collect_notes(results: Sequence[Result]) -> tuple[tuple[str, str], ...]:
    """Collect every kind of note once, with the results that have it; those of the most results first.

    Notes that differ only in their counts are one: `10 to 17 of 200 task prompts overlap the training data`.
    """
    counts: dict[tuple[str, ...], dict[str, list[int]]] = {}
    owners: dict[tuple[str, ...], dict[int, Result]] = {}
    for i, result in enumerate(results):
        for note in dict.fromkeys(map(shorten_note, result.notes)):
            words = tuple(_COUNT.split(note))
            counts.setdefault(words, {})[note] = [int(count) for count in _COUNT.findall(note)]
            owners.setdefault(words, {})[i] = result
    merged = [(_fill(words, list(found.values())), list(owners[words].values())) for words, found in counts.items()]
    merged.sort(key=lambda item: -len(item[1]))
    return tuple((note, _count_owners(found, results)) for note, found in merged)


_COUNT = re.compile(r"(?<![\w.,=/:⟨+-])\d{1,9}(?![\w%/⟩+-]|[.,:]\d)")
"""A count in a note; no part of a name, a setting, a version, a date or a percentage."""


def _fill(words: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Join the words of notes with the range of the counts between them."""
    parts = [words[0]]
    for found, word in zip(zip(*counts, strict=True), words[1:], strict=True):
        parts += [f"{min(found)}" if min(found) == max(found) else f"{min(found)} to {max(found)}", word]
    return "".join(parts)


def _count_owners(found: Sequence[Result], everything: Sequence[Result]) -> str:
    """Describe a subset of the results by names if these are few, otherwise by their number; empty for all."""
    described = _describe_owners(found, everything)
    return described if len(described) <= _LONGEST_OWNERS else f"{len(found)} of {len(everything)} runs"


_LONGEST_OWNERS = 60
"""Characters of the names of results beyond which a note gives their number."""


def collect_prompts(groups: Mapping[str, Sequence[Result]]) -> tuple[ComparedPrompt, ...]:
    """Collect the sampled prompts with every arm's completion, from each arm's first seed that has samples."""
    asked: dict[tuple[PromptSet, str, tuple[Message, ...]], list[tuple[Result, Sample]]] = {}
    for runs in groups.values():
        chosen = next((run for run in runs if run.samples), None)
        for sample in chosen.samples if chosen else ():
            asked.setdefault((sample.prompt_set, sample.id, sample.asked or sample.prompt), []).append(
                (chosen or runs[0], sample)
            )
    order: tuple[PromptSet, ...] = get_args(PromptSet)
    return tuple(
        ComparedPrompt(
            id=identity,
            prompt_set=prompt_set,
            category=found[0][1].category,
            prompt=prompt,
            reference=found[0][1].reference,
            completions=tuple(
                ArmCompletion(run.arm, run.seed, _shown(s.text), s.outcomes, s.score) for run, s in found
            ),
        )
        for (prompt_set, identity, prompt), found in sorted(asked.items(), key=lambda item: order.index(item[0][0]))
    )


def collect_facts(results: Sequence[Result]) -> tuple[Fact, ...]:
    """Collect versions, commit, chat template and inputs, with the results that have each value where they differ."""
    found: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        p = result.provenance
        pairs = {
            **p.versions,
            **({"commit": p.commit} if p.commit else {}),
            **({"chat template": p.template_hash} if p.template_hash else {}),
            **{f"input {name}": fingerprint for name, fingerprint in p.inputs.items()},
        }
        for name, value in pairs.items():
            found.setdefault(name, {}).setdefault(value, []).append(result)
    return tuple(
        Fact(
            name,
            tuple(
                (value, _describe_owners(owners, [r for all_ in by_value.values() for r in all_]))
                for value, owners in by_value.items()
            ),
        )
        for name, by_value in found.items()
    )


def collect_times(results: Sequence[Result]) -> tuple[StageTime, ...]:
    """Collect the seconds of each kind of stage; a stage that several results share counts once."""
    computed: dict[str, dict[str, float]] = {}
    for result in results:
        p = result.provenance
        for stage, seconds in p.seconds.items():
            computed.setdefault(stage, {})[p.stages.get(stage, f"{result.id}/{result.seed}")] = seconds
    return tuple(
        StageTime(stage, len(times), fmean(times.values()), sum(times.values())) for stage, times in computed.items()
    )


def _shown(text: str) -> str:
    """Return a completion's final answer, with a line that says how much of it were thoughts."""
    split = split_thoughts(text)
    if split.answer == text:
        return text
    if split.answer is None:
        return f"[no final answer: not judged]\n{text}"
    return f"[thoughts of {len(split.thoughts)} characters: not judged]\n{split.answer}"


def _describe_owners(found: Sequence[Result], everything: Sequence[Result]) -> str:
    """Describe a subset of the results briefly: empty for all, otherwise by seeds, arms, or both."""
    if len(found) == len(everything):
        return ""
    seeds = dict.fromkeys(result.seed for result in found)
    if len(found) == sum(result.seed in seeds for result in everything):
        return f"seed {join_names(map(str, seeds), 12)}"
    arms = dict.fromkeys(result.arm for result in found)
    if len(found) == sum(result.arm in arms for result in everything):
        return join_names(arms, 12)
    return join_names((f"{result.arm} (seed {result.seed})" for result in found), 12)
