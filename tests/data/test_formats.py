"""Rows that could lose a part of their meaning: each is read whole, or is an error that names what is not read."""

import json

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.data.sources import read_examples


def user(text, **more):
    return {"role": "user", "content": text, **more}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


QUESTION, ANSWER = user("q"), said("a")


def read(tmp_path, rows, options="", **more):
    rows = rows if isinstance(rows, list) else [rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(f"{path}{options}", **{"origin": "task", **more})


def turns(example):
    return [(turn.role, turn.content) for turn in example.prompt]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "i", "context": "c", "response": "a"}, [("user", "i\n\nc")]),
        ({"Instruction": "i", "Context": "", "Response": "a"}, [("user", "i")]),
        ({"instruction": "i", "input": "x", "context": "c", "output": "a"}, [("user", "i\n\nx\n\nc")]),
        ({"input": "q", "output": "a"}, [("user", "q")]),
        (
            {"instruction": "q", "output": "a", "history": [["p", "b"]], "system": "s"},
            [("system", "s"), ("user", "p"), ("assistant", "b"), ("user", "q")],
        ),
        (
            {"query": "q", "response": "a", "history": [user("p"), said("b")]},
            [("user", "p"), ("assistant", "b"), ("user", "q")],
        ),
        (
            {"prompt": "q", "completion": "a", "system": None, "tools": "[]", "images": [], "label": True},
            [("user", "q")],
        ),
        ({"instruction": "q", "input": "", "output": "a", "prompt": "q and a", "text": "q and a"}, [("user", "q")]),
        ({"messages": [user("q", tool_calls=None), said("a", function_call=None, weight=1)]}, [("user", "q")]),
        ({"messages": [{"role": "developer", "content": "s"}, QUESTION, ANSWER]}, [("system", "s"), ("user", "q")]),
        ({"messages": [{"role": "USER", "content": "q"}, {"role": "Chatbot", "content": "a"}]}, [("user", "q")]),
        ({"messages": [QUESTION, {"role": "assistant", "content": None, "refusal": "a"}]}, [("user", "q")]),
        ({"messages": [user([{"type": "text", "text": "q", "image": None}, "!"]), ANSWER]}, [("user", "q!")]),
        ({"messages": json.dumps([QUESTION, ANSWER])}, [("user", "q")]),
        ({"conversations": ["p", "b", "q", "a"]}, [("user", "p"), ("assistant", "b"), ("user", "q")]),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "response": " a"}, [("user", "q")]),
        (
            {"prompt": "Human: p\n\nAssistant: b\n\nHuman: q\n\nAssistant: ", "chosen": " a", "rejected": " r"},
            [("user", "p"), ("assistant", "b"), ("user", "q")],
        ),
        ({"messages": [QUESTION, ANSWER], "completion": None, "prompt": None}, [("user", "q")]),
        ({"messages": None, "prompt": "q", "completion": "a"}, [("user", "q")]),
        ({"system": [{"text": "s"}], "messages": [QUESTION, ANSWER]}, [("system", "s"), ("user", "q")]),
        (
            {"system": "s", "messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER]},
            [("system", "s"), ("user", "q")],
        ),
    ],
)
def test_every_part_of_a_row_is_read(tmp_path, row, prompt):
    (found,) = read(tmp_path, row)
    assert (turns(found), found.completion) == (prompt, "a")


