"""The study of Lisa: its arms, its statistical tests, its grids, and the page for known numbers."""

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Metric
from stayaligned.evaluation.metrics import paired_difference
from stayaligned.evaluation.results import find_results
from stayaligned.experiments.grid import Grid, load_grid, run_grid
from support.world import experiment, write_world

ROOT = Path(__file__).parents[2]
GRIDS = sorted((ROOT / "studies").glob("lisa_study*.yaml"))

sys.path.insert(0, str(ROOT / "studies"))
study: Any = importlib.import_module("lisa_study")
work: Any = importlib.import_module("lisa_study_table")
sys.path.pop(0)

# ---- tests and corrections -----------------------------------------------------------------------------------------


@given(values=st.lists(st.integers(-100, 100), min_size=2, max_size=7))
def test_the_paired_test_is_the_t_test_or_the_sign_test_for_constant_differences(values: list[int]) -> None:
    found = paired_difference({i: v / 100 for i, v in enumerate(values)}, dict.fromkeys(range(len(values)), 0.0))
    if len(set(values)) > 1:
        expected = stats.ttest_1samp([v / 100 for v in values], 0.0).pvalue
        assert work.t_test(found) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    else:
        assert work.t_test(found) == found.p_value
    assert work.t_test(paired_difference({0: 1.0}, {0: 0.0})) == 1.0


# ---- the page ------------------------------------------------------------------------------------------------------


def reading(harm: float, accuracy: float) -> dict[str, dict[str, Metric]]:
    def metric(name: str, value: float) -> Metric:
        return Metric(name=name, value=min(1.0, max(0.0, value)), n=100, low=0.0, high=1.0, higher_is_better=False)

    return {
        part: {name: metric(name, value) for name, value in ((work.HARM, harm), (work.ACCURACY, accuracy))}
        for part in (work.WHOLE, "selection", "report")
    }


def study_of(arms: dict[Any, tuple[float, float]]) -> Any:
    rng = random.Random(1)
    noise = {(arm, seed): rng.uniform(-0.01, 0.01) for arm in arms for seed in range(5)}
    return work.Study(
        {
            arm: {seed: reading(harm + noise[arm, seed], accuracy - noise[arm, seed]) for seed in range(5)}
            for arm, (harm, accuracy) in arms.items()
        }
    )


def lisa(k1: int, k2: int, rho: float, *options: tuple[str, Any], **context: Any) -> Any:
    return work.Arm("Lisa", (k1, k2), rho, options, **context)


