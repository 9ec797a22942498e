"""The layout of the package: few names at the top, small files, one class per name, and a removable `hf`."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from importlinter.api import read_configuration

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "stayaligned"
SOURCES = sorted(PACKAGE.glob("**/*.py"))
BUDGETED = [
    *SOURCES,
    *(path for name in ("benchmarks", "studies", "examples") for path in (ROOT / name).glob("**/*.py")),
]
MAX_TOP_LEVEL_NAMES, MAX_FILE_LINES, MAX_FUNCTION_LINES = 16, 500, 80

IMPORT_ALL = """
import importlib, pkgutil, stayaligned

names = [module.name for module in pkgutil.walk_packages(stayaligned.__path__, "stayaligned.")]
names.remove("stayaligned.__main__")  # runs the command
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_guards_below_see_the_source_files() -> None:
    assert len(SOURCES) >= 100
    assert {path.parent.name for path in BUDGETED} >= {"benchmarks", "studies", "plugins"}


def test_the_package_has_few_names_at_the_top() -> None:
    not_counted = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    names = {path.name for path in PACKAGE.iterdir()} - not_counted
    assert len(names) <= MAX_TOP_LEVEL_NAMES, sorted(names)


@pytest.mark.parametrize("path", BUDGETED, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_within_their_budget(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


def test_no_two_public_classes_have_the_same_name() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module_name(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_every_other_module_can_be_imported_after_hf_is_deleted(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "stayaligned", ignore=shutil.ignore_patterns("hf", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 80


def test_the_layers_contract_is_exhaustive_and_names_every_part_of_the_package() -> None:
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    (layers,) = [contract for contract in contracts if contract["type"] == "layers"]
    assert layers["exhaustive"]
    named = {name for line in layers["layers"] for name in re.split(r"\s*\|\s*", line)}
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} <= named
