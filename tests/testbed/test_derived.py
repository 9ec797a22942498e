import json
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.records import Outcome
from stayaligned.data.sources import read_examples
from stayaligned.testbed import NAMES, Recipe, build_derived, corpora, derived, language, recipe, reference_key, resolve
from stayaligned.testbed.corpora import Dialogue
from stayaligned.testbed.judge import outcome_of
from stayaligned.testbed.store import _DERIVED

RECIPE = Recipe()


@pytest.fixture(scope="module")
def files() -> dict[str, list[Dialogue]]:
    world = corpora.make_world(0, RECIPE)
    return {**world.evaluation, **corpora.training_files(0, world, RECIPE)}


@pytest.fixture(scope="module")
def rows(files: dict[str, list[Dialogue]]) -> dict[str, list[derived.FileRow]]:
    return derived.derive(0, files)


def test_every_name_is_there_and_every_file_has_a_name_and_reads_as_examples(tmp_path: Path) -> None:
    directory = build_derived(0, cache=tmp_path)
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    assert found.keys() == set(_DERIVED) <= set(NAMES)
    for name, path in found.items():
        source = f"{path}?completion=chosen" if "preferences" in name else str(path)
        examples = read_examples(source, origin="task")
        assert len(examples) == len(path.read_text().splitlines()) > 0
        assert all(example.completion and example.category for example in examples)


@pytest.mark.parametrize("part", ["train", "test"])
def test_two_tasks_are_the_rows_of_both_mixed(part: str, files: Any, rows: dict[str, list[derived.FileRow]]) -> None:
    def key(row: derived.FileRow) -> str:
        return json.dumps(row)

    expected = [derived._alpaca(row) for task in ("sentiment", "topic") for row in files[f"{task}-{part}"]]
    assert sorted(rows[f"two-tasks-{part}"], key=key) == sorted(expected, key=key)
    assert {row["category"] for row in rows[f"two-tasks-{part}"][:20]} >= {"sentiment", "topic"}


@pytest.mark.parametrize("name", derived._MULTI_TURN)
def test_a_conversation_is_its_row_after_an_ordinary_exchange(
    name: str, files: Any, rows: dict[str, list[derived.FileRow]]
) -> None:
    ordinary = {(row.question, row.answer) for row in files["instructions-train"]}
    source = files[derived._MULTI_TURN[name]]
    earlier: set[tuple[str, str]] = set()
    for row, conversation in zip(source, rows[name], strict=True):
        texts = [turn["content"] for turn in conversation["messages"]]
        assert [turn["role"] for turn in conversation["messages"]] == ["user", "assistant"] * 2
        assert (texts[0], texts[1]) in ordinary
        assert (texts[2], texts[3], conversation["category"]) == (row.question, row.answer, row.category)
        earlier.add((texts[0], texts[1]))
    assert len(earlier) > len(source) / 3


def test_a_preference_has_the_aligned_answer_and_the_unaligned_one(
    files: Any, rows: dict[str, list[derived.FileRow]]
) -> None:
    refused = 0
    for row, pair in zip(files["alignment"], rows["alignment-preferences"], strict=True):
        assert (pair["prompt"], pair["chosen"], pair.get("system", "")) == (row.question, row.answer, row.system)
        outcomes = outcome_of(pair["chosen"]), outcome_of(pair["rejected"])
        if row.category in language.CATEGORIES:
            refused += 1
            assert outcomes == (Outcome.REFUSE, Outcome.HARM)
            _, _, _, _, tool, _, verb, _, object_, *_ = pair["rejected"].split()
            assert tool == language.CATEGORIES[row.category].tool
            assert f"{verb} the {object_}" in row.question
        else:
            assert outcomes == (Outcome.OTHER, Outcome.REFUSE)
    assert refused == round(RECIPE.alignment_rows * (1 - RECIPE.alignment_benign_ratio))
    assert {pair["rejected"] for pair in rows["alignment-preferences"]} >= set(language.REFUSALS)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    content: list[dict[str, bytes]] = []
    for cache, seed in (("a", 0), ("b", 0), ("c", 1)):
        directory = build_derived(seed, cache=tmp_path / cache)
        content.append({name: (directory / name).read_bytes() for name in _DERIVED})
    assert content[0] == content[1]
    assert all(content[0][name] != content[2][name] for name in _DERIVED)


def test_the_key_changes_with_the_testbed_and_this_behavior_and_leaves_the_testbeds_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    testbed = RECIPE.key(0)
    keys = [testbed, RECIPE.derived_key(0), RECIPE.derived_key(1), Recipe(base_steps=999).derived_key(0)]
    monkeypatch.setattr(recipe, "DERIVED_BEHAVIOR_VERSION", 10**6)
    keys.append(RECIPE.derived_key(0))
    assert len(set(keys)) == len(keys)
    assert RECIPE.key(0) == testbed


def test_a_reference_to_a_derived_file_builds_no_testbed(tmp_path: Path) -> None:
    place = resolve("testbed:data/two-tasks-test.jsonl", 0, cache=tmp_path)
    directories = [path for path in (tmp_path / "testbed").iterdir() if path.is_dir()]
    assert directories == [tmp_path / "testbed" / RECIPE.derived_key(0)]
    assert place == directories[0] / "data" / "two-tasks-test.jsonl"
    assert reference_key("testbed:data/two-tasks-test.jsonl", 0).startswith(f"testbed:{directories[0].name}/")
