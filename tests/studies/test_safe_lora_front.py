"""The analysis of the front: halves, choices and areas; its grid; the adaptive attacker."""

import importlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from stayaligned.core.component import load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message, Metric
from stayaligned.defenses import ModelPair
from stayaligned.defenses.complement import Complement
from stayaligned.defenses.patching.directories import patch_directory
from stayaligned.evaluation.metrics import paired_difference
from stayaligned.evaluation.results import find_results
from stayaligned.experiments.config.experiment import REGISTRIES, Experiment
from stayaligned.experiments.grid import Grid, load_grid, run_grid
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.store import Store
from stayaligned.experiments.stages.train import train
from support.world import experiment, write_world

ROOT = Path(__file__).parents[2]
GRIDS = [ROOT / "studies" / f"safe_lora_front{which}.yaml" for which in ("", "_lora")]
ADAPTIVE = ROOT / "studies" / "safe_lora_adaptive.yaml"
ATTACKER = ROOT / "examples" / "plugins" / "adaptive_attacker.py"

sys.path.insert(0, str(ROOT / "studies"))
front: Any = importlib.import_module("safe_lora_front")
work: Any = importlib.import_module("safe_lora_front_table")
sys.path.pop(0)

shares = st.floats(0, 1)
points = st.lists(st.tuples(shares, shares), max_size=8)


# ---- halves, choices, areas ----------------------------------------------------------------------------------------


def completion(prompt_set: Any, name: str, reference: str = "") -> Completion:
    return Completion(
        id=name, prompt_set=prompt_set, prompt=(Message(role="user", content=name),), text="", reference=reference
    )


def test_halves_are_equal_keep_a_deed_together_and_do_not_depend_on_the_order() -> None:
    rows = [completion("harmful", f"h{i}", f"deed {i // 4}") for i in range(80)]
    rows += [completion("task", f"t{i}", "positive") for i in range(60)]
    found = work.halves(rows)
    assert Counter((place[0], half) for place, half in found.items()) == {
        **{("harmful", half): 40 for half in work.HALVES},
        **{("task", half): 30 for half in work.HALVES},
    }
    assert all(found["harmful", f"h{i}"] == found["harmful", f"h{i - i % 4}"] for i in range(80))
    shuffled = random.Random(0).sample(rows, len(rows))
    assert work.halves(shuffled) == found
    assert len({found["task", f"t{i}"] for i in range(8)}) == 2, "not by position"


@given(scan=st.dictionaries(st.integers(0, 9), st.tuples(shares, st.floats(-1, 1)), min_size=1), limit=shares)
def test_the_choice_has_the_least_harm_that_the_loss_allows(scan: dict[int, tuple[float, float]], limit: float) -> None:
    chosen, admissible = work.choose(scan, limit)
    allowed = {t for t, (_, loss) in scan.items() if loss <= limit + 1e-9}
    assert admissible == bool(allowed)
    if allowed:
        assert chosen in allowed
        assert all(scan[chosen][0] <= scan[other][0] for other in allowed)
    else:
        assert all(scan[chosen][1] <= loss for _, loss in scan.values())


def area_by_cutting(found: list[tuple[float, float]]) -> float:
    """The dominated area, summed over the rectangles between all coordinates."""
    xs, ys = (sorted({0.0, 1.0, *(point[axis] for point in found)}) for axis in (0, 1))
    return sum(
        (right - left) * (upper - lower)
        for left, right in pairwise(xs)
        for lower, upper in pairwise(ys)
        if any(accuracy >= right and harm <= lower for accuracy, harm in found)
    )


@given(found=points, more=st.tuples(shares, shares))
def test_the_area_equals_that_of_the_dominated_rectangles(
    found: list[tuple[float, float]], more: tuple[float, float]
) -> None:
    area = work.hypervolume(found)
    assert area == pytest.approx(area_by_cutting(found), abs=1e-9)
    assert work.hypervolume([*reversed(found), more]) >= area - 1e-12
    if work.covered(found, [more])[0]:
        assert work.hypervolume([*found, more]) == pytest.approx(area, abs=1e-8)


def test_two_differences_are_combined_into_one_finding() -> None:
    def difference(*values: float) -> Any:
        return paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))

    lower, higher, unclear = difference(-0.5, -0.4, -0.6), difference(0.5, 0.4, 0.6), difference(-0.5, 0.4, 0.1)
    assert work.verdict(lower, unclear) == "better"
    assert work.verdict(unclear, higher) == "better"
    assert work.verdict(lower, lower) == "less harm, less accuracy"
    assert work.verdict(higher, higher) == "more harm, more accuracy"
    assert work.verdict(higher, lower) == "worse"
    assert work.verdict(unclear, unclear) == "not distinguished"
    assert work.side_of_zero(difference(0.5)) == 0, "one seed shows nothing"
    assert work.side_of_zero(difference(*[0.0] * 6)) == 0
    assert work.side_of_zero(difference(*[-1.0] * 6)) == -1, "six equal differences: p = 0.03"
    assert work.side_of_zero(difference(*[-1.0] * 3)) == 0, "three: p = 0.25"


