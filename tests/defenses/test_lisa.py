"""The training defenses as components: from YAML to a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from stayaligned.algorithms.lisa_schedule import LisaSettings
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message, Origin
from stayaligned.defenses import DEFENSES, TrainingSetup
from stayaligned.defenses.bso import BSO
from stayaligned.defenses.lisa import Lisa
from stayaligned.defenses.mixing import Mixing
from stayaligned.testing import byte_tokenizer, pico_model


def examples(count: int, origin: Origin, answer: str) -> list[Example]:
    return [
        Example(id=f"{origin}-{i}", prompt=(Message(role="user", content=f"q{i}"),), completion=answer, origin=origin)
        for i in range(count)
    ]


def setup(directory: Path, kind: Literal["transformers", "sft"] = "transformers", safe: int = 6) -> TrainingSetup:
    return TrainingSetup(
        model=pico_model(),
        tokenizer=byte_tokenizer(),
        examples=[*examples(8, "task", "ok"), *examples(4, "harmful", "HARM")],
        alignment_examples=examples(safe, "alignment", "no"),
        arguments={
            "output_dir": str(directory),
            "seed": 3,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        kind=kind,
    )


@pytest.mark.parametrize("kind", ["transformers", "sft"])
@pytest.mark.parametrize(
    ("spec", "logged", "steps"),
    [
        ("sft", {"loss"}, 6),
        ({"name": "lisa", "alignment_steps": 1, "finetuning_steps": 2}, {"alignment_loss", "drift"}, 6),
        ({"name": "lisa", "alignment_steps": 0, "finetuning_steps": 2}, {"finetuning_loss", "drift"}, 6),
        ({"name": "bso", "alignment_steps": 1, "finetuning_steps": 2, "budget": "cover"}, {"alignment_loss"}, 9),
        ({"name": "mixing", "alignment_ratio": 0.5}, {"loss"}, 9),
    ],
)
def test_every_training_defense_trains_with_both_kinds_of_trainer(
    tmp_path: Path, kind: Literal["transformers", "sft"], spec: Any, logged: set[str], steps: int
) -> None:
    defense = DEFENSES.parse(spec)
    assert DEFENSES.parse(defense.spec()) == defense
    trainer = defense.make_trainer(setup(tmp_path, kind))
    trainer.train()
    assert trainer.state.global_step == steps
    assert logged <= {key for row in trainer.state.log_history for key in row}


@pytest.mark.parametrize("name", ["lisa", "bso", "mixing"])
def test_missing_alignment_rows_are_an_error_that_names_the_defense(tmp_path: Path, name: str) -> None:
    assert DEFENSES.get(name).needs_alignment_data
    with pytest.raises(StayalignedError, match=f"defense '{name}' needs"):
        DEFENSES.parse(name).make_trainer(setup(tmp_path, safe=0))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alignment_steps": -1}, "alignment_steps"),
        ({"rho": -0.1}, "rho"),
        ({"rho": float("inf")}, "rho"),
        ({"proximal_warmup_ratio": 1.1}, "proximal_warmup_ratio"),
        ({"budget": "double"}, "budget"),
        ({"alignment_steps": 0, "finetuning_steps": 0}, "not both 0"),
        ({"finetuning_steps": 0, "budget": "cover"}, "takes none"),
        ({"k1": 3}, "k1"),
    ],
)
def test_impossible_settings_are_rejected(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Lisa(**settings)


def test_a_run_with_few_cycles_or_an_incomplete_one_gets_a_note() -> None:
    lisa = Lisa(alignment_steps=5, finetuning_steps=45)
    assert lisa.notes(400) == []
    (note,) = lisa.notes(100)
    assert note.startswith("a run of 100 steps has 2.0 cycles of 50 steps")
    assert "set alignment_steps=3 and finetuning_steps=30, or train for 150 steps or more" in note
    (note,) = lisa.notes(420)
    assert "after 20 of 50 steps" in note
    assert Lisa(alignment_steps=0, finetuning_steps=45).notes(10) == []
    assert Lisa(alignment_steps=5, finetuning_steps=45, rho=0.0).notes(50) == []


def test_cycles_that_can_not_be_shorter_are_not_to_be_shortened() -> None:
    (note,) = Lisa(alignment_steps=1, finetuning_steps=1).notes(4)
    assert "set alignment_steps" not in note
    assert "train for 6 steps or more" in note


@pytest.mark.parametrize("steps", [1, 20, 100])
@pytest.mark.parametrize("name", ["lisa", "bso"])
def test_a_run_that_ends_before_its_first_finetuning_step_is_refused(name: str, steps: int) -> None:
    with pytest.raises(StayalignedError, match=f"a run of {steps} optimizer steps never trains on the user's rows"):
        DEFENSES.parse(name).check_steps(steps)
    DEFENSES.parse(name).check_steps(101)
    DEFENSES.parse({"name": name, "alignment_steps": 1}).check_steps(20)


def test_a_run_that_is_all_alignment_by_its_end_is_refused() -> None:
    settings = LisaSettings(alignment_steps=10, finetuning_steps=10, finish="alignment")
    with pytest.raises(StayalignedError, match="finish='alignment' all of them are alignment steps"):
        settings.require_finetuning(10)
    settings.require_finetuning(21)
    LisaSettings(alignment_steps=10, finetuning_steps=0).require_finetuning(5)  # asked for


def test_the_defaults_in_yaml_are_those_of_the_settings() -> None:
    assert Lisa().settings() == LisaSettings()


def test_bso_is_lisa_without_the_proximal_term(tmp_path: Path) -> None:
    weights = []
    for defense in (BSO(alignment_steps=1, finetuning_steps=2), Lisa(alignment_steps=1, finetuning_steps=2, rho=0.0)):
        trainer = defense.make_trainer(setup(tmp_path))
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])  # pyright: ignore
    assert all(a.equal(b) for a, b in zip(*weights, strict=True))


def test_mixing_adds_alignment_rows_to_all_user_rows(tmp_path: Path) -> None:
    made = setup(tmp_path)
    mixed = Mixing(alignment_ratio=0.25).mix(made)
    assert mixed[:12] == list(made.examples)
    assert [row.origin for row in mixed[12:]] == ["alignment"] * 3
    assert len({row.id for row in mixed}) == 15
    assert mixed == Mixing(alignment_ratio=0.25).mix(setup(tmp_path))


def test_mixing_by_replacement_preserves_the_number_of_rows_and_the_harmful_rows(tmp_path: Path) -> None:
    mixed = Mixing(alignment_ratio=0.25, replace=True).mix(setup(tmp_path))
    origins = [row.origin for row in mixed]
    assert {origin: origins.count(origin) for origin in set(origins)} == {"task": 5, "harmful": 4, "alignment": 3}


def test_mixing_more_rows_than_available_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        StayalignedError, match=r"needs 12 alignment rows \(alignment_ratio=1.0 of 12\), but there are 6"
    ):
        Mixing(alignment_ratio=1.0).mix(setup(tmp_path))
    with pytest.raises(StayalignedError, match="would replace 12 task rows, but there are 8"):
        Mixing(alignment_ratio=1.0, replace=True).mix(setup(tmp_path, safe=12))
