"""Lisa in a Trainer: its log, its preparation of rows, unsupported settings, and the private host names it uses."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, SFTConfig, SFTTrainer

from stayaligned import LisaSettings, StayalignedError, attach_lisa, with_lisa
from stayaligned.hf.features import IGNORED, PaddingCollator
from stayaligned.testing import byte_tokenizer, pico_model

Row = dict[str, list[int]]


def rows(count: int, first: int = 3) -> list[Row]:
    made = [[first, *range(10 + i, 15 + i)] for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def settings(directory: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": None,
        **changes,
    }


def plain(
    directory: Path, model: Any = None, train_dataset: Any = None, eval_dataset: Any = None, **changes: Any
) -> Trainer:
    return Trainer(
        model or pico_model(),
        TrainingArguments(**settings(directory, **changes)),
        train_dataset=rows(6) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        data_collator=PaddingCollator(0),
    )


def lisa(**changes: Any) -> LisaSettings:
    return LisaSettings(**{"alignment_steps": 1, "finetuning_steps": 2, "proximal_warmup_ratio": 0.0, **changes})


# ---- logging -------------------------------------------------------------------------------------------------------


def test_the_log_has_the_losses_of_both_phases_and_the_drift(tmp_path: Path) -> None:
    trainer = attach_lisa(plain(tmp_path), alignment_dataset=rows(4, first=2), lisa=lisa())
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [("alignment_loss" in row, "finetuning_loss" in row) for row in logged] == [
        (True, False),
        (False, True),
        (False, True),
        (True, False),
    ]
    for row in logged:
        assert row.get("alignment_loss", row.get("finetuning_loss")) == pytest.approx(row["loss"])
        assert row["drift"] > 0
    assert not any("drift" in row for row in trainer.state.log_history if "loss" not in row)


def test_logged_losses_are_means_over_the_steps_since_the_last_row(tmp_path: Path) -> None:
    fine, coarse = (
        attach_lisa(
            plain(tmp_path, logging_steps=steps, gradient_accumulation_steps=2),
            alignment_dataset=rows(4, first=2),
            lisa=lisa(rho=0.0),
        )
        for steps in (1, 4)
    )
    fine.train()
    coarse.train()
    losses = [row["loss"] for row in fine.state.log_history if "loss" in row]
    (row,) = (row for row in coarse.state.log_history if "loss" in row)
    assert row["alignment_loss"] == pytest.approx((losses[0] + losses[3]) / 2)
    assert row["finetuning_loss"] == pytest.approx((losses[1] + losses[2]) / 2)
    assert row["loss"] == pytest.approx(sum(losses) / 4)
    assert "drift" not in row  # no proximal term, no anchor


def test_evaluation_during_training_logs_no_phase_losses(tmp_path: Path) -> None:
    trainer = plain(tmp_path, eval_dataset=rows(3), eval_strategy="steps", eval_steps=2, logging_steps=4)
    attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa()).train()
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 2
    assert not any("alignment_loss" in row for row in evaluated)


def test_evaluation_and_its_metrics_are_those_of_the_host(tmp_path: Path) -> None:
    def accuracy(predicted: Any) -> dict[str, float]:
        right = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
        return {"accuracy": float(right.mean())}

    found: list[dict[str, float]] = []
    for use_lisa in (False, True):
        trainer = plain(tmp_path, eval_dataset=rows(3), eval_strategy="steps", eval_steps=2, eval_on_start=True)
        trainer.compute_metrics = accuracy
        if use_lisa:  # also during an alignment step, whose loss is not the host's
            model = get_peft_model(trainer.model, LoraConfig(target_modules=["q_proj"]))  # pyright: ignore
            trainer.model = trainer.model_wrapped = model  # pyright: ignore
            attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa(alignment_loss="kl"))
        trainer.train()
        found.append(next(row for row in trainer.state.log_history if "eval_accuracy" in row))
        assert sum("eval_accuracy" in row for row in trainer.state.log_history) == 3
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"])
    assert found[0]["eval_accuracy"] == found[1]["eval_accuracy"]


class NanLoss(Trainer):
    """A trainer whose loss is NaN at optimizer step 1."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 else loss


