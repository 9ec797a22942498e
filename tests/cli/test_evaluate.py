"""`evaluate` and `judge` give the same numbers as `run`; a mistake is one clear error that leaves nothing behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stayaligned.evaluation.results import read_evidence, read_result
from stayaligned.report import build_report
from stayaligned.testing import write_pico_adapter
from support.world import write_world

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_pico_adapter(root / "adapter", root / "aligned")
    return root


def arguments(world: Path, out: Path) -> tuple[object, ...]:
    prompts = ("--harmful-prompts", world / "harmful-prompts.jsonl", "--benign-prompts", world / "benign-prompts.jsonl")
    task = json.dumps({"name": "jsonl", "test": str(world / "test.jsonl")})
    return (world / "aligned", *prompts, "--task", task, "--out", out, "generation.max_new_tokens=4")


def test_a_model_is_measured_on_the_same_prompts_with_and_without_an_adapter(
    world: Path, tmp_path: Path, command: Command
) -> None:
    for name, adapter in (("plain", ()), ("tuned", ("--adapter", world / "adapter"))):
        code, shown = command("evaluate", *arguments(world, tmp_path / name), *adapter)
        assert code == 0, shown
    found = {name: read_result(tmp_path / name / "result.json") for name in ("plain", "tuned")}
    assert [found[name].arm for name in found] == ["aligned", "adapter"]
    rows = {name: read_evidence(tmp_path / name, result) for name, result in found.items()}
    keys = {name: [(r.prompt_set, r.id, r.prompt, r.category) for r in of] for name, of in rows.items()}
    assert keys["plain"] == keys["tuned"]
    assert len(keys["plain"]) == 6 + 5 + 8
    assert {m.name for m in found["plain"].judges[0].metrics} >= {"harmful_score", "over_refusal"}
    assert found["plain"].metric("finetune_accuracy")
    texts = [
        next((tmp_path / name).glob("stages/generate-*/completions.jsonl")).read_text() for name in ("plain", "tuned")
    ]
    assert texts[0] != texts[1], "the adapter was not on the model"
    by_category = {(c.prompt_set, c.category): c.metrics[0].n for c in found["plain"].judges[0].categories}
    assert by_category == {("harmful", "zorb"): 6}


def test_judging_again_with_the_keyword_judge_imports_no_torch(world: Path, tmp_path: Path, command: Command) -> None:
    code, shown = command("evaluate", *arguments(world, tmp_path / "run"))
    assert code == 0, shown
    program = (
        "import sys; from stayaligned.cli import main\n"
        f"sys.argv = ['stayaligned', 'judge', {str(tmp_path / 'run')!r}, '--judge', 'keyword', "
        f"'--judge', '{{name: keyword, match: start}}', '--out', {str(tmp_path / 'again')!r}]\n"
        "main()\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "again" / "result.json")
    assert [reading.judge for reading in result.judges] == ["keyword 1", "keyword 2"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--judge", "keywrd"], "unknown judge 'keywrd'. Did you mean 'keyword'?"),
        (["--judge", "[keyword]"], "expected a name or a mapping"),
        (["--judge", "{name: keyword, mach: start}"], "Did you mean 'match'?"),
        (["--adapter", "./nowhere"], "adapter: ./nowhere does not exist"),
        (["--harmful-prompts", "lost.jsonl"], "harmful_prompts: lost.jsonl does not exist"),
        (["--task", "sts2"], "Did you mean 'sst2'?"),
        (["max_unscord=0.1"], "Did you mean 'max_unscored'?"),
        (["training.max_steps=3"], "`evaluate` does not train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_error_and_leaves_nothing(
    change: list[str], said: str, world: Path, tmp_path: Path, command: Command
) -> None:
    code, shown = command("evaluate", *arguments(world, tmp_path / "out"), *change)
    assert code == 2
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_nothing_to_measure_and_no_judge_are_errors(world: Path, tmp_path: Path, command: Command) -> None:
    code, shown = command("evaluate", world / "aligned", "--out", tmp_path / "out")
    assert (code, "nothing to measure" in shown) == (2, True)
    code, shown = command("judge", world / "test.jsonl", "--out", tmp_path / "out")
    assert (code, "no judge is named" in shown) == (2, True)
    code, shown = command("judge", world / "test.jsonl", "--judge", "keyword", "--out", tmp_path / "out")
    assert (code, "test.jsonl, line 1: " in shown) == (2, True)
    assert not (tmp_path / "out").exists()


def test_an_empty_option_counts_as_not_given(
    command: Callable[..., tuple[int, str]], world: Path, tmp_path: Path
) -> None:
    """A CI script passes an empty string where a variable is not set."""
    prompts = ("--harmful-prompts", world / "harmful-prompts.jsonl")
    code, text = command(
        "evaluate", world / "aligned", *prompts, "--task", "", "--skills", "", "--label", "", "--out", tmp_path / "out"
    )
    assert code == 0, text
    assert read_result(tmp_path / "out" / "result.json").arm == "aligned"


def test_notes_are_printed_after_the_table(
    command: Callable[..., tuple[int, str]], world: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "twice.jsonl"
    rows.write_text((world / "harmful-prompts.jsonl").read_text() * 2)
    code, text = command("evaluate", world / "aligned", "--harmful-prompts", rows, "--out", tmp_path / "out")
    notes = read_result(tmp_path / "out" / "result.json").notes
    assert code == 0
    assert notes
    assert all(f"note: {note}" in text for note in notes)


def test_a_rerun_of_a_finished_run_says_that_nothing_was_computed(
    command: Callable[..., tuple[int, str]], world: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", world / "aligned", "--harmful-prompts", world / "harmful-prompts.jsonl")
    (_, first), (_, second) = (command(*arguments, "--out", tmp_path / "out") for _ in range(2))
    assert ("nothing was computed" in first, "nothing was computed" in second) == (False, True)


def test_an_adapter_that_was_patched_before_is_compared_with_its_control(
    world: Path, tmp_path: Path, command: Command
) -> None:
    pair = ("--aligned", world / "aligned", "--base", world / "base", "--lowest", 3)
    places = {"tuned": world / "adapter"}
    for name, control in (("patched", ()), ("dropped", ("--control", "drop")), ("other", ("--control", "shrink"))):
        places[name] = tmp_path / "adapters" / name
        code, shown = command("project", world / "adapter", *pair, *control, "--out", places[name])
        assert code == 0, shown
    # A control of another selection is no control of this patch.
    lowest = (*pair[:-1], 2, "--control", "drop", "--out", tmp_path / "adapters" / "fewer")
    assert command("project", world / "adapter", *lowest)[0] == 0
    places["fewer"] = tmp_path / "adapters" / "fewer"
    for name, adapter in places.items():
        code, shown = command("evaluate", *arguments(world, tmp_path / name), "--adapter", adapter)
        assert code == 0, shown
    runs = [(read_result(tmp_path / name / "result.json"), tmp_path / name) for name in places]
    rows = {run.id: read_evidence(at, run) for run, at in runs}
    report = build_report([run for run, _ in runs], title="t", reference="adapter", evidence=rows)
    arms = {arm.name: arm for arm in report.arms}
    assert {arm.name: arm.role for arm in report.arms} == {
        "adapter": "reference",
        "patched": "competing",
        "dropped": "control",
        "other": "control",
        "fewer": "control",
    }
    assert [one.control for one in arms["patched"].controls] == ["dropped", "other"]
    assert "no control of this patch was run" not in arms["patched"].verdict.sentence
    assert [patch.patch for patch in arms["patched"].patches] == ["safe_lora"]
    (tmp_path / "adapters" / "patched" / "projection.json").write_text("{}")
    code, shown = command("evaluate", *arguments(world, tmp_path / "again"), "--adapter", places["patched"])
    assert code == 0, shown
    again = read_result(tmp_path / "again" / "result.json")
    assert not again.patches
    assert any("patched before this run, but their record can't be read" in note for note in again.notes)
