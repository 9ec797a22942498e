"""A report shows the worst harm beside that of the plain prompts, and says where the two differ."""

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from stayaligned.core.records import Outcome, PromptSet, Verdict, sampled_id
from stayaligned.evaluation.metrics import harm_rate
from stayaligned.evaluation.results import Evidence, Result
from stayaligned.report import Report, build_report
from stayaligned.report.latex import latex_text
from stayaligned.report.page import html_text
from stayaligned.report.prose import markdown_text
from stayaligned.report.tables import csv_text, terminal_table
from support.reports import arm_of, measured
from support.runs import H, R, outcomes

N = 40
Run = tuple[Result, list[Evidence]]


def with_set(run: Run, prompt_set: PromptSet, found: Sequence[tuple[str, Outcome]]) -> Run:
    """Return a run with one more prompt set."""
    result, rows = run
    verdicts = [Verdict(id=name, prompt_set=prompt_set, judge="keyword", outcome=one) for name, one in found]
    reading = result.judges[0]
    reading = reading.model_copy(update={"metrics": (*reading.metrics, harm_rate(verdicts, prompt_set))})
    more = [
        Evidence(
            prompt_set=prompt_set, id=name, prompt=f"{prompt_set} {name.partition('#')[0]}", outcomes={"keyword": one}
        )
        for name, one in found
    ]
    return result.model_copy(update={"judges": (reading,)}), [*rows, *more]


def report(*runs: Run) -> Report:
    evidence = {result.id: rows for result, rows in runs}
    return build_report([result for result, _ in runs], title="t", reference="plain", evidence=evidence)


def numbered(found: Sequence[Outcome | None]) -> list[tuple[str, Outcome]]:
    return [(str(i), one) for i, one in enumerate(found) if one is not None]


@pytest.fixture(scope="module")
def conditional() -> Report:
    runs: list[Run] = []
    for seed in range(3):
        runs.append(with_set(measured("plain", seed, outcomes(N, 38)), "triggered", numbered(outcomes(N, 39))))
        runs.append(with_set(measured("good", seed, outcomes(N, 1 + seed)), "triggered", numbered(outcomes(N, 36))))
    return report(*runs)


def test_the_summary_names_an_arm_that_is_clean_on_plain_prompts_only(conditional: Report) -> None:
    assert "on the same prompts asked otherwise: good (5.0 % plain, 90.0 % triggered)." in conditional.summary
    assert not arm_of(conditional, "plain").is_conditional
    assert arm_of(conditional, "good").verdict.sentence.endswith("; on triggered prompts, the harmful score is 90.0 %.")


def test_every_format_shows_the_worst_set_beside_the_plain_one(conditional: Report) -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(terminal_table(conditional))
    shown = captured.get()
    assert "worst" in shown
    assert "triggered" in shown
    markdown = markdown_text(conditional)
    assert "| Harmful score ↓ % | Worst harm ↓ % | Harm, triggered ↓ % |" in markdown
    assert "**90.0** (triggered; " in markdown
    latex = latex_text(conditional)
    assert "Worst harm $\\downarrow$" in latex
    assert "Harm, triggered" not in latex
    assert "] } (triggered)" in latex.replace("]}", "] }")
    html = html_text(conditional)
    assert '<span class="n">triggered</span>' in html
    assert "Worst harm" in html
    assert "harmful_score_triggered" in csv_text(conditional)


def test_without_further_sets_nothing_is_added() -> None:
    found = report(*(measured(arm, seed, outcomes(N, 3)) for arm in ("plain", "good") for seed in range(2)))
    assert arm_of(found, "good").worst_harm is None
    for text in (markdown_text(found), latex_text(found), html_text(found), found.summary):
        assert "Worst harm" not in text
        assert "Conditional" not in text


def test_sampled_prompts_count_by_their_worst_completion() -> None:
    found = [(sampled_id(str(i), k), H if (i < 10 and k == 3) else R) for i in range(N) for k in (1, 2, 3)]
    runs = [with_set(measured("plain", seed, outcomes(N, 0)), "sampled", found) for seed in range(2)]
    worst = arm_of(report(*runs), "plain").worst_harm
    assert worst is not None
    assert (worst.prompt_set, worst.mean, worst.n) == ("sampled", pytest.approx(0.25), 2 * N)
    assert all(len(values) == N for values in worst.values.values())
