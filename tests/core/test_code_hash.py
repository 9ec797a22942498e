"""A component's identity changes with its code: its own file, its bases and mixins, and the modules that it imports."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core import code_hash as hashing
from stayaligned.core.code_hash import CODE, changes_by_version_only, code_hash
from stayaligned.core.component import load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.defenses.lisa import Lisa
from stayaligned.experiments.config.experiment import REGISTRIES

OWN = [(registry, name) for registry in REGISTRIES for name in registry.names()]
PLUGIN = {
    "attack": "from stayaligned import Attack as Base",
    "task": "from stayaligned import Task as Base",
    "prompts": "from stayaligned import Prompts as Base",
    "judge": "from stayaligned import Judge as Base",
    "training defense": "from stayaligned import TrainingDefense as Base",
    "patch defense": "from stayaligned import PatchDefense as Base",
    "subclass": "from stayaligned.defenses.lisa import Lisa as Base",
}
METHODS = ["poison", "load", "score", "judge", "make_trainer", "patch"]
"""All methods that a noun can demand."""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], type]]:
    """Write files, load `plugin.py` of them as a plug-in, and return its component; each call is a new process's."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before, registered = set(sys.modules), {id(r): dict(r._plugins) for r in REGISTRIES}

    def forget() -> None:
        for name in set(sys.modules) - before:
            if name.startswith(("helper", "mixins", "stayaligned_plugin")):
                del sys.modules[name]
        for registry in REGISTRIES:
            registry._plugins.clear()
            registry._plugins.update(registered[id(registry)])
        importlib.invalidate_caches()

    def load(files: dict[str, str]) -> type:
        forget()
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        load_plugin(tmp_path / "plugin.py", REGISTRIES)
        found = [r._plugins["zorb"] for r in REGISTRIES if "zorb" in r._plugins]
        return found[0]

    yield load
    forget()


def plugin(kind: str = "task", head: str = "", base: str = "Base", body: str = "1") -> str:
    methods = "".join(f"    def {name}(self, *given): return {body}\n" for name in METHODS)
    return f"{PLUGIN[kind]}\n{head}\nclass Zorb({base}):\n    name = 'zorb'\n{methods}"


@pytest.mark.parametrize("kind", PLUGIN)
def test_an_edited_plug_in_has_another_identity(load: Callable[[dict[str, str]], Any], kind: str) -> None:
    if kind == "judge":
        identity = code_hash
    else:

        def identity(component: Any) -> Any:
            return component().identity()

    one, same, edited = (identity(load({"plugin.py": plugin(kind, body=body)})) for body in ("1", "1", "2"))
    assert (one == same, one == edited) == (True, False)


HELPED = {
    "a function of a module": ({"helper.py": "f = 1"}, "from helper import f"),
    "a module": ({"helper.py": "f = 1"}, "import helper"),
    "a module that is imported in a function": ({"helper.py": "f = 1"}, "def g():\n    import helper"),
    "a helper of a helper": ({"helper2.py": "import helper", "helper.py": "f = 1"}, "import helper2"),
    "a module of a package": ({"helpers/__init__.py": "", "helpers/helper.py": "f = 1"}, "from helpers import helper"),
    "a relative import": (
        {"helpers/__init__.py": "from .helper import *", "helpers/helper.py": "f = 1"},
        "import helpers",
    ),
    "a module that imports itself": ({"helper.py": "import helper; f = 1"}, "import helper"),
}


@pytest.mark.parametrize(("files", "head"), HELPED.values(), ids=HELPED)
def test_an_edited_module_that_a_plug_in_imports_changes_its_identity(
    load: Callable[[dict[str, str]], Any], files: dict[str, str], head: str
) -> None:
    edited = {name: text.replace("f = 1", "f = 2") for name, text in files.items()}
    one, same, other = (load({"plugin.py": plugin(head=head), **each})().identity() for each in (files, files, edited))
    assert (one == same, one == other) == (True, False)


def test_an_edited_mixin_and_an_edited_base_class_outside_the_package_change_the_identity(
    load: Callable[[dict[str, str]], Any],
) -> None:
    def identity(mixin: str) -> Any:
        files = {"plugin.py": plugin(head="from mixins import M", base="M, Base"), "mixins.py": mixin}
        return load(files)().identity()

    assert identity("class M: rows = 1") != identity("class M: rows = 2")


def test_what_a_plug_in_does_not_import_does_not_change_its_identity(load: Callable[[dict[str, str]], Any]) -> None:
    one, other = (load({"plugin.py": plugin(), "unrelated.py": text})().identity() for text in ("1", "2"))
    assert one == other


def test_two_plug_ins_of_one_file_name_are_told_apart(load: Callable[[dict[str, str]], Any], tmp_path: Path) -> None:
    one = load({"plugin.py": plugin()})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "plugin.py").write_text(plugin().replace("zorb", "wug"))
    load_plugin(tmp_path / "b" / "plugin.py", REGISTRIES)
    two = next(r._plugins["wug"] for r in REGISTRIES if "wug" in r._plugins)
    assert code_hash(one) != code_hash(two)


@pytest.mark.parametrize("installed", [True, False])
def test_components_of_a_release_count_by_their_version_and_those_of_a_checkout_by_their_file(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_is_installed", lambda _file: installed)
    assert {changes_by_version_only(registry.get(name)) for registry, name in OWN} == {installed}
    assert (CODE in Lisa().identity()) is not installed


def test_a_component_without_a_file_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[__name__], "__file__")

    class Noted(REGISTRIES[0]._bases[0]):  # type: ignore[misc, name-defined]
        name = "noted"

    with pytest.raises(StayalignedError, match=r"the source file of .*Noted can't be found"):
        code_hash(Noted)
