"""A result that was edited, or can't be read, is one error that names the file; notes agree with what was counted."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Metric
from stayaligned.core.settings import Endpoint
from stayaligned.gate import Limits, decide, read_side
from support.runs import ComparedSide, evidence, identity, outcomes, prompt_hash, write_run


def run(place: Path, harm: int = 4, score: float = 1.0, seed: int = 0, **changes: Any) -> Path:
    from stayaligned.evaluation.results import JudgeReading

    rows = evidence({"keyword": outcomes(200, harm)}, task=[score] * 200)
    rows = [row.model_copy(update={"completion": prompt_hash(f"{seed} {i}")}) for i, row in enumerate(rows)]
    rates = (Metric(name="harmful_score", value=harm / 200, n=200, higher_is_better=False),)
    judges = (JudgeReading(judge="keyword", metrics=rates, identity=identity(0, {"name": "keyword"}, {})),)
    return write_run(place, rows, seed=seed, **({"judges": judges} | changes))


def edit_rows(place: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change the rows of a result, and the hash that the result has of them."""
    content = change((place / "evidence.jsonl").read_bytes())
    (place / "evidence.jsonl").write_bytes(content)
    result = json.loads((place / "result.json").read_text())
    result["evidence_sha256"] = hashlib.sha256(content).hexdigest()
    (place / "result.json").write_text(json.dumps(result))
    return place


def test_rows_that_contradict_the_rates_of_their_result_are_refused(tmp_path: Path) -> None:
    assert read_side("candidate", [run(tmp_path, 100)]).runs
    edited = edit_rows(tmp_path, lambda rows: rows.replace(b'"keyword":"harm"', b'"keyword":"refuse"'))
    with pytest.raises(StayalignedError, match=r"result\.json: harmful_score is 0\.5 .* give 0\.0 over 200"):
        read_side("candidate", [edited])


def test_rows_that_are_no_text_are_refused_by_the_name_of_their_file(tmp_path: Path) -> None:
    edited = edit_rows(run(tmp_path), lambda rows: rows + b"\xff\xfe")
    with pytest.raises(StayalignedError, match=r"evidence\.jsonl: .* not UTF-8"):
        read_side("candidate", [edited])


SETTINGS = {
    "generation": "text",
    "generation.endpoint": {"generation": {"endpoint": "text"}},
    "task": ["a", "list"],
    "skills": "text",
    "model": 1,
    "adapter": {"a": "mapping"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_another_type_are_refused_by_the_name_of_their_file(name: str, tmp_path: Path) -> None:
    settings = SETTINGS[name] if "." in name else {name: SETTINGS[name]}
    run(tmp_path, experiment=settings)
    with pytest.raises(StayalignedError, match=rf"result\.json: .*experiment\.{name}: expected"):
        read_side("candidate", [tmp_path])


@pytest.mark.parametrize("score", [2.0, -0.5])
def test_scores_off_the_scale_are_refused(score: float, tmp_path: Path) -> None:
    sides = read_side("baseline", [run(tmp_path / "a")]), read_side("candidate", [run(tmp_path / "b", score=score)])
    with pytest.raises(StayalignedError, match=r"b/evidence\.jsonl: task 'task-0': score .* is not between 0 and 1"):
        decide(*sides, Limits(max_utility_drop=0.5))


def test_a_path_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    run(tmp_path / "sound")
    for place in (tmp_path / "loop", tmp_path / ("a" * 300)):
        code, shown = command(
            "gate", "--baseline", tmp_path / "sound", "--candidate", place, "--max-harm", "5%", "--quiet"
        )
        assert code == 2
        assert f"error: {place}: " in shown.replace("\n", "")
        assert "edited" not in shown
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, shown = command("gate", "--baseline", tmp_path / "sound", "--candidate", "x", "--max-harm", "5%")
    assert (code, "edited" in shown) == (2, False)
    monkeypatch.chdir(tmp_path)


def test_no_note_says_that_copies_are_counted_each(tmp_path: Path) -> None:
    notes = (
        "150 of 200 harmful prompts repeat an earlier one: each is counted, so the interval is narrower",
        "another",
    )
    baseline, candidate = (read_side(r, [run(tmp_path / r, notes=notes)]) for r in ("baseline", "candidate"))
    found = decide(baseline, candidate, Limits(max_harm=0.5)).notes
    assert "candidate: another" in found
    assert not any("each is counted" in note for note in found)


@pytest.mark.parametrize(
    ("served", "noted"),
    [
        ([("http://a/v1", "m")] * 3, True),
        ([("http://a/v1", "m"), ("http://a/v1", "n"), ("http://a/v1", "o")], False),
    ],
    ids=["one model", "three models"],
)
def test_samples_of_one_served_model_are_named_so(served: list[tuple[str, str]], noted: bool, tmp_path: Path) -> None:
    def side(role: str) -> ComparedSide:
        endpoints = [Endpoint(base_url=url, model=model).model_dump() for url, model in served]
        return read_side(
            role,
            [
                run(tmp_path / f"{role}{seed}", seed=seed, experiment={"generation": {"endpoint": endpoint}})
                for seed, endpoint in enumerate(endpoints)
            ],
        )

    notes = decide(side("baseline"), side("candidate"), Limits(max_harm_increase=0.2)).notes
    assert any("samples of one model" in note for note in notes) == noted


def test_other_servers_in_one_side_are_another_recipe(tmp_path: Path) -> None:
    places = [
        run(tmp_path / name, seed=seed, experiment={"generation": {"endpoint": {"base_url": f"http://{name}/v1"}}})
        for seed, name in enumerate("ab")
    ]
    with pytest.raises(StayalignedError, match=r"differ in generation\.endpoint\.base_url"):
        read_side("baseline", places)
