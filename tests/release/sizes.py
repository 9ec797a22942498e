"""Print the installed size of this package by extra, from the files of the environment that runs this program.

python tests/release/sizes.py pyproject.toml
"""

import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MB = 1e6


def installed_with(lines: list[str]) -> set[str]:
    """Return the distributions that these requirements install, with all that those require."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in lines]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found.add(name)
        for extra in ("", *wanted.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                for line in package.requires or ():
                    need = Requirement(line)
                    if need.marker is None or need.marker.evaluate({"extra": extra}):
                        waiting.append(need)
    return found


def size(name: str) -> float:
    package: Distribution = distribution(name)
    paths = [Path(str(package.locate_file(file))) for file in package.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file()) / MB


def main() -> None:
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    core = installed_with(project["dependencies"])
    torch = installed_with(["torch"])
    extras: dict[str, list[str]] = project["optional-dependencies"]
    print(f"{'':<12}{'packages':>9}{'MB':>8}")
    for title, names in (("torch", torch), ("core", core - torch)):
        print(f"{title:<12}{len(names):>9}{sum(map(size, names)):>8.0f}")
    for extra in ("models", "trl", "report", "endpoint", "eval", "all"):
        lines = [one for one in expand(extra, extras) if not one.startswith("stayaligned[")]
        names = installed_with(lines) - core
        largest = sorted(names, key=size, reverse=True)[:4]
        text = ", ".join(f"{name} {size(name):.0f}" for name in largest)
        print(f"+ {extra:<10}{len(names):>9}{sum(map(size, names)):>8.0f}  {text}")


def expand(extra: str, extras: dict[str, list[str]]) -> list[str]:
    """Return the requirements of an extra, with those of the extras that it contains."""
    own = [Requirement(line) for line in extras[extra]]
    inner = [
        line for need in own if need.name == "stayaligned" for name in need.extras for line in expand(name, extras)
    ]
    return [str(need) for need in own if need.name != "stayaligned"] + inner


if __name__ == "__main__":
    main()
