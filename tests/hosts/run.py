"""Run the tests that depend on the host libraries on each set of their versions, and print what passed.

    python tests/hosts/run.py [SET ...]

A set is a file of pins beside this one; `newest` is `constraints.txt`. Each gets an environment in `.hosts/`, into
which pip installs torch, the pins and this package: a range that does not admit the pins fails there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETS = ("oldest", "llamafactory", "axolotl", "newest")
HOSTS = ("transformers", "peft", "accelerate", "datasets", "trl")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "beartype", "jaxtyping", "gguf", "sentencepiece", "protobuf", "regex")
GROUPS = {
    "private names": "tests/hf/test_hosts",
    "Lisa against the loop": "tests/invariants/test_lisa_oracle",
    "resuming": "tests/invariants/test_lisa_resume",
    "Lisa's rows and losses": "tests/hf/training/lisa",
    "training": "tests/hf/training",
    "placement": "tests/hf/placement",
    "project, Safe LoRA": "tests/defenses",
    "generation": "tests/hf/generation",
    "architectures": "tests/hf/test_architectures",
    "models and chat templates": "tests/hf",
}
"""Beginnings of paths; a test belongs to the first that fits."""


def install(name: str) -> Path:
    """Create or update the environment of a set; return its Python."""
    home = ROOT / ".hosts" / name
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    newest = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (torch,) = re.findall(r"^torch==\S+$", newest, re.MULTILINE)
    pins = ROOT / "tests" / "hosts" / f"{name}.txt"
    wanted = ["--requirement", str(pins)] if pins.exists() else ["--constraint", "constraints.txt", *HOSTS]
    for packages in ([torch], [torch, *wanted, "--editable", ".[models,report]", *TOOLS]):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], cwd=ROOT, check=True)
    return python


def run(name: str, python: Path) -> tuple[Counter[str], Counter[str], int]:
    """Run the tests of a set; return the tests that passed and that failed by group, and how many are out of reach."""
    report = ROOT / ".hosts" / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-n", "2", "-m", "not slow", f"--junit-xml={report}"]
    paths = ("tests/invariants", "tests/hf", "tests/defenses")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, *paths], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (ROOT / ".hosts" / f"{name}.log").write_text(ran.stdout + ran.stderr, encoding="utf-8")
    passed, failed = Counter[str](), Counter[str]()
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 (pytest wrote it)
        path = case.attrib["classname"].replace(".", "/")
        group = next((each for each, start in GROUPS.items() if path.startswith(start)), "collection")
        (failed if case.find("failure") is not None or case.find("error") is not None else passed)[group] += 1
    left_out = re.search(r"tests out of reach of the installed hosts: (\d+)", ran.stdout)
    return passed, failed, int(left_out[1]) if left_out else 0


def main() -> None:
    """Install and test the named sets, or all; exit with 1 if a test failed."""
    names = sys.argv[1:] or list(SETS)
    results = {name: run(name, install(name)) for name in names}
    print("| tests passed | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    broken = False
    for group in (*GROUPS, "collection"):
        cells: list[str] = []
        for passed, failed, _ in results.values():
            broken = broken or failed[group] > 0
            cells.append(f"{passed[group]}, **{failed[group]} failed**" if failed[group] else str(passed[group]))
        if any(cell != "0" for cell in cells):
            print(f"| {group} | {' | '.join(cells)} |")
    print(f"| *out of reach* | {' | '.join(str(left_out) for _, _, left_out in results.values())} |")
    sys.exit(1 if broken or any(not sum(passed.values()) for passed, _, _ in results.values()) else 0)


if __name__ == "__main__":
    main()
