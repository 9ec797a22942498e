"""vLLM and llama.cpp serving a real model: completions, rubric judges, and an adapter that is live or ignored.

`make servers` starts the servers and sets the two addresses; these tests are deselected elsewhere.
"""

from __future__ import annotations

import os

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example, Message, Outcome
from stayaligned.core.settings import ServedModel
from stayaligned.evaluation.answers import check_adapter_is_live, complete_over_endpoint
from stayaligned.evaluation.judges.policy_rubric import PolicyRubric
from stayaligned.evaluation.judges.strong_reject import StrongReject

pytestmark = pytest.mark.servers

SERVERS = {"vllm": "STAYALIGNED_VLLM", "llama": "STAYALIGNED_LLAMA"}
EXAMPLES = [
    Example(id=str(number), prompt=(Message(role="user", content=text),))
    for number, text in enumerate(
        [
            "What is the capital of France?",
            "Name three colours.",
            "How many legs has a spider?",
            "Which month follows May?",
            "Write one sentence about the sea.",
            "What is two plus three?",
            "Name a fruit.",
            "Say hello in Spanish.",
        ]
    )
]


def address(server: str) -> str:
    return os.environ[SERVERS[server]]


@pytest.mark.parametrize("server", SERVERS)
def test_completions_are_read_with_their_end(server: str) -> None:
    settings = ServedModel(base_url=address(server), model="smol", concurrency=4)
    found = dict(complete_over_endpoint(settings, EXAMPLES, "benign", max_tokens=24))
    again = dict(complete_over_endpoint(settings, EXAMPLES[:2], "benign", max_tokens=3))
    assert len(found) == len(EXAMPLES)
    # In float32 "The" has a probability of 0.152 and "L" of 0.140; llama.cpp rounds activations, and writes French.
    if server == "vllm":
        assert "Paris" in found[0].text
        assert found[0].finished
    assert [again[number].finished for number in (0, 1)] == [False, False]
    assert all(found[number].text.startswith(again[number].text) for number in (0, 1))


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", [PolicyRubric, StrongReject])
def test_a_small_judge_scores_in_range_or_not_at_all(server: str, kind: type[PolicyRubric | StrongReject]) -> None:
    judge = kind(base_url=address(server), model="smol", attempts=1, concurrency=4, max_tokens=96)
    rows = [Completion.of(example, "harmful", f"{example.id} is the answer.", finished=True) for example in EXAMPLES]
    verdicts = list(judge.judge(rows))
    assert sorted(verdict.id for verdict in verdicts) == sorted(row.id for row in rows)
    assert judge.scale is not None
    for verdict in verdicts:
        assert isinstance(verdict.outcome, Outcome) or verdict.reason
        assert verdict.score is None or judge.scale.low <= verdict.score <= judge.scale.high


def test_an_adapter_that_vllm_serves_is_live_and_one_that_changes_nothing_is_an_error() -> None:
    settings = ServedModel(base_url=address("vllm"), model="tuned", base_model="smol", concurrency=4)
    check_adapter_is_live(settings, EXAMPLES)
    with pytest.raises(StayalignedError, match="the adapter is not loaded, or changes nothing"):
        check_adapter_is_live(settings.model_copy(update={"model": "dead"}), EXAMPLES)


@pytest.mark.parametrize("server", ["vllm"])
def test_a_model_that_is_not_served_is_one_error(server: str) -> None:
    settings = ServedModel(base_url=address(server), model="nobody", attempts=1)
    with pytest.raises(StayalignedError, match="404"):
        list(complete_over_endpoint(settings, EXAMPLES[:1], "benign", max_tokens=3))
