"""Each published version has its folder; the menu and the first page follow from the folders."""

import json
import runpy
from pathlib import Path

import pytest

PUBLISH = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "publish.py"))["publish"]


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
