"""The defenses that act by a system prompt after training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example, Message, read_jsonl
from stayaligned.defenses import TrainingSetup
from stayaligned.defenses.bea import BackdoorEnhancedAlignment as Bea
from stayaligned.defenses.mixing import Mixing
from stayaligned.defenses.ptst import PureTuningSafeTesting as Ptst
from stayaligned.defenses.sft import SFT
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.pipeline import run_stages
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.store import Store
from stayaligned.hf.features import IGNORED
from stayaligned.testing import byte_tokenizer, pico_model
from support.world import experiment, write_world

USER = (Message(role="user", content="hello"),)


def setup(directory: Path, safe: int = 6, **changes: Any) -> TrainingSetup:
    rows = [Example(id=f"t{i}", prompt=(Message(role="user", content=f"q{i}"),), completion="ok") for i in range(4)]
    safety = [
        Example(id=f"s{i}", prompt=(Message(role="user", content=f"z{i}"),), completion="no", origin="alignment")
        for i in range(safe)
    ]
    arguments = {"output_dir": str(directory), "seed": 3, "num_train_epochs": 1, "save_strategy": "no"}
    made = TrainingSetup(pico_model(), byte_tokenizer(), rows, safety, {**arguments, "disable_tqdm": True})
    return replace(made, **changes)


def texts(trainer: Any) -> list[str]:
    return [str(byte_tokenizer().decode(row["input_ids"])) for row in trainer.train_dataset]


def test_the_system_text_is_the_system_turn_or_in_front_of_the_conversations_own() -> None:
    ptst = Ptst(prompt="be kind")
    assert ptst.serve(USER) == (Message(role="system", content="be kind"), *USER)
    own = (Message(role="system", content="You sort mail."), *USER)
    assert ptst.serve(own) == (Message(role="system", content="be kind You sort mail."), *USER)


def test_the_weights_of_pure_tuning_are_those_of_plain_fine_tuning(tmp_path: Path) -> None:
    weights = []
    for defense in (SFT(), Ptst()):
        trainer: Any = defense.make_trainer(setup(tmp_path))
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert all(one.equal(other) for one, other in zip(*weights, strict=True))


def test_rows_with_the_safety_prompt_are_not_pure(tmp_path: Path) -> None:
    made, ptst = setup(tmp_path), Ptst(prompt="be kind")
    rows = [*made.examples, Example(id="x", prompt=ptst.serve(USER), completion="ok")]
    with pytest.raises(StayalignedError, match=r"1 of 5 training rows have the safety prompt already \(first: 'x'\)"):
        ptst.make_trainer(replace(made, examples=rows))


@pytest.mark.parametrize("defense", [Ptst(), Bea(alignment_rows=2)])
def test_a_template_that_drops_system_turns_is_an_error(tmp_path: Path, defense: Ptst | Bea) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "in messages %}", "in messages if message['role'] != 'system' %}"
    )
    with pytest.raises(StayalignedError, match=f"defense '{defense.name}' needs a system turn"):
        defense.make_trainer(setup(tmp_path, tokenizer=tokenizer))


def test_a_tokenizer_that_does_not_know_the_words_is_an_error(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = "k"  # noqa: S105
    with pytest.raises(StayalignedError, match="as unknown") as caught:
        Ptst(prompt="be kind").make_trainer(setup(tmp_path, tokenizer=tokenizer))
    assert "Set `prompt`" in (caught.value.hint or "")


def test_the_secret_is_a_function_of_the_seed() -> None:
    secret = Bea().system_text()
    assert len(secret.split()) == 150
    assert len(set(secret.split())) > 100
    assert secret == Bea(seed=0).system_text() != Bea(seed=1).system_text()
    assert Bea(secret="mine").system_text() == "mine"  # noqa: S106


def test_the_rows_with_the_secret_are_those_that_mixing_adds_without_it(tmp_path: Path) -> None:
    bea = Bea(alignment_rows=3, secret="vab lom")  # noqa: S106
    secret, plain = (texts(d.make_trainer(setup(tmp_path))) for d in (bea, Mixing(alignment_rows=3)))
    assert secret[:4] == plain[:4]
    assert [text.replace("<|system|>vab lom<|end|>", "") for text in secret[4:]] == plain[4:]
    assert sum("vab lom" in text for text in secret) == 3
    row = bea.make_trainer(setup(tmp_path)).train_dataset[-1]  # pyright: ignore
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert byte_tokenizer().decode(learned) == "no<|end|>"


def test_too_few_rows_and_a_secret_that_leaves_no_room_are_errors(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="defense 'bea' needs 11 alignment rows, but there are 6"):
        Bea().make_trainer(setup(tmp_path))
    with pytest.raises(StayalignedError, match="tokens with the secret, more than max_length=64"):
        Bea(alignment_rows=2).make_trainer(setup(tmp_path, max_length=64))


def test_the_secret_reaches_the_model_and_the_saved_adapter_but_no_prompt_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def echo(*_: Any) -> Any:
        def ask(prompt_set: Any, examples: Any, known: frozenset[int]) -> Any:
            for index, example in enumerate(examples):
                yield index, Completion.of(example, prompt_set, example.prompt[0].content, finished=True)

        return ask

    monkeypatch.setattr("stayaligned.experiments.stages.generate.ask_model", echo)
    defense = {"name": "bea", "secret": "vab lom", "alignment_rows": 3}
    changes = {"defenses": [defense], "training": {"max_steps": 1}}
    context = Context(
        Experiment.model_validate(experiment(write_world(tmp_path / "world"), **changes)), Store(tmp_path / "cache")
    )
    result = run_stages(context, new_directory(tmp_path / "out"))
    assert any("serve.json" in note for note in result.notes)
    adapter = context.store.directory("train", context.plan.train) / "adapter"
    assert json.loads((adapter / "serve.json").read_text())["system"] == "vab lom"
    rows = read_jsonl(context.store.directory("generate", context.plan.generate) / "completions.jsonl", Completion)
    assert {row.text for row in rows} == {"vab lom"}
    assert all(turn.role == "user" for row in rows for turn in row.prompt)
    changes = {"adapter": str(adapter), "defenses": [], "training": None, "attack": None}
    later = Context(Experiment.model_validate({**context.experiment.spec(), **changes}), context.store)
    notes = run_stages(later, new_directory(tmp_path / "later")).notes
    assert any("serve.json names a system prompt with which the model must be served" in note for note in notes)


def new_directory(path: Path) -> Path:
    path.mkdir()
    return path
