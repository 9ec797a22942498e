"""`power`: shares are parsed, both directions work, and the numbers are those of `evaluation.metrics`."""

import json
from pathlib import Path

import pytest

from stayaligned.evaluation import metrics

DOCS = Path(__file__).parents[2] / "docs"


def table_after(page: str, words: str) -> list[list[str]]:
    """Return the cells of the first table of a page after some words."""
    lines = (DOCS / page).read_text().split(words)[1].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    end = next((i for i, line in enumerate(lines[lines.index(rows[0]) :]) if not line.startswith("|")), len(rows))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows[2:end]]


GATE = table_after("howto/gate.md", "passes in 9 of 10 cases")
SETS = table_after("concepts/statistics.md", "## What published prompt sets can show")


def asked(command, *options):
    code, shown = command("power", *options, "--json")
    assert code == 0, shown
    return json.loads(shown)


def test_the_needed_prompts_are_those_of_the_gates_interval(command) -> None:
    found = asked(command, "--rate", "5%", "--difference", "2%")
    share = metrics.discordance(0.05, 0.07)
    assert found["needed_prompts"] == metrics.paired_needed_n(0.02, share)
    assert found == asked(command, "--rate", "0.05", "--difference", "0.02")
    known = asked(command, "--rate", "5%", "--difference", "2%", "--discordant", "3 %")
    assert known["needed_prompts"] == metrics.paired_needed_n(0.02, 0.03)
    assert known["needed_prompts"] < found["needed_prompts"]
    unpaired = asked(command, "--rate", "5%", "--difference", "2%", "--unpaired")
    assert unpaired["needed_prompts"] == metrics.needed_n(0.05, 0.07)


def test_the_detectable_difference_needs_the_given_prompts(command) -> None:
    found = asked(command, "--rate", "5%", "--prompts", "400")["detectable_difference"]
    assert metrics.paired_needed_n(found, metrics.discordance(0.05, 0.05 + found)) == pytest.approx(400, abs=1)


def test_the_prompts_of_a_gate_let_an_unchanged_model_pass(command) -> None:
    found = asked(command, "--rate", "2%", "--margin", "3%", "--prompts", "500")
    share = metrics.discordance(0.02, 0.02)
    assert found["needed_to_pass_unchanged"] == metrics.paired_needed_n(0.0, share, limit=0.03, power=0.9)
    assert found["chance_unchanged_passes"] == pytest.approx(metrics.paired_power(0.0, share, 500, limit=0.03))
    assert found["worse"] == 0.06
    several = asked(command, "--rate", "2%", "--margin", "3%", "--seeds", "3", "--seed-spread", "2%")
    assert several["needed_to_pass_unchanged"] is None


@pytest.mark.parametrize("row", GATE, ids=[row[0] for row in GATE])
def test_the_tabulated_numbers_are_answered_for_every_discordance(command, row) -> None:
    share = float(row[0].removesuffix(" %")) / 100
    needed = [metrics.paired_needed_n(0.0, share, limit=margin, power=0.9) for margin in (0.01, 0.02, 0.03, 0.05, 0.1)]
    assert [f"{n:,}" for n in needed] == row[1:]
    found = asked(command, "--rate", "5%", "--margin", "5%", "--discordant", row[0])
    assert found["needed_to_pass_unchanged"] == needed[3]
    assert found["needed_to_fail_worse"] > 0


@pytest.mark.parametrize("row", SETS, ids=[row[0] for row in SETS])
def test_what_published_prompt_sets_can_show_is_what_power_says(command, row) -> None:
    _, n, *cells = row
    for rate, cell in zip(("0%", "1%", "5%"), cells[:3], strict=True):
        found = asked(command, "--rate", rate, "--prompts", n)
        assert f"{100 * found['smallest_ceiling']:.1f}" == cell
    for share, cell in zip(("0%", "2%", "5%", "10%"), cells[3:], strict=True):
        found = asked(command, "--rate", "5%", "--prompts", n, "--discordant", share)
        assert f"{100 * found['smallest_margin']:.1f}" == cell


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (("--rate", "0", "--ceiling", "2%"), 183),  # 0.98¹⁸³ < 0.025, and 0.98¹⁸² is not
        (("--rate", "0", "--ceiling", "5%"), 72),
        (("--rate", "0", "--ceiling", "1%"), 368),
        (("--rate", "0", "--ceiling", "2%", "--confidence", "90%"), 149),
        (("--rate", "100%", "--ceiling", "98%"), 183),
        (("--rate", "2%", "--ceiling", "2%"), None),
    ],
)
def test_a_ceiling_needs_the_prompts_of_the_exact_interval(command, options, needed) -> None:
    found = asked(command, *options)
    assert found["needed_to_decide"] == needed
    if needed:
        assert asked(command, *options, "--prompts", str(needed))["chance_decided"] == 1
        assert asked(command, *options, "--prompts", str(needed - 1))["chance_decided"] == 0


