"""Thoughts and final answers of the families that think, and of answers that only speak of the marks."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.thoughts import (
    CUT,
    ENDED,
    UNCLEAR,
    is_mark,
    join_thoughts,
    kept_tokens,
    opened_thoughts,
    split_thoughts,
)

FAMILIES = {
    "Qwen3, R1, GLM, Phi-4, Olmo": "<think>\nhm\n</think>\n\nStep one",
    "GLM-4.5": "\n<think>hm</think>\nStep one",
    "R1, the prompt opens": "hm\n</think>\n\nStep one",
    "DeepSeek-V3.1, the prompt opens": "hm.</think>Step one",
    "closed with spaces": "<think> hm </think> Step one",
    "no newline": "<think>hm</think>Step one",
    "empty": "<think>\n\n</think>\n\nStep one",
    "Nemotron, empty": "<think></think>Step one",
    "upper case": "<THINK>hm</THINK>\nStep one",
    "thinking": "<thinking>\nhm\n</thinking>\n\nStep one",
    "EXAONE": "<thought>\nhm\n</thought>\n\nStep one",
    "reasoning": "<reasoning>\nhm\n</reasoning>\n<answer>\nStep one\n</answer>\n",
    "Seed": "<seed:think>hm</seed:think>Step one",
    "MiniMax": "<mm:think>hm</mm:think>Step one",
    "LongCat": "<longcat_think>hm</longcat_think>Step one",
    "Marco": "<Thought>\nhm\n</Thought>\n<Output>\nStep one\n</Output>",
    "Magistral": "[THINK]hm[/THINK]Step one",
    "Kimi": "◁think▷hm◁/think▷Step one",
    "Pangu": "[unused16]hm[unused17]Step one",
    "Apertus": "<|inner_prefix|>hm<|inner_suffix|>Step one",
    "Cohere": "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Step one<|END_RESPONSE|>",
    "Gemma 4": "<|channel>thought\nhm\n<channel|>Step one<turn|>",
    "Gemma 4, empty": "<|channel>thought\n<channel|>Step one",
    "ERNIE, Hunyuan": "<think>\nhm\n</think>\n<answer>\nStep one\n</answer>",
    "Hunyuan, cut": "<think>\nhm\n</think>\n<answer>\nStep one",
    "Granite 3.3": "<think>hm</think><response>Step one</response>",
    "Granite 3.2": "Here is my thought process:\nhm\n\nHere is my response:\nStep one",
    "Apriel": "Here are my reasoning steps:\nhm\n[BEGIN FINAL RESPONSE]\nStep one\n[END FINAL RESPONSE]",
    "HuatuoGPT-o1": "## Thinking\n\nhm\n\n## Final Response\n\nStep one",
    "a terminal of Ollama": "Thinking...\nhm\n...done thinking.\n\nStep one",
    "Open WebUI": '<details type="reasoning" done="true">\n<summary>hm</summary>\nhm\n</details>\nStep one',
    "s1": "<|im_start|>think\nhm\n<|im_start|>answer\nStep one",
    "Solar Open": "<|think|>hm<|end|><|begin|>assistant<|content|>Step one<|end|>",
    "Solar Open, the prompt opens": "hm<|end|><|begin|>assistant<|content|>Step one",
    "Solar Open, no thoughts": "<|content|>Step one<|end|>",
    "Kimi K3": "<|open|>think<|sep|>hm<|close|>think<|sep|><|open|>response<|sep|>Step one<|close|>response<|sep|>"
    "<|close|>message<|sep|>",
    "GLM-4.5V": "<think>hm</think><|begin_of_box|>Step one<|end_of_box|>",
    "GLM-4.1V": "<think>hm</think><answer><|begin_of_box|>Step one<|end_of_box|></answer>",
    "a tag that a prompt asked for": "<analysis>\nhm\n</analysis>\n\nStep one",
    "a monologue": "<inner_monologue>hm</inner_monologue>Step one",
    "other special tokens": "<|think_start|>hm<|think_end|>Step one",
    "full-width special tokens": "<｜begin▁of▁thinking｜>hm<｜end▁of▁thinking｜>Step one",
    "brackets": "[THOUGHT]hm[/THOUGHT]\nStep one",
    "the role in the text": "assistant\n\n<think>hm</think>\nStep one",
    "gpt-oss, a mark in the thoughts": "<|channel|>analysis<|message|>hm <|message|> hm<|end|><|start|>assistant"
    "<|channel|>final<|message|>Step one",
    "gpt-oss, the prompt opens": "hm<|end|><|start|>assistant<|channel|>final<|message|>Step one<|return|>",
    "OpenThinker": "<|begin_of_thought|>hm<|end_of_thought|>\n<|begin_of_solution|>Step one<|end_of_solution|>",
    "Reflection": "<thinking>hm<reflection>no</reflection></thinking>\n<output>Step one</output>",
    "gpt-oss": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Step one<|return|>",
    "gpt-oss, whole turn": "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Step one",
    "gpt-oss, a preamble": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>hm"
    "<|end|><|start|>assistant<|channel|>final<|message|>Step one",
    "gpt-oss, a format": "<|channel|>final <|constrain|>text<|message|>Step one",
    "gpt-oss, no analysis": "<|channel|>final<|message|>Step one",
    "gpt-oss, no special tokens": "analysisThe user asks.assistantfinalStep one",
    "gpt-oss, no special tokens, a preamble": "analysiswe ponderassistantcommentaryhmassistantfinalStep one",
    "Muse": " to=self<|message|>hm<|eom|><|start|>assistant to=user<|message|>Step one<|eot|>",
    "Muse, no thoughts": " to=user<|message|>Step one",
    "tokens of the turn": "<|im_start|>assistant\n<think>\nhm\n</think>\n\nStep one<|im_end|>",
    "R1's tokens of the turn": "<｜Assistant｜><think>\nhm\n</think>\n\nStep one<｜end▁of▁sentence｜>",
    "byte order mark": "\ufeff\n<think>hm</think>\nStep one",
    "several blocks": "<think>hm</think>\n<think>hm</think>\nStep one",
    "opened in the prompt and again": "<think>\n<think>\nhm\n</think>\n\nStep one",
    "nested": "<think>\nhm\n<think>\nhm\n</think>\nhm\n</think>\nStep one",
    "nested in a line": "<think>hm <think> hm </think> hm </think> Step one",
    "closed twice": "<think>hm</think>\n</think>\n\nStep one",
    "another closing mark": "<think>hm</thinking>\nStep one",
    "the closing mark in a thought": "<think>hm, write </think> here?\n</think>\n\nStep one",
    "the closing mark quoted in a thought": "<think>hm, `</think>`?</think>Step one",
    "the closing mark in a thought's code": "<think>hm\n```\n</think>\n```\n</think>\n\nStep one",
    "an open code block in a thought": "<think>hm\n```\nhm\n</think>\nStep one",
    "code before a lone closing mark": "```\nhm\n```\nhm\n</think>\n\nStep one",
}
SPOKEN_OF = (
    "Step one",
    "",
    "Use the <think> tag around it and </think> behind.",
    "Use `<think>` and `</think>`.",
    'Write "</think>" at the end.',
    "Run `grep '</think>' file` first.",
    "Write <think></think> for none.",
    "The tags:\n- <think>: opens\n- </think>: closes",
    "Like this:\n```\n<think>\nhm\n</think>\n```\nStep one",
    "```html\n<think>\n```\nopens thoughts.",
    "```python\nprint('</think>')\n```",
    "An analysis shows: step one.",
    "analysis: step one",
    "analysis of the text",
    "analysisOfVariance is a function.",
    "<analysis>Step one</analysis>",
    "Write <analysis>hm</analysis> first.",
    "<details>\n<summary>More</summary>\nStep one\n</details>",
    "## Thinking about it\nStep one",
    "finalScore = 1",
    "Here is my response: step one",
    "<p>Step one</p>",
    "The token <|channel|> separates channels.",
    "<think />Step one",
    "[Thinking] Step one",
    "```\n<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>hm\n```\nStep one",
    "[1] Step one",
    "<|channel_name|> is no mark",
)
NO_ANSWER = (
    ("<think>\nhm", False, CUT),
    ("<think>\nhm", True, ENDED),
    ("<think>\nhm\n</thi", False, CUT),
    ("<think>\nhm\n</think>\n\n", False, CUT),
    ("<thi", False, CUT),
    ("[THINK]hm", False, CUT),
    ("◁think▷hm", False, CUT),
    ("<|START_THINKING|>hm", False, CUT),
    ("<|channel>thought\nhm", False, CUT),
    ("<|channel|>analysis<|message|>hm", False, CUT),
    ("<|channel|>analysis", False, CUT),
    ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>fin", False, CUT),
    ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>", False, CUT),
    ("<|channel|>commentary to=functions.f<|message|>{}<|call|>", True, ENDED),
    ("<|channel|>commentary to=functions.finalize<|message|>{}<|call|>", True, ENDED),
    (" to=self<|message|>hm", False, CUT),
    ("analysisThe user asks", False, CUT),
    ("Here is my thought process: hm", False, CUT),
    ("Here are my reasoning steps:\nhm", False, CUT),
    ("Thinking...\nhm", False, CUT),
    ("<analysis>hm, step one", True, UNCLEAR),
    ("<think>hm</think>\n<think>hm", False, CUT),
    ("Sure.\n<think>\nhm", True, UNCLEAR),
    ("hm\n</thi", False, UNCLEAR),
    ("End it with </think> then.", True, UNCLEAR),
    ("<think>hm</think>\nTo end, write\n</think>\nand go on.", True, UNCLEAR),
    ("Sure. <think>illegal</think> Step one.", True, UNCLEAR),
    ("thought\nhm, step one", True, UNCLEAR),
    ("&lt;think&gt;hm&lt;/think&gt;Step one", True, UNCLEAR),
    ("```\ncode\n</think>\nStep one", True, UNCLEAR),
)

PIECES = ("<think>", "</think>", "\n", " ", "`", "```", "hm", ".", "<|channel|>", "<|message|>", "<|end|>", "final")


@pytest.mark.parametrize("text", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_familys_final_answer_is_found(text: str) -> None:
    found = split_thoughts(text)
    assert (found.answer, found.reason) == ("Step one", "")
    assert not re.search(r"step", found.thoughts, re.IGNORECASE)


@pytest.mark.parametrize("text", SPOKEN_OF)
def test_an_answer_that_speaks_of_the_marks_stays_whole(text: str) -> None:
    assert split_thoughts(text).answer == text
    assert split_thoughts(text, finished=False).answer == text


@pytest.mark.parametrize(("text", "finished", "reason"), NO_ANSWER)
def test_a_text_without_a_final_answer_says_why(text: str, finished: bool, reason: str) -> None:
    found = split_thoughts(text, finished=finished)
    assert (found.answer, found.reason) == (None, reason)


def test_a_thought_between_two_parts_of_the_answer_is_removed() -> None:
    found = split_thoughts("Step one.\n<think>\nillegal\n</think>\nStep two.")
    assert found.answer is not None and "illegal" not in found.answer
    assert found.answer.startswith("Step one.") and found.answer.endswith("Step two.")


def test_an_answer_that_explains_the_marks_behind_thoughts_stays_whole() -> None:
    answer = "Write <think> to open and </think> to close."
    assert split_thoughts(f"<think>\nThe user asks about <think>.\n</think>\n\n{answer}").answer == answer


def test_closed_thoughts_without_an_answer_are_an_empty_answer() -> None:
    assert split_thoughts("<think>\nhm\n</think>\n\n").answer == ""


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_every_text_is_split_into_an_answer_or_a_reason(text: str) -> None:
    for finished in (True, False):
        found = split_thoughts(text, finished=finished)
        assert (found.answer is None) == bool(found.reason)


@given(st.text("a\n `.", min_size=1), st.text("b\n `.", min_size=1))
def test_what_is_joined_is_split_again(thoughts: str, answer: str) -> None:
    found = split_thoughts(join_thoughts(thoughts, answer))
    if not answer.strip():
        assert found.answer == (None if thoughts.strip() else answer)
    elif thoughts.strip():
        assert (found.thoughts, found.answer) == (thoughts.strip(), answer.strip())
    else:
        assert found.answer == answer


@pytest.mark.parametrize(
    "loop", ["</think>", "<think>", "<think></think>", "<think>\nhm\n</think>\nso\n", "<|channel|>"]
)
def test_a_loop_of_marks_is_read_in_a_moment(loop: str) -> None:
    started = time.process_time()
    split_thoughts(loop * 2000)
    assert time.process_time() - started < 5


def test_joined_thoughts_without_an_answer_have_none() -> None:
    assert split_thoughts(join_thoughts("hm", None)).answer is None
    assert join_thoughts(None, "Step one") == "Step one"


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<｜Assistant｜><think>\n", "<think>\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<|im_start|>assistant\n<think></think>", ""),
        ("<|turn>model\n<|channel>thought\n", "<|channel>thought\n"),
        ("[/INST][THINK]", "[THINK]"),
        ("<|begin_assistant|>\nHere are my reasoning steps:\n", "Here are my reasoning steps:\n"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
        ("<|im_start|>assistant\n", ""),
    ],
)
def test_a_prompt_that_opens_thoughts_is_recognized(prompt: str, opened: str) -> None:
    assert opened_thoughts(prompt) == opened


def test_marks_are_told_from_other_special_tokens() -> None:
    marks = {"[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|START_THINKING|>", "<|channel>", "<channel|>"}
    others = {"<|im_start|>", "<|endoftext|>", "</s>", "<pad>", "[INST]", "<|fim_prefix|>"}
    assert {token for token in marks | others if is_mark(token)} == marks
    assert kept_tokens([*marks, *others, "<|end|>"]) == {*marks, "<|end|>"}
