"""Shared by all tests: one thread, no network, no deadline for hypothesis, the command in-process, a small world."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("shared-cores", deadline=None, database=None)
settings.load_profile("shared-cores")

BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of `tests/faults`, which kill processes and start process groups, as slow.

    Deselect the tests of what the installed hosts can't do; with those of `constraints.txt` there are none.
    """
    from support.host_limits import out_of_reach

    beyond = out_of_reach()
    if left_out := [item for item in items if beyond and item.nodeid.startswith(beyond)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.nodeid.startswith(beyond)]
    faults = Path(__file__).with_name("faults")
    for item in items:
        if faults in item.path.parents:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many beginnings of test ids were left out because the installed hosts can't pass them."""
    from support.host_limits import out_of_reach

    if beyond := out_of_reach():
        terminalreporter.write_line(f"tests out of reach of the installed hosts: {len(beyond)}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that can't be imported with the installed hosts."""
    from support.host_limits import out_of_reach

    return True if str(collection_path.relative_to(config.rootpath)) in out_of_reach() else None


@pytest.fixture(scope="module")
def browser():
    """Return headless Chromium; skip, or fail where a browser is required, if there is none."""
    executable = shutil.which("chromium")
    if executable is None:
        message = "no chromium: install the Debian package `chromium`"
        if os.environ.get("STAYALIGNED_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


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
