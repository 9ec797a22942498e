"""The items of given runs, and a random order in which any first part is a stratified random sample."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.core.records import JUDGED, Completion, Outcome, PromptSet
from stayaligned.evaluation.completions import stored_completions
from stayaligned.evaluation.labelling.store import DESIGN_FILE, LabelStore
from stayaligned.evaluation.labelling.values import Design, DrawnCompletion, DrawnItem, hash_frame
from stayaligned.evaluation.measure import prompt_hash, text_hash
from stayaligned.evaluation.results import (
    Evidence,
    JudgeIdentity,
    Place,
    Result,
    StoredResult,
    identify_weights,
    read_results,
)
from stayaligned.evaluation.rows import distinguish_arms

_WANTED = 100
_LEAST = 5
"""Number of items that each stratum gets at least, if it has as many."""
LABELLED: tuple[PromptSet, ...] = tuple(name for name in JUDGED if name != "sampled")
"""The prompt sets whose completions people label. Of sampled completions the worst counts, which a label of one of them
does not tell."""
_BAD = {name: Outcome.REFUSE if name == "benign" else Outcome.HARM for name in LABELLED}
"""The outcome that counts against a model, by prompt set."""
_WORDS = {
    Outcome.HARM: {True: "harm", False: "no harm"},
    Outcome.REFUSE: {True: "refusal", False: "no refusal"},
}


@dataclass(frozen=True)
class Frame:
    """Everything that may be labelled in some runs, with the verdicts of their judges."""

    arms: tuple[str, ...]
    judges: Mapping[str, JudgeIdentity | None]
    """Identity of each judge that all runs have, by name; the primary judge first."""
    items: tuple[DrawnItem, ...]
    """All items, without strata."""
    outcomes: Mapping[tuple[str, str], Mapping[str, Outcome | None]]
    """Outcome of each judge, by the item's id and the arm."""
    groups: Mapping[str, str]
    """What copies and near copies of a prompt have in common, by the item's id."""

    @cached_property
    def hash(self) -> str:
        """Hash of what is labelled; equal for equal completions, whatever judges judged them."""
        return hash_frame(self.items)


def read_frame(directories: Sequence[Path | str], arms: Sequence[str] = ()) -> Frame:
    """Read the items of runs: one for each seed and prompt, with the completions of all arms.

    Arms with one result each are compared whatever their seeds are, as `gate` does.

    Args:
        directories: output directories of `run`, `evaluate`, `judge` or `bench`.
        arms: the arms to label; all if none is named.

    Raises:
        StayalignedError: if a run can't be read, or the arms have different seeds, prompts or judges.
    """
    stored = distinguish_arms(read_results(directories))
    names = list(dict.fromkeys(one.result.arm for one in stored))
    for name in arms:
        if name not in names:
            raise StayalignedError(f"--arm {name!r}: no such arm", hint=did_you_mean(name, names, "arms"))
    chosen = [name for name in names if not arms or name in arms]
    runs = _by_seed([one for one in stored if one.result.arm in chosen], chosen)
    judges = _common_judges([one for found in runs.values() for one in found])
    for found in runs.values():
        _refuse_other_judges(found, judges)
    items: list[DrawnItem] = []
    outcomes: dict[tuple[str, str], Mapping[str, Outcome | None]] = {}
    groups: dict[str, str] = {}
    for seed, found in runs.items():
        for item, rows in _items(seed, found):
            items.append(item)
            groups[item.id] = rows[0].group or rows[0].prompt
            outcomes |= {
                (item.id, arm): {name: row.outcomes.get(name) for name in judges}
                for arm, row in zip(chosen, rows, strict=True)
            }
    return Frame(tuple(chosen), judges, tuple(items), outcomes, groups)


def draw(frame: Frame, *, wanted: int, seed: int = 0, judge: str | None = None) -> Design:
    """Draw the order in which the items of a frame are labelled.

    The stratum of an item is its prompt set, what the judge says about each arm (with more than two arms: about all,
    some or none), and whether judges differ on one of its completions. Within a stratum the order is random. The strata
    take turns in proportion to their number of items, twice that where a verdict is bad, missing or disputed; small
    strata get at least five of the wanted items.

    Args:
        frame: everything that may be labelled.
        wanted: number of items to label.
        seed: seed of the order.
        judge: judge whose verdicts define the strata; by default the primary judge.

    Raises:
        StayalignedError: if the runs have no such judge.
    """
    name = next(iter(frame.judges)) if judge is None else judge
    if name not in frame.judges:
        raise StayalignedError(f"--judge {name!r}: no such judge", hint=did_you_mean(name, [*frame.judges], "judges"))
    found = [_stratum(frame, item, name) for item in frame.items]
    order = draw_order(
        [stratum for stratum, _ in found], {stratum for stratum, notable in found if notable}, wanted, seed
    )
    return Design(
        seed=seed,
        wanted=min(wanted, len(order)),
        judge=frame.judges[name],
        judge_name=name,
        arms=frame.arms,
        strata=dict(sorted(Counter(stratum for stratum, _ in found).items())),
        items=tuple(frame.items[index].model_copy(update={"stratum": found[index][0]}) for index in order),
    )


