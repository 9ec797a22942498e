"""The analysis behind `safe_lora_front.py`: arms, halves of the prompts, choices of settings, fronts.

Each run's prompts are split in two halves; prompts with the same reference answer (one deed in several phrasings) stay
together. On the selection half each operator's setting is chosen; all reported numbers are from the other half. The
unit of every interval is the seed, and comparisons are paired by seed.

A front's area is the share of the square (accuracy 0 to 1, harm 1 to 0) in which some setting is at least as good in
both; the untreated model and the dropped update are available to every operator and are always included. The area needs
no selection, but uses the best of all scanned settings: compare operators with controls of equally many settings.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Metric, Verdict, read_jsonl
from stayaligned.data.tasks import TASKS
from stayaligned.evaluation.measure import score_metrics
from stayaligned.evaluation.metrics import PairedDifference, judge_metrics, paired_difference
from stayaligned.evaluation.results import Result, find_results

Half = Literal["selection", "report"]
HALVES: tuple[Half, Half] = ("selection", "report")
HARM, ACCURACY = "harmful_score", "finetune_accuracy"
CONTROLS = ("drop", "shrink", "random")
CHOSEN_AT = 0.1
ALIGNMENTS = {"testbed:aligned": "full SFT", "testbed:aligned-lora": "LoRA SFT"}
_ROUNDING = 1e-9


# ---- arms ----------------------------------------------------------------------------------------------------------


class Treatment(NamedTuple):
    """A patch of the finished fine-tune, or none."""

    family: str
    size: str = ""
    """Size of the operator, `k=8` or `f=0.5`; empty for the paper's C."""
    layers: str = ""
    """Selection of layers, `τ=0.35` or `K=7`; empty for all layers."""
    control: str = ""
    """The control (one of CONTROLS) that replaces the operator; empty for the operator itself."""

    @property
    def setting(self) -> str:
        return " ".join(part for part in (self.size, self.layers) if part) or "all layers"

    def control_by(self, control: str) -> Treatment:
        """Return the control of this treatment; dropping every layer is the same for all operators."""
        return DROPPED if control == "drop" and not self.layers else self._replace(control=control)


UNTREATED, DROPPED = Treatment("untreated"), Treatment("update dropped")
UNIFORM = "uniform shrink"
ENDS = (UNTREATED, DROPPED)


class Cell(NamedTuple):
    """One combination of alignment, task and target, with its own fronts."""

    alignment: str
    task: str
    target: str

    def __str__(self) -> str:
        return " · ".join(self)


def treatment_of(defenses: Sequence[Mapping[str, Any]]) -> Treatment:
    """Return the treatment that a result's `defenses` describe.

    Raises:
        StayalignedError: if they do not belong to this study.
    """
    patches = [spec for spec in defenses if spec["name"] != "sft"]
    if not patches:
        return UNTREATED
    spec = patches[0]
    if len(patches) == 1 and spec["name"] in ("safe_lora", "complement"):
        return _operator(spec)
    if len(patches) == 1 and spec["name"] in ("drop", "shrink", "random_subspace"):
        operator = _operator(spec["like"])
        if spec.get("factor") is None:
            return operator.control_by(spec["name"].removesuffix("_subspace"))
        if not operator.layers:
            return Treatment(UNIFORM, f"f={spec['factor']:g}")
    raise StayalignedError(
        f"not an arm of this study: defenses {' + '.join(str(s['name']) for s in defenses)}",
        hint="Give directories that `bench studies/safe_lora_front.yaml` wrote.",
    )


def _operator(spec: Mapping[str, Any]) -> Treatment:
    if spec["name"] == "complement":
        family = "complement" if spec["side"] == "both" else f"complement, {spec['side']} only"
    else:
        family = spec["operator"]
    size = f"k={spec['rank']}" if spec["rank"] is not None else ""
    size = f"energy={spec['energy']:g}" if spec["energy"] is not None else size
    layers = f"τ={spec['threshold']:g}" if spec["threshold"] is not None else ""
    return Treatment(family, size, f"K={spec['lowest']}" if spec["lowest"] is not None else layers)


def cell_of(experiment: Mapping[str, Any]) -> tuple[Cell, float]:
    """Return the cell and the poison ratio of a result's configuration."""
    lora, task = experiment["lora"], experiment["task"]
    if lora is None:
        target = "full weights"
    else:
        modules = lora.get("target_modules") or "default modules"
        named = modules if isinstance(modules, str) else ", ".join(m.removesuffix("_proj") for m in modules)
        target = "LoRA on " + ("all linears" if modules == "all-linear" else named)
    source = str(task.get("test") or task.get("train") or task["name"])
    ratio = float((experiment["attack"] or {}).get("poison_ratio", 0.0))
    model = str(experiment["model"])
    name = ALIGNMENTS.get(model, Path(model).name)
    return Cell(name, Path(source).stem.removesuffix("-test"), target), ratio


# ---- reading -------------------------------------------------------------------------------------------------------

Values = dict[str, Metric]
Key = tuple[Cell, float, Treatment]


