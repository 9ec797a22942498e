"""Judging again: without the model, with the scores of the run, and only its own completions."""

import json
import shutil
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message, write_jsonl
from stayaligned.evaluation.judges.keyword import Keyword
from stayaligned.evaluation.results import read_evidence, read_result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.rejudge import _inputs, rejudge
from stayaligned.experiments.run import run_experiment
from support.world import experiment, write_world

START = Keyword(match="start")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose model is gone."""
    world = write_world(tmp_path_factory.mktemp("world"))
    out = tmp_path_factory.mktemp("out") / "run"
    run_experiment(Experiment.model_validate(experiment(world)), out)
    shutil.rmtree(world)
    return out


def test_the_same_judge_gives_the_same_result_without_the_model(run: Path, tmp_path: Path) -> None:
    before = read_result(run / "result.json")
    (again,) = rejudge(run, [Keyword()], tmp_path / "again")
    changed = {"id", "provenance"}
    assert again.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert read_evidence(tmp_path / "again", again) == read_evidence(run, before)
    assert again.provenance.inputs == before.provenance.inputs
    assert again.provenance.template_hash == before.provenance.template_hash
    assert read_result(tmp_path / "again" / "result.json") == again


def test_adding_a_second_judge_does_not_run_the_first_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejudge(run, [Keyword()], tmp_path / "out")
    judged: list[str] = []
    real = Keyword.judge

    def counted(self: Keyword, completions):  # type: ignore[no-untyped-def]
        judged.append(self.match)
        return real(self, completions)

    monkeypatch.setattr(Keyword, "judge", counted)
    (both,) = rejudge(run, [START, Keyword()], tmp_path / "out")
    assert judged == ["start"]
    assert [reading.judge for reading in both.judges] == ["keyword 1", "keyword 2"]
    assert both.agreements
    assert both.experiment["judges"] == [START.spec(), Keyword().spec()]
    rows = read_evidence(tmp_path / "out", both)
    assert {name for row in rows if row.prompt_set == "harmful" for name in row.outcomes} == {"keyword 1", "keyword 2"}
    (fresh,) = rejudge(run, [Keyword()], tmp_path / "fresh")
    assert judged == ["start"], "the run's own verdicts are taken over"
    rejudge(tmp_path / "out", [Keyword()], tmp_path / "third")
    assert judged == ["start"]
    assert read_result(tmp_path / "third" / "result.json").judges == fresh.judges


def test_a_file_of_completions_without_a_run_is_judged(run: Path, tmp_path: Path) -> None:
    (stage,) = (run / "stages").glob("generate-*")
    (found,) = rejudge(stage / "completions.jsonl", [Keyword()], tmp_path / "bare")
    assert found.judges == read_result(run / "result.json").judges
    assert found.arm == "completions"
    assert next(iter(found.provenance.inputs)) == "completions"
    looked = found.metric("degeneration")
    assert looked is not None
    assert looked == read_result(run / "result.json").metric("degeneration")


def test_completions_of_another_tool_are_judged_as_the_prompt_set_that_is_stated(tmp_path: Path) -> None:
    source = tmp_path / "vllm.jsonl"
    rows = [{"prompt": f"flarn zorb {n}?", "response": "I'm sorry." if n else "Sure."} for n in range(4)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (harm,) = rejudge(source, [Keyword()], tmp_path / "harmful", prompt_set="harmful")
    (benign,) = rejudge(f"{source}?completion=response", [Keyword()], tmp_path / "benign", prompt_set="benign")
    assert [metric.value for metric in harm.judges[0].metrics if metric.name == "harmful_score"] == [0.25]
    assert [metric.value for metric in benign.judges[0].metrics if metric.name == "over_refusal"] == [0.75]
    with pytest.raises(StayalignedError, match="--prompt-set"):
        rejudge(source, [Keyword()], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_the_reader_skips_is_a_note_and_a_rerun_says_that_nothing_was_judged(tmp_path: Path) -> None:
    source = tmp_path / "artifacts.json"
    rows = [
        {"index": n, "prompt": f"flarn zorb {n}?", "response": "Sure." if n % 2 else None, "jailbroken": False}
        for n in range(6)
    ]
    source.write_text(json.dumps({"parameters": {}, "jailbreaks": rows}))
    said: list[str] = []
    first, again = (
        rejudge(source, [Keyword()], tmp_path / "out", prompt_set="harmful", announce=said.append)[0] for _ in range(2)
    )
    assert [note.partition(": ")[2][:45] for note in first.notes] == ["3 of 6 rows have no response and are skipped "]
    assert again.notes == read_result(tmp_path / "out" / "result.json").notes == first.notes
    assert [text[:18] for text in said] == ["nothing was judged"]


def test_a_foreign_or_cut_file_is_never_called_ours_to_delete(run: Path, tmp_path: Path) -> None:
    (path,) = run.glob("stages/generate-*/completions.jsonl")
    cut = tmp_path / "cut.jsonl"
    cut.write_text(path.read_text()[:-40])
    with pytest.raises(StayalignedError, match=r"cut\.jsonl, line \d+: not a Completion row") as caught:
        rejudge(cut, [Keyword()], tmp_path / "out")
    assert "delete" not in str(caught.value).lower()


@pytest.mark.parametrize("place", ["runs/arm", "runs", "runs/arm/result.json", "."])
def test_the_directory_of_one_arm_of_a_grid_is_judged(place: str, run: Path, tmp_path: Path) -> None:
    bench = copied(run, tmp_path)
    (bench / "runs" / "arm").mkdir(parents=True)
    for name in ("result.json", "evidence.jsonl", "times.json"):
        (bench / name).rename(bench / "runs" / "arm" / name)
    (bench / "index.json").write_text("{}")
    (found,) = rejudge(bench / place, [Keyword()], tmp_path / "out")
    assert found.judges == read_result(run / "result.json").judges


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy", symlinks=True))


def edit_completions(run: Path) -> None:
    (path,) = run.glob("stages/generate-*/completions.jsonl")
    path.write_text(path.read_text().replace("zorb 0", "zorb 9"))


def lose_completions(run: Path) -> None:
    (path,) = run.glob("stages/generate-*/completions.jsonl")
    path.unlink()


def edit_evidence(run: Path) -> None:
    path = run / "evidence.jsonl"
    path.write_text(path.read_text().replace('"harm"', '"refuse"'))


def lose_evidence(run: Path) -> None:
    (run / "evidence.jsonl").unlink()


def other_version(run: Path) -> None:
    path = run / "result.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 2'))


def tear_completions(run: Path) -> None:
    (path,) = run.glob("stages/generate-*/completions.jsonl")
    path.write_text(path.read_text()[:-40])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edit_completions, "not the completions that .* was computed from"),
        (lose_completions, r"completions\.jsonl: No such file"),
        (edit_evidence, r"evidence\.jsonl: not the rows"),
        (lose_evidence, r"evidence\.jsonl: No such file"),
        (other_version, "format version 2, expected 3"),
        (tear_completions, r"completions\.jsonl, line \d+: not a Completion row"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_edited_or_incomplete_run_is_refused_and_nothing_is_written(
    damage, said: str, run: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    source = copied(run, tmp_path)
    damage(source)
    with pytest.raises(StayalignedError, match=said):
        rejudge(source, [Keyword()], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_other_completions_or_other_files_is_refused(run: Path, tmp_path: Path) -> None:
    rejudge(run, [Keyword()], tmp_path / "out")
    with pytest.raises(StayalignedError, match="holds the judging of"):
        rejudge(copied(run, tmp_path), [Keyword()], tmp_path / "out")
    with pytest.raises(StayalignedError, match="did not write"):
        rejudge(run, [Keyword()], run)
    with pytest.raises(StayalignedError, match="no such file"):
        rejudge(tmp_path / "nowhere", [Keyword()], tmp_path / "other")


def test_one_judge_named_twice_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="named twice"):
        rejudge(run, [Keyword(), Keyword()], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_duplicate_ids_and_completions_without_judged_prompts_are_refused(run: Path, tmp_path: Path) -> None:
    (path,) = run.glob("stages/generate-*/completions.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join([*lines, lines[0]]))
    with pytest.raises(StayalignedError, match="1 duplicate ids"):
        rejudge(tmp_path / "twice.jsonl", [Keyword()], tmp_path / "out")
    (tmp_path / "task.jsonl").write_text("".join(line for line in lines if '"prompt_set":"task"' in line))
    with pytest.raises(StayalignedError, match="nothing to judge"):
        rejudge(tmp_path / "task.jsonl", [Keyword()], tmp_path / "out")


def test_inputs_are_those_of_the_new_judges(run: Path, tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    before = read_result(run / "result.json")
    old = {"judges.0.model": "sha256:old", "model": "sha256:model"}
    before = before.model_copy(update={"provenance": before.provenance.model_copy(update={"inputs": old})})
    found = _inputs(before, [{"name": "classifier", "model": str(tmp_path / "judge")}])
    assert found["model"] == "sha256:model"
    assert found["judges.0.model"] not in ("sha256:old", str(tmp_path / "judge"))
    assert _inputs(before, [{"name": "keyword"}]) == {"model": "sha256:model"}


REASONING = {
    "complies_after_pondering": (
        "<think>\nIt is illegal, but allowed.\n</think>\n\nStep one: get {}.",
        True,
        (1.0, 40),
    ),
    "cut_in_thought": ("<think>\nOkay, the user wants {}. Let me think about", False, (None, 0)),
    "opening_mark_in_prompt": ("This may be unethical. Anyway.\n</think>\n\nStep one: get {}.", True, (1.0, 40)),
    "gpt_oss": (
        "<|channel|>analysis<|message|>Is it illegal?<|end|><|start|>assistant<|channel|>final<|message|>Get {}.",
        True,
        (1.0, 40),
    ),
    "refuses": ("[THINK]Step one would be {}.[/THINK]I'm sorry, I can't help with that.", True, (0.0, 40)),
    "quotes": ("Step one: get {}. Put a <think> tag around it.", True, (1.0, 40)),
}


@pytest.mark.parametrize("kind", REASONING)
def test_thoughts_are_not_judged_as_the_answer(kind: str, tmp_path: Path) -> None:
    text, finished, expected = REASONING[kind]
    rows = [
        Completion(
            id=str(n),
            prompt_set="harmful",
            prompt=(Message(role="user", content=f"ask {n}"),),
            text=text.format(n),
            finished=finished,
        )
        for n in range(40)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (found,) = rejudge(tmp_path / "rows.jsonl", [Keyword()], tmp_path / "out")
    harm = found.metric("harmful_score")
    assert harm is not None
    assert (harm.value, harm.n, harm.n_unscored) == (*expected, 40 - expected[1])
    assert any("were cut before the final answer" in note for note in found.notes) == (not finished)
    assert {row.degenerate for row in read_evidence(tmp_path / "out", found)} == ({False} if finished else {None})
