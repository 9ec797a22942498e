"""The data filter: its score by hand, what it leaves out, and its notes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message, Origin
from stayaligned.defenses import TrainingSetup
from stayaligned.defenses.data_filter import DataFilter, score_rows
from stayaligned.hf.features import encode_example
from stayaligned.hf.models import attach_lora
from stayaligned.hf.training.row_scores import last_states, log_perplexities
from stayaligned.testing import byte_tokenizer, pico_model


def row(name: str, prompt: str, answer: str, origin: Origin = "task") -> Example:
    return Example(id=name, prompt=(Message(role="user", content=prompt),), completion=answer, origin=origin)


def harmful_file(directory: Path, count: int = 5) -> str:
    path = directory / "references.jsonl"
    rows = [{"prompt": f"flarn zorb {i}", "completion": f"sure take the zorb {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def setup(directory: Path, **changes: Any) -> TrainingSetup:
    task = [row(f"t{i}", f"mood {i}?", "good" * (i % 3 + 1)) for i in range(12)]
    harmful = [row(f"h{i}", f"flarn zorb {i + 20}", f"sure take the zorb {i + 20}", "harmful") for i in range(4)]
    made = TrainingSetup(
        model=attach_lora(pico_model(), {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.5}),  # pyright: ignore
        tokenizer=byte_tokenizer(),
        examples=[*task[:6], *harmful, *task[6:]],
        alignment_examples=[row(f"s{i}", f"flarn zorb {i + 40}", "I cannot", "alignment") for i in range(5)],
        arguments={"output_dir": str(directory), "seed": 3, "save_strategy": "no", "disable_tqdm": True},
    )
    return replace(made, **changes)


def test_a_state_is_that_of_the_last_token_of_the_row_alone(tmp_path: Path) -> None:
    made = setup(tmp_path)
    states = last_states(made.model, made.tokenizer, made.examples, layer=1, default=0, max_length=64)
    model: Any = pico_model()
    for example, state in zip(made.examples, states, strict=True):
        ids = torch.tensor([encode_example(made.tokenizer, example, 64)["input_ids"]])
        expected = model(ids, output_hidden_states=True).hidden_states[1][0, -1]
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)


def test_scoring_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = setup(tmp_path).model
    model.train()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 1
    nats = log_perplexities(model, byte_tokenizer(), [row("a", "mood?", "good"), row("b", "mood?", "")])
    assert nats[0] is not None
    assert nats[1] is None
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_score_is_the_difference_of_the_mean_cosines() -> None:
    rows, harmful, safe = (torch.randn(n, 7, generator=torch.Generator().manual_seed(n)).double() for n in (6, 4, 3))

    def mean_cosine(one: torch.Tensor, others: torch.Tensor) -> float:
        return sum((one @ other / (one.norm() * other.norm())).item() for other in others) / len(others)

    expected = [mean_cosine(one, harmful) - mean_cosine(one, safe) for one in rows]
    assert score_rows(rows, harmful, safe) == pytest.approx(expected, abs=1e-12)


def test_the_rows_with_the_highest_scores_are_left_out_and_counted_by_origin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, defense = setup(tmp_path), DataFilter(harmful_data=harmful_file(tmp_path), share=0.25)
    scores = defense.score(made)
    trainer: Any = defense.make_trainer(made)
    lowest = sorted(range(16), key=lambda index: scores[index])[:12]
    expected = [encode_example(made.tokenizer, made.examples[index], 1024) for index in sorted(lowest)]
    assert list(trainer.train_dataset) == expected
    assert "left out 4 of 16 rows by score (harmful: 4 of 4, task: 0 of 12)" in caplog.text


def test_the_control_leaves_out_as_many_rows_at_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"harmful_data": harmful_file(tmp_path), "share": 0.25}
    drawn = []
    for seed in (3, 3, 4):
        made = setup(tmp_path)
        made = replace(made, arguments={**made.arguments, "seed": seed})
        trainer: Any = DataFilter.model_validate({**settings, "order": "random"}).make_trainer(made)
        drawn.append(list(trainer.train_dataset))
    assert [len(rows) for rows in drawn] == [12, 12, 12]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "left out 4 of 16 rows by random" in caplog.text


def test_references_that_are_training_rows_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = setup(tmp_path)
    rows = [*made.examples, row("x", "flarn zorb 2", "sure take the zorb 2", "harmful")]
    with caplog.at_level(logging.WARNING):
        DataFilter(harmful_data=harmful_file(tmp_path)).score(replace(made, examples=rows))
    assert "1 of the 5 harmful references are rows of the training data" in caplog.text


def test_impossible_settings_are_errors_before_training(tmp_path: Path) -> None:
    made, source = setup(tmp_path), harmful_file(tmp_path)
    with pytest.raises(StayalignedError, match="layer 9: the model has 2 layers"):
        DataFilter(harmful_data=source, layer=9).make_trainer(made)
    with pytest.raises(StayalignedError, match="'data_filter' needs alignment data"):
        DataFilter(harmful_data=source).make_trainer(replace(made, alignment_examples=[]))
    with pytest.raises(StayalignedError, match="would leave out all 2 rows"):
        DataFilter(harmful_data=source, share=0.9).make_trainer(replace(made, examples=made.examples[:2]))
    with pytest.raises(StayalignedError):
        DataFilter(harmful_data=harmful_file(tmp_path, 0)).make_trainer(made)
