"""The command line of a study, and the files that it writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text


def write_study(
    description: str | None,
    name: str,
    measure: Callable[[Sequence[Path], float], tuple[str, str, Callable[[Path], None]]],
) -> str:
    """Run the command of a study: write NAME.md, NAME.csv and NAME.svg; return the text of the page.

    Args:
        description: the help text.
        name: the name of the files.
        measure: returns the page, the table and a function that draws the figure, from the directories of the grids
            and the accuracy (0 to 1) that a chosen setting may lose.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="output directories of `bench`")
    parser.add_argument("--out", type=Path, default=Path(), help="output directory; default: the current directory")
    parser.add_argument("--max-loss", type=float, default=5.0, help="points of accuracy a chosen setting may lose")
    arguments = parser.parse_args()
    out: Path = arguments.out
    try:
        text, table, draw_figure = measure(arguments.directories, arguments.max_loss / 100)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f"{name}.md", text)
        write_text(out / f"{name}.csv", table)
        draw_figure(out / f"{name}.svg")
    except StayalignedError as error:
        sys.exit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
    for ending in ("md", "svg", "csv"):
        print(f"wrote  {out / f'{name}.{ending}'}")
    return text
