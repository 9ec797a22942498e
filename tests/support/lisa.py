"""A small Lisa run in a Trainer, and the hand-written loop that it must equal."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from stayaligned import LisaSettings
from stayaligned.algorithms.lisa import RowStream
from stayaligned.hf.features import IGNORED, PaddingCollator
from stayaligned.testing import byte_tokenizer, pico_model

ALIGNMENT_TOKEN, USER_TOKEN = 2, 3
# The proximal term starts at step 3, the second of a phase: at the first step of a phase its gradient is zero.
LISA = LisaSettings(alignment_steps=2, finetuning_steps=3, rho=0.7, proximal_warmup_ratio=0.2)
Row = dict[str, list[int]]


def rows(first_token: int, count: int, seed: int) -> list[Row]:
    """Return rows of 4 to 12 tokens, half of them labels; the first token identifies the data set."""
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


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return torch.cat([(a[name] - b[name]).flatten() for name in a]).norm().item()


def reference_loop(
    model: nn.Module,
    lisa: LisaSettings,
    *,
    rows_per_step: int,
    steps: int,
    clip: float,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Train with Lisa as in the paper and the published trainer, with optimizer steps: two anchors, one loss.

    With `dtype` the forward pass runs under autocast.
    """
    model.train()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.0)
    k1, k2 = lisa.alignment_steps, lisa.finetuning_steps
    anchors = {phase: trainable(model) for phase in ("alignment", "finetune")}
    streams = {"alignment": RowStream(len(SAFE), 11, "alignment"), "finetune": RowStream(len(USER), 11, "finetuning")}
    status, clock, taken = ("alignment" if k1 else "finetune"), 0, {"alignment": 0, "finetune": 0}
    for step in range(steps):
        closing = lisa.finish == "alignment" and step >= steps - k1
        due = bool(step and k1 and k2 and clock % (k1 if status == "alignment" else k2) == 0)
        if (status == "finetune") if closing else due:
            anchors[status] = trainable(model)  # the weights at the end of the phase
            status, clock = ("finetune" if status == "alignment" else "alignment"), 0
        drawn = streams[status].take(taken[status], rows_per_step)
        taken[status] += rows_per_step
        total, tokens = torch.zeros(()), 0
        for row in ((SAFE if status == "alignment" else USER)[index] for index in drawn):
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float()
            labels = torch.tensor(row["labels"][1:])
            total = total + nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            tokens += int((labels != IGNORED).sum())
        loss = total / tokens
        anchor = anchors["finetune" if status == "alignment" else "alignment"]
        rho, warm = 0.0, int(lisa.proximal_warmup_ratio * steps)
        if step > warm:
            left, done = steps - warm - 1, step - warm - 1
            rho = lisa.rho * {"constant": 1, "rising": (done + 1) / left, "falling": 1 - done / left}[lisa.rho_schedule]
        if lisa.proximal == "coupled":
            loss = loss + rho / 2 * sum((p - anchor[n]).norm() ** 2 for n, p in params.items())
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(params.values(), clip)
        rate = 1e-3 * (steps - step) / steps
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if lisa.proximal == "decoupled":
            with torch.no_grad():
                for name, p in params.items():
                    p -= rate * rho * (p - anchor[name])
        clock += 1
    return trainable(model)
