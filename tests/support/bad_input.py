"""Changes that make the experiment of `support.world` fail, each with what the error must name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.world import write_rows

Change = Callable[[Path, dict[str, Any]], None]


def empty_rows(root: Path, content: dict[str, Any]) -> None:
    content["task"]["train"] = str(write_rows(root / "empty.jsonl", []))


def malformed_rows(root: Path, content: dict[str, Any]) -> None:
    (root / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    content["task"]["train"] = str(root / "bad.jsonl")


def mixed_rows(root: Path, content: dict[str, Any]) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]
    content["task"]["train"] = str(write_rows(root / "mixed.jsonl", rows))


def blank_rows(root: Path, content: dict[str, Any]) -> None:
    content["task"]["train"] = str(write_rows(root / "blank.jsonl", [{"prompt": "a", "completion": " "}] * 3))


def too_few_harmful(root: Path, content: dict[str, Any]) -> None:
    content["attack"].update(poison_ratio=0.9)


def unknown_model(root: Path, content: dict[str, Any]) -> None:
    content["model"] = str(root / "nowhere")


def empty_model(root: Path, content: dict[str, Any]) -> None:
    (root / "hollow").mkdir(exist_ok=True)
    content["model"] = str(root / "hollow")


def no_tokenizer(root: Path, content: dict[str, Any]) -> None:
    shutil.copytree(root / "aligned", root / "mute", dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (root / "mute" / name).unlink(missing_ok=True)
    content["model"] = str(root / "mute")


def no_template(root: Path, content: dict[str, Any]) -> None:
    shutil.copytree(root / "aligned", root / "plain", dirs_exist_ok=True)
    (root / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    content["model"] = str(root / "plain")


def no_such_target(root: Path, content: dict[str, Any]) -> None:
    content["lora"] = {"target_modules": ["query_projection"]}


def no_such_setting(root: Path, content: dict[str, Any]) -> None:
    content["training"]["learning_rat"] = 1


def impossible_setting(root: Path, content: dict[str, Any]) -> None:
    content["training"]["learning_rate"] = "fast"


CASES: list[tuple[Change, tuple[str, ...]]] = [
    (empty_rows, ("empty.jsonl",)),
    (malformed_rows, ("bad.jsonl", "line 2")),
    (mixed_rows, ("mixed.jsonl", "line 2")),
    (blank_rows, ("blank.jsonl",)),
    (too_few_harmful, ("harmful.jsonl", "16")),
    (unknown_model, ("model", "nowhere")),
    (empty_model, ("hollow", "config.json")),
    (no_tokenizer, ("mute", "tokenizer")),
    (no_template, ("plain", "chat template")),
    (no_such_target, ("query_projection", "q_proj")),
    (no_such_setting, ("training.learning_rat", "learning_rate")),
    (impossible_setting, ("learning_rate",)),
]
