"""Answers a second, batched, against one prompt at a time as the papers' code asks; and memory against its budget.

    python benchmarks/generation.py

The same greedy tokens are asserted. A random Llama of the testbed's size, 200 prompts of unequal length, at most 24 new
tokens each, about half of the answers ending before, one CPU thread. Both ways in turn, five times, after a warm-up.
Memory: the growth of the process at its peak, in processes of their own, with a model whose cache is what counts.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stayaligned.hf.features import encode_prompt
from stayaligned.hf.generation import Generation, generate
from stayaligned.records import Message
from stayaligned.testing import byte_tokenizer, pico_model

PROMPTS = 200
RUNS = 5
BUDGETS_MIB = (128, 512, 1024)
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


def model_of(**sizes: int) -> PreTrainedModel:
    """A random Llama; large weights set the logits apart (rounding can't decide a token) and make the text vary."""
    model = pico_model(**sizes, initializer_range=0.1)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def random_prompts(n: int, shortest: int, longest: int) -> list[list[Message]]:
    rng = random.Random(0)
    texts = ("".join(rng.choices("abcdefgh ", k=rng.randint(shortest, longest))) for _ in range(n))
    return [[Message(role="user", content=text)] for text in texts]


def speed() -> None:
    model = model_of(hidden_size=128, num_hidden_layers=4, num_attention_heads=8, intermediate_size=256)
    tokenizer = byte_tokenizer()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, FREQUENT_TOKEN]
    prompts = random_prompts(PROMPTS, 10, 80)
    settings = Generation(max_new_tokens=NEW_TOKENS)
    one_at_a_time(model, tokenizer, prompts[:3])
    generate(model, tokenizer, prompts[:3], settings)
    ratios: list[float] = []
    for _ in range(RUNS):
        started = time.perf_counter()
        published = one_at_a_time(model, tokenizer, prompts)
        between = time.perf_counter()
        batched = [answer.tokens for answer in generate(model, tokenizer, prompts, settings)]
        ended = time.perf_counter()
        assert batched == published, "batched and single answers differ"
        ratios.append((between - started) / (ended - between))
        print(
            f"{PROMPTS / (between - started):7.1f} answers/s one at a time, {PROMPTS / (ended - between):7.1f} batched"
        )
    early = sum(len(tokens) < NEW_TOKENS for tokens in batched)
    print(f"{PROMPTS} answers, {early} of which end early: the same tokens both ways")
    print(f"batched: {statistics.median(ratios):.1f} x ({min(ratios):.1f} to {max(ratios):.1f})")


def peak_mib(budget: float) -> float:
    """Growth of this process while it answers, at its peak."""
    model = model_of(
        hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=512
    )
    tokenizer = byte_tokenizer()
    generate(model, tokenizer, random_prompts(2, 10, 20), Generation(max_new_tokens=2))
    prompts = random_prompts(300, 150, 300)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    generate(model, tokenizer, prompts, Generation(max_new_tokens=32, memory_mib=budget))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before / 2**20


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(peak_mib(float(sys.argv[1])))
        return
    speed()
    for budget in BUDGETS_MIB:
        done = subprocess.run(
            [sys.executable, __file__, str(budget)], capture_output=True, text=True, check=True, env=os.environ
        )
        peak = float(done.stdout.split()[-1])
        print(f"memory_mib {budget:4d}: the process grew by {peak:.0f} MiB at its peak")
        assert peak <= budget


if __name__ == "__main__":
    main()