def draw_order(strata: Sequence[str], doubled: Collection[str], wanted: int, seed: int) -> list[int]:
    """Return the indices of all items in the order in which they are labelled; see `draw`.

    Args:
        strata: stratum of each item.
        doubled: strata of which twice as many items are drawn.
        wanted: number of items to label.
        seed: seed of the order.
    """
    from numpy.random import default_rng

    random, members = default_rng(seed), defaultdict[str, list[int]](list)
    for index, stratum in enumerate(strata):
        members[stratum].append(index)
    weights = {stratum: len(own) * (2 if stratum in doubled else 1) for stratum, own in sorted(members.items())}
    total = sum(weights.values())
    turns: list[tuple[float, float, int]] = []
    for stratum, weight in weights.items():
        own = members[stratum]
        allocated, tie = max(wanted * weight / total, min(len(own), _LEAST)), random.random()
        turns += [(turn / allocated, tie, own[place]) for turn, place in enumerate(random.permutation(len(own)))]
    return [index for *_, index in sorted(turns)]


def open_labelling(
    directory: Path, frame: Frame, *, wanted: int | None = None, seed: int | None = None, judge: str | None = None
) -> LabelStore:
    """Open the labels of a frame in a directory, or draw a design and store it if there is none.

    Args:
        directory: the directory of the labels.
        frame: everything that may be labelled.
        wanted: number of items to label; by default as stored, or 100.
        seed: seed of the order; by default as stored, or 0.
        judge: judge whose verdicts define the strata; by default as stored, or the primary judge.

    Raises:
        StayalignedError: if the stored design is of other completions, or was drawn with another seed or judge.
    """
    if not (directory / DESIGN_FILE).exists():
        design = draw(frame, wanted=_WANTED if wanted is None else wanted, seed=seed or 0, judge=judge)
        return LabelStore.create(directory, design)
    store = LabelStore.open(directory)
    design = store.design
    if design.frame_hash != frame.hash:
        raise StayalignedError(
            f"{directory}: holds labels of other completions ({len(design.items)} items of "
            f"{', '.join(map(repr, design.arms))})",
            hint="Give the runs and arms that it was started with, or choose another --out.",
        )
    for name, given, stored in (("seed", seed, design.seed), ("judge", judge, design.judge_name)):
        if given not in (None, stored):
            raise StayalignedError(
                f"{directory}: was drawn with --{name} {stored}, not {given}",
                hint=f"Omit --{name} to continue, or choose another --out.",
            )
    if wanted is not None and min(wanted, len(design.items)) != design.wanted:
        store.resize(min(wanted, len(design.items)))
    return store


def is_bad(outcome: Outcome | None, prompt_set: PromptSet) -> bool | None:
    """Return whether an outcome is harm, on harmful prompts, or a refusal, on benign ones; None if it is unscored."""
    return None if outcome is None else outcome is _BAD[prompt_set]


def _stratum(frame: Frame, item: DrawnItem, judge: str) -> tuple[str, bool]:
    """Return the stratum of an item, and whether one of its verdicts is bad, missing or disputed."""
    verdicts = [frame.outcomes[item.id, one.arm] for one in item.completions]
    found = [is_bad(own[judge], item.prompt_set) for own in verdicts]
    words = _WORDS[_BAD[item.prompt_set]]
    if len(found) <= 2:
        pattern = " / ".join("unscored" if bad is None else words[bad] for bad in found)
    else:
        scored = [bad for bad in found if bad is not None]
        extent = "all" if scored and all(scored) else "some" if any(scored) else "no"
        pattern = f"{extent} {words[True]}" + (", some unscored" if len(scored) < len(found) else "")
    disputed = any(_is_disputed(own.values(), item.prompt_set) for own in verdicts)
    name = f"{item.prompt_set}: {pattern}" + ("; judges differ" if disputed else "")
    return name, disputed or any(bad is not False for bad in found)


def _is_disputed(outcomes: Iterable[Outcome | None], prompt_set: PromptSet) -> bool:
    """Whether judges differ in the outcome that counts; one that can't tell refusals says nothing about benign ones."""
    known = [one for one in outcomes if one is not None and (prompt_set != "benign" or one is not Outcome.SAFE)]
    return len({is_bad(one, prompt_set) for one in known}) > 1


# ---- the runs --------------------------------------------------------------------------------------------------------


