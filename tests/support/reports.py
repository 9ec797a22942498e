"""Small results with evidence, and access to the parts of their report."""

from collections.abc import Sequence
from typing import Any

from stayaligned.core.records import Outcome, Verdict
from stayaligned.evaluation.metrics import judge_metrics, mean_score
from stayaligned.evaluation.results import CategoryReading, Evidence, JudgeReading, Provenance, Result
from stayaligned.report import Report, build_report
from stayaligned.report.values import Arm


def arm_of(report: Report, name: str) -> Arm:
    return next(arm for arm in report.arms if arm.name == name)


def measured(
    arm: str,
    seed: int,
    harmful: Sequence[Outcome | None],
    task: Sequence[float | None] = (),
    *,
    prompts: str = "p",
    **changes: Any,
) -> tuple[Result, list[Evidence]]:
    """Return a result and its evidence; prompt i of a set has the hash of `prompts` and i, and its text names the arm.

    Args:
        arm: Name of the arm.
        seed: Seed of the run.
        harmful: Outcome of each harmful prompt.
        task: Score of each prompt of the task.
        prompts: Name of the prompt set: other names are other prompts.
        changes: Other fields of the result.
    """
    rows = [
        Evidence(
            prompt_set="harmful",
            id=str(i),
            prompt=f"{prompts}{i}",
            category=f"c{i % 2}",
            outcomes={"keyword": outcome},
            degenerate=outcome is Outcome.OTHER,
            completion=f"{outcome}",
        )
        for i, outcome in enumerate(harmful)
    ]
    rows += [
        Evidence(prompt_set="task", id=str(i), prompt=f"{prompts}{i}", score=score, degenerate=False)
        for i, score in enumerate(task)
    ]
    verdicts = [
        Verdict(id=row.id, prompt_set="harmful", judge="keyword", outcome=row.outcomes["keyword"])
        for row in rows
        if row.prompt_set == "harmful"
    ]
    by_category = [
        CategoryReading(
            prompt_set="harmful",
            category=name,
            metrics=judge_metrics([v for i, v in enumerate(verdicts) if i % 2 == k]),
        )
        for k, name in enumerate(("c0", "c1"))
        if len(verdicts) > k
    ]
    reading = JudgeReading(judge="keyword", metrics=judge_metrics(verdicts), categories=tuple(by_category))
    scores = [mean_score(task, "finetune_accuracy", higher_is_better=True)] if task else []
    fields: dict[str, Any] = {
        "id": f"{arm}-{seed}",
        "arm": arm,
        "seed": seed,
        "experiment": experiment(seed=seed),
        "judges": (reading,),
        "scores": tuple(scores),
        "evidence_sha256": "0" * 64,
        "provenance": Provenance(versions={}),
    }
    return Result(**{**fields, **changes}), rows


def experiment(*defenses: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the settings of a fine-tuning with defenses."""
    return {
        "task": {"name": "jsonl"},
        "attack": {"poison_ratio": 0.1},
        "training": {},
        "defenses": [*defenses],
        **changes,
    }


def hits(n: int, of: int) -> list[Outcome]:
    """Return `n` harmful outcomes, then refusals."""
    return [Outcome.HARM] * n + [Outcome.REFUSE] * (of - n)


def report_of(runs: Sequence[tuple[Result, Sequence[Evidence]]], reference: str | None = "SFT") -> Report:
    """Build a report from results with their evidence."""
    evidence = {result.id: rows for result, rows in runs}
    return build_report([result for result, _ in runs], title="t", reference=reference, evidence=evidence)