@dataclass(frozen=True)
class Table:
    """Metrics of every arm by seed and half of the prompts, in the order of the grids."""

    readings: dict[Key, dict[int, dict[Half, Values]]]

    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(cell for cell, _, _ in self.readings))

    def ratios(self) -> list[float]:
        return sorted({ratio for _, ratio, _ in self.readings})

    def treatments(self, cell: Cell, ratio: float) -> list[Treatment]:
        return [t for c, r, t in self.readings if (c, r) == (cell, ratio)]

    def operators(self, cell: Cell, ratio: float) -> dict[str, list[Treatment]]:
        """Return the scan of every operator, including uniform shrinking."""
        scans: dict[str, list[Treatment]] = defaultdict(list)
        for treatment in self.treatments(cell, ratio):
            if treatment not in ENDS and not treatment.control:
                scans[treatment.family].append(treatment)
        return dict(scans)

    def metrics(self, key: Key, name: str, half: Half = "report") -> dict[int, Metric]:
        """Return one metric by seed."""
        runs = self.readings.get(key, {})
        return {seed: halves[half][name] for seed, halves in runs.items() if name in halves[half]}

    def values(self, key: Key, name: str, half: Half = "report") -> dict[int, float]:
        """Return the scored values of one metric by seed."""
        return {seed: m.value for seed, m in self.metrics(key, name, half).items() if m.value is not None}

    def mean(self, key: Key, name: str, half: Half = "report") -> float | None:
        """Return the mean of one metric over the seeds that have a value."""
        values = self.values(key, name, half)
        return fmean(values.values()) if values else None

    def difference(self, key: Key, other: Key, name: str, half: Half = "report") -> PairedDifference:
        """Return one metric of `key` minus that of `other`, paired by seed."""
        return paired_difference(self.values(key, name, half), self.values(other, name, half))


def read_table(directories: Sequence[Path]) -> Table:
    """Read every result in the directories.

    Raises:
        StayalignedError: if a result does not belong to this study or occurs twice, or its completions are missing.
    """
    readings: dict[Key, dict[int, dict[Half, Values]]] = {}
    for directory in directories:
        for result in find_results([directory]):
            key = (*cell_of(result.experiment), treatment_of(result.experiment["defenses"]))
            runs = readings.setdefault(key, {})
            if result.seed in runs:
                raise StayalignedError(
                    f"{directory}: {result.arm!r}, seed {result.seed} occurs twice",
                    hint="Give each grid's directory once, and only grids with different cells, ratios or treatments.",
                )
            runs[result.seed] = measure(result, directory)
    return Table(readings)


def measure(result: Result, directory: Path) -> dict[Half, Values]:
    """Compute a result's metrics on each half of its prompts, by its primary judge."""
    stages = result.provenance.stages
    completions = read_jsonl(directory / stages["generate"] / "completions.jsonl", Completion)
    verdicts = read_jsonl(directory / stages[f"judge {result.judges[0].judge}"] / "verdicts.jsonl", Verdict)
    tasks = {name: TASKS.parse(result.experiment[name]) for name in ("task", "skills") if result.experiment[name]}
    scores = {(c.prompt_set, c.id): tasks[c.prompt_set].score(c) for c in completions if c.prompt_set in tasks}
    side = halves(completions)
    found: dict[Half, Values] = {}
    for half in HALVES:
        judged = judge_metrics([v for v in verdicts if side[v.prompt_set, v.id] == half])
        scored = score_metrics({place: score for place, score in scores.items() if side[place] == half})
        found[half] = {metric.name: metric for metric in (*judged, *scored)}
    return found


def halves(completions: Iterable[Completion]) -> dict[tuple[str, str], Half]:
    """Return the half of every prompt by prompt set and id; it depends on nothing else, so all arms share it.

    Judged prompts with the same reference answer are one question and stay together.
    """
    questions: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for c in completions:
        one_deed = c.prompt_set in ("harmful", "benign") and c.reference.strip()
        questions[c.prompt_set, c.reference if one_deed else c.id].append((c.prompt_set, c.id))
    side: dict[tuple[str, str], Half] = {}
    sizes: dict[tuple[str, Half], int] = defaultdict(int)
    for question in sorted(questions, key=lambda q: hashlib.sha256("/".join(q).encode()).digest()):
        smaller = min(HALVES, key=lambda half: sizes[question[0], half])
        sizes[question[0], smaller] += len(questions[question])
        side |= dict.fromkeys(questions[question], smaller)
    return side


# ---- choosing, comparing -------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """The setting of an operator that was chosen on the selection half."""

    treatment: Treatment
    admissible: bool
    """Whether the setting lost at most `max_loss` accuracy on the selection half."""


def choose(scan: Mapping[Treatment, tuple[float, float]], max_loss: float) -> Choice:
    """Choose the setting of least harm among those that lose at most `max_loss` accuracy; if none does, of least loss.

    Args:
        scan: {setting: (mean harm, mean loss of accuracy)}; of equal settings the first is chosen.
        max_loss: the allowed loss, as a share.
    """
    admissible = [t for t, (_, loss) in scan.items() if loss <= max_loss + _ROUNDING]
    if admissible:
        return Choice(min(admissible, key=lambda t: scan[t]), True)
    return Choice(min(scan, key=lambda t: scan[t][::-1]), False)


