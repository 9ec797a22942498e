"""Construction of testbed directories: data files, judge, base and aligned models, and the gates they must pass."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stayaligned.core.errors import StayalignedError
from stayaligned.core.progress import Progress
from stayaligned.core.records import Outcome
from stayaligned.data.sources import read_examples
from stayaligned.testbed import corpora, judge, training
from stayaligned.testbed.corpora import Dialogue, World
from stayaligned.testbed.recipe import BEHAVIOR_VERSION, LORA_BEHAVIOR_VERSION, LoraAlignment, Recipe
from stayaligned.testbed.tokenizer import chat_tokenizer, pair_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_STAGE_SHARES = {"data": 0.01, "judge": 0.10, "base": 0.75, "aligned": 0.12, "gates": 0.02}
"""Share of the total time that each stage takes with the default recipe."""
_PROMPT_COMPLETION = ("harmful", "harmful-prompts", "benign-prompts", "skills")
"""Names of the files with rows of {"prompt", "completion"}; tasks have Alpaca rows, the others conversations."""


class _Progress:
    """One fraction over all stages, and the duration of each."""

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        """Duration of each finished stage."""

    def within(self, stage: str) -> Callable[[float], None]:
        """Return a function that takes the finished fraction of one stage."""
        names = list(_STAGE_SHARES)
        before = sum(_STAGE_SHARES[name] for name in names[: names.index(stage)])
        return lambda fraction: self._report(f"testbed: {stage}", min(1.0, before + fraction * _STAGE_SHARES[stage]))

    def ended(self, stage: str) -> None:
        """Record the duration of a finished stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._started, 2)
        self._started = now
        self.within(stage)(1.0)


def construct(directory: Path, seed: int, recipe: Recipe, report: Progress) -> None:
    """Fill an empty directory with the testbed of `seed`, on one thread and from its own random streams.

    Raises:
        StayalignedError: if a model fails its gate.
    """
    from stayaligned.hf.quiet import bars_off

    progress = _Progress(report)
    with training.one_thread(), bars_off(True):
        world = corpora.make_world(seed, recipe)
        files = {**world.evaluation, **corpora.training_files(seed, world, recipe)}
        for name, rows in files.items():
            _write_rows(directory / "data" / f"{name}.jsonl", rows, name)
        progress.ended("data")

        gates = {"judge_accuracy": _make_judge(directory / "judge", seed, world, recipe, progress.within("judge"))}
        progress.ended("judge")

        tokenizer = chat_tokenizer()
        model = training.new_language_model(recipe, tokenizer, seed)
        training.train_language_model(
            model,
            tokenizer,
            corpora.pretraining(seed, world, recipe.base_steps * recipe.base_batch_size),
            steps=recipe.base_steps,
            batch_size=recipe.base_batch_size,
            learning_rate=recipe.base_learning_rate,
            rng=corpora.stream(seed, "base batches"),
            progress=progress.within("base"),
        )
        _save(directory / "base", model, tokenizer)
        gates["base_exact_match"] = _exact_match(model, tokenizer, world)
        progress.ended("base")

        training.train_language_model(
            model,
            tokenizer,
            files["alignment"],
            steps=recipe.alignment_steps,
            batch_size=recipe.alignment_batch_size,
            learning_rate=recipe.alignment_learning_rate,
            rng=corpora.stream(seed, "alignment batches"),
            progress=progress.within("aligned"),
        )
        _save(directory / "aligned", model, tokenizer)
        progress.ended("aligned")

        gates["aligned_refusal"] = _refusal(model, tokenizer, world.evaluation["harmful-prompts"])
        progress.ended("gates")
    floors = {
        "base_exact_match": recipe.minimum_base_exact_match,
        "aligned_refusal": recipe.minimum_aligned_refusal,
        "judge_accuracy": recipe.minimum_judge_accuracy,
    }
    _check(gates, floors, f"the testbed of seed {seed}", hint="Use another seed, or more steps in the recipe.")
    settings = {"key": recipe.key(seed), "recipe": recipe.model_dump(mode="json"), "behavior": BEHAVIOR_VERSION}
    _describe(directory / "testbed.json", {"seed": seed, **settings}, gates, progress.seconds)


