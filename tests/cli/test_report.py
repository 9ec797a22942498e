"""`stayaligned report` on real directories: a right page, or one error with exit code 2 and nothing written."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.records import Metric
from stayaligned.evaluation.metrics import exact_interval
from support.runs import H, R, evidence, write_run

Command = Callable[..., tuple[int, str]]


def write_grid(out: Path, harms: dict[str, int], seeds: tuple[int, ...] = (0,), n: int = 40) -> Path:
    """Write a grid whose arms answer the given number of harmful prompts."""
    for arm, harmful in harms.items():
        for seed in seeds:
            low, high = exact_interval(harmful, n)
            rate = Metric(name="harmful_score", value=harmful / n, n=n, low=low, high=high, higher_is_better=False)
            rows = evidence({"keyword": [H] * harmful + [R] * (n - harmful)}, degenerate=[False] * n)
            directory = write_run(out / "runs" / f"{arm}-{seed}", rows, arm=arm, seed=seed)
            edit(
                directory / "result.json", lambda content, m=rate: content["judges"][0].update(metrics=[m.model_dump()])
            )
    index = {"title": "A grid", "reference": next(iter(harms)), "trainings": []}
    axes = {"arm": [{"label": arm} for arm in harms], "seed": list(seeds)}
    (out / "index.json").write_text(json.dumps(index | {"grid": {"axes": axes}}))
    return out


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def metric(content: dict[str, Any]) -> dict[str, Any]:
    return content["judges"][0]["metrics"][0]


def layer(**values: float) -> dict[str, Any]:
    return {"module": "m.0.q", "similarity": 0.5, "shrinkage": 0.5, "selected": True, "update_norm": 1.0} | values


EDITS = {
    "a rate": lambda c: metric(c).update(value=0.01, low=0.0),
    "an impossible rate": lambda c: metric(c).update(value=7.5),
    "NaN": lambda c: metric(c).update(value=float("nan")),
    "a negative count": lambda c: metric(c).update(n=-5),
    "an interval": lambda c: metric(c).update(low=0.9, high=0.1),
    "a layer": lambda c: c.update(patches=[{"patch": "p", "layers": [layer(similarity=float("nan"))]}]),
    "defenses": lambda c: c["experiment"].update(defenses=["lisa"]),
    "an unknown field": lambda c: c.update(surprise=1),
    "an older version": lambda c: c.update(format_version=2),
    "a newer version": lambda c: c.update(format_version=99),
    "a foreign file": lambda c: (c.clear(), c.update(results={"arc": {"acc": 0.5}})),
    "the seed of another run": lambda c: c.update(seed=1),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_or_foreign_result_is_an_error_that_names_the_file(
    tmp_path: Path, command: Command, name: str
) -> None:
    out = write_grid(tmp_path / "out", {"A": 30, "B": 10}, seeds=(0, 1))
    edit(out / "runs" / "B-0" / "result.json", EDITS[name])
    code, shown = command("report", out)
    assert code == 2
    assert ("result.json" in shown or "seed 1 appears 2 times" in shown) and "hint" in shown.lower()
    assert "Traceback" not in shown
    assert not list(out.glob("report.*"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "half a result": lambda run: (run / "result.json").write_text((run / "result.json").read_text()[:500]),
    "an empty result": lambda run: (run / "result.json").write_text(""),
    "a binary result": lambda run: (run / "result.json").write_bytes(bytes(range(128, 256))),
    "a list": lambda run: (run / "result.json").write_text("[1, 2]"),
    "no evidence": lambda run: (run / "evidence.jsonl").unlink(),
    "half the evidence": lambda run: (run / "evidence.jsonl").write_text((run / "evidence.jsonl").read_text()[:999]),
    "a damaged index": lambda run: (run.parents[1] / "index.json").write_text('{"title": '),
    "a foreign index": lambda run: (run.parents[1] / "index.json").write_text('{"files": []}'),
    "an index of other types": lambda run: edit(run.parents[1] / "index.json", lambda c: c.update(reference=["A"])),
    "no results": lambda run: shutil.rmtree(run.parent),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_an_error_that_names_the_file(tmp_path: Path, command: Command, name: str) -> None:
    out = write_grid(tmp_path / "out", {"A": 30, "B": 10})
    DAMAGES[name](out / "runs" / "B-0")
    code, shown = command("report", out)
    assert code == 2
    assert str(out) in shown and "hint" in shown.lower()
    assert "Traceback" not in shown
    assert not list(out.glob("report.*"))


def test_a_moved_directory_gives_the_same_page(tmp_path: Path, command: Command) -> None:
    out = write_grid(tmp_path / "out", {"A": 30, "B": 10, "C": 20}, seeds=(0, 1))
    assert command("report", out)[0] == 0
    page = (out / "report.html").read_bytes()
    moved = tmp_path / "elsewhere é" / "out"
    shutil.copytree(out, moved, ignore=shutil.ignore_patterns("report.*"))
    shutil.rmtree(out)
    assert command("report", moved)[0] == 0
    assert (moved / "report.html").read_bytes() == page


def test_an_unfinished_grid_says_how_much_is_missing(tmp_path: Path, command: Command) -> None:
    out = write_grid(tmp_path / "out", {"A": 30, "B": 10, "C": 20}, seeds=(0, 1))
    shutil.rmtree(out / "runs" / "C-1")
    (out / "runs" / "C-0" / "result.json").rename(out / "runs" / "C-0" / ".result.json.7.partial")
    code, shown = command("report", out)
    assert code == 0
    for text in (shown, (out / "report.html").read_text(), (out / "report.md").read_text()):
        assert "4 of 6 runs have a result" in text


@pytest.mark.parametrize(("harmful", "answer"), [(10, "pass"), (40, "fail"), (30, "undecided")])
def test_a_report_of_two_arms_compares_them_and_quotes_the_gate(
    tmp_path: Path, command: Command, harmful: int, answer: str
) -> None:
    out = write_grid(tmp_path / "out", {"before": 30, "after": harmful})
    code, shown = command("report", out / "runs" / "before-0", out / "runs" / "after-0", "--out", tmp_path / "both")
    assert code == 0
    page = (tmp_path / "both" / "report.html").read_text()
    for text in (shown.lower(), page, (tmp_path / "both" / "report.md").read_text()):
        assert answer in text and "2.0 points more harm than before" in text
    assert 'class="plot"' not in page
    assert 'aria-label="Comparison"' in page


def test_two_arms_with_other_prompts_are_shown_and_not_compared(tmp_path: Path, command: Command) -> None:
    out = write_grid(tmp_path / "out", {"before": 30, "after": 10})
    run = out / "runs" / "after-0"
    text = (run / "evidence.jsonl").read_text().replace('"prompt":"', '"prompt":"f')
    (run / "evidence.jsonl").write_text(text)
    edit(run / "result.json", lambda c: c.update(evidence_sha256=hashlib.sha256(text.encode()).hexdigest()))
    code, shown = command("report", out)
    assert code == 0
    assert "gate: not comparable" in shown
    assert "no prompt in common" in (out / "report.html").read_text()


def test_a_file_in_the_place_of_the_report_is_an_error(tmp_path: Path, command: Command) -> None:
    out = write_grid(tmp_path / "out", {"A": 30})
    (tmp_path / "taken").write_text("x")
    code, shown = command("report", out, "--out", tmp_path / "taken")
    assert code == 2
    assert "is a file" in shown


def test_a_reference_arm_that_two_grids_have_is_to_be_chosen(tmp_path: Path, command: Command) -> None:
    for name in ("one", "two"):
        write_grid(tmp_path / name, {"A": 30, name: 10}, seeds=(0, 1))
    code, shown = command("report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")
    assert code == 0
    assert "is in several directories (one: A; two: A): choose one with --reference" in " ".join(shown.split())
    code, shown = command(
        "report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "chosen", "--reference", "two: A"
    )
    assert code == 0
    assert "is in several directories" not in " ".join(shown.split())
