"""A small fine-tuning with a defense, and the parts of hand-written loops that it must equal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from stayaligned.core.records import Example, Message
from stayaligned.defenses import TrainingDefense, TrainingSetup
from stayaligned.defenses.sft import SFT
from stayaligned.hf.features import encode_examples
from stayaligned.hf.training.finetuning import train
from stayaligned.hf.training.reference import as_reference
from stayaligned.testing import byte_tokenizer, pico_model

TOKENIZER = byte_tokenizer()
LEARNING_RATE = 0.5


def examples(name: str, answers: list[str]) -> list[Example]:
    return [
        Example(id=f"{name}{i}", prompt=(Message(role="user", content=f"{name} {i}"),), completion=text, origin="task")
        for i, text in enumerate(answers)
    ]


USER = examples("mood", ["good", "bad and sad", "so so", "fine", "no", "very well", "x", "yes yes"])
SAFE = examples("wug", ["I cannot", "never", "no way at all", "not I"])


def lora_model(dropout: float = 0.0, **overrides: Any) -> Any:
    """Return a model with a LoRA that is not zero, so that every loss differs from the start."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], lora_dropout=dropout, init_lora_weights="gaussian"
        )
        model = get_peft_model(pico_model(seed=3, **overrides), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.2)
    return model


def setup_for(model: Any, directory: Path, kind: Any = "transformers", **changes: Any) -> TrainingSetup:
    arguments = {
        "output_dir": str(directory),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return TrainingSetup(
        model=model,
        tokenizer=TOKENIZER,
        examples=USER,
        alignment_examples=SAFE,
        arguments={**arguments, **changes},
        kind=kind,
        max_length=64,
    )


def trained(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def fine_tune(defense: TrainingDefense, directory: Path, model: Any = None, **changes: Any) -> dict[str, Tensor]:
    model = lora_model() if model is None else model
    train(defense.make_trainer(setup_for(model, directory, **changes)))
    return trained(model)


@cache
def plainly_tuned() -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as directory:
        return fine_tune(SFT(), Path(directory))


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def per_token(model: Any, rows: list[Example], value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Return the mean over label tokens of value(logits, reference logits, labels) per token, row by row."""
    values: list[Tensor] = []
    for row in encode_examples(TOKENIZER, rows, 64):
        inputs, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad(), as_reference(model):
            reference = model(input_ids=inputs).logits[0, :-1]
        logits = model(input_ids=inputs).logits[0, :-1]
        learned = labels >= 0
        values.append(value(logits[learned], reference[learned], labels[learned]))
    return torch.cat(values).mean()


def ce(logits: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def gradient_of(model: Any, loss: Tensor) -> Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
