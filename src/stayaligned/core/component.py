"""Components (frozen values with one behavior) and the registries that find them by name.

A component's fields are its hyper-parameters, under the names that YAML uses. The file's name is the component's name:
`defenses/lisa.py` holds the defense `lisa`. Adding a component is adding one file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stayaligned.core.code_hash import CODE, changes_by_version_only, code_hash
from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.core.moved import moved_imports, moved_imports_in

ENTRY_POINT_GROUP = "stayaligned"


class Component(BaseModel):
    """A defense, judge, task, attack or prompt set: a frozen value, equal to any other with the same settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    """The name in YAML and in `stayaligned list`; the file has the same name."""
    paper: ClassVar[str] = ""
    """The publication that the component implements; empty if there is none."""
    version: ClassVar[int] = 1
    """Raise it when the behavior changes in a way that no code of the component shows; see `core.code_hash`."""
    operational: ClassVar[frozenset[str]] = frozenset()
    """Names of the fields that change the speed or the cost but not the result (a batch size); not in `identity()`."""

    def spec(self) -> dict[str, Any]:
        """Return the plain mapping that `Registry.parse` turns into an equal component."""
        return {"name": self.name, **self.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """Return what the component's results depend on: its part of a stage key.

        These are the settings without the operational ones, the version and, unless the component is part of an
        installed release of this package, a hash of its code.
        """
        settings = {key: value for key, value in self.spec().items() if key not in self.operational}
        code = {} if changes_by_version_only(type(self)) else {CODE: code_hash(type(self))}
        return {**settings, "version": self.version, **code}

    def packages(self) -> Sequence[str]:
        """Return the modules, other than what this package always has, that the component imports with these settings.

        A run checks before it starts that they are installed, and `validate` does too.
        """
        return ()

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]


ComponentT = TypeVar("ComponentT", bound=Component)


class ComponentError(ValueError):
    """The settings of a component are invalid; carries the class, so that the message can suggest field names."""

    def __init__(self, component: type[Component], error: ValidationError) -> None:
        super().__init__(str(error))
        self.component = component
        self.error = error


class Registry(Generic[ComponentT]):
    """Finds the components of one kind: the package's own files, entry points, and plug-in files.

    A component is imported when its name is used for the first time.

    Args:
        kind: the noun in messages, for example "defense".
        package: the package whose files are components, for example "stayaligned.defenses".
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
        """Return every known name, sorted."""
        self._load_entry_points()
        return sorted({*self._own_names(), *self._plugins})

    def get(self, name: str) -> type[ComponentT]:
        """Return the component class called `name`.

        Raises:
            StayalignedError: if the name is unknown; the hint gives the nearest name and all names.
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
        """Return the file and line where `name` is defined."""
        component = self.get(name)
        return f"{inspect.getsourcefile(component)}:{inspect.getsourcelines(component)[1]}"

    def parse(self, spec: object) -> ComponentT:
        """Return a component from its name, or from a mapping with `name` and its settings, as in YAML.

        Raises:
            ValueError: if the name is unknown or a setting is invalid (pydantic collects what a validator raises).
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
        """Register a plug-in's component.

        Raises:
            StayalignedError: if another component has the name.
        """
        taken = component.name in self._own_names() or component.name in self._plugins
        if taken and self._plugins.get(component.name) is not component:
            raise StayalignedError(
                f"{inspect.getsourcefile(component)}: {self.kind} {component.name!r} is already defined in "
                f"{self.origin(component.name)}",
                hint="Choose another name.",
            )
        self._plugins[component.name] = component

    def accepts(self, component: type) -> bool:
        """Return whether `component` is of this kind."""
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
            for component in self._components_of(_load_entry_point(point)):
                self.add(component)


def components_in(module: ModuleType) -> list[type[Component]]:
    """Return the concrete components defined in `module`, without those that it imports."""
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Component)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]


def load_plugin(path: Path, registries: list[Registry[Any]]) -> list[str]:
    """Import a plug-in file, register every component in it, and return "kind name" for each.

    Raises:
        StayalignedError: if the file cannot be imported or defines no component.
    """
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    module_name = f"stayaligned_plugin_{path.stem}_{place}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise StayalignedError(f"plug-in {path}: no such Python file", hint="Give the path of a .py file.")
    _refuse_moved_imports(f"plug-in {path}", moved_imports(path.read_text(encoding="utf-8", errors="replace")))
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        _refuse_moved_imports(f"plug-in {path}", moved_imports_in(error))
        hint = f"Run `python {path}` to see the whole traceback."
        if isinstance(error, ModuleNotFoundError) and list(
            path.parent.glob(f"{(error.name or '?').partition('.')[0]}*")
        ):
            hint = f"The plug-in's directory is not on Python's path: set PYTHONPATH={path.parent.resolve()}"
        raise StayalignedError(
            f"plug-in {path} failed to import: {type(error).__name__}: {error}", hint=hint
        ) from error
    added: list[str] = []
    for component in components_in(module):
        for registry in registries:
            if registry.accepts(component):
                registry.add(component)
                added.append(f"{registry.kind} {component.name}")
    if not added:
        abstract = [c for c in vars(module).values() if inspect.isabstract(c) and c.__module__ == module_name]
        if abstract:
            missing = ", ".join(sorted(abstract[0].__abstractmethods__))
            raise StayalignedError(f"plug-in {path}: class {abstract[0].__name__} does not define {missing}")
        raise StayalignedError(
            f"plug-in {path} defines no component",
            hint="Start from `stayaligned new defense NAME` (or judge, task, attack, prompts).",
        )
    return added


def _load_entry_point(point: importlib.metadata.EntryPoint) -> ModuleType:
    distribution = point.dist.name if point.dist is not None else "an unknown distribution"
    owner = f"plug-in {point.name!r} of the installed package {distribution}"
    try:
        module = point.load()
    except Exception as error:
        _refuse_moved_imports(owner, moved_imports_in(error))
        raise StayalignedError(
            f"{owner} failed to import: {type(error).__name__}: {error}",
            hint=f"Run `python -c 'import {point.module}'` to see the whole traceback, or uninstall {distribution}.",
        ) from error
    if not isinstance(module, ModuleType):
        raise StayalignedError(
            f"{owner} is {point.value}, which is not a module",
            hint=f"An entry point of the group {ENTRY_POINT_GROUP!r} names a module: {point.name} = {point.module!r}.",
        )
    return module


def _refuse_moved_imports(owner: str, lines: list[str]) -> None:
    if lines:
        raise StayalignedError(
            "\n  ".join([f"{owner} imports from places of an earlier version of stayaligned:", *lines]),
            hint="Change these imports.",
        )
