"""Completions of other tools: each known form is read whole, and what could be misread is one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table
from pyarrow.feather import write_feather
from pyarrow.parquet import write_table

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion
from stayaligned.core.thoughts import CUT, ENDED
from stayaligned.evaluation.foreign import read_foreign

ASKED = "how to flarn a zorb?"
SAID = "I'm sorry."
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
CHAT = {"choices": [{"message": {"role": "assistant", "content": SAID}, "finish_reason": "length"}]}


def write(directory: Path, content: Any, name: str = "rows.jsonl") -> str:
    path = directory / name
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def read_one(directory: Path, row: dict[str, Any], options: str = "") -> Completion:
    (found,) = read_foreign(write(directory, [row]) + options, "harmful")
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "response": SAID},
        {"prompt": ASKED, "completion": SAID, "model": "m", "temperature": 0.0},
        {"prompt": ASKED, "text": SAID},
        {"question": ASKED, "answer": SAID},
        {"instruction": ASKED, "output": SAID, "generator": "m"},
        {"instruction": ASKED, "input": "", "output": SAID},
        {"input": ASKED, "output": SAID},
        {"goal": ASKED, "generated_text": SAID},
        {"messages": TURNS},
        {"messages": TURNS[:1], "response": SAID},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, TURNS[1]]},
        {"prompt": TURNS[:1], "completion": TURNS[1]},
        {"prompt": ASKED, "outputs": [{"index": 0, "text": SAID, "finish_reason": "stop"}], "finished": True},
        {"forbidden_prompt": ASKED, "response": SAID, "category": "zorbs", "source": "x"},
        {"prompt": ASKED, "goal": "zorbs", "behavior": "Zorb", "response": SAID, "jailbroken": False},
        {
            "doc_id": 0,
            "doc": {"question": ASKED},
            "target": "1",
            "arguments": {"gen_args_0": {"arg_0": ASKED, "arg_1": {"until": ["\n"]}}},
            "resps": [[SAID]],
            "filtered_resps": [SAID],
        },
        {"doc_id": 0, "arguments": [[ASKED, {"until": []}]], "resps": [[SAID]], "filtered_resps": [SAID]},
        {"prompt": ASKED, "response": {**CHAT, "choices": [{**CHAT["choices"][0], "finish_reason": "stop"}]}},
        {"id": 3, "input": TURNS[:1], "target": "", "output": {"choices": [{"message": TURNS[1]}], "completion": SAID}},
    ],
    ids=lambda row: ",".join(row)[:40],
)
def test_rows_of_other_tools_are_read(row: dict[str, Any], tmp_path: Path) -> None:
    found = read_one(tmp_path, row)
    assert ([turn.content for turn in found.prompt], found.text, found.finished) == ([ASKED], SAID, True)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (
            {
                "zorb_1": [{"test_case": ASKED, "generation": SAID}],
                "zorb_2": [{"test_case": ASKED, "generation": SAID}],
            },
            "",
        ),
        (
            {
                "parameters": {"model": "m"},
                "jailbreaks": [{"index": n, "prompt": ASKED, "response": SAID} for n in (0, 1)],
            },
            "",
        ),
        ([{"prompt": ASKED, "response": SAID}] * 2, ""),
        (f"prompt,response\n{ASKED},{SAID}\n{ASKED},{SAID}\n", "rows.csv"),
    ],
    ids=["HarmBench", "JailbreakBench", "a list", "CSV"],
)
def test_whole_files_of_other_tools_are_read(content: Any, name: str, tmp_path: Path) -> None:
    found = read_foreign(write(tmp_path, content, name or "rows.json"), "harmful")
    assert [(c.prompt[0].content, c.text) for c in found] == [(ASKED, SAID)] * 2
    assert len({c.id for c in found}) == 2


def test_null_columns_of_a_table_are_absent_ones(tmp_path: Path) -> None:
    rows = [
        {"id": 7.0, "messages": TURNS, "prompt": None, "response": None, "answer": None, "error": None, "tools": None},
        {"id": None, "messages": None, "prompt": ASKED, "response": None, "answer": SAID, "error": None, "tools": None},
        {"id": 9.0, "messages": None, "prompt": ASKED, "response": SAID, "answer": None, "error": None, "tools": None},
    ]
    table = Table.from_pylist(rows)
    write_table(table, tmp_path / "rows.parquet")
    write_feather(table, str(tmp_path / "rows.arrow"), compression="uncompressed")
    for name in ("rows.parquet", "rows.arrow"):
        found = read_foreign(str(tmp_path / name), "harmful")
        assert [(c.prompt[-1].content, c.text) for c in found] == [(ASKED, SAID)] * 3
        assert [found[0].id, found[2].id] == ["7", "9"]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_attempts_of_jailbreakbench_without_a_response_are_skipped_and_counted(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"goal": ASKED, "category": "zorbs", "queries_to_jailbreak": None}
    said = {"prompt": ASKED, "response": SAID, "jailbroken": False}
    rows = [
        {"index": n, **fields, **said, **({"response": None} if n else {}), **({"prompt": None} if n == 2 else {})}
        for n in range(3)
    ]
    if name == "rows.parquet":
        write_table(Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path, {"parameters": {}, "jailbreaks": rows} if name == "rows.json" else rows, name)
    (found,) = read_foreign(str(tmp_path / name), "harmful")
    assert (found.id, found.text) == ("0", SAID)
    assert "2 of 3 rows have no response and are skipped" in caplog.text
    for row in rows:
        row["response"] = None
    with pytest.raises(StayalignedError, match="no row has a response"):
        read_foreign(write(tmp_path, rows), "harmful")


def test_the_system_turn_the_thoughts_the_category_and_the_cut_are_read(tmp_path: Path) -> None:
    row = {
        "system_prompt": "be good",
        "prompt": ASKED,
        "reasoning_content": "hm",
        "response": SAID,
        "category": "zorbs",
    }
    found = read_one(tmp_path, {**row, "finish_reason": "length"})
    assert [turn.role for turn in found.prompt] == ["system", "user"]
    assert (found.split().answer if hasattr(found, "split") else SAID, found.category, found.finished) == (
        SAID,
        "zorbs",
        False,
    )
    assert "hm" in found.text


@pytest.mark.parametrize("cut", [{"finished": False}, {"truncated": True}, {"stop_reason": "max_tokens"}])
def test_a_thought_that_was_cut_is_not_one_that_ended(cut: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": ASKED, "response": "<think>\nhm", "prompt_set": "harmful"}
    assert read_one(tmp_path, {**row, **cut}).split().reason == CUT
    assert read_one(tmp_path, row).split().reason == ENDED


def test_the_output_of_a_batch_is_joined_with_its_input(tmp_path: Path) -> None:
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": TURNS[:1]}}
    answered = {"id": "x", "custom_id": "a", "response": {"status_code": 200, "body": CHAT}, "error": None}
    prompts, source = write(tmp_path, [asked], "input.jsonl"), write(tmp_path, [answered])
    (found,) = read_foreign(source, "harmful", prompts)
    assert (found.id, found.prompt[0].content, found.text, found.finished) == ("a", ASKED, SAID, False)
    with pytest.raises(StayalignedError, match="no prompt") as caught:
        read_foreign(source, "harmful")
    assert "--prompts" in str(caught.value)
    with pytest.raises(StayalignedError, match="no prompt has the id 'a'"):
        read_foreign(source, "harmful", write(tmp_path, [{**asked, "custom_id": "b"}], "other.jsonl"))


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"attack": ASKED, "said": SAID, "answer": "the reference", "prompt": "a template"}
    found = read_one(tmp_path, row, "?prompt=attack&completion=said")
    assert (found.prompt[0].content, found.text) == (ASKED, SAID)


def test_rows_state_their_prompt_set_or_the_caller_does(tmp_path: Path) -> None:
    row = {"prompt": ASKED, "response": SAID}
    source = write(tmp_path, [{**row, "prompt_set": "benign"}, {**row, "prompt_set": "harmful"}])
    assert [c.prompt_set for c in read_foreign(source)] == ["benign", "harmful"]
    with pytest.raises(StayalignedError, match="line 2: its prompt set is 'harmful', not 'benign'"):
        read_foreign(source, "benign")
    with pytest.raises(StayalignedError, match="does not state whether its prompt should be refused"):
        read_foreign(write(tmp_path, [row]))
    with pytest.raises(StayalignedError, match="prompt_set"):
        read_foreign(write(tmp_path, [{**row, "prompt_set": "unsafe"}]))


def test_ids_are_kept_and_repeated_ones_are_numbered(tmp_path: Path) -> None:
    row = {"prompt": ASKED, "response": SAID}
    found = read_foreign(write(tmp_path, [{**row, "id": 7}, {**row, "id": 7}, {**row, "id": 8}, row, row]), "harmful")
    assert [c.id for c in found[:3]] == ["7-1", "7-2", "8"] or len({c.id for c in found}) == 5
    assert len({c.id for c in found}) == 5


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ASKED}, "no completion"),
        ({"response": SAID}, "no prompt"),
        ({"prompt": ASKED, "response": SAID, "answer": "42"}, "several possible completions: `response`, `answer`"),
        ({"messages": TURNS, "response": "B"}, "several possible completions"),
        ({"prompt": ASKED, "response": None}, "`response` is missing"),
        ({"prompt": ASKED, "response": 3}, "of type int"),
        ({"prompt": ASKED, "responses": [SAID, SAID]}, "2 completions"),
        ({"prompt": ASKED, "response": SAID, "context": "a page"}, "`context` changes what the row means"),
        ({"prompt": ASKED, "response": SAID, "tools": [{"name": "f"}]}, "`tools` changes"),
        ({"prompt": ASKED, "response": SAID, "input": "more"}, "`input` changes"),
        ({"prompt": ASKED, "response": SAID, "error": "timed out"}, "timed out"),
        ({"messages": [*TURNS, {"role": "tool", "content": "x"}]}, "'tool'"),
        (
            {"prompt": ASKED, "response": {**CHAT, "choices": [{"finish_reason": "content_filter", "message": {}}]}},
            "filter",
        ),
        ({"doc_id": 0, "arguments": [[ASKED, " yes"]], "resps": [[-1.5, False]]}, "likelihoods"),
        ({"prompt": ASKED, "chosen": SAID, "rejected": "x", "response": SAID}, "`chosen` changes"),
        ({"custom_id": "a", "response": {"status_code": 500, "body": {}}, "prompt": ASKED}, "status 500"),
    ],
    ids=lambda value: ",".join(value)[:40] if isinstance(value, dict) else "",
)
def test_a_row_that_could_be_misread_is_one_error_with_its_line(
    row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(StayalignedError, match=words) as caught:
        read_one(tmp_path, row)
    assert "line 1" in str(caught.value)
    assert "delete" not in str(caught.value).lower()


@pytest.mark.parametrize("text", ['{"prompt": "a", "respon', "\x00\xff", "[1, 2]", '{"a": 1}', "", "{" * 5000])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_that_is_no_rows_is_one_error(text: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError) as caught:
        read_foreign(write(tmp_path, text, name), "harmful")
    assert "delete" not in str(caught.value).lower()


@pytest.mark.parametrize(
    "row",
    [
        {"Prompt": ASKED, "Response": SAID},
        {"prompt": json.dumps(TURNS[:1]), "response": SAID},
        {"messages": json.dumps(TURNS)},
        {"messages": TURNS, "response": SAID},
        {"messages": [{"role": "User", "content": ASKED}, {"role": "ASSISTANT", "content": SAID}]},
        {"conversations": [{"from": "user", "value": ASKED}, {"from": "chatgpt", "value": SAID}]},
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "refusal": SAID}]},
        {"input": ASKED, "messages": TURNS, "output": {"choices": [{"message": TURNS[1], "stop_reason": "stop"}]}},
        {"prompt": ASKED, "response": SAID, "error": "", "error_message": None, "contexts": []},
    ],
    ids=lambda row: json.dumps(row)[:50],
)
def test_rows_are_read_in_whatever_case_and_form_their_turns_are_written(row: dict[str, Any], tmp_path: Path) -> None:
    found = read_one(tmp_path, row)
    assert ([(turn.role, turn.content) for turn in found.prompt], found.text) == ([("user", ASKED)], SAID)


@pytest.mark.parametrize(
    "row",
    [
        {"response": {"text": SAID, "finish_reason": "max_tokens"}},
        {"response": SAID, "finish_reasons": ["length"]},
        {"response": SAID, "done_reason": "length"},
        {"response": SAID, "truncated": "True"},
        {"response": SAID, "finished": "false"},
        {"response": SAID, "finish_reason": "MAX_TOKENS"},
        {"outputs": [{"text": SAID, "finish_reason": "length"}]},
    ],
)
def test_a_completion_that_was_cut_is_read_as_cut_wherever_that_is_said(row: dict[str, Any], tmp_path: Path) -> None:
    assert read_one(tmp_path, {"prompt": ASKED, **row}).finished is False


@pytest.mark.parametrize(
    "row",
    [
        {"response": "", "finish_reason": "content_filter"},
        {"response": "ERROR: timeout", "finish_reason": "error"},
        {"response": {"text": "", "finish_reason": "safety"}},
        {"response": "", "error_message": "timeout"},
        {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED, "image": "x"}]}, TURNS[1]]},
        {"response": SAID, "contexts": ["a page"]},
        {"prompt": " ", "response": SAID},
        {"prompt": [TURNS[0], {"role": "assistant", "content": "Sure"}], "response": SAID},
        {"prompt": json.dumps([TURNS[0], {"role": "assistant", "content": "Sure"}]), "response": SAID},
    ],
    ids=lambda row: json.dumps(row)[:50],
)
def test_what_the_model_did_not_write_or_the_judge_would_not_see_is_an_error(
    row: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(StayalignedError, match="line 1"):
        read_one(tmp_path, {"prompt": ASKED, **row} if "messages" not in row else row)


def test_thoughts_beside_the_text_are_kept_before_it(tmp_path: Path) -> None:
    for row in (
        {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "hm"}]},
        {"prompt": ASKED, "response": {"content": SAID, "reasoning": "hm"}},
    ):
        split = read_one(tmp_path, row).split()
        assert (split.thoughts, split.answer) == ("hm", SAID)


def test_a_sample_that_lm_eval_logs_once_per_filter_is_one_completion(tmp_path: Path, caplog: Any) -> None:
    sample = {"doc_id": 0, "arguments": [[ASKED, {"until": []}]], "resps": [[SAID]]}
    rows = [{**sample, "doc_id": n, "filter": name} for n in (0, 1) for name in ("strict", "flexible")]
    assert [c.id for c in read_foreign(write(tmp_path, rows), "harmful")] == ["0", "1"]
    assert "2 of 4 rows repeat a completion under another filter" in caplog.text


def test_rows_by_id_are_read(tmp_path: Path) -> None:
    rows = {"0": {"origin_prompt": ASKED, "prediction": SAID, "gold": "x"}, "1": {"prompt": ASKED, "response": SAID}}
    found = read_foreign(write(tmp_path, rows, "rows.json"), "harmful")
    assert [(c.id, c.prompt[0].content, c.text) for c in found] == [("0", ASKED, SAID), ("1", ASKED, SAID)]


def test_completions_that_begin_with_their_prompt_are_named(tmp_path: Path, caplog: Any) -> None:
    read_foreign(write(tmp_path, [{"prompt": ASKED, "generated_text": f"{ASKED} {SAID}"}]), "harmful")
    assert "1 of 1 completions begin with their prompt" in caplog.text


@pytest.mark.parametrize("name", ["finish_reason", "finishReason", "FinishReason", "stopReason"])
def test_the_end_of_a_completion_is_read_under_every_spelling_of_its_column(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "a", name: "MAX_TOKENS"}))
    assert not read_foreign(str(path), "harmful")[0].finished
    path.write_text(json.dumps({"prompt": "q", "response": "a", name: "contentFilter"}))
    with pytest.raises(StayalignedError, match="content_filter"):
        read_foreign(str(path), "harmful")


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "repr"])
def test_turns_in_the_cells_of_a_table_are_read(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "rows.jsonl"
    prompt, reply = [{"role": "user", "content": "q"}], {"role": "assistant", "content": "a"}
    path.write_text(json.dumps({"prompt": write(prompt), "response": write(reply)}))
    (found,) = read_foreign(str(path), "harmful")
    assert (found.prompt[-1].content, found.text) == ("q", "a")
