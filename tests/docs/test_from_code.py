"""The reference that the site makes from the code names every command, option, setting, component and public name."""

import importlib.util
import re
from pathlib import Path

import pytest
from typer.main import get_command

import stayaligned
from stayaligned.cli import app
from stayaligned.core.settings import ChatTemplate, Guard
from stayaligned.experiments.config.experiment import REGISTRIES, Experiment
from stayaligned.experiments.grid import Grid

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def from_code():
    spec = importlib.util.spec_from_file_location("from_code", DOCS / "_ext" / "from_code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(markdown, level):
    """The text below each heading of a level."""
    parts = re.split(rf"^{'#' * level} (.+)$", markdown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_option_of_every_command_is_described(from_code):
    written = sections(from_code.commands(), 2)
    for name, command in get_command(app).commands.items():
        for inner, each in getattr(command, "commands", {"": command}).items():
            text = written.pop(f"stayaligned {name} {inner}".strip())
            options = {option for parameter in each.params for option in parameter.opts if option.startswith("--")}
            assert {option for option in options if f"`{option}" not in text and f", {option}" not in text} == set()
    assert written == {}


def test_every_setting_is_described_with_its_default(from_code):
    written = sections(from_code.settings(), 2)
    for title, model in {
        "An experiment": Experiment,
        "A grid": Grid,
        "Guard": Guard,
        "ChatTemplate": ChatTemplate,
    }.items():
        assert re.findall(r"^`(\w+)`: ", written[title], flags=re.MULTILINE) == [*model.model_fields]
    assert "`tolerance`: number, at least 0.0, **required**" in written["Guard"]
    assert "`max_unscored`: number, at least 0, at most 1, default `0.1`" in written["An experiment"]


def test_every_component_is_described_with_its_settings(from_code):
    written = sections(from_code.components(), 3)
    for registry in REGISTRIES:
        noun = "prompt set" if registry.kind == "prompts" else registry.kind
        for name in registry.names():
            text = written[f"{name} ({noun})"]
            fields = re.findall(r"^`(\w+)`: ", text, flags=re.MULTILINE)
            assert fields == [*registry.get(name).model_fields]
            assert f"/{name}.py`" in text


def test_the_page_on_python_has_every_public_name_once():
    page = (DOCS / "reference" / "python-api.md").read_text()
    named = [
        name
        for line in re.findall(r"^<!-- from the code: names (.*) -->$", page, re.MULTILINE)
        for name in line.split()
    ]
    assert sorted(named) == sorted(stayaligned.__all__)


def test_a_page_with_an_unknown_marker_does_not_build(from_code):
    with pytest.raises(KeyError):
        from_code.replace_markers("<!-- from the code: zorb -->")


def test_plain_text_keeps_its_signs_as_markdown(from_code):
    assert from_code.escaped("a <b> *c* `d_e` f_g") == r"a \<b\> \*c\* `d_e` f\_g"
    assert from_code.markdown("One.\n\n    formula\n\nExample:\n    >>> 1") == (
        "One.\n\n```text\nformula\n```\n\nExample:\n\n```text\n>>> 1\n```"
    )


def test_an_example_in_a_docstring_becomes_code(from_code):
    lines = ["One.", "", "Example:", "    train()", "", "Two.", "", "    formula", ""]
    from_code.mark_code(lines)
    assert lines == ["One.", "", "Example::", "", "    train()", "", "Two.", "", "::", "", "    formula", ""]


def test_the_table_of_defenses_has_each_with_what_it_needs_and_costs(from_code):
    defenses = next(registry for registry in REGISTRIES if registry.kind == "defense")
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", from_code.defenses(), flags=re.MULTILINE))
    assert rows.keys() == {*defenses.names()}
    assert "`alignment_data`, `harmful_data`" in rows["data_filter"]
    assert rows["data_filter"].endswith("about a third of an epoch. ")
    assert "`base_model`" in rows["lox"]
    assert {*sections(from_code.defenses(), 2)} >= {"During fine-tuning", "After fine-tuning"}
