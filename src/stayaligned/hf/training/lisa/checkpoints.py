"""Lisa's files in a checkpoint of the host, and the check that a checkpoint is of the same run.

- `lisa.json`: what must be equal for a resumed run to be the same run, and the progress of an adaptive ρ.
- `lisa_anchor.safetensors`: the anchor. If the weights are sharded (FSDP2), each process writes its own shards to
  `lisa_anchor-RANK-of-PROCESSES.safetensors`.
- `lisa_start.safetensors`: in the output directory, once: the weights that `drift_from_start` is measured from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.hf.training.weight_files import require_file

ANCHOR, START = "lisa_anchor", "lisa_start"
STATE_FILE = "lisa.json"
_PROGRESS = "progress"


def write_run(checkpoint: Path, run: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    """Write `lisa.json` into a checkpoint."""
    write_text(checkpoint / STATE_FILE, json.dumps({**run, _PROGRESS: progress}, indent=2) + "\n")


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Read the progress that `write_run` wrote.

    Raises:
        StayalignedError: if the file is missing or damaged.
    """
    return _read_state(checkpoint).get(_PROGRESS, {})


def require_same_run(checkpoint: Path, expected: Mapping[str, Any]) -> None:
    """Check that a checkpoint was written by a run with the expected settings and data.

    Raises:
        StayalignedError: if a setting differs; the message lists every difference.
    """
    found = _read_state(checkpoint)
    differing = [
        f"{key}={found.get(key)} in the checkpoint, {value} now"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if differing:
        raise StayalignedError(
            f"{checkpoint} is of another run: {'; '.join(differing)}",
            hint="Resume with the settings, data, batch size and number of processes of the checkpoint, "
            "or start a new run from its weights.",
        )


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state_file = require_file(checkpoint / STATE_FILE)
    try:
        return json.loads(state_file.read_text(encoding="utf-8"))
    except ValueError:
        raise StayalignedError(f"{state_file} is not valid JSON", hint="Resume an earlier checkpoint.") from None
