"""Results → Report. Pure: the same results give an equal report, and nothing is read from anywhere else."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from stayaligned.errors import StayalignedError
from stayaligned.metrics import across_seeds, paired_difference
from stayaligned.records import LayerReport, Metric, PromptSet
from stayaligned.report.values import (
    KNOWN_METRICS,
    Agreeing,
    Arm,
    Curve,
    Estimate,
    IntervalKind,
    JudgePair,
    MetricKind,
    ModuleEffect,
    PatchSummary,
    Provenance,
    Report,
    SeedValue,
    StageTime,
    Training,
)
from stayaligned.report.wording import answer_in_words, cautions_about, findings_in_words
from stayaligned.results import Agreement, Result

HARM, ACCURACY = "harmful_score", "finetune_accuracy"

# What the Trainer logs besides these (learning rate, run time, tokens) says nothing about alignment.
CURVES = ("loss", "alignment_loss", "finetuning_loss", "drift")


def build_report(results: Sequence[Result], *, title: str, reference: str | None = None) -> Report:
    """Aggregate results into a comparison: one arm per label, in order of first appearance, over its seeds.

    A mean over two or more seeds carries Student's interval across them, cut to [0, 1]; a single seed carries the
    interval of its prompts. Seeds in which nothing could be scored enter no mean. Differences are paired by seed.

    Args:
        results: any number of arms and seeds, each pair of them once.
        title: the report's heading.
        reference: the arm that the others are compared with. Where it has no result, no difference is shown, and
            the report says so.

    Raises:
        StayalignedError: if there are no results, or two of one arm and seed.
    """
    if not results:
        raise StayalignedError("a report needs at least one result", hint="Run an experiment first: `stayaligned run`.")
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.arm, []).append(result)
    for name, group in groups.items():
        group.sort(key=lambda result: result.seed)
        twice = [seed for seed, count in Counter(result.seed for result in group).items() if count > 1]
        if twice:
            raise StayalignedError(
                f"arm {name!r} has two results of seed {twice[0]}",
                hint="Give the arms different labels, or report on one output directory at a time.",
            )
    estimates = {name: _estimates(group) for name, group in groups.items()}
    known_reference = reference if reference in groups else None
    comparable = _comparable(groups, known_reference)
    front = _front({name: estimates[name] for name in comparable})
    arms = tuple(
        Arm(
            name=name,
            seeds=tuple(result.seed for result in group),
            comparable=name in comparable,
            on_front=name in front,
            estimates=estimates[name],
            differences={
                metric: paired_difference(_by_seed(estimate), _by_seed(estimates[known_reference][metric]))
                for metric, estimate in estimates[name].items()
                if metric in estimates[known_reference]
            }
            if known_reference is not None and name != known_reference
            else {},
            other_judges=tuple(_other_judges(group)),
            agreements=tuple(_agreements(group)),
            patches=tuple(_patches(group)),
            samples=next((result.samples for result in group if result.samples), ()),
            sample_seed=next((result.seed for result in group if result.samples), None),
            experiment=group[0].experiment,
        )
        for name, group in groups.items()
    )
    return Report(
        title=title,
        reference=known_reference,
        answer=answer_in_words(arms, known_reference),
        findings=tuple(findings_in_words(arms)),
        cautions=tuple(cautions_about(arms, results, reference)),
        metrics=tuple(_metric_kinds(arms)),
        judge=next((result.judges[0].judge for result in results if result.judges), ""),
        arms=arms,
        trainings=tuple(_trainings(groups)),
        provenance=_provenance(results),
    )


# ---- metrics -------------------------------------------------------------------------------------------------------


def _estimates(group: Sequence[Result]) -> dict[str, Estimate]:
    """By name: every score, and the rates of each result's primary judge."""
    found: dict[str, list[tuple[Result, Metric, str]]] = {}
    for result in group:
        primary = result.judges[:1]
        named = [(metric, "") for metric in result.scores]
        named += [(metric, reading.judge) for reading in primary for metric in reading.metrics]
        for metric, judge in named:
            found.setdefault(metric.name, []).append((result, metric, judge))
    return {name: _estimate([(r.seed, m) for r, m, _ in rows], rows[0][2]) for name, rows in found.items()}


