"""The example workflow is valid YAML, its commands parse, and it shows the decision whatever the gate returns."""

import re
import shlex
from pathlib import Path

import yaml
from typer.main import get_command

from stayaligned.cli import app

WORKFLOW = Path(__file__).parents[2] / "examples" / "github-action" / "safety-gate.yml"


def steps() -> list[dict]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]["gate"]["steps"]


def commands() -> list[list[str]]:
    text = "\n".join(step.get("run", "") for step in steps())
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("stayaligned ")]


def test_every_command_parses_with_the_commands_own_parser() -> None:
    found = commands()
    assert [name for name, *_ in found] == ["evaluate", "evaluate", "gate"]
    for name, *arguments in found:
        command = get_command(app).commands[name]  # type: ignore[attr-defined]
        parsed = command.make_context(name, [*arguments]).params
        assert parsed["out_dir" if name == "evaluate" else "baseline"]


def test_both_models_are_evaluated_alike() -> None:
    def settings(arguments: list[str]) -> list[str]:
        text = re.sub(r"(?i)baseline|candidate", "SIDE", shlex.join(arguments))
        return shlex.split(text)

    first, second, gate = commands()
    assert settings(first) == settings(second)
    for side, made in (("--baseline", first), ("--candidate", second)):
        assert gate[gate.index(side) + 1] == made[made.index("--out") + 1]


def test_no_step_hides_the_exit_code_and_the_decision_is_always_shown() -> None:
    by_name = {step.get("name"): step for step in steps()}
    assert "continue-on-error" not in by_name["Gate"]
    assert "||" not in by_name["Gate"]["run"]
    written = set(re.findall(r"--(?:json|junit|markdown) (\S+)", by_name["Gate"]["run"]))
    assert len(written) == 3
    for name in ("Show the decision", "Keep the evidence"):
        assert by_name[name]["if"] == "always()"
    assert "out/gate.md" in by_name["Show the decision"]["run"]
    assert written <= set(by_name["Keep the evidence"]["with"]["path"].split())
