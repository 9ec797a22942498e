"""The drawn pictures of the concept pages are those of the tables of docs/results/testbed.md."""

import re
import runpy
from pathlib import Path

import pytest

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def test_drawing_again_gives_the_same_pictures(tmp_path: Path) -> None:
    draw = runpy.run_path(str(IMAGES / "draw.py"))
    draw["main"].__globals__["HERE"] = tmp_path
    draw["main"]()
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in IMAGES.glob("*.svg"))
    for name in drawn:
        assert content(tmp_path / name) == content(IMAGES / name), f"{name}: run python docs/images/draw.py"


def content(path: Path) -> str:
    """The picture without matplotlib's version."""
    return re.sub(r"<dc:title>Matplotlib .*?</dc:title>", "", path.read_text())


@pytest.mark.parametrize("image", sorted(path.name for path in IMAGES.iterdir() if path.suffix in (".svg", ".png")))
def test_every_picture_is_on_a_page(image: str) -> None:
    root = IMAGES.parents[1]
    assert any(f"images/{image})" in page.read_text() for page in [root / "README.md", *root.glob("docs/**/*.md")])
