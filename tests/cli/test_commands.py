"""The command itself: summaries, help, version, completion, and options that are derived from settings classes."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.main import get_command

from stayaligned.cli import _COMMANDS, app
from stayaligned.cli.console import out
from stayaligned.core.settings import CurvatureSettings
from stayaligned.defenses import DEFENSES
from stayaligned.experiments.config.experiment import REGISTRIES
from stayaligned.gate import Limits

Command = Callable[..., tuple[int, str]]
COMPONENTS = [(registry.kind, name) for registry in REGISTRIES for name in registry.names()]


@pytest.mark.parametrize("name", _COMMANDS)
def test_a_summary_fits_the_help_and_begins_the_commands_own_help(name: str, command: Command) -> None:
    summary = _COMMANDS[name].summary
    assert len(summary) <= 45
    code, shown = command("--help")
    assert (code, any(line.split() == [name, *summary.split()] for line in shown.splitlines())) == (0, True)
    for flag in ("-h", "--help"):
        code, shown = command(name, flag)
        assert (code, shown.splitlines()[2].strip()) == (0, f"{summary}.")


def test_summaries_of_sub_commands_are_not_cut(command: Command) -> None:
    code, shown = command("subspace", "--help")
    assert (code, "..." in shown.partition("Commands:")[2]) == (0, False)


def test_every_option_of_every_command_has_a_help_text() -> None:
    for name, one in get_command(app).commands.items():  # type: ignore[attr-defined]
        for each in getattr(one, "commands", {name: one}).values():
            undocumented = [p.name for p in each.params if not p.help]
            assert not undocumented, f"{name}: {undocumented}"


def test_the_version_is_printed(command: Command) -> None:
    code, shown = command("--version")
    assert (code, shown.startswith("stayaligned ")) == (0, True)


def test_a_misspelt_command_is_corrected(command: Command) -> None:
    code, shown = command("evalaute")
    assert (code, "Did you mean 'evaluate'" in shown) == (2, True)


@pytest.mark.parametrize("model", [Limits, CurvatureSettings])
def test_a_commands_options_are_the_fields_of_its_settings(model: type) -> None:
    name = {"Limits": "gate", "CurvatureSettings": "curvature"}[model.__name__]
    options = {p.name: p for p in get_command(app).commands[name].params}  # type: ignore[attr-defined]
    for field, info in model.model_fields.items():  # type: ignore[attr-defined]
        assert options[field].default == info.default
        assert options[field].opts == [f"--{field.replace('_', '-')}"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("stayaligned ev", {"evaluate"}),
        ("stayaligned show de", {"defense"}),
        ("stayaligned show defense li", {"lisa"}),
        ("stayaligned show judge key", {"keyword"}),
        ("stayaligned show nonsense x", set()),
    ],
)
def test_a_shell_completes_commands_nouns_and_components(words: str, expected: set[str]) -> None:
    asked = {
        "_STAYALIGNED_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    program = "import sys; sys.argv = ['stayaligned']; from stayaligned.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert set(ended.stdout.split()) == expected, ended.stderr


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_show_prints_type_default_and_meaning_of_every_setting(kind: str, name: str, command: Command) -> None:
    component = next(r for r in REGISTRIES if r.kind == kind).get(name)
    code, shown = command("show", kind, name)
    assert code == 0, shown
    lines = shown.splitlines()
    for field in component.model_fields:
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"  {field}: ")]
        assert "required" in lines[place] or "default" in lines[place]
        assert lines[place + 1].startswith("      "), f"{field} has no docstring"


def test_show_prints_on_a_terminal_that_knows_ascii_only() -> None:
    program = (
        "import sys; sys.argv = ['stayaligned', 'show', 'defense', 'lisa']; from stayaligned.cli import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii()


def test_the_list_groups_defenses_by_stage_and_gives_each_method_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out, "_width", 100)
    code, shown = command("list", "defense")
    assert code == 0
    during, after, controls = (
        shown.index(f"DEFENSES: {name}") for name in ("DURING FINE-TUNING", "AFTER FINE-TUNING", "CONTROLS")
    )
    place = {name: shown.index(f"\n{name} ") for name in ("lisa", "mixing", "safe_lora", "drop", "shrink")}
    assert during < place["lisa"] < place["mixing"] < after < place["safe_lora"] < controls < place["drop"]
    lines = [line.rstrip() for line in shown.splitlines()]
    assert all(len(line) <= 100 for line in lines)
    assert all(any(line.startswith(f"{name} ") and line.endswith(".") for line in lines) for name in DEFENSES.names())


@pytest.mark.parametrize(("name", "needs"), [("lox", "base_model"), ("lisa", "alignment_data"), ("sft", "")])
def test_show_names_the_settings_of_an_experiment_that_a_defense_needs(name: str, needs: str, command: Command) -> None:
    _, shown = command("show", "defense", name)
    assert [line for line in shown.splitlines() if line.startswith("needs")] == ([f"needs  {needs}"] if needs else [])
