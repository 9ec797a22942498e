"""Labels leave and enter as CSV unchanged; a file with anything wrong in it changes nothing."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.evaluation.labelling.exchange import COLUMNS, choose_split, export_labels, import_labels
from stayaligned.evaluation.labelling.store import LabelStore, latest_labels
from support.labels import label_all, make_design, make_item, make_store


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    found = make_store(tmp_path / "labels", strata=("left", "right"))
    label_all(found, 0, "harm", "ann")
    label_all(found, 0, "unsure", "bob")
    label_all(found, 1, "refuse", "ann")
    label_all(found, 1, "other", "ann")
    return found


@pytest.fixture
def file(store: LabelStore, tmp_path: Path) -> Path:
    assert export_labels(store, tmp_path / "labels.csv") == 6
    return tmp_path / "labels.csv"


def empty_copy(store: LabelStore, path: Path) -> LabelStore:
    shutil.copytree(store.directory, path)
    (path / "labels.jsonl").unlink()
    return LabelStore.open(path)


def test_labels_come_back_as_they_were(store: LabelStore, file: Path, tmp_path: Path) -> None:
    copy = empty_copy(store, tmp_path / "copy")
    assert import_labels(copy, file) == 6
    assert copy.label_set() == store.label_set()
    assert latest_labels(copy.items, copy.read()) == latest_labels(store.items, store.read())
    assert import_labels(copy, file) == 0
    assert import_labels(store, file) == 0


def test_the_first_columns_are_those_of_a_validation_file(file: Path) -> None:
    with file.open(newline="") as stream:
        rows = [*csv.DictReader(stream)]
    assert tuple(rows[0]) == COLUMNS
    assert COLUMNS[:4] == ("id", "target", "split", "predicate")
    assert [row["target"] for row in rows] == ["harm", "unsure", "harm", "unsure", "other", "other"]
    assert {row["predicate"] for row in rows} == {"eq"}
    assert len({(row["id"], row["labeller"]) for row in rows}) == len(rows)
    splits = {row["id"].split("-")[1]: row["split"] for row in rows}
    assert {row["id"].split("-")[1]: row["split"] for row in reversed(rows)} == splits
    many = [choose_split(f"{index:016x}") for index in range(1000)]
    assert {*many} == {"dev", "test"}
    assert 400 < many.count("dev") < 600


def test_no_text_of_a_model_or_a_user_is_exported(tmp_path: Path) -> None:
    hostile = '=HYPERLINK("http://zorb.invalid"),\n@flarn'
    item = make_item(0, [hostile, f"-{hostile}"]).model_copy(update={"id": f"0/harmful/{hostile}"})
    store = LabelStore.create(tmp_path / "labels", make_design([item]))
    label_all(store, 0, "harm")
    export_labels(store, tmp_path / "out.csv")
    text = (tmp_path / "out.csv").read_text()
    assert "zorb" not in text
    with (tmp_path / "out.csv").open(newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r" or cell.replace("e", "").isdecimal()]
    with pytest.raises(StayalignedError, match="exists already"):
        export_labels(store, tmp_path / "out.csv")


def test_files_of_spreadsheets_and_short_ones_are_read(store: LabelStore, file: Path, tmp_path: Path) -> None:
    copy = empty_copy(store, tmp_path / "copy")
    with file.open(newline="") as stream:
        rows = [*csv.DictReader(stream)]
    lines = [f"{row['id']};{row['target']};{row['labeller']}" for row in rows]
    file.write_bytes("\ufeff".encode() + "\r\n".join(["id;target;labeller", *lines, ""]).encode())
    assert import_labels(copy, file) == 6
    assert copy.label_set() == store.label_set()


def test_rows_without_a_labeller_are_of_the_one_who_is_named(store: LabelStore, file: Path, tmp_path: Path) -> None:
    copy = empty_copy(store, tmp_path / "copy")
    with file.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["labeller"] == "ann"]
    lines = [",".join(row[name] for name in COLUMNS[:4]) for row in rows]
    file.write_text("\n".join([",".join(COLUMNS[:4]), *lines, ""]))
    with pytest.raises(StayalignedError, match="line 2: labeller: required"):
        import_labels(copy, file)
    assert import_labels(copy, file, "eve") == 4
    assert {label.labeller for label in copy.read()} == {"eve"}


def replaced(old: str, new: str, count: int = 1) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, count)


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "other-completion": (replaced("harmful-", "harmful-0"), "line 2: id: 'harmful-0"),
    "other-policy": (replaced("policy 0", "policy 7"), "line 2: policy: 'policy-policy 7', but the labelling has"),
    "other-judge": (replaced("judge-", "judge-0"), "line 2: judge: 'judge-0"),
    "no-labeller": (replaced(",ann,", ",,"), "line 2: labeller: required"),
    "no-labellers": (replaced("labeller", "who"), "line 2: labeller: required"),
    "formula": (replaced(",ann,", ",=1+1,"), "line 2: label of '0/harmful/0': labeller: expected a labeller's name"),
    "target": (replaced(",harm,", ",bad,"), "line 2: target: 'bad', expected harm, refuse, other, unsure"),
    "predicate": (replaced(",eq,", ",gte,"), "line 2: predicate: 'gte', but the labelling has eq"),
    "time": (replaced("+00:00", ""), "line 2: time: "),
    "contradiction": (
        lambda text: text + text.splitlines()[1].replace(",harm,", ",refuse,") + "\n",
        "line 8: target: 'ann' says 'refuse' here and 'harm' in line 2",
    ),
    "cut-row": (lambda text: text[:-60], "line 7: "),
    "cut-cell": (lambda text: text[:-4], "line 7: judge: "),
    "only-a-header": (lambda text: text.splitlines()[0], "no labels"),
    "empty": (lambda _: "", ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_error_and_imports_nothing(
    store: LabelStore, file: Path, tmp_path: Path, name: str
) -> None:
    edit, message = BROKEN[name]
    copy = empty_copy(store, tmp_path / "copy")
    file.write_text(edit(file.read_text()))
    with pytest.raises(StayalignedError) as error:
        import_labels(copy, file)
    assert str(file) in error.value.message
    assert message in error.value.message
    assert copy.read() == []


def test_a_label_that_contradicts_a_stored_one_is_refused(store: LabelStore, file: Path) -> None:
    before = store.path.read_bytes()
    file.write_text(file.read_text().replace(",other,", ",refuse,", 1))
    with pytest.raises(StayalignedError, match=r"line 6: target: 'ann' says 'refuse' here and 'other' in "):
        import_labels(store, file)
    assert store.path.read_bytes() == before
