"""Alignment rows in every form that people pass: each is learned right, or is one error that names what is wrong."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, SFTConfig, SFTTrainer

from stayaligned import Example, Lisa, LisaSettings, Message, StayalignedError, attach_lisa, with_lisa
from stayaligned.hf.features import IGNORED, PaddingCollator
from stayaligned.testing import byte_tokenizer, pico_model

LISA = LisaSettings(alignment_steps=1, finetuning_steps=2)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def conversations(count: int = 4, answer: Any = "no") -> list[dict[str, Any]]:
    return [{"messages": [turn("user", f"q{i}"), turn("assistant", answer)]} for i in range(count)]


def prompted(count: int = 4, prompt: str = "q", answer: Any = "no") -> list[dict[str, Any]]:
    return [{"prompt": [turn("user", prompt)], "completion": [turn("assistant", answer)]} for _ in range(count)]


def questions(answer: str) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": answer} for i in range(4)]


def as_question(row: Any) -> str:
    return f"Q {row['question']} A {row['answer']}"


def sft(
    directory: Path, users: Any, safe: Any, *, formatting_func: Any = None, lisa: Any = LISA, **changes: Any
) -> Any:
    arguments = {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "max_length": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": None,
        **changes,
    }
    collator, tokenizer = arguments.pop("data_collator", None), arguments.pop("tokenizer", byte_tokenizer())
    alignment = {"alignment_trainer" if callable(safe) else "alignment_dataset": safe}
    return with_lisa(SFTTrainer)(
        pico_model(),
        SFTConfig(**arguments),
        train_dataset=Dataset.from_list(users) if isinstance(users, list) else users,
        processing_class=tokenizer,
        formatting_func=formatting_func,
        data_collator=collator,
        lisa=lisa,
        **alignment,
    )


def texts(trainer: Any) -> tuple[str, str]:
    """Return the text of the first alignment row, and the part of it that is learned."""
    row = trainer.train_dataset.datasets[1][0]
    decode = byte_tokenizer().decode
    return decode(row["input_ids"]), decode([label for label in row["labels"] if label != IGNORED])


CHAT = ("<|user|>q0<|end|><|assistant|>no<|end|>", "no<|end|>")


@pytest.mark.parametrize(
    ("users", "safe", "changes", "expected"),
    [
        (questions("a"), questions("no"), {"formatting_func": as_question}, ("Q q0 A no<|end|>",) * 2),
        (questions("a"), conversations(), {"formatting_func": as_question}, CHAT),
        (
            questions("a"),
            conversations(),
            {"formatting_func": lambda row: f"Q {row.get('question', '')} A {row.get('answer', '')}"},
            CHAT,
        ),
        (
            [{"instruction": "i", "input": "x", "output": "o"}] * 4,
            [{"instruction": "i", "output": "no"}] * 4,
            {"formatting_func": lambda row: row["instruction"] + (row.get("input") or "") + row["output"]},
            ("ino<|end|>",) * 2,
        ),
        (
            questions("a"),
            questions("no"),
            {"formatting_func": lambda row: "{question} {answer}".format(**row)},
            ("q0 no<|end|>",) * 2,
        ),
        (
            [{"body": "x"}] * 4,
            [{"text": "no"}] * 4,
            {"dataset_text_field": "body"},
            ("no<|end|>",) * 2,
        ),
        ([{"body": "x"}] * 4, [{"body": "no"}] * 4, {"dataset_text_field": "body"}, ("no<|end|>",) * 2),
        (conversations(), conversations(), {}, CHAT),
        (conversations(), Dataset.from_list(conversations()), {}, CHAT),
        (conversations(), [{"conversations": row["messages"]} for row in conversations()], {}, CHAT),
        (conversations(), conversations(), {"completion_only_loss": False}, (CHAT[0], CHAT[0])),
        (prompted(), conversations(), {"completion_only_loss": True}, CHAT),
        (conversations(), prompted(prompt="q0"), {}, CHAT),
        (conversations(), [{"prompt": "q0", "completion": " no"}] * 4, {}, ("q0 no<|end|>", " no<|end|>")),
        (conversations(), [{"instruction": "q0", "input": "", "output": "no"}] * 4, {}, CHAT),
        (conversations(), [{"prompt": "q0", "chosen": "no", "rejected": "yes"}] * 4, {}, CHAT),
        (conversations(), conversations(answer=[{"type": "text", "text": "no"}]), {}, CHAT),
        (conversations(), conversations(), {"remove_unused_columns": False}, CHAT),
        (
            conversations(),
            [
                Example(id=str(i), prompt=(Message(role="user", content="q0"),), completion="no", origin="alignment")
                for i in range(4)
            ],
            {},
            CHAT,
        ),
    ],
)
def test_alignment_rows_in_the_users_own_form_or_one_of_trls_are_learned(
    tmp_path: Path, users: Any, safe: Any, changes: dict[str, Any], expected: tuple[str, str]
) -> None:
    trainer = sft(tmp_path, users, safe, **changes)
    assert texts(trainer) == expected
    if "formatting_func" in changes or "remove_unused_columns" in changes:
        trainer.train()


@pytest.mark.parametrize(
    ("users", "safe", "formatting_func"),
    [
        (conversations(), conversations(), None),
        (questions("a"), questions("no"), as_question),
        (conversations(), prompted(), None),
    ],
)
def test_streams_of_alignment_rows_are_learned(tmp_path: Path, users: Any, safe: Any, formatting_func: Any) -> None:
    stream = Dataset.from_list(safe).to_iterable_dataset()
    trainer = sft(tmp_path, users, stream, formatting_func=formatting_func)
    trainer.train()
    assert trainer.state.global_step == 3


@functools.cache
def host(**changes: str) -> SFTTrainer:
    """Return a trainer, which a failed `attach_lisa` leaves unchanged, so that several tests can use it."""
    read: dict[str, Any] = {name: json.loads(value) for name, value in changes.items()}
    users = FEATURES if "dataset_kwargs" in read else conversations(16)
    settings = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 2, "max_steps": 3, "max_length": 64}
    return SFTTrainer(
        pico_model(),
        SFTConfig(tempfile.mkdtemp(), **settings, disable_tqdm=True, **read),  # pyright: ignore
        train_dataset=Dataset.from_list(users),
        processing_class=byte_tokenizer(),
    )


FEATURES = [{"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]}] * 4


@pytest.mark.parametrize(
    ("safe", "changes", "expected"),
    [
        ("safety.jsonl", {}, "alignment_dataset is the text 'safety.jsonl', not a dataset"),
        (Path("safety.jsonl"), {}, "not a dataset"),
        (DatasetDict(train=Dataset.from_list(conversations())), {}, "a DatasetDict of train, not one dataset"),
        ({"text": ["a"]}, {}, "alignment_dataset is a dict of text"),
        (iter(conversations()), {}, "can be read only once"),
        (["no"] * 4, {}, "are of type str, not mappings of columns"),
        ([], {}, "alignment_dataset is empty"),
        ([{"ask": "q", "say": "no"}] * 4, {}, "columns ask, say, which SFTTrainer does not read"),
        ([{"prompt": "q"}] * 4, {}, "no completion to learn"),
        ([{"text": 5}] * 4, {}, "SFTTrainer can't prepare the alignment rows (columns text): AttributeError"),
        (
            [{"prompt": [turn("user", "q")], "completion": "no"}] * 4,
            {},
            "SFTTrainer can't prepare the alignment rows (columns prompt, completion): TypeError",
        ),
        ([{"messages": [turn("user", "q")]}] * 4, {}, "does not end with an assistant's answer: its roles are user"),
        ([{"messages": None}, *conversations()], {}, "does not end with an assistant's answer"),
        (conversations(answer=None), {}, "every answer of alignment_dataset is blank"),
        (
            [{"messages": [turn("user", [{"type": "image", "text": ""}]), turn("assistant", "no")]}] * 4,
            {},
            "contents of type image",
        ),
        ([{**row, "image": "x"} for row in conversations()], {}, "the alignment rows have images"),
        (prompted(prompt="q" * 90), {}, "no alignment row has a completion within max_length=64"),
        (conversations(), {"dataset_kwargs": {"skip_prepare_dataset": True}}, "the alignment rows lack input_ids"),
        (
            [{"input_ids": [4, 5], "completion_mask": [0, 1]}] * 4,
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            "the alignment rows have masks but no labels",
        ),
        (Dataset.from_list(questions("no")).to_iterable_dataset(), {}, "a stream of rows with columns question"),
        (IterableDataset.from_generator(lambda: iter(())), {}, "a stream of rows is empty"),
        (DPOTrainer, {}, "alignment_trainer is the class DPOTrainer, not a function"),
        (conversations(1), {}, "fewer than a batch of 2"),
        (conversations(2), {"packing": True, "packing_strategy": "wrapped"}, "rows after packing, fewer than a batch"),
    ],
)
def test_alignment_rows_that_can_not_be_learned_are_one_error(
    safe: Any, changes: dict[str, Any], expected: str
) -> None:
    trainer = host(**{name: json.dumps(value) for name, value in changes.items()})
    rows = {"alignment_trainer" if callable(safe) else "alignment_dataset": safe}
    with pytest.raises(StayalignedError) as error:
        attach_lisa(trainer, lisa=LISA, **rows)
    assert type(trainer) is SFTTrainer
    assert expected in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("users", ["rows.jsonl", DatasetDict(train=Dataset.from_list(conversations())), iter([1])])
def test_user_rows_that_are_no_dataset_are_one_error(tmp_path: Path, users: Any) -> None:
    with pytest.raises(StayalignedError, match="train_dataset is"):
        sft(tmp_path, users, conversations())


def test_a_formatting_function_that_fails_on_the_alignment_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match=r"formatting_func fails on them: KeyError: 'question'"):
        sft(tmp_path, questions("a"), [{"ask": "q", "say": "no"}] * 4, formatting_func=as_question)


@pytest.mark.parametrize(
    ("safe", "changes", "expected"),
    [
        (prompted(3) + prompted(2, prompt="q" * 90), {}, "2 of 5 alignment rows left out: their prompts fill max_len"),
        (prompted(3) + prompted(2, answer="n" * 90), {}, "2 of 5 alignment rows are cut at max_length=64 tokens"),
        (
            conversations(3) + conversations(2, answer=" "),
            {},
            "2 of 5 alignment rows left out: their answers are blank",
        ),
        (conversations(3) + conversations(2, answer=None), {}, "2 of 5 alignment rows left out"),
        ([{"text": "q no"}] * 4, {}, "every token of the alignment rows is learned"),
        (conversations(), {"completion_only_loss": False}, "every token of the alignment rows is learned"),
        ([{"messages": row["messages"] * 2} for row in conversations()], {}, "4 of 4 alignment rows have several ans"),
    ],
)
def test_what_of_the_alignment_rows_is_not_learned_is_said_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, safe: Any, changes: dict[str, Any], expected: str
) -> None:
    with caplog.at_level(logging.WARNING):
        sft(tmp_path, conversations(), safe, **changes)
    assert expected in caplog.text


def test_user_rows_that_are_left_out_or_cut_are_said_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users = prompted(3) + prompted(2, prompt="q" * 90) + prompted(1, answer="n" * 90)
    with caplog.at_level(logging.WARNING):
        sft(tmp_path, users, conversations())
    assert "2 of 6 training rows left out" in caplog.text
    assert "1 of 6 training rows are cut" in caplog.text


def test_a_template_that_does_not_show_the_answer_is_an_error(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        pico_model(),
        SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=3, per_device_train_batch_size=2),
        train_dataset=Dataset.from_list([{"text": "x"}] * 4),
        processing_class=byte_tokenizer(),
    )
    tokenizer: Any = trainer.processing_class
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['contents']").replace(
        "message.content", "message.contents"
    )
    with pytest.raises(StayalignedError, match="does not show the request of the alignment rows"):
        attach_lisa(trainer, lisa=LISA, alignment_dataset=prompted())


def of_known_length(rows: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"][: row["length"]] for row in rows])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def masks_all(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {**of_known_length([{**row, "length": 3} for row in rows]), "labels": torch.full((len(rows), 3), IGNORED)}


@pytest.mark.parametrize(
    ("collator", "expected"),
    [
        (of_known_length, r"columns input_ids, labels; the user's rows also have length\): KeyError: 'length'"),
        (masks_all, "the data collator masks every label of the alignment rows"),
    ],
)
def test_a_collator_that_can_not_read_the_alignment_rows_is_an_error_before_training(
    tmp_path: Path, collator: Any, expected: str
) -> None:
    users = [{**row, "length": 3} for row in FEATURES]
    with pytest.raises(StayalignedError, match=expected):
        sft(tmp_path, users, FEATURES, data_collator=collator, remove_unused_columns=False)


@pytest.mark.parametrize(
    "lisa",
    [
        Lisa(alignment_steps=1, finetuning_steps=2),
        {"alignment_steps": 1, "finetuning_steps": 2},
        {"name": "lisa", "alignment_steps": 1, "finetuning_steps": 2, "rho": 1},
    ],
)
def test_the_settings_may_be_a_defense_or_a_mapping(tmp_path: Path, lisa: Any) -> None:
    trainer = sft(tmp_path, conversations(), conversations(), lisa=lisa)
    assert trainer._lisa == LISA


@pytest.mark.parametrize(
    ("lisa", "expected"),
    [
        ({"rhoo": 1}, "lisa has no setting 'rhoo'"),
        ({"rho": "1"}, "rho='1' is not a number"),
        ({"rho": True}, "rho=True is not a number"),
        ({"alignment_steps": 1.5}, "alignment_steps=1.5 is not a whole number"),
        ({"drift_from_start": "no"}, "drift_from_start='no' is not True or False"),
        (Lisa, "lisa is the class Lisa"),
        (None, "lisa is missing"),
        ("lisa", "lisa is of type str"),
        (1.0, "lisa is of type float"),
        ({"rho": 1}, "a run of 3 optimizer steps never trains on the user's rows"),
        (Lisa(), "a run of 3 optimizer steps never trains on the user's rows"),
    ],
)
def test_settings_of_another_form_or_for_a_longer_run_are_one_error(tmp_path: Path, lisa: Any, expected: str) -> None:
    with pytest.raises(StayalignedError) as error:
        sft(tmp_path, conversations(), conversations(), lisa=lisa)
    assert expected in error.value.message
    assert error.value.hint


def test_a_run_of_few_epochs_that_never_trains_on_the_users_rows_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, num_train_epochs=2, per_device_train_batch_size=2)
    rows: Any = FEATURES
    trainer = Trainer(pico_model(), arguments, train_dataset=rows, data_collator=PaddingCollator(0))
    with pytest.raises(StayalignedError, match="a run of 4 optimizer steps never trains"):
        attach_lisa(trainer, lisa=LisaSettings(), alignment_dataset=FEATURES)
    attach_lisa(trainer, lisa=LISA, alignment_dataset=FEATURES)
    trainer.args.num_train_epochs, trainer.args.max_steps = 1, 1
    with pytest.raises(StayalignedError, match="a run of 1 optimizer steps never trains"):
        trainer.train()


KTO = [{"prompt": "q", "completion": "a", "label": good} for good in (True, True, False)]


@pytest.mark.parametrize("safe", [KTO, IterableDataset.from_generator(lambda: iter(KTO[::-1]))])
def test_alignment_rows_that_are_marked_as_bad_are_an_error(tmp_path: Path, safe: Any) -> None:
    with pytest.raises(StayalignedError, match="`label` is False, so its answer is one not to learn"):
        sft(tmp_path, prompted(), safe)
    sft(tmp_path, prompted(), KTO[:2])


def test_tool_calls_that_the_template_does_not_show_are_an_error(tmp_path: Path) -> None:
    called = {**turn("assistant", ""), "tool_calls": [{"type": "function", "function": {"name": "look_up"}}]}
    with pytest.raises(StayalignedError, match=r"does not show the tool calls of the alignment rows \(look_up\)"):
        sft(tmp_path, prompted(), [{"messages": [turn("user", "q"), called]}] * 4)


def test_labels_that_do_not_match_the_tokens_are_an_error(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 1], "labels": [IGNORED, 7, 1]}] * 4
    with pytest.raises(StayalignedError, match="has 4 tokens in `input_ids` and 3 in `labels`"):
        sft(tmp_path, prompted(), rows)


def test_tokens_that_the_embedding_lacks_are_an_error_before_training(tmp_path: Path) -> None:
    padded, extended = byte_tokenizer(), byte_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(StayalignedError, match=r"train_dataset has the token 261, .* embedding has 261 rows"):
        sft(tmp_path, prompted(), prompted(), tokenizer=padded)
    extended.add_tokens(["<new>"])
    with pytest.raises(StayalignedError, match="alignment_dataset has the token 261"):
        sft(tmp_path, prompted(), prompted(answer="<new>"), tokenizer=extended)
