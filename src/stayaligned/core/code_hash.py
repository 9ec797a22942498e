"""Hashes of the code of components, so that stored results of code that was edited since are not reused.

What counts as a component's code: the files of its class and of the classes that it inherits from, and the user's own
modules that these files import, directly or indirectly. The interpreter's, other packages' and this package's modules
do not count, except the components that a plug-in inherits from.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from stayaligned.core.errors import StayalignedError

CODE = "hash of the code"
"""Key of the hash in a component's identity; no field can have this name."""

_PACKAGE = __name__.partition(".")[0]


@cache
def code_hash(component: type) -> str:
    """Return `sha256:` and the hash of a component's code.

    Raises:
        StayalignedError: if the source of the component's class can't be found.
    """
    files: list[Path] = []
    for base in component.__mro__:
        if not _is_part(base, component):
            continue
        file = _file_of(base.__module__)
        if file is None:
            raise StayalignedError(
                f"component {getattr(component, 'name', '')!r}: the source file of {base.__qualname__} can't be found",
                hint="Define it in a .py file and load it with --plugin: results are stored by the code's hash.",
            )
        if file not in files:
            files.append(file)
    helpers = () if _is_own(component) else _helpers(files, component.__module__)
    hashes = [*map(_hash_file, files), *sorted(map(_hash_file, helpers))]
    return f"sha256:{hashlib.sha256(b''.join(hashes)).hexdigest()}"


def changes_by_version_only(component: type) -> bool:
    """Return whether a component belongs to an installed release of this package, whose code does not change."""
    file = _file_of(component.__module__)
    return _is_own(component) and file is not None and _is_installed(file)


def _is_own(component: type) -> bool:
    return component.__module__.partition(".")[0] == _PACKAGE


def _is_part(base: type, component: type) -> bool:
    """Whether a base class is code of the component, not a contract of this package or a class of another library."""
    module = sys.modules.get(base.__module__)
    if _is_own(base):
        return not hasattr(module, "__path__") and not base.__module__.startswith(f"{_PACKAGE}.core.")
    return _is_users(_file_of(base.__module__), base.__module__, component.__module__)


def _is_users(file: Path | None, module: str, owner: str) -> bool:
    """Whether a module is the component's author's own: in the author's package, or not installed."""
    if module.partition(".")[0] == owner.partition(".")[0]:
        return True
    known = file is not None and file.suffix == ".py"
    return known and not _is_installed(file) and module.partition(".")[0] != _PACKAGE


def _file_of(module: str) -> Path | None:
    name = getattr(sys.modules.get(module), "__file__", None)
    return Path(name) if name is not None and Path(name).is_file() else None


@cache
def _is_installed(file: Path) -> bool:
    paths = sysconfig.get_paths()
    places = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [*site.getsitepackages(), site.getusersitepackages()]
    return any(file.resolve().is_relative_to(Path(place).resolve()) for place in places)


def _hash_file(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def _helpers(files: Sequence[Path], owner: str) -> list[Path]:
    """Return the author's own files that `files` import, directly or indirectly."""
    names = {Path(str(module.__file__)): name for name, module in [*sys.modules.items()] if _file_of(name)}
    given, found = [*files], []
    waiting = [*given]
    while waiting:
        file = waiting.pop()
        for module in _imported(file, names.get(file, "")):
            helper = _file_of(module) or _unloaded(module)
            if helper is not None and _is_users(helper, module, owner) and helper not in [*given, *found]:
                found.append(helper)
                waiting.append(helper)
    return found


def _imported(file: Path, name: str) -> Iterator[str]:
    """Yield the full name of each module that a file may import, anywhere in it."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            places = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            try:
                place = importlib.util.resolve_name(relative, package or None) if node.level else relative
            except ImportError:
                continue
            places = [place, *(f"{place}.{alias.name}" for alias in node.names)]
        else:
            continue
        for place in places:
            parts = place.split(".")
            yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _unloaded(module: str) -> Path | None:
    """Return the file of a module that is imported later, in a function."""
    parent = module.rpartition(".")[0]
    if parent and parent not in sys.modules:  # `find_spec` would import it
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
