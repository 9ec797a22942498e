"""Fine-tune an aligned language model, and show that it stayed aligned.

The public names. Each is imported when it is first used, so that `import stayaligned` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stayaligned.core.errors import StayalignedError
    from stayaligned.core.settings import Guard, Watch
    from stayaligned.defenses import ModelPair
    from stayaligned.defenses.complement import Complement
    from stayaligned.defenses.lisa import Lisa
    from stayaligned.defenses.patching.directories import patch_directory
    from stayaligned.defenses.safe_lora import SafeLora, apply_safe_lora
    from stayaligned.experiments.align import align
    from stayaligned.experiments.config.alignment import Alignment
    from stayaligned.experiments.config.experiment import Experiment, load_experiment
    from stayaligned.experiments.grid import Grid, load_grid, run_grid
    from stayaligned.experiments.run import run_experiment
    from stayaligned.gate import Decision, Limits, decide, read_side
    from stayaligned.hf.training.lisa.trainer import attach_lisa, with_lisa
    from stayaligned.hf.training.safety_probe import attach_watch
    from stayaligned.report import build_report, write_report

_HOMES = {
    "Alignment": "stayaligned.experiments.align",
    "Complement": "stayaligned.defenses.complement",
    "Decision": "stayaligned.gate",
    "Experiment": "stayaligned.experiments.config.experiment",
    "Grid": "stayaligned.experiments.grid",
    "Guard": "stayaligned.core.settings",
    "Limits": "stayaligned.gate",
    "Lisa": "stayaligned.defenses.lisa",
    "ModelPair": "stayaligned.defenses",
    "SafeLora": "stayaligned.defenses.safe_lora",
    "StayalignedError": "stayaligned.core.errors",
    "Watch": "stayaligned.core.settings",
    "align": "stayaligned.experiments.align",
    "apply_safe_lora": "stayaligned.defenses.patching.directories",
    "attach_lisa": "stayaligned.hf.training.lisa.trainer",
    "attach_watch": "stayaligned.hf.training.safety_probe",
    "build_report": "stayaligned.report",
    "decide": "stayaligned.gate",
    "load_experiment": "stayaligned.experiments.config.experiment",
    "load_grid": "stayaligned.experiments.grid",
    "patch_directory": "stayaligned.defenses.patching.directories",
    "read_side": "stayaligned.gate",
    "run_experiment": "stayaligned.experiments.run",
    "run_grid": "stayaligned.experiments.grid",
    "with_lisa": "stayaligned.hf.training.lisa.trainer",
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