REFUSED = (
    [
        ({"prompt": "q", "completion": "a", name: value}, name)
        for name, value in {
            "tools": [{"type": "function"}],
            "functions": "[{}, 1]",
            "images": ["a.png"],
            "image": {"bytes": "x"},
            "videos": ["a.mp4"],
            "context": "c",
            "input": "x",
            "documents": ["d"],
            "choices": ["x", "y"],
            "label": False,
            "kto_tag": "false",
            "weight": 0,
            "loss_mask": [0, 1],
            "train": False,
            "reward": -0.5,
            "reasoning_content": "t",
        }.items()
    ]
    + [
        ({"messages": [QUESTION, said("a", **{name: value})]}, name)
        for name, value in {
            "tool_calls": [{"id": "1"}],
            "function_call": {"name": "f"},
            "images": ["x"],
            "thinking": "t",
            "weight": 0,
            "train": "false",
            "loss": False,
            "train_detail": [{"begin_offset": 0}],
        }.items()
    ]
    + [
        ({"messages": [user("q", train=True), ANSWER]}, "train"),
        ({"messages": [json.dumps(QUESTION), json.dumps(ANSWER)]}, "expected a role"),
        ({"messages": [QUESTION, {"role": "tool", "content": "r"}, ANSWER]}, "'tool'"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "r"}]}, "'observation'"),
        ({"messages": [user([{"type": "input_audio"}]), ANSWER]}, "input_audio"),
        ({"messages": [QUESTION, said([{"type": "tool_use", "id": "1"}])]}, "tool_use"),
        (
            {"messages": [QUESTION, ANSWER], "chosen": [QUESTION, said("b")], "rejected": [QUESTION, said("c")]},
            "chosen",
        ),
        ({"prompt": "q", "chosen": [user("other"), ANSWER], "rejected": "r"}, "does not begin with the prompt"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "in one text"),
        ({"prompt": "q", "completion": "a", "instruction": "i", "output": "o"}, "both `prompt` and `instruction`"),
        ({"instruction": "i", "output": "a", "response": "b"}, "both `output` and `response`"),
        ({"input": {"messages": [QUESTION], "tools": [{"x": 1}]}, "preferred_output": [ANSWER]}, "tools"),
    ]
)


@pytest.mark.parametrize(("row", "name"), REFUSED)
def test_a_part_that_is_not_read_is_an_error_that_names_it(tmp_path, row, name):
    with pytest.raises(StayalignedError, match=name) as caught:
        read(tmp_path, row)
    assert "line 1" in caught.value.message


@pytest.mark.parametrize(("row", "name"), [pair for pair in REFUSED[:24] if pair[1].isidentifier()])
def test_the_named_part_can_be_left_out(tmp_path, row, name):
    (found,) = read(tmp_path, row, f"?ignore={name}")
    assert (turns(found), found.completion) == ([("user", "q")], "a")


def test_marks_of_the_answer_do_not_matter_for_prompts(tmp_path):
    rows = [
        {"prompt": "q", "completion": "a", "label": False, "reward": 0},
        {"messages": [QUESTION, said("a", weight=0)]},
    ]
    rows += [
        {"question": "q", "answer": 4},
        {"prompt": "q", "response": ["a", "b"]},
        {"question": "q", "answer": "a", "response": "b"},
    ]
    rows += [{"messages": [QUESTION, ANSWER], "response": "b"}]
    for row in rows:
        assert turns(read(tmp_path, row, prompts_only=True)[0]) == [("user", "q")]
    with pytest.raises(StayalignedError, match="images"):
        read(tmp_path, {"prompt": "q", "images": ["x"]}, prompts_only=True)


@pytest.mark.parametrize(("name", "good"), [("is_safe", True), ("toxic", 0), ("response_harm_label", "unharmful")])
def test_safe_and_unsafe_completions_are_not_mixed_silently(tmp_path, name, good):
    bad = {True: False, 0: 1, "unharmful": "harmful"}[good]
    rows = [{"prompt": "p", "response": "a", name: good}, {"prompt": "q", "response": "b", name: bad}]
    for origin in ("alignment", "harmful"):
        with pytest.raises(StayalignedError, match=name):
            read(tmp_path, rows, origin=origin)
    value = json.dumps(bad).strip('"')
    assert len(read(tmp_path, rows, f"?where={name}:{value}", origin="harmful")) == 1
    assert len(read(tmp_path, rows[1:], origin="harmful")) == 1
    assert len(read(tmp_path, rows[:1], origin="alignment")) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("?completion=response_0", "is_response_0_safe"),
        ("?chosen=response_0&rejected=response_1", "better_response_id"),
    ],
)
def test_marks_of_the_answer_that_a_source_names_are_read(tmp_path, options, name):
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": False, "is_response_1_safe": True}
    row |= {"better_response_id": 1, "is_response_0_safe": True} if "chosen" in options else {}
    with pytest.raises(StayalignedError, match=name):
        read(tmp_path, row, options, origin="alignment")
    assert read(tmp_path, row, "?completion=response_1", origin="alignment")[0].completion == "b"


