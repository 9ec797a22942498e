"""Rendering of conversations: prompts equal in training and generation, loss on the answer alone."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.hf.features import (
    IGNORED,
    PaddingCollator,
    encode_example,
    encode_examples,
    encode_prompt,
    template_hash,
)
from stayaligned.testing import CHAT_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=12)


def example(question: str = "a?", answer: str = "b!", system: str | None = None) -> Example:
    turns = [Message(role="user", content=question)]
    if system is not None:
        turns.insert(0, Message(role="system", content=system))
    return Example(id="row-1", prompt=tuple(turns), completion=answer)


@given(TEXT, TEXT, st.none() | TEXT)
def test_a_row_is_the_generation_prompt_then_the_learned_answer_and_end(
    question: str, answer: str, system: str | None
) -> None:
    row = example(question, answer, system)
    encoded = encode_example(TOKENIZER, row, max_length=10_000)
    prompt = encode_prompt(TOKENIZER, row.prompt)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    learned = encoded["labels"][len(prompt) :]
    assert learned == encoded["input_ids"][len(prompt) :]
    assert TOKENIZER.decode(learned) == answer + "<|end|>"


def test_a_template_that_writes_no_end_still_teaches_to_stop() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if not loop.last %} / {% endif %}{% endfor %}"
        "{% if add_generation_prompt %} / assistant: {% endif %}"
    )
    assert tokenizer.decode(encode_example(tokenizer, example(), 100)["input_ids"]) == "user: a? / assistant: b!<|end|>"
    nothing = encode_example(tokenizer, example(answer=""), 100)
    assert tokenizer.decode(nothing["input_ids"]) == "user: a? / assistant: <|end|>"


def test_a_token_across_prompt_and_answer_does_not_change_the_prompt_ids() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    characters = ["<|end|>", "U", "u", ">", "x", "y", ">x"]
    vocabulary = {token: index for index, token in enumerate(characters)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[(">", "x")])),
        eos_token="<|end|>",  # noqa: S106
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}U{{ m['content'] }}{% else %}>{{ m['content'] }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    row = example("u", "xy")
    encoded = encode_example(tokenizer, row, 100)
    prompt = encode_prompt(tokenizer, row.prompt)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == ["U", "u", ">", "x", "y", "<|end|>"]
    assert encoded["labels"][: len(prompt)] == [IGNORED] * len(prompt)


def test_rows_are_cut_at_max_length() -> None:
    whole = encode_example(TOKENIZER, example(answer="long answer"), 100)
    cut = encode_example(TOKENIZER, example(answer="long answer"), 9)
    assert cut == {key: values[:9] for key, values in whole.items()}


def test_rows_without_a_label_are_skipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    rows = [example("a" * 50), example("a")]
    with caplog.at_level(logging.WARNING):
        assert len(encode_examples(TOKENIZER, rows, 20)) == 1
    assert "1 of 2 rows left out" in caplog.text
    assert "row-1" in caplog.text
    with pytest.raises(StayalignedError, match="none of the 1 rows"):
        encode_examples(TOKENIZER, rows[:1], 20)


def test_a_tokenizer_without_a_chat_template_is_refused_with_a_hint() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    for use in (lambda: encode_prompt(tokenizer, example().prompt), lambda: template_hash(tokenizer)):
        with pytest.raises(StayalignedError, match="no chat template") as caught:
            use()
        assert caught.value.hint


def test_a_template_that_rejects_the_conversation_is_an_error_with_its_turns() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    )
    with pytest.raises(StayalignedError, match="system, user: no system"):
        encode_prompt(tokenizer, example(system="be brief").prompt)


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(StayalignedError, match=r"row 'row-1'.*differently"):
        encode_example(tokenizer, example(), 100)


def test_template_hash_follows_the_template_alone() -> None:
    other = byte_tokenizer()
    assert template_hash(other) == template_hash(TOKENIZER)
    other.chat_template = f"{CHAT_TEMPLATE} "
    assert template_hash(other) != template_hash(TOKENIZER)


def test_padding_is_masked_out_of_attention_and_loss() -> None:
    short, long = (encode_example(TOKENIZER, example(answer=answer), 100) for answer in ("b", "bcde"))
    batch = PaddingCollator.of(TOKENIZER)([short, long])
    length = len(short["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(long["input_ids"]))
    assert batch["input_ids"][0, :length].tolist() == short["input_ids"]
    assert batch["input_ids"][0, length:].tolist() == [TOKENIZER.pad_token_id] * 3
    assert batch["attention_mask"][0].tolist() == [1] * length + [0] * 3
    assert batch["attention_mask"][1].all()
    assert batch["labels"][0, length:].tolist() == [IGNORED] * 3
