"""Read the rows of local files and folders: JSON, CSV, TSV, Parquet and Arrow, also compressed.

What a file holds decides, not its name: JSON lines may be named `.json`, and a list `.jsonl`. Parquet, Arrow and data
sets saved by `datasets` are read by pyarrow and `datasets`, without a cache.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.core.extras import require_packages
from stayaligned.core.files import parse_json_values
from stayaligned.data.csv import parse_csv, parse_tsv
from stayaligned.data.formats import ROW_COLUMNS
from stayaligned.data.options import Source

if TYPE_CHECKING:
    import pyarrow as pa

_TYPES = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
SUFFIXES = tuple(f"{suffix}{packed}" for suffix in _TYPES for packed in ("", *_COMPRESSED))
"""Ends of the names of files with rows, in lower case."""
READABLE = ".jsonl, .json, .csv, .tsv, .parquet or .arrow file"
"""The kinds of files, for messages."""
_HOLDERS = frozenset({"data", "rows", "instances", "examples", "items", "records", "train", "test", "validation"})
"""Keys of an object in a JSON file whose list is the file's rows, whatever the columns."""
_SIDE_FILES = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}")
_FOREIGN = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the data",
        "Run `git lfs fetch` and `git lfs checkout` in its repository.",
    ),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet or document", "Export the sheet as .csv."),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "Unpack it, or export the sheet as .csv."),
    (b"SQLite format 3", "an SQLite database", "Export the table as .csv."),
    (b"%PDF", "a PDF document", f"Give a {READABLE}."),
    (b"\x93NUMPY", "a NumPy array", f"Give a {READABLE}."),
    (b"Obj\x01", "an Avro file", f"Convert it to a {READABLE}."),
    (b"ORC", "an ORC file", f"Convert it to a {READABLE}."),
    (b"\x80", "a pickle, which can run code when it is read", f"Convert it to a {READABLE}."),
)
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")


class Row(NamedTuple):
    """One row of a source, unchanged."""

    where: str
    """The row's place, for messages: "line 12", "item 12" of a list, "row 12" of a table; counted from 1."""
    values: dict[str, Any]


def read_path(path: Path, source: Source) -> Iterator[Row]:
    """Yield the rows of a file, of a folder of files, or of a data set that `datasets` saved.

    Raises:
        StayalignedError: naming the file and the line, if there are no rows or they can't be read.
    """
    try:
        path = path.expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL character, or no such home directory
        exists = False
    if not exists:
        hint = f"Give a {READABLE}, a folder of them, or hf://owner/name for a hub data set."
        raise StayalignedError(f"{source.text}: no such file", hint=hint)
    split = source.reading.get("split")
    if (path / "dataset_dict.json").is_file():
        names = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
        yield from read_path(path / _chosen(names, split, source), _without_split(source))
    elif (path / "state.json").is_file():
        _refuse_split(source)
        yield from _saved_rows(path)
    elif path.is_dir():
        files = _files_of(path, source)
        _refuse_unused_columns(files, source)
        for file in files:
            for row in _rows_of(file, _without_split(source)):
                yield Row(f"{file.relative_to(path).as_posix()}, {row.where}", row.values)
    else:
        _refuse_unused_columns([path], source)
        yield from _rows_of(path, source)


def table_rows(table: pa.Table) -> Iterator[Row]:
    """Yield the rows of an Arrow table; images and audio stay encoded."""
    number = 0
    for batch in table.to_batches():
        for values in batch.to_pylist():
            number += 1
            yield Row(f"row {number}", values)


# ---- folders -------------------------------------------------------------------------------------------------------


def _files_of(folder: Path, source: Source) -> list[Path]:
    """Return the files with rows in a folder, or else in its folders; only those of one split."""
    pattern, split = source.reading.get("files", "*"), source.reading.get("split")
    found = [path for path in folder.rglob("*") if _is_rows(path, folder, pattern)]
    found = [path for path in found if path.parent == folder] or found
    if not found:
        raise StayalignedError(
            f"{source.text}: no {READABLE} in this folder", hint="Give such a file, or a folder of such files."
        )
    by_split: dict[str, list[Path]] = {}
    for path in found:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if split is not None or len(by_split.keys() - {""}) > 1:
        found = by_split[_chosen(sorted(by_split.keys() - {""}), split, source)]
    parents = sorted({_config_of(path.relative_to(folder).parent) for path in found})
    if len(parents) > 1:
        raise StayalignedError(
            f"{source.text}: files in several folders, {', '.join(parents)}",
            hint=f"Name one: {folder / parents[-1]}; or its files: ?files={parents[-1]}/*",
        )
    return sorted(found, key=_natural_order)


