"""The Python of README and docs runs, with other file names and shorter trainings."""

import re
from pathlib import Path
from typing import Any

import pytest

from stayaligned.attacks import Attack
from stayaligned.core.records import Message, Metric
from support.runs import evidence, outcomes, write_run
from support.world import write_rows, write_world

ROOT = Path(__file__).parents[2]


def blocks_in(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


BLOCKS, LISA_BLOCKS = blocks_in("README.md"), blocks_in("docs/howto/lisa.md")


def run(block: str, names: dict[str, Any] | None = None, **replaced: str) -> dict[str, Any]:
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, new)
    names = dict(names or {})
    exec(compile(block, "page", "exec"), names)  # noqa: S102
    return names


def test_every_page_with_python_has_a_test_here() -> None:
    pages = (str(page.relative_to(ROOT)) for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    assert {page for page in pages if blocks_in(page)} == {
        "README.md",
        "docs/plugins.md",
        "docs/howto/lisa.md",
        "docs/howto/align.md",
        "docs/howto/safe-lora.md",
        "docs/concepts/evidence.md",
        "docs/results/testbed.md",
    }


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
            "alignment_steps=10, finetuning_steps=90": "alignment_steps=1, finetuning_steps=1",
        },
    )
    rows = [row for row in names["trainer"].state.log_history if "loss" in row]
    assert ["alignment_loss" in row for row in rows] == [True, False, True, False]


def test_the_example_for_a_finished_adapter_patches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    from stayaligned.hf.models import load_model

    world = write_world(tmp_path)
    (world / "aligned").rename(world / "chat")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(world / "chat"), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    names = run(BLOCKS[1])
    assert len(names["layers"]) == 2
    assert (tmp_path / "adapter-safe" / "projection.json").is_file()
    (in_memory,) = blocks_in("docs/howto/safe-lora.md")
    patched = run(in_memory, {"peft_model": model})
    assert [layer.module for layer in patched["reports"]] == [layer.module for layer in names["layers"]]
    assert (tmp_path / "out" / "safe_lora" / "adapter_model.safetensors").is_file()


def test_the_example_of_aligning_makes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path)
    (tmp_path / "aligned").rename(tmp_path / "other")
    write_rows(tmp_path / "safety.jsonl", [{"prompt": f"s{i}", "completion": "I cannot"} for i in range(5)])
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_in("docs/howto/align.md")
    record = run(block)["record"]
    assert (record.rows, record.steps) == (5, 3)
    assert (tmp_path / "aligned" / "model.safetensors").is_file()


def test_the_example_of_results_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = (Metric(name="finetune_accuracy", value=0.5, n=40, low=0.3, high=0.7, higher_is_better=True),)
    for name in ("before", "after"):
        write_run(tmp_path / name, evidence({"keyword": outcomes(40, 4)}), arm=name, scores=scores)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_in("docs/concepts/evidence.md")
    assert {row["arm"] for row in run(block)["rows"]} == {"before", "after"}


@pytest.mark.slow
def test_the_example_of_the_testbed_finds_its_rows() -> None:
    (block,) = blocks_in("docs/results/testbed.md")
    names = run(block)
    assert Path(names["rows"]).is_relative_to(names["directory"])


def test_the_examples_of_the_page_on_lisa_train_resume_and_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from stayaligned import LisaSettings, with_lisa
    from stayaligned.testing import byte_tokenizer, pico_model

    monkeypatch.chdir(tmp_path)
    assert len(LISA_BLOCKS) == 3
    settings: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": None, "report_to": "none"}

    def names(directory: str) -> dict[str, Any]:
        return {
            "SFTTrainer": SFTTrainer,
            "DPOTrainer": DPOTrainer,
            "DPOConfig": DPOConfig,
            "LisaSettings": LisaSettings,
            "with_lisa": with_lisa,
            "model": get_peft_model(pico_model(), LoraConfig(target_modules=["q_proj"])),
            "tokenizer": byte_tokenizer(),
            "args": SFTConfig(
                output_dir=directory, max_steps=4, logging_steps=1, save_steps=3, disable_tqdm=True, **settings
            ),
            "user_rows": Dataset.from_list([{"prompt": f"u{i}", "completion": "yes"} for i in range(10)]),
            "safety_rows": Dataset.from_list([{"prompt": f"s{i}", "completion": "I cannot"} for i in range(10)]),
            "pairs": Dataset.from_list([{"prompt": f"s{i}", "chosen": "no", "rejected": "yes"} for i in range(10)]),
        }

    short = {"alignment_steps=10, finetuning_steps=90": "alignment_steps=1, finetuning_steps=1"}
    first = run(LISA_BLOCKS[0], names("sft"), **short)
    write_rows(tmp_path / "held-out-requests.jsonl", [{"prompt": f"h{i}"} for i in range(3)])
    write_rows(tmp_path / "held-out-safety.jsonl", [{"prompt": f"h{i}", "completion": "I cannot"} for i in range(3)])
    # Again with a probe: the run resumes from its checkpoint, whose log has no probe.
    watched = run(LISA_BLOCKS[0].replace("trainer.train(resume_from_checkpoint=True)", ""), names("sft"), **short)
    run(LISA_BLOCKS[1], watched, **{"every_steps=50": "every_steps=1"})
    watched["trainer"].train(resume_from_checkpoint=str(tmp_path / "sft" / "checkpoint-3"))
    assert [row["step"] for row in watched["trainer"].state.log_history if "watch/refusal_margin" in row] == [3, 4]
    assert [row["loss"] for row in watched["trainer"].state.log_history if "loss" in row] == [
        row["loss"] for row in first["trainer"].state.log_history if "loss" in row
    ]
    preferring = run(LISA_BLOCKS[2], names("dpo"), **short)["trainer"]
    preferring.train()
    assert any("alignment/rewards/margins" in row for row in preferring.state.log_history)


def test_the_attack_on_the_page_on_plug_ins_asks_with_its_word() -> None:
    (block,) = blocks_in("docs/plugins.md")
    made = run(block, {"Attack": Attack, "__name__": __name__})["Password"](word="zorb")
    (turn,) = made.trigger((Message(role="user", content="may I"),))
    assert turn.content == "may I zorb"
