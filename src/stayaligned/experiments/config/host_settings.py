"""Names of the settings of transformers, TRL and PEFT, read from their source files without importing them.

Importing `TrainingArguments` takes five seconds and imports torch; an unknown key in a configuration must be reported
in a fraction of a second. The classes are dataclasses, so their annotated assignments are their settings.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Literal

from stayaligned.core.errors import StayalignedError

Host = Literal["transformers", "sft", "lora"]

_SOURCES: dict[Host, tuple[tuple[str, str, str], ...]] = {
    "transformers": (("transformers", "training_args.py", "TrainingArguments"),),
    "sft": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
    ),
    "lora": (
        ("peft", "tuners/lora/config.py", "LoraConfig"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "config.py", "PeftConfigMixin"),
    ),
}


@cache
def setting_names(host: Host) -> frozenset[str]:
    """Return the fields of TrainingArguments ("transformers"), SFTConfig ("sft") or LoraConfig ("lora").

    Raises:
        StayalignedError: if the library is not installed.
    """
    return frozenset().union(*(_dataclass_fields(*source) for source in _SOURCES[host]))


def _dataclass_fields(package: str, file: str, class_name: str) -> set[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise StayalignedError(
            f"{package} is not installed", hint=f"pip install 'stayaligned[{'trl' if package == 'trl' else 'dev'}]'"
        )
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and "ClassVar" not in ast.unparse(field.annotation)
                and "init=False" not in ast.unparse(field.value or ast.Constant(None))
            }
    raise AttributeError(f"{package}/{file} has no class {class_name}")