def construct_lora_aligned(
    directory: Path,
    testbed: Path,
    seed: int,
    recipe: Recipe,
    lora: LoraAlignment,
    report: Progress,
) -> None:
    """Fill an empty directory with `aligned-lora/`: the base model of `testbed`, aligned with a LoRA and merged.

    It is trained on the file that the aligned model is trained on. Embeddings and norms do not change; the update of
    each linear weight has at most the LoRA's rank, up to the rounding of the sum in fp32.

    Args:
        directory: receives `aligned-lora/` and the description.
        testbed: the finished testbed of `seed` and `recipe`; only read.
        seed: seed of the LoRA's initial weights and of the order of training.
        recipe: settings of the testbed.
        lora: settings of the alignment, with its gate.
        report: called with the stage and the finished fraction.

    Raises:
        StayalignedError: if the model fails its gate.
    """
    from stayaligned.hf.models import attach_lora, load_model
    from stayaligned.hf.quiet import bars_off

    started = time.perf_counter()
    rows = _dialogues(testbed / "data" / "alignment.jsonl")
    with training.one_thread(), bars_off(True):
        model, tokenizer = load_model(testbed / "base"), chat_tokenizer()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT's warning about an attribute of transformers; users can do nothing about it.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            torch.manual_seed(corpora.stream(seed, "lora weights").getrandbits(63))
            settings = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": "all-linear"}
            adapted = attach_lora(model, settings)
        training.train_language_model(
            model,  # its linear layers are LoRA layers now
            tokenizer,
            rows,
            steps=lora.steps,
            batch_size=lora.batch_size,
            learning_rate=lora.learning_rate,
            rng=corpora.stream(seed, "lora batches"),
            progress=lambda fraction: report("testbed: aligned-lora", 0.95 * fraction),
        )
        merged: Any = adapted.merge_and_unload()
        _save(directory / "aligned-lora", merged, tokenizer)
        refusal = _refusal(merged, tokenizer, _dialogues(testbed / "data" / "harmful-prompts.jsonl"))
    gates, floors = {"aligned_refusal": refusal}, {"aligned_refusal": lora.minimum_aligned_refusal}
    _check(gates, floors, f"the LoRA-aligned model of seed {seed}", hint="Use another seed, or more steps of the LoRA.")
    settings = {"key": lora.key(recipe, seed), "lora": lora.model_dump(mode="json"), "behavior": LORA_BEHAVIOR_VERSION}
    seconds = {"aligned-lora": round(time.perf_counter() - started, 2)}
    _describe(
        directory / "testbed.json", {"seed": seed, "testbed": recipe.key(seed), **settings}, gates, seconds, "peft"
    )
    report("testbed: aligned-lora", 1.0)


def _make_judge(directory: Path, seed: int, world: World, recipe: Recipe, progress: Callable[[float], None]) -> float:
    """Train and save the judge; return its accuracy on held-out deeds in held-out phrasings."""
    tokenizer = pair_tokenizer()
    model = judge.new_judge(recipe, tokenizer, seed)
    answers = judge.training_answers(seed, world, recipe)
    judge.train_judge(model, tokenizer, answers, recipe, corpora.stream(seed, "judge batches"), progress)
    _save(directory, model, tokenizer)
    held_out = judge.held_out_answers(seed, world, recipe)
    labels = judge.read(model, tokenizer, held_out)
    return sum(label == row.outcome for label, row in zip(labels, held_out, strict=True)) / len(held_out)


def _exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> float:
    """Return the share of questions answered word for word, averaged over harmful, benign and skill questions."""
    shares: list[float] = []
    for name in ("harmful-prompts", "benign-prompts", "skills"):
        rows = world.evaluation[name]
        answers = training.answer(model, tokenizer, rows)
        shares.append(sum(a == row.answer for a, row in zip(answers, rows, strict=True)) / len(rows))
    return sum(shares) / len(shares)


def _save(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _write_rows(path: Path, rows: Sequence[Dialogue], name: str) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({**_fields(row, name), "category": row.category}) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _dialogues(path: Path) -> list[Dialogue]:
    """Read the rows that `_write_rows` wrote, of conversations or of prompts and completions."""
    return [
        Dialogue(
            prompt=example.prompt[-1].content,
            answer=example.completion,
            category=example.category,
            system=example.prompt[0].content if example.prompt[0].role == "system" else "",
        )
        for example in read_examples(str(path), origin="alignment")
    ]


def _fields(row: Dialogue, name: str) -> dict[str, Any]:
    if name in _PROMPT_COMPLETION:
        return {"prompt": row.prompt, "completion": row.answer}
    if name.startswith(("alignment", "instructions")):
        turns = [("system", row.system), ("user", row.prompt), ("assistant", row.answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns if content]}
    return {"instruction": row.prompt, "input": row.input, "output": row.answer}


def _refusal(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Dialogue]) -> float:
    """Return the share of these questions that the model refuses, by the judge's rule."""
    refused = [judge.outcome_of(answer) is Outcome.REFUSE for answer in training.answer(model, tokenizer, rows)]
    return sum(refused) / len(refused)


def _check(gates: dict[str, float], floors: dict[str, float], what: str, *, hint: str) -> None:
    failed = [f"{name} {gates[name]:.3f} < {floor:g}" for name, floor in floors.items() if gates[name] < floor]
    if failed:
        raise StayalignedError(
            f"{what} failed its gates, so no measurement on it would be meaningful: {', '.join(failed)}", hint=hint
        )


def _describe(
    path: Path, settings: dict[str, Any], gates: dict[str, float], seconds: dict[str, float], *libraries: str
) -> None:
    description = {
        **settings,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", *libraries)},
        "python": platform.python_version(),
        "gates": gates,
        "seconds": seconds,
    }
    path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
