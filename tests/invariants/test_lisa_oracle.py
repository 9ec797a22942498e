"""Lisa in the Trainer equals a hand-written loop with the pull in the loss; what must not matter does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from stayaligned import Lisa, attach_lisa, with_lisa
from stayaligned.bistate import RowStream
from stayaligned.hf.features import IGNORED, PaddingCollator
from stayaligned.testing import byte_tokenizer, pico_model

ALIGNMENT_TOKEN, USER_TOKEN = 2, 3
Row = dict[str, list[int]]


def rows(first_token: int, count: int, seed: int) -> list[Row]:
    """Rows of 4 to 12 tokens, half of them learned; the first token tells whose they are."""
    rng = random.Random(seed)
    made: list[Row] = []
    for _ in range(count):
        ids = [first_token, *(rng.randrange(5, 261) for _ in range(rng.randrange(3, 12)))]
        made.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return made


USER, SAFE = rows(USER_TOKEN, 26, seed=1), rows(ALIGNMENT_TOKEN, 7, seed=2)


def model(lora: bool = False, **overrides: Any) -> Any:
    made = pico_model(seed=3, **overrides)
    if lora:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            made = get_peft_model(
                made, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")
            )
    return made


def arguments(directory: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 11,
        "gradient_checkpointing": None,
    }
    return {**settings, **changes}


def plain_trainer(model: nn.Module, directory: Path, user: list[Row] = USER, **changes: Any) -> Trainer:
    return Trainer(
        model,  # pyright: ignore
        TrainingArguments(**arguments(directory, **changes)),
        train_dataset=user,  # pyright: ignore
        data_collator=PaddingCollator(0),
    )


def sft_trainer(model: nn.Module, directory: Path, kind: type[SFTTrainer] = SFTTrainer, **changes: Any) -> SFTTrainer:
    return kind(
        model,  # pyright: ignore
        SFTConfig(**arguments(directory, **changes)),
        train_dataset=Dataset.from_list(USER),
        processing_class=byte_tokenizer(),
    )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def reference_loop(model: nn.Module, lisa: Lisa, *, rows_per_step: int, steps: int, clip: float) -> dict[str, Tensor]:
    """Lisa as the paper and the published trainer have it, a step being an optimizer step: two anchors, one loss."""
    model.train()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.0)
    k1, k2 = lisa.alignment_steps, lisa.finetuning_steps
    anchors = {state: trainable(model) for state in ("alignment", "finetune")}
    streams = {"alignment": RowStream(len(SAFE), 11, "alignment"), "finetune": RowStream(len(USER), 11, "finetuning")}
    status, clock, taken = ("alignment" if k1 else "finetune"), 0, {"alignment": 0, "finetune": 0}
    for step in range(steps):
        if step and k1 and k2 and clock % (k1 if status == "alignment" else k2) == 0:
            anchors[status] = trainable(model)  # the state that is left remembers where it ended
            status, clock = ("finetune" if status == "alignment" else "alignment"), 0
        drawn = streams[status].take(taken[status], rows_per_step)
        taken[status] += rows_per_step
        total, tokens = torch.zeros(()), 0
        for row in ((SAFE if status == "alignment" else USER)[index] for index in drawn):
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total = total + nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            tokens += int((labels != IGNORED).sum())
        loss = total / tokens
        if step > lisa.proximal_warmup_ratio * steps:
            anchor = anchors["finetune" if status == "alignment" else "alignment"]
            loss = loss + lisa.rho / 2 * sum((p - anchor[n]).norm() ** 2 for n, p in params.items())
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(params.values(), clip)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (steps - step) / steps
        optimizer.step()
        clock += 1
    return trainable(model)


# The pull sets in at step 3, the second of a state: at the first it is zero, wherever it sets in.
LISA = Lisa(alignment_steps=2, finetuning_steps=3, rho=0.7, proximal_warmup_ratio=0.2)


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
    unpulled = reference_loop(model(lora), LISA.model_copy(update={"rho": 0.0}), **settings)
    assert largest_difference(unpulled, expected) > 1e-3  # so that the bound above says something


def test_without_alignment_steps_only_the_pull_to_the_start_is_left(tmp_path: Path) -> None:
    # The host draws the rows then, so the loop is given the same order through the host: one row a step, in order.
    lisa = Lisa(alignment_steps=0, finetuning_steps=3, rho=5.0, proximal_warmup_ratio=0.0)
    one = attach_lisa(plain_trainer(model(), tmp_path), alignment_dataset=None, lisa=lisa)
    start = trainable(one.model)
    one.train()
    free = plain_trainer(model(), tmp_path)
    free.train()
    pulled, unpulled = (largest_difference(trainable(t.model), start) for t in (one, free))
    assert pulled < unpulled
    logged = [row["drift"] for row in one.state.log_history if "drift" in row]
    moved = torch.cat([(p - start[n]).flatten() for n, p in trainable(one.model).items()]).norm().item()
    assert logged[-1] == pytest.approx(moved, rel=1e-4)


def test_no_pull_and_no_alignment_steps_is_the_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "num_train_epochs": 2}
    plain = plain_trainer(model(attention_dropout=0.1), tmp_path, **changes)
    plain.train()
    lisa = Lisa(alignment_steps=0, finetuning_steps=1, rho=0.0)
    ours = attach_lisa(
        plain_trainer(model(attention_dropout=0.1), tmp_path, **changes), alignment_dataset=None, lisa=lisa
    )
    ours.train()
    assert largest_difference(trainable(ours.model), trainable(plain.model)) == 0.0


def test_no_pull_is_the_plain_trainer_on_the_rows_of_the_schedule_bit_for_bit(tmp_path: Path) -> None:
    # Also: the loss of an alignment step does not depend on the user's rows, nor on how many tokens they have.
    lisa = Lisa(alignment_steps=2, finetuning_steps=3, rho=0.0)
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
    """A user's own subclass; it sees every micro-batch."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().compute_loss(*args, **kwargs)


def test_a_users_own_subclass_trains_the_same(tmp_path: Path) -> None:
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


class Recording(Trainer):
    """Remembers whose rows each optimizer step saw."""

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
def test_every_optimizer_step_sees_rows_of_one_state_and_the_budget_holds(
    tmp_path: Path, budget: Any, changes: dict[str, Any], steps: int
) -> None:
    lisa = Lisa(alignment_steps=2, finetuning_steps=3, rho=0.1, budget=budget)
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
