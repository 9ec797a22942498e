"""Differences between arms on the same prompts: from the reference arm, and of a patch from its controls.

Two families of tests are fixed in advance, each with Holm's correction: the harmful score of the competing arms against
the reference arm (the primary family), and the harmful score of each patch against each of its controls. All other
differences are secondary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from stayaligned.evaluation.metrics import (
    MeanOfPrompts,
    PairedDifference,
    holm,
    mean_of_prompts,
    mean_of_seeds,
    paired_difference,
)
from stayaligned.evaluation.results import Result
from stayaligned.report.estimating import RunWithRows, group_values
from stayaligned.report.texts import scale_position
from stayaligned.report.values import ArmDifference, ControlComparison, Estimate, Role, ScoredPrompt

HARM, ACCURACY = "harmful_score", "finetune_accuracy"
LEVEL = 0.05

ACTIONS = {
    "drop": "dropping the same layers",
    "drop_other": "dropping other layers",
    "shrink": "shrinking the same layers as much",
    "random_subspace": "removing a random part of the same layers",
    "random_change": "changing the same layers as much at random",
}
"""What each built-in control does, in words. Named here because results may come from another installation."""

Arms = Mapping[str, Sequence[RunWithRows]]
Estimates = Mapping[str, Mapping[str, Estimate]]


def control_of(run: Result) -> Mapping[str, Any] | None:
    """Return the last defense of a run if it is a control: a patch that changes the layers that its `like` selects."""
    last = next(reversed(_defenses(run)), {})
    return last if last.get("name") in ACTIONS or isinstance(last.get("like"), Mapping) else None


def _defenses(run: Result) -> list[Mapping[str, Any]]:
    """Return the patches that the given weights had already, and then the defenses of the configuration."""
    return [*(patch.settings for patch in run.patches if patch.inputs), *(run.experiment.get("defenses") or ())]


# ---- differences from the reference arm ----------------------------------------------------------------------------


def compare_with_reference(
    arms: Arms, estimates: Estimates, roles: Mapping[str, Role], reference: str | None
) -> dict[str, dict[str, ArmDifference]]:
    """Compute each other arm's differences from the reference arm, by metric, with Holm's correction of the primary."""
    if reference is None:
        return {}
    found = {
        name: {
            metric: _difference(own[metric], estimates[reference][metric], arms[name], arms[reference])
            for metric in own
            if metric in estimates[reference]
        }
        for name, own in estimates.items()
        if name != reference
    }
    family = [name for name in found if roles[name] == "competing" and HARM in found[name]]
    corrected = _correct([found[name][HARM] for name in family])
    for name, difference in zip(family, corrected, strict=True):
        sure = not could_unscored_reverse(difference, estimates[name][HARM], estimates[reference][HARM])
        found[name][HARM] = replace(difference, primary=True, resolved=difference.resolved and sure)
    return found


def could_unscored_reverse(difference: ArmDifference, ours: Estimate, theirs: Estimate) -> bool:
    """Whether the unscored completions could make 0 a value of the interval: each moves a mean by its share at most."""
    low, high = difference.paired.low, difference.paired.high
    if low is None or high is None or low <= 0 <= high:
        return False
    slack = sum(one.n_unscored / max(1, one.n + one.n_unscored) for one in (ours, theirs))
    return low - slack <= 0 <= high + slack


def _correct(family: Sequence[ArmDifference]) -> list[ArmDifference]:
    """Correct the p-values of one family after Holm; differences without one stay as they are."""
    tested = [i for i, difference in enumerate(family) if difference.p_value is not None]
    corrected = list(family)
    for i, p_value in zip(tested, holm([family[i].p_value or 0.0 for i in tested]), strict=True):
        corrected[i] = replace(family[i], p_value=p_value, resolved=p_value < LEVEL)
    return corrected


def _difference(
    ours: Estimate, theirs: Estimate, our_runs: Sequence[RunWithRows], their_runs: Sequence[RunWithRows]
) -> ArmDifference:
    """Compute a difference on the prompts that both arms have; from the seeds' means where no prompts are known.

    Seeds are left out in which the arms have no prompt in common, or were judged differently. Fewer than two seeds or
    two models of an arm get no p-value: one run cannot show how far runs differ by chance.
    """
    first, second = ({run.seed: (run, rows) for run, rows in runs} for runs in (our_runs, their_runs))
    seeds = [s for s in first if s in second and _judged_alike(ours.judge, first[s][0], second[s][0])]
    pairs, found = (_pair_prompts if ours.values and theirs.values else _pair_means)(ours, theirs, seeds)
    paired = paired_difference({s: pair[0] for s, pair in pairs.items()}, {s: pair[1] for s, pair in pairs.items()})
    unpaired = tuple(sorted({*ours.by_seed, *theirs.by_seed} - {*pairs}))
    if found is None:
        return ArmDifference(_on_scale(replace(paired, low=None, high=None, unpaired=unpaired), ours.scale))
    low, high = found.interval()
    paired = replace(paired, mean=found.value, low=low, high=high, unpaired=unpaired)
    tested = (
        len(pairs) > 1
        and _differ([first[s] for s in pairs])
        and (_is_untrained(their_runs[0][0]) or _differ([second[s] for s in pairs]))
    )
    return ArmDifference(_on_scale(paired, ours.scale), p_value=found.p_value() if tested else None)


_Pairs = tuple[dict[int, tuple[float, float]], MeanOfPrompts | None]
"""Means of both arms by seed, and the mean difference; None if it has no interval."""


def _pair_prompts(ours: Estimate, theirs: Estimate, seeds: Sequence[int]) -> _Pairs:
    means: dict[int, tuple[float, float]] = {}
    changes: dict[int, dict[str, list[float]]] = {}
    for seed in seeds:
        first, second = ours.values.get(seed, {}), theirs.values.get(seed, {})
        common = [key for key in first if key in second]
        if common:
            means[seed] = fmean(first[key].value for key in common), fmean(second[key].value for key in common)
            rows = (ScoredPrompt(first[key].value - second[key].value, first[key].group) for key in common)
            changes[seed] = group_values(rows)
    return means, mean_of_prompts(changes) if changes else None


def _pair_means(ours: Estimate, theirs: Estimate, seeds: Sequence[int]) -> _Pairs:
    """Compare by seeds alone, as if the completions of the two arms were unrelated."""
    means: dict[int, tuple[float, float]] = {}
    for seed in seeds:
        a, b = (one.by_seed[seed].value if seed in one.by_seed else None for one in (ours, theirs))
        if a is not None and b is not None:
            means[seed] = scale_position(ours.scale, a), scale_position(theirs.scale, b)
    if len(means) < 2:
        return means, None
    n = min(one.by_seed[seed].n for seed in means for one in (ours, theirs))
    both = (fmean(pair[side] for pair in means.values()) for side in (0, 1))
    spread = sum(mean * (1 - mean) for mean in both)
    return means, mean_of_seeds({seed: a - b for seed, (a, b) in means.items()}, n, spread)


def _judged_alike(judge: str, first: Result, second: Result) -> bool:
    """Whether the primary judges of two runs give comparable verdicts; True for metrics without a judge."""
    if not judge:
        return True
    ours, theirs = first.judges[0], second.judges[0]
    if ours.identity is None or theirs.identity is None:
        return ours.judge == theirs.judge
    return ours.identity == theirs.identity


def _is_untrained(run: Result) -> bool:
    return run.experiment.get("training", {}) is None and run.experiment.get("adapter") is None


_DISTINCT_TEXTS = 8
"""From this number of different texts on, equal completions in two runs show that they are of one model."""


def _differ(runs: Sequence[RunWithRows]) -> bool:
    """Whether runs of several seeds have at least two models: one model measured twice is one run of it.

    Where the results do not say which model they measured, equal completions of all prompts show that it is one.
    """
    if any(run.provenance.inputs.get("model") for run, _ in runs):
        return len({_model(run) for run, _ in runs}) > 1
    texts = {tuple(sorted((row.prompt_set, row.prompt, row.completion) for row in rows)) for _, rows in runs}
    different = {row.completion for _, rows in runs for row in rows}
    return len(texts) > 1 or "" in different or len(different) < _DISTINCT_TEXTS


def _model(run: Result) -> str:
    """Return what determines the measured model: the inputs, and the trainings and patches in this directory."""
    inputs = [run.provenance.inputs.get(name) for name in ("model", "adapter")]
    stages = [key for name, key in run.provenance.stages.items() if name == "train" or name.startswith("patch ")]
    return json.dumps([inputs, stages])


def _on_scale(paired: PairedDifference, scale: tuple[float, float]) -> PairedDifference:
    """Convert a difference of positions on a scale to the units of the scale."""
    width = scale[1] - scale[0]
    low, mean, high = (None if value is None else width * value for value in (paired.low, paired.mean, paired.high))
    pairs = tuple((seed, width * difference) for seed, difference in paired.pairs)
    return replace(paired, pairs=pairs, low=low, mean=mean, high=high)


# ---- a patch and its controls --------------------------------------------------------------------------------------


def compare_with_controls(arms: Arms, estimates: Estimates) -> dict[str, tuple[ControlComparison, ...]]:
    """Compare each arm whose last step is a patch with its controls, with Holm's correction over all these pairs.

    A control of a patch names the patch, with the same settings, as its `like`; all else but the label is equal.
    """
    found: dict[tuple[str, str], ControlComparison] = {}
    for patch, control in _pair_controls(arms):
        differences = {
            metric: _difference(estimates[patch][metric], estimates[control][metric], arms[patch], arms[control])
            for metric in (HARM, ACCURACY)
            if metric in estimates[patch] and metric in estimates[control]
        }
        last = control_of(arms[control][0][0]) or {}
        action = ACTIONS.get(last.get("name", ""), f"the control {last.get('name')}")
        found[patch, control] = ControlComparison(
            control, action, differences, *_count_same(arms[patch], arms[control])
        )
    family = [pair for pair, one in found.items() if HARM in one.differences]
    for pair, harm in zip(family, _correct([found[pair].differences[HARM] for pair in family]), strict=True):
        found[pair] = replace(found[pair], differences={**found[pair].differences, HARM: harm})
    return {name: tuple(one for (patch, _), one in found.items() if patch == name) for name in arms}


def _pair_controls(arms: Arms) -> list[tuple[str, str]]:
    firsts = {name: runs[0][0] for name, runs in arms.items()}
    controls = {name: (run, last) for name, run in firsts.items() if (last := control_of(run)) is not None}
    return [
        (patch, name)
        for patch, run in firsts.items()
        if patch not in controls and _defenses(run)
        for name, (other, last) in controls.items()
        if last.get("like") == _defenses(run)[-1]
        and _defenses(other)[:-1] == _defenses(run)[:-1]
        and _surroundings(other) == _surroundings(run)
    ]


def _surroundings(run: Result) -> dict[str, Any]:
    """Return the configuration but for label, seed and defenses; for weights patched before, what was patched."""
    around = {key: value for key, value in run.experiment.items() if key not in ("label", "seed", "defenses")}
    before = [patch.inputs for patch in run.patches if patch.inputs]
    return {**around, ("adapter" if around.get("adapter") else "model"): before} if before else around


def _count_same(patch: Sequence[RunWithRows], control: Sequence[RunWithRows]) -> tuple[int, int]:
    """Return the number of equal completions, and of prompts whose completions can be compared."""
    theirs = {
        (run.seed, row.prompt_set, row.id, row.prompt): row.completion
        for run, rows in control
        for row in rows
        if row.completion
    }
    places = [
        ((run.seed, row.prompt_set, row.id, row.prompt), row.completion)
        for run, rows in patch
        for row in rows
        if row.completion
    ]
    common = [(completion, theirs[place]) for place, completion in places if place in theirs]
    return sum(a == b for a, b in common), len(common)
