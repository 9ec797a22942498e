"""Lisa in the Trainer equals a hand-written loop with the proximal term in the loss, whatever the host's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from stayaligned import LisaSettings, attach_lisa, with_lisa
from stayaligned.algorithms.lisa import RowStream
from stayaligned.hf.features import PaddingCollator
from stayaligned.testing import byte_tokenizer
from support.lisa import (
    ALIGNMENT_TOKEN,
    LISA,
    SAFE,
    USER,
    USER_TOKEN,
    arguments,
    distance,
    largest_difference,
    model,
    plain_trainer,
    reference_loop,
    sft_trainer,
    trainable,
)

CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""The name of that setting in the installed transformers."""


@pytest.mark.parametrize(
    ("build", "lora", "accumulation", "clip"),
    [
        (plain_trainer, False, 1, 0.0),
        (plain_trainer, False, 3, 0.0),
        (plain_trainer, False, 3, 0.5),
        (plain_trainer, True, 1, 0.5),
        (plain_trainer, True, 3, 0.0),
        (sft_trainer, False, 1, 0.0),
        (sft_trainer, True, 3, 0.5),
    ],
)
def test_the_trainer_equals_a_loop_with_the_proximal_term_in_the_loss(
    tmp_path: Path, build: Callable[..., Trainer], lora: bool, accumulation: int, clip: float
) -> None:
    changes = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip, "max_steps": 13}
    trainer = build(model(lora), tmp_path, **changes)
    safe: Any = Dataset.from_list(SAFE) if isinstance(trainer, SFTTrainer) else SAFE
    trainer = attach_lisa(trainer, alignment_dataset=safe, lisa=LISA)
    trainer.train()
    settings = {"rows_per_step": 2 * accumulation, "steps": 13, "clip": clip}
    expected = reference_loop(model(lora), LISA, **settings)
    assert largest_difference(trainable(trainer.model), expected) < 1e-5
    without_term = reference_loop(model(lora), replace(LISA, rho=0.0), **settings)
    assert largest_difference(without_term, expected) > 1e-3  # so that the bound above is meaningful


@pytest.mark.parametrize(
    ("changes", "least_difference"),
    [
        ({"proximal": "decoupled", "rho": 100.0}, 1e-3),
        ({"finish": "alignment"}, 1e-4),
        ({"rho_schedule": "rising"}, 1e-4),
        ({"rho_schedule": "falling"}, 1e-4),
        ({"proximal": "decoupled", "rho": 100.0, "finish": "alignment", "rho_schedule": "rising"}, 1e-4),
        ({"anchor_device": "cpu", "drift_from_start": True}, None),
        ({"alignment_loss_budget": 100.0}, None),  # never exceeded, so never used
    ],
)
def test_every_variant_equals_its_loop(tmp_path: Path, changes: dict[str, Any], least_difference: float | None) -> None:
    lisa = replace(LISA, **changes)
    settings = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "max_steps": 15}
    trainer = attach_lisa(plain_trainer(model(), tmp_path, **settings), alignment_dataset=SAFE, lisa=lisa)
    trainer.train()
    loop = {"rows_per_step": 6, "steps": 15, "clip": 0.5}
    assert largest_difference(trainable(trainer.model), reference_loop(model(), lisa, **loop)) < 1e-5
    if least_difference is not None:
        paper = reference_loop(model(), LISA, **loop)
        assert largest_difference(trainable(trainer.model), paper) > least_difference


@pytest.mark.parametrize(
    ("changes", "dtype", "share"),
    [
        ({CHECKPOINTING: True}, None, 1e-4),
        ({"bf16": True}, torch.bfloat16, 0.1),  # a batch is rounded differently than its rows one by one
    ],
)
def test_precision_and_activation_checkpointing_do_not_change_the_result(
    tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype | None, share: float
) -> None:
    trainer = plain_trainer(model(), tmp_path, max_steps=13, max_grad_norm=0.0, **changes)
    attach_lisa(trainer, alignment_dataset=SAFE, lisa=LISA).train()
    loop = {"rows_per_step": 2, "steps": 13, "clip": 0.0}
    expected = reference_loop(model(), LISA, dtype=dtype, **loop)
    without_term = reference_loop(model(), replace(LISA, rho=0.0), dtype=dtype, **loop)
    assert distance(trainable(trainer.model), expected) < share * distance(without_term, expected)


def test_without_alignment_steps_only_the_proximal_term_to_the_start_remains(tmp_path: Path) -> None:
    # The host draws the rows itself in this case, so the run is compared with a plain run instead of the loop.
    lisa = LisaSettings(alignment_steps=0, finetuning_steps=3, rho=5.0, proximal_warmup_ratio=0.0)
    one = attach_lisa(plain_trainer(model(), tmp_path), alignment_dataset=None, lisa=lisa)
    start = trainable(one.model)
    one.train()
    free = plain_trainer(model(), tmp_path)
    free.train()
    with_term, without_term = (largest_difference(trainable(t.model), start) for t in (one, free))
    assert with_term < without_term
    logged = [row["drift"] for row in one.state.log_history if "drift" in row]
    moved = torch.cat([(p - start[n]).flatten() for n, p in trainable(one.model).items()]).norm().item()
    assert logged[-1] == pytest.approx(moved, rel=1e-4)


