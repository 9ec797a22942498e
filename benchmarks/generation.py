"""Answers a second: many at once, against one prompt at a time as the papers' code asks; and the memory they take.

    python benchmarks/generation.py

The same greedy tokens are asserted. A random Llama of the testbed's size, 200 prompts of unequal length, at most 24 new
tokens each, about half of the answers ending before, one CPU thread. Runs of both in turn, after a warm-up. Then the
growth of fresh processes that answer 400 prompts with a larger model under two budgets (Linux).
"""

from __future__ import annotations

import itertools
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stayaligned.core.records import Message
from stayaligned.core.settings import Generation
from stayaligned.hf.features import encode_prompt
from stayaligned.hf.generation.generate import generate
from stayaligned.testing import byte_tokenizer, pico_model

PROMPTS = 200
NEW_TOKENS = 24
RUNS = 5
BUDGETS = (48, 192)
"""MiB."""
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


def model_and_prompts(count: int, **sizes: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[list[Message]]]:
    """A random Llama whose answers vary and can't be swayed by rounding, and prompts of unequal length."""
    rng = random.Random(0)
    # Large weights set the logits apart (rounding can't decide a token) and make the text vary.
    model = pico_model(**sizes, initializer_range=0.1)
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, FREQUENT_TOKEN]
    texts = ("".join(rng.choices("abcdefgh ", k=rng.randint(10, 80))) for _ in range(count))
    return model, tokenizer, [[Message(role="user", content=text)] for text in texts]


def compare() -> None:
    """Both ways in turn; prints one line each."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256}
    model, tokenizer, prompts = model_and_prompts(PROMPTS, **sizes)
    settings = Generation(max_new_tokens=NEW_TOKENS)
    one_at_a_time(model, tokenizer, prompts[:3])
    generate(model, tokenizer, prompts[:3], settings)
    single: list[float] = []
    batched: list[float] = []
    for _ in range(RUNS):
        started = time.perf_counter()
        published = one_at_a_time(model, tokenizer, prompts)
        single.append(time.perf_counter() - started)
        started = time.perf_counter()
        answers = [answer.tokens for answer in generate(model, tokenizer, prompts, settings)]
        batched.append(time.perf_counter() - started)
        assert answers == published, "batched and single answers differ"
    early = sum(len(tokens) < NEW_TOKENS for tokens in answers)
    ratios = sorted(one / many for one, many in zip(single, batched, strict=True))
    print(f"{PROMPTS} answers, {early} of which end early: the same tokens both ways, {RUNS} runs")
    print(f"one prompt at a time: {PROMPTS / statistics.median(single):7.1f} answers/s")
    print(f"batched:              {PROMPTS / statistics.median(batched):7.1f} answers/s")
    print(f"ratio: {statistics.median(ratios):.1f} (of the runs: {ratios[0]:.1f} to {ratios[-1]:.1f})")


def peak(memory_mib: int) -> None:
    """Print the MiB by which the process grew at most while it answered, after a warm-up of one prompt."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    model, tokenizer, prompts = model_and_prompts(400, **sizes, intermediate_size=1024)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    generate(model, tokenizer, prompts[:1], Generation(max_new_tokens=2))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    generate(model, tokenizer, prompts, Generation(max_new_tokens=8, memory_mib=memory_mib))
    print(f"budget {memory_mib:4d} MiB: {resident('VmHWM') - before:6.1f} MiB more than before at the peak")


def resident(name: str) -> float:
    """MiB of this process, now (VmRSS) or at its peak (VmHWM)."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    """Measure and print one line each."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        peak(int(sys.argv[1]))
        return
    compare()
    for budget in BUDGETS:
        subprocess.run([sys.executable, __file__, str(budget)], check=True)


if __name__ == "__main__":
    main()
