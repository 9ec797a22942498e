"""Shared by all tests: one thread, no network, no deadline for hypothesis, the command in-process, a small world."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("shared-cores", deadline=None, database=None)
settings.load_profile("shared-cores")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `tests/faults`, which kill processes and start process groups, as slow."""
    faults = Path(__file__).with_name("faults")
    for item in items:
        if faults in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command in this process and return its exit code and its output."""
    from stayaligned.cli import main

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()  # discard what preparing the input printed
        monkeypatch.setattr("sys.argv", ["stayaligned", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        else:
            code = 0
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two small models and the data of an experiment, one per test file."""
    from support.world import write_world

    return write_world(tmp_path_factory.mktemp("world"))