def _is_rows(path: Path, folder: Path, pattern: str) -> bool:
    inner = path.relative_to(folder)
    return (
        path.name.casefold().endswith(SUFFIXES)
        and path.name not in _SIDE_FILES
        and not any(part.startswith(".") for part in inner.parts)
        and fnmatch.fnmatch(inner.as_posix(), pattern)
        and path.is_file()
    )


def _split_of(path: Path) -> str:
    """Return the split that a file's name or its folders' names mean, as `datasets` reads them; empty for none."""
    stem = path.name.split(".")[0]
    if shard := _SHARD.fullmatch(stem):
        return shard[1]
    for part in (stem, *reversed(path.parts[:-1])):
        words = set(re.split(r"[^a-z]+", part.casefold()))
        for split, keywords in _SPLITS.items():
            if words & set(keywords):
                return split
    return ""


def _config_of(folder: Path) -> str:
    """Return a folder without a last part that names a split, `main/train`."""
    return (folder.parent if _split_of(folder / "x") and folder.name else folder).as_posix()


def _chosen(names: list[str], split: str | None, source: Source) -> str:
    every = ", ".join(names) or "none"
    if split is None:
        raise StayalignedError(
            f"{source.text}: several splits, {every}",
            hint=f"Name one: ?split={'train' if 'train' in names else names[0]}",
        )
    if split not in names:
        raise StayalignedError(f"{source.text}: no split {split!r}", hint=did_you_mean(split, names, "splits"))
    return split


def _refuse_split(source: Source) -> None:
    if "split" in source.reading:
        raise StayalignedError(
            f"{source.text}: no source option 'split' for one file or table", hint="Remove `split=`."
        )


def _refuse_unused_columns(files: list[Path], source: Source) -> None:
    if source.csv_columns is not None and not any(_type_of(file) in ("csv", "tsv") for file in files):
        raise StayalignedError(
            f"{source.text}: `columns=` names the columns of CSV files without a header, and there is no CSV file",
            hint="To name a column: ?prompt=COLUMN&completion=COLUMN",
        )


def _without_split(source: Source) -> Source:
    reading = {key: value for key, value in source.reading.items() if key != "split"}
    return Source(source.text, source.place, source.hub, reading=reading, csv_columns=source.csv_columns)


def _natural_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort category_2 before category_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path.name)], path.name


def _saved_rows(folder: Path) -> Iterator[Row]:
    """Yield the rows of a data set in the form of `Dataset.save_to_disk`."""
    require_packages({str(folder): ["datasets"]})
    from datasets import load_from_disk

    try:
        yield from table_rows(load_from_disk(str(folder)).with_format("arrow")[:])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StayalignedError(
            f"{folder}: not a data set that `datasets` saved: {' '.join(str(error).split())[:300]}",
            hint="Save it again with `save_to_disk`, or as .parquet with `to_parquet`.",
        ) from None


# ---- files ---------------------------------------------------------------------------------------------------------


