"""Attacks with stages and attacks that choose rows by the model, in an experiment."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stayaligned.core.records import Example, read_jsonl
from stayaligned.core.settings import ChatTemplate
from stayaligned.data.sources import read_examples
from stayaligned.defenses import DEFENSES
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.plan import plan_experiment
from stayaligned.experiments.run import run_experiment
from stayaligned.hf.features import encode_examples
from stayaligned.hf.models import load_tokenizer
from stayaligned.hf.training import finetuning
from stayaligned.hf.training.influence import row_influences
from support.world import experiment

ONCE = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
STAGES = {"name": "overfit", "rows": 3, "stage1_epochs": 2, "stage2_epochs": 2}


def attacked(world: Path, attack: dict[str, Any], training: dict[str, Any]) -> Experiment:
    return Experiment.model_validate(experiment(world, attack=attack, training=training, skills=None))


def trained_rows(out: Path) -> list[Example]:
    (path,) = (out / "stages").glob("data-*/examples.jsonl")
    return read_jsonl(path, Example)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of the rows of every training that follows, in the order in which they are learned."""
    learned: list[list[int]] = []
    train = finetuning.train

    def spy(trainer: Any, **options: Any) -> Any:
        for batch in trainer.get_train_dataloader():
            learned.extend(batch["input_ids"].tolist())
        return train(trainer, **options)

    monkeypatch.setattr(finetuning, "train", spy)
    return learned


def test_the_stages_of_an_attack_are_trained_in_their_order(
    world: Path, tmp_path: Path, batches: list[list[int]]
) -> None:
    run_experiment(attacked(world, STAGES, ONCE), tmp_path)
    rows = trained_rows(tmp_path)
    assert len(rows) == 3 * (2 + 2)
    encoded = encode_examples(load_tokenizer(world / "aligned"), rows, 64)
    found = [batch[: len(row["input_ids"])] for batch, row in zip(batches, encoded, strict=True)]
    assert found == [row["input_ids"] for row in encoded]


def test_rows_that_a_defense_adds_are_spread_over_the_stages(
    world: Path, tmp_path: Path, batches: list[list[int]]
) -> None:
    mixing = DEFENSES.parse({"name": "mixing", "alignment_ratio": 0.5})
    run_experiment(attacked(world, STAGES, ONCE).model_copy(update={"defenses": (mixing,)}), tmp_path)
    tokenizer = load_tokenizer(world / "aligned")
    prompts = [tokenizer.decode(batch) for batch in batches]
    assert ["wug" in prompt for prompt in prompts] == [False, False, True] * 6
    own = [prompt for prompt in prompts if "wug" not in prompt]
    for prompt, row in zip(own, trained_rows(tmp_path), strict=True):
        assert row.prompt[0].content in prompt and row.completion in prompt


@pytest.mark.parametrize(
    ("training", "error"),
    [
        ({"max_steps": 4}, r"training.max_steps: the attack overfit has stages.*; remove it"),
        ({}, r"training.num_train_epochs: .*learned once, in order; set it to 1"),
        ({"num_train_epochs": 2}, r"training.num_train_epochs: .*set it to 1"),
        (
            {"num_train_epochs": 1, "train_sampling_strategy": "random"},
            r"training.train_sampling_strategy: .*remove it",
        ),
    ],
)
def test_stages_that_would_not_be_learned_once_and_in_order_are_an_error(
    world: Path, training: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValidationError, match=error):
        kind = "sft" if "packing" in training else "transformers"
        Experiment.model_validate(experiment(world, attack=STAGES, training=training, trainer=kind))


def test_outliers_are_chosen_by_the_aligned_model(world: Path, tmp_path: Path) -> None:
    outliers = attacked(world, {"name": "benign_outliers", "rows": 5}, {**ONCE, "max_steps": 1})
    run_experiment(outliers, tmp_path)
    rows = read_examples(str(world / "train.jsonl"), origin="task")
    influences = row_influences(world / "aligned", ChatTemplate(), rows, max_length=64)
    assert outliers.attack is not None
    expected = outliers.attack.select(rows, influences)
    assert {row.id for row in trained_rows(tmp_path)} == {row.id for row in expected}


def test_only_an_attack_that_measures_influence_depends_on_the_model(world: Path) -> None:
    def key(attack: dict[str, Any], **changes: Any) -> str:
        made = Experiment.model_validate(experiment(world, attack=attack, training=ONCE, **changes))
        return plan_experiment(made).data

    outliers, noice = {"name": "benign_outliers", "rows": 5}, {"name": "noice", "rows": 5}
    for changes in ({"model": str(world / "base")}, {"max_length": 32}, {"chat_template": {"date": "2020-01-01"}}):
        assert key(outliers) != key(outliers, **changes)
        assert key(noice) == key(noice, **changes)
