"""`label`: a labelling is drawn, continued, exported, imported and summarized; other runs are one error."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.request
from pathlib import Path

import pytest

from stayaligned.evaluation.labelling.store import LabelStore
from support.labels import label_all, write_judged_run
from support.runs import R, outcomes


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    benign = {"keyword": [R] * 6}
    return [
        write_judged_run(tmp_path / arm, {"keyword": outcomes(30, harm), "second": outcomes(30, 3)}, benign, arm=arm)
        for arm, harm in (("base", 3), ("tuned", 6))
    ]


@pytest.fixture
def labels(command, runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory of labels that the command drew; the page is not opened."""
    monkeypatch.setattr("stayaligned.evaluation.labelling.server.serve", lambda *_, **__: None)
    code, shown = command("label", *runs, "--out", tmp_path / "labels", "--n", 20)
    assert code == 0, shown
    assert "36 prompts of base, tuned; 20 to label, drawn by the verdicts of 'keyword'" in " ".join(shown.split())
    return tmp_path / "labels"


def test_the_page_is_served_and_the_summary_follows(command, runs, tmp_path, monkeypatch) -> None:
    def serve(directory: Path, *, labeller: str | None, port: int, open_browser: bool, announce) -> None:
        assert (labeller, port, open_browser) == ("ann", 0, False)
        announce("http://127.0.0.1:1/token/")
        for index in range(LabelStore.open(directory).design.wanted):
            label_all(LabelStore.open(directory), index, "refuse")

    monkeypatch.setattr("stayaligned.evaluation.labelling.server.serve", serve)
    code, shown = command("label", *runs, "--out", tmp_path / "labels", "--labeller", "ann", "--no-browser")
    assert code == 0, shown
    assert "http://127.0.0.1:1/token/" in shown
    assert "36 items are labelled of 36 wanted, 36 in all.\nLabels: ann 72." in shown
    assert "100 (" in shown


def test_the_real_page_stores_labels_that_the_summary_counts(command, runs, tmp_path, monkeypatch) -> None:
    from stayaligned.evaluation.labelling import server

    def serve(directory: Path, *, announce, **options) -> None:
        with server.start_server(directory, options["labeller"], options["port"]) as running:
            thread = threading.Thread(target=running.serve_forever)
            thread.start()
            with urllib.request.urlopen(f"{running.address}items?first=0&count=1") as reply:  # noqa: S310
                (item,) = json.load(reply)["items"]
            for one in item["completions"]:
                press = {"labeller": "ann", "item": 0, "completion": one["completion"], "outcome": "harm"}
                origin = running.address.rsplit("/", 2)[0]
                request = urllib.request.Request(  # noqa: S310
                    f"{running.address}label",
                    json.dumps({**press, "previous": None}).encode(),
                    {"Content-Type": "application/json", "Origin": origin},
                )
                urllib.request.urlopen(request).close()  # noqa: S310
            running.shutdown()
            thread.join()
        announce("ended")

    monkeypatch.setattr(server, "serve", serve)
    code, shown = command("label", *runs, "--out", tmp_path / "labels", "--labeller", "ann", "--json", "--quiet")
    assert code == 0, shown
    found = json.loads(shown)
    assert (found["n_labelled"], found["labellers"]) == (1, {"ann": 2})


def test_the_same_runs_continue_and_other_ones_are_refused(command, runs, labels, tmp_path) -> None:
    label_all(LabelStore.open(labels), 0, "harm")
    assert command("label", *reversed(runs), "--out", labels, "--n", 25)[0] == 0
    store = LabelStore.open(labels)
    assert (store.design.wanted, len(store.read())) == (25, 2)
    for options, message in (
        ((runs[0], "--out", labels), "holds labels of other completions (36 items of 'base', 'tuned')"),
        ((*runs, "--out", labels, "--seed", 3), "was drawn with --seed 0, not 3"),
        ((*runs, "--out", labels, "--judge", "second"), "was drawn with --judge keyword, not second"),
        ((*runs, "--out", tmp_path / "base"), "is not empty, and not a directory of labels"),
        ((*runs, "--out", tmp_path / "new", "--summary"), "no labels"),
        ((*runs, "--out", tmp_path / "new", "--arm", "tuned2"), "--arm 'tuned2': no such arm"),
    ):
        code, shown = command("label", *options)
        assert code == 2
        assert message in " ".join(shown.split())
        assert "howto/label" in shown
    assert not (tmp_path / "new").exists()


def test_labels_are_exported_imported_and_summarized(command, runs, labels, tmp_path) -> None:
    store = LabelStore.open(labels)
    for index in range(20):
        label_all(store, index, "refuse", "=evil"[1:])
    file = tmp_path / "labels.csv"
    code, shown = command("label", *runs, "--out", labels, "--export", file)
    assert code == 0, shown
    assert "labels.csv  (40 labels)" in shown
    copy = tmp_path / "copy"
    shutil.copytree(labels, copy)
    (copy / "labels.jsonl").unlink()
    code, shown = command("label", *runs, "--out", copy, "--import", file, "--json", "--quiet")
    assert code == 0, shown
    found = json.loads(shown)
    assert (found["schema"], found["n_counted"]) == ("stayaligned.label/1", 20)
    assert {row["judge"] for row in found["judges"]} == {"keyword", "second"}
    assert command("label", *runs, "--out", labels, "--summary", "--json")[0] == 0
    file.write_text(file.read_text()[:-9])
    code, shown = command("label", *runs, "--out", copy, "--import", file)
    assert code == 2
    assert "labels.csv, line 41: " in " ".join(shown.split())


def test_a_judge_that_is_worse_on_one_arm_is_reported(command, runs, labels) -> None:
    store = LabelStore.open(labels)
    for index, item in enumerate(store.design.items):
        harm = item.prompt_set == "harmful" and int(item.id.rpartition("-")[2]) < 20
        label_all(store, index, "harm" if harm else "refuse")
    code, shown = command("label", *runs, "--out", labels, "--summary")
    assert code == 0
    table = " ".join(shown.split())
    assert "keyword base 30 66.7 15 (3.2 to 37.9) 100 (69.2 to 100) 0.11" in table
    assert "Refusals of benign prompts, with 95 % intervals:" in table