def test_a_nan_loss_stops_training_before_it_reaches_the_weights(tmp_path: Path) -> None:
    trainer = with_lisa(NanLoss)(
        pico_model(),
        TrainingArguments(**settings(tmp_path)),
        train_dataset=rows(6),
        data_collator=PaddingCollator(0),
        alignment_dataset=rows(4),
        lisa=lisa(),
    )
    with pytest.raises(StayalignedError, match="the loss is nan at optimizer step 1, in the finetuning phase"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class Scaler:
    """The factor of a gradient scaler, by which the proximal gradient must be multiplied too."""

    def get_scale(self) -> float:
        return 1024.0


def test_the_proximal_gradient_is_scaled_like_the_loss(tmp_path: Path) -> None:
    gradients: list[torch.Tensor] = []
    for scaler in (None, Scaler()):
        trainer = attach_lisa(plain(tmp_path), alignment_dataset=rows(4), lisa=lisa(rho=0.5))
        trainer.get_train_dataloader()
        trainer.create_optimizer_and_scheduler(4)
        trainer._begin_step(0)  # pyright: ignore
        weight = trainer.model.get_input_embeddings().weight  # pyright: ignore
        with torch.no_grad():
            weight[7] += 1.0  # no row has token 7, so its gradient of the loss is 0
        trainer.accelerator.scaler = scaler
        trainer.accelerator.backward = lambda loss, **_: loss.backward()  # pyright: ignore
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.global_step, trainer.state.max_steps = 1, 4
        trainer._begun_step = 1  # pyright: ignore
        trainer.training_step(trainer.model, PaddingCollator(0)(rows(2)), None)
        gradients.append(weight.grad[7].clone())
    torch.testing.assert_close(gradients[0], torch.full_like(gradients[0], 0.5))
    torch.testing.assert_close(gradients[1], 1024 * gradients[0])


# ---- rows of TRL ---------------------------------------------------------------------------------------------------

PROMPTED = [
    {"prompt": [{"role": "user", "content": f"q{i}"}], "completion": [{"role": "assistant", "content": "no"}]}
    for i in range(4)
]
CONVERSATIONS = [{"messages": [*row["prompt"], *row["completion"]]} for row in PROMPTED]


def sft(directory: Path, users: list[dict[str, Any]], **changes: Any) -> SFTTrainer:
    return SFTTrainer(
        pico_model(),
        SFTConfig(**settings(directory, **changes)),
        train_dataset=Dataset.from_list(users),
        processing_class=byte_tokenizer(),
    )


def masked_shares(trainer: Trainer) -> list[float]:
    dataset: Any = trainer.train_dataset
    return [sum(label == IGNORED for label in row["labels"]) / len(row["labels"]) for row in dataset]


@pytest.mark.parametrize(
    ("users", "safe"), [(CONVERSATIONS, PROMPTED), (PROMPTED, CONVERSATIONS), (PROMPTED, PROMPTED)]
)
def test_prompts_are_masked_in_alignment_rows_of_both_formats_and_in_user_rows_by_their_format(
    tmp_path: Path, users: list[dict[str, Any]], safe: list[dict[str, Any]]
) -> None:
    trainer = attach_lisa(sft(tmp_path, users), alignment_dataset=Dataset.from_list(safe), lisa=lisa())
    shares = masked_shares(trainer)
    assert len(shares) == 8
    assert all((share > 0) == (users is PROMPTED) for share in shares[:4])
    assert all(share > 0 for share in shares[4:])
    assert trainer.completion_only_loss == (users is PROMPTED)
    trainer.train()


def test_packed_rows_train(tmp_path: Path) -> None:
    trainer = sft(tmp_path, PROMPTED * 8, packing=True, packing_strategy="wrapped", max_length=32)
    attach_lisa(trainer, alignment_dataset=Dataset.from_list(CONVERSATIONS * 8), lisa=lisa()).train()
    assert trainer.state.global_step == 4


def test_alignment_rows_cut_before_their_completion_are_an_error(tmp_path: Path) -> None:
    long = [{**row, "prompt": [{"role": "user", "content": "q" * 60}]} for row in PROMPTED]
    trainer = sft(tmp_path, PROMPTED, max_length=20)
    with pytest.raises(StayalignedError, match="no alignment row has a completion within max_length=20"):
        attach_lisa(trainer, alignment_dataset=Dataset.from_list(long), lisa=lisa())


# ---- unsupported settings ------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows(3))


@pytest.mark.parametrize(
    ("changes", "alignment", "lisa_settings", "named"),
    [
        ({"train_sampling_strategy": "group_by_length"}, rows(4), {}, "train_sampling_strategy='group_by_length'"),
        ({"train_sampling_strategy": "sequential"}, rows(4), {}, "train_sampling_strategy='sequential'"),
        ({"ignore_data_skip": True}, rows(4), {}, "ignore_data_skip=True"),
        ({"auto_find_batch_size": True}, rows(4), {}, "auto_find_batch_size=True"),
        ({"accelerator_config": {"split_batches": True}}, rows(4), {}, "accelerator_config.split_batches=True"),
        ({"train_dataset": Stream()}, rows(4), {"budget": "cover"}, "train_dataset streamed with budget='cover'"),
        ({"max_steps": -1}, Stream(), {}, "alignment_dataset streamed with max_steps unset"),
        ({"dataloader_num_workers": 2}, Stream(), {}, "alignment_dataset streamed with dataloader_num_workers=2"),
        ({"train_dataset": []}, rows(4), {}, "train_dataset is empty"),
        ({}, [], {}, "alignment_dataset is empty"),
        ({}, 7, {}, "alignment_dataset is of type int, which is not a dataset"),
        ({}, None, {}, "alignment_dataset is missing"),
        ({}, rows(1), {}, "alignment_dataset has 1 rows, fewer than a batch of 2"),
        ({}, [{"text": "a"}] * 4, {}, "the alignment rows lack input_ids and labels"),
        ({}, [{**row, "labels": [IGNORED] * 6} for row in rows(4)], {}, "every label of alignment_dataset is masked"),
        (
            {"train_dataset": [{**row, "labels": [IGNORED] * 6} for row in rows(4)]},
            rows(4),
            {},
            "every label of train_dataset is masked",
        ),
        ({"fp16": True}, rows(4), {}, "fp16=True on the CPU"),
        ({}, rows(4), {"proximal": "decoupled", "rho": 2000.0}, "rho=2000 with proximal='decoupled'"),
        (
            {},
            rows(4),
            {"proximal": "decoupled", "rho": 1.0, "alignment_loss_budget": 0.1, "rho_ceiling": 2000.0},
            "rho_ceiling=2000 with proximal='decoupled'",
        ),
    ],
)
def test_an_unsupported_setting_is_an_error_that_names_it_and_leaves_the_trainer_unchanged(
    tmp_path: Path, changes: dict[str, Any], alignment: Any, lisa_settings: dict[str, Any], named: str
) -> None:
    trainer = plain(tmp_path, **changes)
    dataset = trainer.train_dataset
    with pytest.raises(StayalignedError) as caught:
        attach_lisa(trainer, alignment_dataset=alignment, lisa=lisa(**lisa_settings))
    assert named in caught.value.message
    assert caught.value.hint
    assert type(trainer) is Trainer
    assert trainer.train_dataset is dataset


def test_a_frozen_model_is_an_error(tmp_path: Path) -> None:
    trainer = plain(tmp_path, model=pico_model().requires_grad_(False))
    with pytest.raises(StayalignedError, match="no trainable weights"):
        attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa())


