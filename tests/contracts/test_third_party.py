"""A third party's component of each noun runs through the command and in its worker processes."""

from pathlib import Path

import pytest
import yaml

from stayaligned.cli import main
from stayaligned.core.component import Registry
from stayaligned.evaluation.results import find_results
from stayaligned.experiments.config.experiment import REGISTRIES
from support.world import experiment, write_world

PLUGINS = sorted((Path(__file__).parents[1] / "plugins").glob("*.py"))


@pytest.fixture(autouse=True)
def forget_plugins() -> object:
    """Restore the registries after each test."""
    before = [dict(registry._plugins) for registry in REGISTRIES]
    for registry in REGISTRIES:
        registry._plugins.clear()
    yield
    for registry, plugins in zip(REGISTRIES, before, strict=True):
        registry._plugins.clear()
        registry._plugins.update(plugins)


def test_a_grid_of_third_party_components_runs_in_worker_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = write_world(tmp_path / "world")
    base = experiment(
        world,
        task="counting",
        attack={"name": "shouting", "share": 0.25},
        judges=["length", "keyword"],
        harmful_prompts={"name": "riddles", "n": 7},
        base_model=None,
        max_unscored=1.0,
    )
    arms = [{"label": "SFT"}, {"label": "Halved", "defenses": ["halving"]}]
    config = tmp_path / "grid.yaml"
    config.write_text(yaml.safe_dump({"base": base, "axes": {"arm": arms}}))
    options = [argument for path in PLUGINS for argument in ("--plugin", str(path))]
    monkeypatch.setattr("sys.argv", ["stayaligned", "bench", str(config), "--out", str(tmp_path / "out"), *options])
    try:
        main()
    except SystemExit as ended:
        assert ended.code in (0, None), capsys.readouterr()
    sft, halved = find_results([tmp_path / "out"])
    assert [reading.judge for reading in sft.judges] == ["length", "keyword"]
    assert [layer.shrinkage for layer in halved.patches[0].layers] == pytest.approx([0.5] * 4)
    harm = sft.metric("harmful_score")
    assert harm is not None
    assert harm.n + harm.n_unscored == 7
    accuracy = sft.metric("finetune_accuracy")
    assert accuracy is not None
    assert accuracy.n == 24


def test_without_its_plugin_a_component_is_unknown(tmp_path: Path) -> None:
    registry: Registry = next(r for r in REGISTRIES if r.kind == "judge")
    with pytest.raises(ValueError, match="unknown judge 'length'"):
        registry.parse("length")
