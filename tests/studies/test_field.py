"""The study of every defense and every attack covers what is registered, and its tables in the docs are complete."""

import re
import sys
from pathlib import Path

import pytest

from stayaligned.attacks import ATTACKS
from stayaligned.defenses import DEFENSES
from stayaligned.experiments.grid import load_grid

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))

from field import percent_range  # noqa: E402
from layer_choice import Point, compare  # noqa: E402

GRIDS = {kind: load_grid(ROOT / "studies" / f"field_{kind}.yaml").expand(kind) for kind in ("defenses", "attacks")}


def test_the_grid_of_defenses_has_every_defense() -> None:
    used = {defense.name for experiment in GRIDS["defenses"] for defense in experiment.defenses}
    assert used | {"sft"} == set(DEFENSES.names())


def test_the_grid_of_attacks_has_every_attack() -> None:
    assert {experiment.attack.name for experiment in GRIDS["attacks"] if experiment.attack} == set(ATTACKS.names())


@pytest.mark.parametrize("kind", GRIDS)
def test_the_table_in_the_docs_has_every_arm(kind: str) -> None:
    page = (ROOT / "docs" / "results" / "field.md").read_text()
    rows = set(re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE))
    assert {experiment.arm for experiment in GRIDS[kind]} <= rows


def test_a_range_is_given_where_seeds_differ_by_a_point() -> None:
    assert percent_range([0.5, 0.504]) == "50.2"
    assert percent_range([0.5, 0.52, None]) == "51.0 (50–52)"
    assert percent_range([None]) == ""


def test_a_draw_is_compared_with_the_choice_of_its_own_seed() -> None:
    points = {
        "Drop 7": {1: Point(0.5, 0.9), 2: Point(0.1, 0.9)},
        "Random 7 norm 0": {1: Point(0.4, 0.9), 2: Point(0.4, 0.8)},
        "Random 7 kind 0": {1: Point(0.5, 0.9)},
        "Random 14 norm 0": {1: Point(0.0, 1.0)},
    }
    norm, kind = compare(points, "Drop 7", "7")
    assert norm.endswith("| 1 of 2 | 1 |")
    assert kind.endswith("| 0 of 1 | 0 |")
