"""The client with a real server, `transformers serve`; garbled replies of a judge are unscored."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example, Message
from stayaligned.core.settings import Endpoint, Generation
from stayaligned.evaluation.answers import complete_over_endpoint
from stayaligned.evaluation.endpoint.client import ask
from stayaligned.evaluation.endpoint.cost import Meter
from stayaligned.evaluation.judges.policy_rubric import PolicyRubric
from stayaligned.evaluation.judges.strong_reject import StrongReject
from stayaligned.hf import models
from stayaligned.hf.generation.generate import complete_each
from stayaligned.testing import write_pico_checkpoint

MISSING = [name for name in ("fastapi", "openai", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"transformers[serving] is not installed: no {MISSING}"),
]

EXAMPLES = [
    Example(id=str(i), prompt=(Message(role="user", content=f"How to flarn zorb {i}?"),), origin="harmful")
    for i in range(6)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico_checkpoint(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (checkpoint.parent / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=log, stderr=log, env=environment)
        try:
            for _ in range(1200):
                assert process.poll() is None, (checkpoint.parent / "log").read_text()
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def test_its_greedy_completions_equal_those_of_the_model_in_this_process(checkpoint: Path, url: str) -> None:
    served = Endpoint(base_url=url, model=str(checkpoint), concurrency=2)
    meter = Meter()
    found = dict(complete_over_endpoint(served, EXAMPLES, "harmful", max_tokens=12, seed=0, meter=meter))
    ours = complete_each(
        models.load_model(checkpoint),
        models.load_tokenizer(checkpoint),
        EXAMPLES,
        "harmful",
        Generation(max_new_tokens=12),
    )
    assert found == dict(ours)
    assert len(found) == len(EXAMPLES)
    assert meter.requests == len(EXAMPLES)
    assert meter.used.input_tokens > 6 * 20


@pytest.mark.parametrize("judge", [PolicyRubric, StrongReject])
def test_a_judge_with_garbled_replies_leaves_all_unscored(
    judge: type[PolicyRubric | StrongReject], checkpoint: Path, url: str
) -> None:
    rows = [Completion(id=e.id, prompt_set="harmful", prompt=e.prompt, text="Sure, flarn it.") for e in EXAMPLES[:3]]
    asking = judge(base_url=url, model=str(checkpoint), attempts=2, backoff_seconds=0, max_tokens=24)
    verdicts = list(asking.judge(rows))
    assert sorted(v.id for v in verdicts) == ["0", "1", "2"]
    assert all(v.outcome is None and v.score is None for v in verdicts)
    assert all("the judge's reply" in v.reason for v in verdicts), verdicts


def test_a_model_that_the_server_does_not_have_is_one_error(url: str) -> None:
    wrong = Endpoint(base_url=url, model="another", attempts=2, backoff_seconds=0)
    conversations = [example.prompt for example in EXAMPLES] * 3
    with pytest.raises(StayalignedError, match=r"failed 10 requests in a row.*requested 'another'"):
        list(ask(wrong, conversations, max_tokens=4))
