"""Chat templates that real models have: asked, learned, ended and judged right, or refused in one error.

`UPDATE=1 pytest tests/hf/test_real_templates.py` writes the table in `docs/reference/chat-templates.md`. TRL's
templates are read from the installed package; those of families that it lacks are written in their manner in
`templates/`.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.core.settings import ChatTemplate
from stayaligned.core.thoughts import opened_thoughts, split_thoughts
from stayaligned.hf.features import IGNORED, encode_example, encode_prompt, end_of_answer
from stayaligned.hf.generation.generate import _cut_at_end, opened_in_prompt  # pyright: ignore[reportPrivateUsage]
from stayaligned.hf.rendering import read_variables, use_settings
from stayaligned.testing import byte_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "chat-templates.md"
BEGIN, END = "<!-- template table -->\n", "<!-- end of the table -->\n"
_TRL = find_spec("trl")
FOLDERS = [Path(str(_TRL and _TRL.origin)).parent / "chat_templates", Path(__file__).parent / "templates"]
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted(folder.glob("*.jinja"))
    if not path.stem.endswith("_training")
}
_SPECIAL = re.compile(
    r"<\|[^\s<>|{}'\"]+\|>|<｜[^\s<>]+?｜>|<\|[a-z_]+>|<[a-z]+\|>|<(?:start|end)_of_[a-z]+>|</?s>|\[/?[A-Z_]{3,}\]"
)
ROWS = {
    "user": [("user", "what is the request?")],
    "several": [("user", "a first turn"), ("assistant", "an earlier reply"), ("user", "what is the request?")],
    "system": [("system", "be calm."), ("user", "what is the request?")],
    "system, several": [
        ("system", "be calm."),
        ("user", "a first turn"),
        ("assistant", "an earlier reply"),
        ("user", "what is the request?"),
    ],
}
ANSWERS = ("The answer.", "two\n\nlines  of 'text'", "e", "1")


def tokenizer_of(template: str) -> Any:
    """Return a byte tokenizer with the special tokens that a template writes."""
    tokenizer = byte_tokenizer()
    special = ["<|bos|>", *dict.fromkeys(_SPECIAL.findall(template))]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<|bos|>"})
    tokenizer.chat_template = template
    use_settings(tokenizer, ChatTemplate())
    return tokenizer


def check(tokenizer: Any, turns: list[tuple[str, str]], answer: str) -> None:
    """Check the whole way of a row: what is asked, learned, generated and judged."""
    row = Example(id="x", prompt=tuple(Message(role=r, content=c) for r, c in turns), completion=answer)  # pyright: ignore
    prompt = encode_prompt(tokenizer, row.prompt)
    asked = tokenizer.decode(prompt)
    for _, content in turns:
        assert asked.count(content) == 1
    assert asked.rfind("what is the request?") > asked.find("a first turn")
    encoded = encode_example(tokenizer, row, 100_000)
    assert encoded["input_ids"][: len(prompt)] == prompt
    learned = [label for label in encoded["labels"] if label != IGNORED]
    assert learned == encoded["input_ids"][len(prompt) :]
    # A model that has learned the row writes it, up to the token at which generation stops.
    end = end_of_answer(tokenizer)
    assert end in learned
    written = _cut_at_end(tokenizer, learned, [end])
    text = opened_in_prompt(tokenizer, row.prompt, prompt) + written.text
    found = split_thoughts(text, finished=True)
    expected = split_thoughts(answer)
    assert found.answer is not None
    assert found.answer.strip() == (expected.answer or "").strip()
    assert found.thoughts.strip() == expected.thoughts.strip()


def facts(name: str) -> list[str]:
    """Return the template's line in the table."""
    tokenizer = tokenizer_of(TEMPLATES[name])
    row = Example(id="x", prompt=(Message(role="user", content="what is the request?"),), completion="ANSWER")
    asked = tokenizer.decode(encode_prompt(tokenizer, row.prompt))
    learned = tokenizer.decode([i for i in encode_example(tokenizer, row, 10_000)["labels"] if i != IGNORED])
    try:
        check(tokenizer, ROWS["system"], "ANSWER")
        system = "yes"
    except StayalignedError:
        system = "refused"
    before = learned.partition("ANSWER")[0].strip()
    thoughts = "closed, learned" if opened_thoughts(asked) else ("before the answer" if "think" in before else "")
    text = TEMPLATES[name]
    own = sorted(read_variables(tokenizer, text) & {"enable_thinking", "thinking", "reasoning_effort", "date_string"})
    end = tokenizer.convert_ids_to_tokens(end_of_answer(tokenizer))
    return [
        f"`{name}`",
        "parts" if "as_parts" in tokenizer.chat_template else "text",
        system,
        thoughts,
        "fixed" if "strftime_now" in text else "",
        f"`{end}`" if end in text else "end of sequence",
        ", ".join(f"`{each}`" for each in own),
    ]


def table() -> str:
    head = ["template", "content", "system turn", "thoughts", "date", "end", "arguments"]
    lines = [head, ["---"] * len(head), *(facts(name) for name in sorted(TEMPLATES))]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def test_there_are_enough_templates() -> None:
    assert len(TEMPLATES) >= 45


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_real_template_is_right_from_the_request_to_the_judge_or_refused(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    for turns in ROWS.values():
        for answer in ANSWERS:
            try:
                check(tokenizer, turns, answer)
            except StayalignedError as error:
                assert turns[0][0] == "system"
                assert "system" in str(error)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_with_thoughts_is_learned_and_judged_with_them_or_refused(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    try:
        check(tokenizer, ROWS["user"], "<think>\nI ponder.\n</think>\n\nThe answer.")
    except StayalignedError as error:
        assert "thoughts" in str(error)


def test_the_page_has_the_table_of_the_known_templates() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    written, after = rest.split(END)
    if os.environ.get("UPDATE"):
        PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
        return
    # A new version of TRL may carry more templates: they are tested above, and in the table after an update.
    assert set(written.splitlines()) <= set(table().splitlines())