# ---- the page ------------------------------------------------------------------------------------------------------


def reading(harm: float, accuracy: float) -> dict[Any, dict[str, Metric]]:
    def metric(name: str, value: float) -> Metric:
        return Metric(name=name, value=value, n=100, low=0.0, high=1.0, higher_is_better=False)

    return {half: {n: metric(n, v) for n, v in ((work.HARM, harm), (work.ACCURACY, accuracy))} for half in work.HALVES}


def table_of(arms: dict[Any, tuple[float, float]], ratio: float = 0.1) -> Any:
    cell = work.Cell("full SFT", "tales", "LoRA on q, v")
    rng = random.Random(1)
    return work.Table(
        {
            (cell, ratio, treatment): {
                seed: reading(*(min(1.0, max(0.0, value + rng.uniform(-0.02, 0.02))) for value in values))
                for seed in range(6)
            }
            for treatment, values in arms.items()
        }
    )


K8 = work.Treatment("complement", "k=8")
HALF = work.Treatment(work.UNIFORM, "f=0.5")


@pytest.mark.parametrize(
    ("ours", "control", "said", "faults"),
    [
        ((0.1, 0.96), (0.9, 0.96), "above all", []),
        ((0.98, 0.5), (0.98, 0.5), "not distinguished: ", ["harm not shown lower", "accuracy", "no setting"]),
        ((0.9, 0.5), (0.1, 0.5), "below: ", ["accuracy", "no setting"]),
    ],
)
def test_the_page_states_what_the_numbers_show(
    ours: tuple[float, float], control: tuple[float, float], said: str, faults: list[str]
) -> None:
    arms = {work.UNTREATED: (0.98, 0.98), work.DROPPED: (0.02, 0.02), K8: ours, HALF: control}
    arms |= {K8.control_by(name): control for name in ("shrink", "random")}
    findings = front.Findings(table_of(arms), 0.05)
    (cell,) = findings.cells
    assert front.compare_with_controls(findings, cell, "complement").startswith(said)
    found = findings.list_faults(cell, "complement")
    assert len(found) == len(faults)
    assert all(fault.startswith(start) for fault, start in zip(found, faults, strict=True))
    text = front.page(table_of(arms), 0.05)
    assert f"uniform shrinking in {int(not faults)} of 1 cells" in text
    assert f"at its chosen setting in {int(not faults)}." in text
    assert f"| complement | k=8{' (none within the loss)' if faults else ''} |" in text
    assert "not run" not in text


def test_a_control_that_was_not_run_is_not_beaten() -> None:
    arms = {work.UNTREATED: (0.98, 0.98), work.DROPPED: (0.02, 0.02), K8: (0.1, 0.98), HALF: (0.9, 0.9)}
    findings = front.Findings(table_of(arms), 0.05)
    assert front.compare_with_controls(findings, findings.cells[0], "complement") == "not run: shrink, random"
    assert findings.list_faults(findings.cells[0], "complement") == []
    with pytest.raises(StayalignedError, match=r"no operator was run at poison ratio 0\.1"):
        front.page(table_of(arms, 0.2), 0.05)


# ---- from a grid to the files --------------------------------------------------------------------------------------

SAFE_LORA: dict[str, Any] = {"name": "safe_lora", "all_layers": True}
ARMS: list[dict[str, Any]] = [
    {"label": "untreated", "defenses": ["sft"]},
    {"label": "dropped", "defenses": [{"name": "drop", "like": SAFE_LORA}]},
    {"label": "C", "defenses": [SAFE_LORA]},
    {"label": "C shrink", "defenses": [{"name": "shrink", "like": SAFE_LORA}]},
    {"label": "half", "defenses": [{"name": "shrink", "factor": 0.5, "like": SAFE_LORA}]},
]


def tiny_grid(root: Path, **changes: Any) -> Grid:
    spec = experiment(write_world(root / "world"), **changes)
    spec["attack"]["poison_ratio"] = 0.1
    return Grid(base=spec, axes={"seed": [0, 1], "arm": ARMS})


@pytest.mark.slow
def test_a_finished_grid_becomes_a_page_a_figure_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_grid(tiny_grid(tmp_path), tmp_path / "grid", workers=1)
    table = work.read_table([tmp_path / "grid"])
    (cell,) = table.cells()
    assert cell == ("aligned", "test", "LoRA on q, v")
    assert [t for _, _, t in table.readings] == [
        *work.ENDS,
        work.Treatment("scaled_gram"),
        work.Treatment("scaled_gram", control="shrink"),
        HALF,
    ]
    whole = {(r.arm, r.seed): r.metric("finetune_accuracy") for r in find_results([tmp_path / "grid"])}
    for half in work.HALVES:
        parts = table.metrics((cell, 0.1, work.UNTREATED), work.ACCURACY, half)
        assert {seed: 2 * metric.n for seed, metric in parts.items()} == {
            seed: metric.n for (arm, seed), metric in whole.items() if arm == "untreated" and metric
        }
    with pytest.raises(StayalignedError, match="occurs twice"):
        work.read_table([tmp_path / "grid", tmp_path / "grid"])
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["safe_lora_front.py", str(tmp_path / "grid"), "--out", str(out)])
    front.main()
    assert "scaled_gram" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {f"safe-lora-front.{ending}" for ending in ("md", "svg", "csv")}
    assert len((out / "safe-lora-front.csv").read_text().splitlines()) == 1 + len(ARMS) * 2 * 3
    drawn = (out / "safe-lora-front.svg").read_bytes()
    front.main()
    assert (out / "safe-lora-front.svg").read_bytes() == drawn


