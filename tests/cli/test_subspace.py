"""`stayaligned subspace build`, and outputs inside inputs: of it, of `project` and of `align`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stayaligned.core.files import fingerprint
from stayaligned.testing import write_pico_adapter

Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    "words",
    [
        "project {adapter} --aligned {aligned} --base {base} --all",
        "project {adapter} --aligned {aligned} --base {base} --scan",
        "project {aligned} --aligned {aligned} --base {base} --all",
        "project {adapter} {fleet} --aligned {aligned} --base {base} --all",
        "subspace build --aligned {aligned} --base {base} --rank 1",
        "align {base} data={rows}",
    ],
)
def test_an_output_inside_an_input_is_refused(world: Path, command: Command, words: str) -> None:
    for name in ("adapter", "fleet"):
        if not (world / name).exists():
            write_pico_adapter(world / name, world / "aligned")
    places = {name: world / name for name in ("aligned", "base", "adapter", "fleet")}
    before = fingerprint(world)
    given = words.format(**places, rows=world / "alignment.jsonl").split()
    for name, directory in places.items():
        if str(directory) in given:
            for out in (directory / "out", directory / "deep" / "er"):
                code, shown = command(*given, "--out", out)
                assert code == 2, shown
                assert f"is inside the input {world / name}" in " ".join(shown.split())
    assert fingerprint(world) == before
