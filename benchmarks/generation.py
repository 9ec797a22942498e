"""Time of generating many completions, against three simpler loops with the same tokens; and the memory it takes.

    python benchmarks/generation.py [--model DIR [--server URL --name NAME]]

Loops: one prompt at a time (as the papers' code does), one left-padded `generate` for all prompts, `generate` over
length-sorted batches of 16, and `stayaligned`'s. By default a random Llama of the testbed's size completes 200 prompts
of unequal length with at most 24 tokens each; about half of the completions end before. With `--model`, the chat model
in that directory completes 48 prompts with at most 64 tokens. The loops take turns. The times are CPU seconds of one
thread, which other work on the machine disturbs less than it disturbs the clock.

With `--server`, a server of that model (vLLM, say) and `stayaligned`, then with all cores, take turns: tokens per
second of the clock, and the number of equal texts.

Without `--model`, the growth of fresh processes that complete 400 prompts with a larger model under two budgets follows
(Linux).
"""

from __future__ import annotations

import argparse
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

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stayaligned.core.records import Example, Message
from stayaligned.core.settings import Generation, ServedModel
from stayaligned.evaluation.answers import complete_over_endpoint
from stayaligned.hf.features import encode_prompt
from stayaligned.hf.generation.generate import generate
from stayaligned.hf.models import load_model, load_tokenizer
from stayaligned.testing import byte_tokenizer, pico_model

PROMPTS = 200
NEW_TOKENS = 24
RUNS = 5
CHAT_TOKENS = 64
CHAT_RUNS = 3
TOPICS = (
    *("a volcano", "the French Revolution", "a binary search tree", "sourdough bread", "the tides", "a jet engine"),
    *("photosynthesis", "the rules of chess", "compound interest", "a vaccine", "the water cycle", "plate tectonics"),
)
FORMS = (
    "What is {}?",
    "Explain {} to a child in two sentences, with an example from home.",
    "Give me one short fact about {}.",
    "My essay for the history class has five hundred words and must mention {} without losing the thread of its "
    "argument. How would you introduce it, and which source would you cite first?",
)
BUDGETS = (48, 192)
"""MiB."""
FREQUENT_TOKEN = 40
"""A second end token: this model writes it in about half of its completions."""


def padded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    new_tokens: int,
    batch_size: int,
) -> list[tuple[int, ...]]:
    """Transformers' `generate` over left-padded batches, the longest prompts first."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    ends = {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)}
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    written: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(ids[rows[0]])
        pad = tokenizer.pad_token_id
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor([[pad] * (width - len(ids[row])) + ids[row] for row in rows]),
                attention_mask=torch.tensor([[0] * (width - len(ids[row])) + [1] * len(ids[row]) for row in rows]),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(ends),
            )
        for row, tokens in zip(rows, output[:, width:].tolist(), strict=True):
            written[row] = tuple(itertools.takewhile(lambda token: token not in ends, tokens))
    return [written[row] for row in range(len(ids))]


def _listed(ends: int | list[int] | None) -> list[int]:
    return [ends] if isinstance(ends, int) else list(ends or [])


def random_model(count: int, **sizes: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[list[Message]]]:
    """A random Llama with varied completions that rounding can't change, and prompts of unequal length."""
    rng = random.Random(0)
    # Large weights separate the logits (rounding can't decide a token) and vary the text.
    model = pico_model(**sizes, initializer_range=0.1)
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, FREQUENT_TOKEN]
    texts = ("".join(rng.choices("abcdefgh ", k=rng.randint(10, 80))) for _ in range(count))
    return model, tokenizer, [[Message(role="user", content=text)] for text in texts]


