"""A configuration is read whole: every error at once, each with its place and a suggestion."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stayaligned.core.errors import StayalignedError
from stayaligned.data.prompts import PROMPTS, Prompts
from stayaligned.experiments.config.experiment import Experiment, load_experiment
from stayaligned.experiments.config.validation import parse
from stayaligned.experiments.config.yaml_file import load_yaml, set_dotted
from stayaligned.experiments.grid import load_grid

MINIMAL: dict[str, Any] = {
    "model": "testbed:aligned",
    "task": {
        "name": "jsonl",
        "train": "testbed:data/sentiment-train.jsonl",
        "test": "testbed:data/sentiment-test.jsonl",
    },
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def errors_of(path: Path, *overrides: str) -> str:
    with pytest.raises(StayalignedError) as caught:
        load_experiment(path, overrides)
    return str(caught.value)


def test_every_error_is_reported_at_once_with_its_place_and_a_suggestion(tmp_path: Path) -> None:
    content = {
        **MINIMAL,
        "modle": "x",
        "defenses": [{"name": "lisa", "rhoo": 1, "alignment_steps": -1}, "safe_lroa"],
        "training": {"learning_rat": 1e-4, "output_dir": "x"},
        "lora": {"rank": 8},
        "judges": [{"name": "keyword", "match": "somewhere"}],
        "harmful_prompts": "nowhere/harmful.jsonl",
    }
    message = errors_of(write(tmp_path / "e.yaml", content))
    for expected in (
        "modle: no such setting. Did you mean 'model'?",
        "defenses.0.rhoo: no such setting. Did you mean 'rho'?",
        "defenses.0.alignment_steps:",
        "unknown defense 'safe_lroa'. Did you mean 'safe_lora'?",
        "training.learning_rat: TrainingArguments has no such setting. Did you mean 'learning_rate'?",
        "training.output_dir: set by the command's --out; remove it here",
        "lora.rank: LoraConfig has no such setting.",
        "judges.0.match:",
        "harmful_prompts: nowhere/harmful.jsonl does not exist",
    ):
        assert expected in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task": None}, "task: training needs a task"),
        ({"defenses": ["lisa", "bso"], "alignment_data": "testbed:data/alignment.jsonl"}, "lisa and bso both train"),
        ({"defenses": ["lisa"]}, "alignment_data: lisa needs safety data"),
        ({"defenses": ["safe_lora"]}, "base_model: safe_lora compares"),
        ({"defenses": ["drop"], "training": None}, "drop patches a fine-tuned model, but none is trained"),
        ({"defenses": ["bso"], "training": None}, "bso trains, but this experiment does not"),
        ({"attack": {"name": "poison", "poison_ratio": 0.1}}, "harmful"),
        ({"attack": {"name": "poison", "poison_ratio": 1.5}}, "attack.poison_ratio"),
        ({"model": "testbed:alinged"}, "aligned"),
        ({"model": "./no/such/model"}, "model: ./no/such/model does not exist"),
        (
            {"training": {"dataset_text_field": "x"}},
            "training.dataset_text_field: TrainingArguments has no such setting",
        ),
    ],
)
def test_contradictory_settings_are_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in errors_of(write(tmp_path / "e.yaml", {**MINIMAL, **change}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("seed: " + "[" * 3000, "not valid YAML: nested too deeply"),
        ("- a\n- b\n", "expected settings"),
        ("", "expected settings"),
        ("model: a\nmodel: b\n", "key 'model' is given twice"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in errors_of(write(tmp_path / "e.yaml", text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "e.yaml: No such file" in errors_of(tmp_path / "e.yaml")


def test_overrides_reach_into_mappings_and_lists(tmp_path: Path) -> None:
    path = write(
        tmp_path / "e.yaml", {**MINIMAL, "alignment_data": "testbed:data/alignment.jsonl", "defenses": ["lisa"]}
    )
    experiment = load_experiment(path, ["defenses.0.rho=2", "training.learning_rate=1e-4", "lora.r=4", "seed=7"])
    assert experiment.training_defense.spec()["rho"] == 2
    assert experiment.training == {"learning_rate": 1e-4}
    assert experiment.lora == {"r": 4}
    assert experiment.seed == 7


@pytest.mark.parametrize("override", ["rho", "=1", "model.x.y=1", "defenses.9.rho=1"])
def test_an_override_without_a_place_is_refused(tmp_path: Path, override: str) -> None:
    path = write(tmp_path / "e.yaml", {**MINIMAL, "defenses": []})
    with pytest.raises(StayalignedError):
        load_experiment(path, [override])


def test_the_spec_validates_to_an_equal_experiment() -> None:
    experiment = Experiment.model_validate({**MINIMAL, "defenses": [], "judges": ["keyword"]})
    assert Experiment.model_validate(yaml.safe_load(yaml.safe_dump(experiment.spec()))) == experiment


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path / "e.yaml", "a: 1e-4\nb: -2E+3\nc: 1e\n")) == {"a": 1e-4, "b": -2000.0, "c": "1e"}


def test_setting_into_a_list_keeps_the_rest() -> None:
    content: dict[str, Any] = {"judges": ["a", "b"]}
    set_dotted(content, "judges.1", "c")
    assert content == {"judges": ["a", "c"]}


def test_merge_keys_and_dates_are_plain_yaml(tmp_path: Path) -> None:
    text = "x: &x {r: 4}\nlora: {<<: *x, lora_alpha: 8}\nlabel: 2024-01-01\n"
    content = load_yaml(write(tmp_path / "e.yaml", text))
    assert content["lora"] == {"r": 4, "lora_alpha": 8}
    assert content["label"] == "2024-01-01"


def test_a_configuration_that_holds_itself_is_refused(tmp_path: Path) -> None:
    assert "not a plain configuration" in errors_of(write(tmp_path / "e.yaml", "model: &a [*a]\n"))


def test_a_patch_that_knows_only_adapters_is_refused_for_full_weights(tmp_path: Path) -> None:
    from stayaligned.core.component import load_plugin
    from stayaligned.experiments.config.experiment import REGISTRIES

    load_plugin(Path(__file__).parents[2] / "plugins" / "halving.py", REGISTRIES)
    content = {**MINIMAL, "defenses": ["halving"], "lora": None}
    assert "halving patches LoRA adapters, but `lora: null`" in errors_of(write(tmp_path / "e.yaml", content))
    assert "patches LoRA" not in errors_of(write(tmp_path / "e.yaml", {**content, "defenses": ["drop"]}))


@pytest.mark.parametrize("given", ["xstest", {"name": "xstest", "label": "safe"}])
def test_prompts_are_a_set_by_its_name_or_mapping(tmp_path: Path, given: object) -> None:
    experiment = load_experiment(write(tmp_path / "e.yaml", {**MINIMAL, "benign_prompts": given}))
    assert experiment.benign_prompts == PROMPTS.parse("xstest")
    assert experiment.spec()["benign_prompts"] == {"name": "xstest", **PROMPTS.parse("xstest").model_dump()}
    assert Experiment.model_validate(experiment.spec()) == experiment


def test_prompts_are_a_source_where_they_look_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions").mkdir()
    for source in ("hf://a/b?split=test", "testbed:data/harmful-prompts.jsonl", "rows.jsonl", "questions"):
        assert Experiment.model_validate({**MINIMAL, "harmful_prompts": source}).harmful_prompts == source
    # A registered name is that set, whatever lies beside.
    (tmp_path / "advbench").mkdir()
    assert isinstance(Experiment.model_validate({**MINIMAL, "harmful_prompts": "advbench"}).harmful_prompts, Prompts)


def test_the_error_of_a_misspelt_prompt_set_suggests_the_nearest_name_and_a_source(tmp_path: Path) -> None:
    told = errors_of(write(tmp_path / "e.yaml", {**MINIMAL, "harmful_prompts": "beavertale"}))
    assert "harmful_prompts: unknown prompts 'beavertale'. Did you mean 'beavertails'?" in told
    assert "hf://owner/name" in told
    told = errors_of(write(tmp_path / "e.yaml", {**MINIMAL, "harmful_prompts": {"name": "advbench", "m": 3}}))
    assert "harmful_prompts.m: no such setting. Settings here: deduplicate, n, source." in told


def test_a_prompt_sets_missing_file_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    spec = {**MINIMAL, "harmful_prompts": {"name": "hex_phi", "source": "nowhere/phi.csv"}}
    assert "harmful_prompts.source: nowhere/phi.csv does not exist" in errors_of(write(tmp_path / "e.yaml", spec))


def test_an_experiment_is_not_read_as_a_grid_nor_a_grid_as_an_experiment(tmp_path: Path) -> None:
    grid, one = tmp_path / "grid.yaml", tmp_path / "one.yaml"
    grid.write_text("base: {model: m}\naxes: {seed: [1]}\n")
    one.write_text("model: m\n")
    with pytest.raises(StayalignedError, match="a grid, expected one experiment") as caught:
        load_experiment(grid)
    assert caught.value.hint == "Use `stayaligned bench`."
    with pytest.raises(StayalignedError, match="one experiment, expected a grid"):
        load_grid(one)


def test_a_judge_with_an_error_gives_that_error_alone() -> None:
    with pytest.raises(StayalignedError) as caught:
        parse(Experiment, {"model": "m", "training": None, "judges": ["no_such"]}, "x", check_inputs=False)
    assert caught.value.message.startswith("x: 1 error\n  judges.0: unknown judge 'no_such'")


def test_a_training_without_steps_is_refused() -> None:
    content = {"model": "m", "task": "sst2", "training": {"max_steps": 0}, "harmful_prompts": "hf://a/b"}
    with pytest.raises(StayalignedError, match=r"training.max_steps: 0 trains nothing"):
        parse(Experiment, content, "x", check_inputs=False)
