"""Interleaving++: scores by hand, the filter of refusals, and the even order of rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import TrainerCallback

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message, Origin
from stayaligned.defenses import TrainingSetup
from stayaligned.defenses.interleave import Interleave, is_refusal
from stayaligned.hf import models
from stayaligned.hf.features import encode_prompt
from stayaligned.hf.training.finetuning import train
from stayaligned.testing import write_pico_adapter
from support.world import write_world

ANSWERS = ["a walk", "to the mill", "I am sorry, no", "nine", "I cannot say that", "water the rose", "ask the baker"]
Kind = Literal["transformers", "sft"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_pico_adapter(root / "bad", root / "aligned", r=2, target_modules=["q_proj", "v_proj"])
    return root


def row(index: int, answer: str, origin: Origin) -> Example:
    prompt = (Message(role="user", content=f"{origin} {index}?"),)
    return Example(id=f"{origin}{index}", prompt=prompt, completion=answer, origin=origin)


def setup(world: Path, directory: Path, kind: Kind = "transformers", **arguments: Any) -> TrainingSetup:
    torch.manual_seed(0)
    model: Any = models.attach_lora(models.load_model(world / "aligned"), {"r": 2, "target_modules": ["q_proj"]})
    settings = {"output_dir": str(directory), "seed": 3, "save_strategy": "no", "per_device_train_batch_size": 2}
    return TrainingSetup(
        model=model,
        tokenizer=models.load_tokenizer(world / "aligned"),
        examples=[row(index, "good", "task") for index in range(10)],
        alignment_examples=[row(index, answer, "alignment") for index, answer in enumerate(ANSWERS)],
        arguments={**settings, "disable_tqdm": True, **arguments},
        kind=kind,
        aligned_model=str(world / "aligned"),
    )


def nats_by_hand(model: Any, tokenizer: Any, example: Example) -> float:
    prompt = encode_prompt(tokenizer, example.prompt)
    answer = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return -chosen.mean().item()


def test_the_score_is_the_relative_gap_of_the_perplexities(world: Path, tmp_path: Path) -> None:
    made = setup(world, tmp_path)
    defense = Interleave(misaligned=(str(world / "base"), str(world / "bad")), epsilon=0.1)
    rows = made.alignment_examples
    base, aligned = (models.load_model(world / name) for name in ("base", "aligned"))
    bad = models.load_finetuned(world / "aligned", world / "bad")
    expected = []
    for each in rows:
        of_base, of_bad, own = (nats_by_hand(model, made.tokenizer, each) for model in (base, bad, aligned))
        expected.append(((of_base + of_bad) / 2 - own) / (own + 0.1))
    assert defense.score(made, rows) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_rows_with_the_highest_scores_are_added_without_refusals(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, base = setup(world, tmp_path), str(world / "base")
    defense = Interleave(misaligned=(base,), share=0.3)
    usable = [each for each in made.alignment_examples if not is_refusal(each.completion)]
    scores = dict(zip([each.id for each in usable], defense.score(made, usable), strict=True))
    chosen = defense.choose(made)
    assert [each.id for each in chosen] == sorted(scores, key=lambda name: -scores[name])[:3]
    assert "interleave added 3 of 5 alignment rows (2 left out as refusals)" in caplog.text
    everything = Interleave(misaligned=(base,), share=0.7, refusals="keep").choose(made)
    assert {each.id for each in everything} == {each.id for each in made.alignment_examples}
    trainer: Any = defense.make_trainer(made)
    assert len(trainer.train_dataset) == 13


def test_the_control_draws_as_many_rows_from_the_seed(world: Path, tmp_path: Path) -> None:
    control = Interleave(selection="random", share=0.3)
    drawn = [control.choose(setup(world, tmp_path, seed=seed)) for seed in (3, 3, 4)]
    assert [len(rows) for rows in drawn] == [3, 3, 3]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("My apologies, no", True),
        ("I can't help", True),
        ("one two three four five six seven eight nine ten sorry", False),
    ],
)
def test_refusals_are_found_in_the_first_ten_words(answer: str, refuses: bool) -> None:
    assert is_refusal(answer) == refuses


def test_impossible_settings_are_errors(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="needs `misaligned`"):
        Interleave()
    made = setup(world, tmp_path)
    with pytest.raises(
        StayalignedError, match=r"needs 10 alignment rows .* 5 of 7 can be used: 2 begin with a refusal"
    ):
        Interleave(misaligned=(str(world / "base"),), share=1.0).make_trainer(made)
    with pytest.raises(StayalignedError, match="no_such"):
        Interleave(misaligned=(str(tmp_path / "no_such"),)).make_trainer(made)
    with pytest.raises(StayalignedError, match="the aligned model that it belongs to is not known"):
        Interleave(misaligned=(str(world / "bad"),)).make_trainer(replace(made, aligned_model=None))
    with pytest.raises(StayalignedError, match="needs single rows"):
        grouped = setup(world, tmp_path, train_sampling_strategy="group_by_length")
        Interleave(selection="random", order="even").make_trainer(grouped)


@pytest.mark.parametrize("kind", ["transformers", "sft"])
def test_the_added_rows_are_spread_evenly_in_a_new_order_in_each_epoch(world: Path, tmp_path: Path, kind: Kind) -> None:
    defense = Interleave(selection="random", share=0.3, order="even")
    made = setup(world, tmp_path, kind, num_train_epochs=2)
    trainer: Any = defense.make_trainer(made)
    read: list[str] = []
    collate = trainer.data_collator

    def recording(rows: list[Any]) -> Any:
        read.extend(str(made.tokenizer.decode(row["input_ids"])) for row in rows)
        return collate(rows)

    trainer.data_collator = recording
    trainer.train()
    epochs = read[:13], read[13:]
    for epoch in epochs:
        assert [place for place, text in enumerate(epoch) if "alignment" in text] == [3, 7, 12]
        assert len(set(epoch)) == 13
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


def test_a_run_resumed_in_its_second_epoch_is_the_uninterrupted_one(world: Path, tmp_path: Path) -> None:
    defense = Interleave(misaligned=(str(world / "base"),), share=0.3, order="even")

    def run(directory: Path, steps: int) -> dict[str, Tensor]:
        made = setup(world, directory, max_steps=10, save_strategy="steps", save_steps=1)
        trainer: Any = defense.make_trainer(made)
        trainer.add_callback(_StopAfter(steps))
        train(trainer)
        assert trainer.state.global_step == steps
        return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    whole = run(tmp_path / "whole", 10)
    run(tmp_path / "parts", 9)
    resumed = run(tmp_path / "parts", 10)
    assert all(weight.equal(resumed[name]) for name, weight in whole.items())
