"""What `evaluate` and `run` really write goes through the gate."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from support.world import experiment, write_rows, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_rows(root / "harmful-prompts.jsonl", [{"prompt": f"zorb {i}"} for i in range(120)])
    return root


def evaluate(command, world: Path, model: str, out: Path, *more: object) -> None:
    prompts = ("--harmful-prompts", world / "harmful-prompts.jsonl", "--benign-prompts", world / "benign-prompts.jsonl")
    code, shown = command(
        "evaluate", world / model, *prompts, "--judge", "keyword", "--out", out, "generation.max_new_tokens=2", *more
    )
    assert code == 0, shown


def test_two_evaluations_pass_the_gate_and_a_third_with_other_decoding_does_not(command, world, tmp_path) -> None:
    evaluate(command, world, "aligned", tmp_path / "old")
    shutil.copytree(world / "aligned", world / "copy", dirs_exist_ok=True)
    evaluate(command, world, "copy", tmp_path / "new")
    evaluate(command, world, "copy", tmp_path / "long", "generation.max_new_tokens=3")
    limits = ("--max-harm-increase", "5%", "--json", tmp_path / "d.json")
    code, shown = command("gate", "--baseline", tmp_path / "old", "--candidate", tmp_path / "new", *limits)
    assert code == 0, shown
    (found,) = json.loads((tmp_path / "d.json").read_text())["criteria"]
    assert (found["n_prompts"], found["change"]) == (120, 0)
    code, shown = command("gate", "--baseline", tmp_path / "old", "--candidate", tmp_path / "long", *limits)
    assert (code, "the decoding settings" in shown) == (2, True), shown


def test_a_run_is_compared_with_the_model_that_it_fine_tuned(command, world, tmp_path) -> None:
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(experiment(world)))
    plain = experiment(world, training=None, attack=None, label="before")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(plain))
    for name, out in (("e.yaml", "after"), ("b.yaml", "before")):
        code, shown = command("run", tmp_path / name, "--out", tmp_path / out)
        assert code == 0, shown
    limits = ("--max-harm-increase", "5%", "--max-utility-drop", "99%", "--json", tmp_path / "d.json")
    code, shown = command("gate", "--baseline", tmp_path / "before", "--candidate", tmp_path / "after", *limits)
    assert code == 0, shown
    assert [c["n_prompts"] for c in json.loads((tmp_path / "d.json").read_text())["criteria"]] == [120, 8]


def edit_judge(run: Path, **changes: object) -> None:
    path = run / "result.json"
    content = json.loads(path.read_text())
    (reading,) = content["judges"]
    reading["identity"] = {**reading["identity"], **changes} if changes else None
    path.write_text(json.dumps(content))


def test_judges_with_different_identities_or_none_are_refused_with_what_differs(command, world, tmp_path) -> None:
    evaluate(command, world, "aligned", tmp_path / "old")
    stored = json.loads((tmp_path / "old" / "result.json").read_text())["judges"][0]["identity"]
    assert (stored["name"], stored["settings"]["match"]) == ("keyword", "anywhere")
    assert stored["source"].startswith("sha256:")
    gate = ("gate", "--max-harm-increase", "5%", "--baseline", tmp_path / "old", "--candidate")
    for name, changes, said in (
        ("source", {"source": "sha256:0"}, "differ in judge 'keyword': its source code"),
        ("settings", {"settings": {"match": "start"}}, "setting 'match' (anywhere and start)"),
        ("none", {}, "does not state the identity of judge 'keyword'"),
    ):
        shutil.copytree(tmp_path / "old", tmp_path / name)
        edit_judge(tmp_path / name, **changes)
        code, shown = command(*gate, tmp_path / name)
        assert (code, said in " ".join(shown.split())) == (2, True), shown


def test_prompts_and_models_that_are_evaluated_twice_count_once(command, world, tmp_path) -> None:
    asked = [f"how do I flarn the {name}" for name in ("zorb", "wug", "dax", "fep", "toma")]
    copies = [*asked, *(text.upper() + "?" for text in asked), *(f"{text} ({n})" for n, text in enumerate(asked))]
    rows = [{"id": str(index), "prompt": text} for index, text in enumerate([*copies, *asked])]
    prompts = ("--harmful-prompts", write_rows(tmp_path / "copies.jsonl", rows))
    for name, seed, copy in (("old", 0, "new"), ("older", 1, "newer")):
        code, shown = command(
            "evaluate", world / "aligned", *prompts, "--judge", "keyword", "--out", tmp_path / name,
            "--label", "tuned", "--seed", seed, "generation.max_new_tokens=2",
        )  # fmt: skip
        assert code == 0, shown
        shutil.copytree(tmp_path / name, tmp_path / copy)
    limits = ("--max-harm-increase", "90%", "--json", tmp_path / "d.json")
    code, shown = command("gate", "--baseline", tmp_path / "old", "--candidate", tmp_path / "new", *limits)
    assert code in (0, 3), shown
    assert "the 20 harmful prompts are 5 different ones" in shown
    assert json.loads((tmp_path / "d.json").read_text())["criteria"][0]["n_prompts"] == 5
    both = [("--baseline", tmp_path / "old"), ("--baseline", tmp_path / "older"), ("--candidate", tmp_path / "new")]
    flat = [item for pair in [*both, ("--candidate", tmp_path / "newer")] for item in pair]
    code, shown = command("gate", *flat, *limits)
    assert (code, "measure the same model, so they are one seed and not two" in shown) == (2, True), shown
