"""Read the completions that a result was computed from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import JUDGED, Completion, read_jsonl
from stayaligned.evaluation.measure import prompt_hash, text_hash
from stayaligned.evaluation.results import RESULT_FILE, StoredResult

COMPLETIONS_FILE = "completions.jsonl"
_EDITED = "The file is incomplete or was edited; give the whole file, as the command wrote it."


def stored_completions(stored: StoredResult) -> tuple[Completion, ...]:
    """Read the completions of a result: from its own directory, where `judge` writes them, or else from its stage.

    Raises:
        StayalignedError: if they are missing, damaged, or others than those of the result's evidence.
    """
    path = stored.directory / COMPLETIONS_FILE
    if not path.exists():
        path = stored.root / stored.result.provenance.stages.get("generate", "") / COMPLETIONS_FILE
    completions = read_completions(path, hint=f"Delete {path.parent} and rerun the command that wrote it.")
    found = {(c.prompt_set, c.id): (prompt_hash(c.conversation), text_hash(c.text)) for c in completions}
    expected = {
        place: (row.prompt, row.completion or found.get(place, ("", ""))[1]) for place, row in stored.rows.items()
    }
    if found != expected:
        raise StayalignedError(
            f"{path}: not the completions that {stored.directory / RESULT_FILE} was computed from",
            hint="They were edited or exchanged; rerun the command that wrote them.",
        )
    return completions


def read_completions(path: Path, *, hint: str = _EDITED) -> tuple[Completion, ...]:
    """Read a `completions.jsonl`; `hint` says what to do about a row that is invalid.

    Raises:
        StayalignedError: if it can't be read, has no completion that a judge reads, or has an id twice.
    """
    try:
        completions = read_jsonl(path, Completion, hint=hint)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StayalignedError(
            f"{path}: {reason}", hint="The completions in the `stages` of the run are needed."
        ) from None
    check_completions(path, completions)
    return tuple(completions)


def check_completions(path: Path | str, completions: Sequence[Completion]) -> None:
    """Refuse completions of which none can be judged, or of which two have one id.

    Raises:
        StayalignedError: naming the file.
    """
    if not any(c.prompt_set in JUDGED for c in completions):
        raise StayalignedError(
            f"{path}: nothing to judge: no completion of a harmful or benign prompt",
            hint="Set `harmful_prompts` or `benign_prompts` in the run.",
        )
    duplicates = len(completions) - len({(c.prompt_set, c.id) for c in completions})
    if duplicates:
        raise StayalignedError(
            f"{path}: {duplicates} duplicate ids", hint="Give each completion of a prompt set its own id."
        )
