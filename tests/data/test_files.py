"""Files as other tools write them are read by what they hold; what holds no rows is an error that says what it is."""

import bz2
import gzip
import json
import lzma

import pandas as pd
import pyarrow as pa
import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import parse_json
from stayaligned.data.sources import read_examples

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, indent=2)
FRAME = pd.DataFrame(ROWS)


def packed(text, codec):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(text.encode())
    return sink.getvalue().to_pybytes()


def save(directory, name, content):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(source, **options):
    return [(e.prompt[-1].content, e.completion) for e in read_examples(str(source), origin="task", **options)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", LINES),
        ("list.jsonl", LIST),
        ("objects_over_lines.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("holder.json", json.dumps({"version": "1", "data": ROWS})),
        ("instances.json", json.dumps({"type": "text2text", "instances": ROWS})),
        ("crlf.jsonl", LINES.replace("\n", "\r\n\r\n")),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("utf16.jsonl", LINES.encode("utf-16")),
        ("a.NDJSON", LINES),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("packed_without_saying.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.jsonl.zst", packed(LINES, "zstd")),
        ("a.jsonl.lz4", packed(LINES, "lz4")),
        ("a.CSV", "Prompt,Completion\na,b\nc,d\n"),
        ("index.csv", FRAME.to_csv()),
        ("trailing.csv", "prompt,completion,\na,b,\n\nc,d,\n"),
        ("spreadsheet.csv", '"prompt";"completion"\r\na;b\r\nc;d\r\n'.encode("utf-16")),
        ("bars.csv", "prompt|completion\na|b\nc|d\n"),
        ("names_with_spaces.csv", "my id;prompt;completion\n1;a;b\n2;c;d\n"),
        ("excel.csv", "sep=;\r\nprompt;completion\r\na;b\r\nc;d\r\n"),
        ("lines.csv", LINES),
        ("list.tsv", LIST),
        ("a.csv.gz", gzip.compress(b"prompt,completion\na,b\nc,d\n", mtime=0)),
        ("a.TSV", "prompt\tcompletion\na\tb\nc\td\n"),
        ("nan.jsonl", LINES.replace('"b"', '"b", "note": NaN')),
        ("one_null.jsonl", LINES + '{"prompt": "e", "completion": null}\n'),
        ("one_nan.jsonl", LINES + '{"prompt": "e", "completion": NaN}\n'),
    ],
)
def test_a_file_is_read_by_what_it_holds(tmp_path, name, content):
    assert texts(save(tmp_path, name, content)) == [("a", "b"), ("c", "d")]


def test_tables_are_read_with_their_index_their_nulls_and_their_float_ids(tmp_path):
    frame = FRAME.assign(id=[7.0, None]).set_axis(["x", "y"])
    frame.loc["z"] = ["e", None, None]
    frame.to_parquet(tmp_path / "a.parquet")
    frame.reset_index(drop=True).to_feather(tmp_path / "a.arrow")
    for name in ("a.parquet", "a.arrow"):
        found = read_examples(str(tmp_path / name), origin="task")
        assert [(e.prompt[-1].content, e.completion) for e in found] == [("a", "b"), ("c", "d")]
        assert found[0].id == "7"


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path):
    long = "x" * 140_000
    assert texts(save(tmp_path, "a.csv", f"prompt,completion\n{long},b\n")) == [(long, "b")]


