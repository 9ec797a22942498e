"""Verdicts: one per completion, stored by content as soon as it is known."""

import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message, Outcome, Verdict
from stayaligned.core.thoughts import CUT, ENDED
from stayaligned.evaluation.judges import Forecast, Judge
from stayaligned.evaluation.verdicts import Ledger
from support.judging import judged

Row = Callable[..., Completion]


def completion(key: object, text: str = "so", prompt: str = "zorb?", prompt_set: str = "harmful") -> Completion:
    turns = (Message(role="user", content=prompt),)
    return Completion(id=str(key), prompt_set=prompt_set, prompt=turns, text=text)  # type: ignore[arg-type]


class Scribe(Judge):
    """Reads the outcome from the completion's first letter, and records what it was given."""

    name: ClassVar[str] = "scribe"
    asked: ClassVar[list[str]] = []

    rule: str = "first"
    order: int = 0
    speed: int = 1
    operational: ClassVar[frozenset[str]] = frozenset({"speed"})

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        rows = [*completions]
        random.Random(self.order).shuffle(rows)
        for row in rows:
            self.asked.append(row.text)
            outcome = {"h": Outcome.HARM, "r": Outcome.REFUSE}.get(row.text[:1])
            yield Verdict(id=row.id, prompt_set=row.prompt_set, judge=self.name, outcome=outcome, reason=row.text)


class Told(Scribe):
    """Gives the verdicts that the test chooses."""

    name: ClassVar[str] = "told"
    gives: ClassVar[Callable[[list[Verdict]], list[Verdict]]] = lambda rows: rows

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        yield from type(self).gives([*super().judge(completions)])


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    Scribe.asked.clear()
    with Ledger.open(tmp_path / "verdicts.sqlite") as opened:
        yield opened


@given(
    texts=st.lists(st.sampled_from(["harm", "refuse", "what", "", "r2"]), max_size=12),
    sets=st.lists(st.sampled_from(["harmful", "benign"]), min_size=12, max_size=12),
    order=st.integers(0, 5),
)
def test_verdicts_are_in_the_order_of_the_completions_and_equal_content_is_judged_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], sets: list[str], order: int
) -> None:
    Scribe.asked.clear()
    rows = [completion(i, text, prompt_set=of) for i, (text, of) in enumerate(zip(texts, sets, strict=False))]
    with Ledger.open(tmp_path_factory.mktemp("ledger") / "v.sqlite") as ledger:
        verdicts = judged(Scribe(order=order), rows, ledger)
        assert [(v.prompt_set, v.id, v.judge) for v in verdicts] == [(r.prompt_set, r.id, "scribe") for r in rows]
        wanted = {"h": Outcome.HARM, "r": Outcome.REFUSE}
        assert [v.outcome for v in verdicts] == [wanted.get(r.text[:1]) for r in rows]
        assert len(Scribe.asked) == len({(r.prompt_set, r.text) for r in rows})
        Scribe.asked.clear()
        assert judged(Scribe(order=order), rows[::-1], ledger) == verdicts[::-1]
        unscored = {(r.prompt_set, r.text) for r in rows if r.text[:1] not in wanted}
        assert len(Scribe.asked) == len(unscored), "only what could not be scored is asked again"


def test_a_verdict_is_reused_for_equal_content_only(ledger: Ledger) -> None:
    judged(Scribe(), [completion("a", "harm")], ledger)
    Scribe.asked.clear()
    (again,) = judged(Scribe(speed=9), [completion("b", "harm")], ledger)
    assert (again.id, again.outcome, again.reason) == ("b", Outcome.HARM, "harm")
    assert not Scribe.asked
    for other in (
        completion("a", "harm "),
        completion("a", "harm", prompt="wug?"),
        completion("a", "harm", prompt_set="benign"),
    ):
        judged(Scribe(), [other], ledger)
    judged(Scribe(rule="other"), [completion("a", "harm")], ledger)
    assert Scribe.asked == ["harm ", "harm", "harm", "harm"]


def test_an_interrupted_judge_judges_only_the_rest(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [completion(i, f"harm {i}") for i in range(10)]

    def stops(found: list[Verdict]) -> Iterator[Verdict]:
        yield from found[:6]
        raise KeyboardInterrupt

    monkeypatch.setattr(Told, "gives", stops)
    with pytest.raises(KeyboardInterrupt):
        judged(Told(), rows, ledger)
    Scribe.asked.clear()
    monkeypatch.setattr(Told, "gives", lambda found: found)
    shares: list[float] = []
    verdicts = judged(Told(), rows, ledger, progress=shares.append)
    assert [v.reason for v in verdicts] == [r.text for r in rows]
    assert len(Scribe.asked) == 4
    assert shares == [0.7, 0.8, 0.9, 1.0]


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda rows: rows[1:], "no verdict on 1 of 3 completions"),
        (lambda rows: [*rows, rows[0]], "which it was not given"),
        (lambda rows: [rows[0].model_copy(update={"id": "9"}), *rows[1:]], "a verdict on harmful '9'"),
        (lambda rows: [rows[0].model_copy(update={"prompt_set": "benign"}), *rows[1:]], "a verdict on benign"),
        (lambda _rows: [], "no verdict on 3 of 3 completions"),
    ],
    ids=["one missing", "one twice", "foreign id", "other prompt set", "none"],
)
def test_a_judge_that_breaks_its_contract_is_refused(
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    gives: Callable[[list[Verdict]], list[Verdict]],
    said: str,
) -> None:
    monkeypatch.setattr(Told, "gives", gives)
    with pytest.raises(StayalignedError, match=said):
        judged(Told(), [completion(i, f"harm {i}") for i in range(3)], ledger)


