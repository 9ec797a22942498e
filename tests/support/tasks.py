"""A task's rows as a source, and its completions, for tests of tasks."""

from pathlib import Path
from typing import Any

from stayaligned.core.records import Completion, Message
from support.world import write_rows


def write_source(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON lines and return the path as a task's source."""
    return str(write_rows(path, rows))


def completion(text: str, reference: str) -> Completion:
    """Return a completion of some prompt, with its reference."""
    prompt = (Message(role="user", content="q"),)
    return Completion(id="1", prompt_set="task", prompt=prompt, text=text, reference=reference)
