"""Components (frozen values with one behaviour) and the registries that find them by name.

A component's fields are its hyper-parameters and its YAML. Its file name is its name: `defenses/lisa.py` holds the
defense `lisa`. Adding one is adding one file; nothing else changes.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stayaligned.core.errors import StayalignedError

ENTRY_POINT_GROUP = "stayaligned"


class Component(BaseModel):
    """A frozen value: equal settings are equal components, and `spec()` is the YAML that makes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    """The name in YAML and in `stayaligned list`; equals the file's name."""
    paper: ClassVar[str] = ""
    """Where it was published, empty if nowhere."""
    version: ClassVar[int] = 1
    """Raised when the behaviour changes, so that cached results of the old behaviour are not reused."""
    operational: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how fast or at what cost, and not with which result (a batch size): no part of the identity."""

    def spec(self) -> dict[str, Any]:
        """The plain mapping that `Registry.parse` turns into an equal component."""
        return {"name": self.name, **self.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """`spec()` without what is operational, and the version of the behaviour: what a stage key is made of."""
        kept = {key: value for key, value in self.spec().items() if key not in self.operational}
        return {**kept, "version": self.version}

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]


ComponentT = TypeVar("ComponentT", bound=Component)


class ComponentError(ValueError):
    """The fields of a component are wrong; carries the class, so that the report can suggest field names."""

    def __init__(self, component: type[Component], error: ValidationError) -> None:
        super().__init__(str(error))
        self.component = component
        self.error = error


class Registry(Generic[ComponentT]):
    """Finds the components of one kind: the package's own files, entry points, and plug-in files.

    Nothing is imported before a name is asked for.

    Args:
        kind: the noun in messages, "defense".
        package: the package whose files are components, "stayaligned.defenses".
        bases: the abstract classes of this noun.
    """

    def __init__(self, kind: str, package: str, *bases: type[ComponentT]) -> None:
        self.kind = kind
        self.plural = kind if kind.endswith("s") else f"{kind}s"
        self._package = package
        self._bases = bases
        self._plugins: dict[str, type[ComponentT]] = {}
        self._entry_points_loaded = False

    def names(self) -> list[str]:
        """Every known name, sorted."""
        self._load_entry_points()
        return sorted({*self._own_names(), *self._plugins})

    def get(self, name: str) -> type[ComponentT]:
        """The component class called `name`.

        Raises:
            StayalignedError: if there is none, with the nearest name and all names.
        """
        self._load_entry_points()
        if name in self._plugins:
            return self._plugins[name]
        if name in self._own_names():
            module = importlib.import_module(f"{self._package}.{name}")
            found = [c for c in self._components_of(module) if c.name == name]
            if len(found) != 1:
                raise TypeError(f"{module.__file__} must define exactly one {self.kind} with name = {name!r}")
            return found[0]
        raise StayalignedError(
            f"unknown {self.kind} {name!r}", hint=did_you_mean(name, self.names(), f"available {self.plural}")
        )

    def origin(self, name: str) -> str:
        """The file and line where `name` is defined."""
        component = self.get(name)
        return f"{inspect.getsourcefile(component)}:{inspect.getsourcelines(component)[1]}"

    def parse(self, spec: object) -> ComponentT:
        """A component from its name, or from a mapping with `name` and its fields, as they stand in YAML.

        Raises:
            ValueError: for pydantic to collect, with the field errors inside if there are any.
        """
        if isinstance(spec, self._bases):
            return spec
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise ValueError(f"expected one of the {self.plural}: its name, or a mapping with `name` and its settings")
        try:
            component = self.get(spec["name"])
        except StayalignedError as error:
            raise ValueError(f"{error.message}. {error.hint}") from None
        try:
            return component.model_validate({k: v for k, v in spec.items() if k != "name"})
        except ValidationError as error:
            raise ComponentError(component, error) from None

    def add(self, component: type[ComponentT]) -> None:
        """Make a plug-in's component known.

        Raises:
            StayalignedError: if the name is taken by another component.
        """
        taken = component.name in self._own_names() or component.name in self._plugins
        if taken and self._plugins.get(component.name) is not component:
            raise StayalignedError(
                f"{self.kind} {component.name!r} of {inspect.getsourcefile(component)} is already defined in "
                f"{self.origin(component.name)}",
                hint="Choose another name.",
            )
        self._plugins[component.name] = component

    def accepts(self, component: type) -> bool:
        """Whether `component` is of this kind."""
        return issubclass(component, self._bases)

    def _own_names(self) -> list[str]:
        module = importlib.import_module(self._package)
        modules = pkgutil.iter_modules(module.__path__)
        return [m.name for m in modules if not m.ispkg and not m.name.startswith("_")]

    def _components_of(self, module: ModuleType) -> list[type[ComponentT]]:
        return [c for c in components_in(module) if self.accepts(c)]  # pyright: ignore[reportReturnType]

    def _load_entry_points(self) -> None:
        if self._entry_points_loaded:
            return
        self._entry_points_loaded = True
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            for component in self._components_of(point.load()):
                self.add(component)


def components_in(module: ModuleType) -> list[type[Component]]:
    """The concrete components defined in `module` (not those that it imports)."""
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Component)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]


def load_plugin(path: Path, registries: list[Registry[Any]]) -> list[str]:
    """Import a plug-in file and register every component in it; returns "kind name" for each.

    Raises:
        StayalignedError: if the file cannot be imported or holds no component.
    """
    module_name = f"stayaligned_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise StayalignedError(f"plug-in {path}: no such Python file", hint="Give the path of a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise StayalignedError(
            f"plug-in {path} failed to import: {type(error).__name__}: {error}",
            hint=f"Run `python {path}` to see the whole traceback.",
        ) from error
    added: list[str] = []
    for component in components_in(module):
        for registry in registries:
            if registry.accepts(component):
                registry.add(component)
                added.append(f"{registry.kind} {component.name}")
    if not added:
        raise StayalignedError(
            f"plug-in {path} defines no component",
            hint="Start from `stayaligned new defense NAME` (or judge, task, attack, prompts).",
        )
    return added


def did_you_mean(word: str, known: list[str], label: str) -> str:
    """The nearest known word, if one is near, and all of them: the hint of an unknown name."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}{label[0].upper()}{label[1:]}: {', '.join(known) or 'none'}."
