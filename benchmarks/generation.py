"""Answers a second: batched by a token budget, against one prompt at a time as the papers' code asks.

    python benchmarks/generation.py

The same greedy tokens are asserted. A random Llama of the testbed's size, 200 prompts of unequal length, at most 24 new
tokens each, about half of the answers ending before, one CPU thread. One run of each, after a warm-up.
"""

from __future__ import annotations

import itertools
import os
import random
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stayaligned.hf.features import encode_prompt
from stayaligned.hf.generation import Generation, generate
from stayaligned.records import Message
from stayaligned.testing import byte_tokenizer, pico_model

PROMPTS = 200
NEW_TOKENS = 24
FREQUENT_TOKEN = 40
"""Ends answers as well: this model writes it in about half of them."""


def one_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]
) -> list[tuple[int, ...]]:
    """The published loop: tokenize, generate and cut one prompt after the other."""
    answers: list[tuple[int, ...]] = []
    ends = model.generation_config.eos_token_id
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        written = output[0, ids.shape[1] :].tolist()
        answers.append(tuple(itertools.takewhile(lambda token: token not in ends, written)))
    return answers


def main() -> None:
    """Measure and print one line each."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256}
    # Large weights set the logits apart (rounding can't decide a token) and make the text vary.
    model = pico_model(**sizes, initializer_range=0.1)
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, FREQUENT_TOKEN]
    prompts = [
        [Message(role="user", content="".join(rng.choices("abcdefgh ", k=rng.randint(10, 80))))] for _ in range(PROMPTS)
    ]
    settings = Generation(max_new_tokens=NEW_TOKENS)
    one_at_a_time(model, tokenizer, prompts[:3])
    generate(model, tokenizer, prompts[:3], settings)

    started = time.perf_counter()
    published = one_at_a_time(model, tokenizer, prompts)
    single_seconds = time.perf_counter() - started
    started = time.perf_counter()
    batched = [answer.tokens for answer in generate(model, tokenizer, prompts, settings)]
    batched_seconds = time.perf_counter() - started

    assert batched == published, "batched and single answers differ"
    early = sum(len(tokens) < NEW_TOKENS for tokens in batched)
    print(f"{PROMPTS} answers, {early} of which end early: the same tokens both ways")
    print(f"one prompt at a time: {PROMPTS / single_seconds:7.1f} answers/s")
    print(f"batched:              {PROMPTS / batched_seconds:7.1f} answers/s, {single_seconds / batched_seconds:.1f} x")


if __name__ == "__main__":
    main()