def test_rho_0_without_alignment_steps_is_the_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "num_train_epochs": 2}
    plain = plain_trainer(model(attention_dropout=0.1), tmp_path, **changes)
    plain.train()
    lisa = LisaSettings(alignment_steps=0, finetuning_steps=1, rho=0.0)
    ours = attach_lisa(
        plain_trainer(model(attention_dropout=0.1), tmp_path, **changes), alignment_dataset=None, lisa=lisa
    )
    ours.train()
    assert largest_difference(trainable(ours.model), trainable(plain.model)) == 0.0


def test_rho_0_is_the_plain_trainer_on_the_rows_of_the_schedule_bit_for_bit(tmp_path: Path) -> None:
    # This also shows that the loss of an alignment step does not depend on the user's rows or their number of tokens.
    lisa = LisaSettings(alignment_steps=2, finetuning_steps=3, rho=0.0)
    ours = attach_lisa(
        plain_trainer(model(), tmp_path, gradient_accumulation_steps=2, max_steps=8), alignment_dataset=SAFE, lisa=lisa
    )
    ours.train()
    users, safe = RowStream(26, 11, "finetuning").take(0, 20), RowStream(7, 11, "alignment").take(0, 16)
    order = [SAFE[i] for i in safe[:8]] + [USER[i] for i in users[:12]]
    order += [SAFE[i] for i in safe[8:16]] + [USER[i] for i in users[12:16]]
    plain = plain_trainer(
        model(), tmp_path, order, gradient_accumulation_steps=2, max_steps=8, train_sampling_strategy="sequential"
    )
    plain.train()
    assert largest_difference(trainable(ours.model), trainable(plain.model)) == 0.0


def test_accumulating_8_batches_of_1_is_2_batches_of_4(tmp_path: Path) -> None:
    finals = []
    for batch, accumulation in ((1, 8), (4, 2)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 8}
        trainer = attach_lisa(plain_trainer(model(), tmp_path, **changes), alignment_dataset=SAFE, lisa=LISA)
        trainer.train()
        finals.append(trainable(trainer.model))
    assert largest_difference(*finals) < 1e-5


class CountingSFTTrainer(SFTTrainer):
    """A user's subclass, which counts the micro-batches."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().compute_loss(*args, **kwargs)


def test_a_users_subclass_trains_the_same(tmp_path: Path) -> None:
    built = with_lisa(CountingSFTTrainer)(
        model(),
        SFTConfig(**arguments(tmp_path, max_steps=6)),
        train_dataset=Dataset.from_list(USER),
        processing_class=byte_tokenizer(),
        alignment_dataset=Dataset.from_list(SAFE),
        lisa=LISA,
    )
    built.train()
    attached = attach_lisa(
        sft_trainer(model(), tmp_path, max_steps=6), alignment_dataset=Dataset.from_list(SAFE), lisa=LISA
    )
    attached.train()
    assert isinstance(built, CountingSFTTrainer)
    assert built.calls == 6
    assert largest_difference(trainable(built.model), trainable(attached.model)) == 0.0


def test_streams_train_like_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    # A stream is read in its own order, so it has the order in which the shuffled rows would be drawn.
    lisa, settings = LISA, {"gradient_accumulation_steps": 2, "max_steps": 8, "max_grad_norm": 0.5}
    drawn = [USER[i] for i in RowStream(len(USER), 11, "finetuning").take(0, 40)]
    safe = [SAFE[i] for i in RowStream(len(SAFE), 11, "alignment").take(0, 40)]
    expected = attach_lisa(plain_trainer(model(), tmp_path, **settings), alignment_dataset=SAFE, lisa=lisa)
    expected.train()
    for user_rows, safe_rows in ((stream(drawn), stream(safe)), (stream(drawn), SAFE), (USER, stream(safe))):
        trainer = plain_trainer(model(), tmp_path, user_rows, **settings)
        attach_lisa(trainer, alignment_dataset=safe_rows, lisa=lisa).train()
        assert largest_difference(trainable(trainer.model), trainable(expected.model)) == 0.0


def stream(rows: list[Any]) -> Any:
    return Dataset.from_list(rows).to_iterable_dataset()


class Recording(Trainer):
    """Records the source of the rows of each optimizer step."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = getattr(self, "seen", {})
        self.seen.setdefault(self.state.global_step, []).extend(inputs["input_ids"][:, 0].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("budget", "changes", "steps"),
    [
        ("shared", {"num_train_epochs": 2, "gradient_accumulation_steps": 3}, 10),
        ("shared", {"num_train_epochs": 1, "dataloader_drop_last": True, "per_device_train_batch_size": 4}, 6),
        ("cover", {"num_train_epochs": 2, "per_device_train_batch_size": 4}, 26),
        ("shared", {"max_steps": 7, "dataloader_num_workers": 1}, 7),
    ],
)
def test_every_optimizer_step_has_rows_of_one_phase_and_the_budget_is_respected(
    tmp_path: Path, budget: Any, changes: dict[str, Any], steps: int
) -> None:
    lisa = LisaSettings(alignment_steps=2, finetuning_steps=3, rho=0.1, budget=budget)
    trainer = with_lisa(Recording)(
        model(),
        TrainingArguments(**arguments(tmp_path, **changes)),
        train_dataset=USER,
        data_collator=PaddingCollator(0),
        alignment_dataset=SAFE,
        lisa=lisa,
    )
    trainer.train()
    rows_per_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    assert trainer.state.global_step == len(trainer.seen) == steps
    for step, tokens in trainer.seen.items():
        assert tokens == [ALIGNMENT_TOKEN if step % 5 < 2 else USER_TOKEN] * rows_per_step
    if budget == "cover":
        assert sum(tokens.count(USER_TOKEN) for tokens in trainer.seen.values()) >= 2 * len(USER)
