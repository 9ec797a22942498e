"""The computations of `lisa_study.py`: arms, their metrics by seed, paired differences and their tests.

The unit of every interval and test is the seed. Comparisons are paired by seed, with Student's p-value, corrected after
Holm within the table. A setting that is chosen is chosen on one half of the prompts and reported on the other half, as
in `safe_lora_front_table.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from safe_lora_front_table import ACCURACY, HARM, choose, hypervolume, measure
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Metric, read_jsonl
from stayaligned.data.tasks import TASKS
from stayaligned.defenses.lisa import Lisa
from stayaligned.evaluation.metrics import PairedDifference, mean_score, paired_difference
from stayaligned.evaluation.results import Result, find_results

WHOLE = "whole"
"""The part of a reading with all prompts; the other parts are the two halves."""
_UNNAMED = {"name", "alignment_steps", "finetuning_steps", "rho"}
_TOLERANCE = 1e-12


# ---- arms ----------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """The training method and the data of a run, as far as they differ within the study."""

    method: str
    """`Aligned`, `SFT`, `Mixing 10 %`, or `Lisa`; BSO is Lisa with ρ = 0."""
    allocation: tuple[int, int] | None = None
    """The pair (K1, K2)."""
    rho: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()
    """Lisa's other settings that are not at their defaults."""
    steps: int = 400
    rate: float = 5e-4
    rows: str = "sentiment"
    poison_ratio: float = 0.1

    @property
    def name(self) -> str:
        """The name of the arm, such as `SFT, clean rows`, `BSO 5:45` or `Lisa 5:45 ρ=2 proximal=decoupled`."""
        if self.allocation is None:
            return self.method if self.poison_ratio else f"{self.method}, clean rows"
        bso = self.rho == 0 and not self.options
        ratio = f"{self.allocation[0]}:{self.allocation[1]}"
        parts = ["BSO" if bso else self.method, ratio, "" if bso else f"ρ={self.rho:g}"]
        return " ".join(part for part in [*parts, *(f"{key}={value}" for key, value in self.options)] if part)

    def option(self, name: str) -> Any:
        """Return the value of one of Lisa's settings, or its default."""
        return dict(self.options).get(name, Lisa.model_fields[name].default)


def arm_of(experiment: Mapping[str, Any]) -> Arm:
    """Return the arm that a result's configuration describes.

    Raises:
        StayalignedError: if its defenses do not occur in the study.
    """
    training, attack = experiment["training"] or {}, experiment["attack"] or {}
    context: dict[str, Any] = {
        "steps": int(training.get("max_steps", 0)),
        "rate": float(training.get("learning_rate", 0)),
        "rows": Path(str(experiment["task"]["train"])).stem.removesuffix("-train"),
        "poison_ratio": float(attack.get("poison_ratio", 0.0)),
    }
    if experiment["training"] is None:
        return Arm("Aligned", **context)
    specs = [spec for spec in experiment["defenses"] if spec["name"] != "sft"]
    if not specs:
        return Arm("SFT", **context)
    spec = specs[0]
    if len(specs) == 1 and spec["name"] == "mixing":
        return Arm(f"Mixing {100 * spec['alignment_ratio']:g} %", **context)
    if len(specs) == 1 and spec["name"] in ("bso", "lisa"):
        defaults = {name: field.default for name, field in Lisa.model_fields.items()}
        options = tuple((key, spec[key]) for key in spec if key not in _UNNAMED and spec[key] != defaults[key])
        allocation = (int(spec["alignment_steps"]), int(spec["finetuning_steps"]))
        return Arm("Lisa", allocation, float(spec.get("rho", 0.0)), options, **context)
    raise StayalignedError(
        f"not an arm of this study: defenses {' + '.join(str(s['name']) for s in specs)}",
        hint="Pass directories that `bench studies/lisa_study*.yaml` wrote.",
    )


# ---- reading -------------------------------------------------------------------------------------------------------

Reading = Mapping[str, Mapping[str, Metric]]
"""The metrics of one run by part (WHOLE, `selection`, `report`) and name."""


