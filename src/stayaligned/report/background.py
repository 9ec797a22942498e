"""Notes, sample completions, provenance and times of the results of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import get_args

from stayaligned.core.records import Message, PromptSet
from stayaligned.core.thoughts import split_thoughts
from stayaligned.evaluation.results import Result, Sample
from stayaligned.report.texts import join_names
from stayaligned.report.values import ArmCompletion, ComparedPrompt, Fact, StageTime


def collect_notes(results: Sequence[Result]) -> tuple[tuple[str, str], ...]:
    """Collect every note once, with the results that have it."""
    owners: dict[str, list[Result]] = {}
    for result in results:
        for note in dict.fromkeys(result.notes):
            owners.setdefault(note, []).append(result)
    return tuple((note, _describe_owners(found, results)) for note, found in owners.items())


def collect_prompts(groups: Mapping[str, Sequence[Result]]) -> tuple[ComparedPrompt, ...]:
    """Collect the sampled prompts with every arm's completion, from each arm's first seed that has samples."""
    asked: dict[tuple[PromptSet, str, tuple[Message, ...]], list[tuple[Result, Sample]]] = {}
    for runs in groups.values():
        chosen = next((run for run in runs if run.samples), None)
        for sample in chosen.samples if chosen else ():
            asked.setdefault((sample.prompt_set, sample.id, sample.prompt), []).append((chosen or runs[0], sample))
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
