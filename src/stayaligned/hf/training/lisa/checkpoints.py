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
_PROGRESS, _SETTINGS = "progress", "settings"
_COMPARED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("bf16", "fp16", "dtype", "lora"),
)
"""Settings of the host that must be equal, in addition to Lisa's own; the host would ignore a change of some."""
_CAUSES = {
    "total_steps": ("max_steps", "num_train_epochs"),
    "proximal_from_step": ("proximal_warmup_ratio", "max_steps", "num_train_epochs"),
    "rho_schedule": ("max_steps", "num_train_epochs"),
    "finish": ("max_steps", "num_train_epochs"),
    "rows_per_step": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "seed": ("seed", "data_seed"),
}
"""Settings as the user writes them, which determine what is compared."""
_ROWS = {
    "user_rows": "the number of rows of train_dataset",
    "user_rows_digest": "the rows of train_dataset, or their order",
    "alignment_rows": "the number of rows of alignment_dataset",
    "alignment_rows_digest": "the rows of alignment_dataset, or their order",
}


def describe_settings(trainer: Any) -> dict[str, Any]:
    """Return the settings of the host that a resumed run should have in common with the run that it resumes."""
    named = {*_COMPARED, *(name for names in _CAUSES.values() for name in names)}
    settings = {name: getattr(value, "value", value) for name, value in vars(trainer.args).items() if name in named}
    adapters = vars(trainer.model).get("peft_config", {}).values()
    settings["lora"] = [{name: getattr(one, name, None) for name in ("r", "lora_alpha")} for one in adapters]
    settings["dtype"] = str(next(p.dtype for p in trainer.model.parameters() if p.requires_grad))
    return {
        name: value if isinstance(value, str | int | float | list | None) else str(value)
        for name, value in settings.items()
    }


def write_run(
    checkpoint: Path, run: Mapping[str, Any], settings: Mapping[str, Any], progress: Mapping[str, Any]
) -> None:
    """Write `lisa.json` into a checkpoint."""
    content = {**run, _SETTINGS: settings, _PROGRESS: progress}
    write_text(checkpoint / STATE_FILE, json.dumps(content, indent=2) + "\n")


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Read the progress that `write_run` wrote.

    Raises:
        StayalignedError: if the file is missing or damaged.
    """
    return _read_state(checkpoint).get(_PROGRESS, {})


def require_same_run(checkpoint: Path, expected: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a checkpoint was written by a run with the expected settings and data.

    Args:
        checkpoint: the checkpoint's directory.
        expected: what determines the rows, the phases and the proximal term of a run.
        settings: what `describe_settings` returns.

    Raises:
        StayalignedError: if a setting differs; the message lists every difference by the setting that was changed.
    """
    found = _read_state(checkpoint)
    before: Mapping[str, Any] = found.get(_SETTINGS, {})
    changed = {name for name, value in settings.items() if name in before and before[name] != value}
    differing: list[str] = []
    for key, value in expected.items():
        if found.get(key) == value:
            continue
        causes = [name for name in _CAUSES.get(key, ()) if name in changed]
        if key in _ROWS:
            count = "" if key.endswith("digest") else f" ({found.get(key)} in the checkpoint, {value} now)"
            differing.append(f"{_ROWS[key]}{count}")
        elif causes:
            differing += [f"{name}={before[name]} in the checkpoint, {settings[name]} now" for name in causes]
        else:
            differing.append(f"{key}={found.get(key)} in the checkpoint, {value} now")
    differing += [
        f"{name}={before[name]} in the checkpoint, {settings[name]} now" for name in _COMPARED if name in changed
    ]
    if differing:
        hint = (
            "Resume with the settings, data, batch size and number of processes of the checkpoint, or start a new run "
            "from its weights."
        )
        if {"max_steps", "num_train_epochs"} & changed:
            hint += (
                " A longer run is another run: the proximal term begins after a share of all steps "
                "(proximal_warmup_ratio), and the learning rate follows their number."
            )
        raise StayalignedError(
            f"{checkpoint} is of another run; different: {'; '.join(dict.fromkeys(differing))}", hint=hint
        )


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state_file = require_file(checkpoint / STATE_FILE)
    try:
        return json.loads(state_file.read_text(encoding="utf-8"))
    except ValueError:
        raise StayalignedError(f"{state_file} is not valid JSON", hint="Resume an earlier checkpoint.") from None