def _other_judges(group: Sequence[Result]) -> Iterable[Estimate]:
    found: dict[tuple[str, str], list[tuple[int, Metric]]] = {}
    for result in group:
        for reading in result.judges[1:]:
            for metric in reading.metrics:
                found.setdefault((reading.judge, metric.name), []).append((result.seed, metric))
    for (judge, _), rows in found.items():
        yield _estimate(rows, judge)


def _estimate(rows: Sequence[tuple[int, Metric]], judge: str) -> Estimate:
    metrics = [metric for _, metric in rows]
    mean = across_seeds(metrics)
    scored = [metric for metric in metrics if metric.value is not None]
    kind: IntervalKind = "none"
    low, high = mean.low, mean.high
    if low is not None and high is not None:
        low, high, kind = max(0.0, low), min(1.0, high), "seeds"
    elif len(scored) == 1 and scored[0].low is not None and scored[0].high is not None:
        low, high, kind = scored[0].low, scored[0].high, "prompts"
    return Estimate(
        metric=metrics[0].name,
        higher_is_better=metrics[0].higher_is_better,
        judge=judge,
        seeds=tuple(SeedValue(seed, m.value, m.n, m.n_unscored, m.low, m.high) for seed, m in rows),
        mean=mean.value,
        low=low,
        high=high,
        interval=kind,
    )


def _by_seed(estimate: Estimate) -> dict[int, float | None]:
    return {seed.seed: seed.value for seed in estimate.seeds}


def _metric_kinds(arms: Sequence[Arm]) -> Iterable[MetricKind]:
    """The known metrics that somebody measured, then any others, in order of first appearance."""
    measured = {name: estimate for arm in arms for name, estimate in arm.estimates.items()}
    known = {kind.name: kind for kind in KNOWN_METRICS}
    yield from (kind for kind in KNOWN_METRICS if kind.name in measured)
    seen = dict.fromkeys(name for arm in arms for name in arm.estimates if name not in known)
    for name in seen:
        title = name.replace("_", " ").capitalize()
        yield MetricKind(name, title, "A metric of its own.", measured[name].higher_is_better)


def _comparable(groups: Mapping[str, Sequence[Result]], reference: str | None) -> set[str]:
    """The arms fine-tuned on the reference's task under the reference's attack; all of them without a reference."""
    if reference is None:
        return set(groups)

    def faced(name: str) -> str:
        e = groups[name][0].experiment
        tuned = e.get("training") is not None or e.get("adapter") is not None
        return json.dumps([e.get("task"), e.get("attack"), tuned], sort_keys=True, default=str)

    return {name for name in groups if faced(name) == faced(reference)}


def _front(estimates: Mapping[str, Mapping[str, Estimate]]) -> set[str]:
    """The arms that no other arm beats on harm without losing accuracy, or the other way round, by their means."""
    points: dict[str, tuple[float, float]] = {}
    for name, of in estimates.items():
        harm, accuracy = of.get(HARM), of.get(ACCURACY)
        if harm is not None and accuracy is not None and harm.mean is not None and accuracy.mean is not None:
            points[name] = (harm.mean, -accuracy.mean)
    return {
        name
        for name, (harm, loss) in points.items()
        if not any(h <= harm and x <= loss and (h, x) != (harm, loss) for h, x in points.values())
    }


