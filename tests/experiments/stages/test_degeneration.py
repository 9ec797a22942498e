"""Degeneration in a run: every answer is looked at, and the stage is computed again alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.records import Completion, read_jsonl
from stayaligned.evaluation.degeneration import Degenerate, Degeneration, signs
from stayaligned.evaluation.results import Result, read_evidence, read_result
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.run import run_experiment
from support.world import experiment


def run(world: Path, out: Path, **settings: Any) -> Result:
    result = run_experiment(Experiment.model_validate(experiment(world, **settings)), out)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    run(world, out)
    return out


def answers(out: Path) -> list[Completion]:
    (path,) = out.glob("stages/generate-*/completions.jsonl")
    return read_jsonl(path, Completion)


def test_every_completion_is_checked_and_counted(finished: Path) -> None:
    result = read_result(finished / "result.json")
    expected = {(c.prompt_set, c.id): bool(signs(c.text, Degeneration())) for c in answers(finished)}
    assert {(e.prompt_set, e.id): e.degenerate for e in read_evidence(finished, result)} == expected
    metric = result.metric("degeneration")
    assert metric is not None
    assert (metric.n, metric.value) == (len(expected), pytest.approx(sum(expected.values()) / len(expected)))
    assert any(expected.values())
    assert len({prompt_set for prompt_set, _ in expected}) >= 3


def test_a_lost_stage_is_computed_again_to_the_same_bytes_and_nothing_else_is(finished: Path, world: Path) -> None:
    before = (finished / "result.json").read_bytes(), (finished / "evidence.jsonl").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in finished.glob("stages/*") if "degeneration" not in path.name}
    (stage,) = finished.glob("stages/degeneration-*")
    shutil.rmtree(stage)
    run(world, finished)
    assert ((finished / "result.json").read_bytes(), (finished / "evidence.jsonl").read_bytes()) == before
    assert stage.is_dir()
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_the_check_can_be_switched_off(world: Path, tmp_path: Path) -> None:
    result = run(world, tmp_path / "out", training=None, attack=None, degeneration=None)
    assert result.metric("degeneration") is None
    assert {e.degenerate for e in read_evidence(tmp_path / "out", result)} == {None}
    assert "degeneration" not in result.provenance.stages


def test_perplexity_is_measured_under_the_aligned_model_and_counts(world: Path, tmp_path: Path) -> None:
    from stayaligned.hf.generation.perplexity import answer_nats
    from stayaligned.hf.models import load_model, load_tokenizer

    result = run(world, tmp_path / "out", degeneration={"empty": False, "perplexity": 5.5})
    (path,) = tmp_path.glob("out/stages/degeneration-*/degeneration.jsonl")
    found = read_jsonl(path, Degenerate)
    completions = answers(tmp_path / "out")
    expected = answer_nats(load_model(world / "aligned"), load_tokenizer(world / "aligned"), completions)
    assert [row.nats for row in found] == [pytest.approx(nats, abs=1e-4) for nats in expected]
    for row in found:
        assert (row.nats is not None and row.nats > 5.5) == any("nats" in reason for reason in row.reasons)
    metric = result.metric("degeneration")
    assert metric is not None
    assert metric.value == pytest.approx(sum(bool(row.reasons) for row in found) / len(found))


def test_the_stage_depends_on_the_settings_and_on_the_model_only_with_perplexity(world: Path, tmp_path: Path) -> None:
    from stayaligned.experiments.plan import plan_experiment

    def key(**settings: Any) -> str:
        return plan_experiment(Experiment.model_validate(experiment(world, **settings))).degeneration

    assert key() == key(degeneration={})
    assert len({key(), key(degeneration={"min_characters": 41}), key(degeneration={"perplexity": 5.0})}) == 3