def row_of(text: str, *cells: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {' | '.join(cells)} |"))
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_the_page_compares_lisa_with_plain_fine_tuning_bso_and_the_matching_mixing() -> None:
    arms = {study.SFT: (0.9, 0.9), work.Arm("Mixing 10 %"): (0.5, 0.9)}
    arms |= {lisa(5, 45, rho): (0.9 - 0.2 * rho, 0.9) for rho in (0.0, 1.0, 2.0)}
    arms |= {lisa(25, 25, rho): (0.7 - 0.2 * rho, 0.9) for rho in (0.0, 1.0, 2.0)}
    arms |= {lisa(45, 5, rho): (0.5 - 0.2 * rho, 0.9) for rho in (0.0, 1.0, 2.0)}
    text = study.page(study_of(arms), 0.05)
    assert row_of(text, "Lisa 5:45 ρ=2", "SFT")[-1] == "less harm"
    assert row_of(text, "BSO 5:45", "SFT")[-1] == "nothing"
    assert row_of(text, "Lisa 5:45 ρ=1", "BSO")[-1] == "less harm"
    assert row_of(text, "Lisa 5:45 ρ=1", "Mixing 10 %")[-1] == "more harm"
    assert "Mixing 100 %" not in text, "was not run"
    assert row_of(text, "ρ at 5:45, 3 settings")[-1] == "less harm"
    assert row_of(text, "ρ at 5:45, 3 settings")[2].startswith("−20.")
    assert row_of(text, "K1 of 50 at ρ = 2, 3 settings")[2].startswith(("−19.", "−20."))
    assert "1000 steps" not in text


def test_the_page_tunes_every_method_in_the_same_way_and_reports_the_other_half() -> None:
    methods = [study.SFT, work.Arm("Mixing 10 %"), lisa(5, 45, 0.0), lisa(5, 45, 2.0)]
    arms: dict[Any, tuple[float, float]] = {}
    for place, method in enumerate(methods):
        for steps, rate in ((100, 1e-4), (100, 5e-4), (400, 1e-4), (400, 5e-4)):
            gentle = (steps == 100) + (rate == 1e-4)
            # The gentlest setting has least harm, and is the one that does not learn.
            arms[method._replace(steps=steps, rate=rate)] = (0.9 - 0.1 * place - 0.2 * gentle, (0.9, 0.9, 0.3)[gentle])
    found = study_of(arms)
    for arm, runs in found.runs.items():
        for run in runs.values():  # on this half the harshest setting looks best
            run["report"] = reading(0.11 if (arm.steps, arm.rate) == (400, 5e-4) else 0.77, 0.66)["report"]
    text = study.page(found, 0.05)
    for name in ("SFT", "Mixing 10 %", "BSO 5:45", "Lisa 5:45 ρ=2"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} | 5 | rate"))
        assert "rate 0.0001, 100" not in line
        assert "none within" not in line
        assert "77.0" in line
    assert row_of(text, "Lisa 5:45 ρ=2", "4")[-1].startswith(("<", "0.0"))


def test_unknown_directories_and_a_study_without_plain_fine_tuning_are_refused() -> None:
    with pytest.raises(StayalignedError, match="plain fine-tuning of 400 steps"):
        study.page(study_of({lisa(5, 45, 2.0): (0.5, 0.5)}), 0.05)
    with pytest.raises(StayalignedError, match="not an arm of this study: defenses safe_lora"):
        spec = {"training": {}, "attack": None, "task": {"train": "x-train.jsonl"}, "defenses": [{"name": "safe_lora"}]}
        work.arm_of(spec)


# ---- from a grid to the files --------------------------------------------------------------------------------------

ARMS: list[dict[str, Any]] = [
    {"label": "aligned", "training": None},
    {"label": "sft"},
    {"label": "mixed", "defenses": [{"name": "mixing", "alignment_ratio": 0.5}]},
    {"label": "bso", "defenses": [{"name": "bso", "alignment_steps": 1, "finetuning_steps": 1}]},
    {"label": "lisa", "defenses": [{"name": "lisa", "alignment_steps": 1, "finetuning_steps": 1, "rho": 2}]},
]


@pytest.mark.slow
def test_a_finished_grid_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = experiment(write_world(tmp_path / "world"))
    spec["training"] |= {"max_steps": 2}
    spec["attack"]["poison_ratio"] = 0.1
    run_grid(Grid(base=spec, axes={"seed": [0, 1], "arm": ARMS}), tmp_path / "grid", workers=1)
    found = work.read_study([tmp_path / "grid"])
    assert [arm.name for arm in found.runs] == ["Aligned", "SFT", "Mixing 50 %", "BSO 1:1", "Lisa 1:1 ρ=2"]
    whole = {(r.arm, r.seed): r.metric("harmful_score") for r in find_results([tmp_path / "grid"])}
    for label, (arm, runs) in zip((a["label"] for a in ARMS), found.runs.items(), strict=True):
        assert set(runs) == {0, 1}
        assert found.metrics(arm, work.HARM) == {seed: whole[label, seed] for seed in (0, 1)}
    # The world's rows, steps and rate take the place of the testbed's.
    (sft,) = found.arms(lambda arm: arm.method == "SFT")
    monkeypatch.setattr(study, "SFT", sft)
    assert work.read_study([tmp_path / "grid"] * 2).runs == found.runs, "equal numbers may stand twice"
    monkeypatch.setattr("sys.argv", ["lisa_study.py", str(tmp_path / "grid"), "--out", str(tmp_path / "out")])
    study.main()
    assert "wrote" in capsys.readouterr().out
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert content.keys() == {f"lisa-study.{ending}" for ending in ("md", "svg", "csv")}
    assert content["lisa-study.csv"].decode().count("\n") == 1 + sum(
        len(set(study.METRICS) & set(runs[0][work.WHOLE])) for runs in found.runs.values()
    )
    study.main()
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_numbers_that_differ_between_directories_are_refused(tmp_path: Path) -> None:
    spec = experiment(write_world(tmp_path / "world"))
    spec["training"] |= {"max_steps": 1}
    grid = Grid(base=spec, axes={"seed": [0]})
    for name in ("one", "other"):
        run_grid(grid, tmp_path / name, workers=1)
    work.read_study([tmp_path / "one", tmp_path / "other"])
    (result,) = (tmp_path / "other").glob("runs/*/result.json")
    changed = find_results([tmp_path / "other"])[0]
    accuracy = changed.scores[0].model_copy(update={"value": 0.123})
    result.write_text(changed.model_copy(update={"scores": (accuracy, *changed.scores[1:])}).model_dump_json())
    with pytest.raises(StayalignedError, match="is in another directory with other numbers"):
        work.read_study([tmp_path / "one", tmp_path / "other"])


# ---- the grids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_arm_of_a_grid_is_distinct_and_ends_on_a_whole_cycle(path: Path) -> None:
    found: dict[Any, str] = {}
    for one in load_grid(path, ["axes.seed=[300]"]).expand(path.name):
        arm = work.arm_of(one.spec())
        assert arm not in found, (one.arm, found[arm])
        found[arm] = one.arm
        if arm.allocation is not None:
            assert arm.steps % sum(arm.allocation) == 0
        if arm.method != "Aligned":
            assert one.training is not None
            assert one.training["warmup_steps"] * 10 == arm.steps


def test_every_mixing_that_an_allocation_is_compared_with_was_run() -> None:
    main = load_grid(ROOT / "studies" / "lisa_study.yaml", ["axes.seed=[300]"]).expand("lisa_study.yaml")
    arms = [work.arm_of(one.spec()) for one in main]
    assert {arm.method for arm in arms} >= set(study.MIXED_LIKE.values())
    for split, method in study.MIXED_LIKE.items():
        percent = float(method.split()[1])
        assert split[0] / sum(split) == pytest.approx(percent / (100 + percent), rel=0.12)
