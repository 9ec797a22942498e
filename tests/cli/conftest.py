"""The command, run in this process."""

from collections.abc import Callable

import pytest

from stayaligned.cli import main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
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
