"""Judge completions under the judge's own identity, for judges that read no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stayaligned.core.records import Completion, Verdict
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.verdicts import Ledger, judge_completions


def judged(judge: Judge, completions: Sequence[Completion], ledger: Ledger, **more: Any) -> list[Verdict]:
    return judge_completions(judge, completions, ledger, identity=str(judge.identity()), **more)