def _type_of(path: Path) -> str:
    """Return the type of a file by its name, ignoring a compression's suffix; JSON for unknown names."""
    suffixes = [suffix.casefold() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _TYPES.get(suffixes[-1], "json") if suffixes else "json"


def _rows_of(path: Path, source: Source) -> Iterator[Row]:
    try:
        data = _unpacked(path.read_bytes(), path)
    except OSError as error:
        raise StayalignedError(f"{path}: {error.strerror}") from None
    _refuse_foreign(data, path)
    kind = _type_of(path)
    if kind in ("parquet", "arrow") or data.startswith((b"PAR1", b"ARROW1")):
        _refuse_split(source)
        yield from table_rows(_read_table(data, path))
        return
    text = _decoded(data, path)
    if kind == "json" or re.match(r'\s*(?:\{\s*"|\[\s*\{)', text):  # no CSV begins so
        yield from _json_rows(text, path, source)
        return
    _refuse_split(source)
    parse = parse_tsv if kind == "tsv" else parse_csv
    for number, cells in parse(text, str(path), source.csv_columns):
        yield Row(f"line {number}", dict(cells))


def _unpacked(data: bytes, path: Path) -> bytes:
    import bz2
    import gzip
    import lzma
    import zlib

    try:
        if data.startswith(b"\x1f\x8b"):
            return gzip.decompress(data)
        if data.startswith(b"BZh"):
            return bz2.decompress(data)
        if data.startswith(b"\xfd7zXZ\x00"):
            return lzma.decompress(data)
        for mark, name in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")):
            if data.startswith(mark):
                require_packages({str(path): ["datasets"]})  # with which pyarrow comes
                import pyarrow

                with pyarrow.input_stream(pyarrow.BufferReader(data), compression=name) as stream:
                    return stream.read()
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise StayalignedError(
            f"{path}: can't be unpacked: {error}", hint="The file is damaged or incomplete; download it again."
        ) from None
    return data


def _refuse_foreign(data: bytes, path: Path) -> None:
    head = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(_MARKUP) or (_type_of(path) == "json" and head.startswith(b"<")):
        raise StayalignedError(
            f"{path}: a web page or XML, not rows",
            hint="A download that failed saves such a page; open it to see the cause, and download the file again.",
        )
    if data[257:262] == b"ustar":
        raise StayalignedError(f"{path}: a tar archive", hint="Unpack it, and give a file or a folder of its contents.")
    for mark, what, hint in _FOREIGN:
        if data.startswith(mark):
            raise StayalignedError(f"{path}: {what}", hint=hint)


def _read_table(data: bytes, path: Path) -> pa.Table:
    require_packages({str(path): ["datasets"]})
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if data.startswith(b"PAR1"):
            return pq.read_table(pa.BufferReader(data))
        if data.startswith(b"ARROW1"):
            return pa.ipc.open_file(pa.BufferReader(data)).read_all()
        return pa.ipc.open_stream(pa.BufferReader(data)).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StayalignedError(
            f"{path}: not a readable Parquet or Arrow file: {' '.join(str(error).split())[:300]}",
            hint="It is incomplete, or of another type than its name says.",
        ) from None


def _decoded(data: bytes, path: Path) -> str:
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise StayalignedError(
            f"{path}: not UTF-8 text (byte {error.start})",
            hint="Convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW. In Excel, save as CSV UTF-8.",
        ) from None


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _json_rows(text: str, path: Path, source: Source) -> Iterator[Row]:
    """Yield the rows of JSON lines, of a list, or of the one list in an object."""
    hint = 'Write one JSON object per line, without a comma after it: {"prompt": "…", "completion": "…"}.'
    if not path.name.casefold().endswith(SUFFIXES):
        hint = f"Give a {READABLE}. A list of prompts can be a .csv file: FILE.csv?columns=prompt"
    values = list(parse_json_values(text, str(path), hint=hint))
    kind, rows = "line", values
    if len(values) == 1:
        value = values[0][1]
        if isinstance(value, list) and (path.suffix.casefold() == ".json" or any(isinstance(v, dict) for v in value)):
            found: list[Any] | None = value
        else:
            found = _list_in(value, path, source)
        if found is not None:
            kind, rows = "item", list(enumerate(found, start=1))
        else:
            _refuse_split(source)
    else:
        _refuse_split(source)
    for number, value in rows:
        if not isinstance(value, dict):
            raise StayalignedError(
                f"{path}, {kind} {number}: expected an object, found {type(value).__name__}",
                hint='A row looks like {"prompt": "…", "completion": "…"}.',
            )
        yield Row(f"{kind} {number}", value)


def _list_in(value: Any, path: Path, source: Source) -> list[Any] | None:
    """Return the list of rows in an object such as {"data": […]}; None for an object that is itself a row."""
    if not isinstance(value, Mapping) or not value:
        return None
    if _is_by_columns(value):
        raise StayalignedError(
            f"{path}: a table by columns or by its index, expected a list of rows",
            hint="With pandas: to_json(path, orient='records', lines=True).",
        )
    lists = {str(key): item for key, item in value.items() if isinstance(item, list) and _holds_rows(str(key), item)}
    if value.keys() & ROW_COLUMNS or not lists:
        return None
    split = source.reading.get("split")
    return lists[_chosen(list(lists), split, source) if split or len(lists) > 1 else next(iter(lists))]


def _is_by_columns(value: Mapping[Any, Any]) -> bool:
    """Return whether an object is one of pandas' or `datasets`' other forms of a table."""
    cells = list(value.values())
    if any(isinstance(item, Mapping) and item.keys() & {"role", "from"} for item in cells):  # a row with turns
        return False
    if all(isinstance(item, Mapping) for item in cells) and ("0" in value or all("0" in item for item in cells)):
        return True
    keys = [item.keys() for item in cells if isinstance(item, Mapping)]
    if len(keys) == len(cells) > 1 and all(each == keys[0] for each in keys):
        return True
    texts = [isinstance(item, list) and not any(isinstance(cell, Mapping) for cell in item) for item in cells]
    return {"columns", "index", "data"} <= value.keys() or (len(cells) > 1 and all(texts))


def _holds_rows(key: str, value: list[Any]) -> bool:
    objects = bool(value) and all(isinstance(item, Mapping) for item in value)
    turns = objects and all(item.keys() & {"role", "from"} for item in value)
    return objects and not turns and (key in _HOLDERS or all(item.keys() & ROW_COLUMNS for item in value))
