"""Commands that must answer at once import no torch, and `import stayaligned` imports none of its modules."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.runs import evidence, outcomes, write_run

ROOT = Path(__file__).parents[2]

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "matplotlib", "scipy", "pandas")
PROGRAM = """
import sys
from stayaligned.cli import main
sys.argv = ["stayaligned", *{arguments!r}]
try:
    main()
except SystemExit as ended:
    assert ended.code in (0, None), ended.code
found = sorted(set({heavy!r}) & set(sys.modules))
assert not found, found
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["curvature", "--help"],
        ["gate", "--help"],
        ["power", "--help"],
        ["evaluate", "--help"],
        ["judge", "--help"],
        ["align", "--help"],
        ["list"],
        ["show", "defense", "lisa"],
        ["validate", "examples/testbed.yaml"],
        ["validate", "examples/llama-2-7b-align.yaml"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    program = PROGRAM.format(arguments=arguments, heavy=HEAVY)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr


def test_importing_the_package_imports_none_of_its_modules() -> None:
    program = (
        "import sys, stayaligned; assert [m for m in sys.modules if m.startswith('stayaligned')] == ['stayaligned']"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_torch_gate_decides_and_another_command_says_what_is_missing(tmp_path: Path) -> None:
    for name, harmful in (("before", 8), ("after", 90)):
        write_run(tmp_path / name, evidence({"keyword": outcomes(400, harmful)}), arm=name)
    program = "import sys; sys.modules['torch'] = None; from stayaligned.cli import main; main()"

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-c", program, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        return ended.returncode, ended.stdout + ended.stderr

    code, shown = run("gate", "--baseline", "before", "--candidate", "after", "--max-harm-increase", "5%")
    assert (code, "FAIL" in shown) == (1, True), shown
    code, shown = run("env")
    assert (code, shown.splitlines()[:2]) == (
        2,
        ["error: not installed: torch, which this command needs", "hint: pip install torch"],
    )


def test_the_page_on_installing_names_the_dependencies_of_an_installation_without_torch() -> None:
    page = (ROOT / "docs" / "howto" / "install.md").read_text()
    (named,) = re.findall(r"^ {4}pip install --no-deps \.\n {4}pip install (.*)$", page, flags=re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [re.split(r"[<>=]", each)[0] for each in project["dependencies"]]
    assert sorted([*named.split(), "torch"]) == sorted(needed)
