"""Prompts of mixed lengths, models that rounding cannot sway, and their completions generated one at a time."""

from __future__ import annotations

import random
from typing import Any

import torch

from stayaligned.core.records import Message
from stayaligned.hf.features import encode_prompt
from stayaligned.hf.generation.generate import Generated
from stayaligned.testing import pico_model


def prompts(n: int = 24, seed: int = 0) -> list[list[Message]]:
    rng = random.Random(seed)
    return [[Message(role="user", content="".join(rng.choices("abc de", k=rng.randint(1, 50))))] for _ in range(n)]


def sharp(architecture: str = "llama", **overrides: Any) -> Any:
    """Return a pico model whose logits are too far apart for rounding to matter, and that ends some completions."""
    model = pico_model(architecture, initializer_range=0.3, **overrides)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model


def greedy_reference(model: Any, tokenizer: Any, prompt: list[Message], max_new_tokens: int) -> Generated:
    """Complete one prompt at a time, without a cache."""
    ids, written = encode_prompt(tokenizer, prompt), list[int]()
    while len(written) < max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return Generated(tokenizer.decode(written, skip_special_tokens=True), True, tuple(written))
        written.append(token)
    return Generated(tokenizer.decode(written, skip_special_tokens=True), False, tuple(written))