@pytest.mark.parametrize("host", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_gradients_are_unsupported_only_with_a_proximal_term(tmp_path: Path, host: str) -> None:
    trainer = plain(tmp_path)
    setattr(trainer, host, True)
    with pytest.raises(StayalignedError, match=r"DeepSpeed|FSDP1") as caught:
        attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa())
    assert "rho=0 (BSO)" in str(caught.value)
    attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa(rho=0.0))


def test_optimizers_that_step_inside_the_backward_pass_are_unsupported(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    trainer.args.optim = "galore_adamw_layerwise"
    with pytest.raises(StayalignedError, match="optim='galore_adamw_layerwise'"):
        attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa())


def test_a_negative_rho_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="rho=-1"):
        attach_lisa(plain(tmp_path), alignment_dataset=rows(4), lisa=replace(lisa(), rho=-1.0))


def test_other_trainers_of_trl_are_unsupported(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    trainer.__class__ = type("Mine", (DPOTrainer,), {})
    with pytest.raises(StayalignedError, match="DPOTrainer prepares its rows in its own way"):
        attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa())


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)  # pyright: ignore


def test_a_trainer_with_its_own_data_loader_is_an_error_before_its_first_step(tmp_path: Path) -> None:
    trainer = OwnLoader(
        pico_model(),
        TrainingArguments(**settings(tmp_path)),
        train_dataset=rows(6),  # pyright: ignore
        data_collator=PaddingCollator(0),
    )
    with pytest.raises(StayalignedError, match="LisaOwnLoader draws its training rows without `_get_train_sampler`"):
        attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa()).train()


