"""`power`: shares are parsed, both directions work, and the numbers are those of `evaluation.metrics`."""

import json

import pytest

from stayaligned.evaluation import metrics


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


def test_the_table_prints_the_same_values(command) -> None:
    code, shown = command("power", "--rate", "5%", "--difference", "2%", "--prompts", "100")
    needed = asked(command, "--rate", "5%", "--difference", "2%")["needed_prompts"]
    assert code == 0
    assert f"{needed:,}" in shown
    assert "unknown: as for unrelated completions" in shown


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
        (["--rate", "50%", "--difference", "70%"], "no rate between 0 and 1 differs so much"),
        (["--rate", "5%", "--margin", "2%", "--worse", "1%"], "--worse"),
        (["--rate", "5%", "--margin", "2%", "--unpaired"], "--unpaired"),
        (["--rate", "5%", "--difference", "2%", "--confidence", "100%"], "--confidence"),
    ],
)
def test_invalid_options_are_one_error(command, options, named) -> None:
    code, shown = command("power", *options)
    assert code == 2, shown
    assert named in shown
    assert "Traceback" not in shown