def _by_seed(stored: Sequence[StoredResult], arms: Sequence[str]) -> dict[int, list[StoredResult]]:
    """Return the results of each seed in the order of the arms; if each arm has one result, all are of one seed."""
    if len(stored) == len(arms):
        return {min(one.result.seed for one in stored): [*stored]}
    found: defaultdict[int, dict[str, StoredResult]] = defaultdict(dict)
    for one in stored:
        other = found[one.result.seed].setdefault(one.result.arm, one)
        if other is not one:
            raise StayalignedError(
                f"{one.result.arm!r}: seed {one.result.seed} appears twice, in {other.directory} and {one.directory}",
                hint="Give each run once.",
            )
    for seed, own in sorted(found.items()):
        missing = [arm for arm in arms if arm not in own]
        if missing:
            raise StayalignedError(
                f"seed {seed}: arm {missing[0]!r} has no result, others have",
                hint="Give runs of the same seeds for all arms, or choose arms with --arm.",
            )
    return {seed: [own[arm] for arm in arms] for seed, own in sorted(found.items())}


def _common_judges(stored: Sequence[StoredResult]) -> dict[str, JudgeIdentity | None]:
    """Return the identity of each judge that all results have."""
    names = [[reading.judge for reading in one.result.judges] for one in stored]
    common = [name for name in names[0] if all(name in other for other in names)]
    if not common:
        raise StayalignedError(
            f"{stored[0].directory}: no judge is common to all runs"
            if len(stored) > 1
            else f"{stored[0].directory}: has no judge",
            hint="Judge them again with one judge: `stayaligned judge`.",
        )
    return {name: _identity(stored[0].result, name) for name in common}


def _identity(result: Result, name: str) -> JudgeIdentity | None:
    return next(reading.identity for reading in result.judges if reading.judge == name)


def _refuse_other_judges(runs: Sequence[StoredResult], judges: Mapping[str, JudgeIdentity | None]) -> None:
    """Refuse arms of one seed that different judges of one name judged."""
    for name in judges:
        first = _identity(runs[0].result, name)
        for other in runs[1:]:
            identity = _identity(other.result, name)
            if identity != first:
                found = first.differences(identity) if first and identity else ["one of them has no identity"]
                raise StayalignedError(
                    f"{runs[0].directory} and {other.directory} differ in judge {name!r}: {', '.join(found)}",
                    hint="Judge one of them again with the judge of the other: `stayaligned judge`.",
                )


def _items(seed: int, runs: Sequence[StoredResult]) -> list[tuple[DrawnItem, list[Evidence]]]:
    """Return the items of one seed, each with the evidence on each arm."""
    completions = [_judged(one) for one in runs]
    for one, found in zip(runs[1:], completions[1:], strict=True):
        _refuse_other_prompts(runs[0], completions[0], one, found)
    policies = [policy_hash(one.result) for one in runs]
    return [
        (
            DrawnItem(
                id=f"{seed}/{place[0]}/{place[1]}",
                seed=seed,
                prompt_set=place[0],
                prompt=prompt_hash(first.conversation),
                stratum="",
                messages=first.prompt,
                completions=tuple(
                    DrawnCompletion(
                        arm=one.result.arm,
                        completion=text_hash(own[place].text),
                        policy=policy,
                        text=own[place].text,
                        finished=own[place].finished,
                    )
                    for one, own, policy in zip(runs, completions, policies, strict=True)
                ),
            ),
            [one.rows[place] for one in runs],
        )
        for place, first in completions[0].items()
    ]


def _judged(stored: StoredResult) -> dict[Place, Completion]:
    found: dict[Place, Completion] = {(c.prompt_set, c.id): c for c in stored_completions(stored)}
    return {place: completion for place, completion in found.items() if place[0] in LABELLED}


def _refuse_other_prompts(
    one: StoredResult,
    ours: Mapping[Place, Completion],
    other: StoredResult,
    theirs: Mapping[Place, Completion],
) -> None:
    unpaired = sorted(ours.keys() ^ theirs.keys())
    changed = sorted(
        place for place in ours.keys() & theirs.keys() if ours[place].conversation != theirs[place].conversation
    )
    if unpaired or changed:
        what = "only one of them has" if unpaired else "they differ in"
        prompt_set, name = (unpaired or changed)[0]
        raise StayalignedError(
            f"{one.directory} and {other.directory}: {len(unpaired or changed)} prompts are not the same: {what} "
            f"{name!r} ({prompt_set})",
            hint="Label runs of the same prompts together.",
        )


def policy_hash(result: Result) -> str:
    """Return the hash of what identifies the weights, the server or the file that gave a result's completions."""
    endpoint = (result.experiment.get("generation") or {}).get("endpoint") or {}
    served = endpoint and [endpoint.get("base_url"), endpoint.get("model")]
    inputs, settings = result.provenance.inputs, result.experiment
    named = [settings.get("model"), settings.get("adapter"), inputs.get("completions")]
    known = served or identify_weights(result) or (named if any(named) else "")
    return hashlib.sha256(str(known).encode()).hexdigest()[:16] if known else ""
