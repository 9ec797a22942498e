"""Check what an sdist and a wheel hold, and their metadata: `python tests/release/contents.py dist`."""

import email
import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ("py.typed", "testbed/demo.yaml", "report/templates/", "cli/scaffold/")


def main() -> None:
    (wheel,), (source,) = (list(Path(sys.argv[1]).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.partition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(info["METADATA"]))
    package = {f for f in (ROOT / "src" / "stayaligned").rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert held == {str(file.relative_to(ROOT / "src")) for file in package}, "the wheel is not the package"
    assert all(any(place in name for name in held) for place in DATA)
    assert {"licenses/LICENSE", "entry_points.txt", "RECORD", "WHEEL", "METADATA"} == info.keys()
    page = metadata.get_payload()
    assert "](http" in page and not re.search(r"\]\((?!https?:|#)", page), "the README has links to files"
    with tarfile.open(source) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    allowed = {"src", "tests", "docs", "examples"}
    outside = {name for name in files if "/" not in name}
    assert {name.partition("/")[0] for name in files - outside} == allowed, "the sdist holds other folders"
    assert outside <= {
        *("pyproject.toml", "PKG-INFO", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
        *("SECURITY.md", "Makefile", "constraints.txt", ".gitignore"),
    }, outside
    assert not [name for name in files if "__pycache__" in name or name.endswith((".pyc", ".safetensors", ".sqlite"))]
    for field in ("Author", "Maintainer", "License-Expression", "Summary", "Requires-Python", "Keywords"):
        assert metadata[field], field
    print(f"{wheel.name}: {len(held)} files, {wheel.stat().st_size / 1e6:.1f} MB; {source.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
