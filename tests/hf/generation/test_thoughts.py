"""Thoughts as the chat templates of the installed packages write them."""

from pathlib import Path
from typing import Any

import pytest
import trl

from stayaligned.core.thoughts import opened_thoughts, split_thoughts
from stayaligned.testing import byte_tokenizer

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
ASKED = [{"role": "user", "content": "why?"}]
ANSWERED = {"role": "assistant", "content": "Step one.", **dict.fromkeys(("reasoning_content", "thinking"), "Illegal?")}


def written(path: Path, **arguments: Any) -> str | None:
    """What a model writes that follows a template, with the mark that its prompt opened; None if it does not think."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False, **arguments)
    full = tokenizer.apply_chat_template([*ASKED, ANSWERED], tokenize=False, **arguments)
    if "Illegal?" not in full or not full.startswith(prompt):
        return None
    return opened_thoughts(prompt) + full[len(prompt) :]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_final_answer_of_every_template_that_thinks_is_found(path: Path) -> None:
    if path.stem.startswith("llava_next"):  # wants content as parts
        return
    for text in filter(None, (written(path), written(path, enable_thinking=True))):
        found = split_thoughts(text)
        assert (found.answer, found.thoughts) == ("Step one.", "Illegal?")
        cut = split_thoughts(text[: text.index("Illegal?") + 4], finished=False)
        assert cut.answer is None


def test_many_templates_think() -> None:
    thinking = [path for path in TEMPLATES if not path.stem.startswith("llava_next") and written(path)]
    assert len(thinking) >= 12
