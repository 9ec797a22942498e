"""What every test shares: one thread, no network, no time limit on an example of hypothesis, the command in-process."""

import os
from collections.abc import Callable

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("shared-cores", deadline=None, database=None)
settings.load_profile("shared-cores")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command, run in this process: (exit code, what it printed)."""
    from stayaligned.cli import main

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()  # what preparing the input printed
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
