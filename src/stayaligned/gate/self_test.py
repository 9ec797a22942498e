"""How often the gate would pass, fail, or stay undecided if both models were equally good (an A/A test)."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.core.progress import Progress, silent
from stayaligned.core.records import PromptSet, Record
from stayaligned.evaluation.metrics import exact_interval
from stayaligned.evaluation.results import Evidence, Place, StoredResult
from stayaligned.gate.counting import count_copies
from stayaligned.gate.deciding import choose_judge, combine, conclude_all
from stayaligned.gate.looks import Look
from stayaligned.gate.measuring import mean_change, pair_values, prompt_key, read_values, split_metric
from stayaligned.gate.reading import ComparedSide, Pairs, refuse_incomparable
from stayaligned.gate.values import SCHEMA_VERSION, ComparedMetric, Conclusion, Limits

DRAWS = 300
"""Number of draws of each kind; a share of one half then has a standard error of 2.9 points."""

_USEFUL = 0.5
"""Least share of passes with which a gate is useful to a team whose model did not change."""
_CHANCE = 0.8
_PILOT = 20
"""Number of draws from which the spread of the prompts is estimated."""


class Shares(Record):
    """How the gate decided on equal models in one kind of draws."""

    drawn: str
    """`half against half`: one half of the prompts of a result against the other half, matched at random. `exchanged`:
    two results after exchanging them at random, prompt by prompt, on all prompts or on random halves."""
    n_draws: int
    """Number of draws."""
    passes: int
    """Number of draws with the conclusion pass."""
    fails: int
    """Number of draws with the conclusion fail."""
    undecided: int
    """Number of draws with the conclusion undecided."""
    n_prompts: dict[str, int]
    """Number of different prompts on either side, by prompt set."""

    @property
    def disagreement(self) -> float:
        """Probability that two gates on equal models come to different conclusions."""
        return 1 - sum((count / self.n_draws) ** 2 for count in (self.passes, self.fails, self.undecided))


class Needed(Record):
    """The prompts that a limit needs."""

    name: str
    """Name of the limit."""
    title: str
    """Title of the metric."""
    passes: float
    """Share of the draws in which this limit alone passed, at the largest size drawn."""
    needed_prompts: int | None
    """Number of prompts with which equal models pass it with probability 0.8; None if no number suffices."""


class SelfTest(Record):
    """How the gate decides on equal models."""

    schema_version: int = SCHEMA_VERSION
    """Version of this format; raised when a field changes its meaning."""
    alpha: float
    """Largest share of fails that the gate allows."""
    judge: str
    """Judge whose verdicts count."""
    shares: tuple[Shares, ...]
    """Shares of conclusions, by kind of draws."""
    needed: tuple[Needed, ...]
    """What every limit needs."""
    warnings: tuple[str, ...]
    """What is wrong with the gate on these prompts; empty if nothing is."""
    sound: bool
    """Whether no kind of draws fails more often than allowed, beyond the Monte Carlo error."""


@dataclass(frozen=True)
class _Drawn(StoredResult):
    """A result with some rows of another one."""

    drawn: Mapping[Place, Evidence] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Mapping[Place, Evidence]:
        return self.drawn

    @cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        return tuple(self.drawn.values())


_HALVES = "half against half"
_FULL = "exchanged"
_HALF = "exchanged, random halves"


def self_test(
    side: ComparedSide,
    limits: Limits,
    *,
    judge: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress = silent,
) -> SelfTest:
    """Compute how often the gate would pass and fail equal models, on the prompts of results of one model.

    One result is split at random into halves, whose prompts are matched with each other: the models then agree only as
    far as unrelated completions do, so real models pass more often. Of several results, any two are compared after
    exchanging them at random, prompt by prompt. At look K of N, all looks up to K are taken.

    Args:
        side: One result, or several of the same model.
        limits: Limits and modes of the gate; only limits on a change are tested.
        judge: Name of the judge; by default the primary judge.
        draws: Number of draws of each kind.
        seed: Seed of the draws.
        progress: Receives the share that is done.

    Raises:
        StayalignedError: If no limit on a change is given, or the results differ in more than the sample.
    """
    ceilings = {name: None for name, _, kind, _ in limits.criteria() if kind == "ceiling"}
    if len(ceilings) == len([*limits.criteria()]):
        raise StayalignedError(
            "--self-test needs a limit on a change: equal models can differ in nothing else",
            hint="Give one or more, for example --max-harm-increase 2%.",
        )
    limits = limits.model_copy(update=ceilings)
    metrics = [metric for _, metric, _, _ in limits.criteria()]
    judged = any(metric.outcome is not None for metric in metrics)
    chosen = choose_judge(side, side, judge) if judged else ""
    pairs = [*itertools.combinations(side.runs, 2)] or [(side.runs[0], side.runs[0])]
    for pair in pairs:
        refuse_incomparable([pair], metrics, [chosen] if chosen else [])
    joined = count_copies(pairs).pairs
    wanted: set[PromptSet] = {name for metric in metrics for name in metric.prompt_sets}
    rng = random.Random(seed)  # noqa: S311
    kinds = [_FULL, _HALF] if len(side.runs) > 1 else [_HALVES]
    shares: list[Shares] = []
    needed: list[Needed] = []
    for kind in kinds:
        drawn = [_draw(rng, joined[index % len(joined)], kind, wanted) for index in range(_PILOT)]
        found: Counter[Conclusion] = Counter()
        passed: Counter[str] = Counter()
        for index in range(draws):
            progress("self-test", (len(shares) + index / draws) / len(kinds), f"{sum(found.values())} of {draws} draws")
            answer, names = _decide(_draw(rng, joined[index % len(joined)], kind, wanted), limits, chosen)
            found[answer] += 1
            passed.update(names)
        counts = {"passes": found["pass"], "fails": found["fail"], "undecided": found["undecided"]}
        shares.append(
            Shares(
                drawn=kind,
                n_draws=draws,
                n_prompts={name: len(units) for name, units in drawn[0].units.items()},
                **counts,
            )
        )
        needed = needed or [*_needed(drawn, limits, chosen, {name: n / draws for name, n in passed.items()})]
    warnings = [*_warn(shares, needed, limits)]
    sound = not any(_fails_too_often(one, limits.alpha) for one in shares)
    return SelfTest(
        alpha=round(limits.alpha, 12),
        judge=chosen,
        shares=tuple(shares),
        needed=tuple(needed),
        warnings=tuple(warnings),
        sound=sound,
    )


_Unit = tuple[Mapping[Place, Evidence], Mapping[Place, Evidence]]


class _Draw(NamedTuple):
    """Different prompts with their rows on both sides, in random order."""

    pair: tuple[StoredResult, StoredResult]
    units: Mapping[str, Sequence[_Unit]]
    """By prompt set: the rows of a prompt, on either side. Copies of a prompt stay together."""

    def pairs(self, share: float = 1.0) -> Pairs:
        """Return the two results with the first prompts of every set."""
        sides: tuple[dict[Place, Evidence], dict[Place, Evidence]] = ({}, {})
        for units in self.units.values():
            for unit in units[: max(1, round(share * len(units)))]:
                for rows, found in zip(sides, unit, strict=True):
                    rows.update(found)
        first, second = (
            _Drawn(run.directory, run.root, run.result, rows) for run, rows in zip(self.pair, sides, strict=True)
        )
        return [(first, second)]


def _draw(rng: random.Random, pair: tuple[StoredResult, StoredResult], kind: str, wanted: set[PromptSet]) -> _Draw:
    ours, theirs = pair
    prompts: dict[str, dict[str, list[Place]]] = {}
    for place, row in ours.rows.items():
        if place[0] not in wanted:
            continue
        prompts.setdefault(place[0], {}).setdefault(prompt_key(row, theirs.rows[place]), []).append(place)
    units: dict[str, list[_Unit]] = {}
    for prompt_set, found in prompts.items():
        places = [*found.values()]
        rng.shuffle(places)
        half = len(places) // 2
        if kind == _HALVES:
            matched: list[_Unit] = [
                ({one[0]: ours.rows[one[0]]}, {one[0]: ours.rows[other[0]]})
                for one, other in zip(places[:half], places[half:], strict=False)
            ]
            units[prompt_set] = matched
            continue
        units[prompt_set] = []
        for some in places if kind == _FULL else places[:half]:
            first, second = ({place: run.rows[place] for place in some} for run in pair)
            units[prompt_set].append((first, second) if rng.random() < 0.5 else (second, first))
    return _Draw(pair, units)


def _decide(drawn: _Draw, limits: Limits, judge: str) -> tuple[Conclusion, set[str]]:
    """Return the conclusion and the names of the limits that passed: at the last look, or the first that decides."""
    number = limits.look.number if limits.look else 1
    for k in range(1, number + 1):
        look = limits.look and Look(number=k, planned=limits.look.planned)
        at_look = limits.model_copy(update={"look": look})
        criteria = conclude_all({"baseline": drawn.pairs(k / number)}, at_look, judge)
        answer = combine(criteria)
        if answer != "undecided" or k == number:
            return answer, {one.name for one in criteria} - {one.name for one in criteria if one.answer != "pass"}
    raise AssertionError("a look has a number above 0")


def _needed(drawn: Sequence[_Draw], limits: Limits, judge: str, passes: Mapping[str, float]) -> Iterator[Needed]:
    """Yield what every limit needs, if models are equal and differ on as many prompts as those drawn."""
    split = [(name, one, limit) for name, metric, _, limit in limits.criteria() for one in _split(drawn, metric)]
    for name, metric, limit in split:
        means = [
            mean_change(pair_values(one.pairs(), lambda run, metric=metric: read_values(run, metric, judge)))
            for one in drawn
        ]
        known = [mean for mean in means if mean is not None]
        if not known:
            continue
        expected = replace(known[0], value=0.0, prompt_variance=fmean(m.prompt_variance + m.value**2 for m in known))
        yield Needed(
            name=name,
            title=metric.title,
            passes=passes.get(name, 0.0),
            needed_prompts=expected.prompts_to_decide(limit, power=_CHANCE, confidence=limits.last_confidence),
        )


def _split(drawn: Sequence[_Draw], metric: ComparedMetric) -> list[ComparedMetric]:
    return split_metric([one.pair for one in drawn], metric)


def _fails_too_often(one: Shares, alpha: float) -> bool:
    return exact_interval(one.fails, one.n_draws)[0] > alpha


def _warn(shares: Sequence[Shares], needed: Sequence[Needed], limits: Limits) -> Iterator[str]:
    for one in shares:
        if _fails_too_often(one, limits.alpha):
            yield (
                f"{one.drawn}: equal models fail in {one.fails / one.n_draws:.1%} of the draws, more than the "
                f"{limits.alpha:.1%} that the gate allows: do not use it on these prompts"
            )
    early = limits.look is not None and limits.look != limits.look.last
    if shares[0].passes < _USEFUL * shares[0].n_draws and not early:
        few = [one for one in needed if one.passes < _CHANCE]
        wanted = "; ".join(
            f"{one.title} needs " + (f"about {one.needed_prompts:,} prompts" if one.needed_prompts else "a wider limit")
            for one in few
        )
        yield (
            f"{shares[0].drawn}: equal models pass in only {shares[0].passes / shares[0].n_draws:.0%} of the draws; to "
            f"pass with probability {_CHANCE:g}, {wanted or 'more prompts are needed'}"
        )
