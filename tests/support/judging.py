"""Judge completions under the judge's own identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stayaligned.core.records import Completion, Verdict
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.verdicts import Ledger, judge_completions
from stayaligned.experiments.stages.keys import identify_judge


def judged(judge: Judge, completions: Sequence[Completion], ledger: Ledger, **more: Any) -> list[Verdict]:
    return judge_completions(judge, completions, ledger, identity=identify_judge(judge, seed=0), **more)
