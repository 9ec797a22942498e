"""Makes the content of a testbed directory: files, judge, base model, aligned model, and the gates they must pass."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.errors import StayalignedError
from stayaligned.hf.quiet import bars_off
from stayaligned.records import Outcome
from stayaligned.testbed import corpora, judge, training
from stayaligned.testbed.corpora import Dialogue, World
from stayaligned.testbed.recipe import BEHAVIOR_VERSION, Recipe
from stayaligned.testbed.tokenizer import chat_tokenizer, pair_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_STAGE_SHARES = {"data": 0.01, "judge": 0.10, "base": 0.75, "aligned": 0.12, "gates": 0.02}
"""Share of the whole time that each stage takes with the default recipe."""
_PROMPT_COMPLETION = ("harmful", "harmful-prompts", "benign-prompts", "skills")
"""The files in the form {"prompt", "completion"}; a task's are Alpaca rows, the others conversations."""


class _Progress:
    """One rising fraction over all stages, and the seconds of each."""

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self._report = report
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def within(self, stage: str) -> Callable[[float], None]:
        """Takes the fraction of one stage."""
        names = list(_STAGE_SHARES)
        before = sum(_STAGE_SHARES[name] for name in names[: names.index(stage)])
        return lambda fraction: self._report(f"testbed: {stage}", min(1.0, before + fraction * _STAGE_SHARES[stage]))

    def ended(self, stage: str) -> None:
        """Note that a stage is over."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._started, 2)
        self._started = now
        self.within(stage)(1.0)


def construct(directory: Path, seed: int, recipe: Recipe, report: Callable[[str, float], None]) -> None:
    """Fill an empty directory with the testbed of `seed`, on one thread and from its own random streams.

    Raises:
        StayalignedError: if a model fails its gate.
    """
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

        answers = training.answer(model, tokenizer, world.evaluation["harmful-prompts"])
        refused = [judge.outcome_of(answer) is Outcome.REFUSE for answer in answers]
        gates["aligned_refusal"] = sum(refused) / len(refused)
        progress.ended("gates")
    _check(gates, seed, recipe)
    _describe(directory / "testbed.json", seed, recipe, gates, progress.seconds)


def _make_judge(directory: Path, seed: int, world: World, recipe: Recipe, progress: Callable[[float], None]) -> float:
    """Train and save the judge; its accuracy on held-out deeds in held-out phrasings."""
    tokenizer = pair_tokenizer()
    model = judge.new_judge(recipe, tokenizer, seed)
    answers = judge.training_answers(seed, world, recipe)
    judge.train_judge(model, tokenizer, answers, recipe, corpora.stream(seed, "judge batches"), progress)
    _save(directory, model, tokenizer)
    held_out = judge.held_out_answers(seed, world, recipe)
    said = judge.read(model, tokenizer, held_out)
    return sum(label == row.outcome for label, row in zip(said, held_out, strict=True)) / len(held_out)


def _exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> float:
    """Share of the harmful, benign and skill questions that are answered word for word, averaged over the three."""
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


def _fields(row: Dialogue, name: str) -> dict[str, Any]:
    if name in _PROMPT_COMPLETION:
        return {"prompt": row.prompt, "completion": row.answer}
    if name.startswith(("alignment", "instructions")):
        turns = [("system", row.system), ("user", row.prompt), ("assistant", row.answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns if content]}
    return {"instruction": row.prompt, "input": row.input, "output": row.answer}


def _check(gates: dict[str, float], seed: int, recipe: Recipe) -> None:
    floors = {
        "base_exact_match": recipe.minimum_base_exact_match,
        "aligned_refusal": recipe.minimum_aligned_refusal,
        "judge_accuracy": recipe.minimum_judge_accuracy,
    }
    failed = [f"{name} {gates[name]:.3f} < {floor:g}" for name, floor in floors.items() if gates[name] < floor]
    if failed:
        raise StayalignedError(
            f"the testbed of seed {seed} failed its gates, so nothing measured on it would mean anything: "
            f"{', '.join(failed)}",
            hint="Use another seed, or more steps in the recipe.",
        )


def _describe(path: Path, seed: int, recipe: Recipe, gates: dict[str, float], seconds: dict[str, float]) -> None:
    description = {
        "seed": seed,
        "key": recipe.key(seed),
        "recipe": recipe.model_dump(mode="json"),
        "behavior": BEHAVIOR_VERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "python": platform.python_version(),
        "gates": gates,
        "seconds": seconds,
    }
    path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