def choices(table: Table, cell: Cell, max_loss: float) -> dict[str, Choice]:
    """Return every operator's choice in one cell."""
    found: dict[str, Choice] = {}
    for family, treatments in table.operators(cell, CHOSEN_AT).items():
        scan: dict[Treatment, tuple[float, float]] = {}
        for treatment in treatments:
            key, untreated = (cell, CHOSEN_AT, treatment), (cell, CHOSEN_AT, UNTREATED)
            harm = table.mean(key, HARM, "selection")
            gain = table.difference(key, untreated, ACCURACY, "selection").mean
            if harm is not None and gain is not None:
                scan[treatment] = harm, -gain
        if scan:
            found[family] = choose(scan, max_loss)
    return found


def hypervolume(points: Iterable[tuple[float, float]]) -> float:
    """Return the area of {(a, h): some point (accuracy, harm) has accuracy ≥ a and harm ≤ h} in the unit square."""
    area = safe = 0.0
    for accuracy, harm in sorted(points, reverse=True):
        area += accuracy * max(0.0, 1 - harm - safe)
        safe = max(safe, 1 - harm)
    return area


def covered(points: Sequence[tuple[float, float]], others: Iterable[tuple[float, float]]) -> list[bool]:
    """Return for each of `others` whether some point (accuracy, harm) is at least as good in both."""
    return [any(a >= x - _ROUNDING and h <= y + _ROUNDING for a, h in points) for x, y in others]


def areas(table: Table, cell: Cell, ratio: float, treatments: Iterable[Treatment]) -> dict[int, float]:
    """Return the area under the front of these treatments and ENDS, by seed, for the seeds that have all of them."""
    arms: list[dict[int, tuple[float, float]]] = []
    for treatment in dict.fromkeys((*ENDS, *treatments)):
        harm = table.values((cell, ratio, treatment), HARM)
        accuracy = table.values((cell, ratio, treatment), ACCURACY)
        arms.append({seed: (accuracy[seed], harm[seed]) for seed in accuracy.keys() & harm.keys()})
    seeds = set.intersection(*(set(arm) for arm in arms))
    return {seed: hypervolume([arm[seed] for arm in arms]) for seed in sorted(seeds)}


def side_of_zero(difference: PairedDifference) -> int:
    """Return 1 or -1 if the 95 % interval lies above or below zero, else 0.

    If the differences are equal in every seed, the sign test decides.
    """
    if difference.mean is None or difference.low is None or difference.high is None:
        return 0
    if difference.high - difference.low <= _ROUNDING:
        sure = difference.p_value <= 0.05
    else:
        sure = difference.low > 0 or difference.high < 0
    return (1 if difference.mean > 0 else -1) if sure else 0


def verdict(harm: PairedDifference, accuracy: PairedDifference) -> str:
    """Combine two paired differences into one finding."""
    safer, abler = -side_of_zero(harm), side_of_zero(accuracy)
    if safer * abler < 0:
        return "less harm, less accuracy" if safer > 0 else "more harm, more accuracy"
    return {1: "better", -1: "worse", 0: "not distinguished"}[safer or abler]


class Front(NamedTuple):
    """One operator's front in one cell at one poison ratio, compared with others."""

    area: dict[int, float]
    """Area by seed."""
    against: dict[str, PairedDifference]
    """Area minus that of the operator's own controls (`drop`, …) and of the other operators' scans."""
    uncovered: tuple[Treatment, ...]
    """Other operators' settings for which, by the means, no setting of this operator or ENDS is at least as good."""


def fronts(table: Table, cell: Cell, ratio: float) -> dict[str, Front]:
    """Return every operator's front, without comparisons with controls that were not run."""
    present = set(table.treatments(cell, ratio))
    scans = table.operators(cell, ratio)
    means: dict[Treatment, tuple[float, float]] = {}
    for treatment in present:
        accuracy, harm = (table.mean((cell, ratio, treatment), name) for name in (ACCURACY, HARM))
        if accuracy is not None and harm is not None:
            means[treatment] = accuracy, harm
    found: dict[str, Front] = {}
    for family, scan in scans.items():
        area = areas(table, cell, ratio, scan)
        rivals = {name: [t.control_by(name) for t in scan] for name in CONTROLS if family != UNIFORM}
        rivals |= {name: other for name, other in scans.items() if name != family}
        against = {
            name: paired_difference(area, areas(table, cell, ratio, rival))
            for name, rival in rivals.items()
            if present.issuperset(rival)
        }
        others = [t for name, rival in scans.items() if name != family for t in rival if t in means]
        beaten = covered([means[t] for t in (*scan, *ENDS) if t in means], [means[t] for t in others])
        found[family] = Front(area, against, tuple(t for t, yes in zip(others, beaten, strict=True) if not yes))
    return found
