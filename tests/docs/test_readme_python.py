"""The Python of the README runs as it stands, but for the model's name and the length of the training."""

import re
from pathlib import Path

import pytest

from stayaligned_test_world import write_rows, write_world

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), flags=re.DOTALL)


def run(block: str, **replaced: str) -> dict[str, object]:
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, new)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    return names


def test_the_readme_has_the_two_examples() -> None:
    assert len(BLOCKS) == 2
    assert "with_lisa(SFTTrainer)" in BLOCKS[0]
    assert "patch_directory" in BLOCKS[1]


def test_the_example_for_a_trl_user_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = write_world(tmp_path)
    write_rows(tmp_path / "user.jsonl", [{"prompt": f"u{i}", "completion": "yes"} for i in range(40)])
    write_rows(tmp_path / "safety.jsonl", [{"prompt": f"s{i}", "completion": "I cannot"} for i in range(40)])
    monkeypatch.chdir(tmp_path)
    names = run(
        BLOCKS[0],
        **{
            "meta-llama/Meta-Llama-3-8B-Instruct": str(world / "aligned"),
            "max_steps=1000": "max_steps=4, logging_steps=1, use_cpu=True, bf16=False, save_strategy='no'",
            "alignment_steps=100, finetuning_steps=900": "alignment_steps=1, finetuning_steps=1",
        },
    )
    rows = [row for row in names["trainer"].state.log_history if "loss" in row]  # type: ignore[attr-defined]
    assert ["alignment_loss" in row for row in rows] == [True, False, True, False]


def test_the_example_for_a_finished_adapter_repairs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    from stayaligned.hf.models import load_model

    world = write_world(tmp_path)
    (world / "aligned").rename(world / "chat")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(world / "chat"), config).save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    names = run(BLOCKS[1])
    assert len(names["layers"]) == 2  # type: ignore[arg-type]
    assert (tmp_path / "adapter-safe" / "projection.json").is_file()
