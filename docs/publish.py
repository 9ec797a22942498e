"""Build the site of every version: python docs/publish.py SITES ADDRESS, run in a checkout with all tags.

SITES/0.2.0 becomes the site of the tag v0.2.0 and SITES/latest that of the checkout; a version that is there is not
built again, `latest` always is. SITES/versions.json is what the menu of versions reads, and SITES/index.html leads to
the newest release. ADDRESS is where SITES will be: https://host/path, or /path alone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.version import Version

PAGE = """<!doctype html>
<html lang="en">
  <meta charset="utf-8">
  <meta http-equiv="refresh" content="0; url={version}/docs/index.html">
  <title>stayaligned</title>
  <p><a href="{version}/docs/index.html">The documentation of stayaligned {version}</a></p>
</html>
"""
LATEST = "latest"


def publish(built: Path, sites: Path, version: str, address: str) -> None:
    """Copy a built site to its version's folder, and write the menu and the first page again from all folders."""
    if version != LATEST:
        Version(version)
    target = sites / version
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(built, target)
    folders = {folder.name for folder in sites.iterdir() if (folder / "docs" / "index.html").exists()}
    releases = sorted(folders - {LATEST}, key=Version, reverse=True)
    newest = next((name for name in releases if not Version(name).is_prerelease), (releases or [LATEST])[0])
    menu = [
        {
            "name": f"{name} (newest)" if name == newest else name,
            "version": name,
            "url": f"{address.rstrip('/')}/{name}/",
            "preferred": name == newest,
        }
        for name in [*sorted(folders & {LATEST}), *releases]
    ]
    (sites / "versions.json").write_text(json.dumps(menu, indent=2) + "\n")
    (sites / "index.html").write_text(PAGE.format(version=newest))


def publish_all(checkout: Path, sites: Path, address: str) -> None:
    """Publish each tag of a version that has no site yet, built by its `make docs`, and the checkout as `latest`."""
    tags = subprocess.check_output(["git", "tag", "--list", "v*"], cwd=checkout, text=True)
    for tag in tags.split():
        if (sites / tag[1:]).exists():
            continue
        with tempfile.TemporaryDirectory() as place:
            tree = Path(place) / "tree"
            _run(checkout, "git", "worktree", "add", "--detach", str(tree), tag)
            try:
                publish(_build(tree, tag[1:]), sites, tag[1:], address)
            finally:
                _run(checkout, "git", "worktree", "remove", "--force", str(tree))
    publish(_build(checkout, LATEST), sites, LATEST, address)


def _build(checkout: Path, version: str) -> Path:
    _run(checkout, "make", "docs", STAYALIGNED_DOCS_VERSION=version)
    return checkout / "build" / "docs"


def _run(place: Path, *command: str, **variables: str) -> None:
    subprocess.run(command, cwd=place, env=os.environ | variables, check=True)


if __name__ == "__main__":
    publish_all(Path(__file__).resolve().parents[1], Path(sys.argv[1]), sys.argv[2])
