"""Each published version has its folder; the menu and the first page follow from the folders."""

import json
import runpy
import subprocess
from pathlib import Path

import pytest

MODULE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "publish.py"))
PUBLISH = MODULE["publish"]


def test_the_menu_has_every_version_newest_first_and_prefers_the_newest_release(tmp_path):
    built, sites = tmp_path / "built", tmp_path / "sites"
    (built / "docs").mkdir(parents=True)
    for version in ("0.9.0", "latest", "0.10.0", "0.11.0rc1", "0.9.0"):
        (built / "docs" / "index.html").write_text(version)
        PUBLISH(built, sites, version, "https://zorb.example/docs/")
    menu = json.loads((sites / "versions.json").read_text())
    assert [entry["version"] for entry in menu] == ["latest", "0.11.0rc1", "0.10.0", "0.9.0"]
    assert [entry["version"] for entry in menu if entry["preferred"]] == ["0.10.0"]
    assert menu[-1]["url"] == "https://zorb.example/docs/0.9.0/"
    assert "url=0.10.0/docs/index.html" in (sites / "index.html").read_text()
    assert (sites / "0.10.0" / "docs" / "index.html").read_text() == "0.10.0"


def test_a_version_that_is_none_changes_nothing(tmp_path):
    (tmp_path / "built").mkdir()
    with pytest.raises(ValueError, match="zorb"):
        PUBLISH(tmp_path / "built", tmp_path / "sites", "zorb", "https://zorb.example")
    assert not (tmp_path / "sites").exists()


def test_each_tag_is_built_once_from_its_own_files_and_the_checkout_always(tmp_path):
    checkout, sites = tmp_path / "checkout", tmp_path / "sites"
    checkout.mkdir()
    steps = ["mkdir -p build/docs/docs", "echo `cat text` $$STAYALIGNED_DOCS_VERSION > build/docs/docs/index.html"]
    (checkout / "Makefile").write_text("docs:\n" + "".join(f"\t{step}\n" for step in steps))

    def git(*arguments):
        who = ["-c", "user.name=zorb", "-c", "user.email=zorb@zorb.example"]
        subprocess.run(["git", *who, *arguments], cwd=checkout, check=True, capture_output=True)

    git("init", "--initial-branch=main")
    for text, tag in (("old", "v0.1.0"), ("new", "v0.2.0"), ("main", None)):
        (checkout / "text").write_text(text + "\n")
        git("add", "text", "Makefile")
        git("commit", "-m", text)
        if tag:
            git("tag", tag)
    MODULE["publish_all"](checkout, sites, "/zorb")
    (sites / "0.1.0" / "kept").touch()
    MODULE["publish_all"](checkout, sites, "/zorb")
    found = {path.parents[1].name: path.read_text().split() for path in sites.glob("*/docs/index.html")}
    assert found == {"0.1.0": ["old", "0.1.0"], "0.2.0": ["new", "0.2.0"], "latest": ["main", "latest"]}
    assert (sites / "0.1.0" / "kept").exists()
    assert "url=0.2.0/docs/index.html" in (sites / "index.html").read_text()
