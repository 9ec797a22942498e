"""The measurements of `benchmarks/lisa.py`: equal rows, the published step, turns, and memory."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from stayaligned import LisaSettings
from stayaligned.hf.features import PaddingCollator
from support.lisa import SAFE, USER, arguments, distance, largest_difference, model, reference_loop, trainable

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
bench: Any = importlib.import_module("lisa")
published: Any = importlib.import_module("lisa_published")
sys.path.pop(0)

ARMS = ("plain", "Lisa", "published")
SHAPE = bench.Shape(32, 64, 2, 4, 2, 261, rows=2, tokens=6)
JOB = bench.Job(SHAPE, lora=False, steps=12, lisa=LisaSettings(alignment_steps=2, finetuning_steps=3, rho=5.0))


def test_the_published_step_equals_the_hand_written_loop(tmp_path: Path) -> None:
    lisa, steps = LisaSettings(alignment_steps=2, finetuning_steps=3, rho=0.7), 13
    rows = bench.schedule_rows(USER, SAFE, lisa, steps=steps, rows=2, seed=11)
    settings = arguments(tmp_path, train_sampling_strategy="sequential")
    trainer = published.PublishedTrainer(
        model(),
        TrainingArguments(**settings),
        train_dataset=rows.taken,
        alignment_dataset=rows.safe_taken,
        data_collator=PaddingCollator(0),
        lisa=lisa,
    )
    trainer.train()
    expected = {
        rho: reference_loop(model(), replace(lisa, rho=rho), rows_per_step=2, steps=steps, clip=1.0)
        for rho in (0.7, 0.0)
    }
    assert largest_difference(trainable(trainer.model), expected[0.7]) < 1e-5
    assert largest_difference(expected[0.0], expected[0.7]) > 1e-4  # so that the bound above is meaningful


def test_all_trainers_take_the_same_rows_and_lisa_and_the_published_one_the_same_steps(tmp_path: Path) -> None:
    taken: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for arm in ARMS:
        trainer = JOB.trainer(arm, str(tmp_path))
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs, arm=arm: taken[arm].append(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        trainer.train()
        ends[arm] = trainable(trainer.model)
    assert taken["plain"] == taken["Lisa"] == taken["published"]
    assert len(taken["plain"]) == JOB.steps
    assert distance(ends["Lisa"], ends["published"]) < 1e-3 * distance(ends["Lisa"], ends["plain"])


def test_trainers_take_turns_of_one_step_in_every_order(tmp_path: Path) -> None:
    order: list[str] = []

    class Note(TrainerCallback):
        def __init__(self, arm: str) -> None:
            self.arm = arm

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            order.append(self.arm)

    trainers = [JOB.trainer(arm, str(tmp_path)) for arm in ARMS]
    for arm, trainer in zip(ARMS, trainers, strict=True):
        trainer.add_callback(Note(arm))
    turns = bench.take_turns(trainers, JOB.steps)
    rounds = [tuple(order[at : at + 3]) for at in range(0, len(order), 3)]
    assert len(rounds) == JOB.steps
    assert len(set(rounds)) == 6
    assert all(sorted(each) == sorted(ARMS) for each in rounds)
    assert all(len(turn.wall) == len(turn.cpu) == JOB.steps for turn in turns)
    assert all(seconds > 0 for turn in turns for seconds in (*turn.wall, *turn.cpu))


def test_a_ratio_has_quartiles_over_rounds_and_the_ratio_of_sums() -> None:
    found = bench.ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])
    assert (found.low, found.median, found.high) == (2.5, 3.0, 3.5)
    assert (found.sum, found.difference) == (3.0, 3.0)


def test_shared_memory_is_counted_once() -> None:
    before = bench.held_bytes()
    whole = torch.zeros(1000)
    parts = [whole[:10], whole.view(10, 100)]
    assert bench.held_bytes() - before == 4000
    del whole
    assert bench.held_bytes() - before == 4000
    del parts
    assert bench.held_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_lisa_has_one_copy_of_the_trainable_weights_and_none_with_rho_0(tmp_path: Path, lora: bool) -> None:
    found = bench.measure_memory(SHAPE, lora, str(tmp_path))
    weights = found.pop("trainable_mib") * 2**20
    small = 1000 / weights  # losses that are logged later
    assert found == {
        "Lisa": pytest.approx(1, abs=small),
        "Lisa, rho=0": pytest.approx(0, abs=small),
        "published": pytest.approx(2, abs=small),
    }


def test_a_single_trainer_is_timed_on_any_device() -> None:
    for arm in ("plain", "Lisa"):
        assert 0 < bench.run_alone(JOB, arm) < 10
