"""Run the steps of the Containerfile in an empty environment instead of a container: `container.py ROOT`.

COPY copies, RUN runs and ENTRYPOINT with CMD starts, with the paths below `/tmp/dist` moved to a temporary directory
and an environment of this interpreter in place of the image. FROM, WORKDIR and USER have no counterpart here.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PLACE = "/tmp/dist"  # noqa: S108


def steps(text: str) -> list[tuple[str, str]]:
    """Return each instruction with its argument."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def main(root: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        environment = Path(place, "env")
        venv.create(environment, with_pip=True)
        given = {**os.environ, "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        started: list[str] = []
        for name, argument in steps((root / "Containerfile").read_text()):
            if name == "COPY":
                *sources, target = argument.split()
                assert target.startswith(PLACE), target
                Path(place, "dist").mkdir(exist_ok=True)
                found = [file for source in sources for file in root.glob(source)]
                assert len(found) == len(sources), argument
                for file in found:
                    shutil.copy(file, Path(place, "dist"))
            elif name == "ENV":
                # the caches stay where this machine has them
                assert all("=" in part for part in argument.split()), argument
            elif name == "RUN":
                command = argument.replace(PLACE, f"{place}/dist")
                subprocess.run(["/bin/sh", "-ec", command], check=True, env=given, stdout=subprocess.DEVNULL)
            elif name in ("ENTRYPOINT", "CMD"):
                started += json.loads(argument)
            else:
                assert name in ("FROM", "WORKDIR", "USER"), name
        shown = subprocess.run(started, check=True, env=given, capture_output=True, text=True, cwd=place).stdout
        assert shown.startswith("Usage: stayaligned"), shown
        entry = started[: started.index("--help")]
        subprocess.run([*entry, "doctor"], check=True, env=given, capture_output=True, cwd=place)
        size = sum(file.stat().st_size for file in environment.rglob("*") if file.is_file())
        print(f"        {size / 1e6:.0f} MB in the environment of the container's steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