def test_another_experiment_is_refused_by_its_defenses() -> None:
    with pytest.raises(StayalignedError, match="not an arm of this study: defenses lisa"):
        work.treatment_of([{"name": "lisa"}])
    with pytest.raises(StayalignedError, match=r"safe_lora \+ drop"):
        work.treatment_of([{"name": "safe_lora"}, {"name": "drop"}])


# ---- the grids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_grid_runs_every_control_where_settings_are_chosen_and_every_scan_elsewhere(path: Path) -> None:
    grid = load_grid(path, ["axes.seed=[200]", "axes.task=[{label: sentiment}]"])
    found: dict[Any, dict[float, set[Any]]] = {}
    for one in grid.expand(path.name):
        cell, ratio = work.cell_of(one.spec())
        treatment = work.treatment_of([d.spec() for d in one.defenses])
        arms = found.setdefault(cell, {}).setdefault(ratio, set())
        assert treatment not in arms, one.arm
        arms.add(treatment)
        assert f"p={ratio:g} " in one.arm
        assert treatment.control in one.arm
        assert treatment in work.ENDS or treatment.setting in one.arm
    assert [cell.target for cell in found] == ["LoRA on all linears", "LoRA on q, v", "full weights"]
    for by_ratio in found.values():
        assert set(by_ratio) == {0.0, 0.05, 0.1, 0.2}
        operators = {t for t in by_ratio[0.1] if not t.control and t not in work.ENDS and t.family != work.UNIFORM}
        assert {t.control_by(name) for t in operators for name in work.CONTROLS} <= by_ratio[0.1]
        twosided = {t.family for t in operators if "only" not in t.family}
        whole = by_ratio if path.stem == "safe_lora_front" else {0.1: by_ratio[0.1]}
        for arms in whole.values():
            assert {*work.ENDS} <= arms
            scans = {family: sum(t.family == family and not t.control for t in arms) for family in twosided}
            assert min(scans.values()) >= 2


@pytest.fixture
def attacker() -> Iterator[None]:
    before = [dict(registry._plugins) for registry in REGISTRIES]
    load_plugin(ATTACKER, REGISTRIES)
    yield
    for registry, plugins in zip(REGISTRIES, before, strict=True):
        registry._plugins.clear()
        registry._plugins.update(plugins)


def test_the_adaptive_grid_is_valid_with_its_plugin_only(request: pytest.FixtureRequest) -> None:
    with pytest.raises(StayalignedError, match="unknown defense 'projected_training'"):
        load_grid(ADAPTIVE).expand(ADAPTIVE.name)
    request.getfixturevalue("attacker")
    assert len(load_grid(ADAPTIVE).expand(ADAPTIVE.name)) == 25


def patched_and_before(root: Path, world: Path, defenses: list[Any], patch: Complement) -> list[dict[str, Any]]:
    training = {**experiment(world)["training"], "max_steps": 12, "learning_rate": 0.02}
    run = Context(Experiment.model_validate(experiment(world, training=training, defenses=defenses)), Store(root))
    before = train(run)
    assert before is not None
    patch_directory(before / "adapter", root / "patched", patch, ModelPair(world / "aligned", world / "base"))
    return [load_file(path / "adapter_model.safetensors") for path in (root / "patched", before / "adapter")]


@pytest.mark.slow
@pytest.mark.usefixtures("attacker")
@pytest.mark.parametrize("side", ["both", "left", "right"])
def test_the_complement_removes_nothing_from_an_adapter_trained_under_it(tmp_path: Path, side: Any) -> None:
    world, patch = write_world(tmp_path / "world"), Complement(rank=3, side=side)
    knowing = {"name": "projected_training", "base_model": str(world / "base"), "rank": 3, "side": side}
    patched, before = patched_and_before(tmp_path / "knowing", world, [knowing], patch)
    assert any(bool(tensor.abs().max() > 1e-2) for name, tensor in before.items() if "lora_B" in name), "it learned"
    for name, tensor in before.items():
        torch.testing.assert_close(patched[name], tensor, rtol=0, atol=1e-6)
    patched, before = patched_and_before(tmp_path / "unknowing", world, ["sft"], patch)
    assert any(bool((patched[name] - tensor).abs().max() > 1e-3) for name, tensor in before.items())


@pytest.mark.usefixtures("attacker")
def test_projected_training_of_full_weights_is_refused(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    knowing = {"name": "projected_training", "base_model": str(world / "base")}
    run = Context(Experiment.model_validate(experiment(world, lora=None, defenses=[knowing])), Store(tmp_path / "out"))
    with pytest.raises(StayalignedError, match="this experiment trains the full weights"):
        train(run)
