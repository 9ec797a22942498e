"""What the model is asked contains the request; what is learned contains the answer and its end."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.core.settings import ChatTemplate
from stayaligned.hf.features import (
    IGNORED,
    encode_example,
    encode_prefix,
    encode_prompt,
    end_of_answer,
    template_hash,
)
from stayaligned.hf.rendering import save_tokenizer, unbound, use_settings
from stayaligned.testing import CHAT_TEMPLATE, byte_tokenizer

END = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURN = "<|{{ m['role'] }}|>"
PARTS = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"


def tokenizer_of(template: Any, *tokens: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


def loop(body: str, *, end: str = END) -> str:
    return f"{{% for m in messages %}}{body}{{% endfor %}}{end}"


def example(*contents: str, answer: str = "ANSWER", system: str | None = None) -> Example:
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role=role, content=text) for role, text in zip(roles, contents, strict=False)]
    first = [] if system is None else [Message(role="system", content=system)]
    return Example(id="row-1", prompt=(*first, *turns), completion=answer)


def asked(tokenizer: Any, row: Example) -> str:
    return tokenizer.decode(encode_prompt(tokenizer, row.prompt))


def learned(tokenizer: Any, row: Example) -> str:
    encoded = encode_example(tokenizer, row, 100_000)
    prompt = encode_prompt(tokenizer, row.prompt)
    assert encoded["input_ids"][: len(prompt)] == prompt
    return tokenizer.decode([label for label in encoded["labels"] if label != IGNORED])


# ---- a chat template that does not show the request or the answer ----------------------------------------------------

SHOWN = {
    "text": loop(f"{TURN}{{{{ m['content'] }}}}<|end|>"),
    "parts": loop(f"{TURN}{PARTS}<|end|>"),
    "parts by attribute": loop(TURN + "{% for p in m.content %}{{ p.text }}{% endfor %}<|end|>"),
    "the first part alone": loop(TURN + "{{ m['content'][0]['text'] }}<|end|>"),
    "parts selected": loop(
        TURN + "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}<|end|>"
    ),
    "a system turn as text, the others as parts": loop(
        TURN + "{% if m['role'] == 'system' %}{{ m['content'] + '' }}{% else %}" + PARTS + "{% endif %}<|end|>"
    ),
    "trimmed": loop(TURN + "{{ m['content'] | trim }}<|end|>"),
    "as JSON": loop(TURN + "{{ m['content'] | tojson }}<|end|>"),
    "a folded system turn": (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
        + loop(TURN + "{{ (first if loop.first else '') + m['content'] }}<|end|>")
    ),
}
HIDDEN = {
    "a misspelt key": (loop(f"{TURN}{{{{ m['contents'] }}}}<|end|>"), "leaves out the user's turn"),
    "the other tool's key": (loop("<|{{ m['from'] }}|>{{ m['value'] }}<|end|>"), "leaves out the user's turn"),
    "images alone": (
        loop(TURN + "{% for p in m['content'] %}{% if p.type == 'image' %}<img>{% endif %}{% endfor %}<|end|>"),
        "leaves out the user's turn",
    ),
    "the last turn alone": (
        "{% set m = messages[-1] %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>" + END,
        "leaves out the user's turn",
    ),
    "another case": (loop(TURN + "{{ m['content'] | upper }}<|end|>"), "changes the user's turn"),
    "no answers": (
        loop("{% if m['role'] != 'assistant' %}" + TURN + "{{ m['content'] }}{% endif %}<|end|>"),
        "does not show the answer",
    ),
    "the answer first": (
        "{% for m in messages | reverse %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}" + END,
        "does not show the answer after the request",
    ),
    "the form of the content": (loop(TURN + "{{ m['content'] + [] }}<|end|>"), "the chat template"),
    "a word before the answer": (
        loop(TURN + "{% if m['role'] == 'assistant' %}all\n{% endif %}{{ m['content'] }}<|end|>"),
        "writes 'all",
    ),
    "an error of type": (loop(TURN + "{{ m['content'] + 1 }}<|end|>"), "TypeError"),
    "an unknown name": (loop(TURN + "{{ turn.content }}<|end|>"), "UndefinedError: 'turn' is undefined"),
    "a division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "an endless loop": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    "an error that it raises": (
        "{{ raise_exception('no models today') }}",
        "user, assistant: no models today|no models",
    ),
    "a syntax error": ("{% for m in messages %}{{ m", "not valid Jinja: line 1"),
    "an unclosed block": ("{% if messages %}\n{{ messages }}", "not valid Jinja"),
    "named, none the default": ({"rag": SHOWN["text"], "tool_use": SHOWN["text"]}, "rag, tool_use, and none"),
    "none": (None, "no chat template"),
    "empty": ("", "no chat template"),
}


@pytest.mark.parametrize("template", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("system", [None, "SYSTEM"])
def test_a_template_shows_the_request_and_the_answer_in_the_form_it_wants(template: str, system: str | None) -> None:
    tokenizer = tokenizer_of(template)
    for row in (example("FIRST", system=system), example("FIRST", "SECOND", "THIRD", system=system)):
        text = asked(tokenizer, row)
        assert all(text.count(message.content) == 1 for message in row.prompt)
        assert "type" not in text
        assert learned(tokenizer, row).strip('"').startswith("ANSWER")
        assert learned(tokenizer, row).endswith("<|end|>")


@pytest.mark.parametrize(
    "template",
    [
        loop(TURN + "{{ m['content'] }}<|end|>", end=""),
        loop("<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n", end=""),
        loop("### {{ m['role'] }}:\n{{ m['content'] }}<|end|>\n\n", end=""),
        loop("{% if m['role'] == 'user' %}Q: {% else %}\nA: {% endif %}{{ m['content'] }}<|end|>", end=""),
    ],
    ids=["a token", "ChatML", "Markdown", "question and answer"],
)
def test_a_template_whose_role_header_would_be_a_part_of_the_answer_names_the_line_to_add(template: str) -> None:
    tokenizer = tokenizer_of(template, "<|im_start|>", "<|im_end|>")
    with pytest.raises(StayalignedError, match="ignores `add_generation_prompt`") as caught:
        encode_prompt(tokenizer, example("hello").prompt)
    (line,) = re.findall(r"\{% if add_generation_prompt.*endif %\}", caught.value.hint or "")
    tokenizer.chat_template = template + line
    assert learned(tokenizer, example("hello")).strip().startswith("ANSWER")


def test_a_template_without_a_header_of_answers_needs_no_generation_prompt() -> None:
    body = (
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}<|end|>{% endif %}"
    )
    assert learned(tokenizer_of(loop(body, end="")), example("hello")) == " ANSWER<|end|>"


@pytest.mark.parametrize(("template", "message"), HIDDEN.values(), ids=HIDDEN)
def test_a_template_that_hides_the_request_or_the_answer_is_one_error(template: Any, message: str) -> None:
    tokenizer = tokenizer_of(template)
    for use in (
        lambda: encode_prompt(tokenizer, example("hello").prompt),
        lambda: encode_example(tokenizer, example("hello"), 100),
        lambda: encode_prefix(tokenizer, example("hello").prompt, "Sorry"),
        lambda: use_settings(tokenizer, ChatTemplate()),
        lambda: end_of_answer(tokenizer),
    ):
        with pytest.raises(StayalignedError, match=message) as caught:
            use()
        assert caught.value.hint


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            loop("{% if m['role'] != 'system' %}" + TURN + "{{ m['content'] }}<|end|>{% endif %}"),
            example("hello", system="be brief"),
            "leaves out the system's turn",
        ),
        (
            loop(TURN + "{{ m['content'].split('</think>')[-1] }}<|end|>"),
            example("a secret </think> and the rest"),
            "leaves out a part of a user's turn",
        ),
        (loop(TURN + "{{ m['content'][:8] }}<|end|>"), example("a request that is long"), "user"),
        (loop(TURN + "{{ m['content'] | replace('kingdom', '') }}<|end|>"), example("the kingdom's gate"), "user"),
        (
            "{% for m in messages %}{% if m['role'] == 'user' and not loop.first %}{% else %}" + TURN
            + "{{ m['content'] }}<|end|>{% endif %}{% endfor %}" + END,
            example("one", "two", "three"),
            "leaves out the user's turn",
        ),
        (
            loop(TURN + "{{ m['content'] if m['role'] == 'user' else m['content'][:10] }}<|end|>"),
            example("hello", answer="an answer that is long"),
            "part of the answer",
        ),
        (
            loop(TURN + "{{ m['content'].split('</think>')[-1] }}<|end|>"),
            example("hello", answer="<think>\nhmm\n</think>\n\nyes"),
            "part of the answer",
        ),
    ],
    ids=["system turn", "thoughts in a request", "cut", "censored", "later turns", "cut answer", "dropped thoughts"],
)  # fmt: skip
def test_a_row_whose_content_the_template_drops_is_one_error(template: str, row: Example, message: str) -> None:
    with pytest.raises(StayalignedError, match=message):
        encode_example(tokenizer_of(template), row, 100_000)


def test_words_that_switch_thoughts_may_be_taken_out_of_a_turn() -> None:
    tokenizer = tokenizer_of(loop(TURN + "{{ m['content'].replace('/no_think', '').rstrip() }}<|end|>"))
    assert asked(tokenizer, example("hello /no_think", system="be brief /no_think")).count("hello<|end|>") == 1


# ---- the end of an answer --------------------------------------------------------------------------------------------

THINKS = "{% if m['role'] == 'assistant' %}<think></think>\n{% endif %}{{ m['content'].strip() }}"


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (loop(f"{TURN}{THINKS}"), "yes", "<think></think>\nyes<|end|>"),
        (loop(f"{TURN}{THINKS}"), "  yes\n", "<think></think>\nyes<|end|>"),
        (loop(f"{TURN}{{{{ m['content'] }}}}\n"), "yes", "yes\n<|end|>"),
        (loop(f"{TURN}{{{{ m['content'] }}}}<|stop|>\n"), "yes", "yes<|stop|>\n"),
        (loop(f"{TURN}{{{{ m['content'] }}}}<|stop|>\n"), "the <|stop|> token", "the <|stop|> token<|stop|>\n"),
        (
            loop(TURN + "{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}{{ m.content }}<|stop|>"),
            "yes",
            "<|channel|>final<|message|>yes<|stop|>",
        ),
    ],
    ids=["no end, rewritten", "no end, trimmed", "no end, a line break", "an end", "its token in the answer", "marks"],
)
def test_what_is_learned_ends_with_a_token_at_which_generation_stops(template: str, answer: str, expected: str) -> None:
    tokenizer = tokenizer_of(template, "<|stop|>", "<|channel|>", "<|message|>")
    row = example("hello", answer=answer)
    assert learned(tokenizer, row) == expected
    end = tokenizer.convert_ids_to_tokens(end_of_answer(tokenizer))
    assert end == ("<|stop|>" if "<|stop|>" in template else "<|end|>")
    assert end_of_answer(tokenizer) in encode_example(tokenizer, row, 1000)["labels"]


@pytest.mark.parametrize("end", ["<|im_end|>", "### End", "</s>"])
def test_an_end_that_is_no_token_is_refused_in_training(end: str) -> None:
    tokenizer = tokenizer_of(loop(f"{TURN}{{{{ m['content'] }}}}{end}"))
    with pytest.raises(StayalignedError, match=f"ends an answer with '{end}'"):
        encode_example(tokenizer, example("hello"), 100)
    assert asked(tokenizer, example("hello"))


def test_a_tokenizer_without_any_end_is_refused_in_training() -> None:
    tokenizer = tokenizer_of(loop(TURN + "{{ m['content'] }}"))
    tokenizer.eos_token = None
    with pytest.raises(StayalignedError, match="no end-of-sequence token"):
        encode_example(tokenizer, example("hello"), 100)


# ---- thoughts that the generation prompt opens -----------------------------------------------------------------------

OPENS = "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
OPENING = {
    "opened only to generate": loop(TURN + "{{ m['content'].split('</think>')[-1] }}<|end|>", end=OPENS),
    "closed at once": loop(
        TURN + "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>",
        end=OPENS,
    ),
    "never closed": loop(
        TURN + "{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content.split('</think>')[-1] }}<|end|>",
        end=OPENS,
    ),
    "other marks": loop(TURN + "{{ m.content }}<|end|>", end=OPENS.replace("<think>\n", "[THINK]")),
}  # fmt: skip


@pytest.mark.parametrize("template", OPENING.values(), ids=OPENING)
def test_thoughts_that_the_prompt_opens_are_closed_before_the_answer(template: str) -> None:
    tokenizer = tokenizer_of(template)
    text = learned(tokenizer, example("hello"))
    thoughts, mark, rest = text.partition("[/THINK]" if "[THINK]" in template else "</think>")
    assert mark
    assert not thoughts.strip()
    assert rest.strip() == "ANSWER<|end|>"
    if "[THINK]" not in template:
        assert learned(tokenizer, example("hello", answer="<think>\nhmm\n</think>\n\nyes")).split() == [
            "hmm", "</think>", "yes<|end|>"
        ]  # fmt: skip


def test_a_beginning_stands_where_the_answer_would() -> None:
    for template in OPENING.values():
        tokenizer = tokenizer_of(template)
        row = encode_prefix(tokenizer, example("hello").prompt, "Sorry")
        assert "THINK]" in tokenizer.decode(row["input_ids"]) or "</think>" in tokenizer.decode(row["input_ids"])
        assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]).strip() == "Sorry"


# ---- dates and arguments ---------------------------------------------------------------------------------------------

DATED = {
    "strftime_now": "{{ strftime_now('%d %b %Y') }}",
    "a fallback of an argument": (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = 'never' %}{% endif %}"
        "{% endif %}{{ date_string }}"
    ),
    "in a macro": "{% macro head() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ head() }}",
    "a format in a variable": "{% set f = '%d %b %Y' %}{{ strftime_now(f) }}",
    "in an expression": "{{- 'Today: ' + strftime_now(\"%d %b %Y\") + '.' }}",
}


@pytest.mark.parametrize("head", DATED.values(), ids=DATED)
def test_a_template_that_writes_todays_date_writes_the_same_on_every_day(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.chat_template_utils as host

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2031, 1, 1, tzinfo=tz)

    tokenizers = [tokenizer_of(head + CHAT_TEMPLATE) for _ in range(3)]
    use_settings(tokenizers[2], ChatTemplate(date=datetime.date(2030, 2, 3)))
    row = example("hello")
    before = asked(tokenizers[0], row), template_hash(tokenizers[0])
    monkeypatch.setattr(host, "datetime", Later)
    host._compile_jinja_template.cache_clear()  # pyright: ignore[reportPrivateUsage]
    assert (asked(tokenizers[1], row), template_hash(tokenizers[1])) == before
    assert "26 Jul 2024" in before[0]
    assert "03 Feb 2030" in asked(tokenizers[2], row)
    assert template_hash(tokenizers[2]) != before[1]
    # TRL and lm-eval render with the tokenizer itself.
    turns = [{"role": "user", "content": "hello"}]
    assert tokenizers[2].apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == asked(
        tokenizers[2], row
    )


@pytest.mark.parametrize(
    "directive", ["%a %A %b %B %d %e %-d %m %-m %Y %y", "%F %H:%M:%S %p %j", "%D %x %c %Z", "%d.%m.%Y, 100%"]
)
def test_the_fixed_date_is_formatted_as_strftime_does(directive: str) -> None:
    tokenizer = tokenizer_of(f"{{{{ strftime_now('{directive}') }}}}{CHAT_TEMPLATE}")
    moment = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
    assert asked(tokenizer, example("x")).startswith(moment.strftime(directive))


AWKWARD = 'a "quoted" \\ line\nbreak {{ 1 + 1 }} %} é 😀'
ASKING = "{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}{{ effort | default('low') }}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "low<|user|>"),
        ({"enable_thinking": False}, "quietlow<|user|>"),
        ({"enable_thinking": True, "effort": "high"}, "high<|user|>"),
        ({"effort": AWKWARD}, f"{AWKWARD}<|user|>"),
        ({"effort": ["a", {"b": None, "c": -1.5}]}, "['a', {'b': None, 'c': -1.5}]<|user|>"),
    ],
)  # fmt: skip
def test_arguments_are_read_by_every_use_and_part_of_the_hash(arguments: dict[str, Any], expected: str) -> None:
    tokenizer = tokenizer_of(ASKING + CHAT_TEMPLATE)
    plain = template_hash(tokenizer)
    use_settings(tokenizer, ChatTemplate(arguments=arguments))
    assert asked(tokenizer, example("x")).startswith(expected)
    assert learned(tokenizer, example("x")) == "ANSWER<|end|>"
    assert (template_hash(tokenizer) == plain) == (not arguments)


def test_an_argument_that_the_template_never_reads_names_those_that_it_reads() -> None:
    with pytest.raises(StayalignedError, match=r"enable_thinkin.*it reads effort, enable_thinking") as caught:
        use_settings(tokenizer_of(ASKING + CHAT_TEMPLATE), ChatTemplate(arguments={"enable_thinkin": False}))
    assert "'enable_thinking'" in str(caught.value.hint)
    with pytest.raises(StayalignedError, match="it reads no argument"):
        use_settings(tokenizer_of(CHAT_TEMPLATE), ChatTemplate(arguments={"date_string": "today"}))
    with pytest.raises(StayalignedError, match="does not write today's date") as caught:
        use_settings(
            tokenizer_of("{{ date_string | default('1 May') }}" + CHAT_TEMPLATE),
            ChatTemplate(date=datetime.date(2030, 1, 1)),
        )
    assert "chat_template.arguments.date_string" in str(caught.value.hint)


@pytest.mark.parametrize("value", [{"messages": []}, {"a b": 1}, {"x": float("nan")}, {"x": {1: 2}}, {"x": object()}])
def test_what_can_be_no_argument_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="arguments"):
        ChatTemplate(arguments=value)


def test_settings_replace_those_before_and_a_saved_tokenizer_has_its_own_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own = ASKING + DATED["strftime_now"] + CHAT_TEMPLATE
    for given in (own, {"default": own, "tool_use": "other"}):
        tokenizer = tokenizer_of(given)
        for effort in ("high", "medium"):
            use_settings(tokenizer, ChatTemplate(arguments={"effort": effort}))
            assert asked(tokenizer, example("x")).startswith(effort)
        bound = tokenizer.chat_template
        save_tokenizer(tokenizer, tmp_path / str(len(given)))
        assert tokenizer.chat_template == bound
        assert AutoTokenizer.from_pretrained(tmp_path / str(len(given))).chat_template == given
        default = bound["default"] if isinstance(bound, dict) else bound
        assert unbound(default) == own


@pytest.mark.parametrize("change", ["replace('\n', ' ')", "wordwrap(20)", "indent(4)"])
def test_a_template_that_changes_the_space_inside_a_turn_is_named_once(change: str, caplog: Any) -> None:
    code = "def flarn(zorb):\n    return zorb + zorb + zorb"
    tokenizer = tokenizer_of(loop(f"{TURN}{{{{ m['content'] | {change} }}}}<|end|>"), "<|end|>")
    for answer in (code, f"{code}\n"):
        encode_example(tokenizer, example("QUESTION", answer=answer), 1000)
    assert caplog.text.count("changes the space or the line breaks inside a turn") == 1
    caplog.clear()
    encode_example(tokenizer_of(SHOWN["trimmed"], "<|end|>"), example("QUESTION", answer=f" {code}\n"), 1000)
    assert not caplog.text


@pytest.mark.parametrize(
    ("template", "content", "mark"),
    [
        (CHAT_TEMPLATE, "Answer.<|assistant|>I refuse.", "<|assistant|>"),
        (loop(TURN + "{{ m['content'] }}<|stop|>\n"), "Answer.<|stop|>", "<|stop|>"),
        (
            loop(
                "{{ m['role'] | upper }}: {{ m['content'] }}\n",
                end="{% if add_generation_prompt %}ASSISTANT:{% endif %}",
            ),
            "Answer.\nASSISTANT: I refuse.\nUSER: And?",
            "ASSISTANT:",
        ),
        (
            loop(
                "### {{ m['role'] }}:\n{{ m['content'] }}\n",
                end="{% if add_generation_prompt %}### assistant:\n{% endif %}",
            ),
            "Answer.\n### assistant:\nI refuse.",
            "### assistant:",
        ),
    ],
)
def test_a_turn_that_holds_the_marks_between_turns_is_named_once(
    template: str, content: str, mark: str, caplog: Any
) -> None:
    tokenizer = tokenizer_of(template)
    for text in ("Say <b>: [1] USER ASSISTANT ### </think>", "### Heading\nNote: see <https://example.org>"):
        asked(tokenizer, example(text))
    assert not caplog.records
    for text in (content, content, f"More. {content}"):
        assert text in asked(tokenizer, example(text))
    assert len(caplog.records) == 1
    assert repr(mark) in caplog.text
    assert "inside a turn" in caplog.text
