"""`power`: one parser of shares, both directions, and the numbers of the functions behind it."""

import json

import pytest

from stayaligned.evaluation import metrics


def asked(command, *options):
    code, shown = command("power", *options, "--json")
    assert code == 0, shown
    return json.loads(shown)


def test_the_needed_prompts_are_those_of_the_interval_that_gates(command) -> None:
    found = asked(command, "--rate", "5%", "--difference", "2%")
    share = metrics.discordance(0.05, 0.07)
    assert found["needed_prompts"] == metrics.paired_needed_n(0.02, share)
    assert found == asked(command, "--rate", "0.05", "--difference", "0.02")
    known = asked(command, "--rate", "5%", "--difference", "2%", "--discordant", "3 %")
    assert known["needed_prompts"] == metrics.paired_needed_n(0.02, 0.03)
    assert known["needed_prompts"] < found["needed_prompts"]
    unpaired = asked(command, "--rate", "5%", "--difference", "2%", "--unpaired")
    assert unpaired["needed_prompts"] == metrics.needed_n(0.05, 0.07)


def test_what_prompts_show_needs_so_many_prompts(command) -> None:
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


def test_the_table_says_the_same_in_words(command) -> None:
    code, shown = command("power", "--rate", "5%", "--difference", "2%", "--prompts", "100")
    needed = asked(command, "--rate", "5%", "--difference", "2%")["needed_prompts"]
    assert code == 0
    assert f"{needed:,}" in shown
    assert "unknown: as if unrelated" in shown


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rate", "5"], "write 2% or 0.02"),
        (["--rate", "nan", "--difference", "1%"], "write 2% or 0.02"),
        (["--rate", "5%"], "nothing is asked"),
        (["--rate", "5%", "--difference", "0"], "Above 0"),
        (["--rate", "5%", "--difference", "2%", "--margin", "2%"], "two questions"),
        (["--rate", "5%", "--difference", "5%", "--discordant", "2%"], "below the difference"),
        (["--rate", "5%", "--difference", "2%", "--seeds", "3"], "--seed-spread"),
        (["--rate", "50%", "--difference", "70%"], "no rate lies"),
        (["--rate", "5%", "--margin", "2%", "--worse", "1%"], "--worse"),
        (["--rate", "5%", "--margin", "2%", "--unpaired"], "--unpaired"),
        (["--rate", "5%", "--difference", "2%", "--confidence", "100%"], "--confidence"),
    ],
)
def test_a_wrong_question_is_one_error(command, options, named) -> None:
    code, shown = command("power", *options)
    assert code == 2, shown
    assert named in shown
    assert "Traceback" not in shown