def _agreements(group: Sequence[Result]) -> Iterable[JudgePair]:
    found: dict[tuple[tuple[str, str], PromptSet], list[Agreement]] = {}
    for agreement in (agreement for result in group for agreement in result.agreements):
        found.setdefault((agreement.judges, agreement.prompt_set), []).append(agreement)
    for (judges, prompt_set), same in found.items():
        n = sum(row.n for row in same)
        equal = math.fsum(row.agreement * row.n for row in same if row.agreement is not None)
        kappas = [row.kappa for row in same if row.kappa is not None]
        yield JudgePair(
            judges=judges,
            prompt_set=prompt_set,
            n=n,
            agreement=equal / n if n else None,
            kappa=fmean(kappas) if kappas else None,
            n_disputed=sum(len(row.disputed) for row in same),
        )


# ---- layers and curves ---------------------------------------------------------------------------------------------


def _patches(group: Sequence[Result]) -> Iterable[PatchSummary]:
    for position in range(max(len(result.patches) for result in group)):
        records = [result.patches[position] for result in group if position < len(result.patches)]
        modules: dict[str, list[LayerReport]] = {}
        for layer in (layer for record in records for layer in record.layers):
            modules.setdefault(layer.module, []).append(layer)
        yield PatchSummary(
            patch=records[0].patch,
            settings=records[0].settings,
            modules=tuple(
                ModuleEffect(
                    module=module,
                    similarity=fmean(layer.similarity for layer in layers),
                    shrinkage=fmean(layer.shrinkage for layer in layers),
                    n_selected=sum(layer.selected for layer in layers),
                    n_seeds=len(layers),
                )
                for module, layers in modules.items()
            ),
        )


def _trainings(groups: Mapping[str, Sequence[Result]]) -> Iterable[Training]:
    """One entry per distinct log: arms that patch one adapter share its training, and its curves are shown once."""
    shared: dict[str, list[str]] = {}
    for name, group in groups.items():
        logs = [[result.seed, list(result.training_log)] for result in group if result.training_log]
        if logs:
            shared.setdefault(json.dumps(logs, sort_keys=True, default=str), []).append(name)
    for names in shared.values():
        curves = tuple(curve for quantity in CURVES if (curve := _curve(groups[names[0]], quantity)).seeds)
        if curves:
            yield Training(arms=tuple(names), curves=curves)


def _curve(group: Sequence[Result], quantity: str) -> Curve:
    seeds: list[tuple[int, tuple[tuple[float, float], ...]]] = []
    for result in group:
        rows = [(_number(row.get("step")), _number(row.get(quantity))) for row in result.training_log]
        points = tuple((step, value) for step, value in rows if step is not None and value is not None)
        if points:
            seeds.append((result.seed, points))
    return Curve(quantity, tuple(seeds))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# ---- provenance ----------------------------------------------------------------------------------------------------


def _provenance(results: Sequence[Result]) -> Provenance:
    records = [result.provenance for result in results]
    return Provenance(
        versions=tuple(_agreeing(record.versions for record in records)),
        inputs=tuple(_agreeing(record.inputs for record in records)),
        other=tuple(_agreeing({"commit": r.commit, "chat template": r.template_hash} for r in records)),
        times=tuple(_times(results)),
    )


def _agreeing(mappings: Iterable[Mapping[str, str]]) -> Iterable[Agreeing]:
    found: dict[str, Counter[str]] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            if value:
                found.setdefault(name, Counter())[value] += 1
    for name, values in found.items():
        yield Agreeing(name, tuple(values.most_common()))


def _times(results: Sequence[Result]) -> Iterable[StageTime]:
    """Stage times. Results of one grid share stage directories; each directory was computed, and counts, once."""
    computed: dict[str, dict[str, float]] = {}
    for result in results:
        for stage, seconds in result.provenance.seconds.items():
            directory = result.provenance.stages.get(stage, result.id)
            computed.setdefault(stage, {})[directory] = seconds
    for stage, seconds in computed.items():
        yield StageTime(stage, len(seconds), fmean(seconds.values()), math.fsum(seconds.values()))
