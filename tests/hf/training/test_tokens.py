"""Tokens that a model's embedding lacks, and rows of every kind of trainer rendered alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.core.settings import Generation
from stayaligned.hf.features import IGNORED, encode_example
from stayaligned.hf.generation.generate import generate
from stayaligned.hf.training.finetuning import build_trainer, train
from stayaligned.hf.training.preferences import build_preference_trainer
from stayaligned.testing import CHAT_TEMPLATE, byte_tokenizer, pico_model

ROWS = [
    Example(id=str(n), prompt=(Message(role="user", content="hi" * n),), completion="no", rejected="yes")
    for n in range(1, 5)
]
ARGUMENTS = {"max_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True}
OPENING = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")


def with_pad() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 261
    return tokenizer


def trainer(kind: Any, tokenizer: Any, directory: Path) -> Any:
    arguments = {**ARGUMENTS, "output_dir": str(directory)}
    if kind == "dpo":
        return build_preference_trainer(pico_model(), tokenizer, ROWS, arguments, max_length=64, beta=0.1)
    return build_trainer(pico_model(), tokenizer, ROWS, arguments, kind=kind, max_length=64)


@pytest.mark.parametrize("kind", ["transformers", "sft", "dpo"])
def test_a_padding_token_that_the_embedding_lacks_changes_nothing(kind: str, tmp_path: Path) -> None:
    tokenizer = with_pad()
    built = trainer(kind, tokenizer, tmp_path)
    assert train(built)
    assert (built.model.config.pad_token_id or 0) < 261
    assert tokenizer.pad_token == "[PAD]"  # noqa: S105


def test_generation_pads_with_a_token_that_the_model_has() -> None:
    prompts = [row.prompt for row in ROWS]
    usual, padded = (
        generate(pico_model(), t, prompts, Generation(max_new_tokens=4)) for t in (byte_tokenizer(), with_pad())
    )
    assert usual == padded


@pytest.mark.parametrize("kind", ["transformers", "sft", "dpo"])
def test_any_other_token_that_the_embedding_lacks_is_one_error(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|im_end|>")
    with pytest.raises(StayalignedError, match=r"'<\|im_end\|>' \(token 261\).*embedding has 261 tokens"):
        trainer(kind, tokenizer, tmp_path)
    with pytest.raises(StayalignedError, match="embedding has 261 tokens"):
        turns = [Message(role=role, content="hi") for role in ("user", "assistant", "user")]
        generate(pico_model(), tokenizer, [turns], Generation(max_new_tokens=2))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_trains_on_the_tokens_of_encode_example(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = OPENING
    expected = encode_example(tokenizer, ROWS[0], 64)
    assert "</think>" in tokenizer.decode([i for i in expected["labels"] if i != IGNORED])
    row = trainer(kind, tokenizer, tmp_path).train_dataset[0]
    found = row["input_ids"] if kind == "sft" else row["prompt_ids"] + row["chosen_ids"]
    assert found == expected["input_ids"]
