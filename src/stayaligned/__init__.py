"""Fine-tune an aligned language model, and show that it stayed aligned.

The public names. Each is imported when it is first used, so that `import stayaligned` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stayaligned.alignment import Alignment, align
    from stayaligned.benchmark import Grid, load_grid, run_grid
    from stayaligned.defenses import ModelPair
    from stayaligned.defenses.complement import Complement
    from stayaligned.defenses.lisa import Lisa
    from stayaligned.defenses.safe_lora import SafeLora
    from stayaligned.errors import StayalignedError
    from stayaligned.experiment import Experiment, load_experiment
    from stayaligned.gate import Decision, Limits, decide, read_side
    from stayaligned.hf.lisa.trainer import attach_lisa, with_lisa
    from stayaligned.hf.watching import attach_watch
    from stayaligned.patching import apply_safe_lora, patch_directory
    from stayaligned.report import build_report, write_report
    from stayaligned.running import run_experiment
    from stayaligned.watch import Guard, Watch

_HOMES = {
    "Alignment": "stayaligned.alignment",
    "Complement": "stayaligned.defenses.complement",
    "Decision": "stayaligned.gate",
    "Experiment": "stayaligned.experiment",
    "Grid": "stayaligned.benchmark",
    "Guard": "stayaligned.watch",
    "Limits": "stayaligned.gate",
    "Lisa": "stayaligned.defenses.lisa",
    "ModelPair": "stayaligned.defenses",
    "SafeLora": "stayaligned.defenses.safe_lora",
    "StayalignedError": "stayaligned.errors",
    "Watch": "stayaligned.watch",
    "align": "stayaligned.alignment",
    "apply_safe_lora": "stayaligned.patching",
    "attach_lisa": "stayaligned.hf.lisa.trainer",
    "attach_watch": "stayaligned.hf.watching",
    "build_report": "stayaligned.report",
    "decide": "stayaligned.gate",
    "load_experiment": "stayaligned.experiment",
    "load_grid": "stayaligned.benchmark",
    "patch_directory": "stayaligned.patching",
    "read_side": "stayaligned.gate",
    "run_experiment": "stayaligned.running",
    "run_grid": "stayaligned.benchmark",
    "with_lisa": "stayaligned.hf.lisa.trainer",
    "write_report": "stayaligned.report",
}

__all__ = [
    "Alignment",
    "Complement",
    "Decision",
    "Experiment",
    "Grid",
    "Guard",
    "Limits",
    "Lisa",
    "ModelPair",
    "SafeLora",
    "StayalignedError",
    "Watch",
    "align",
    "apply_safe_lora",
    "attach_lisa",
    "attach_watch",
    "build_report",
    "decide",
    "load_experiment",
    "load_grid",
    "patch_directory",
    "read_side",
    "run_experiment",
    "run_grid",
    "with_lisa",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
