"""The testbed's training loops: plain PyTorch on one thread, no global random state, reproducible byte for byte."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stayaligned.core.records import Message
from stayaligned.core.settings import Generation
from stayaligned.testbed.corpora import Dialogue
from stayaligned.testbed.tokenizer import END, MAXIMUM_LENGTH, ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from stayaligned.testbed.recipe import Recipe

Loss = Callable[[Sequence[int]], Tensor]
"""Returns the loss of the rows with these indices."""
_LENGTH_POOL_BATCHES = 8
_INITIAL_SCALE = 0.09

_WARMUP_SHARE = 0.05
LONGEST_ANSWER_TOKENS = 24
"""At least the number of tokens of every answer of the language, its end token included."""


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Within the block, use one thread: training is then reproducible, and takes the time that the recipe documents."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def new_language_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return a Llama with tied embeddings in fp32; `seed` alone decides its weights."""
    from stayaligned.hf import tiny_models

    tokens: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = tiny_models.new_config(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=MAXIMUM_LENGTH,
        tie_word_embeddings=True,
        initializer_range=_INITIAL_SCALE,
        **tokens,
    )
    model = tiny_models.new_language_model(config, seed=seed)
    model.generation_config = tiny_models.greedy_generation_config(**tokens)
    return model


def render(row: Dialogue) -> tuple[str, str]:
    """Return prompt and answer of a dialogue as the chat template renders them.

    Rendering tens of thousands of rows through the template takes many seconds; a test checks that both agree.
    """
    system = f"{ROLES['system']}{row.system}{END}" if row.system else ""
    return f"{system}{ROLES['user']}{row.question}{END}{ROLES['assistant']}", f"{row.answer}{END}"


def train_language_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Dialogue],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rng: random.Random,
    progress: Callable[[float], None],
) -> None:
    """Train all weights on the answers of `rows`, in place, with AdamW and a cosine schedule."""
    from stayaligned.hf.features import PaddingCollator

    encoded = encode(tokenizer, rows)
    collate = PaddingCollator.of(tokenizer)

    def loss(indices: Sequence[int]) -> Tensor:
        return answer_loss(model, collate([encoded[i] for i in indices]))

    batches = length_grouped_batches([len(row["input_ids"]) for row in encoded], steps, batch_size, rng)
    optimize(model, batches, loss, steps=steps, learning_rate=learning_rate, progress=progress)


def answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the labeled tokens.

    Only labeled positions go through the output layer, which costs as much as another layer.
    """
    from stayaligned.hf.features import IGNORED

    hidden = model.model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
    labels = batch["labels"][:, 1:]
    labeled = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][labeled]), labels[labeled])


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Dialogue]) -> list[dict[str, list[int]]]:
    """Return the token ids of each dialogue, with labels on the answer."""
    from stayaligned.hf.features import IGNORED

    prompts, answers = zip(*map(render, rows), strict=True)
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    answer_ids = tokenizer(list(answers))["input_ids"]
    return [
        {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(prompt_ids, answer_ids, strict=True)
    ]


def length_grouped_batches(
    lengths: Sequence[int], steps: int, batch_size: int, rng: random.Random
) -> Iterator[list[int]]:
    """Yield `steps` batches of row indices: passes over shuffled rows, batches of similar lengths in random order."""
    made = 0
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        pool_size = _LENGTH_POOL_BATCHES * batch_size
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lengths.__getitem__)
            batches = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            rng.shuffle(batches)
            for batch in batches:
                if made == steps:
                    return
                made += 1
                yield batch


def optimize(
    model: torch.nn.Module,
    batches: Iterator[list[int]],
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    progress: Callable[[float], None],
) -> None:
    """Take one AdamW step per batch: linear warm-up over 5 %, cosine decay to 5 % of the rate, clipping at norm 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup_steps = max(1, round(_WARMUP_SHARE * steps))

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress((step + 1) / steps)
    model.eval()


def answer(model: Any, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Dialogue]) -> list[str]:
    """Return the model's answer to each question, decoded greedily."""
    from stayaligned.hf.generation.generate import generate

    prompts = [[Message(role="user", content=row.question)] for row in rows]
    settings = Generation(max_new_tokens=LONGEST_ANSWER_TOKENS)
    return [generated.text for generated in generate(model, tokenizer, prompts, settings)]