def test_lisa_is_added_only_once(tmp_path: Path) -> None:
    assert with_lisa(Trainer) is with_lisa(Trainer)
    trainer = attach_lisa(plain(tmp_path), alignment_dataset=rows(4), lisa=lisa())
    with pytest.raises(StayalignedError, match="LisaTrainer already trains with Lisa"):
        attach_lisa(trainer, alignment_dataset=rows(4), lisa=lisa())


# ---- private names of the hosts: a release that changes one fails here first ---------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (Trainer, "_get_train_sampler", ["self", "train_dataset"]),
        (Trainer, "_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        (Trainer, "_save_checkpoint", ["self", "model", "trial"]),
        (Trainer, "_save_rng_state", ["self", "output_dir"]),
        (Trainer, "_set_signature_columns_if_needed", ["self"]),
        (Trainer, "_get_output_dir", ["self", "trial"]),
        (Trainer, "get_total_train_batch_size", ["self", "args"]),
        (Trainer, "training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        (Trainer, "log", ["self", "logs", "start_time"]),
        (
            SFTTrainer,
            "_prepare_dataset",
            ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
        ),
    ],
)
def test_the_hosts_have_the_private_methods_that_lisa_uses(owner: type, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(vars(owner)[name]).parameters) == parameters


def test_sfttrainer_has_the_private_attributes_that_lisa_uses(tmp_path: Path) -> None:
    trainer = sft(tmp_path, PROMPTED)
    assert trainer.completion_only_loss is True
    assert trainer._skip_prepare_dataset is False
    assert trainer._is_vision_dataset is False
    assert trainer.accelerator.scaler is None
    assert trainer.accelerator.split_batches is False


def test_the_host_writes_the_trainer_state_last_so_it_marks_a_complete_checkpoint(tmp_path: Path) -> None:
    trainer = attach_lisa(plain(tmp_path, save_strategy="steps", save_steps=2), alignment_dataset=rows(4), lisa=lisa())
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    written = sorted(checkpoint.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert written[-1].name == "trainer_state.json"
    assert {"lisa.json", "lisa_anchor.safetensors"} < {file.name for file in written}
