"""Run every defense and every attack on the testbed, and tabulate what each leaves and what it costs.

    python studies/field.py studies/field_defenses.yaml studies/field_attacks.yaml --out out/field [--workers 2]

Writes OUT/field.md, a table for each grid. Every run has its own process and one CPU thread, in which it trains and
patches first, so that its largest resident memory is that of the method, with the libraries. Rerun to continue.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.evaluation.results import RESULT_FILE, Result, read_result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.grid import load_grid

COST_FILE = "cost.json"


def measure(experiment: Experiment, stages: Path, directory: Path) -> None:
    """Train, patch and evaluate one arm in this process, which must be new; write its result and its cost."""
    from stayaligned.experiments.pipeline import run_stages
    from stayaligned.experiments.stages.context import Context
    from stayaligned.experiments.stages.patch import make_weights
    from stayaligned.experiments.stages.store import Store, read_stage

    context = Context(experiment, Store(stages), threads=1)
    plan = context.plan
    store = context.store
    made = [store.directory("patch", key) for key in plan.patches] or [store.directory("train", plan.train)]
    for path in made:  # a stage of a run that was killed before it wrote its cost
        shutil.rmtree(path, ignore_errors=True)
    make_weights(context)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = sum(float(read_stage(path)["seconds"]) for path in made if path.is_dir())
    directory.mkdir(parents=True, exist_ok=True)
    run_stages(context, directory)
    write_text(directory / COST_FILE, json.dumps({"seconds": seconds, "peak_mib": round(peak)}) + "\n")


def run_all(experiments: Sequence[Experiment], out: Path, workers: int) -> dict[int, str]:
    """Run what is missing; return the error of each experiment that failed, by its index."""
    errors: dict[int, str] = {}
    # Plain fine-tunes first: patches use them.
    order = sorted(range(len(experiments)), key=lambda index: bool(experiments[index].patches))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for patched in (False, True):
            running: dict[int, Future[None]] = {
                index: pool.submit(measure, experiments[index], out, place_of(experiments[index], out))
                for index in order
                if bool(experiments[index].patches) == patched
                and not (place_of(experiments[index], out) / COST_FILE).exists()
            }
            for index, future in running.items():
                name = f"{experiments[index].arm}, seed {experiments[index].seed}"
                try:
                    future.result()
                    print(f"done  {name}", flush=True)
                except StayalignedError as error:
                    errors[index] = error.message
                    print(f"failed  {name}: {error.message}", flush=True)
    return errors


def place_of(experiment: Experiment, out: Path) -> Path:
    """Return the directory of an experiment's result."""
    return out / "runs" / f"{experiment.arm}-{experiment.seed}"


def rows_of(
    experiments: Sequence[Experiment], out: Path
) -> Iterator[tuple[str, list[Result], list[Mapping[str, Any]]]]:
    """Yield each arm with its results and costs, one of each per seed."""
    for arm in dict.fromkeys(experiment.arm for experiment in experiments):
        places = [place_of(experiment, out) for experiment in experiments if experiment.arm == arm]
        places = [place for place in places if (place / COST_FILE).exists()]
        costs = [json.loads((place / COST_FILE).read_text(encoding="utf-8")) for place in places]
        yield arm, [read_result(place / RESULT_FILE) for place in places], costs


def value_of(result: Result, name: str) -> float | None:
    """Return a metric of a result, of the primary judge if judges give it."""
    metrics = [*result.judges[0].metrics, *result.scores]
    return next((metric.value for metric in metrics if metric.name == name), None)


def percent_range(values: Sequence[float | None]) -> str:
    """Return the mean of the seeds in percent, with the smallest and the largest if they differ by a point or more."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ({min(known):.0f}–{max(known):.0f})" if max(known) - min(known) >= 1 else ""
    return f"{fmean(known):.1f}{spread}"


def table(experiments: Sequence[Experiment], out: Path) -> str:
    """Return the Markdown table of one grid."""
    found = list(rows_of(experiments, out))
    names = [
        name
        for name in (*HARM_COLUMNS, "over_refusal", "finetune_accuracy")
        if any(value_of(result, name) is not None for _, results, _ in found for result in results)
    ]
    lines = [
        f"| arm | {' | '.join(TITLES[name] for name in names)} | seconds | memory, MiB |",
        f"|---|{'---:|' * (len(names) + 2)}",
    ]
    for arm, results, costs in found:
        cells = [percent_range([value_of(result, name) for result in results]) for name in names]
        seconds = min((cost["seconds"] for cost in costs), default=0.0)  # of the run that was disturbed least
        peak = max((cost["peak_mib"] for cost in costs), default=0)
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {seconds:.1f} | {peak} |")
    return "\n".join(lines)


HARM_COLUMNS = ("harmful_score", "harmful_score_triggered", "harmful_score_shaped")
TITLES = {
    "harmful_score": "harm",
    "harmful_score_triggered": "harm, triggered",
    "harmful_score_shaped": "harm, shaped",
    "over_refusal": "over-refusal",
    "finetune_accuracy": "accuracy",
}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    pages: list[str] = []
    failed: dict[str, str] = {}
    for path in arguments.grids:
        grid = load_grid(path)
        experiments = grid.expand(str(path))
        out = arguments.out / path.stem
        errors = run_all(experiments, out, arguments.workers)
        failed |= {f"{experiments[i].arm}, seed {experiments[i].seed}": message for i, message in errors.items()}
        pages.append(f"## {grid.title}\n\n{table(experiments, out)}\n")
    write_text(arguments.out / "field.md", "\n".join(pages))
    print(f"wrote  {arguments.out / 'field.md'}")
    if failed:
        sys.exit("\n".join(f"failed: {name}: {message}" for name, message in failed.items()))


if __name__ == "__main__":
    main()
