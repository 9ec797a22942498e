"""Run the notebooks and store their outputs.

    make notebooks

Only answers are stored: no progress, no warnings and no times of execution.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LONGEST = 600
"""Seconds that a cell may take: the first one builds the testbed."""


def run(path):
    """Return the executed notebook; a failing cell raises CellExecutionError."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=LONGEST, kernel_name="python3", record_timing=False).execute()
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") == "stdout"]
    book.metadata.pop("language_info", None)
    return book


if __name__ == "__main__":
    for each in sorted(HERE.glob("*.ipynb")):
        nbformat.write(run(each), each)
