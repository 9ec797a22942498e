"""Plain fine-tuning: two kinds of trainer that train the same, and errors that name the cause."""

from __future__ import annotations

import dataclasses
import re
import resource
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer
from trl import SFTTrainer

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.defenses import TrainingSetup
from stayaligned.hf.features import encode_example
from stayaligned.hf.training.finetuning import build_dataset, save_trained, train
from stayaligned.testing import byte_tokenizer, pico_model

KINDS: tuple[Literal["transformers", "sft"], ...] = ("transformers", "sft")


def examples(count: int) -> list[Example]:
    return [
        Example(id=f"row-{i}", prompt=(Message(role="user", content="q" * i),), completion=f"answer {i}")
        for i in range(count)
    ]


def setup(directory: Path, kind: Literal["transformers", "sft"] = "transformers", **arguments: Any) -> TrainingSetup:
    settings = {
        "output_dir": str(directory),
        "seed": 1,
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return TrainingSetup(
        model=pico_model(),
        tokenizer=byte_tokenizer(),
        examples=examples(7),
        alignment_examples=[],
        arguments={**settings, **arguments},
        kind=kind,
        max_length=64,
    )


def test_both_kinds_of_trainer_train_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = []
    for kind, trainer_class in zip(KINDS, (Trainer, SFTTrainer), strict=True):
        trainer = setup(tmp_path, kind).trainer()
        assert type(trainer) is trainer_class
        logs.append([(row["loss"], row["learning_rate"]) for row in train(trainer) if "loss" in row])
    assert len(logs[0]) == 4
    torch.testing.assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-6, atol=0)
    output = capsys.readouterr()
    assert output.out == ""
    assert "%|" not in output.err


def test_the_rows_of_both_kinds_of_trainer_are_those_of_encode_example(tmp_path: Path) -> None:
    expected = [encode_example(byte_tokenizer(), example, 64) for example in examples(7)]
    assert build_dataset(byte_tokenizer(), examples(7), kind="transformers", max_length=64) == expected
    prepared: Any = setup(tmp_path, "sft").trainer().train_dataset
    assert [{key: row[key] for key in ("input_ids", "labels")} for row in prepared] == expected


def test_training_lowers_the_loss_and_reports_progress(tmp_path: Path) -> None:
    shares: list[float] = []
    details: list[str] = []
    made = setup(tmp_path, num_train_epochs=8)

    def progress(share: float, detail: str = "", /) -> None:
        shares.append(share)
        details.append(detail)

    log = train(made.trainer(), progress=progress)
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    assert shares == [pytest.approx((step + 1) / 32) for step in range(32)]
    assert re.fullmatch(r"step 32 of 32, loss [0-9.]+", details[-1])


def test_without_an_accelerator_training_uses_the_cpu_in_full_precision(tmp_path: Path) -> None:
    for kind in KINDS:
        arguments = setup(tmp_path, kind).trainer(examples(3)).args
        assert arguments.use_cpu is not torch.accelerator.is_available()
        assert arguments.bf16 is (kind == "sft" and torch.accelerator.is_available())
        assert not arguments.gradient_checkpointing
        assert arguments.report_to == []


@pytest.mark.parametrize(
    ("argument", "message", "hint"),
    [
        ({"warmup_ratio": 0.1}, "training.warmup_ratio: TrainingArguments has no such setting", "`warmup_steps`"),
        ({"learning_rat": 0.1}, "training.learning_rat", "Did you mean 'learning_rate'?"),
        ({"learning_rate": "1e-5"}, "training.learning_rate: '1e-5' is text", "write 1.0e-5"),
        ({"optim": "adamm"}, "training.optim: TrainingArguments rejects: adamm is not a valid", "documentation"),
        ({"fp16": True, "bf16": True}, "training.bf16, training.fp16: TrainingArguments rejects", "documentation"),
        ({"eval_strategy": "epoch"}, "training.eval_strategy: Trainer rejects: You have set", "documentation"),
    ],
)
def test_arguments_that_the_host_rejects_are_named(
    tmp_path: Path, argument: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(StayalignedError) as caught:
        setup(tmp_path, **argument).trainer(examples(3))
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_all_wrong_arguments_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError) as caught:
        setup(tmp_path, "sft", warmup_ratio=0.1, tokenizer="x", max_steps="3").trainer(examples(3))
    assert [line.split(":")[0] for line in caught.value.message.splitlines()] == [
        "training.warmup_ratio",
        "training.tokenizer",
        "training.max_steps",
    ]
    assert "SFTConfig has no such setting" in caught.value.message


def test_missing_rows_and_a_missing_chat_template_are_errors(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="no rows to train on"):
        setup(tmp_path).trainer([])
    for kind in KINDS:
        made = setup(tmp_path, kind)
        made.tokenizer.chat_template = None
        with pytest.raises(StayalignedError, match="no chat template"):
            made.trainer(examples(3))


@pytest.mark.parametrize("moment", ["before a checkpoint", "after a checkpoint"])
def test_another_error_during_training_is_not_reported_as_a_full_disk(tmp_path: Path, moment: str) -> None:
    trainer = setup(tmp_path, save_strategy="steps", save_steps=1).trainer()

    def fail(*_: Any) -> None:
        if trainer.state.global_step == 2:
            raise FileNotFoundError("rows.jsonl")

    trainer.model.register_forward_pre_hook(fail if moment == "after a checkpoint" else lambda *_: None)  # pyright: ignore
    with pytest.raises(FileNotFoundError, match="rows"):
        train(trainer, progress=fail if moment == "before a checkpoint" else None)
    written = tmp_path / "checkpoint-2" / "trainer_state.json"
    assert written.is_file() is (moment == "after a checkpoint")


def test_lora_layers_without_a_gradient_are_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for architecture, targets in (("llama", "all-linear"), ("mamba", ["dt_proj", "in_proj"])):
        given = setup(tmp_path, max_steps=2)
        model: Any = get_peft_model(pico_model(architecture), LoraConfig(r=2, target_modules=targets))
        train(dataclasses.replace(given, model=model).trainer(), resume=False)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("stayaligned")]
    (line,) = messages
    assert line.startswith("LoRA gets no gradient in 2 layers dt_proj and will learn nothing there")


def test_a_mixture_whose_router_loss_trl_cannot_compute_is_an_error(tmp_path: Path) -> None:
    given = dataclasses.replace(setup(tmp_path, "sft", max_steps=1), model=pico_model("granitemoehybrid"))
    with pytest.raises(StayalignedError, match=r"router loss of a GraniteMoeHybridConfig") as caught:
        given.trainer()
    assert "training.router_aux_loss_coef to 0.0" in str(caught.value)
    train(dataclasses.replace(given, arguments={**given.arguments, "router_aux_loss_coef": 0.0}).trainer())


def test_a_full_disk_while_writing_the_result_is_one_error(tmp_path: Path) -> None:
    trainer = setup(tmp_path).trainer()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StayalignedError, match=r"model can't be written: .*File too large"):
            save_trained(trainer, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    save_trained(trainer, tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == trainer.model.state_dict().keys()  # pyright: ignore
