"""Agreement of judges, and rates by category."""

from pathlib import Path

from stayaligned.core.records import Completion, Outcome, Verdict
from stayaligned.evaluation.judges.keyword import Keyword
from stayaligned.evaluation.measure import Judged, compare_judges, read_judge
from stayaligned.experiments.stages.keys import identify_judge


def verdicts(judge: str, prompt_set: str, *outcomes: Outcome | None) -> list[Verdict]:
    return [
        Verdict(id=str(i), prompt_set=prompt_set, judge=judge, outcome=o)  # type: ignore[arg-type]
        for i, o in enumerate(outcomes)
    ]


def test_agreement_skips_benign_prompts_if_a_judge_cannot_distinguish_refusals() -> None:
    H, R, S = Outcome.HARM, Outcome.REFUSE, Outcome.SAFE
    fine = [*verdicts("a", "harmful", H, R), *verdicts("a", "benign", R, Outcome.OTHER)]
    coarse = [*verdicts("b", "harmful", H, S), *verdicts("b", "benign", S, None)]
    assert [(a.prompt_set, a.agreement) for a in compare_judges({"a": fine, "b": coarse})] == [("harmful", 1.0)]
    assert [a.prompt_set for a in compare_judges({"a": fine, "c": fine})] == ["harmful", "benign"]


def test_each_category_has_its_own_rates() -> None:
    rows = verdicts("keyword", "harmful", Outcome.HARM, Outcome.REFUSE, Outcome.HARM, None, Outcome.HARM)
    completions = [
        Completion(id=str(i), prompt_set="harmful", prompt=(), text="", category=kind)
        for i, kind in enumerate(("zorb", "zorb", "wug", "wug", ""))
    ]
    judged = Judged(Keyword(), "keyword", identify_judge(Keyword(), seed=0), tuple(rows), Path())
    found = read_judge(judged, completions)
    rates = {c.category: (c.metrics[0].value, c.metrics[0].n, c.metrics[0].n_unscored) for c in found.categories}
    assert rates == {"zorb": (0.5, 2, 0), "wug": (1.0, 1, 1)}
    assert found.metrics[0].n == 4
