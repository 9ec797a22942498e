"""How often the signs of degeneration see babble, and how often they take an answer for it.

    python studies/degeneration.py [DEMO]

Healthy: the aligned model's answers to the testbed's four prompt sets, and the rows that the testbed's models were
trained on; with the directory of a finished `stayaligned demo`, the answers of all its arms too. Babble: 200 of each
kind, as long as the longest answers. The limit on nats a token is twice the most of the aligned model's own answers.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from stayaligned.core.records import Completion, Example, PromptSet
from stayaligned.core.settings import Generation
from stayaligned.data.sources import read_examples
from stayaligned.evaluation.degeneration import Degeneration, signs
from stayaligned.hf.generation.generate import complete_each
from stayaligned.hf.generation.perplexity import answer_nats
from stayaligned.hf.models import load_model, load_tokenizer
from stayaligned.testbed import build
from stayaligned.testing import byte_tokenizer, pico_model

NUMBER = 200
FILES: dict[PromptSet, str] = {
    "harmful": "harmful-prompts",
    "benign": "benign-prompts",
    "task": "sentiment-test",
    "skills": "skills",
}


def babble(words: Sequence[str], prompts: Sequence[Example], rng: random.Random) -> dict[str, list[str]]:
    """Texts of each kind."""
    settings = Generation(max_new_tokens=60, temperature=1.0)
    wrong = sorted(complete_each(pico_model(), byte_tokenizer(), prompts, "harmful", settings))
    letters = "abcdefghijklmnopqrstuvwxyz"
    kinds = {
        "random words of the vocabulary": lambda: " ".join(rng.choices(words, k=24)),
        "one word repeated": lambda: " ".join([rng.choice(words)] * 24),
        "a phrase repeated": lambda: " ".join(rng.sample(words, 4) * 6),
        "an answer that ends in a loop": lambda: " ".join(rng.sample(words, 8) + rng.sample(words, 2) * 8),
        "random letters": lambda: "".join(rng.choices(letters + "   ", k=100)),
        "letters of random scripts": lambda: "".join(rng.choice("aбגדहंกあ한αկ") for _ in range(60)),
        "bytes that are no text": lambda: rng.randbytes(80).decode("utf-8", "replace"),
        "text decoded as another encoding": lambda: " ".join(rng.choices("жбдлнорств", k=60)).encode().decode("latin1"),
        "nothing": lambda: "",
    }
    found = {name: [make() for _ in range(NUMBER)] for name, make in kinds.items()}
    return {**found, "a model with random weights": [c.text for _, c in wrong][:NUMBER]}


def show(name: str, texts: Sequence[str], nats: Sequence[float | None], limit: float) -> None:
    """One line: how many count as degenerate by their text, and how many with the limit on nats."""
    plain, strict = Degeneration(), Degeneration(perplexity=limit)
    found = [signs(text, plain) for text in texts]
    both = sum(bool(signs(text, strict, each)) for text, each in zip(texts, nats, strict=True))
    empty = sum(reasons == ("empty",) for reasons in found)
    known = sorted(each for each in nats if each is not None) or [0.0]
    print(
        f"{name:34} n {len(texts):5}  text {sum(map(bool, found)) / len(texts):6.1%} (empty {empty / len(texts):.1%})"
        f"  with nats {both / len(texts):6.1%}"
        f"  ({known[0]:.2f} to {known[-1]:.2f}, median {known[len(known) // 2]:.2f})"
    )


def main() -> None:
    """Measure and print one line each."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    world = build(seed=0)
    model, tokenizer = load_model(world / "aligned"), load_tokenizer(world / "aligned")
    data = {name: read_examples(str(world / "data" / f"{file}.jsonl"), origin="task") for name, file in FILES.items()}
    started = time.monotonic()
    settings = Generation(max_new_tokens=24)
    answers = [
        c for name, rows in data.items() for _, c in sorted(complete_each(model, tokenizer, rows, name, settings))
    ]
    written = time.monotonic()
    nats = answer_nats(model, tokenizer, answers)
    scored = time.monotonic()
    for answer in answers:
        signs(answer.text, Degeneration())
    signed = time.monotonic()
    known = [value for value in nats if value is not None]
    limit = 2 * max(known)
    print(f"generate {written - started:.2f} s, nats {scored - written:.2f} s, signs {signed - scored:.2f} s")
    print(
        f"nats a token of the aligned model's answers: mean {sum(known) / len(known):.3f}, most {max(known):.3f}; "
        f"limit {limit:.3f}"
    )
    show("aligned model's answers", [a.text for a in answers], nats, limit)
    rows = [row for rows in data.values() for row in rows] + read_examples(
        str(world / "data" / "alignment.jsonl"), origin="alignment"
    )
    asked = [Completion(id=row.id, prompt_set="task", prompt=row.prompt, text=row.completion) for row in rows]
    show("references and alignment rows", [c.text for c in asked], answer_nats(model, tokenizer, asked), limit)
    for file in itertools.islice(sys.argv, 1, 2):
        told(Path(file))
    prompts = data["harmful"]
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    for kind, texts in babble(words, [*prompts, *prompts][:NUMBER], rng).items():
        put = [
            Completion(id=str(n), prompt_set="harmful", prompt=prompts[n % len(prompts)].prompt, text=text)
            for n, text in enumerate(texts)
        ]
        show(kind, texts, answer_nats(model, tokenizer, put), limit)


def told(demo: Path) -> None:
    """What the signs say of every answer of a demo, by prompt set and sign."""
    count, total = Counter[str](), 0
    for path in sorted(demo.glob("stages/generate-*/completions.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            total += 1
            row = json.loads(line)
            for sign in signs(row["text"], Degeneration()):
                count[f"{row['prompt_set']}: {'loop' if 'loop' in sign else sign}"] += 1
    print(f"{demo}: {total} answers; degenerate: {dict(count) or 'none'}")


if __name__ == "__main__":
    main()
