"""Build a report: group results by arm, aggregate over seeds, compare with the reference arm. Imports no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from statistics import fmean

from stayaligned.core.errors import StayalignedError, nearest
from stayaligned.core.records import HARM_METRICS, Metric, PromptSet
from stayaligned.core.text import percent
from stayaligned.evaluation.copies import join_rows, join_samples, note_templates
from stayaligned.evaluation.results import Agreement, Evidence, Result
from stayaligned.evaluation.rows import result_rows
from stayaligned.report.background import collect_facts, collect_notes, collect_prompts, collect_times
from stayaligned.report.comparing import HARM
from stayaligned.report.estimating import (
    RunWithRows,
    estimate_categories,
    estimate_metrics,
    estimate_other_judges,
)
from stayaligned.report.texts import join_names
from stayaligned.report.training import collect_trainings
from stayaligned.report.values import (
    KNOWN_METRICS,
    WORST_HARM,
    Arm,
    ArmVerdict,
    Estimate,
    EvidenceRow,
    GateAnswer,
    MetricKind,
    ModuleEffect,
    PatchSummary,
    Report,
)
from stayaligned.report.verdicts import compare_arms
from stayaligned.report.words import list_cautions, list_findings, summarize


def build_report(
    results: Sequence[Result],
    *,
    title: str,
    reference: str | None = None,
    evidence: Mapping[str, Sequence[Evidence]] | None = None,
    gate: GateAnswer | None = None,
    cautions: Sequence[str] = (),
) -> Report:
    """Compare the arms in `results`, each aggregated over its seeds.

    Args:
        results: At least one result; arms keep the order in which they first appear.
        title: Heading of the report.
        reference: Name of the arm that the others are compared with, seed by seed.
        evidence: Evidence rows by the id of their result; results may lack evidence.
        gate: The release gate's answer on two arms, which the report quotes.
        cautions: What limits the validity of the numbers beyond what the results themselves show.

    Raises:
        StayalignedError: If there are no results, `reference` is not an arm, or an arm has a seed twice.
    """
    groups = _group_by_arm(results, reference)
    threat = _threat(results, reference)
    measured = _collect_metrics(results)
    rows = _with_rows(groups, evidence or {})
    estimates = {name: estimate_metrics(runs, measured) for name, runs in rows.items()}
    worst = {name: _with_worst_harm(found) for name, found in estimates.items()}
    comparable = {name for name, runs in groups.items() if all(_threat_of(run) == threat for run in runs)}
    compared = compare_arms(rows, estimates, comparable, reference)
    rivals = [name for name in groups if compared[name].role in ("reference", "competing")]
    front = _find_front({name: estimates[name] for name in rivals})
    arms = tuple(
        Arm(
            name=name,
            seeds=tuple(run.seed for run in runs),
            comparable=name in comparable,
            role=compared[name].role,
            verdict=_name_worst(compared[name].verdict, worst[name].get(WORST_HARM.name)),
            on_front=name in front,
            estimates=worst[name],
            differences=compared[name].differences,
            controls=compared[name].controls,
            other_judges=tuple(estimate_other_judges(rows[name])),
            agreements=tuple(_agreements(runs)),
            categories=tuple(estimate_categories(rows[name])),
            patches=tuple(_patches(runs)),
            experiment=runs[0].experiment,
            varies=_varying_fields(runs),
        )
        for name, runs in groups.items()
    )
    judges = list(dict.fromkeys(run.judges[0].judge for run in results if run.judges))
    return Report(
        title=title,
        reference=reference,
        summary=summarize(arms, reference),
        findings=tuple(list_findings(arms, reference)),
        cautions=(
            *cautions,
            *note_templates([of for runs in rows.values() for _, of in runs]),
            *list_cautions(arms, reference, judges),
        ),
        notes=collect_notes(results),
        metrics=tuple(_with_worst(measured)),
        judge=" / ".join(judges),
        arms=arms,
        trainings=collect_trainings(groups),
        prompts=collect_prompts(groups),
        facts=collect_facts(results),
        times=collect_times(results),
        evidence_rows=tuple(
            EvidenceRow(name, run.seed, row)
            for name, runs in groups.items()
            for run in runs
            for row in (evidence or {}).get(run.id, ())
        ),
        rows=tuple(result_rows(results)),
        gate=gate,
    )


def _with_rows(
    arms: Mapping[str, Sequence[Result]], evidence: Mapping[str, Sequence[Evidence]]
) -> dict[str, list[RunWithRows]]:
    """Return the results of each arm with their evidence; copies and near copies of a prompt are one in all of them."""
    runs = [run for found in arms.values() for run in found]
    joined = iter(join_rows([join_samples(evidence.get(run.id, ())) for run in runs]))
    return {name: [(run, next(joined)) for run in found] for name, found in arms.items()}


def _group_by_arm(results: Sequence[Result], reference: str | None) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.arm, []).append(result)
    if not groups:
        raise StayalignedError(
            "a report needs at least one result", hint="Pass a directory that `run`, `evaluate` or `bench` wrote."
        )
    if reference is not None and reference not in groups:
        raise StayalignedError(
            f"reference: no arm is labelled {reference!r}; the arms are {join_names(groups, 20)}",
            hint=nearest(reference, groups) or "Name one of these arms, or omit the reference.",
        )
    for name, runs in groups.items():
        seed, count = Counter(run.seed for run in runs).most_common(1)[0]
        if count > 1:
            raise StayalignedError(
                f"arm {name!r}: seed {seed} appears {count} times",
                hint="Pass each directory once, and give different experiments different labels.",
            )
        runs.sort(key=lambda run: run.seed)
    return groups


# ---- comparable arms -----------------------------------------------------------------------------------------------


def _threat_of(result: Result) -> str | None:
    """Return task and attack of a fine-tuning as one string; None for a model that was not fine-tuned."""
    spec = result.experiment
    if spec.get("training", {}) is None and spec.get("adapter") is None:
        return None
    return json.dumps([spec.get("task"), spec.get("attack")], sort_keys=True, default=str)


def _threat(results: Sequence[Result], reference: str | None) -> str | None:
    """Return task and attack of the reference arm, or the most common without a fine-tuned reference arm."""
    named = next((_threat_of(result) for result in results if result.arm == reference), None)
    found = Counter(threat for result in results if (threat := _threat_of(result)) is not None)
    return named or (found.most_common(1)[0][0] if found else None)


def _find_front(estimates: Mapping[str, Mapping[str, Estimate]]) -> set[str]:
    """Return the arms on the front: no other arm is better on mean harm or accuracy and as good on the other."""
    at = {
        name: (found["harmful_score"].mean, found["finetune_accuracy"].mean)
        for name, found in estimates.items()
        if "harmful_score" in found and "finetune_accuracy" in found
    }
    points = {name: (harm, gain) for name, (harm, gain) in at.items() if harm is not None and gain is not None}
    if len(points) < 2:
        return set()
    return {
        name
        for name, (harm, gain) in points.items()
        if not any(h <= harm and g >= gain and (h, g) != (harm, gain) for h, g in points.values())
    }


def _varying_fields(runs: Sequence[Result]) -> tuple[str, ...]:
    """Return the top-level fields, except `seed`, that differ between seeds."""
    first = runs[0].experiment
    keys = dict.fromkeys(key for run in runs for key in run.experiment)
    return tuple(
        key for key in keys if key != "seed" and any(run.experiment.get(key) != first.get(key) for run in runs)
    )


# ---- estimates -----------------------------------------------------------------------------------------------------


def _collect_metrics(results: Sequence[Result]) -> list[MetricKind]:
    """Return the built-in metrics that some result has, then other metrics in order of appearance."""
    found: dict[str, Metric] = {}
    for result in results:
        for metric in (*result.scores, *(result.judges[0].metrics if result.judges else ())):
            found.setdefault(metric.name, metric)
    known = [kind for kind in KNOWN_METRICS if kind.name in found]
    for name in found.keys() - {kind.name for kind in known}:
        if any(m.higher_is_better != found[name].higher_is_better for r in results if (m := r.metric(name))):
            raise StayalignedError(
                f"metric {name!r}: results disagree on whether higher is better",
                hint="Different versions of a plug-in wrote them; rerun the older results.",
            )
    return known + [_describe_metric(m) for name, m in found.items() if name not in {kind.name for kind in known}]


def _with_worst(kinds: Sequence[MetricKind]) -> list[MetricKind]:
    """Return the metrics with the worst harm beside the harmful score, if harm was measured on other sets as well."""
    several = sum(kind.name in HARM_METRICS.values() for kind in kinds) > 1
    return [one for kind in kinds for one in ([kind, WORST_HARM] if several and kind.name == HARM else [kind])]


def _with_worst_harm(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Return the estimates with the highest one of harm as `worst_harm`, if there are several."""
    harm = [one for name in HARM_METRICS.values() if (one := estimates.get(name)) is not None and one.mean is not None]
    if len(harm) < 2:
        return {**estimates}
    return {**estimates, WORST_HARM.name: max(harm, key=lambda one: one.mean or 0.0)}