@dataclass(frozen=True)
class Study:
    """Every arm's runs by seed, in the grids' order."""

    runs: dict[Arm, dict[int, Reading]]

    def arms(self, wanted: Callable[[Arm], bool] = lambda _: True) -> list[Arm]:
        """Return the arms that fulfill a condition."""
        return [arm for arm in self.runs if wanted(arm)]

    def metrics(self, arm: Arm, name: str, part: str = WHOLE) -> dict[int, Metric]:
        """Return one metric by seed; empty if the arm was not run."""
        return {seed: run[part][name] for seed, run in self.runs.get(arm, {}).items() if name in run[part]}

    def values(self, arm: Arm, name: str, part: str = WHOLE) -> dict[int, float]:
        """Return the scored values of a metric by seed."""
        return {seed: m.value for seed, m in self.metrics(arm, name, part).items() if m.value is not None}

    def mean(self, arm: Arm, name: str, part: str = WHOLE) -> float | None:
        """Return the mean of a metric over seeds."""
        values = self.values(arm, name, part)
        return fmean(values.values()) if values else None

    def difference(self, arm: Arm, other: Arm, name: str, part: str = WHOLE) -> PairedDifference:
        """Return `arm` minus `other`, paired by seed."""
        return paired_difference(self.values(arm, name, part), self.values(other, name, part))

    def areas(self, arms: Iterable[Arm], part: str = WHOLE) -> dict[int, float]:
        """Return the area under the front of harm against accuracy by seed, for seeds with results of all arms."""
        points: list[dict[int, tuple[float, float]]] = []
        for arm in arms:
            harm, accuracy = self.values(arm, HARM, part), self.values(arm, ACCURACY, part)
            points.append({seed: (accuracy[seed], harm[seed]) for seed in accuracy.keys() & harm.keys()})
        seeds = set.intersection(*(set(found) for found in points)) if points else set()
        return {seed: hypervolume([found[seed] for found in points]) for seed in sorted(seeds)}


def read_study(directories: Sequence[Path]) -> Study:
    """Read every result in the directories.

    Raises:
        StayalignedError: if a result is not of the study, or two results of one arm and seed differ.
    """
    runs: dict[Arm, dict[int, Reading]] = {}
    for directory in directories:
        for result in find_results([directory]):
            arm, reading = arm_of(result.experiment), read_run(result, directory)
            if runs.setdefault(arm, {}).setdefault(result.seed, reading) != reading:
                raise StayalignedError(
                    f"{directory}: {result.arm!r}, seed {result.seed}, is in another directory with other numbers",
                    hint="Pass results of one version of the code, computed on one machine.",
                )
    return Study(runs)


def read_run(result: Result, directory: Path) -> Reading:
    """Read a run's metrics on all prompts, including accuracy by task, and on each half."""
    named = {name for reading in result.judges[:1] for name in (m.name for m in reading.metrics)}
    whole = {name: metric for name in (*named, *(s.name for s in result.scores)) if (metric := result.metric(name))}
    path = directory / result.provenance.stages["generate"] / "completions.jsonl"
    task = TASKS.parse(result.experiment["task"])
    by_category: dict[str, list[float | None]] = {}
    for completion in read_jsonl(path, Completion):
        if completion.prompt_set == "task":
            by_category.setdefault(completion.category, []).append(task.score(completion))
    if len(by_category) > 1:
        for category, scores in sorted(by_category.items()):
            name = f"{ACCURACY}: {category}"
            whole[name] = mean_score(scores, name, higher_is_better=True)
    return {WHOLE: whole, **measure(result, directory)}


# ---- choosing, comparing -------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A method's setting, chosen on the selection half."""

    arm: Arm
    admissible: bool
    """Whether it lost at most the allowed accuracy on the selection half."""


def tuned(study: Study, arms: Sequence[Arm], reference: Arm, max_loss: float) -> Choice:
    """Choose the arm of least mean harm among those that lose at most `max_loss` of the reference's mean accuracy."""
    scan: dict[Any, tuple[float, float]] = {}
    for arm in arms:
        harm, gain = study.mean(arm, HARM, "selection"), study.difference(arm, reference, ACCURACY, "selection").mean
        if harm is not None and gain is not None:
            scan[arm] = harm, -gain
    chosen = choose(scan, max_loss)
    return Choice(chosen.treatment, chosen.admissible)


def t_test(difference: PairedDifference) -> float:
    """Return the p-value of Student's paired test; of the sign test if all pairs are equal; 1 for fewer than two."""
    values = [value for _, value in difference.pairs]
    if len(values) < 2:
        return 1.0
    spread = stdev(values)
    if spread <= _TOLERANCE:
        return difference.p_value
    from scipy.special import stdtr

    return float(2 * stdtr(len(values) - 1, -abs(fmean(values)) * math.sqrt(len(values)) / spread))
