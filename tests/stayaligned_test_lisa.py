"""Lisa written as a loop, with rows and trainers small enough to run beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from stayaligned import Lisa
from stayaligned.bistate import RowStream
from stayaligned.hf.features import IGNORED, PaddingCollator

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
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
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