def _name_worst(verdict: ArmVerdict, worst: Estimate | None) -> ArmVerdict:
    """Return a verdict that also names the prompt set with the worst harm, unless these are the plain prompts."""
    if worst is None or worst.name == HARM:
        return verdict
    named = f"on {worst.prompt_set} prompts, the harmful score is {percent(worst.mean)} %"
    return replace(verdict, sentence=f"{verdict.sentence.removesuffix('.')}; {named}.")


def _describe_metric(metric: Metric) -> MetricKind:
    """Return title and definition of a metric of lm-eval, a plug-in or a judge."""
    if metric.name.startswith("lm_eval/"):
        task, _, name = metric.name.removeprefix("lm_eval/").rpartition("/")
        definition = f"Mean of lm-eval's metric {name} over the samples of its task {task}."
        return MetricKind(metric.name, f"{task} {name}", definition, metric.higher_is_better)
    title = metric.name.replace("_", " ")
    definition = "A metric of this experiment's task or judge."
    return MetricKind(metric.name, title[:1].upper() + title[1:], definition, metric.higher_is_better)


# ---- judges and patches --------------------------------------------------------------------------------------------


def _agreements(runs: Sequence[Result]) -> list[Agreement]:
    """Pool agreement over the completions of all seeds, and average kappa, which cannot be pooled."""
    found: list[tuple[tuple[str, str], PromptSet]] = list(
        dict.fromkeys((a.judges, a.prompt_set) for run in runs for a in run.agreements)
    )
    pairs: list[Agreement] = []
    for judges, prompt_set in found:
        rows = [a for run in runs for a in run.agreements if a.judges == judges and a.prompt_set == prompt_set]
        scored = [(a.agreement, a.n) for a in rows if a.agreement is not None]
        total = sum(n for _, n in scored)
        kappas = [a.kappa for a in rows if a.kappa is not None]
        pairs.append(
            Agreement(
                judges=judges,
                prompt_set=prompt_set,
                n=total,
                agreement=math.fsum(share * n for share, n in scored) / total if total else None,
                kappa=fmean(kappas) if kappas else None,
                disputed=tuple(key for a in rows for key in a.disputed),
            )
        )
    return pairs


def _patches(runs: Sequence[Result]) -> list[PatchSummary]:
    """Return every patch of the arm, with its modules averaged over the seeds that have them."""
    summaries: list[PatchSummary] = []
    for records in zip_longest(*(run.patches for run in runs)):
        present = [record for record in records if record is not None]
        layers = [layer for record in present for layer in record.layers]
        modules = dict.fromkeys(layer.module for layer in layers)
        effects = {module: [layer for layer in layers if layer.module == module] for module in modules}
        summaries.append(
            PatchSummary(
                patch=present[0].patch,
                settings=present[0].settings,
                modules=tuple(
                    ModuleEffect(
                        module=module,
                        similarity=fmean(layer.similarity for layer in found),
                        shrinkage=fmean(layer.shrinkage for layer in found),
                        n_selected=sum(layer.selected for layer in found),
                        n_seeds=len(found),
                    )
                    for module, found in effects.items()
                ),
            )
        )
    return summaries
