"""A Lisa run that is stopped after any step and resumed equals the uninterrupted run bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from stayaligned import LisaSettings, StayalignedError, attach_lisa, with_lisa
from stayaligned.hf.features import PaddingCollator
from stayaligned.hf.training.finetuning import train
from stayaligned.testing import pico_model

LISA = LisaSettings(alignment_steps=2, finetuning_steps=3, rho=0.7)
STEPS = 10
Row = dict[str, list[int]]


def rows(first: int, count: int) -> list[Row]:
    made = [[first, *range(10 + i, 14 + 2 * i)] for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def trainer(
    directory: Path,
    lora: bool = True,
    lisa: LisaSettings = LISA,
    users: int = 14,
    first_user_token: int = 3,
    architecture: str = "llama",
    **changes: Any,
) -> Trainer:
    model: Any = pico_model(architecture, seed=3, attention_dropout=0.1)
    if lora:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return with_lisa(Trainer)(
        model,
        TrainingArguments(**{**settings, **changes}),
        train_dataset=rows(first_user_token, users),  # pyright: ignore
        data_collator=PaddingCollator(0),
        alignment_dataset=rows(2, 5),
        lisa=lisa,
    )


def trainable(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}  # pyright: ignore


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """An uninterrupted run that kept a checkpoint of every step."""
    directory = tmp_path_factory.mktemp("whole")
    run = trainer(directory)
    run.train()
    return directory, run


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_resumed_after_any_step_equals_the_uninterrupted_run(
    whole: tuple[Path, Trainer], tmp_path: Path, step: int
) -> None:
    directory, uninterrupted = whole
    resumed = trainer(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
    expected = trainable(uninterrupted)
    for name, weight in trainable(resumed).items():
        assert torch.equal(weight, expected[name]), name
    timeless = [
        [{k: v for k, v in row.items() if k != "epoch"} for row in run.state.log_history if "loss" in row]
        for run in (uninterrupted, resumed)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])  # the host alone does not load the experts of a mixture
def test_full_weights_resumed_in_the_middle_of_a_phase_equal_the_uninterrupted_run(
    tmp_path: Path, architecture: str
) -> None:
    run = trainer(tmp_path / "a", lora=False, architecture=architecture, max_steps=5, save_steps=4)
    run.train()
    resumed = trainer(tmp_path / "b", lora=False, architecture=architecture, max_steps=5, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    expected = trainable(run)
    assert all(torch.equal(weight, expected[name]) for name, weight in trainable(resumed).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"proximal": "decoupled", "rho": 20.0},
        pytest.param(
            {"finish": "alignment", "rho_schedule": "rising", "anchor_device": "cpu", "drift_from_start": True},
            marks=pytest.mark.slow,
        ),
        pytest.param({"alignment_loss_budget": 0.0, "rho": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_every_variant_resumes_bit_for_bit_after_any_step(tmp_path: Path, changes: dict[str, Any]) -> None:
    lisa = replace(LISA, **{"proximal_warmup_ratio": 0.0, **changes})
    run = trainer(tmp_path / "a", lisa=lisa)
    run.train()
    rhos = {row["rho"] for row in run.state.log_history if "rho" in row}
    assert (len(rhos) > 1) == ("alignment_loss_budget" in changes), "rho adapts only with alignment_loss_budget"
    for step in range(1, STEPS):
        resumed = trainer(tmp_path / "b", lisa=lisa, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        expected = trainable(run)
        assert all(torch.equal(weight, expected[name]) for name, weight in trainable(resumed).items()), step
        kept = [
            [{k: v for k, v in row.items() if k != "epoch"} for row in each.state.log_history if "loss" in row]
            for each in (run, resumed)
        ]
        assert kept[0] == kept[1]


def test_streams_resume_bit_for_bit(tmp_path: Path) -> None:
    def run(directory: Path, **changes: Any) -> Trainer:
        built = trainer(directory, **changes)
        users = Dataset.from_list(rows(3, 14)).to_iterable_dataset()
        plain = Trainer(built.model, built.args, train_dataset=users, data_collator=PaddingCollator(0))  # pyright: ignore
        return attach_lisa(plain, alignment_dataset=rows(2, 5), lisa=LISA)

    whole = run(tmp_path / "a")
    whole.train()
    for step in (1, 4, 5, 8):  # beyond one pass over the stream of 14 rows
        resumed = run(tmp_path / "b", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        expected = trainable(whole)
        assert all(torch.equal(weight, expected[name]) for name, weight in trainable(resumed).items()), step


def test_resuming_with_true_starts_if_there_is_no_checkpoint_and_skips_an_incomplete_one(
    whole: tuple[Path, Trainer], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    first = trainer(directory, save_strategy="no")
    first.train(resume_from_checkpoint=True)
    for step in (3, 4):
        shutil.copytree(whole[0] / f"checkpoint-{step}", directory / f"checkpoint-{step}")
    (directory / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = trainer(directory, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    done = trainer(tmp_path / "done", save_strategy="no")
    shutil.copytree(whole[0] / f"checkpoint-{STEPS}", tmp_path / "done" / f"checkpoint-{STEPS}")
    assert done.train(resume_from_checkpoint=True).global_step == STEPS
    expected = trainable(whole[1])
    for run in (first, resumed, done):
        assert all(torch.equal(weight, expected[name]) for name, weight in trainable(run).items())


def test_a_resumed_run_uses_the_anchor_of_the_checkpoint(whole: tuple[Path, Trainer], tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(whole[0] / "checkpoint-4", copy)
    anchor = copy / "lisa_anchor.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(anchor).items()}, anchor)
    resumed = trainer(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(copy))
    expected = trainable(whole[1])
    assert not all(torch.equal(weight, expected[name]) for name, weight in trainable(resumed).items())


def test_train_resumes_the_last_complete_checkpoint(whole: tuple[Path, Trainer], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    for step in (3, 4):
        shutil.copytree(whole[0] / f"checkpoint-{step}", directory / f"checkpoint-{step}")
    state = directory / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])  # as if the machine had stopped while writing it
    resumed = trainer(directory, save_strategy="no")
    shares: list[float] = []
    log = train(resumed, progress=lambda share, _detail="", /: shares.append(share))
    assert shares == [pytest.approx(step / STEPS) for step in range(4, STEPS + 1)]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, STEPS + 1))
    expected = trainable(whole[1])
    assert all(torch.equal(weight, expected[name]) for name, weight in trainable(resumed).items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lisa": replace(LISA, rho=0.5)}, "rho=0.7 in the checkpoint, 0.5 now"),
        ({"lisa": replace(LISA, finetuning_steps=4)}, "finetuning_steps=3 in the checkpoint, 4 now"),
        ({"lisa": replace(LISA, proximal="decoupled")}, "proximal=coupled in the checkpoint, decoupled now"),
        ({"lisa": replace(LISA, finish="alignment")}, "finish=cycle in the checkpoint, alignment at 10 now"),
        ({"users": 13}, r"the number of rows of train_dataset \(14 in the checkpoint, 13 now\)"),
        ({"first_user_token": 4}, "the rows of train_dataset, or their order"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size=2 in the checkpoint, 4 now"),
        ({"seed": 5}, "seed=42 in the checkpoint, 5 now"),
        ({"learning_rate": 5e-4}, "learning_rate=.* in the checkpoint, 0.0005 now"),
        ({"weight_decay": 0.1}, "weight_decay=0.0 in the checkpoint, 0.1 now"),
        ({"max_steps": 20}, "max_steps=10 in the checkpoint, 20 now"),
        ({"max_steps": 9}, "max_steps=10 in the checkpoint, 9 now"),
    ],
)
def test_a_checkpoint_of_another_run_is_an_error_that_lists_the_differences(
    whole: tuple[Path, Trainer], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(StayalignedError, match="is of another run; different: .*" + named):
        trainer(tmp_path, **changes).train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))


def test_a_checkpoint_with_a_missing_or_damaged_anchor_is_an_error(whole: tuple[Path, Trainer], tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(whole[0] / "checkpoint-4", copy)
    anchor = copy / "lisa_anchor.safetensors"
    stored = load_file(anchor)
    name = next(iter(stored))

    def resume() -> None:
        trainer(tmp_path, save_strategy="no").train(resume_from_checkpoint=str(copy))

    save_file({k: v for k, v in stored.items() if k != name}, anchor)
    with pytest.raises(StayalignedError, match="another model.*" + name.replace(".", r"\.")):
        resume()
    anchor.write_bytes(anchor.read_bytes()[:40])
    with pytest.raises(StayalignedError, match=r"lisa_anchor\.safetensors is damaged"):
        resume()
    anchor.unlink()
    with pytest.raises(StayalignedError, match=r"lisa_anchor\.safetensors is missing"):
        resume()
    (copy / "lisa.json").write_text("{")
    save_file(stored, anchor)
    with pytest.raises(StayalignedError, match=r"lisa\.json is not valid JSON"):
        resume()
    (copy / "lisa.json").unlink()
    with pytest.raises(StayalignedError, match=r"lisa\.json is missing"):
        resume()


def test_with_rho_0_a_checkpoint_has_no_anchor_and_resumes(tmp_path: Path) -> None:
    bso = replace(LISA, rho=0.0)
    run = trainer(tmp_path / "a", lisa=bso, max_steps=4, save_steps=3)
    run.train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert not (checkpoint / "lisa_anchor.safetensors").exists()
    assert json.loads((checkpoint / "lisa.json").read_text())["rho"] == 0.0
    resumed = trainer(tmp_path / "b", lisa=bso, max_steps=4, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = trainable(run)
    assert all(torch.equal(weight, expected[name]) for name, weight in trainable(resumed).items())


def test_training_again_without_resume_starts_with_a_fresh_anchor(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3, save_strategy="no")
    run.train()
    start = trainable(run)
    moved: list[float] = []

    class AtTheEndOfTheFirstPhase(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == LISA.alignment_steps:
                now = trainable(run)
                moved.append(torch.cat([(now[n] - start[n]).flatten() for n in start]).norm().item())

    run.add_callback(AtTheEndOfTheFirstPhase())
    run.train()
    (drift,) = [
        row["drift"] for row in run.state.log_history if row.get("step") == LISA.alignment_steps and "drift" in row
    ]
    assert drift == pytest.approx(moved[0], rel=1e-5)
