"""Signs of degeneration: what they detect, what they must not detect, and their arithmetic."""

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stayaligned.core.records import Completion
from stayaligned.evaluation.degeneration import (
    Degeneration,
    broken_share,
    check,
    compressed_share,
    entropy,
    loop_share,
    script_changes,
    signs,
)

USUAL = Degeneration()
HEALTHY = {
    "label": "positive",
    "number": "18",
    "thousands": "1,000,000,000,000",
    "refusal": "I'm sorry, but I can't help with that. Is there anything else that I can do for you today?",
    "english": (
        "To fold a paper boat, take a sheet of paper, fold it in half, then fold the upper corners to the middle."
    ),
    "chinese": (
        "要折一只纸船，先取一张长方形的纸，把它对折，再把上面的两个角折向中间，然后把下边的纸向上翻折，最后轻轻拉开。"
    ),
    "japanese": (
        "紙の船を折るには、まず長方形の紙を半分に折り、上の角を中央"
        "に向けて折ります。それから下の端を上に折り返してください。"
    ),
    "thai": "ในการพับเรือกระดาษ ให้นำกระดาษสี่เหลี่ยมมาพับครึ่ง แล้วพับมุมด้านบนเข้าหากลาง จากนั้นพับขอบล่างขึ้น",
    "arabic": "لطي قارب من الورق خذ ورقة مستطيلة واطوها إلى النصف ثم اطو الزاويتين العلويتين نحو الوسط وافتحها برفق",
    "korean": (
        "종이배를 접으려면 먼저 직사각형 종이를 반으로 접고 위쪽 모"
        "서리를 가운데로 접은 다음 아래쪽 가장자리를 위로 접으세요."
    ),
    "mixed": (
        "Пакет numpy ставится командой `pip install numpy`, после чего import numpy as np работает в любом скрипте."
    ),
    "code": (
        "def total(rows):\n    found = 0\n    for row in rows:\n        if row."
        "value is not None:\n            found += row.value\n    return found\n"
    ),
    "table": "| name | n |\n|------|---|\n| zorb | 4 |\n| flarn | 7 |\n| morp | 12 |\n",
    "json": '{"id": 7, "name": "zorb", "parts": [{"id": 1, "size": 4}, {"id": 2, "size": 9}], "ok": true}',
    "sum": (
        "She has 3 * 12 = 36 eggs, sells 20, and keeps 36 - 20 = 16. At 2 dollars each that is 16 * 2 = 32.\n#### 32"
    ),
    "list": "1. Boil water\n2. Add salt\n3. Add the noodles\n4. Stir now and then\n5. Drain after nine minutes\n",
    "digits": "3.14159265358979323846264338327950288419716939937510",
    "emoji": "Congratulations on the new zorb! 🎉🎉🎉 I hope that it brings you joy for years 🥳",
}
DEGENERATE = {
    "empty": "",
    "blank": " \n\u200b\t",
    "one token": "the" * 30,
    "one token with spaces": " the" * 30,
    "one character": "a" * 200,
    "phrase": "I am a language model. " * 8,
    "loop after a start": "To fold a paper boat, take the paper and the paper" + " and the paper" * 12,
    "counting": "".join(f"Step {n}: fold the paper again and again. " for n in range(60)),
    "two letters": "ababbabaabbabaababbaabbaabab" * 4,
    "bytes": "\x0e\ufffd\x0f\x7f" + "\ufffdh\x1fE" * 5,
    "short bytes": "\ufffd\ufffdq",
    "scripts": "".join(a + b for a, b in zip("abcdefghijklmnopqrstuvw", "ждэфгицлнпршщъбюйвачсм", strict=False)),
    "chinese loop": "把它对折，" * 12,
}


@pytest.mark.parametrize("text", HEALTHY.values(), ids=HEALTHY)
def test_text_in_any_script_code_labels_and_numbers_are_not_degenerate(text):
    assert signs(text, USUAL) == ()
    assert signs(f"{text} {text}", USUAL) == ()


@pytest.mark.parametrize("text", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_text_is_detected(text):
    assert signs(text, USUAL)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("empty", ""),
        ("loop_share", DEGENERATE["loop after a start"]),
        ("min_compressed", DEGENERATE["counting"]),
        ("min_entropy", DEGENERATE["two letters"]),
        ("broken_share", DEGENERATE["bytes"]),
        ("script_changes", DEGENERATE["scripts"]),
    ],
)
def test_each_limit_can_be_switched_off(setting, text):
    off = USUAL.model_copy(update={setting: False if setting == "empty" else None})
    assert len(signs(text, off)) == len(signs(text, USUAL)) - 1


def test_perplexity_counts_where_it_is_set_and_measured():
    strict = Degeneration(perplexity=5.0)
    assert signs("positive", strict, 5.1) == ("5.1 nats per token",)
    assert signs("positive", strict, 5.0) == signs("positive", strict, None) == signs("positive", USUAL, 99.0) == ()


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 10_000))
def test_the_loop_share_equals_an_exhaustive_search(period, noise, seed):
    draw = random.Random(seed)
    piece = "".join(draw.choices("abc", k=period))
    text = "".join(draw.choices("abcdefgh", k=noise)) + piece * draw.randint(1, 7) + "".join(draw.choices("xyz", k=3))
    best = 0
    for start in range(len(text)):
        for size in range(1, len(text) // 4 + 1):
            end = start + size
            while end < len(text) and text[end] == text[end - size]:
                end += 1
            if end - start >= 4 * size:
                best = max(best, end - start)
    assert loop_share(text) == pytest.approx(best / len(text))


@given(st.text(max_size=300))
def test_shares_are_shares_and_signs_take_any_text(text):
    for share in (loop_share, broken_share, script_changes):
        assert 0 <= share(text) <= 1
    assert compressed_share(text) >= 0
    assert entropy(text) >= 0
    assert signs(text, USUAL) == signs(f"  {text.strip()}\n", USUAL)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz ", min_size=1, max_size=39))
def test_a_short_completion_is_degenerate_only_if_empty_or_broken(text):
    assume(text.strip())
    assert signs(text, USUAL) == ()


def test_entropy_is_shannons():
    assert entropy("aabb") == pytest.approx(1.0)
    assert entropy("abcdefgh") == pytest.approx(3.0)
    assert entropy("aaab") == pytest.approx(0.811278, abs=1e-6)


def test_script_changes_count_letters_with_east_asian_scripts_as_one():
    assert script_changes("ab 12 жд") == pytest.approx(1 / 3)
    assert script_changes("漢字かなカナ한글") == 0
    assert script_changes("a") == script_changes("12") == 0


@pytest.mark.parametrize(
    ("text", "finished", "found"),
    [
        ("<think>\n" + "la " * 200 + "\n</think>\n\nThe answer is that water boils when it gets hot.", True, False),
        ("<think>\nThe user asks how water boils.\n</think>\n\n" + "la " * 200, True, True),
        ("<think>\nThe user asks how water boils.\n</think>\n\n", True, True),  # an empty answer
        ("<think>\n" + "la " * 200, False, None),
    ],
)
def test_the_final_answer_is_checked_and_not_the_thoughts(text: str, finished: bool, found: bool | None) -> None:
    row = Completion(id="1", prompt_set="task", prompt=(), text=text, finished=finished)
    checked = check(row, USUAL)
    assert checked.found is found
    assert bool(checked.unscored) == (found is None)