@pytest.mark.parametrize("margin", ["30%", "60%", "90%"])
@pytest.mark.parametrize("rate", ["0", "5%", "50%", "100%"])
def test_any_margin_that_a_rate_can_rise_or_fall_by_is_answered(command, rate, margin) -> None:
    code, shown = command("power", "--rate", rate, "--margin", margin, "--json")
    if rate == "50%" and margin != "30%":
        assert code == 2
        assert "--margin" in shown
    else:
        assert code == 0
        found = json.loads(shown)
        assert found["margin"] < found["worse"] <= 1
        assert found["needed_to_pass_unchanged"] > 0


def test_the_table_prints_the_same_values(command) -> None:
    code, shown = command("power", "--rate", "5%", "--difference", "2%", "--prompts", "100")
    needed = asked(command, "--rate", "5%", "--difference", "2%")["needed_prompts"]
    assert code == 0
    assert f"{needed:,}" in shown
    assert "unknown: as for unrelated completions" in shown
    code, shown = command("power", "--rate", "5%", "--prompts", "20", "--discordant", "1%")
    assert code == 0
    assert "none: too few prompts" in shown


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rate", "5"], "write 2% or 0.02"),
        (["--rate", "nan", "--difference", "1%"], "write 2% or 0.02"),
        (["--rate", "5%"], "nothing to compute"),
        (["--rate", "5%", "--difference", "0"], "above 0"),
        (["--rate", "5%", "--difference", "2%", "--margin", "2%"], "exclude each other"),
        (["--rate", "5%", "--difference", "5%", "--discordant", "2%"], "below the difference"),
        (["--rate", "5%", "--difference", "2%", "--seeds", "3"], "--seed-spread"),
        (["--rate", "50%", "--difference", "70%"], "no rate between 0 and 100 % is 70.0% away"),
        (["--rate", "5%", "--margin", "2%", "--worse", "1%"], "--worse"),
        (["--rate", "5%", "--margin", "2%", "--unpaired"], "--unpaired"),
        (["--rate", "1%", "--margin", "2%", "--ceiling", "2%"], "exclude each other"),
        (["--rate", "1%", "--ceiling", "2%", "--discordant", "2%"], "--ceiling excludes"),
        (["--rate", "1%", "--ceiling", "0"], "--ceiling 0"),
        (["--rate", "5%", "--difference", "2%", "--confidence", "100%"], "--confidence"),
    ],
)
def test_invalid_options_are_one_error(command, options, named) -> None:
    code, shown = command("power", *options)
    assert code == 2, shown
    assert named in shown
    assert "Traceback" not in shown


def test_labels_are_planned_with_prompts(command) -> None:
    base = ("--rate", "5%", "--discordant", "5%", "--labels", "170")
    found = asked(command, *base, "--margin", "5%", "--prompts", "520")
    assert found["needed_labels"] <= 170 <= found["prompts"]
    assert found["chance_unchanged_passes"] >= 0.9 >= asked(
        command, *base, "--margin", "4%", "--prompts", "520"
    )["chance_unchanged_passes"]  # fmt: skip
    assert found["needed_prompts_with_labels"] <= 520
    assert found["needed_labels_balanced"] <= found["needed_labels"]
    assert 0.04 < found["smallest_margin"] <= 0.05
    blind = asked(command, *base, "--margin", "5%", "--prompts", "520", "--judge-sensitivity", "30%")
    assert blind["needed_labels"] > found["needed_labels"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ceiling", "5%"), "--labels excludes --ceiling"),
        (("--margin", "5%", "--prompts", "80"), "--labels 100: more than --prompts 80"),
        (("--margin", "5%", "--discordant", "50%"), "can't differ on so many prompts"),
    ],
)
def test_labels_that_can_not_be_planned_are_an_error(command, options, message) -> None:
    code, shown = command("power", "--rate", "5%", "--labels", "100", *options)
    assert code == 2
    assert message in " ".join(shown.split())
