"""Fine-tune an aligned language model, and show that it stayed aligned.

The public names. Each name is imported when it is first used, so that `import stayaligned` is instantaneous.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stayaligned.algorithms.lisa_schedule import LisaSettings as LisaSettings
    from stayaligned.attacks import Attack as Attack
    from stayaligned.core.errors import StayalignedError as StayalignedError
    from stayaligned.core.records import Completion as Completion
    from stayaligned.core.records import Example as Example
    from stayaligned.core.records import LayerReport as LayerReport
    from stayaligned.core.records import Message as Message
    from stayaligned.core.records import Outcome as Outcome
    from stayaligned.core.records import Verdict as Verdict
    from stayaligned.core.settings import Guard as Guard
    from stayaligned.core.settings import Watch as Watch
    from stayaligned.data.prompts import Prompts as Prompts
    from stayaligned.data.sources import read_examples as read_examples
    from stayaligned.data.tasks import Split as Split
    from stayaligned.data.tasks import Task as Task
    from stayaligned.defenses import ModelPair as ModelPair
    from stayaligned.defenses import PatchDefense as PatchDefense
    from stayaligned.defenses import PatchedAdapter as PatchedAdapter
    from stayaligned.defenses import TrainingDefense as TrainingDefense
    from stayaligned.defenses import TrainingSetup as TrainingSetup
    from stayaligned.defenses.complement import Complement as Complement
    from stayaligned.defenses.lisa import Lisa as Lisa
    from stayaligned.defenses.patching.directories import patch_directory as patch_directory
    from stayaligned.defenses.safe_lora import SafeLora as SafeLora
    from stayaligned.defenses.safe_lora import apply_safe_lora as apply_safe_lora
    from stayaligned.evaluation.judges import Judge as Judge
    from stayaligned.evaluation.rows import load_results as load_results
    from stayaligned.experiments.align import align as align
    from stayaligned.experiments.config.alignment import Alignment as Alignment
    from stayaligned.experiments.config.experiment import Experiment as Experiment
    from stayaligned.experiments.config.experiment import load_experiment as load_experiment
    from stayaligned.experiments.grid import Grid as Grid
    from stayaligned.experiments.grid import load_grid as load_grid
    from stayaligned.experiments.grid import run_grid as run_grid
    from stayaligned.experiments.run import run_experiment as run_experiment
    from stayaligned.gate import Decision as Decision
    from stayaligned.gate import Limits as Limits
    from stayaligned.gate import decide as decide
    from stayaligned.gate import read_side as read_side
    from stayaligned.hf.training.lisa.trainer import attach_lisa as attach_lisa
    from stayaligned.hf.training.lisa.trainer import with_lisa as with_lisa
    from stayaligned.hf.training.safety_probe import attach_watch as attach_watch
    from stayaligned.report import build_report as build_report
    from stayaligned.report import write_report as write_report

# The imports above, for the interpreter; `tests/core/test_public_names.py` compares the two.
_NAMES = {
    "stayaligned.algorithms.lisa_schedule": ("LisaSettings",),
    "stayaligned.attacks": ("Attack",),
    "stayaligned.core.errors": ("StayalignedError",),
    "stayaligned.core.records": ("Completion", "Example", "LayerReport", "Message", "Outcome", "Verdict"),
    "stayaligned.core.settings": ("Guard", "Watch"),
    "stayaligned.data.prompts": ("Prompts",),
    "stayaligned.data.sources": ("read_examples",),
    "stayaligned.data.tasks": ("Split", "Task"),
    "stayaligned.defenses": ("ModelPair", "PatchDefense", "PatchedAdapter", "TrainingDefense", "TrainingSetup"),
    "stayaligned.defenses.complement": ("Complement",),
    "stayaligned.defenses.lisa": ("Lisa",),
    "stayaligned.defenses.patching.directories": ("patch_directory",),
    "stayaligned.defenses.safe_lora": ("SafeLora", "apply_safe_lora"),
    "stayaligned.evaluation.judges": ("Judge",),
    "stayaligned.evaluation.rows": ("load_results",),
    "stayaligned.experiments.align": ("align",),
    "stayaligned.experiments.config.alignment": ("Alignment",),
    "stayaligned.experiments.config.experiment": ("Experiment", "load_experiment"),
    "stayaligned.experiments.grid": ("Grid", "load_grid", "run_grid"),
    "stayaligned.experiments.run": ("run_experiment",),
    "stayaligned.gate": ("Decision", "Limits", "decide", "read_side"),
    "stayaligned.hf.training.lisa.trainer": ("attach_lisa", "with_lisa"),
    "stayaligned.hf.training.safety_probe": ("attach_watch",),
    "stayaligned.report": ("build_report", "write_report"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:
    __all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_MODULES)
