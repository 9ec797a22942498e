"""`stayaligned align`: its output; bad input is one clear error that leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stayaligned.core.files import fingerprint
from stayaligned.testing import write_pico_adapter
from support.world import write_rows, write_world

Command = Callable[..., tuple[int, str]]
QUICK = ("training.max_steps=2", "max_length=64", "lora.r=2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_rows(root / "empty.jsonl", [])
    write_rows(root / "questions.jsonl", [{"prompt": f"wug {i}"} for i in range(3)])
    shutil.copytree(root / "base", root / "plain")
    (root / "plain" / "chat_template.jinja").unlink()
    shutil.copytree(root / "base", root / "quantised")
    config = json.loads((root / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (root / "quantised" / "config.json").write_text(json.dumps(config))
    (root / "broken.jinja").write_text("{% for m in messages %}{{ m")
    return root


CASES: list[tuple[str, list[str], tuple[str, ...]]] = [
    ("no data is given", ["base"], ("data: required",)),
    ("no such data", ["base", "--data", "{}/nowhere.jsonl"], ("data: ", "nowhere.jsonl does not exist")),
    ("empty data", ["base", "--data", "{}/empty.jsonl"], ("empty.jsonl: no rows",)),
    ("no answers", ["base", "--data", "{}/questions.jsonl"], ("questions.jsonl, line 1: no completion to learn",)),
    ("no such base", ["nowhere", "--data", "DATA"], ("base_model: ", "nowhere does not exist")),
    ("no such hub id", ["owner/absent", "--data", "DATA"], ("owner/absent: no such directory, and no hub repository",)),
    ("no template", ["plain", "--data", "DATA"], ("plain: the tokenizer has no chat template", "--chat-template FILE")),
    (
        "no such template",
        ["plain", "--data", "DATA", "--chat-template", "{}/t.jinja"],
        ("chat_template: ", "t.jinja does not exist"),
    ),
    ("no Jinja file", ["plain", "--data", "DATA", "--chat-template", "{}/t.txt"], ("expected the path of a .jinja",)),
    (
        "no Jinja",
        ["plain", "--data", "DATA", "--chat-template", "{}/broken.jinja"],
        ("plain is not valid Jinja: line 1",),
    ),
    ("a quantised base", ["quantised", "--data", "DATA"], ("quantised: the checkpoint is quantized",)),
    (
        "several unknown settings",
        ["base", "--data", "DATA", "lora.alpha=3", "training.learnin_rate=1", "lenght=3", "training.seed=1"],
        ("4 errors", "lora.alpha", "'learning_rate'", "lenght: no such setting", "training.seed: set by `seed:`"),
    ),
    ("fp16", ["base", "--data", "DATA", "dtype=float16"], ("dtype: expected auto, float32 or bfloat16",)),
    ("full weights, no rate", ["base", "--data", "DATA", "lora=null"], ("training.learning_rate: required",)),
    ("no such target", ["base", "--data", "DATA", "lora.target_modules=[wq]"], ("lora: ", "wq", "q_proj")),
    (
        "a base-changing init",
        ["base", "--data", "DATA", "lora.init_lora_weights=pissa"],
        ("init_lora_weights='pissa'",),
    ),
    ("all prompts too long", ["base", "--data", "DATA", "max_length=8"], ("none of the 12 rows leaves an answer",)),
    ("all answers cut", ["base", "--data", "DATA", "max_length=12"], ("all 12 rows are cut at max_length=12",)),
    ("cut by TRL", ["base", "--data", "DATA", "max_length=12", "trainer=sft"], ("all 12 rows are cut",)),
    ("no number", ["base", "--data", "DATA", "training.learning_rate=fast"], ("training.learning_rate",)),
]


@pytest.mark.parametrize(("_name", "arguments", "expected"), CASES, ids=[name for name, *_ in CASES])
def test_bad_input_is_one_error_and_leaves_nothing_behind(
    world: Path, tmp_path: Path, command: Command, _name: str, arguments: list[str], expected: tuple[str, ...]
) -> None:
    before = fingerprint(world)
    base, *rest = [a.replace("DATA", "{}/alignment.jsonl").format(world) for a in arguments]
    base = base if "/" in base else str(world / base)
    code, shown = command("align", base, *rest, "--out", tmp_path / "out" / "aligned")
    assert code == 2, shown
    assert shown.count("error: ") == 1
    assert "Traceback" not in shown
    for text in expected:
        assert text in shown
    assert not list(tmp_path.rglob("*.*"))
    assert not (tmp_path / "out" / "aligned").exists()
    assert fingerprint(world) == before


def test_an_existing_output_is_never_overwritten(world: Path, tmp_path: Path, command: Command) -> None:
    data = ("--data", world / "alignment.jsonl", *QUICK)
    for out in (world / "aligned", world / "train.jsonl"):
        before = fingerprint(world)
        code, shown = command("align", world / "base", *data, "--out", out)
        assert (code, fingerprint(world)) == (2, before)
        assert "exists already" in shown
    assert command("align", world / "base", *data, "--out", tmp_path / "out")[0] == 0
    before = fingerprint(tmp_path)
    code, shown = command("align", world / "base", *data, "training.learning_rate=1e-4", "--out", tmp_path / "out")
    assert (code, fingerprint(tmp_path)) == (2, before)
    assert "belongs to another alignment; different: training.learning_rate" in shown
    code, shown = command("align", world / "base", *data, "--out", tmp_path / "out")
    assert (code, fingerprint(tmp_path)) == (0, before)
    assert "found finished" in shown


def test_project_accepts_the_aligned_model_and_its_base(world: Path, tmp_path: Path, command: Command) -> None:
    code, shown = command(
        "align", world / "base", "--data", world / "alignment.jsonl", *QUICK, "--out", tmp_path / "aligned"
    )
    assert code == 0, shown
    assert "12 rows, 2 steps" in shown
    write_pico_adapter(tmp_path / "adapter", tmp_path / "aligned", target_modules="all-linear")
    code, shown = command(
        *("project", tmp_path / "adapter", "--aligned", tmp_path / "aligned", "--base", world / "base"),
        *("--all", "--out", tmp_path / "adapter-safe"),
    )
    assert code == 0, shown
    assert "14 of 14 layers changed" in shown


def test_the_command_line_overrides_settings_of_a_file(world: Path, tmp_path: Path, command: Command) -> None:
    content = {
        "base_model": str(world / "base"),
        "data": str(world / "questions.jsonl"),
        "training": {"max_steps": 5},
        "lora": {"r": 2},
        "max_length": 64,
    }
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(content))
    code, shown = command("validate", file, "lora.r=3")
    assert code == 0, shown
    assert "a valid alignment of" in shown
    code, shown = command("validate", file, "lora.rr=3")
    assert (code, "lora.rr" in shown) == (2, True)
    code, shown = command(
        "align", file, "training.max_steps=2", "--data", world / "alignment.jsonl", "--out", tmp_path / "aligned"
    )
    assert code == 0, shown
    made = json.loads((tmp_path / "aligned" / "alignment.json").read_text())
    assert made["steps"] == 2
    assert made["alignment"]["lora"]["r"] == 2
    assert made["alignment"]["data"] == str(world / "alignment.jsonl")
