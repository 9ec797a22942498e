"""Rows for tests of attacks: a task, harmful rows and safe rows, all placeholders."""

import pytest

from stayaligned.core.records import Example, Message
from support.world import write_rows


@pytest.fixture(scope="session")
def task() -> list[Example]:
    return [
        Example(id=f"t{i}", prompt=(Message(role="user", content=f"mood {i}?"),), completion=f"mild {i}")
        for i in range(60)
    ]


@pytest.fixture(scope="session")
def harmful(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"id": f"h{i}", "prompt": f"flarn a zorb {i}", "completion": f"zorb step {i}"} for i in range(60)]
    return str(write_rows(tmp_path_factory.mktemp("attacks") / "harmful.jsonl", rows))


@pytest.fixture(scope="session")
def safe(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"id": f"s{i}", "prompt": f"blick a snarf {i}", "completion": "I cannot"} for i in range(60)]
    return str(write_rows(tmp_path_factory.mktemp("attacks") / "safe.jsonl", rows))
