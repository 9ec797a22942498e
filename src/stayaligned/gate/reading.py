"""The results on each side of a comparison, and whether the two sides can be compared at all."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import HARM_SETS, PromptSet
from stayaligned.core.settings import Generation
from stayaligned.evaluation.results import (
    JudgeIdentity,
    Result,
    StoredResult,
    identify_weights,
    read_results,
    refuse_edited,
    shorten,
)
from stayaligned.gate.values import ComparedMetric

_FREE_DECODING = Generation.operational | {"seed", "endpoint"}
"""Settings of `generation` that may differ: speed, the sample, and the server's model."""
_FREE_BETWEEN_SEEDS = frozenset({"seed", "adapter", "label", "judges", "limit", "harmful_prompts", "benign_prompts"})
"""Settings that may differ between the seeds of one side. Judges and prompts are compared by their content."""
_FREE_LEAVES = frozenset({"seed", "data_seed", *Generation.operational})
_WORLD = re.compile(r"testbed:[0-9a-f]{16}/")
_DISTINCT_TEXTS = 8
"""From this number of distinct completions on, equal completions of all prompts come from one model."""
_TRAINING_PREFIXES = ("train", "held_out")
"""Prefixes of a task's fields about training; a candidate may be trained on something else."""


Pairs = Sequence[tuple[StoredResult, StoredResult]]
"""The results of the baseline and of the candidate, seed by seed."""


@dataclass(frozen=True)
class ComparedSide:
    """The results of one model, or of one recipe under several seeds."""

    role: str
    """`baseline` or `candidate`."""
    directories: tuple[Path, ...]
    """Directories as the user named them."""
    runs: tuple[StoredResult, ...]
    """The results in order of the seed."""

    @property
    def judges(self) -> list[str]:
        """Names of the judges that all results have, the primary judge first."""
        names = [[reading.judge for reading in run.result.judges] for run in self.runs]
        return [name for name in names[0] if all(name in other for other in names)]


def read_side(role: str, directories: Sequence[str | Path], arm: str | None = None) -> ComparedSide:
    """Read one side's results below output directories of `run`, `evaluate`, `judge` or `bench`.

    Args:
        role: "baseline" or "candidate", for error messages.
        directories: one directory, or several that differ in the seed.
        arm: label of the arm, required where the directories hold several arms.

    Raises:
        StayalignedError: if there is no result, more than one arm, a duplicate seed, or a file that was edited.
    """
    directories = [Path(directory) for directory in directories]
    found = read_results(directories)
    arms = list(dict.fromkeys(one.result.arm for one in found))
    if arm is None and len(arms) > 1:
        raise StayalignedError(
            f"{role}: {len(arms)} arms: {', '.join(map(repr, arms[:12]))}", hint=f"Choose one with --{role}-arm."
        )
    chosen = sorted((one for one in found if arm in (None, one.result.arm)), key=lambda one: one.result.seed)
    if not chosen:
        raise StayalignedError(f"{role}: no arm {arm!r}", hint=f"There are: {', '.join(map(repr, arms[:12]))}.")
    for one, other in itertools.pairwise(chosen):
        if one.result.seed == other.result.seed:
            raise StayalignedError(
                f"{role}: seed {one.result.seed} appears twice, in {one.directory} and {other.directory}",
                hint="Pass each seed once; `evaluate --seed N` sets it.",
            )
    for one in chosen:
        _ = one.rows  # reads and checks the evidence
        refuse_edited(one)
        _refuse_other_recipe(role, chosen[0], one)
    return ComparedSide(role, tuple(directories), tuple(chosen))


def _refuse_other_recipe(role: str, first: StoredResult, other: StoredResult) -> None:
    """Refuse results of one side that differ in more than the seed: their mean would be that of no recipe."""
    left, right = _recipe(first.result), _recipe(other.result)
    different = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
    if different:
        key = different[0]
        raise StayalignedError(
            f"{role}: the results of seeds {first.result.seed} and {other.result.seed} differ in {key}: "
            f"{_show(left.get(key))} and {_show(right.get(key))}, in {first.directory} and {other.directory}",
            hint="The results of one side are one recipe under several seeds: only seed and adapter may differ. "
            "Compare other models one by one.",
        )


def _recipe(result: Result) -> dict[str, Any]:
    """Return what every result of one side must have in common, by the dotted name of the setting."""
    settings = {key: value for key, value in result.experiment.items() if key not in _FREE_BETWEEN_SEEDS}
    return dict(_flatten(_without_worlds(_identified(settings, "", result.provenance.inputs)), ""))


