"""Configurations are YAML 1.2: words are words, numbers are numbers, and all else is one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stayaligned import StayalignedError
from stayaligned.experiments.config.yaml_file import dump_yaml, load_yaml, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("no", "yes", "on", "Off", "y", "3:9", "10:20", "1_000", "1e", "0b1", "2026-11-28")),
        *((word, word) for word in ("=", "1,000", "1.2.3", "inf", "NaN", "+", "<<")),
        *(("true", True), ("False", False), ("~", None), ("", None), ("Null", None)),
        *(("012", 12), ("0o17", 15), ("0x1F", 31), ("+3", 3), ("-5", -5), ("00", 0)),
        *(("1e-3", 1e-3), ("1E5", 1e5), ("1.0e-5", 1e-5), (".5", 0.5), ("1.", 1.0), ("-.inf", -float("inf"))),
        *(("'no'", "no"), ('"1e-3"', "1e-3"), ("[no, 1e-3]", ["no", 1e-3]), ("{a: on}", {"a": "on"})),
        *(("a #b", "a #b"), ("#b", "#b"), ("[", "["), ("!!int x", "!!int x"), ("!!binary aGk=", "!!binary aGk=")),
        *(("9" * 5000, "9" * 5000), ("[" * 5000, "[" * 5000)),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n\tb: 2", "Indent with spaces"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "key 'b' is given twice"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: !!python/object:x {}", "could not determine a constructor"),
        ("a: !!timestamp 2026-11-28", "could not determine a constructor"),
        ("a: &x [*x]", "not a plain configuration"),
        ("1: 2", "key 1 is not text; put it in quotes"),
        ("null: 2", "key None is not text"),
        ("a: 'x", "not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_one_error(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(StayalignedError) as error:
        load_yaml(tmp_path / "e.yaml")
    assert expected in str(error.value)
    assert "e.yaml" in error.value.message


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_bytes(b"\xef\xbb\xbfa: no\r\n")
    assert load_yaml(tmp_path / "e.yaml") == {"a": "no"}


@pytest.mark.parametrize(
    "value",
    ["no", "1e3", "012", "0o17", "10:20", "1_000", "a\nb", "~", "", "#x", "<<", "=", None, True, 1e-5, 3],
)
def test_written_yaml_is_read_back_unchanged(value: Any, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(dump_yaml({"a": [value]}), encoding="utf-8")
    assert load_yaml(tmp_path / "e.yaml") == {"a": [value]}