def chat_model(directory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[list[Message]]]:
    """A chat model in fp32, and every form of question about every topic."""
    texts = [form.format(topic) for form, topic in itertools.product(FORMS, TOPICS)]
    model = load_model(directory, dtype=torch.float32)
    return model, load_tokenizer(directory), [[Message(role="user", content=text)] for text in texts]


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    new_tokens: int,
    runs: int,
) -> None:
    """Print one line for each loop, and the ratio of the best other batched loop to ours."""
    settings = Generation(max_new_tokens=new_tokens)
    loops: dict[str, Callable[[list[list[Message]]], list[tuple[int, ...]]]] = {
        "one prompt at a time": lambda asked: padded(model, tokenizer, asked, new_tokens, 1),
        "one left-padded generate": lambda asked: padded(model, tokenizer, asked, new_tokens, len(asked)),
        "sorted batches of 16": lambda asked: padded(model, tokenizer, asked, new_tokens, 16),
        "stayaligned": lambda asked: [text.tokens for text in generate(model, tokenizer, asked, settings)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    found: dict[str, list[tuple[int, ...]]] = {}
    for loop in loops.values():
        loop(prompts[:2])
    for _ in range(runs):
        for name, loop in loops.items():
            started = time.process_time()
            found[name] = loop(prompts)
            seconds[name].append(time.process_time() - started)
    first, *others = found.values()
    assert all(other == first for other in others), "the loops generated different tokens"
    early = sum(len(tokens) < new_tokens for tokens in first)
    print(f"{len(prompts)} completions, {early} of which end early: the same tokens by every loop, {runs} runs")
    ours = seconds["stayaligned"]
    for name, each in seconds.items():
        ratios = sorted(theirs / own for theirs, own in zip(each, ours, strict=True))
        print(
            f"{name + ':':26s} {len(prompts) / statistics.median(each):8.1f} completions/s; takes "
            f"{statistics.median(ratios):5.2f} x stayaligned's time ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def compare_with_server(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[Message]], server: ServedModel
) -> None:
    """Print tokens per second of this process with all cores and of a server, and how many texts are equal."""
    torch.set_num_threads(os.cpu_count() or 1)
    rows = [Example(id=str(number), prompt=tuple(prompt)) for number, prompt in enumerate(prompts)]
    loops: dict[str, Callable[[list[Example]], list[str]]] = {
        "stayaligned": lambda asked: [
            text.text
            for text in generate(
                model, tokenizer, [list(row.prompt) for row in asked], Generation(max_new_tokens=CHAT_TOKENS)
            )
        ],
        "server": lambda asked: [
            row.text for _, row in sorted(complete_over_endpoint(server, asked, "benign", max_tokens=CHAT_TOKENS))
        ],
    }
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    texts: dict[str, list[str]] = {}
    for loop in loops.values():
        loop(rows[:2])
    for _ in range(CHAT_RUNS):
        for name, loop in loops.items():
            started = time.perf_counter()
            texts[name] = loop(rows)
            tokens = sum(len(ids) for ids in tokenizer(texts[name])["input_ids"])
            speeds[name].append(tokens / (time.perf_counter() - started))
    for name, each in speeds.items():
        print(f"{name + ':':12s} {statistics.median(each):6.1f} tokens/s ({min(each):.1f} to {max(each):.1f})")
    equal = sum(ours == theirs for ours, theirs in zip(*texts.values(), strict=True))
    print(f"{equal} of {len(rows)} texts are equal")


def peak(memory_mib: int) -> None:
    """Print the MiB by which the process grew at most while it generated, after a warm-up with one prompt."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    model, tokenizer, prompts = random_model(400, **sizes, intermediate_size=1024)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    generate(model, tokenizer, prompts[:1], Generation(max_new_tokens=2))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    generate(model, tokenizer, prompts, Generation(max_new_tokens=8, memory_mib=memory_mib))
    print(f"budget {memory_mib:4d} MiB: {resident('VmHWM') - before:6.1f} MiB above the start at the peak")


def resident(name: str) -> float:
    """MiB of this process, now (VmRSS) or at its peak (VmHWM)."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="directory of a chat model")
    parser.add_argument("--server", help="address of a server of that model, ending in /v1")
    parser.add_argument("--name", default="smol", help="the model's name at the server")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        peak(asked.peak)
    elif asked.model and asked.server:
        compare_with_server(*chat_model(asked.model), ServedModel(base_url=asked.server, model=asked.name))
    elif asked.model:
        compare(*chat_model(asked.model), CHAT_TOKENS, CHAT_RUNS)
    else:
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256}
        compare(*random_model(PROMPTS, **sizes), NEW_TOKENS, RUNS)
        for budget in BUDGETS:
            subprocess.run([sys.executable, __file__, "--peak", str(budget)], check=True)


if __name__ == "__main__":
    main()