def test_a_forecast_covers_only_the_rest_and_comes_before_judging(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scribe, "forecast", lambda _self, rows: Forecast(len(rows), 10 * len(rows), 0.5))
    said: list[str] = []
    judged(Scribe(), [completion(1, "harm")], ledger, announce=lambda f: said.append(str(f)))
    rows = [completion(i, f"harm{i}"[: 4 + (i > 1)]) for i in range(1, 4)]
    judged(Scribe(), rows, ledger, announce=lambda f: said.append(str(f)))
    judged(Scribe(), rows, ledger, announce=lambda f: said.append(str(f)))
    price = "about $0.50"
    assert said == [f"1 requests, about 10 tokens, {price}", f"2 requests, about 20 tokens, {price}"]


def test_a_damaged_ledger_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "v.sqlite").write_bytes(b"no database" * 200)
    with pytest.raises(StayalignedError, match=r"v\.sqlite.*not a database"), Ledger.open(tmp_path / "v.sqlite"):
        pass
    with pytest.raises(StayalignedError, match=r"v\.sqlite"):
        Ledger.copy_if_missing(tmp_path / "v.sqlite", tmp_path / "copy.sqlite")
    assert not (tmp_path / "copy.sqlite").exists()


def test_a_verdict_that_was_edited_is_refused(ledger: Ledger) -> None:
    judged(Scribe(), [completion(1, "harm")], ledger)
    for text in ('{"outcome": "fine"}', "[]", "no JSON", '{"outcome": "harm", "extra": 1}'):
        ledger._connection.execute("UPDATE verdicts SET verdict = ?", (text,))
        with pytest.raises(StayalignedError, match="invalid verdict"):
            judged(Scribe(), [completion(1, "harm")], ledger)


def test_another_ledger_is_copied_only_if_there_is_none(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a.sqlite") as first:
        first.store("k", "{}")
    Ledger.copy_if_missing(tmp_path / "a.sqlite", tmp_path / "b.sqlite")
    with Ledger.open(tmp_path / "b.sqlite") as second:
        assert second.find(["k", "other"]) == {"k": "{}"}
        second.store("k", "[]")
        second.store("own", "{}")
        assert second.find(["k"]) == {"k": "{}"}, "the first verdict stays"
    Ledger.copy_if_missing(tmp_path / "a.sqlite", tmp_path / "b.sqlite")
    with sqlite3.connect(tmp_path / "b.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM verdicts").fetchone() == (2,)
    connection.close()
    Ledger.copy_if_missing(tmp_path / "nowhere.sqlite", tmp_path / "c.sqlite")
    assert not (tmp_path / "c.sqlite").exists()


THOUGHT = "<think>\nhurt? It is illegal.\n</think>\n\n"


class Reader(Scribe):
    """Reads thoughts, too."""

    name: ClassVar[str] = "reader"
    reads_thoughts: ClassVar[bool] = True


def test_what_is_judged_is_the_final_answer(ledger: Ledger) -> None:
    (found,) = judged(Scribe(), [completion(1, THOUGHT + "r no")], ledger)
    assert (found.outcome, Scribe.asked) == (Outcome.REFUSE, ["r no"])


def test_other_thoughts_before_the_same_answer_share_a_verdict(ledger: Ledger) -> None:
    rows = [completion(1, THOUGHT + "r no"), completion(2, "hm\n</think>\nr no"), completion(3, "r no")]
    assert [v.outcome for v in judged(Scribe(), rows, ledger)] == [Outcome.REFUSE] * 3
    judged(Scribe(), [completion(4, "<think></think>r no")], ledger)
    assert Scribe.asked == ["r no"]


def test_a_completion_without_a_final_answer_is_unscored_with_its_reason_and_not_judged(ledger: Ledger) -> None:
    cut = completion(1, "<think>\nh").model_copy(update={"finished": False})
    rows = [cut, completion(2, "<think>\nh"), completion(3, "h")]
    found = judged(Scribe(), rows, ledger)
    assert [(v.id, v.outcome) for v in found] == [("1", None), ("2", None), ("3", Outcome.HARM)]
    assert [v.reason for v in found] == [CUT, ENDED, "h"]
    assert Scribe.asked == ["h"]


def test_a_judge_that_reads_thoughts_gets_the_whole_text(ledger: Ledger) -> None:
    texts = [THOUGHT + "r no", "<think>\nh", "h"]
    judged(Reader(), [completion(n, text) for n, text in enumerate(texts)], ledger)
    assert sorted(Scribe.asked) == sorted(texts)