def test_quotes_of_a_tsv_without_quoting_are_text(tmp_path):
    quoted = save(tmp_path, "a.tsv", 'prompt\tcompletion\n"a\tb"\t"say ""c"""\n')
    assert texts(quoted) == [("a\tb", 'say "c"')]
    glue = save(tmp_path, "b.tsv", 'prompt\tcompletion\n"open\tb "c" d\nplain\te\n')
    assert texts(glue) == [('"open', 'b "c" d'), ("plain", "e")]


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "git lfs"),
        ("a.json", "\n<!DOCTYPE html><html></html>", "a web page", "download"),
        ("a.parquet", "<html>", "a web page", "download"),
        ("a.json", "<table border=1><tr><th>prompt</th></tr></table>", "a web page or XML", "download"),
        ("a.tar.gz", gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar", mtime=0), "a tar archive", "Unpack"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", "an old spreadsheet", ".csv"),
        ("a.csv", "prompt,completion\né,b\n".encode("cp1252"), "not UTF-8 text", "iconv"),
        ("a.json", FRAME.set_axis(["x", "y"]).to_json(orient="index"), "by its index", "orient='records'"),
        ("a.xlsx", b"PK\x03\x04...", "a zip archive or a spreadsheet", ".csv"),
        ("a.jsonl", b"\x80\x04\x95", "a pickle", "Convert"),
        ("a.parquet", b"PAR1....", "not a readable Parquet", "incomplete"),
        ("a.parquet", LINES, "not a readable Parquet", "another type"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-9], "can't be unpacked", "incomplete"),
        ("a.jsonl", LINES.replace("}\n", "},\n"), "line 1: invalid JSON", "without a comma"),
        ("a.jsonl", LINES + '{"prompt": "e', "line 3: invalid JSON", "per line"),
        ("a.jsonl", LINES + '{"prompt": "e", "n": ' + "9" * 5000 + "}", "line 3: invalid JSON: Exceeds", "per line"),
        ("a.jsonl", LINES + '{"n": ' + "[" * 99_999, "line 3: invalid JSON: nested too deeply", "per line"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: .*'prompt' is given twice", "per line"),
        ("a.json", FRAME.to_json(), "a table by columns", "orient='records'"),
        ("a.json", FRAME.to_json(orient="split"), "a table by columns", "orient='records'"),
        ("a.json", FRAME.to_json(orient="index"), "by its index", "orient='records'"),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS}), "several splits, train, test", "?split=train"),
        ("a.txt", "a request\nanother", "invalid JSON", "?columns=prompt"),
        ("a.csv", '"first request"\n"second request"\n', "found `first request`", "?columns=prompt"),
        ("a.csv", '"Sort, please",x\n"Add, please",y\n', "found `Sort, please`", "?columns=prompt,completion"),
    ],
)
def test_what_is_no_file_of_rows_is_an_error_that_says_what_it_is(tmp_path, name, content, message, hint):
    with pytest.raises(StayalignedError, match=message) as caught:
        texts(save(tmp_path, name, content))
    assert name in caught.value.message
    assert hint in (caught.value.hint or "")
    assert "set_int_max_str_digits" not in str(caught.value)


@pytest.mark.parametrize("source", ["~nobody/a.jsonl", "x" * 5000, "a\x00b", "hub/name", "dir/"])
def test_a_source_that_is_no_path_is_a_missing_file(source):
    with pytest.raises(StayalignedError, match="no such file"):
        texts(source)


def test_a_folder_is_read_if_its_files_are_of_one_split(tmp_path):
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", ".git/x.json", "README.md"):
        save(tmp_path, f"one/{name}", LINES)
    save(tmp_path, "one/dataset_info.json", "{}")
    assert len(texts(tmp_path / "one")) == 4
    save(tmp_path, "one/data/test-00000-of-00001.jsonl", LINES)
    with pytest.raises(StayalignedError, match="several splits, test, train"):
        texts(tmp_path / "one")
    assert len(texts(f"{tmp_path / 'one'}?split=train")) == 4
    assert len(texts(f"{tmp_path / 'one'}?files=data/test*")) == 2
    with pytest.raises(StayalignedError, match="no split 'tset'"):
        texts(f"{tmp_path / 'one'}?split=tset")


def test_files_of_several_configurations_are_an_error_that_names_them(tmp_path):
    for name in ("main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl"):
        save(tmp_path, name, LINES)
    with pytest.raises(StayalignedError, match="several folders, main, socratic"):
        texts(f"{tmp_path}?split=train")
    assert len(texts(f"{tmp_path / 'main'}?split=train")) == 2
    assert len(texts(f"{tmp_path}?split=train&files=main/*")) == 2


def test_what_datasets_saved_is_read_without_a_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(ROWS)
    rows.select([1, 0]).save_to_disk(tmp_path / "rows")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    assert texts(tmp_path / "rows") == [("c", "d"), ("a", "b")]
    assert texts(f"{tmp_path / 'splits'}?split=test") == [("a", "b")]
    with pytest.raises(StayalignedError, match="several splits, test, train"):
        texts(tmp_path / "splits")
    next((tmp_path / "rows").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(StayalignedError, match="not a data set that `datasets` saved"):
        texts(tmp_path / "rows")
    assert not (tmp_path / "cache").exists()


def test_the_columns_option_is_refused_where_there_is_no_csv_file(tmp_path):
    with pytest.raises(StayalignedError, match="there is no CSV file"):
        texts(f"{save(tmp_path, 'a.jsonl', LINES)}?columns=prompt,completion")


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 99_999, "{", '{"a": 1, "a": 2}', b"\xff", "", "[1,]"])
def test_every_error_of_pythons_json_parser_is_one_error_with_its_place(text):
    with pytest.raises(StayalignedError, match=r"^config\.json: invalid JSON: ") as caught:
        parse_json(text, "config.json", hint="Write it again.")
    assert caught.value.hint == "Write it again."
