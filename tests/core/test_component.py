"""Components are frozen values that a registry finds by name; plug-ins are files."""

import random
from pathlib import Path

import pytest
import yaml

from stayaligned.cli.scaffold import NOUNS, write_plugin
from stayaligned.core.component import Registry, load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example, Message
from stayaligned.evaluation.judges import JUDGES, Judge
from stayaligned.experiments.config.experiment import REGISTRIES


def fresh_registries() -> list[Registry]:
    """The registries without components that other tests registered."""
    return [Registry(r.kind, r._package, *r._bases) for r in REGISTRIES]


def test_a_component_is_equal_to_the_one_parsed_from_its_yaml() -> None:
    judge = JUDGES.parse({"name": "keyword", "match": "start"})
    again = JUDGES.parse(yaml.safe_load(yaml.safe_dump(judge.spec())))
    assert again == judge
    assert hash(again) == hash(judge)


def test_an_unknown_name_suggests_the_nearest_name_and_lists_all() -> None:
    with pytest.raises(StayalignedError) as caught:
        JUDGES.get("keywrod")
    assert "'keyword'" in str(caught.value)
    assert all(name in str(caught.value) for name in JUDGES.names())


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_every_component_is_listed_and_documented_with_its_file(registry: Registry) -> None:
    names = registry.names()
    assert names
    for name in names:
        component = registry.get(name)
        assert component.name == name
        assert component.summary().endswith(".")
        assert f"{name}.py:" in registry.origin(name)
        for field in component.model_fields.values():
            assert field.annotation is not None


@pytest.mark.parametrize("noun", NOUNS)
def test_a_scaffolded_plugin_is_loaded_and_listed_and_cannot_replace_a_component(noun: str, tmp_path: Path) -> None:
    registries = fresh_registries()
    path = write_plugin(noun, f"my_{noun}", tmp_path)
    assert load_plugin(path, registries) == [f"{noun} my_{noun}"]
    registry = next(r for r in registries if r.kind == noun)
    assert f"my_{noun}" in registry.names()
    assert registry.parse(f"my_{noun}") == registry.parse({"name": f"my_{noun}"})
    taken = registry._own_names()[0]
    clash = write_plugin(noun, taken, tmp_path)
    with pytest.raises(StayalignedError, match="already defined"):
        load_plugin(clash, registries)


def test_a_scaffolded_attack_keeps_the_contract(tmp_path: Path) -> None:
    registries = fresh_registries()
    load_plugin(write_plugin("attack", "twice", tmp_path), registries)
    attack = next(r for r in registries if r.kind == "attack").parse("twice")
    rows = [Example(id=str(i), prompt=(Message(role="user", content=str(i)),)) for i in range(20)]
    poisoned = attack.poison(rows, random.Random(1))
    assert poisoned == attack.poison(rows, random.Random(1))
    assert len(poisoned) == 22


def test_a_scaffolded_judge_gives_a_verdict_per_completion(tmp_path: Path) -> None:
    registries = fresh_registries()
    load_plugin(write_plugin("judge", "one_word", tmp_path), registries)
    judge = next(r for r in registries if r.kind == "judge").parse("one_word")
    rows = [
        Completion(id=str(i), prompt_set="harmful", prompt=(), text=t) for i, t in enumerate(["I cannot", "ok", ""])
    ]
    assert [(v.id, v.outcome) for v in judge.judge(rows)] == [("0", "refuse"), ("1", "harm"), ("2", "other")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = ", "failed to import: SyntaxError"),
        ("x = 1\n", "defines no component"),
        ("raise ValueError('no')", "failed to import: ValueError: no"),
        ("raise SystemExit(0)", "failed to import: SystemExit: 0"),
        ("import zorb_beside", "directory is not on Python's path: set PYTHONPATH="),
    ],
)
def test_a_broken_plugin_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    (tmp_path / "zorb_beside.py").touch()
    with pytest.raises(StayalignedError) as raised:
        load_plugin(path, fresh_registries())
    assert message in str(raised.value)


def test_a_plugin_class_without_its_method_is_named(tmp_path: Path) -> None:
    path = tmp_path / "silent.py"
    path.write_text("from stayaligned import Judge\n\n\nclass Silent(Judge):\n    name = 'silent'\n")
    with pytest.raises(StayalignedError, match=r"silent.py: class Silent does not define judge$"):
        load_plugin(path, [JUDGES])


def test_a_missing_plugin_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="no such Python file"):
        load_plugin(tmp_path / "none.py", fresh_registries())


@pytest.mark.parametrize("name", ["My_Judge", "class", "a-b", "../x", ""])
def test_an_invalid_component_name_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(StayalignedError, match="cannot name"):
        write_plugin("judge", name, tmp_path)


def test_an_abstract_base_class_cannot_be_instantiated() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Judge()  # type: ignore[abstract]
