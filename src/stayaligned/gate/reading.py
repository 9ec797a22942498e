"""Runs of one side of a comparison, and whether two sides can be compared at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import PromptSet
from stayaligned.core.settings import Generation
from stayaligned.evaluation.judges import JUDGES
from stayaligned.evaluation.results import Evidence, Result, read_evidence, read_result, result_files
from stayaligned.gate.values import Measure

Place = tuple[PromptSet, str]

_FREE_DECODING = Generation.operational | {"seed", "endpoint"}
"""Settings of `generation` that may differ: how fast, which sample, and which model of which server."""
_TRAINING_PREFIXES = ("train", "held_out")
"""A task's fields that say what is learned; a candidate may have learned something else."""


@dataclass(frozen=True)
class Run:
    """One result and the rows behind it."""

    directory: Path
    result: Result
    rows: Mapping[Place, Evidence]


@dataclass(frozen=True)
class Side:
    """One model, or one recipe under several seeds."""

    role: str
    """`baseline` or `candidate`."""
    directories: tuple[Path, ...]
    runs: tuple[Run, ...]
    """In order of the seed."""

    @property
    def judges(self) -> list[str]:
        """Names of the judges that all runs have, the primary one first."""
        names = [[reading.judge for reading in run.result.judges] for run in self.runs]
        return [name for name in names[0] if all(name in other for other in names)]


def read_side(role: str, directories: Sequence[Path], arm: str | None = None) -> Side:
    """The runs below directories that `run`, `evaluate`, `judge` or `bench` wrote.

    Args:
        role: how errors call it, "baseline" or "candidate".
        directories: one, or several that differ in the seed.
        arm: which arm, where there are several.

    Raises:
        StayalignedError: if there is no run or more than one arm, if a seed stands there twice, or a file is not what
            the result was made of.
    """
    found = [(path, read_result(path)) for directory in directories for path in result_files(directory)]
    arms = list(dict.fromkeys(result.arm for _, result in found))
    if arm is None and len(arms) > 1:
        raise StayalignedError(
            f"{role}: {len(arms)} arms: {', '.join(map(repr, arms[:12]))}", hint=f"Choose one with --{role}-arm."
        )
    chosen = [(path, result) for path, result in found if arm is None or result.arm == arm]
    if not chosen:
        raise StayalignedError(f"{role}: no arm {arm!r}", hint=f"There are: {', '.join(map(repr, arms[:12]))}.")
    seeds = [result.seed for _, result in chosen]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise StayalignedError(
            f"{role}: seed {twice[0]} stands there twice",
            hint="Give one run per seed; `evaluate --seed N` numbers them.",
        )
    runs = [_read_run(path, result) for path, result in sorted(chosen, key=lambda item: item[1].seed)]
    return Side(role, tuple(directories), tuple(runs))


def _read_run(path: Path, result: Result) -> Run:
    rows = read_evidence(path.parent, result)
    by_place: dict[Place, Evidence] = {(row.prompt_set, row.id): row for row in rows}
    if len(by_place) != len(rows):
        raise StayalignedError(
            f"{path.parent}: {len(rows) - len(by_place)} prompts share an id with another",
            hint="Each prompt of a set needs an id of its own, or it can't be paired.",
        )
    return Run(path.parent, result, by_place)


def pair_runs(baseline: Side, candidate: Side) -> list[tuple[Run, Run]]:
    """The runs that belong together: by seed, or the only one of each side.

    Raises:
        StayalignedError: if the sides have different seeds.
    """
    if len(baseline.runs) == len(candidate.runs) == 1:
        return [(baseline.runs[0], candidate.runs[0])]
    ours, theirs = ({run.result.seed: run for run in side.runs} for side in (baseline, candidate))
    lonely = sorted(ours.keys() ^ theirs.keys())
    if lonely:
        which = baseline.role if lonely[0] in ours else candidate.role
        raise StayalignedError(
            f"seed {lonely[0]} is there for the {which} only",
            hint="Several runs are paired by seed: give both the same.",
        )
    return [(ours[seed], theirs[seed]) for seed in sorted(ours)]


