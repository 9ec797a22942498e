"""The example of the how-to on labelling is the output of its script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_documented_gate_changes_from_pass_to_undecided(tmp_path: Path) -> None:
    script = ROOT / "studies" / "biased_judge.py"
    done = subprocess.run([sys.executable, script, tmp_path / "out"], capture_output=True, text=True, check=True)
    alone, with_labels, summary = done.stdout.split("$ stayaligned ")[1:]
    assert "PASS" in alone
    assert "UNDECIDED" in with_labels
    assert "differs between the arms" not in summary, "the intervals of 100 labels overlap"
    page = (ROOT / "docs" / "howto" / "label.md").read_text().partition("## An example")[2].partition("\n## ")[0]
    shown = [line[4:] for line in page.splitlines() if line.startswith("    ")]
    assert len(shown) > 8
    printed = [line.removeprefix("$ ") for line in done.stdout.splitlines()]
    assert [line for line in shown if line not in printed] == []