@pytest.mark.parametrize("dump", [[], None, [said("a")], [user(""), said("a")]])
def test_conversations_without_a_askedare_skipped_and_counted(tmp_path, caplog, dump):
    rows = [{"messages": dump}, {"messages": [QUESTION, ANSWER]}]
    assert [turns(found) for found in read(tmp_path, rows)] == [[("user", "q")]]
    assert "skipped 1 of 2 rows" in caplog.text


@pytest.mark.parametrize("missing", ["NA", "NaN", "\\N", "NULL", "None"])
def test_a_missing_value_that_was_written_as_text_is_named(tmp_path, caplog, missing):
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion\nq,a\np,{missing}\n")
    assert len(read_examples(str(path), origin="task")) == 2
    assert f"1 of 2 rows say `{missing}`, which is read as text (first: line 3)" in caplog.text


@pytest.mark.parametrize(
    "write", [json.dumps, str, lambda turns: json.dumps(turns, indent=1)], ids=["json", "repr", "lines"]
)
def test_turns_that_a_table_holds_as_text_are_read_as_turns(tmp_path, write):
    for row in (
        {"messages": write([QUESTION, ANSWER])},
        {"prompt": write([QUESTION]), "completion": write([ANSWER])},
        {"prompt": "q", "completion": write(ANSWER)},
        {"prompt": "q", "chosen": write([QUESTION, ANSWER]), "rejected": write([QUESTION, said("r")])},
        {"chosen": write([QUESTION, ANSWER]), "rejected": write([QUESTION, said("r")])},
    ):
        (found,) = read(tmp_path, row)
        assert (turns(found), found.completion) == ([("user", "q")], "a")
        assert found.rejected == ("r" if "rejected" in row else "")
    assert turns(read(tmp_path, {"prompt": write([user("s"), ANSWER, QUESTION])}, prompts_only=True)[0])[-1] == (
        "user",
        "q",
    )
    answer = write([{"role": "baker", "content": "bread"}])  # JSON that is asked for
    assert read(tmp_path, {"prompt": "q", "completion": answer})[0].completion == answer
    with pytest.raises(StayalignedError, match="looks like turns"):  # numpy writes no comma between them
        read(tmp_path, {"prompt": "q", "completion": write([QUESTION, ANSWER]).replace("},", "}")})


def test_turns_by_their_keys_are_read_as_turns(tmp_path):
    row = {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}
    (found,) = read(tmp_path, row)
    assert (turns(found), found.completion) == ([("user", "q")], "a")
    for rows in ([{"prompt": QUESTION, "completion": ANSWER}], [{"prompt": ["q"], "completion": ["a"]}] * 2):
        found = read(tmp_path, rows)[0]
        assert (turns(found), found.completion) == ([("user", "q")], "a")


@pytest.mark.parametrize("name", ["text", "content", "question", "system_message", "chat_template_kwargs"])
def test_a_text_beside_the_askedis_read_repeated_or_refused(tmp_path, name):
    row = {"instruction": "Sum up.", "output": "a", "system": "s"}
    with pytest.raises(StayalignedError, match=name):
        read(tmp_path, {**row, name: "The text"})
    repeated = {"system_message": "s", "chat_template_kwargs": {"enable_thinking": False}}.get(name, "Sum up. a")
    assert turns(read(tmp_path, {**row, name: repeated})[0]) == [("system", "s"), ("user", "Sum up.")]
    if name in ("text", "content"):
        (found,) = read(tmp_path, {**row, name: "The text"}, f"?input={name}")
        assert turns(found)[-1] == ("user", "Sum up.\n\nThe text")


def test_keys_of_turns_that_are_not_read_are_refused_or_named(tmp_path, caplog):
    for key in ("context", "documents", "rejected"):
        with pytest.raises(StayalignedError, match=key):
            read(tmp_path, {"messages": [user("q", **{key: "c"}), ANSWER]})
    read(tmp_path, {"messages": [user("q", id=1, mood="m"), ANSWER]})
    assert "keys of turns that are not read: mood\n" in caplog.text


def test_prompts_that_a_column_calls_safe_and_unsafe_are_named(tmp_path, caplog):
    rows = [{"prompt": "p", "label": "safe"}, {"prompt": "q", "label": "unsafe"}]
    assert len(read(tmp_path, rows, prompts_only=True)) == 2
    assert "line 1 and line 2 differ in `label`; name the rows to read: ?where=label:VALUE" in caplog.text
    caplog.clear()
    assert len(read(tmp_path, rows, "?where=label:safe", prompts_only=True)) == 1
    assert "label" not in caplog.text