def refuse_incomparable(pairs: Sequence[tuple[Run, Run]], measures: Sequence[Measure], judges: Sequence[str]) -> None:
    """Raise StayalignedError where the two sides differ in anything but model, adapter, training, defenses and seed.

    Args:
        pairs: baseline's and candidate's runs.
        measures: what is compared.
        judges: whose verdicts count.
    """
    for ours, theirs in pairs:
        _refuse_other_settings(ours, theirs, measures, judges)
        _refuse_other_prompts(ours, theirs, {name for measure in measures for name in measure.prompt_sets})


def _refuse_other_settings(ours: Run, theirs: Run, measures: Sequence[Measure], judges: Sequence[str]) -> None:
    for name, left, right in _settings(ours, theirs, measures, judges):
        if left != right:
            raise StayalignedError(
                f"{ours.directory} and {theirs.directory} differ in {name}: {_short(left)} and {_short(right)}",
                hint="Only model, adapter, training, defenses and seed may differ; rerun one as the other was run.",
            )


def _settings(
    ours: Run, theirs: Run, measures: Sequence[Measure], judges: Sequence[str]
) -> Iterable[tuple[str, object, object]]:
    """Name, and value on both sides, of what must be equal."""
    one, two = ours.result, theirs.result
    yield "the chat template (hash)", one.provenance.template_hash, two.provenance.template_hash
    yield "the decoding settings", _decoding(one), _decoding(two)
    for name in judges:
        yield f"judge {name!r}", _judge(one, name), _judge(two, name)
    for measure in measures:
        if measure.name in ("utility", "skills"):
            key = "task" if measure.name == "utility" else "skills"
            yield f"{key!r}, which scores the answers", _task(one, key), _task(two, key)


def _decoding(result: Result) -> dict[str, Any]:
    settings = result.experiment.get("generation") or {}
    return {key: value for key, value in settings.items() if key not in _FREE_DECODING}


def _judge(result: Result, name: str) -> object:
    """The judge's settings with its files replaced by what they hold."""
    index = [reading.judge for reading in result.judges].index(name)
    specs = result.experiment.get("judges") or []
    if index >= len(specs):
        return None
    spec = specs[index]
    known = str(spec.get("name")) in JUDGES.names()
    operational = JUDGES.get(str(spec["name"])).operational if known else frozenset[str]()
    kept = {key: value for key, value in spec.items() if key not in operational}
    return _identified(kept, f"judges.{index}", result.provenance.inputs)


def _task(result: Result, key: str) -> object:
    spec = result.experiment.get(key) or {}
    kept = {name: value for name, value in spec.items() if not name.startswith(_TRAINING_PREFIXES)}
    return _identified(kept, key, result.provenance.inputs)


def _identified(value: Any, place: str, inputs: Mapping[str, str]) -> Any:
    """`value` with each input in it replaced by its fingerprint, so that a moved file is the same file."""
    if isinstance(value, dict):
        return {key: _identified(item, f"{place}.{key}", inputs) for key, item in value.items()}
    if isinstance(value, list):
        return [_identified(item, f"{place}.{index}", inputs) for index, item in enumerate(value)]
    return inputs.get(place, value)


def _refuse_other_prompts(ours: Run, theirs: Run, prompt_sets: set[PromptSet]) -> None:
    left, right = (
        {place: row.prompt for place, row in run.rows.items() if place[0] in prompt_sets} for run in (ours, theirs)
    )
    other = sorted(place for place in left.keys() & right.keys() if left[place] != right[place])
    if other:
        raise StayalignedError(
            f"{ours.directory} and {theirs.directory}: {len(other)} prompts have the same id and another text, "
            f"the first is {other[0][1]!r} ({other[0][0]})",
            hint="Evaluate both on the same files of prompts.",
        )
    lonely = sorted(left.keys() ^ right.keys())
    if lonely:
        where = ours if lonely[0] in left else theirs
        raise StayalignedError(
            f"{ours.directory} and {theirs.directory}: {len(lonely)} prompts are there for one of the two only, the "
            f"first is {lonely[0][1]!r} ({lonely[0][0]}), in {where.directory}",
            hint="Evaluate both on the same files of prompts, with the same `limit`.",
        )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str) if not isinstance(value, str) else value
    return (text if len(text) <= 160 else text[:159] + "…") or "none"
