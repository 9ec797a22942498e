"""Add a built site to the folder of all versions: python docs/publish.py build/docs SITES 0.2.0 ADDRESS.

SITES/0.2.0 becomes the built site, SITES/versions.json is what the menu of versions reads, and SITES/index.html leads
to the newest release. `latest`, of the main branch, is a version like the others. Build each site with its version in
the environment, so that it has the menu: STAYALIGNED_DOCS_VERSION=0.2.0 make docs.
"""

import json
import shutil
import sys
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


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
