"""One experiment as a pipe of stages, each stored in a directory named by everything that it depends on.

    data ─► train ─► patch … ─► generate ─► degeneration, judge, lm_eval ─► result

A complete stage is not computed again: five thresholds train once, a new judge needs no model, and rerunning resumes.
A stage appears by one rename when it is complete, so nothing half-written is read as a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.records import JUDGED, Completion
from stayaligned.evaluation.lm_eval import lm_eval_metrics
from stayaligned.evaluation.results import Place, Result
from stayaligned.experiments.assemble import describe_run, write_measured
from stayaligned.experiments.stages.asking import check_prompts
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.degeneration import find_degenerate
from stayaligned.experiments.stages.generate import generate
from stayaligned.experiments.stages.judge import Judging, judge_all
from stayaligned.experiments.stages.lm_eval import check_tasks, run_lm_eval
from stayaligned.experiments.stages.patch import make_weights
from stayaligned.experiments.stages.store import collect_warnings


def run_stages(context: Context, directory: Path, *, position: int = 0) -> Result:
    """Compute every stage that is missing, and write `evidence.jsonl` and `result.json`.

    Args:
        context: the experiment and the store of its stages.
        directory: where the result is written.
        position: index of the arm in its grid.

    Raises:
        StayalignedError: if a stage fails, or a judge left a larger share unscored than `max_unscored`.
    """
    with collect_warnings() as warnings:
        return _run_stages(context, directory, position, warnings)


def _run_stages(context: Context, directory: Path, position: int, warnings: Sequence[str]) -> Result:
    experiment = context.experiment
    check_tasks(context)
    check_prompts(context)
    make_weights(context)  # first, so that the time of training and patching does not count as generation's
    completions = generate(context)
    judging = Judging(
        context.store,
        experiment.seed,
        experiment.max_unscored,
        context.host_libraries,
        context.progress,
        context.announce,
    )
    judged = judge_all(judging, experiment.judges, completions)
    lm_eval = lm_eval_metrics(run_lm_eval(context))
    degenerate = find_degenerate(context, completions)
    background = describe_run(context, completions, judged, position, warnings)
    background = background.model_copy(update={"scores": tuple(lm_eval)})
    return write_measured(directory, background, completions, judged, _score(context, completions), degenerate)


def _score(context: Context, completions: list[Completion]) -> dict[Place, float | None]:
    """Score the completions of the task and of the skills."""
    tasks = {"task": context.resolved.task, "skills": context.resolved.skills}
    return {
        (c.prompt_set, c.id): task.score_answer(c) if (task := tasks[c.prompt_set]) is not None else None
        for c in completions
        if c.prompt_set not in JUDGED
    }
