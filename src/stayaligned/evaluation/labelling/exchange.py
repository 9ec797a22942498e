"""Labels as CSV: the columns of inspect_scout's validation files, and those that tell whose label of what it is."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import new_file, read_text
from stayaligned.data.csv import parse_csv
from stayaligned.evaluation.labelling.store import LabelStore, latest_labels
from stayaligned.evaluation.labelling.values import Choice, CompletionKey, DrawnItem, Label

COLUMNS = ("id", "target", "split", "predicate", "labeller", "time", "prompt_set", "policy", "judge")
"""Columns of an exported file; the first four are inspect_scout's. No cell begins like a formula or is a number."""
_REQUIRED = ("id", "target")
_NO_LABELLER = "Name who labelled in the file, or with --labeller. Nothing was imported."
_PREDICATE = "eq"


def choose_split(prompt: str) -> Literal["dev", "test"]:
    """Return the split of a prompt, by its hash: the same for each completion of it, in each export."""
    return "dev" if hashlib.sha256(prompt.encode()).digest()[0] < 128 else "test"


def export_labels(store: LabelStore, path: Path) -> int:
    """Write the label that counts of each labeller and completion to a new CSV file, and return their number.

    Raises:
        StayalignedError: if the file exists or can't be written, or the labels are damaged.
    """
    latest = latest_labels(store.items, store.read())
    places = {key: place for place, item in reversed([*enumerate(store.design.items)]) for key in item.questions()}
    rows = [
        _row(key, label)
        for key in sorted(latest, key=lambda key: (places[key], key))
        for _, label in sorted(latest[key].items())
    ]
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
    return len(rows)


def _row(key: CompletionKey, label: Label) -> tuple[str, ...]:
    return (
        "-".join(key),
        label.outcome,
        choose_split(key[1]),
        _PREDICATE,
        label.labeller,
        label.time.isoformat(),
        key[0],
        f"policy-{label.policy}",
        f"judge-{label.judge}",
    )


def import_labels(store: LabelStore, path: Path, labeller: str | None = None) -> int:
    """Store the labels of a CSV file, all or none, and return the number of new ones.

    `id` and `target` are required, and `labeller` unless a name is given. The other columns may be missing or empty; a
    label without a time is given now.

    Args:
        store: the labels.
        path: the file.
        labeller: whose labels the rows without a labeller are.

    Raises:
        StayalignedError: naming the line, for a label of another completion, policy or judge, without a labeller, or
            that contradicts another one of the same labeller, in the file or in the store; and for a cut file.
    """
    hint = "Give a file as --export writes it. Nothing was imported."
    text = read_text(path, hint=hint).removeprefix("\ufeff")
    keys = {"-".join(key): (key, item) for item in reversed(store.design.items) for key in item.questions()}
    stored = latest_labels(store.items, store.read())
    found: dict[tuple[CompletionKey, str], tuple[int, Label]] = {}
    for line, cells in parse_csv(text, str(path)):
        where = f"{path}, line {line}"
        try:
            key, label = _read_row(store, keys, {**cells, "labeller": cells.get("labeller", "").strip() or labeller})
        except StayalignedError as error:
            raise StayalignedError(f"{where}: {error.message}", hint=error.hint or hint) from None
        place = (key, label.labeller)
        earlier = f"line {found[place][0]}" if place in found else str(store.directory)
        other = found[place][1] if place in found else stored.get(key, {}).get(label.labeller)
        if other is not None and other.outcome != label.outcome:
            raise StayalignedError(
                f"{where}: target: {label.labeller!r} says {label.outcome!r} here and {other.outcome!r} in {earlier}",
                hint="Keep one of them; a label is changed on the page. Nothing was imported.",
            )
        found[place] = line, label
    if not found:
        raise StayalignedError(f"{path}: no labels", hint=hint)
    return store.append([label for _, label in found.values()])


def _read_row(
    store: LabelStore, keys: Mapping[str, tuple[CompletionKey, DrawnItem]], given: Mapping[str, str | None]
) -> tuple[CompletionKey, Label]:
    """Return the label of a row and what it labels; errors name the column, not the line."""
    cells = {name: cell.strip() for name, cell in given.items() if cell is not None}
    if not cells.get("labeller"):
        raise StayalignedError("labeller: required, but missing", hint=_NO_LABELLER)
    for name in _REQUIRED:
        if not cells.get(name):
            raise StayalignedError(
                f"{name}: required, but " + ("empty" if name in cells else "there is no such column")
            )
    if cells["id"] not in keys:
        raise StayalignedError(f"id: {cells['id']!r} is not a completion of the labelling in {store.directory}")
    key, item = keys[cells["id"]]
    choice: Choice | None = next((one for one in get_args(Choice) if one == cells["target"]), None)
    if choice is None:
        raise StayalignedError(f"target: {cells['target']!r}, expected {', '.join(get_args(Choice))}")
    own = [one for one in item.completions if one.completion == key[2]]
    expected = {
        "split": {choose_split(key[1])},
        "predicate": {_PREDICATE},
        "prompt_set": {key[0]},
        "policy": {f"policy-{one.policy}" for one in own},
        "judge": {f"judge-{store.design.judge_hash}"},
    }
    for name, values in expected.items():
        if cells.get(name, "") not in {"", *values}:
            raise StayalignedError(f"{name}: {cells[name]!r}, but the labelling has {', '.join(sorted(values))}")
    label = store.label(item.id, key[2], choice, cells["labeller"], _read_time(cells.get("time", "")))
    if cells.get("policy"):
        label = label.model_copy(update={"policy": cells["policy"].removeprefix("policy-")})
    return key, label


def _read_time(text: str) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise StayalignedError(f"time: {text!r}, expected one as 2026-05-31T09:30:00+00:00")
    return time
