"""Commands that must answer at once import no torch, and `import stayaligned` imports none of its modules."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert ended.returncode == 0, ended.stderr


def test_importing_the_package_imports_none_of_its_modules() -> None:
    program = (
        "import sys, stayaligned; assert [m for m in sys.modules if m.startswith('stayaligned')] == ['stayaligned']"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