@pytest.mark.parametrize(
    "asked",
    [
        {"url": "/v1/chat/completions", "body": {"messages": [QUESTION]}},
        {"url": "/v1/responses", "body": {"input": "q", "model": "m"}},
        {"url": "/v1/completions", "body": {"prompt": "q"}},
        {"params": {"messages": [QUESTION]}},
    ],
    ids=["chat", "responses", "completions", "anthropic"],
)
def test_the_requests_of_a_batch_are_prompts(tmp_path, asked):
    (found,) = read(tmp_path, {"custom_id": "1", **asked}, prompts_only=True)
    assert turns(found) == [("user", "q")]


@pytest.mark.parametrize(
    ("row", "mark"),
    [
        ({"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "completion": "a"}, "<|im_start|>"),
        ({"prompt": "[INST] q [/INST]", "completion": "a"}, "[INST]"),
        ({"prompt": "q", "completion": "a</s>"}, "</s>"),
        ({"prompt": "### Instruction:\nq\n\n### Response:\n", "completion": "a"}, "### Instruction:"),
        ({"prompt": "USER: q ASSISTANT:", "completion": "a"}, "USER: q ASSISTANT:"),
    ],
)
def test_a_text_that_was_rendered_with_a_chat_template_is_named(tmp_path, caplog, row, mark):
    read(tmp_path, row)
    assert f"1 of 1 rows contain `{mark}`, a mark of a chat template" in caplog.text
    caplog.clear()
    read(tmp_path, {"prompt": "What do <s>strike</s> and ### Instruction: mean?", "completion": "a"})
    assert "template" not in caplog.text


def test_unread_columns_and_earlier_assistant_turns_are_named_once(tmp_path, caplog):
    conversation = [user("p"), said("b"), QUESTION, ANSWER]
    read(tmp_path, [{"messages": conversation, "mood": "m", "source": "s"}] * 3)
    assert caplog.text.count("columns that are not read: mood\n") == 1
    assert "3 of 3 conversations have several assistant turns; the last one is learned" in caplog.text


def test_rows_without_an_answer_are_skipped_and_counted_if_others_have_one(tmp_path, caplog):
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION]}, {"messages": [QUESTION, said(None)]}]
    assert len(read(tmp_path, rows)) == 1
    assert "skipped 2 of 3 rows" in caplog.text
    with pytest.raises(StayalignedError, match="no completion to learn"):
        read(tmp_path, rows[1:2])


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"talk": [QUESTION, ANSWER]}, "?messages=talk"),
        ({"id": "x", "items": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "?messages=items"),
        ({"segments": [{"label": True, "text": "x"}]}, "Segments"),
        ({"text": "### Human: q"}, "prompt and completion in one"),
        ({"message_id": "1", "parent_id": None, "text": "t", "role": "prompter"}, "each thread into one row"),
        ({"custom_id": "1", "response": {"body": {}}}, "no prompts"),
        ({"Behavior": "b", "ContextString": ""}, "name: harmbench"),
        ({"user_input": "q", "model_output": "a"}, "?prompt=user_input&completion=model_output"),
        (
            {"inference_mode": "cot", "problem_source": "a forum", "generated_solution": "a" * 50, "problem": "q"},
            "?prompt=problem&completion=generated_solution",
        ),
    ],
)
def test_an_unknown_format_is_an_error_with_what_to_write(tmp_path, row, hint):
    with pytest.raises(StayalignedError, match="expected `messages`, `prompt` or `instruction`") as caught:
        read(tmp_path, row)
    assert hint in caught.value.hint


def test_options_are_read_literally_and_given_once(tmp_path):
    rows = [{"my q": "q", "a&b": "a", "lang": "c++"}]
    assert read(tmp_path, rows, "?prompt=my q&completion=a%26b&where=lang:c++")[0].completion == "a"
    for options, message in [("?prompt=", "no value"), ("?prompt=my q&prompt=lang", "given twice")]:
        with pytest.raises(StayalignedError, match=message):
            read(tmp_path, rows, options)
