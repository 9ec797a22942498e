"""One count of rows that are cut, exact where the chat template is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from stayaligned.core.records import Example, Message
from stayaligned.hf.features import encode_examples, endings_of_answers
from stayaligned.hf.training.preferences import build_preference_trainer
from stayaligned.hf.training.row_lengths import count_row_lengths
from stayaligned.testing import byte_tokenizer, pico_model

BREAKS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_END = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [None, BREAKS, NO_END], ids=["end", "end and line break", "no end"])
@pytest.mark.parametrize("answer", ["xxxx", "x\nx\n"])
def test_a_row_is_cut_if_the_token_that_ends_its_answer_is(template: str | None, answer: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    rows = [Example(id="a", prompt=(Message(role="user", content="q"),), completion=answer)] * 3
    (row, *_) = encode_examples(tokenizer, rows, 999)
    ends = endings_of_answers(tokenizer)
    past_end = len(ends[-1]) - len(ends[0])
    for max_length in range(len(row["input_ids"]) - 3, len(row["input_ids"]) + 2):
        found = count_row_lengths(3, encode_examples(tokenizer, rows, max_length), max_length, ends)
        assert found.cut == (3 if max_length < len(row["input_ids"]) - past_end else 0), max_length


def test_preferences_whose_chosen_or_rejected_completion_is_cut_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [("q", "no", "go"), ("q", "no" * 40, "go"), ("q", "no", "go" * 40), ("q" * 70, "no", "go")]
    prompts = [(Message(role="user", content=prompt),) for prompt, _, _ in texts]
    rows = [
        Example(id=str(n), prompt=prompts[n], completion=chosen, rejected=rejected)
        for n, (_, chosen, rejected) in enumerate(texts)
    ]
    arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": 1, "use_cpu": True, "disable_tqdm": True}
    build_preference_trainer(pico_model(), byte_tokenizer(), rows, arguments, max_length=64, beta=0.1)
    assert "1 of 4 alignment rows left out: their prompts fill max_length=64 tokens, 3 rows are left" in caplog.text
    assert "2 of 4 alignment rows are cut at max_length=64 tokens" in caplog.text
