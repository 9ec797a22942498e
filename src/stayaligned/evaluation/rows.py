"""Every measured value of results as rows, for `load_results` and `results.csv`, with distinct names of arms."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stayaligned.core.records import HARM_METRICS, Metric
from stayaligned.core.text import one_line
from stayaligned.evaluation.results import Result, StoredResult, read_results

METRIC_ORDER = (
    *HARM_METRICS.values(),
    "over_refusal",
    "finetune_accuracy",
    "skills_kept",
    "degeneration",
    "refusal_rate",
    "other_rate",
)
"""Order of the metrics in tables; other metrics follow in order of appearance."""

RESULT_COLUMNS = (
    "arm",
    "seed",
    "metric",
    "judge",
    "primary_judge",
    "value",
    "low",
    "high",
    "n",
    "n_unscored",
    "scale_low",
    "scale_high",
    "higher_is_better",
)
"""Columns of `results.csv` and of the rows of `load_results`."""


def load_results(directory: str | Path, *more: str | Path) -> list[dict[str, Any]]:
    """Load every measured value below output directories of `run`, `evaluate`, `judge` or `bench`.

    Returns:
        One row per arm, seed, metric and judge, with the columns of `results.csv`: `arm`, `seed`, `metric`, `judge`
        and `primary_judge` (None for metrics without a judge), `value`, `low` and `high` (ends of the 95 % interval;
        None where nothing was scored), `n`, `n_unscored`, `scale_low`, `scale_high`, `higher_is_better`.

    Raises:
        StayalignedError: if a directory holds no result, or a result can't be read.

    Example:
        >>> import pandas
        >>> from stayaligned import load_results
        >>> frame = pandas.DataFrame(load_results("out"))  # doctest: +SKIP
        >>> frame[frame.metric == "harmful_score"].pivot(index="arm", columns="seed", values="value")  # doctest: +SKIP
    """
    stored = distinguish_arms(read_results([directory, *more]))
    return result_rows([one.result for one in stored])


def result_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return one row per arm, seed, metric and judge; see `load_results` for the columns.

    Rows are ordered by arm (in order of appearance), primary judge and scores before other judges, metric
    (`METRIC_ORDER`, then order of appearance) and seed.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    for result in results:
        rows += [(0, _row(result, metric)) for metric in result.scores]
        for index, reading in enumerate(result.judges):
            rows += [(index, _row(result, metric, reading.judge, primary=index == 0)) for metric in reading.metrics]
    arms = _enumerate(row["arm"] for _, row in rows)
    primary = _enumerate((*METRIC_ORDER, *(row["metric"] for _, row in rows)))
    others = _enumerate(row["metric"] for index, row in rows if index)

    def place(item: tuple[int, dict[str, Any]]) -> tuple[int, int, int, int]:
        index, row = item
        return arms[row["arm"]], index, (others if index else primary)[row["metric"]], row["seed"]

    return [row for _, row in sorted(rows, key=place)]


def _enumerate(names: Iterable[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def _row(result: Result, metric: Metric, judge: str | None = None, *, primary: bool | None = None) -> dict[str, Any]:
    values = (
        result.arm,
        result.seed,
        metric.name,
        judge,
        primary,
        metric.value,
        metric.low,
        metric.high,
        metric.n,
        metric.n_unscored,
        *metric.scale,
        metric.higher_is_better,
    )
    return dict(zip(RESULT_COLUMNS, values, strict=True))


def distinguish_arms(stored: Sequence[StoredResult]) -> list[StoredResult]:
    """Prefix arm and id with the output directory where several directories hold different arms of one name.

    Arms of one name are one arm only if they have different seeds and equal settings (evaluations may differ in the
    model and the adapter that they evaluate). All seeds of an arm are renamed alike.
    """
    by_root: dict[str, dict[Path, list[Result]]] = {}
    for one in stored:
        by_root.setdefault(one.result.arm, {}).setdefault(one.root.resolve(), []).append(one.result)
    names = _short_paths({root for roots in by_root.values() for root in roots})

    def renamed(one: StoredResult) -> StoredResult:
        if _is_one_arm(by_root[one.result.arm].values()):
            return one
        name = names[one.root.resolve()]
        update = {"arm": f"{name}: {one.result.arm}", "id": f"{name}-{one.result.id}"}
        return StoredResult(one.directory, one.root, one.result.model_copy(update=update))

    return [renamed(one) for one in stored]


def explain_distinct(stored: Sequence[StoredResult]) -> list[str]:
    """Return one sentence for each name whose arms `distinguish_arms` keeps apart although no seed appears twice."""
    found: list[str] = []
    for arm in dict.fromkeys(one.result.arm for one in stored):
        roots = {one.root.resolve() for one in stored if one.result.arm == arm}
        results = [one.result for one in stored if one.result.arm == arm]
        settings = [_settings(result) for result in results]
        keys = [key for key in dict.fromkeys(key for of in settings for key in of) if not _is_equal(key, settings)]
        if keys and len(roots) > 1 and len({result.seed for result in results}) == len(results):
            found.append(
                f"results named {one_line(arm, 60)} are kept apart, not seeds of one arm: they differ in "
                f"{', '.join(keys)}"
            )
    return found


def _is_equal(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    return all(of.get(key) == settings[0].get(key) for of in settings)


def _is_one_arm(roots: Collection[Sequence[Result]]) -> bool:
    """Whether the results of one arm's name in several directories differ in their seeds, and only in these."""
    if len(roots) == 1:
        return True
    results = [result for found in roots for result in found]
    return len({result.seed for result in results}) == len(results) and all(
        _settings(result) == _settings(results[0]) for result in results
    )


def _settings(result: Result) -> dict[str, Any]:
    evaluated = ("model", "adapter") if result.experiment.get("training", {}) is None else ()
    return {key: value for key, value in result.experiment.items() if key not in ("seed", *evaluated)}


def _short_paths(paths: Collection[Path]) -> dict[Path, str]:
    """Return the last part of each path, with as many parts before it as distinguish all paths."""
    for n in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        short = {path: "/".join(path.parts[-n:]) for path in paths}
        if len({*short.values()}) == len(short):
            return short
    return {path: str(path) for path in paths}
