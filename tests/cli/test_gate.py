"""`gate`: exit codes and every output; bad input is one error that leaves nothing behind."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stayaligned.gate import Decision
from support.runs import evidence, outcomes, write_run

LIMIT = ("--max-harm-increase", "5%")
HOSTILE = "<b>|x|</b>\x1b[31m @all [a](http://evil) \ufffe & ` \u202e"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, n, harm in (("base", 400, 8), ("same", 400, 8), ("worse", 400, 90)):
        write_run(tmp_path / name, evidence({"keyword": outcomes(n, harm)}), arm=name)
    for name, harm in (("few-base", 1), ("few", 2)):
        write_run(tmp_path / name, evidence({"keyword": outcomes(40, harm)}))
    return tmp_path


CASES = [("base", "same", 0, "PASS"), ("base", "worse", 1, "FAIL"), ("few-base", "few", 3, "UNDECIDED")]


@pytest.mark.parametrize(("baseline", "candidate", "code", "word"), CASES)
def test_the_exit_code_is_the_decision(command, runs, baseline, candidate, code, word) -> None:
    files = [runs / name for name in ("out/d.json", "out/d.xml", "out/d.md")]
    ended, shown = command(
        "gate", "--baseline", runs / baseline, "--candidate", runs / candidate, *LIMIT,
        "--json", files[0], "--junit", files[1], "--markdown", files[2],
    )  # fmt: skip
    assert ended == code, shown
    assert shown.startswith(word)
    decision = Decision.model_validate_json(files[0].read_text())
    assert (decision.schema_version, decision.answer.upper()) == (1, word)
    suite = ElementTree.fromstring(files[1].read_text())  # noqa: S314
    assert suite.tag == "testsuite"
    assert [case.get("name") for case in suite.findall("testcase")] == ["max_harm_increase"]
    counts = {key: int(suite.get(key, "0")) for key in ("failures", "errors", "skipped")}
    assert counts == {"failures": int(code == 1), "errors": int(code == 3), "skipped": 0}
    assert len(suite.findall("testcase/failure")) == counts["failures"]
    assert len(suite.findall("testcase/error")) == counts["errors"]
    assert f"Safety gate: {decision.answer}" in files[2].read_text()
    assert decision.sentence.split(": ")[0] == word
    assert not [*runs.rglob("*.partial")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "nowhere"), "nowhere/design.json: No such file or directory"),
        (("--min-judge-agreement", "0.5"), "--min-judge-agreement needs --labels"),
    ],
)
def test_labels_that_are_not_there_are_an_error(command, runs, options, message) -> None:
    code, shown = command("gate", "--baseline", runs / "base", "--candidate", runs / "same", *LIMIT, *options)
    assert code == 2
    assert message in shown


@pytest.mark.parametrize("name", ["labels.jsonl", "design.json", "address.json"])
def test_an_output_never_replaces_a_file_of_labels(command, runs, name) -> None:
    (runs / "labels").mkdir()
    for file in ("labels.jsonl", "design.json", "address.json"):
        (runs / "labels" / file).write_text("{}\n")
    sides = ("--baseline", runs / "base", "--candidate", runs / "same")
    code, shown = command("gate", *sides, *LIMIT, "--labels", runs / "labels", "--json", runs / "labels" / name)
    assert (code, "of labels" in " ".join(shown.split())) == (2, True), shown
    assert (runs / "labels" / name).read_text() == "{}\n"


def test_markup_in_names_is_inert_in_every_output(command, runs) -> None:
    notes = {"arm": HOSTILE, "notes": (HOSTILE,)}
    for side, harm in (("h1", 4), ("h2", 90)):
        write_run(runs / side, evidence({HOSTILE: outcomes(400, harm), "b": outcomes(400, 4)}), **notes)
    files = [runs / name for name in ("d.xml", "d.md", "d.json")]
    code, shown = command(
        "gate", "--baseline", runs / "h1", "--candidate", runs / "h2", *LIMIT,
        "--junit", files[0], "--markdown", files[1], "--json", files[2],
    )  # fmt: skip
    assert code == 1, shown
    for text in (shown, files[0].read_text(), files[1].read_text()):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "judges" in text
    assert "<b>" not in files[1].read_text()
    assert "[a](" not in files[1].read_text()
    assert all(line.count("|") == 7 for line in files[1].read_text().splitlines() if line.startswith("|"))
    assert "<b>" in "".join(ElementTree.fromstring(files[0].read_text()).itertext())  # noqa: S314
    assert json.loads(files[2].read_text())["disagreements"]


def edited(runs: Path) -> None:
    path = runs / "same" / "evidence.jsonl"
    path.write_text(path.read_text().replace('"harm"', '"refuse"', 1))


def half_written(runs: Path) -> None:
    (runs / "same" / "result.json").write_text((runs / "same" / "result.json").read_text()[:300])


def other_version(runs: Path) -> None:
    path = runs / "same" / "result.json"
    path.write_text(re.sub(r'"format_version": \d+', '"format_version": 99', path.read_text()))


def no_evidence(runs: Path) -> None:
    (runs / "same" / "evidence.jsonl").unlink()


def nothing(runs: Path) -> None:
    shutil.rmtree(runs / "same")


def duplicate_ids(runs: Path) -> None:
    rows = evidence({"keyword": outcomes(10, 1)})
    write_run(runs / "same", [*rows, rows[0]])


BROKEN = [
    (edited, "not the rows that result.json"),
    (half_written, "not a result of format version"),
    (other_version, "99"),
    (no_evidence, "evidence.jsonl"),
    (nothing, "same: no such directory"),
    (duplicate_ids, "duplicate id"),
]


@pytest.mark.parametrize(("change", "named"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_run_is_one_error(command, runs, change, named) -> None:
    change(runs)
    code, shown = command(
        "gate", "--baseline", runs / "base", "--candidate", runs / "same", *LIMIT, "--json", runs / "d.json"
    )
    assert code == 2, shown
    assert shown.count("error: ") == 1
    assert named in shown
    assert not (runs / "d.json").exists()


WRONG = [
    ([], "no limit is set"),
    (["--max-harm-increase", "0"], "--max-harm-increase 0"),
    (["--max-harm-increase", "2"], "write 2% or 0.02"),
    (["--max-harm-increase", "some"], "write 2% or 0.02"),
    ([*LIMIT, "--confidence", "30%"], "--confidence"),
    ([*LIMIT, "--judge", "classifier"], "did not judge both"),
    ([*LIMIT, "--baseline-arm", "nobody"], "no arm 'nobody'"),
    ([*LIMIT, "--max-skills-drop", "2%"], "max_skills_drop"),
    ([*LIMIT, "--json", "{runs}"], "is a directory"),
    ([*LIMIT, "--json", "{runs}/base/result.json/d.json"], "can't be written"),
    ([*LIMIT, "--json", "{runs}/d", "--junit", "{runs}/d"], "same path"),
]


@pytest.mark.parametrize(
    ("options", "named"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_option_is_one_error_and_nothing_is_written(command, runs, options, named) -> None:
    before = sorted(runs.rglob("*"))
    options = [option.format(runs=runs) for option in options]
    code, shown = command("gate", "--baseline", runs / "base", "--candidate", runs / "same", *options)
    assert code == 2, shown
    assert named in shown
    assert "Traceback" not in shown
    assert sorted(runs.rglob("*")) == before


def test_arms_of_a_bench_are_chosen_by_name_with_all_their_seeds(command, runs) -> None:
    for arm, harm in (("A", 4), ("B", 4)):
        for seed in (0, 1, 2):
            rows = evidence({"keyword": outcomes(300, harm)}, world=str(seed))
            write_run(runs / "bench" / "runs" / f"{arm}-{seed}", rows, arm=arm, seed=seed)
    both = ("gate", "--baseline", runs / "bench", "--candidate", runs / "bench", *LIMIT)
    code, shown = command(*both)
    assert (code, "2 arms" in shown, "--baseline-arm" in shown) == (2, True, True)
    code, shown = command(*both, "--baseline-arm", "A", "--candidate-arm", "B")
    assert code == 0, shown
    assert re.search(r"\b900 +0 +pass\b", shown), "prompts, unscored, answer"
    assert "seeds 0, 1, 2" in shown


def test_the_same_inputs_give_the_same_files_byte_for_byte(command, runs) -> None:
    made = []
    for name in ("1", "2"):
        files = [runs / f"{name}.{kind}" for kind in ("json", "xml", "md")]
        command(
            "gate", "--baseline", runs / "base", "--candidate", runs / "worse", *LIMIT,
            "--json", files[0], "--junit", files[1], "--markdown", files[2],
        )  # fmt: skip
        made.append([path.read_bytes() for path in files])
    assert made[0] == made[1]


def test_comparing_a_run_with_itself_is_an_error(command, runs) -> None:
    code, shown = command("gate", "--baseline", runs / "base", "--candidate", runs / "base", *LIMIT)
    assert (code, "are the same run" in shown) == (2, True)


def test_the_self_test_needs_the_baseline_alone(command, runs) -> None:
    limit = ("--max-harm-increase", "20%")
    code, shown = command("gate", "--self-test", "--baseline", runs / "few", *limit, "--json", runs / "self.json")
    assert code == 0, shown
    assert "half against half" in shown
    found = json.loads((runs / "self.json").read_text())
    assert found["shares"][0]["n_prompts"] == {"harmful": 20}
    for extra in (("--candidate", runs / "same"), ("--junit", runs / "a.xml"), ("--anchor", runs / "same")):
        code, shown = command("gate", "--self-test", "--baseline", runs / "base", *LIMIT, *extra)
        assert (code, f"--self-test excludes {extra[0]}" in shown) == (2, True), shown


def test_a_previous_look_is_of_the_same_plan(command, runs) -> None:
    for name, n in (("first", 60), ("second", 120), ("third", 150)):
        for side in ("a", "b"):
            write_run(runs / f"{name}-{side}", evidence({"keyword": outcomes(n, n // 20)}), arm=side)

    def look(name: str, number: str, *options: object):
        sides = ("--baseline", runs / f"{name}-a", "--candidate", runs / f"{name}-b")
        return command("gate", *sides, "--max-harm-increase", "4%", "--look", number, *options)

    code, shown = look("first", "1/2", "--json", runs / "1.json")
    assert (code, "Go on to look 2 of 2" in shown) == (3, True), shown
    assert "prompts would decide at the last look (now 60 prompts)" in " ".join(shown.split())
    code, shown = look("second", "2/2", "--previous", runs / "1.json", "--json", runs / "1.json")
    assert (code, "an output would replace" in " ".join(shown.split())) == (2, True), shown
    assert look("second", "2/2", "--previous", runs / "1.json")[0] == 0
    for arguments, message in (
        (("second", "2/3"), "the number of planned looks was 2, and is now 3"),
        (("second", "1/2"), "look 1/2 is not earlier than look 1/2"),
        (("first", "2/2"), "it had 60 prompts, and this look has 60"),
        (("third", "2/2"), "look 1/2 had 60 prompts, so look 2/2 has about 120, and not 150"),
        (("second", "2/2", "--non-inferiority"), "non-inferiority was False, and is now True"),
        (("second", "2/2", "--max-harm", "5%"), "the list of limits was"),
    ):
        code, shown = look(*arguments, "--previous", runs / "1.json")
        assert (code, message in " ".join(shown.split())) == (2, True), shown
    assert "the earlier looks were not checked" in look("second", "2/2")[1]
    assert "not checked" not in look("second", "2/2", "--previous", runs / "1.json")[1]
    code, shown = look("second", "2/2", "--previous", runs / "none.json")
    assert (code, "--previous" in shown) == (2, True)
    edited = json.loads((runs / "1.json").read_text()) | {"answer": "pass"}
    (runs / "1.json").write_text(json.dumps(edited))
    code, shown = look("second", "2/2", "--previous", runs / "1.json")
    assert (code, "decided already: pass" in shown) == (2, True)
