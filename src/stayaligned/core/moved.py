"""Where the modules of earlier versions are now, for the error of a plug-in that still imports from the old place."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

_MOVED = {
    "bistate": "algorithms.lisa",
    "projection": "algorithms.safe_lora",
    "directions": "algorithms.alignment_delta",
    "curvature": "algorithms.curvature",
    "errors": "core.errors",
    "component": "core.component",
    "records": "core.records",
    "files": "core.files",
    "printable": "core.text",
    "watch": "core.settings",
    "csv_file": "data.csv",
    "data": "data.sources",
    "prompts": "data.prompts",
    "tasks": "data.tasks",
    "defenses._layerwise": "defenses._projection",
    "defenses._full_weights": "defenses.patching.full_weights",
    "patching": "defenses.patching.directories",
    "scanning": "defenses.patching.scan",
    "answering": "evaluation.answers",
    "degeneration": "evaluation.degeneration",
    "endpoint": "evaluation.endpoint.client",
    "harness": "evaluation.lm_eval",
    "harnessing": "experiments.stages.lm_eval",
    "host_settings": "experiments.config.host_settings",
    "judges": "evaluation.judges",
    "judging": "evaluation.verdicts",
    "measuring": "evaluation.measure",
    "metrics.prompts": "evaluation.metrics.paired",
    "metrics": "evaluation.metrics",
    "notes": "evaluation.caveats",
    "results": "evaluation.results",
    "served": "evaluation.answers",
    "spending": "evaluation.endpoint.cost",
    "alignment": "experiments.align",
    "benchmark": "experiments.grid",
    "experiment": "experiments.config.experiment",
    "pipeline": "experiments.pipeline",
    "progress": "cli.progress",
    "rejudging": "experiments.rejudge",
    "running": "experiments.run",
    "scaffold": "cli.scaffold",
    "store": "experiments.stages.store",
    "hf.classification": "hf.judge_models.classifier",
    "hf.curvature": "hf.training.curvature",
    "hf.decoding": "hf.generation.generate",
    "hf.finetuning": "hf.training.finetuning",
    "hf.fitting": "hf.judge_models.inputs",
    "hf.generation": "hf.generation.generate",
    "hf.guards": "hf.judge_models.guard",
    "hf.harness": "hf.lm_eval",
    "hf.in_memory": "hf.placement.in_memory",
    "hf.layers": "hf.placement.layers",
    "hf.lisa.refusals": "hf.training.lisa.unsupported",
    "hf.lisa": "hf.training.lisa",
    "hf.memory": "hf.generation.batching",
    "hf.perplexity": "hf.generation.perplexity",
    "hf.plain": "weights.lora_layout",
    "hf.preferences": "hf.training.preferences",
    "hf.processes": "core.processes",
    "hf.refusals": "weights.unsupported",
    "hf.resuming": "hf.training.resuming",
    "hf.stored": "hf.placement.stored",
    "hf.watching": "hf.training.safety_probe",
    "hf.weight_files": "hf.training.weight_files",
    "adapters": "weights.adapters",
    "checkpoints": "weights.checkpoints",
    "deltas": "weights.deltas",
    "safetensors_file": "weights.safetensors",
    "subspaces": "weights.subspace_file",
}
"""Old module to new module. A name that went elsewhere is found by its definition."""


def moved_imports(source: str) -> list[str]:
    """Return a line for each import from a place of an earlier version: its line number and the import to write.

    Args:
        source: Python code. Imports inside functions count; code with a syntax error has none.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            replacements = [f"write `import {new}`" for alias in node.names if (new := _new_module(alias.name))]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            replacements = list(dict.fromkeys(_replacements(node.module, [alias.name for alias in node.names])))
        else:
            continue
        lines += [f"line {node.lineno}: {new}" for new in replacements]
    return lines


def moved_imports_in(error: BaseException) -> list[str]:
    """Return `moved_imports` of the file whose import raised `error`; empty if the cause is another one."""
    trace = error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.suffix == ".py" and file.is_file() and (lines := moved_imports(file.read_text(encoding="utf-8"))):
            return [f"{file}, {line}" for line in lines]
        trace = trace.tb_next
    return []


def _replacements(module: str, names: list[str]) -> Iterator[str]:
    """The imports to write instead of `from module import names`."""
    import stayaligned

    for name in names:
        # `from stayaligned import judges` names a module.
        if module == "stayaligned":
            if new := None if name in dir(stayaligned) else _new_module(f"{module}.{name}"):
                yield f"write `import {new}`"
        elif new := _new_module(module, name):
            place = "stayaligned" if name in dir(stayaligned) else _find_definition(name, new)
            yield f"write `from {place} import {name}`" if place else f"{name} is gone, see CHANGELOG.md"


def _find_definition(name: str, expected: str) -> str | None:
    """The module that defines `name`: `expected`, or the only other one; None if there is none."""
    root = Path(__file__).parents[1]
    places = [
        ".".join(("stayaligned", *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for file in sorted(root.rglob("*.py"))
        if name in _top_level_names(file)
    ]
    if expected in places:
        return expected
    return places[0] if len(places) == 1 else None


def _top_level_names(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.ImportFrom() if file.name == "__init__.py":
                names.update(alias.asname or alias.name for alias in node.names)
            case _:
                pass
    return names


def _new_module(module: str, name: str = "") -> str | None:
    """The present place of a module of an earlier version, or of a name in it; None where nothing has moved."""
    if not module.startswith("stayaligned."):
        return None
    parts = module.removeprefix("stayaligned.").split(".")
    if _exists(module):
        # Today's package `stayaligned.data` has the name of a module of earlier versions.
        if ".".join(parts) not in _MOVED or not name or _exists(f"{module}.{name}"):
            return None
        if hasattr(importlib.import_module(module), name):
            return None
    for length in range(len(parts), 0, -1):
        old = ".".join(parts[:length])
        new = _MOVED.get(old)
        if new is not None and (length == len(parts) or not _exists(f"stayaligned.{old}")):
            return ".".join(["stayaligned", new, *parts[length:]])
    return None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
