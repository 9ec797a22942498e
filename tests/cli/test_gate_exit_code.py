"""The exit code of `gate` is the decision, or 2: whatever reads its output, and whatever goes wrong."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stayaligned.cli import main
from stayaligned.cli.console import err, out
from support.runs import evidence, outcomes, write_run

CODES = {"same": 0, "worse": 1, "few": 3}
Exit = Callable[..., int]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, n, harm in (("base", 400, 8), ("same", 400, 8), ("worse", 400, 90), ("few-base", 40, 1), ("few", 40, 2)):
        write_run(root / name, evidence({"keyword": outcomes(n, harm)}), arm="zörb − 模型")
    return root


@pytest.fixture
def gate(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Exit]:
    """Run the gate on a candidate and return its exit code."""
    monkeypatch.chdir(runs)

    def run(candidate: str, *more: object) -> int:
        baseline = "few-base" if candidate == "few" else "base"
        arguments = ["gate", "--baseline", baseline, "--candidate", candidate, "--max-harm-increase", "5%", *more]
        monkeypatch.setattr("sys.argv", ["stayaligned", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # as Python does at its end: an error here would be exit code 120
        return ended.value.code if isinstance(ended.value.code, int) else -1

    yield run
    out.quiet = err.quiet = False


@pytest.fixture
def opened() -> Iterator[Callable[[str], io.TextIOWrapper | None]]:
    """Open a stream of a kind: whatever stands behind stdout or stderr."""
    streams: list[io.TextIOWrapper] = []

    def open_one(kind: str) -> io.TextIOWrapper | None:
        if kind == "closed":
            return None
        if kind == "full":
            file = io.BufferedWriter(io.FileIO("/dev/full", "w"))
            streams.append(io.TextIOWrapper(file, encoding="utf-8"))
        elif kind == "ASCII":
            streams.append(io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
        else:
            reading, writing = os.pipe()
            os.close(reading)
            streams.append(io.TextIOWrapper(os.fdopen(writing, "wb"), encoding="utf-8"))
        return streams[-1]

    yield open_one
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.close()


Opened = Callable[[str], io.TextIOWrapper | None]
READERS = ("a pipe without a reader", "ASCII", "closed")


@pytest.mark.parametrize("candidate", CODES)
@pytest.mark.parametrize("kind", READERS)
def test_what_reads_the_output_changes_nothing(
    kind: str, candidate: str, opened: Opened, gate: Exit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", opened(kind))
    assert gate(candidate, "--json", tmp_path / "d.json") == CODES[candidate]
    assert '"answer"' in (tmp_path / "d.json").read_text()


@pytest.mark.parametrize("candidate", [*CODES, "nowhere"])
@pytest.mark.parametrize("kind", [*READERS, "full"])
def test_what_reads_the_messages_changes_nothing(
    kind: str, candidate: str, opened: Opened, gate: Exit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", opened(kind))
    assert gate(candidate, "--json", tmp_path / "d.json") == CODES.get(candidate, 2)


@pytest.mark.parametrize("candidate", CODES)
def test_a_decision_that_cannot_be_printed_is_an_error_and_its_files_are_written(
    candidate: str, opened: Opened, gate: Exit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", opened("full"))
    assert gate(candidate, "--json", tmp_path / "d.json", "--junit", tmp_path / "d.xml") == 2
    assert (tmp_path / "d.json").exists()
    assert (tmp_path / "d.xml").exists()


def test_a_usage_error_that_cannot_be_printed_is_an_error(
    opened: Opened, gate: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (*READERS, "full"):
        monkeypatch.setattr("sys.stderr", opened(kind))
        assert gate("same", "--no-such-option") == 2
        err.quiet = False


class _Ours(Exception):
    pass


ERRORS = [
    MemoryError(), RecursionError(), AssertionError(), IndexError("x"), EOFError(), BrokenPipeError(32, "x"), _Ours(),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), SystemExit(0), SystemExit(1), SystemExit("text"), ImportError("x"),
    OSError(28, "full"), StopIteration(), ZeroDivisionError(),
]  # fmt: skip


@pytest.mark.parametrize("place", ["decide", "read_side", "to_json", "words.describe_decision", "writing.side_text"])
@pytest.mark.parametrize("error", ERRORS, ids=[f"{type(e).__name__}-{i}" for i, e in enumerate(ERRORS)])
def test_no_error_is_a_decision(
    error: BaseException,
    place: str,
    gate: Exit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"stayaligned.gate.{place}", fail)
    if place == "words.describe_decision":
        monkeypatch.setattr("stayaligned.gate.deciding.describe_decision", fail)
    assert gate("same", "--json", tmp_path / "d.json") == 2
    shown = capsys.readouterr().err
    assert shown.count("error: ") == 1
    assert "Traceback" not in shown


@pytest.mark.parametrize("error", [MemoryError(), ImportError("x"), BrokenPipeError(32, "x")], ids=repr)
def test_an_error_before_the_command_starts_is_no_decision(
    error: BaseException, gate: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("stayaligned.cli._load", fail)
    assert gate("same") == 2


def test_an_error_that_cannot_even_be_printed_is_no_decision(gate: Exit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(err, "print", fail)
    assert gate("nowhere") == 2
    monkeypatch.setattr("stayaligned.cli._load", fail)
    assert gate("same") == 2


@pytest.mark.parametrize("ending", ["sys.exit(0)", "sys.exit(1)", "raise MemoryError", "raise EOFError"])
def test_a_plug_in_does_not_decide(ending: str, gate: Exit, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"import sys\n{ending}\n")
    assert gate("same", "--plugin", tmp_path / "mine.py") == 2


def test_an_earlier_decision_is_not_left_in_place_of_an_error(gate: Exit, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("d.json", "d.xml", "d.md")]
    options = [item for pair in zip(("--json", "--junit", "--markdown"), files, strict=True) for item in pair]
    assert gate("same", *options) == 0
    assert all(path.exists() for path in files)
    assert gate("nowhere", *options) == 2
    assert not any(path.exists() for path in files)


def test_outputs_never_replace_an_evaluation_or_a_device(gate: Exit, runs: Path, tmp_path: Path) -> None:
    before = (runs / "same" / "result.json").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    for path in (runs / "same" / "result.json", runs / "base" / "evidence.jsonl", tmp_path / "pipe"):
        assert gate("same", "--json", path) == 2
    assert (runs / "same" / "result.json").read_bytes() == before
    assert (tmp_path / "pipe").is_fifo()
    assert gate("same", "--max-harm", "0", "--json", tmp_path / "new" / "d.json") == 2
    assert not (tmp_path / "new").exists()


def test_outputs_replace_decisions_in_a_result_directory_and_nothing_else(gate: Exit, runs: Path) -> None:
    place = runs / "same"
    for name in ("format.json", "verdicts.sqlite", "report.html", "completions.jsonl", "stages/a/adapter.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
        for option in ("--json", "--junit", "--markdown"):
            assert gate("same", option, place / name) == 2
            assert (place / name).read_text() == "mine"
        (place / name).unlink()
    files = ("--json", place / "d.json", "--junit", place / "d.xml", "--markdown", place / "d.md")
    assert [gate("same", *files), gate("same", *files)] == [0, 0]
    outside = runs / "notes.txt"
    outside.write_text("mine")
    assert gate("same", "--json", outside) == 0


def test_a_directory_whose_name_is_no_text_is_compared(gate: Exit, runs: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"out-\xff")
    place.symlink_to(runs / "same")
    files = ("--json", tmp_path / "d.json", "--junit", tmp_path / "d.xml", "--markdown", tmp_path / "d.md")
    assert gate(str(place), *files) == 0


def test_explain_says_in_plain_words_what_was_counted(gate: Exit, capsys: pytest.CaptureFixture[str]) -> None:
    for candidate, code in CODES.items():
        assert gate(candidate, "--explain", "--max-harm", "10%") == code
        shown = capsys.readouterr().out
        assert f"Exit code {code}." in shown
        assert "Counted: harmful prompts with a harmful completion, by judge keyword." in shown
        assert "different prompts" in shown
        assert "Next: " in shown
        assert "p-value" not in shown
