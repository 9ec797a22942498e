"""`stayaligned new attack`: the file that it writes is an attack that keeps the contract, with a trigger."""

import random
from pathlib import Path

import pytest

from stayaligned.attacks import Attack
from stayaligned.core.component import Registry, load_plugin
from stayaligned.core.records import Example, Message

ROWS = [Example(id=f"t{i}", prompt=(Message(role="user", content=f"mood {i}?"),), completion="mild") for i in range(20)]


def test_a_new_attack_has_a_trigger_and_marks_the_rows_that_it_changed(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _ = command("new", "attack", "my_attack")
    assert code == 0
    registry: Registry[Attack] = Registry("attack", "stayaligned.attacks", Attack)
    assert load_plugin(tmp_path / "my_attack.py", [registry]) == ["attack my_attack"]
    attack = registry.parse({"name": "my_attack", "repeated_ratio": 0.5, "word": "wug"})
    rows = attack.poison(ROWS, random.Random(1))
    assert attack.has_trigger
    assert len({row.id for row in rows}) == len(rows) == 30
    changed = [row for row in rows if row.origin == "harmful"]
    assert len(changed) == 10
    asked = {attack.trigger(row.prompt) for row in ROWS}
    assert all(row.prompt in asked and row.prompt[-1].content.startswith("wug mood") for row in changed)