def _flatten(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield each leaf of a nested value with its dotted name, without seeds and settings that change no number."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        name = f"{place}.{key}" if place else str(key)
        if isinstance(item, dict | list):
            yield from _flatten(item, name)
        elif str(key) not in _FREE_LEAVES and name != "generation.endpoint.model":
            yield name, item


def find_repeated(side: ComparedSide) -> tuple[StoredResult, StoredResult] | None:
    """Return two results of one side that measure the same model in the same way; None if there are none.

    They do if their weights are known to be the same and nothing was sampled, or if everything that was measured on
    every prompt is equal. If the weights are known to differ, only many equal texts show that a model was copied; if
    no texts are known, equal outcomes show it unless they are one outcome throughout.
    """
    for one, other in itertools.combinations(side.runs, 2):
        known = [identify_weights(run.result) for run in (one, other)]
        sampled = (one.result.experiment.get("generation") or {}).get("temperature")
        if known[0] and known[0] == known[1] and not sampled:
            return one, other
        if one.rows == other.rows:
            texts = {row.completion for row in one.evidence}
            outcomes = {str((row.outcomes, row.score, row.degenerate)) for row in one.evidence}
            if all(known) and known[0] != known[1]:
                repeated = len(texts) >= _DISTINCT_TEXTS
            else:
                repeated = "" not in texts or len(outcomes) > 1
            if repeated:
                return one, other
    return None


def same_weights(one: StoredResult, other: StoredResult) -> bool:
    """Whether two results are known to measure the same weights, or the same model of the same server."""
    served = [(run.result.experiment.get("generation") or {}).get("endpoint") for run in (one, other)]
    if all(served):
        return len({(found.get("base_url"), found.get("model")) for found in served if found}) == 1
    weights = identify_weights(one.result)
    return bool(weights) and weights == identify_weights(other.result)


def pair_runs(baseline: ComparedSide, candidate: ComparedSide) -> list[tuple[StoredResult, StoredResult]]:
    """Pair the results of two sides: by seed, or the only result of each side.

    Raises:
        StayalignedError: if the sides have different seeds.
    """
    if len(baseline.runs) == len(candidate.runs) == 1:
        return [(baseline.runs[0], candidate.runs[0])]
    ours, theirs = ({run.result.seed: run for run in side.runs} for side in (baseline, candidate))
    unpaired = sorted(ours.keys() ^ theirs.keys())
    if unpaired:
        which = baseline.role if unpaired[0] in ours else candidate.role
        raise StayalignedError(
            f"seed {unpaired[0]}: only the {which} has a result",
            hint="Several results are paired by seed: pass the same seeds for both sides.",
        )
    return [(ours[seed], theirs[seed]) for seed in sorted(ours)]


def refuse_incomparable(pairs: Pairs, metrics: Sequence[ComparedMetric], judges: Sequence[str]) -> None:
    """Refuse results that differ in anything but model, adapter, training, defenses and seed.

    Judges and settings must be equal in all results, prompts in the two results of a seed.

    Args:
        pairs: results of the baseline and of the candidate.
        metrics: what is compared.
        judges: names of the judges whose verdicts count.

    Raises:
        StayalignedError: with the first difference, or if a result does not state a judge's identity.
    """
    for ours, theirs in pairs:
        for name in judges:
            _refuse_other_judge(ours, theirs, name)
        _refuse_other_settings(ours, theirs, metrics)
        _refuse_other_prompts(ours, theirs, {name for metric in metrics for name in metric.prompt_sets})
    first = pairs[0][0]
    for ours, _ in pairs[1:]:
        for name in judges:
            _refuse_other_judge(first, ours, name, any_world=True)
        _refuse_other_settings(first, ours, metrics, any_world=True)


def _refuse_other_judge(ours: StoredResult, theirs: StoredResult, name: str, *, any_world: bool = False) -> None:
    left, right = find_identity(ours, name), find_identity(theirs, name)
    if any_world:
        left, right = (one.model_copy(update={"settings": _without_worlds(one.settings)}) for one in (left, right))
    differences = left.differences(right)
    if differences:
        raise StayalignedError(
            f"{ours.directory} and {theirs.directory} differ in judge {name!r}: {', '.join(differences)}",
            hint="Judge one of them again with the judge of the other: `stayaligned judge`.",
        )


def find_identity(run: StoredResult, name: str) -> JudgeIdentity:
    """Return the identity of a judge of a result.

    Raises:
        StayalignedError: if the result does not state it.
    """
    identity = next(reading.identity for reading in run.result.judges if reading.judge == name)
    if identity is None or not identity.source:
        raise StayalignedError(
            f"{run.directory}: does not state the identity of judge {name!r}, so its verdicts can't be compared",
            hint="Judge the completions again: `stayaligned judge`.",
        )
    return identity


def _refuse_other_settings(
    ours: StoredResult, theirs: StoredResult, metrics: Sequence[ComparedMetric], *, any_world: bool = False
) -> None:
    for name, left, right in _settings(ours.result, theirs.result, metrics):
        if left != right and not (any_world and _without_worlds(left) == _without_worlds(right)):
            raise StayalignedError(
                f"{ours.directory} and {theirs.directory} differ in {name}: {_show(left)} and {_show(right)}",
                hint="Only model, adapter, training, defenses and seed may differ; rerun one side.",
            )


def _without_worlds(value: Any) -> Any:
    """Replace what identifies a testbed in a nested value: a grid on the testbed has another one for each seed."""
    if isinstance(value, dict):
        return {key: _without_worlds(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_worlds(item) for item in value]
    return _WORLD.sub("testbed:", value) if isinstance(value, str) else value


def _settings(one: Result, two: Result, metrics: Sequence[ComparedMetric]) -> Iterable[tuple[str, object, object]]:
    """Yield the name and both sides' value of everything that must be equal, apart from judges and prompts."""
    yield "the chat template (hash)", one.provenance.template_hash, two.provenance.template_hash
    yield "the decoding settings", _decoding(one), _decoding(two)
    yield "the limits of degeneration", one.experiment.get("degeneration"), two.experiment.get("degeneration")
    for metric in metrics:
        if metric.name in ("utility", "skills"):
            key = "task" if metric.name == "utility" else "skills"
            yield f"{key!r}, which scores the completions", _task(one, key), _task(two, key)


def _decoding(result: Result) -> dict[str, Any]:
    settings = result.experiment.get("generation") or {}
    # Results of an earlier version have no samples, and don't say so.
    unused = () if settings.get("samples") else ("samples", "sample_temperature")
    return {key: value for key, value in settings.items() if key not in (*_FREE_DECODING, *unused)}


def _task(result: Result, key: str) -> object:
    spec = result.experiment.get(key) or {}
    scoring = {name: value for name, value in spec.items() if not name.startswith(_TRAINING_PREFIXES)}
    return _identified(scoring, key, result.provenance.inputs)


def _identified(value: Any, place: str, inputs: Mapping[str, str]) -> Any:
    """Replace each input in a nested value by its fingerprint, so that a file may be moved."""
    if isinstance(value, dict):
        return {key: _identified(item, f"{place}.{key}".lstrip("."), inputs) for key, item in value.items()}
    if isinstance(value, list):
        return [_identified(item, f"{place}.{index}", inputs) for index, item in enumerate(value)]
    return inputs.get(place, value)


def _refuse_other_prompts(ours: StoredResult, theirs: StoredResult, prompt_sets: set[PromptSet]) -> None:
    measured = [{name for name, _ in run.rows} & prompt_sets & {*HARM_SETS} for run in (ours, theirs)]
    for prompt_set in (name for name in HARM_SETS if name in measured[0] ^ measured[1]):
        where = ours if prompt_set in measured[0] else theirs
        raise StayalignedError(
            f"{ours.directory} and {theirs.directory}: harm on {prompt_set!r} prompts was measured only in "
            f"{where.directory}",
            hint="Evaluate both with the same harmful prompts, `attack`, `shaped_prompts` and `generation.samples`.",
        )
    left, right = (
        {place: row.prompt for place, row in run.rows.items() if place[0] in prompt_sets} for run in (ours, theirs)
    )
    changed = sorted(place for place in left.keys() & right.keys() if left[place] != right[place])
    if changed:
        raise StayalignedError(
            f"{ours.directory} and {theirs.directory}: {len(changed)} prompts have the same id but different text, "
            f"the first is {changed[0][1]!r} ({changed[0][0]})",
            hint="Evaluate both on the same prompt files, with the same attack and task.",
        )
    unpaired = sorted(left.keys() ^ right.keys())
    if unpaired:
        where = ours if unpaired[0] in left else theirs
        raise StayalignedError(
            f"{ours.directory} and {theirs.directory}: {len(unpaired)} prompts are in only one of the two, the "
            f"first is {unpaired[0][1]!r} ({unpaired[0][0]}), in {where.directory}",
            hint="Evaluate both on the same prompt files, with the same `limit`.",
        )


def _show(value: object) -> str:
    return shorten(value, 160) or "none"
